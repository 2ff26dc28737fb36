"""Examples of data sets that other libraries keep: Hugging Face datasets, TFDS, and ArrayRecord files."""

import json
import os
import struct
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np

from ringbpt.config import (
    HuggingfaceDatasetConfig,
    JsonDatasetConfig,
    TfdsDatasetConfig,
    UserError,
    stop_asking_where_none_answers,
)
from ringbpt.config.foreign import parse_json
from ringbpt.config.shown import one_line
from ringbpt.data.reading.files import cached, digest_of, file_digest, optional
from ringbpt.data.reading.sources import JsonSource, Source
from ringbpt.data.reading.wire import fields_of, varints


class Rows:
    """A data set of another library with length and random access; opened anew in each worker process."""

    def __init__(self, name: str, size: int, fingerprint: str, load: Callable[[], Any], rows: Any = None):
        """load: opens the data set; pickled for the workers. rows: what it gives, where that is there already."""
        self._name, self.size, self._fingerprint, self._load, self._rows = name, size, fingerprint, load, rows

    def _all(self) -> Any:
        if self._rows is None:
            self._rows = self._load()
        return self._rows

    def __len__(self) -> int:
        return len(self._all())

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            row = self._all()[index]
        except Exception as error:  # the libraries raise what they like
            raise UserError(f"{self.location(index)}: cannot be read: {one_line(error)}") from None
        return {key: _plain(value) for key, value in row.items()}

    def location(self, index: int) -> str:
        return f"{self._name}:{index + 1}"

    def fingerprint(self) -> str:
        return self._fingerprint

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": None}


