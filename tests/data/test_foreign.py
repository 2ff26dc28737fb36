"""What comes from outside is held to its file before anything is read by it: equal data, or one line, and no crash."""

import json
import os
import random
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ringbpt.config import DatasetConfig, FilesDatasetConfig, TokenizerConfig, UserError
from ringbpt.data.loader import Loader
from ringbpt.data.stored.megatron import open_megatron
from ringbpt.data.stored.prepare import prepare
from tests.data.test_formats import (
    TEXTS,
    dataset,
    error,
    load,
    source,
    write_array_record,
    write_arrow,
    write_jsonl,
    write_parquet,
    write_saved,
)

ROOT = Path(__file__).parents[2]
NUMBERS = (-1, 0, 1, 7, 1 << 20, 1 << 31, (1 << 63) - 1)


def damaged(content: bytes, seed: int, count: int, places: range | list[int] | None = None) -> Iterator[bytes]:
    """The content with a bit flipped, a number put in, or cut short, so many times."""
    rng, places = random.Random(seed), places if places is not None else range(len(content))
    for _ in range(count):
        found, at = bytearray(content), rng.choice(places)
        match rng.randrange(4):
            case 0 | 1:
                found[at] ^= 1 << rng.randrange(8)
            case 2:
                size = rng.choice((4, 8))
                found[at : at + size] = struct.pack("<q", rng.choice(NUMBERS))[:size][: len(found) - at]
            case 3:
                found = found[:at]
        yield bytes(found)


# --- Arrow, Parquet, ArrayRecord: read by libraries in C++, in a process of its own ---


