"""Every format of files gives the same examples, at random, in another process, and one line for what is wrong."""

import gzip
import json
import os
import pickle
import struct
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ringbpt.config import (
    DatasetConfig,
    FilesDatasetConfig,
    HuggingfaceDatasetConfig,
    TextProcessorConfig,
    TfdsDatasetConfig,
    TokenizerConfig,
    UserError,
)
from ringbpt.data.loader import Loader, make_loader
from ringbpt.data.reading.catalogue import make_source, parts_of
from ringbpt.data.reading.hub import read_example
from ringbpt.data.text.tokenizers import BytesTokenizer

TOKENIZER = BytesTokenizer(TokenizerConfig("bytes"))
TEXTS = ["zero", 'one, "quoted"', "two\nlines é", "three;\t", "four \U0001f600", "five\u2028", "six"]


def dataset(tmp_path: Path, path: object, kind: str = "files", **fields) -> DatasetConfig:
    files = FilesDatasetConfig(path=str(path), seq_length=16, batch_size=2)
    return DatasetConfig(type=kind, cache_dir=str(tmp_path / "cache"), files_dataset=files, **fields)


def source(tmp_path: Path, path: object, kind: str = "files"):
    config = dataset(tmp_path, path, kind)
    (part,) = parts_of(config, "train_dataset")
    return make_source(config, part, tmp_path / "cache", "train_dataset")


def load(config: DatasetConfig, **kwargs) -> Loader:
    return make_loader(config, TOKENIZER, seed=1, vocab_size=kwargs.pop("vocab_size", 258), **kwargs)


