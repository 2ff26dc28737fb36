"""What the README, the manual in docs/ and the other pages say works as it stands there.

Each ```bash or ```python block of a page is marked by a comment on the line above it:
`<!-- test: make -->` its make targets exist; `<!-- test: run -->` it is run, by this Python;
`<!-- test: run slow -->` the same, by `make test-all` alone, the commands of a block in one folder;
`<!-- test: parse 256 -->` its flags are parsed for so many devices; `<!-- test: parse 8, run slow -->` both;
`<!-- test: none, REASON -->` it cannot be run here. Whatever the mark, the programs and the flags that a command names
must exist, and so must every file and heading that a page links to.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from ml_collections import ConfigDict

from ringbpt.config import default_config, parse, parse_args, split_flags
from ringbpt.plan import FLAGS as PLAN_FLAGS

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "ringbpt/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
BLOCK = re.compile(
    r"(?:<!-- test: (?P<mark>.*?) -->\n)?^```(?P<language>bash|python)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL
)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
# A file of ours, by its path from the root, wherever it stands in a page.
OUR_FILE = re.compile(r"\b(?:configs|docs|ringbpt|scripts|tests)/[\w./-]*\.(?:py|md|json|png)\b")


class Block(NamedTuple):
    page: Path
    language: str
    mark: str  # "" where there is none
    text: str

    def is_marked(self, kind: str) -> bool:
        return kind in [mark.rstrip(" 0123456789") for mark in self.mark.split(", ")]

    def commands(self) -> list[list[str]]:
        return commands(self.text) if self.language == "bash" else [["python", "-c", self.text]]


def blocks(page: Path, text: str) -> list[Block]:
    """Each bash or python block of a Markdown text."""
    return [Block(page, match["language"], match["mark"] or "", match["text"]) for match in BLOCK.finditer(text)]


def commands(text: str) -> list[list[str]]:
    """The commands of a block as argument lists: continued lines joined, comments left out."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


BLOCKS = [block for page in PAGES for block in blocks(page, page.read_text())]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def marked(kind: str) -> list:
    """A block's mark and one of its commands: the parameters of the tests of one kind."""
    found = [(block.mark, words) for block in BLOCKS if block.is_marked(kind) for words in block.commands()]
    return [pytest.param(*entry, id=f"{number}-{' '.join(entry[1][:3])[:40]!r}") for number, entry in enumerate(found)]


# ---------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: named(block.page))
def test_every_block_is_marked(block):
    assert re.fullmatch(r"make|run|run slow|parse \d+(, run slow)?|none, .+", block.mark), (
        f"{named(block.page)}: say above this block how it is tested:\n{block.text}"
    )


def test_there_are_commands():
    for kind in ("make", "parse", "run", "run slow", "none"):
        assert marked(kind), kind


def test_blocks_are_found():
    text = "words\n\n<!-- test: parse 8 -->\n```bash\na --b='c d' \\\n  --e  # why\n```\n\n```bash\nf\n```\n"
    page = ROOT / "README.md"
    found = blocks(page, text)
    assert found == [
        Block(page, "bash", "parse 8", "a --b='c d' \\\n  --e  # why\n"),
        Block(page, "bash", "", "f\n"),
    ]
    assert commands(found[0].text) == [["a", "--b=c d", "--e"]]
    both = Block(page, "bash", "parse 256, run slow", "")
    assert both.is_marked("parse") and both.is_marked("run slow") and not both.is_marked("run")