def all_types(path: Path) -> Path:
    """An Arrow file with the types whose values are found by offsets, views, dictionaries and children."""
    import pyarrow as pa

    texts = [None if number == 2 else text for number, text in enumerate(TEXTS)]
    columns = {
        "text": pa.array(TEXTS),
        "large": pa.array(texts, pa.large_string()),
        "view": pa.array([f"{text} of more than twelve" for text in TEXTS], pa.string_view()),
        "dictionary": pa.array([text[:1] for text in TEXTS]).dictionary_encode(),
        "list": pa.array([[{"a": text, "b": [1, 2]}] * number for number, text in enumerate(TEXTS)]),
        "map": pa.array([[("k", 1)]] * len(TEXTS), pa.map_(pa.string(), pa.int32())),
        "time": pa.array(range(len(TEXTS)), pa.timestamp("s")),
    }
    table = pa.table(columns)
    new = pa.ipc.new_stream if "stream" in path.name else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as out, new(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return path


KINDS = {
    "a.arrow": write_arrow, "a_stream.arrow": write_arrow, "types.arrow": all_types, "types_stream.arrow": all_types,
    "a.parquet": write_parquet, "a.array_record": write_array_record,
}  # fmt: skip


def outcomes(names: list[Path]) -> dict[str, str]:
    """What tests.data.read_damaged says of each."""
    command = [sys.executable, "-m", "tests.data.read_damaged", *map(str, names)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    found = dict(line.split("\t") for line in run.stdout.splitlines())
    assert run.returncode == 0, f"{run.returncode} after {list(found)[-1:]}: {run.stderr[-500:]}"
    return {Path(name).name: said for name, said in found.items()}


def check_damaged(tmp_path: Path, count: int, seed: int) -> None:
    names, whole = [], {}
    for kind, write in KINDS.items():
        content = write(tmp_path / kind).read_bytes()
        whole[kind] = tmp_path / kind
        places = [at for at, byte in enumerate(content) if byte] if kind == "a.array_record" else None  # 64 KiB blocks
        for number, other in enumerate(damaged(content, seed, count, places)):
            stem, _, ending = kind.partition(".")
            name = tmp_path / f"{stem}-{number}.{ending}"
            name.write_bytes(other)
            names.append(name)
    found = outcomes([*whole.values(), *names])
    bad = {name: said for name, said in found.items() if not said.startswith(("rows", "refused"))}
    assert not bad and len(found) == len(names) + len(whole)
    for kind in whole:
        stem, _, ending = kind.partition(".")
        said = Counter(said for name, said in found.items() if name.startswith(f"{stem}-") and name.endswith(ending))
        assert said["refused"] > count / 5, (kind, said)
        if kind == "a.array_record":  # whose chunks have hashes
            assert said["refused"] + said[found[kind]] == count, said


def test_damaged_tables_and_records(tmp_path):
    check_damaged(tmp_path, 60, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_damaged_tables_and_records_again(seed, tmp_path):
    check_damaged(tmp_path, 300, seed)


def test_an_offset_that_leads_out_of_an_arrow_file_is_one_line(tmp_path):
    """Followed, it ended the process by a segmentation fault."""
    import pyarrow as pa

    path = tmp_path / "a.arrow"
    table = pa.table({"text": ["word " * 9] * 4})
    with pa.OSFile(str(path), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    offsets = struct.pack("<5i", 0, 45, 90, 135, 180)
    assert path.read_bytes().count(offsets) == 1
    for wrong in ((0, 45, 90, 135, 1 << 30), (0, 45, -(1 << 30), 135, 180), (0, 90, 45, 135, 180)):
        path.write_bytes(path.read_bytes().replace(offsets, struct.pack("<5i", *wrong)))
        data = source(tmp_path, path)
        assert error(data.__getitem__, 0).startswith(f"{path}:1: cannot be read: ")
        path.write_bytes(path.read_bytes().replace(struct.pack("<5i", *wrong), offsets))
    assert source(tmp_path, path)[3] == {"text": "word " * 9}


def test_two_columns_of_one_name_are_refused(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    parquet.write_table(twice, tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("n,text,text\n1,a,b\n")
    for name in ("a.parquet", "b.csv"):
        assert f"{name}:1: " in (line := error(source(tmp_path, tmp_path / name).__getitem__, 0))
        assert "two columns are called 'text'" in line


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
def test_damaged_folders_of_save_to_disk(name, tmp_path):
    saved = write_saved(tmp_path / "saved")
    path = next(saved.rglob(name))
    content, taken = path.read_bytes(), 0
    for other in damaged(content, 0, 150):
        path.write_bytes(other)
        try:
            data = source(tmp_path, saved)
            assert [data[index]["text"] for index in range(len(data))] == TEXTS
            taken += 1
        except UserError as refusal:
            assert "\n" not in str(refusal)
    assert taken < 100  # names and numbers that nobody reads


def test_rows_chosen_by_an_index_are_refused(tmp_path):
    state = next(write_saved(tmp_path / "saved").rglob("state.json"))
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_indices_files": [{"filename": "indices.arrow"}]}))
    assert "state.json:1: _indices_files: " in error(source, tmp_path, tmp_path / "saved")


# --- Megatron's index ---

MEGATRON = ["AAAA", "BBB", "CC"]


def write_index(path: Path, documents, sizes=None, pointers=None, count=None, code=8, extra=b"") -> Path:
    """R28: three sequences of uint16, and an index that may say anything of them."""
    tokens = [np.frombuffer(text.encode(), np.uint8).astype(np.uint16) for text in MEGATRON]
    sizes = np.array([len(some) for some in tokens] if sizes is None else sizes, np.int32)
    right = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64) * 2
    pointers = right if pointers is None else np.array(pointers, np.int64)
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sizes), len(documents) if count is None else count)
    content = head + sizes.tobytes() + pointers.tobytes() + np.array(documents, np.int64).tobytes() + extra
    path.with_suffix(".idx").write_bytes(content)
    path.with_suffix(".bin").write_bytes(np.concatenate(tokens).tobytes())
    return path


def read_megatron(path: Path, cache: Path) -> list[str]:
    store = open_megatron(str(path), cache, "--path")
    edges = store.offset.tolist()
    return ["".join(map(chr, store.values["token"][a:b].tolist())) for a, b in pairwise(edges)]


@pytest.mark.parametrize("documents", [[0, 1, 2, 3], [0, 3], [0, 0, 1, 3, 3]])
def test_megatron_documents(documents, tmp_path):
    path = write_index(tmp_path / "a", documents)
    wanted = ["".join(MEGATRON[a:b]) for a, b in pairwise(documents)]
    assert read_megatron(path, tmp_path / "cache") == wanted


WRONG = {
    "short": ({"documents": [0, 1]}, "idx:1: document index: it must begin with 0, never fall, and end with the 3"),
    "far": ({"documents": [0, 1, 7]}, "idx:1: document index: "),
    "late": ({"documents": [1, 2, 3]}, "it begins with 1 and ends with 3"),
    "falling": ({"documents": [0, 2, 1, 3]}, "idx:1: document index: "),
    "below nothing": ({"documents": [0, -1, 3]}, "idx:1: document index: "),
    "none": ({"documents": []}, "it begins with nothing"),
    "negative size": ({"documents": [0, 3], "sizes": [4, -3, 8]}, "idx:1: sequence lengths: sequence 1 has -3 tokens"),
    "other sizes": ({"documents": [0, 3], "sizes": [4, 3, 9]}, "bin:1: it has 9 tokens, and "),
    "pointers": ({"documents": [0, 3], "pointers": [0, 10, 14]}, "sequence pointers: sequence 1 begins at byte 10 "),
    "backwards": ({"documents": [0, 3], "pointers": [0, -8, 14]}, "idx:1: sequence pointers: "),
    "counts": ({"documents": [0, 3], "count": 1 << 60}, "idx:1: sequence count 3 and document count 11529215"),
    "another type": ({"documents": [0, 3], "code": 1}, "idx:1: sequence pointers: "),
    "floats": ({"documents": [0, 3], "code": 6}, "type of tokens 6"),
    "modes": ({"documents": [0, 3], "extra": b"\0\1\0"}, "modes of a multimodal data set are not read"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_an_index_of_megatron_that_is_wrong_is_one_line(name, tmp_path):
    """R28 and its like; before another file's documents are laid behind it."""
    fields, message = WRONG[name]
    write_index(tmp_path / "b", [0, 3])
    write_index(tmp_path / "a", **fields)
    line = error(read_megatron, tmp_path / "*.idx", tmp_path / "cache")
    assert line.startswith(f"{tmp_path}/a.") and message in line


def test_ids_that_are_none(tmp_path):
    """Of types that hold more than ids: an id below 0, or above what a row holds, which would have become another."""
    for dtype, code, bad in ((np.int32, 4, -5), (np.int64, 5, 1 << 32), (np.int16, 3, -1)):
        tokens = np.array([1, 2, bad, 4], dtype)
        sizes, pointers = np.array([4], np.int32), np.array([0], np.int64)
        head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, 1, 2)
        ends = np.array([0, 1], np.int64)
        (tmp_path / "a.idx").write_bytes(head + sizes.tobytes() + pointers.tobytes() + ends.tobytes())
        (tmp_path / "a.bin").write_bytes(tokens.tobytes())
        assert f"a.bin:1: token 2 is {bad}, which is no id" in error(
            load, dataset(tmp_path, tmp_path / "a", "megatron")
        )


def test_a_damaged_index_of_megatron(tmp_path):
    path = write_index(tmp_path / "a", [0, 1, 2, 3])
    content = path.with_suffix(".idx").read_bytes()
    for other in damaged(content, 0, 400):
        path.with_suffix(".idx").write_bytes(other)
        try:
            assert "".join(read_megatron(path, tmp_path / "cache")) == "".join(MEGATRON)  # cut elsewhere at most
        except UserError as refusal:
            assert "\n" not in str(refusal) and str(tmp_path / "a.") in str(refusal)


# --- our own folders: token stores and packed rows ---


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> dict[str, tuple[DatasetConfig, Path]]:
    """A token store and packed rows of the same texts, each with the flags that read it."""
    tmp_path = tmp_path_factory.mktemp("own")
    files = FilesDatasetConfig(path=str(write_jsonl(tmp_path / "a.jsonl", TEXTS * 9)), seq_length=16, batch_size=2)
    config = DatasetConfig(type="files", packing="best_fit", cache_dir=str(tmp_path / "cache"), files_dataset=files)
    prepare(config, TokenizerConfig("bytes"), tmp_path / "rows", seed=1, vocab_size=258, say=lambda text: None)
    (store,) = (tmp_path / "cache").glob("tokens-*")
    folders = {"store": store, "rows": tmp_path / "rows"}
    return {
        name: (replace(config, type="tokens", files_dataset=replace(files, path=str(folder))), folder)
        for name, folder in folders.items()
    }


def rows_of(loader: Loader) -> list[bytes]:
    rows = [loader.row(0, number) for number in range(loader.epoch_rows)]
    batches = [loader.rows(step, 0, 2).by_name() for step in range(loader.steps_per_epoch)]
    return [array.tobytes() for values in (*rows, *batches) for array in values.values()]


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("store", "summary.json"), ("store", "offset.npy"), ("store", "*.check"), ("store", "*.token"),
        ("store", "*.mask"), ("rows", "manifest.json"), ("rows", "row_tokens.npy"), ("rows", "lengths.npy"),
        ("rows", "*.array_record"),
    ],
)  # fmt: skip
def test_a_damaged_folder_of_ours(kind, pattern, own):
    config, folder = own[kind]
    (path,) = folder.glob(pattern)
    content, wanted, said = path.read_bytes(), rows_of(load(config)), Counter[str]()
    places = [at for at, byte in enumerate(content) if byte] if pattern == "*.array_record" else None
    try:
        for other in damaged(content, 0, 40 if places else 120, places):
            path.write_bytes(other)
            try:
                assert rows_of(load(config)) == wanted
                said["equal"] += 1
            except UserError as refusal:
                assert "\n" not in str(refusal) and str(folder) in str(refusal)
                said["refused"] += 1
    finally:
        path.write_bytes(content)
    assert said["refused"]


MANIFEST = {
    "seq_length": ("16", 0, True), "tokenizer": (3, None), "dropped": ([], {"a": -1}, {"a": "b"}), "rows": (-1, 7, 1.5),
    "columns": ([], {"token": "<i4"}, {"token": "O"}), "shards": ({}, [3], [{"file": "../a", "rows": 1, "bytes": 2}]),
    "tokens": (-3, "7", 5), "documents": (None, 1), "max_token": ("x",),
}  # fmt: skip


def test_each_field_of_a_manifest_is_checked(own):
    config, folder = own["rows"]
    path = folder / "manifest.json"
    content = path.read_text()
    try:
        for name, values in MANIFEST.items():
            for value in values:
                path.write_text(json.dumps(json.loads(content) | {name: value}))
                line = error(load, config)
                assert str(folder) in line and (name in line or "lengths.npy" in line)
        lying = json.loads(content) | {"max_token": 3}
        path.write_text(json.dumps(lying))
        small = load(config, vocab_size=100)
        assert "--llama.vocab_size=" in error(small.rows, 0, 0, 2)  # seen when it is read
    finally:
        path.write_text(content)


def test_a_damaged_cache_of_lines_is_made_again(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [f"{number} " + "word " * 200 for number in range(1200)])
    os.utime(path, (1, 1))

    def texts() -> list[str]:
        data = source(tmp_path, path)
        return [data[index]["text"] for index in (0, 600, 1199)]

    wanted = texts()
    (index,) = (tmp_path / "cache").glob("json-lines-*.npy")
    content = index.read_bytes()
    for other in damaged(content, 0, 60, range(120)):
        index.write_bytes(other)
        assert texts() == wanted
