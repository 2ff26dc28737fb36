"""The verb as users run it: a file of prompts, a conversation, mistakes; a tiny model with a tokenizer of its own."""

import io
import json

import numpy as np
import pytest

from ringbpt.attention import api
from ringbpt.config import TokenizerConfig, UserError, run_main
from ringbpt.data.prompts import read_prompts
from ringbpt.data.text.tokenizers import make_tokenizer
from ringbpt.generate import main
from ringbpt.generation.text import Text, make_chat_encoder
from tests.golden.make_families import restore

LETTERS = "".join(map(chr, range(32, 127))) + "\n"
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}\n{% endfor %}a: "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with the 96 characters above as its vocabulary."""
    from tokenizers import Tokenizer, decoders, models

    folder = tmp_path_factory.mktemp("model")
    restore("llama3", folder)
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(LETTERS)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def run(folder, *argv: str) -> int:
    return run_main(main, [f"--load_checkpoint=huggingface::{folder}", *argv])


def test_a_file_of_prompts(folder, tmp_path, capsys):
    prompts = tmp_path / "in.jsonl"
    prompts.write_text(
        '{"prompt": "a long way to go", "id": 7}\n\n{"prompt": "b"}\n{"messages": [{"role": "user", "content": "c"}]}\n'
    )
    out = tmp_path / "out.jsonl"
    assert run(folder, f"--prompts={prompts}", f"--output={out}", "--max_new_tokens=6", "--batch_size=2") == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row.get("prompt") for row in rows] == ["a long way to go", "b", None]
    assert rows[0]["id"] == 7
    for row in rows:
        assert len(row["tokens"]) == 6 and row["finish_reason"] == "length"
        assert row["completion"] == "".join(LETTERS[token] for token in row["tokens"])
    assert capsys.readouterr().out == ""
    api._log_once.cache_clear()  # as in a process of its own
    assert run(folder, "--prompt=b", "--max_new_tokens=6") == 0
    shown = capsys.readouterr()
    assert shown.out == rows[1]["completion"] + "\n" and "attend on cpu: blockwise" in shown.err
    stop = rows[1]["completion"][3:5]
    assert run(folder, "--prompt=b", "--max_new_tokens=6", f"--stop={stop}", "--stop=never said") == 0
    assert capsys.readouterr().out == rows[1]["completion"].partition(stop)[0] + "\n"


def test_tools_and_separators(folder, tmp_path):
    """Generation renders a row's tools as training does; U+2028 inside a text ends no line."""
    tokenizer = make_tokenizer(TokenizerConfig(str(folder)))
    tokenizer.chat_template = "{% for t in tools or [] %}{{ t.name }};{% endfor %}" + TEMPLATE
    encode, messages = make_chat_encoder(tokenizer), [{"role": "user", "content": "c", "name": None}]
    plain, tooled = (tokenizer.decode(encode(messages, tools, "here")) for tools in (None, [{"name": "add"}]))
    assert (plain, tooled) == ("u: c\na: ", "add;u: c\na: ")
    with pytest.raises(UserError, match="here: message 0 of 'messages' has no 'role'"):
        encode([{"content": "c"}], None, "here")
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_prompts(file) == [{"prompt": "a\u2028b"}]


def test_a_conversation(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand?\n\nunread"))
    assert run(folder, "--chat", "--max_new_tokens=5", "--system=be brief") == 0
    answers = capsys.readouterr().out.split("> ")
    assert len(answers) == 4
    assert all(len(answer.rstrip("\n")) <= 5 for answer in answers)


MISTAKES = {
    "no checkpoint": (["--prompt=a"], "--load_checkpoint is missing"),
    "nothing to do": (["--load_checkpoint=huggingface::FOLDER"], "give one of --prompt"),
    "two things": (["--load_checkpoint=huggingface::FOLDER", "--prompt=a", "--chat"], "give one of --prompt"),
    "no flag": (["--load_checkpoint=huggingface::FOLDER", "--promt=a"], "did you mean --prompt?"),
    "too cold": (["--load_checkpoint=huggingface::FOLDER", "--prompt=a", "--temperature=-1"], "--temperature=0 is"),
    "no folder": (["--load_checkpoint=huggingface::/nowhere", "--prompt=a"], "no such folder"),
    "too long": (["--load_checkpoint=huggingface::FOLDER", "--prompt=a", "--max_new_tokens=9999"], "511 at most"),
    "other tokens": (["--load_checkpoint=huggingface::FOLDER", "--prompt=a", "--tokenizer=bytes"], "vocabulary of 96"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, folder, capsys):
    argv, message = MISTAKES[name]
    assert run_main(main, [word.replace("FOLDER", str(folder)) for word in argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_bad_prompts_name_their_line(folder, tmp_path, capsys):
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    assert run(folder, f"--prompts={prompts}") == 2
    assert f"{prompts}:2: neither" in capsys.readouterr().err


def test_stop_strings_and_half_characters_are_held_back():
    tokenizer = make_tokenizer(TokenizerConfig("bytes"))
    text = Text(tokenizer, ["<end>"])
    shown = [text.add(token) for token in "aé<en<end>b".encode()]
    assert "".join(shown) == "aé<en"
    assert text.text == "aé<en"
    assert text.finished
    assert shown[1:3] == ["", "é"]  # the first byte of two says nothing yet
    ended = Text(tokenizer, [])
    assert [ended.add(token) for token in (97, 257, 98)] == ["a", "", ""]
    open_end = Text(tokenizer, ["<end>"])
    assert "".join(open_end.add(token) for token in b"a<en") + open_end.rest() == "a<en"


def test_prompts_begin_with_bos():
    np.testing.assert_array_equal(make_tokenizer(TokenizerConfig("bytes")).encode_prompt("a"), [256, 97])
    with pytest.raises(UserError, match="no chat template"):
        make_chat_encoder(make_tokenizer(TokenizerConfig("bytes")))
