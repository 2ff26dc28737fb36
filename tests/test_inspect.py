"""`python -m ringbpt.inspect`: the page is whole and its script runs in a browser; the digest is the loader's."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ringbpt.config import TokenizerConfig, parse, parse_args, run_main
from ringbpt.data.loader import make_loader
from ringbpt.data.page import shown
from ringbpt.data.text.tokenizers import BytesTokenizer, make_tokenizer, reads_as
from ringbpt.inspect import main
from ringbpt.layouts import LAYOUTS

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHAT = [{"role": "user", "content": "What is <b>2+2</b>?"}, {"role": "assistant", "content": "It is 4."}]


@pytest.fixture
def flags(tmp_path) -> list[str]:
    (tmp_path / "data.jsonl").write_text((json.dumps({"messages": CHAT}) + "\n") * 40)
    return [
        "--config=configs/debug.py",
        "--train_dataset.type=files",
        f"--train_dataset.files_dataset.path={tmp_path / 'data.jsonl'}",
        "--train_dataset.files_dataset.seq_length=256",
        "--train_dataset.files_dataset.batch_size=4",
        "--train_dataset.text_processor.chat_template=chatml",
        f"--train_dataset.cache_dir={tmp_path / 'cache'}",
        f"--html={tmp_path / 'page.html'}",
    ]


def test_terminal_and_page(flags, tmp_path, capsys):
    assert main([*flags, "--batches=1", "--rows=2"]) == 0
    out = capsys.readouterr().out
    assert "messages, 40 rows" in out and "batch 0 row 1" in out and "│<bos><|im_start|>user" in out
    page = (tmp_path / "page.html").read_text()
    tokens = re.findall(r'<b class="(\w*)" data-w="(\d)" data-d="(\d+)" data-s="(\d)"[^>]* title="([^"]*)">', page)
    assert len(tokens) == 2 * 256 and {shard for *_, shard, _ in tokens} == set("01234567")
    assert sum(kind == "first" for kind, *_ in tokens) == 4 and any(kind == "pad" for kind, *_ in tokens)
    answer = len(CHAT[1]["content"] + "<|im_end|>") + 1  # and eos
    assert sum(int(weight) for _, weight, *_ in tokens) == 4 * answer
    zigzag = np.array([int(shard) for *_, shard, _ in tokens[:256]])
    assert zigzag[0] == zigzag[-1] == 0 and zigzag[127] == zigzag[128] == 7
    assert "id 256, position 0, document 1, no loss" in tokens[0][-1] and "→ I" in page
    assert not re.search(r"(src|href)=|https?:", page) and "<b>2+2" not in page  # nothing from outside, nothing run


def tell(capsys, *argv: str) -> list[dict]:
    """The documents that --json prints, and nothing else on standard output."""
    capsys.readouterr()
    assert run_main(main, [*argv, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


SMALL = [
    "--config=configs/debug.py", "--llama.scan_mlp=False", "--train_dataset.type=json", "--train_dataset.noshuffle",
    "--train_dataset.json_dataset.seq_length=8", "--train_dataset.json_dataset.batch_size=2", "--batches=9",
]  # fmt: skip


@pytest.fixture
def small(tmp_path, monkeypatch) -> list[str]:
    """Rows of 8 tokens of six documents: one longer than a row, one that ends one token behind a row's end."""
    pairs = [("q", "abcdefghijk"), ("é", "c"), ("12345", "xyz"), ("p", "s"), ("o", "t"), ("u", "vwxyz")]
    rows = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    monkeypatch.setenv("RINGBPT_CACHE", str(tmp_path / "cache"))
    return [*SMALL, f"--train_dataset.json_dataset.path={tmp_path}/pairs.jsonl"]


def test_json_tells_which_tokens_are_themselves_learnt(small, capsys):
    """What is coloured or told was the place before each of them."""
    found = tell(capsys, *small, "--train_dataset.packing=first_fit")
    assert all(set(one) == {"batch", "row", "document", "tokens", "texts", "loss", "positions"} for one in found)
    told = {"".join(one["texts"]): "".join(map(str, one["loss"])) for one in found}
    assert told == {
        "<bos>qabcdefg": "001111111",  # g stands in the next row, and is learnt in this one
        "ghijk<eos>": "011111",
        "<bos>��c<eos>": "00011",
        "<bos>12345xyz": "000000111",
        "z<eos>": "01",
        "<bos>ps<eos>": "0011",
        "<bos>ot<eos>": "0011",
        "<bos>uvwxyz<eos>": "00111111",
    }
    assert [one["positions"][:3] for one in found[:2]] == [[0, 1, 2], [0, 1, 2]]
    for one in found:
        assert len(one["tokens"]) == len(one["texts"]) == len(one["loss"]) == len(one["positions"])
    assert [(one["batch"], one["row"], one["document"]) for one in found[:3]] == [(0, 0, 1), (0, 1, 1), (0, 1, 2)]


