"""Sources: what counts as an example, where it stands, and one line for everything that is wrong with a file."""

import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ringbpt.config import JsonDatasetConfig, PythonDatasetConfig, UserError
from ringbpt.data.reading.files import cached
from ringbpt.data.reading.sources import HELD_OUT_SHARE, JsonSource, PythonSource, is_held_out

ROOT = Path(__file__).parents[2]


def lines(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts)


def source(tmp_path: Path, content: bytes | None = None, name: str = "data.jsonl", **config) -> JsonSource:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    return JsonSource(JsonDatasetConfig(path=str(tmp_path / name), **config), tmp_path / "cache")


def texts(some_source) -> list[str]:
    return [some_source[index]["text"] for index in range(len(some_source))]


def error(make) -> str:
    with pytest.raises(UserError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_random_access_location_and_blank_lines(tmp_path):
    data = source(tmp_path, lines("a", "b") + b"\n  \t\r\n" + lines("c")[:-1])
    assert (data[2], data[0], data[1]) == ({"text": "c"}, {"text": "a"}, {"text": "b"})
    assert data.location(2) == f"{tmp_path}/data.jsonl:5"


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "é\U0001f600"])
def test_only_lf_ends_a_line(tmp_path, inside):
    assert texts(source(tmp_path, lines(f"a{inside}b", "c"))) == [f"a{inside}b", "c"]


def test_crlf_nul_and_byte_order_mark(tmp_path):
    content = (
        b"\xef\xbb\xbf" + json.dumps({"text": "a\0b\r\nc"}).encode() + b"\r\n" + lines("d").replace(b"\n", b"\r\n")
    )
    assert texts(source(tmp_path, content)) == ["a\0b\r\nc", "d"]


@pytest.mark.parametrize("content", [b"", b"\n\n", b" \r\n\t\n", b"\xef\xbb\xbf"])
def test_nothing_but_blank_lines(tmp_path, content):
    assert "data.jsonl:1: no examples" in error(lambda: len(source(tmp_path, content)))


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"text": "b"', "malformed JSON at column 13: Expecting ',' delimiter"),
        (b"hello", "malformed JSON at column 1"),
        (b'["a"]', "a line must be a JSON object, not an array"),
        (b"3", "not a number"),
        (b"null", "not null"),
        (b"[" * 100_000, "JSON that cannot be read"),
        (b'{"a": ' + b"9" * 5000 + b"}", "JSON that cannot be read"),
    ],
)
def test_a_line_that_is_no_object(tmp_path, line, what):
    data = source(tmp_path, lines("a") + b"\n" + line + b"\n")
    message = error(lambda: data[1])
    assert message.startswith(f"{tmp_path}/data.jsonl:3: ") and what in message


def test_invalid_utf8_says_the_byte_of_the_file(tmp_path):
    content = lines("ok") + b'{"text": "caf\xe9"}\n'
    data = source(tmp_path, content)
    expected = f"data.jsonl:2: invalid UTF-8 at byte {content.index(0xE9)} of the file (0xe9)"
    assert expected in error(lambda: data[1])


def test_gzip_is_read_at_random_and_known_by_its_content(tmp_path):
    packed = gzip.compress(lines("a", "b", "c"))
    assert texts(source(tmp_path, packed, "data.jsonl.gz"))[::-1] == ["c", "b", "a"]
    again = source(tmp_path, packed, "no_suffix")
    assert again[1]["text"] == "b" and again.location(1) == f"{tmp_path}/no_suffix:2"
    assert again.fingerprint() == source(tmp_path, lines("a", "b", "c")).fingerprint()
    assert len([name for name in os.listdir(tmp_path / "cache") if not name.endswith(".lock")]) == 1


def test_truncated_or_flipped_gzip(tmp_path):
    packed = gzip.compress(os.urandom(4096).hex().encode())
    assert "data.gz:1: the gzip file is truncated" in error(lambda: source(tmp_path, packed[:-20], "data.gz"))
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 4
    assert "data.gz:1: the gzip file is corrupt" in error(lambda: source(tmp_path, bytes(flipped), "data.gz"))
    assert "the gzip file is corrupt" in error(lambda: source(tmp_path, lines("plain"), "data.gz"))
    assert all(name.endswith(".lock") for name in os.listdir(tmp_path / "cache"))


def test_glob_is_sorted_and_its_order_is_part_of_the_fingerprint(tmp_path):
    for name, text in (("b", "2"), ("a", "1"), ("c", "3")):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(text))
    (tmp_path / "d.jsonl").mkdir()
    data = source(tmp_path, name="*.jsonl")
    assert texts(data) == ["1", "2", "3"] and data.location(1) == f"{tmp_path}/b.jsonl:1"
    before = data.fingerprint()
    (tmp_path / "b.jsonl").rename(tmp_path / "z.jsonl")
    assert source(tmp_path, name="*.jsonl").fingerprint() != before


def test_fingerprint_is_of_the_content(tmp_path):
    first = source(tmp_path, lines("a", "b"), "one.jsonl").fingerprint()
    assert first == source(tmp_path, lines("a", "b"), "two.jsonl").fingerprint()
    assert first != source(tmp_path, lines("a", "c"), "one.jsonl").fingerprint()
    assert first != source(tmp_path, lines("a", "b"), "one.jsonl", example_index_at_start=1).fingerprint()


