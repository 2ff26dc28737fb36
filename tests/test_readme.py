"""The commands in the READMEs work as they stand there.

Each ```bash or ```python block is marked by a comment on the line above it:
`<!-- test: make -->` its make targets exist; `<!-- test: run -->` it is run, by this Python; `<!-- test: parse 256 -->`
its flags are parsed for so many devices; `<!-- test: none, REASON -->` it cannot be tested here.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ringbpt.config import parse, parse_args
from ringbpt.own_flags import split_flags
from ringbpt.plan import FLAGS as PLAN_FLAGS

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", ROOT / "ringbpt" / "README.md"]
BLOCK = re.compile(
    r"(?:<!-- test: (?P<mark>.*?) -->\n)?^```(?P<language>bash|python)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL
)


def blocks(text: str) -> list[tuple[str, str, str]]:
    """(language, mark, content) of each bash or python block of a Markdown text; the mark is "" where there is none."""
    return [(match["language"], match["mark"] or "", match["text"]) for match in BLOCK.finditer(text)]


def commands(text: str) -> list[list[str]]:
    """The commands of a block as argument lists: continued lines joined, comments left out."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


BLOCKS = [(path, *block) for path in READMES for block in blocks(path.read_text())]


def marked(kind: str) -> list:
    """What follows the kind in its mark, and one command as words: the parameters of the tests of one kind."""
    found = [
        (mark.removeprefix(kind).strip(), words)
        for _, language, mark, text in BLOCKS
        if mark.split(" ")[0] == kind
        for words in (commands(text) if language == "bash" else [["python", "-c", text]])
    ]
    return [pytest.param(*entry, id=f"{number}-{' '.join(entry[1][:3])[:40]!r}") for number, entry in enumerate(found)]


@pytest.mark.parametrize(("path", "_", "mark", "text"), BLOCKS)
def test_every_block_is_marked(path, _, mark, text):
    assert re.fullmatch(r"make|run|parse \d+|none, .+", mark), (
        f"{path.name}: say above this block how it is tested:\n{text}"
    )


def test_there_are_commands():
    assert marked("make")
    assert marked("parse")


def test_blocks_are_found():
    text = "words\n\n<!-- test: parse 8 -->\n```bash\na --b='c d' \\\n  --e  # why\n```\n\n```bash\nf\n```\n"
    assert blocks(text) == [("bash", "parse 8", "a --b='c d' \\\n  --e  # why\n"), ("bash", "", "f\n")]
    assert commands(blocks(text)[0][2]) == [["a", "--b=c d", "--e"]]


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
    assert words[0] in ("python", "python3")
    command = [sys.executable, *words[1:]]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("devices", "words"), marked("parse"))
def test_flags_parse(devices, words, tmp_path, monkeypatch):
    """A placeholder like <data.jsonl> becomes a file that exists, so that a check of the path can pass."""
    monkeypatch.chdir(ROOT)
    start = words.index("-m")
    assert re.fullmatch(r"ringbpt\.[a-z]+", words[start + 1])
    argv = [re.sub(r"<([\w.]+)>", lambda match: str(tmp_path / match[1]), word) for word in words[start + 2 :]]
    for name in re.findall(r"<([\w.]+)>", " ".join(words)):
        (tmp_path / name).write_text('{"text": "a"}\n')
    if words[start + 1] == "ringbpt.plan":
        _, argv = split_flags(argv, PLAN_FLAGS)
    config = parse(parse_args(argv), int(devices))
    named = dict(word.removeprefix("--").partition("=")[::2] for word in argv)
    if "total_steps" in named:
        assert config.total_steps == int(named["total_steps"])


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#:]+)\)", path.read_text())
    assert links
    assert [link for link in links if not (path.parent / link).exists()] == []