@pytest.mark.parametrize("packing", ["concat", "first_fit", "best_fit"])
def test_json_has_all_the_loss_that_there_is(small, capsys, packing):
    flags = [*small, f"--train_dataset.packing={packing}"]
    found = tell(capsys, *flags)
    config = parse(parse_args([flag for flag in flags if "batches" not in flag]), 8)
    loader = make_loader(config.train_dataset, BytesTokenizer(TokenizerConfig("bytes")), seed=42, vocab_size=288)
    batches = [loader.rows(step, 0, 2) for step in range(loader.steps_per_epoch)]
    assert sum(sum(one["loss"]) for one in found) == sum(int((batch.weight_BT > 0).sum()) for batch in batches)
    assert {one["batch"] for one in found} == set(range(len(batches)))
    assert len(tell(capsys, *flags, "--rows=1")) < len(found)


def test_json_and_page_in_files(small, tmp_path, capsys):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    run = [f"--logger.output_dir={tmp_path}/runs", "--logger.experiment_id=mine"]
    assert main([*small, *run, f"--json={tmp_path}/told.jsonl", "--html"]) == 0
    assert (tmp_path / "runs" / "mine" / "inspect.html").exists()
    assert json.loads((tmp_path / "told.jsonl").read_text().splitlines()[0])["batch"] == 0
    assert "batch 0 row 0" in capsys.readouterr().out
    for flags in (small, [*small, "--html"], [*small, "--html", "--logger.experiment_id=none_such"]):
        main(flags)
        [page] = re.findall(r"page: (\S+)", capsys.readouterr().out)
        assert page.endswith("inspect.html") and not page.startswith(str(Path.cwd()))
        shutil.rmtree(Path(page).parent)
    main([*small, "--html="])
    assert "page: " not in capsys.readouterr().out and not Path("inspect.html").exists()
    assert json.loads(json.dumps(tell(capsys, *small, "--digest=1")))[0]["batches"] == 1


def test_each_token_as_it_reads(tmp_path):
    """Special ones by their own names, words with the space before them, in whatever the tokenizer is made of."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models

    pieces = ["<unk>", "<s>", "</s>", "▁a", "▁time", "ly"]
    fast = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], unk_token="<unk>"))
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    fast.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>", "<|im_end|>")])
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "<|im_end|>"}')
    words = make_tokenizer(TokenizerConfig(str(tmp_path)))
    assert [reads_as(words, token) for token in range(7)] == ["<unk>", "<s>", "</s>", " a", " time", "ly", "<|im_end|>"]
    texts = iter(["some time ago there was a time"] * 20)
    options = {"vocab_size": 40, "minloglevel": 2, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_prefix=str(tmp_path / "sp"), **options)
    pieces = make_tokenizer(TokenizerConfig(str(tmp_path / "sp.model")))
    assert [reads_as(pieces, token) for token in range(3)] == ["<unk>", "<s>", "</s>"]
    assert "".join(reads_as(pieces, token) for token in pieces.encode("a time ago")) == " a time ago"
    assert [reads_as(BytesTokenizer(TokenizerConfig("bytes")), token) for token in (65, 200, 257)] == [
        "A",
        "�",
        "<eos>",
    ]


def test_digest(flags, capsys):
    assert main([*flags, "--digest=5"]) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    config = parse(parse_args([flag for flag in flags if "html" not in flag]), 8)
    loader = make_loader(config.train_dataset, BytesTokenizer(TokenizerConfig("bytes")), seed=42, vocab_size=288)
    assert printed == f"{loader.digest(5)}  the first 5 batches" and loader.digest(4) not in printed


def test_tokens_that_are_no_text():
    tokenizer = BytesTokenizer(TokenizerConfig("bytes"))
    assert [shown(tokenizer, token) for token in (256, 257, 10, 200, 65)] == ["<bos>", "<eos>", "⏎\n", "‹200›", "A"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--split=test", "--split=train_dataset"),
        ("--rows=0", "--rows=1 or more"),
        ("--digset=3", "--digset is no flag"),
    ],
)
def test_bad_flags(flags, wrong, message, capsys):
    assert run_main(main, [*flags, wrong]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(BROWSER is None, reason="no chromium here: apt-get install chromium")
def test_the_page_in_a_browser(flags, tmp_path):
    main(flags)
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [str(BROWSER), *options, "--dump-dom", (tmp_path / "page.html").as_uri()]
    dom = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert '<body class="by-loss">' in dom  # the script has run
    picture = tmp_path / "page.png"
    subprocess.run(
        [*command[:-2], f"--screenshot={picture}", command[-1]], check=True, capture_output=True, timeout=120
    )
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 10_000


def test_the_docs_picture_is_there():
    assert (Path(__file__).parents[1] / "docs" / "inspect.png").stat().st_size > 10_000


def test_it_says_how_uneven_the_work_is(flags, tmp_path, capsys):
    assert main([*flags, "--batches=1", "--llama.sequence_layout=balanced"]) == 0
    line = capsys.readouterr().out.split("attention's most over its mean, ")[1].splitlines()[0]
    found = {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+) and \d hops", line)}
    assert set(found) == {*LAYOUTS} and found["balanced"] <= 1.05 and "balanced" in line.split(", in use")[0]
    assert line.startswith("over sp=8 ") and re.search(r"over rows \d\.\d\d$", line)
    page = (tmp_path / "page.html").read_text()
    assert page.count('aria-label="work by shard"') == 4 and "shard 7: " in page