def test_paths_that_cannot_be_read(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines("a"))
    os.mkfifo(tmp_path / "pipe")
    flag = "--train_dataset.json_dataset.path"
    assert f"{flag} is empty" in error(lambda: JsonSource(JsonDatasetConfig(), tmp_path))
    missing = error(lambda: source(tmp_path, name="trian.jsonl"))
    assert missing == f"{flag}='{tmp_path}/trian.jsonl' does not exist; the nearest name is '{tmp_path}/train.jsonl'"
    assert "neither does the folder" in error(lambda: source(tmp_path, name="nowhere/x.jsonl"))
    assert "matches no file" in error(lambda: source(tmp_path, name="*.json"))
    assert f"is a directory: '{tmp_path}/*.jsonl' takes" in error(lambda: source(tmp_path, name="").__len__())
    assert "is a pipe or a device" in error(lambda: source(tmp_path, name="pipe"))
    assert "only local files" in error(lambda: JsonSource(JsonDatasetConfig(path="gs://b/x.jsonl"), tmp_path))


def test_start_in_the_middle_wraps_around(tmp_path):
    content = lines("a", "b", "c")
    after_b = len(lines("a", "b"))
    assert texts(source(tmp_path, content, start_seek_loc=after_b, example_index_at_start=2)) == ["c", "a", "b"]
    assert texts(source(tmp_path, content, start_seek_loc=1)) == ["b", "c", "a"]
    data = source(tmp_path, content, example_index_at_start=1)
    assert texts(data) == ["b", "c", "a"] and data.location(0).endswith(":2")
    assert f"start_seek_loc=99 is outside of the data ({len(content)} bytes): the last example begins at {after_b}" in (
        error(lambda: len(source(tmp_path, content, start_seek_loc=99)))
    )
    assert "example_index_at_start=3 is outside" in error(
        lambda: len(source(tmp_path, content, example_index_at_start=3))
    )


def test_start_counts_over_all_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines("a", "b"))
    (tmp_path / "b.jsonl").write_bytes(lines("c", "d"))
    assert texts(source(tmp_path, name="?.jsonl", start_seek_loc=len(lines("a", "b", "c")))) == ["d", "a", "b", "c"]


def test_an_open_source_can_be_sent_to_a_worker(tmp_path):
    data = source(tmp_path, lines("a", "b"))
    assert data[0]["text"] == "a"
    assert pickle.loads(pickle.dumps(data))[1]["text"] == "b"


def test_standard_library_is_split_by_file():
    split = {name: PythonSource(PythonDatasetConfig(split=name)) for name in ("train", "heldout", "all")}
    names = {key: {part.location(index) for index in range(len(part))} for key, part in split.items()}
    assert names["train"] | names["heldout"] == names["all"] and not names["train"] & names["heldout"]
    assert 0.01 < len(names["heldout"]) / len(names["all"]) < 0.12
    assert len({part.fingerprint() for part in split.values()}) == 3
    everything = split["all"]
    assert sum(len(text) for text in texts(everything)) > 3e6
    assert f"{Path(json.__file__)}:1" in names["all"]
    assert not any("/test/" in name or "site-packages" in name for name in names["all"])


def test_python_folder_leaves_out_what_is_no_text(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.py").write_bytes(b"\xef\xbb\xbfb = 1\r\n")
    (tmp_path / "a.py").write_text("a = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "__init__.py").write_text("\n")
    (tmp_path / "notes.txt").write_text("no")
    data = PythonSource(PythonDatasetConfig(path=str(tmp_path), split="all"))
    assert texts(data) == ["a = 1\n", "b = 1\r\n"] and data.location(1) == f"{tmp_path}/sub/b.py:1"
    assert data.left_out == {"empty": 1, "not UTF-8": 1}


def test_python_folder_that_holds_nothing(tmp_path):
    gone = PythonDatasetConfig(path=str(tmp_path / "gone"))
    assert "--eval_dataset.python_dataset.path" in error(lambda: PythonSource(gone, "eval_dataset.python_dataset"))
    assert "no .py file in the split 'train'" in error(lambda: PythonSource(PythonDatasetConfig(path=str(tmp_path))))


def test_one_name_in_twenty_is_held_out():
    count = sum(is_held_out(f"package/module_{number}.py") for number in range(4000))
    assert 4000 / HELD_OUT_SHARE * 0.8 < count < 4000 / HELD_OUT_SHARE * 1.2


def test_cached_builds_once_and_leaves_nothing_of_a_failure(tmp_path):
    def fails(path: Path) -> None:
        path.write_text("half")
        raise UserError("bad data")

    assert error(lambda: cached(tmp_path, "x", fails, "train_dataset")) == "bad data"
    assert os.listdir(tmp_path) == ["x.lock"]
    path = cached(tmp_path, "x", lambda target: target.write_text("whole") and None, "train_dataset")
    assert path.read_text() == "whole"
    assert cached(tmp_path, "x", fails, "train_dataset") == path


def test_cached_after_a_kill(tmp_path):
    killed = (
        "import os, signal, sys; from pathlib import Path; from ringbpt.data.reading.files import cached\n"
        "def build(path):\n"
        "    path.mkdir(); (path / 'token.bin').write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "cached(Path(sys.argv[1]), 'x', build, 'train_dataset')\n"
    )
    code = subprocess.run([sys.executable, "-c", killed, str(tmp_path)], cwd=ROOT, check=False).returncode
    assert code == -signal.SIGKILL and not (tmp_path / "x").exists()

    def build(path: Path) -> None:
        path.mkdir()
        (path / "whole").touch()

    assert os.listdir(cached(tmp_path, "x", build, "train_dataset")) == ["whole"]
    assert sorted(os.listdir(tmp_path)) == ["x", "x.lock"]


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--eval_dataset\.cache_dir=.*RINGBPT_CACHE") as caught:
        cached(tmp_path / "file", "x", lambda path: None, "eval_dataset")
    assert caught.value.code == 4