def _plain(value: Any) -> Any:
    """What JSON would hold: bytes as UTF-8 text, numpy's numbers and arrays as Python's."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()] if value.ndim else _plain(value.item())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


# --- Hugging Face ---


def load_huggingface(config: HuggingfaceDatasetConfig, flag: str) -> Any:
    """The data set by its name on the hub, or of a local folder; code that comes with a data set is never run."""
    datasets = optional("datasets", f"--{flag}.path={config.path!r}")
    if not os.path.isabs(path := os.path.expanduser(config.path)) and not os.path.exists(path):
        datasets.config.HF_HUB_OFFLINE = not stop_asking_where_none_answers()
    try:
        return datasets.load_dataset(path, config.name or None, split=config.split, streaming=config.streaming)
    except Exception as error:
        raise UserError(
            f"--{flag}.path={config.path!r} (name={config.name!r}, split={config.split!r}) cannot be loaded: "
            f"{one_line(error)}; without a network, --{flag.partition('.')[0]}.type=files reads a copy on disk"
        ) from None


def make_huggingface(config: HuggingfaceDatasetConfig, max_samples: int, cache_dir: Path, flag: str) -> Source:
    """A data set by name. Streamed, its first `max_samples` rows are read once and kept, so that resuming is exact."""
    if not config.streaming:
        rows = load_huggingface(config, flag)
        name = f"{config.path}/{config.name}[{config.split}]" if config.name else f"{config.path}[{config.split}]"
        digest = digest_of(["huggingface", rows._fingerprint])
        return Rows(name, int(rows.dataset_size or 0), digest, partial(load_huggingface, config, flag), rows)
    group = flag.partition(".")[0]
    if not max_samples:
        raise UserError(
            f"--{flag}.streaming=True: a stream has no end that one could resume from: say how many rows are taken, "
            f"as in --{group}.max_samples=100000"
        )
    key = digest_of(["stream", config.path, config.name, config.split, str(max_samples)])[:32]

    def build(target: Path) -> None:
        with open(target, "w", encoding="utf-8") as out:
            for row in islice(load_huggingface(config, flag), max_samples):
                out.write(json.dumps(row, ensure_ascii=True, default=str) + "\n")

    path = cached(cache_dir, f"stream-{key}.jsonl", build, group)
    return JsonSource(JsonDatasetConfig(path=str(path)), cache_dir, flag)


# --- TFDS ---


def _load_tfds(config: TfdsDatasetConfig, flag: str) -> Any:
    tfds = optional("tensorflow_datasets", f"--{flag}.name={config.name!r}")
    try:
        builder = tfds.builder(config.name, data_dir=config.data_dir or None, try_gcs=False)
        return builder.as_data_source(split=config.split)
    except Exception as error:
        raise UserError(
            f"--{flag}.name={config.name!r} (split={config.split!r}, data_dir={config.data_dir!r}) cannot be read: "
            f"{one_line(error)}; it must be prepared with file_format='array_record'"
        ) from None


def make_tfds(config: TfdsDatasetConfig, flag: str) -> Source:
    """A prepared TFDS data set, read without TensorFlow."""
    rows = _load_tfds(config, flag)
    info = rows.dataset_info
    checks = [f"{name} {split.num_bytes} {split.shard_lengths}" for name, split in sorted(info.splits.items())]
    digest = digest_of(["tfds", info.full_name, config.split, *checks])
    name = f"{info.full_name}[{config.split}]"
    return Rows(name, int(info.dataset_size or 0), digest, partial(_load_tfds, config, flag), rows)


# --- ArrayRecord ---


class ArrayRecordSource(Rows):
    """Records of ArrayRecord files: a JSON object, a tf.train.Example, or plain text, known by their first bytes."""

    def __init__(self, names: list[str], cache_dir: Path):
        digest = digest_of(["array_record", *(file_digest(name, cache_dir) for name in names)])
        super().__init__(names[0], sum(map(os.path.getsize, names)), digest, partial(Records, names))

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._all()[index]
        try:
            if record[:1] == b"\n" and (features := read_example(record)) is not None:
                return features
            text = record.decode("utf-8")
            if not text.startswith("{"):
                return {"text": text}
        except (UnicodeDecodeError, ValueError) as error:
            what = "a record that is no JSON, text or tf.train.Example"
            raise UserError(f"{self.location(index)}: {what}: {error}") from None
        return parse_json(text, self.location(index), numbered=False)

    def location(self, index: int) -> str:
        return self._all().location(index)


class Records:
    """The records of ArrayRecord files, one file after the other, by number; counts: of each file.

    Raises UserError, with the file's name, for a file that is none and for a record that cannot be read.
    """

    def __init__(self, names: list[str]):
        self._names = names
        with ThreadPoolExecutor(min(len(names), 64)) as pool:
            self._files = list(pool.map(_open_records, names))
        self.counts = list(map(len, self._files))
        self._ends = list(accumulate(self.counts))

    def __len__(self) -> int:
        return self._ends[-1]

    def _place(self, index: int) -> tuple[int, int]:
        """(which file, which of its records)"""
        file = bisect_right(self._ends, index)
        return file, index - (self._ends[file] - self.counts[file])

    def __getitem__(self, index: int) -> bytes:
        file, number = self._place(index)
        try:
            return self._files[file][number]
        except Exception as error:  # what the library's C++ has met
            raise UserError(f"{self.location(index)}: cannot be read: {one_line(error)}; copy it again") from None

    def location(self, index: int) -> str:
        file, number = self._place(index)
        return f"{self._names[file]}:{number + 1}"


def _open_records(name: str) -> Any:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    try:
        return ArrayRecordDataSource([name])
    except Exception as error:
        raise UserError(f"{name}:1: no ArrayRecord file: {one_line(error)}") from None


def read_example(record: bytes) -> dict[str, Any] | None:
    """The features of a serialised tf.train.Example; None where it is none.

    A feature of one value is that value, bytes are text where they are UTF-8. Ref: tensorflow's example.proto:
    Example{1: Features{1: map<string, Feature{1: bytes, 2: floats, 3: ints}>}}.
    """
    try:
        features = {}
        for field, entries in fields_of(record):
            if field != 1:
                return None
            for _, entry in fields_of(entries):
                parts = dict(fields_of(entry))
                ((kind, values),) = fields_of(parts[2])
                features[parts[1].decode("utf-8")] = _feature(kind, values)
        return features
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error):
        return None


def _feature(kind: int, values: bytes) -> Any:
    if kind == 1:
        found: list[Any] = [value.decode("utf-8") for _, value in fields_of(values)]
    elif kind == 2:
        found = [number for _, packed in fields_of(values) for number in struct.unpack(f"<{len(packed) // 4}f", packed)]
    else:
        found = [number for _, packed in fields_of(values) for number in varints(packed)]
    return found[0] if len(found) == 1 else found