def test_the_presets_are_those_of_the_manual():
    text = (ROOT / "docs" / "training.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    assert len(rows) == 8
    for name, *sizes in rows:
        llama = default_config(name).llama
        ours = (llama.hidden_size, llama.intermediate_size, llama.num_hidden_layers, llama.num_attention_heads)
        assert ours == tuple(map(int, sizes)), name


def test_the_readme_is_an_introduction():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


# ---------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize(("_", "words"), marked("make"))
def test_make_targets_exist(_, words):
    assert words[0] == "make"
    result = subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_make_train_changes_the_recipe_by_flags():
    """Flags alone would mean the plain defaults, which have no tokenizer."""
    for args, steps in (("", 250), ("--total_steps=5", 5), ("--config=tests/recipe.py", 500)):
        command = ["make", "--dry-run", "train", f"ARGS={args}"]
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        [line] = [line for line in shown.splitlines() if "-m ringbpt.train" in line]
        words = line.split()
        assert parse(parse_args(words[words.index("ringbpt.train") + 1 :]), 8).total_steps == steps


@pytest.mark.parametrize(("_", "words"), marked("run"))
def test_command_runs(_, words):
    run(words, ROOT)


def run(words: list[str], folder: Path, **environment: str) -> None:
    assert words[0] in ("python", "python3")
    command = [sys.executable, *words[1:]]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{shlex.join(words)}\n{result.stdout}{result.stderr}"


SLOW = [pytest.param(block, id=block.text[:40]) for block in BLOCKS if block.is_marked("run slow")]


@pytest.mark.slow
@pytest.mark.parametrize("block", SLOW)
def test_a_block_runs_from_top_to_bottom(block, tmp_path):
    """A later command reads what an earlier one of the block wrote."""
    for name in ("configs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    for words in block.commands():
        run(words, tmp_path, RINGBPT_CACHE=str(tmp_path / "cache"))


@pytest.mark.parametrize(("mark", "words"), marked("parse"))
def test_flags_parse(mark, words, tmp_path, monkeypatch):
    """A placeholder like <data.jsonl> becomes a file that exists, so that a check of the path can pass."""
    monkeypatch.chdir(ROOT)
    start = words.index("-m")
    assert re.fullmatch(r"ringbpt\.[a-z]+", words[start + 1])
    argv = [re.sub(r"<([\w.]+)>", lambda match: str(tmp_path / match[1]), word) for word in words[start + 2 :]]
    for name in re.findall(r"<([\w.]+)>", " ".join(words)):
        (tmp_path / name).write_text('{"text": "a"}\n')
    if words[start + 1] == "ringbpt.plan":
        _, argv = split_flags(argv, PLAN_FLAGS)
    devices = re.match(r"parse (\d+)", mark)
    assert devices
    config = parse(parse_args(argv), int(devices[1]))
    given = dict(word.removeprefix("--").partition("=")[::2] for word in argv)
    if "total_steps" in given:
        assert config.total_steps == int(given["total_steps"])


def flags_of_training(tree: ConfigDict | None = None, prefix: str = "") -> Iterator[str]:
    for name, value in (default_config() if tree is None else tree).items():
        if isinstance(value, ConfigDict):
            yield from flags_of_training(value, f"{prefix}{name}.")
        else:
            yield prefix + name


@cache
def help_of(entry: str) -> str:
    """What an entry says of itself; scripts, whose help may be less than their flags, are read."""
    if entry.endswith(".py"):
        return (ROOT / entry).read_text()
    command = [sys.executable, "-m", entry, "--help"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


COMMANDS = [(block.page, words) for block in BLOCKS if block.language == "bash" for words in block.commands()]


@pytest.mark.parametrize(
    ("page", "words"), [pytest.param(*one, id=f"{named(one[0])}-{one[1][:3]}") for one in COMMANDS]
)
def test_a_command_names_a_program_and_flags_that_exist(page, words):
    """Flags of an entry `ringbpt.X` or a script; what make, pytest and other people's programs take is theirs."""
    assert words[0] in ("python", "python3", "make", "pip", "pre-commit"), words
    if words[1] == "-m" and words[2] != "pytest":
        at = ROOT / words[2].replace(".", "/")
        assert at.with_suffix(".py").exists() or (at / "__main__.py").exists(), words[2]
    entries = [word for word in words if re.fullmatch(r"ringbpt\.\w+|scripts/\w+\.py", word)]
    if not entries:
        return
    known = {"config", *flags_of_training()}
    for word in words[words.index(entries[0]) + 1 :]:
        name = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and name not in known:
            assert re.search(rf"(--|[\"']){name}\b", help_of(entries[0])), (
                f"{named(page)}: {entries[0]} has no --{name}"
            )


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=named)
def test_files_that_are_named_exist(page):
    """In commands and in prose. The change log speaks of the past."""
    here = [ROOT, page.parent]
    assert {
        name for name in OUR_FILE.findall(page.read_text()) if not any((at / name).exists() for at in here)
    } == set()


# ---------------------------------------------------------------------------------------------- links


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE):
        slug = (
            re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()).strip().replace(" ", "-")
        )
        number = sum(1 for known in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", known))
        found.add(f"{slug}-{number}" if number else slug)
    return found


def test_anchors_are_githubs():
    text = "# A page\n## What `--load_checkpoint` takes\n## RoPE, norms (and *more*)\n```\n# none\n```\n# A page\n"
    assert anchors(text) == {"a-page", "what---load_checkpoint-takes", "rope-norms-and-more", "a-page-1"}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    text = FENCED.sub("", page.read_text())
    links = re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text)
    assert links or page.name == "context_lengths.md"
    for link in map("".join, links):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{named(page)}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{named(page)}: {link}"


def test_every_page_of_the_manual_is_reached_from_the_readme():
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen:
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)#:\s]+\.md)[)#]", page.read_text())
        todo += [(page.parent / link).resolve() for link in links]
    assert [named(page) for page in PAGES if page.resolve() not in seen] == []
