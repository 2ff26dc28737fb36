"""Every case of bad data, from the command line: exit 2, exactly one line, at once, and nothing written."""

import gzip
import json
import os
from pathlib import Path

import pytest

from ringbpt.config import run_main
from ringbpt.inspect import main


def text(value: object) -> bytes:
    return json.dumps({"text": value}).encode() + b"\n"


GOOD = text("a good document") * 8
CUT = gzip.compress(os.urandom(2000).hex().encode())[:-9]
FLAG = "--train_dataset.json_dataset.path"
# name of the file, its content, and what is said of it; {0} is its path, {1} its folder
CASES = {
    "malformed line": (
        "a.jsonl",
        GOOD + b'{"text": "b"\n',
        "{0}:9: malformed JSON at column 13: Expecting ',' delimiter; each line must be one JSON object",
    ),
    "only bad lines": (
        "a.jsonl",
        b"{\n{\n",
        "{0}:1: malformed JSON at column 2: Expecting property name enclosed in double quotes; "
        "each line must be one JSON object",
    ),
    "empty file": ("a.jsonl", b"", "{0}:1: no examples: " + FLAG + " holds nothing but blank lines"),
    "missing text": (
        "a.jsonl",
        GOOD + b'{"txet": "b"}\n',
        "{0}:9: no field 'text' (--train_dataset.text_processor.fields); the nearest is 'txet'",
    ),
    "null": ("a.jsonl", GOOD + text(None), "{0}:9: field 'text' is null; it must be a string"),
    "number": ("a.jsonl", GOOD + text(3), "{0}:9: field 'text' is a number; it must be a string"),
    "no tokens": ("a.jsonl", GOOD + text(""), "{0}:9: the text is empty; leave the example out"),
    "invalid UTF-8": (
        "a.jsonl",
        GOOD + b'{"text": "caf\xe9"}\n',
        "{0}:9: invalid UTF-8 at byte 237 of the file (0xe9); save it as UTF-8",
    ),
    "truncated gzip": ("a.jsonl.gz", CUT, "{0}:1: the gzip file is truncated; copy it again"),
    "not gzip": (
        "a.jsonl.gz",
        GOOD,
        "{0}:1: the gzip file is corrupt (Not a gzipped file (b'{{\"')); copy it again",
    ),
    "directory": ("d", None, FLAG + "='{0}' is a directory: '{0}/*.jsonl' takes the files in it"),
    "pipe": (
        "p",
        None,
        FLAG + "='{0}' is a pipe or a device: it is read more than once, so save it to a file first",
    ),
    "empty glob": ("*.jsonl", None, FLAG + "='{0}' matches no file"),
    "no such file": ("b.jsonl", None, FLAG + "='{0}' does not exist"),
    "nothing to learn": (
        "a.jsonl",
        b'{"messages": [{"role": "user", "content": "x"}]}\n' * 40,
        "--train_dataset.text_processor.roles_to_train='assistant': no token takes loss; "
        "name a role that says something, as assistant",
    ),
    "no conversation": (
        "a.jsonl",
        b'{"messages": []}\n',
        "{0}:1: field 'messages' is empty; it must be a list of messages",
    ),
    "pairs for SFT": (
        "a.jsonl",
        b'{"chosen": "x", "rejected": "y"}\n',
        "{0}:1: a 'preference' example does not go with --objective=sft: "
        "--train_dataset.text_processor.output_key=chosen learns the chosen answers",
    ),
    "no shape": (
        "a.jsonl",
        b'{"id": 3, "body": "x"}\n',
        "{0}:1: no shape that is known here in 'id', 'body': "
        "--train_dataset.text_processor.fields=body names the text to learn",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_data_is_one_line(tmp_path, name, capsys):
    file, content, said = CASES[name]
    path = tmp_path / file
    if content is not None:
        path.write_bytes(content)
    elif name == "directory":
        path.mkdir()
    elif name == "pipe":
        os.mkfifo(path)
    flags = [
        "--config=configs/debug.py",
        "--train_dataset.type=json",
        f"{FLAG}={path}",
        "--train_dataset.json_dataset.seq_length=256",
        f"--train_dataset.cache_dir={tmp_path / 'cache'}",
        f"--html={tmp_path / 'page.html'}",
    ]
    bare = ("nothing to learn",)
    no_end = "--train_dataset.text_processor.add_eos_token=False"
    flags += [no_end, "--train_dataset.text_processor.chat_template=chatml"] if name in bare else []
    flags += ["--train_dataset.text_processor.chat_template=chatml"] if name == "no conversation" else []
    assert run_main(main, flags) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: " + said.format(path, tmp_path) + "\n"
    assert not (tmp_path / "page.html").exists()
    made = [entry.name for entry in Path(tmp_path).glob("cache/*") if entry.name.startswith("tokens-")]
    assert made == [] or name == "nothing to learn"


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "a\0b", "a\r\nb", "\ufeff"])
def test_what_stands_inside_of_a_text_does_not_end_it(tmp_path, inside, capsys):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": f"x{inside}y"}, ensure_ascii=False).encode() * 1 + b"\r\n")
    flags = ["--config=configs/debug.py", "--train_dataset.type=json", f"{FLAG}={path}", "--html="]
    small = ["--train_dataset.json_dataset.seq_length=8", "--train_dataset.json_dataset.batch_size=1"]
    assert run_main(main, [*flags, *small, "--llama.loss_chunk_size=1", f"--train_dataset.cache_dir={tmp_path}"]) == 0
    assert "text, 1 rows" in capsys.readouterr().out
