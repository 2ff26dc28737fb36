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
ZIPPED = gzip.compress(GOOD)
FLIPPED = ZIPPED[:-8] + bytes([ZIPPED[-8] ^ 1]) + ZIPPED[-7:]  # in its checksum
FLAG = "--train_dataset.json_dataset.path"
CHATML = "--train_dataset.text_processor.chat_template=chatml"
KINDS = "give a SentencePiece .model file, a Hugging Face folder or tokenizer.json, a .gguf file, or 'bytes'"
# name of the file, its content, what is said of it, and further flags; {0} is its path, {1} its folder
CASES: dict[str, tuple[str | bytes | None, ...]] = {
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
    "flipped gzip": (
        "a.jsonl.gz",
        FLIPPED,
        "{0}:1: the gzip file is corrupt (CRC check failed 0xad11f85a != 0xad11f85b); copy it again",
    ),
    "more bad lines than allowed": (
        "a.jsonl",
        GOOD + b"{\n" * 2,
        "--train_dataset.on_bad_line=skip:1: 2 bad examples (the first: {0}:9: malformed JSON at column 2: Expecting "
        "property name enclosed in double quotes; each line must be one JSON object); "
        "--train_dataset.on_bad_line=skip:2 would leave them out",
        "--train_dataset.on_bad_line=skip:1",
    ),
    "longer than a row": (
        "a.jsonl",
        GOOD + text("x" * 1000),
        "--train_dataset.long_documents=refuse: 1 documents are longer than "
        "--train_dataset.json_dataset.seq_length=256, the first of them document 9 with 1002 tokens: "
        "--train_dataset.long_documents=split or =drop, or seq_length=1002",
        "--train_dataset.long_documents=refuse",
    ),
    "token beyond the vocabulary": (
        "a.jsonl",
        GOOD,
        "--llama.vocab_size=100 is too small for --tokenizer.vocab_file='bytes' (bytes), which gave the id 257: "
        "--llama.vocab_size=258 works",
        "--llama.vocab_size=100",
    ),
    "no such tokenizer": (
        "a.jsonl",
        GOOD,
        "--tokenizer.vocab_file='{0}.model' does not exist; the nearest name is '{0}': " + KINDS,
        "--tokenizer.vocab_file={0}.model",
    ),
    "corrupt tokenizer": (
        "a.jsonl",
        GOOD,
        "--tokenizer.vocab_file='{0}' is no tokenizer.json: Cannot instantiate Tokenizer from buffer: "
        "expected `,` or `}}` at line 1 column 8",
        "--tokenizer.vocab_file={0}",
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
        "--train_dataset.text_processor.add_eos_token=False",
        CHATML,
    ),
    "no conversation": (
        "a.jsonl",
        b'{"messages": []}\n',
        "{0}:1: field 'messages' is empty; it must be a list of messages",
        CHATML,
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
    file, content, said, *more = CASES[name]
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
        *(flag.format(path) for flag in more),
    ]
    assert run_main(main, flags) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: " + said.format(path, tmp_path) + "\n"
    assert not (tmp_path / "page.html").exists()
    made = [entry.name for entry in Path(tmp_path).glob("cache/*") if entry.name.startswith("tokens-")]
    assert made == [] or name in ("nothing to learn", "longer than a row", "token beyond the vocabulary")


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "a\0b", "a\r\nb", "\ufeff"])
def test_what_stands_inside_of_a_text_does_not_end_it(tmp_path, inside, capsys):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": f"x{inside}y"}, ensure_ascii=False).encode() * 1 + b"\r\n")
    flags = ["--config=configs/debug.py", "--train_dataset.type=json", f"{FLAG}={path}", "--html="]
    small = ["--train_dataset.json_dataset.seq_length=8", "--train_dataset.json_dataset.batch_size=1"]
    assert run_main(main, [*flags, *small, "--llama.loss_chunk_size=1", f"--train_dataset.cache_dir={tmp_path}"]) == 0
    assert "text, 1 rows" in capsys.readouterr().out
