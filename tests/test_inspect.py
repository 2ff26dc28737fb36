"""`python -m ringbpt.inspect`: the page is whole and its script runs in a browser; the digest is the loader's."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ringbpt.config import TokenizerConfig, run_main
from ringbpt.data.loader import make_loader
from ringbpt.data.page import shown
from ringbpt.data.text.tokenizers import BytesTokenizer
from ringbpt.inspect import main

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


def test_digest(flags, capsys):
    assert main([*flags, "--digest=5"]) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    from ringbpt.config import parse, parse_args

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