def error(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_jsonl(path: Path, texts=TEXTS) -> Path:
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        import zstandard

        half = len(content) // 2
        content = b"".join(map(zstandard.ZstdCompressor().compress, (content[:half], content[half:])))  # two frames
    path.write_bytes(content)
    return path


def write_array(path: Path) -> Path:
    path.write_text("\ufeff" + json.dumps([{"text": text, "deep": [{"]": "[{"}]} for text in TEXTS], indent=1))
    return path


def write_csv(path: Path) -> Path:
    import csv

    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(["n", "text"])
        writer.writerows(enumerate(TEXTS))
    return path


def table():
    import pyarrow

    return pyarrow.table({"text": TEXTS, "messages": [[{"role": "user", "content": text}] for text in TEXTS]})


def write_parquet(path: Path) -> Path:
    from pyarrow import parquet

    parquet.write_table(table(), path, row_group_size=3)
    return path


def write_arrow(path: Path) -> Path:
    import pyarrow

    new = pyarrow.ipc.new_stream if "stream" in path.name else pyarrow.ipc.new_file
    with pyarrow.OSFile(str(path), "wb") as out, new(out, table().schema) as writer:
        writer.write_table(table(), max_chunksize=2)
    return path


def write_saved(path: Path) -> Path:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(str(path))
    return path


def protobuf(field: int, content: bytes) -> bytes:
    return bytes([field << 3 | 2, len(content)]) + content


def tf_example(text: str) -> bytes:
    """Example{1: Features{1: entry{1: key, 2: Feature}}}, by hand."""
    feature = {
        b"text": protobuf(1, protobuf(1, text.encode())),
        b"score": protobuf(2, protobuf(1, struct.pack("<f", 0.5))),
        b"n": protobuf(3, protobuf(1, b"\x96\x01" + b"\xff" * 9 + b"\x01")),
    }
    entries = b"".join(protobuf(1, protobuf(1, key) + protobuf(2, value)) for key, value in feature.items())
    return protobuf(1, entries[:0] + entries) if len(entries) < 128 else b"\n" + _varint(len(entries)) + entries


def _varint(number: int) -> bytes:
    return bytes([number & 127 | 128, number >> 7])


def write_array_record(path: Path) -> Path:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    kinds = (str.encode, lambda text: json.dumps({"text": text}).encode(), tf_example)
    for number, text in enumerate(TEXTS):
        writer.write(kinds[number % 3](text))
    writer.close()
    return path


def write_folder(path: Path) -> Path:
    (path / "sub").mkdir(parents=True)
    for number, text in enumerate(TEXTS):
        name = f"{number}.txt" if number < 4 else f"sub/{number}.md"
        (path / name).write_bytes(text.encode())
    (path / "sub" / "picture.png").write_bytes(b"\x89PNG")
    return path


FORMATS = {
    "a.jsonl": write_jsonl,
    "b.jsonl.gz": write_jsonl,
    "c.jsonl.zst": write_jsonl,
    "d.json": write_array,
    "e.csv": write_csv,
    "f.tsv": write_csv,
    "g.parquet": write_parquet,
    "h.arrow": write_arrow,
    "i_stream.arrow": write_arrow,
    "saved": write_saved,
    "k.array_record": write_array_record,
    "texts": write_folder,
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_gives_the_same_examples(tmp_path, name):
    path = FORMATS[name](tmp_path / name)
    data = source(tmp_path, path, "text" if name == "texts" else "files")
    assert len(data) == len(TEXTS) and data.size > 0
    assert [data[index]["text"] for index in reversed(range(len(TEXTS)))] == TEXTS[::-1]
    assert str(tmp_path) in data.location(3) and data.location(3).rpartition(":")[2].isdecimal()
    elsewhere = pickle.loads(pickle.dumps(data))
    assert elsewhere[2]["text"] == TEXTS[2] and elsewhere.fingerprint() == data.fingerprint()
    assert source(tmp_path, path, "text" if name == "texts" else "files").fingerprint() == data.fingerprint()


def test_places_in_tables(tmp_path):
    assert source(tmp_path, write_csv(tmp_path / "a.csv")).location(3).endswith("a.csv:6")  # after one of two lines
    assert source(tmp_path, write_array(tmp_path / "a.json")).location(1).endswith("a.json:10")
    for number in (1, 2):
        write_parquet(tmp_path / f"{number}.parquet")
    both = source(tmp_path, tmp_path / "*.parquet")
    assert both.location(len(TEXTS) + 4) == f"{tmp_path}/2.parquet:5" and both[len(TEXTS) + 4]["text"] == TEXTS[4]
    assert both[0]["messages"] == [{"role": "user", "content": "zero"}]


def test_an_example_protocol_buffer():
    assert read_example(tf_example("é")) == {"text": "é", "score": 0.5, "n": [150, -1]}
    for junk in (b"\n", b"\nabc", b"\n\x05hello", b"plain", tf_example("x")[:-3]):
        assert read_example(junk) is None


def test_huggingface_by_a_local_name_and_streamed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (tmp_path / "rows").mkdir()
    write_parquet(tmp_path / "rows" / "rows.parquet")
    hub = HuggingfaceDatasetConfig(path=str(tmp_path / "rows"), name="", seq_length=16, batch_size=1)
    config = DatasetConfig(type="huggingface", cache_dir=str(tmp_path / "cache"), huggingface_dataset=hub)
    config = replace(config, text_processor=TextProcessorConfig(fields="text"))
    plain = load(config)
    (part,) = parts_of(config, "train_dataset")
    assert [make_source(config, part, tmp_path, "x")[index]["text"] for index in (6, 0)] == ["six", "zero"]
    streaming = replace(config, huggingface_dataset=replace(hub, streaming=True))
    assert "--train_dataset.huggingface_dataset.streaming=True: " in error(load, streaming)
    streamed = load(replace(streaming, max_samples=100))
    assert streamed.digest(2) == plain.digest(2)
    missing = DatasetConfig(type="huggingface", huggingface_dataset=HuggingfaceDatasetConfig(path=str(tmp_path / "no")))
    assert "cannot be loaded: " in error(load, missing)


def test_tfds_without_tensorflow(tmp_path):
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder):
        """A data set of seven texts."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

        def _split_generators(self, dl_manager):
            return {"train": ((number, {"text": text}) for number, text in enumerate(TEXTS))}

        def _generate_examples(self):
            raise NotImplementedError

    Tiny(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    named = TfdsDatasetConfig(name="tiny", data_dir=str(tmp_path), seq_length=16, batch_size=1)
    config = DatasetConfig(type="tfds", cache_dir=str(tmp_path / "cache"), tfds_dataset=named)
    (part,) = parts_of(config, "train_dataset")
    data = make_source(config, part, tmp_path, "train_dataset")
    assert sorted(data[index]["text"] for index in range(len(data))) == sorted(TEXTS)
    assert data.location(0) == "tiny/1.0.0[train]:1" and pickle.loads(pickle.dumps(data))[0] == data[0]
    assert load(config).steps_per_epoch == 4 and "tensorflow" not in sys.modules
    other = DatasetConfig(type="tfds", tfds_dataset=TfdsDatasetConfig(name="tiny", split="dev", data_dir=str(tmp_path)))
    assert "(split='dev'" in error(load, other)


def write_megatron(path: Path, documents: list[list[int]], dtype=np.uint16) -> Path:
    """Version 1 of the index, as its readers expect it; each document in sequences of at most three tokens."""
    sequences, ends = [], [0]
    for document in documents:
        sequences += [document[at : at + 3] for at in range(0, len(document), 3)]
        ends.append(len(sequences))
    code = {np.uint16: 8, np.int32: 4}[dtype]
    sizes = np.array([len(sequence) for sequence in sequences], np.int32)
    pointers = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64) * np.dtype(dtype).itemsize
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sizes), len(ends))
    content = head + sizes.tobytes() + pointers.tobytes() + np.array(ends, np.int64).tobytes()
    path.with_suffix(".idx").write_bytes(content)
    path.with_suffix(".bin").write_bytes(np.concatenate(sequences).astype(dtype).tobytes())
    return path


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_is_mapped_as_it_is(tmp_path, dtype):
    documents = [[*f"document {number}".encode(), 257] for number in range(20)]
    write_megatron(tmp_path / "data", documents, dtype)
    loader = load(dataset(tmp_path, tmp_path / "data", "megatron", packing="first_fit"))
    batch = loader.rows(0, 0, 2)
    assert TOKENIZER.decode(batch.token_BT[0]).startswith("document 0") and batch.segment_BT[0, 10] == 1
    assert loader.bytes_per_token == pytest.approx(1 - 1 / 11.5, abs=0.02)
    assert loader.lengths.tolist() == [len(document) for document in documents]
    small = load(dataset(tmp_path, tmp_path / "data.bin", "megatron"), vocab_size=257)
    assert "--llama.vocab_size=258 works" in error(small.rows, 0, 0, 2)
    os.truncate(tmp_path / "data.bin", 20)
    assert "data.bin:1: " in error(load, dataset(tmp_path, tmp_path / "data", "megatron"))
    (tmp_path / "data.idx").write_bytes(b"MMIDIDY\0\0" + b"\0" * 50)
    assert "data.idx:1: no index of Megatron's" in error(load, dataset(tmp_path, tmp_path / "data", "megatron"))


def test_what_a_path_is_cannot_be_told(tmp_path):
    (tmp_path / "a.xyz").write_text("x")
    assert "has no ending that is known: say what it is, as in --train_dataset.type=text" in (
        error(source, tmp_path, tmp_path / "a.xyz")
    )
    write_jsonl(tmp_path / "a.jsonl")
    write_csv(tmp_path / "b.csv")
    assert "has files of csv, json: say what it is" in error(source, tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"text": "a"}, {"text"', "a.json:1: the JSON array is not closed"),
        ("a.json", '[{"text": "a"}]\n[]', "a.json:1: there is more after the end of the JSON array"),
        ("a.csv", 'n,text\n1,"a\n2,b\n', "a.csv:2: a quote is opened here and never closed"),
        ("a.csv", "n,text\n1,a\n2,b,c\n", "a.csv:3: 3 fields, but the first row names 2 columns: quote the text"),
        ("a.parquet", "PAR1 no", "a.parquet:1: cannot be read: "),
        ("a.arrow", "no arrow", "a.arrow:1: cannot be read: "),
        ("a.array_record", "no records at all", "a.array_record:1: no ArrayRecord file: "),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    assert message in error(lambda: [d[i] for d in [source(tmp_path, tmp_path / name)] for i in range(len(d))])


def test_zstd_that_is_cut_or_flipped(tmp_path):
    import zstandard

    content = zstandard.ZstdCompressor(write_checksum=True).compress(os.urandom(4096).hex().encode())
    cut, bad = tmp_path / "a.jsonl.zst", tmp_path / "b.jsonl.zst"
    cut.write_bytes(content[:-20])
    assert "a.jsonl.zst:1: the zstd file is truncated; copy it again" in error(source, tmp_path, cut)
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    bad.write_bytes(flipped)
    assert "b.jsonl.zst:1: the zstd file is corrupt (" in error(source, tmp_path, bad)


# --- mixtures ---


def test_a_mixture_of_formats_by_weight(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [f"a{number:02d}" for number in range(30)])
    write_jsonl(tmp_path / "b.jsonl.gz", [f"b{number:02d}" for number in range(10)])
    path = f"{tmp_path}/a.jsonl:0.25,{tmp_path}/b.jsonl.gz:0.75"
    bare = TextProcessorConfig(fields="text", add_bos_token=False)
    loader = load(dataset(tmp_path, path, text_processor=bare, packing="first_fit"))
    steps = range(loader.steps_per_epoch)
    text = "".join(TOKENIZER.decode(row) for step in steps for row in loader.rows(step, 0, 2).token_BT)
    assert (text.count("a"), text.count("b")) == (10, 30) and "b09" in text and "a10" not in text
    assert loader.tokens_dropped["left out by the weights"] == 20 * 4
    assert loader.tokens_in + 0 == 40 * 4 + 20 * 4 and "80 repeated by the weights" in loader.describe()
    assert loader.describe().endswith(
        f"taken in an epoch: {tmp_path}/a.jsonl 25.0% of the tokens, 25.0% of the documents; "
        f"{tmp_path}/b.jsonl.gz 75.0% of the tokens, 75.0% of the documents"
    )
    unweighted = load(dataset(tmp_path, f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl.gz", text_processor=bare))
    assert unweighted.tokens_in == 160 and unweighted.fingerprint != loader.fingerprint


@pytest.mark.parametrize("packing", ["concat", "first_fit", "best_fit"])
@pytest.mark.parametrize("long_documents", ["split", "drop"])
def test_a_mixture_by_tokens(tmp_path, packing, long_documents):
    """Documents of 4 tokens, and of 12 and 40: a quarter of the tokens is not a quarter of the documents."""
    write_jsonl(tmp_path / "a.jsonl", [f"a{number:02d}" for number in range(30)])
    write_jsonl(tmp_path / "b.jsonl", ["b" * (39 if number % 10 == 0 else 11) for number in range(30)])
    bare = TextProcessorConfig(fields="text", add_bos_token=False)
    flags = {"text_processor": bare, "packing": packing, "shuffle": True, "long_documents": long_documents}
    path = f"{tmp_path}/a.jsonl:0.25,{tmp_path}/b.jsonl:0.75"
    loader = load(dataset(tmp_path, path, weights_by="tokens", **flags))
    total = 30 * 4 + 27 * 12 + (3 * 40 if long_documents == "split" else 0)
    assert [part.tokens for part in loader.taken] == pytest.approx([total / 4, total * 3 / 4], abs=20)
    rows = [loader.row(0, number) for number in range(loader.epoch_rows)]
    letters = "".join(TOKENIZER.decode(row["token"]) for row in rows)
    share = letters.count("a") * 4 / sum(int((row["segment"] > 0).sum()) for row in rows)
    assert share == pytest.approx(0.25, abs=0.04)
    assert f"a.jsonl {loader.taken[0].tokens / sum(part.tokens for part in loader.taken):.1%} of" in loader.describe()
    by_documents = load(dataset(tmp_path, path, **flags))
    assert by_documents.fingerprint != loader.fingerprint
    assert abs(by_documents.taken[0].tokens - total / 4) > 40


def test_shares_of_tokens_that_are_no_shares(tmp_path):
    one = dataset(tmp_path, write_jsonl(tmp_path / "a.jsonl"), weights_by="tokens")
    path = "--train_dataset.files_dataset.path"
    what = f"{path} has no shares; it is a list with some, as {path}=a.jsonl:0.7,b.jsonl:0.3"
    assert error(load, one) == f"--train_dataset.weights_by=tokens: {what}"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a:0.5,b", "'b' has no weight and others do; write b:1"),
        ("a:1,b:0", "the weight of 'b' is 0; leave it out of the list"),
        ("a,,b", "an empty name in the list"),
    ],
)
def test_lists_that_are_none(tmp_path, path, message):
    assert message in error(load, dataset(tmp_path, path, "csv"))


def test_a_comma_in_a_name_is_no_list(tmp_path):
    assert len(source(tmp_path, write_jsonl(tmp_path / "a,b:1.jsonl"))) == len(TEXTS)


# --- bad lines, long documents, how many ---


def write_bad(path: Path, bad=(3, 8)) -> Path:
    lines = [json.dumps({"text": f"document {number}"}) for number in range(20)]
    for number in bad:
        lines[number] = "{"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_bad_lines_are_skipped_and_counted(tmp_path, capsys):
    path = write_bad(tmp_path / "a.jsonl")
    assert f"{path}:4: malformed JSON" in error(load, dataset(tmp_path, path))
    loader = load(dataset(tmp_path, path, on_bad_line="skip:2"))
    assert loader.describe().startswith("20 documents (2 bad examples left out), ")
    assert f"2 bad ones left out, the first: {path}:4: malformed JSON" in capsys.readouterr().out
    good = [f"document {number}" for number in range(20) if number not in (3, 8)]
    clean = load(dataset(tmp_path, write_jsonl(tmp_path / "b.jsonl", good)))
    assert loader.digest(5) == clean.digest(5)
    message = error(load, dataset(tmp_path, path, on_bad_line="skip:1"))
    assert message.startswith("--train_dataset.on_bad_line=skip:1: 2 bad examples (the first: ")
    assert message.endswith("--train_dataset.on_bad_line=skip:2 would leave them out")


def test_nothing_but_bad_lines_is_no_loop(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{\n" * 5)
    assert "a.jsonl:1: malformed JSON" in error(load, dataset(tmp_path, path))
    assert "a.jsonl:5: malformed JSON" in error(load, dataset(tmp_path, path, on_bad_line="skip:9"))
    named = TextProcessorConfig(fields="text")
    assert "no token takes loss" in error(load, dataset(tmp_path, path, on_bad_line="skip:9", text_processor=named))


def test_long_documents(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["short", "x" * 40, "also short", "y" * 20])
    split, drop, refuse = (
        dataset(tmp_path, path, packing="first_fit", long_documents=how) for how in ("split", "drop", "refuse")
    )
    assert load(split).tokens_in == load(drop).tokens_in == 5 + 40 + 10 + 20 + 8
    assert load(drop).tokens_dropped["documents longer than seq_length"] == 64
    assert load(split).fingerprint != load(drop).fingerprint
    refused = error(load, refuse)
    assert refused.startswith("--train_dataset.long_documents=refuse: 2 documents are longer than --train_dataset.")
    assert "files_dataset.seq_length=16, the first of them document 2 with 42 tokens: " in refused
    assert refused.endswith("--train_dataset.long_documents=split or =drop, or seq_length=42")


def test_max_samples(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["some text"] * 50)
    few, many = (load(dataset(tmp_path, path, max_samples=count)) for count in (20, 500))
    assert (len(few.lengths), len(many.lengths)) == (20, 50)
