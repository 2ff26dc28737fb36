"""Packed rows on disk: an epoch's rows as ArrayRecord files with a manifest, written once, read at random.

A record is a row, its columns one after the other, little-endian. manifest.json, written last, says which columns and
of which dtypes (where it doesn't: those of every batch), what was packed, how, and each file's rows and sha256;
row_tokens.npy holds how many tokens each row has.
"""

import hashlib
import json
import threading
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ringbpt.config import DatasetConfig, UserError
from ringbpt.config.foreign import user_path
from ringbpt.data.documents import Row
from ringbpt.data.packing import shuffled
from ringbpt.data.reading.files import digest_of, load_array
from ringbpt.data.reading.hub import Records
from ringbpt.data.stored.tokenise import check_tokenizer
from ringbpt.data.stored.tokens import COUNTED, COUNTED_LATER, TokenStore, is_count
from ringbpt.data.text.tokenizers import Tokenizer
from ringbpt.types import ALWAYS, COLUMNS

FORMAT = "ringbpt packed rows 1"


def column_dtypes(columns: Iterable[str]) -> dict[str, str]:
    """The columns of a record in their order, each with the dtype that it is written in."""
    return {name: np.dtype(COLUMNS[name].dtype).newbyteorder("<").str for name in columns}


def write_rows(path: Path, rows: Iterable[Row]) -> tuple[list[int], str]:
    """Writes rows into one ArrayRecord file; returns the tokens of each row, and the file's sha256."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    tokens = []
    try:
        for row in rows:
            dtypes = column_dtypes(row)
            writer.write(b"".join(array.astype(dtypes[name]).tobytes() for name, array in row.items()))
            tokens.append(int(np.count_nonzero(row["segment"])))
    finally:
        writer.close()
    with open(path, "rb") as file:
        return tokens, hashlib.file_digest(file, "sha256").hexdigest()


class PackedRows:
    """A plan whose rows are read and not made; `dropped` are the tokens that packing left out."""

    def __init__(self, folder: Path, manifest: dict[str, Any], columns: Sequence[str], seed: int | None):
        """columns: of the rows that are made; the manifest has them."""
        self._names = [str(folder / shard["file"]) for shard in manifest["shards"]]
        self._seq_length, self._seed, self._columns = manifest["seq_length"], seed, columns
        dtypes = manifest.get("columns") or column_dtypes(ALWAYS)
        self._record = np.dtype([(name, dtype, (self._seq_length,)) for name, dtype in dtypes.items()])
        self.rows, self.dropped = manifest["rows"], dict(manifest["dropped"])
        self._counts = [shard["rows"] for shard in manifest["shards"]]
        self._row_tokens = _counts(folder / "row_tokens.npy", self.rows, self._seq_length)
        self._order = lru_cache(maxsize=2)(self._make_order)
        self._records: Records | None = None
        self._opening = threading.Lock()

    def _make_order(self, epoch: int) -> np.ndarray:
        return np.arange(self.rows) if self._seed is None else shuffled(self.rows, self._seed, 1 + epoch)

    def row(self, epoch: int, row: int, values: Any) -> Row:
        with self._opening:
            if self._records is None:
                self._records = self._open()
        number = int(self._order(0 if self._seed is None else epoch)[row])
        record, size = self._records[number], self._record.itemsize
        if len(record) != size:
            where = self._records.location(number)
            raise UserError(f"{where}: a row of {len(record)} bytes, and {size} were written; copy it again", code=4)
        (found,) = np.frombuffer(record, self._record)
        return {name: found[name] for name in self._columns}

    def _open(self) -> Records:
        records = Records(self._names)
        for name, found, wanted in zip(self._names, records.counts, self._counts, strict=True):
            if found != wanted:
                raise UserError(f"{name}:1: {found} rows, and its manifest has {wanted}; copy it again", code=4)
        return records

    def tokens_in(self, epoch: int, rows: int) -> int:
        return int(self._row_tokens[self._order(0 if self._seed is None else epoch)[:rows]].sum())


def open_rows(
    path: str, dataset: DatasetConfig, tokenizer: Tokenizer, seed: int, flag: str, columns: Sequence[str] = ALWAYS
) -> tuple[TokenStore, PackedRows] | None:
    """The rows in a folder and the account of their tokens; None for a folder that is none of packed rows.

    Raises UserError for another seq_length, another tokenizer, for files that are missing or of another length, and
    for rows without one of the columns.
    """
    folder = user_path(path)
    group = f"--{flag}.{dataset.group}"
    try:
        content = (folder / "manifest.json").read_bytes()
    except OSError:
        return None
    manifest = _read_manifest(folder, content)
    if manifest["seq_length"] != dataset.seq_length:
        raise UserError(
            f"{group}.seq_length={dataset.seq_length}, but the rows in {path!r} have {manifest['seq_length']} tokens: "
            f"{group}.seq_length={manifest['seq_length']}"
        )
    check_tokenizer(manifest["tokenizer"], tokenizer, f"{group}.path={path!r}")
    if missing := set(columns) - set(manifest.get("columns", ALWAYS)):
        raise UserError(f"{group}.path={path!r}: the rows have no column {min(missing)!r}; pack them again with it")
    for shard in manifest["shards"]:
        file = folder / shard["file"]
        if not file.is_file() or file.stat().st_size != shard["bytes"]:
            raise UserError(f"{file}:1: missing, or not of {shard['bytes']} bytes; copy it again", code=4)
    key = digest_of(["rows", hashlib.sha256(content).hexdigest()])
    summary = {name: manifest.get(name, 0) for name in (*COUNTED, "max_token")}
    lengths = _counts(folder / "lengths.npy", summary["documents"], summary["tokens"])
    if lengths.sum() != summary["tokens"]:
        raise UserError(f"{folder}/lengths.npy:1: not the tokens of its manifest; copy the folder again", code=4)
    rows = PackedRows(folder, manifest, columns, seed if dataset.shuffle else None)
    return TokenStore({}, np.cumsum([0, *lengths]), summary, key), rows


def _read_manifest(folder: Path, content: bytes) -> dict[str, Any]:
    """The manifest, of which every field that is read is of its type and goes with the others. Raises UserError."""
    where = f"{folder}/manifest.json:1"
    try:
        manifest = json.loads(content)
        assert manifest["format"] == FORMAT
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
        raise UserError(f"{where}: no manifest of {FORMAT!r}; write the folder again") from None
    shards, columns = manifest.get("shards"), manifest.get("columns", column_dtypes(ALWAYS))
    good = {
        "seq_length": is_count(manifest.get("seq_length")) and manifest["seq_length"] > 0,
        "tokenizer": isinstance(manifest.get("tokenizer"), str),
        "dropped": isinstance(manifest.get("dropped"), dict) and all(map(is_count, manifest["dropped"].values())),
        "columns": isinstance(columns, dict) and columns == column_dtypes(columns.keys() & COLUMNS.keys() | {*ALWAYS}),
        "shards": isinstance(shards, list) and all(map(_is_shard, shards)),
    }
    for name in (*COUNTED, "max_token", "rows"):
        good[name] = is_count(manifest.get(name, 0 if name in COUNTED_LATER else None))
    for name, is_good in good.items():
        if not is_good:
            raise UserError(f"{where}: {name} is missing, or is not what it must be; copy the folder again", code=4)
    if manifest.get("rows") != sum(shard["rows"] for shard in shards):
        raise UserError(f"{where}: rows={manifest.get('rows')}, and its shards have others; copy it again", code=4)
    return manifest


def _is_shard(shard: Any) -> bool:
    return (
        isinstance(shard, dict)
        and isinstance(shard.get("file"), str)
        and Path(shard["file"]).name == shard["file"]
        and all(is_count(shard.get(name)) for name in ("rows", "bytes"))
    )


def _counts(path: Path, size: int, most: int) -> np.ndarray:
    """An array of `size` counts, none of which is above `most`, mapped from disk. Raises UserError."""
    counts = load_array(path, mapped=True)
    if counts.dtype != np.int64 or counts.shape != (size,) or np.any((counts < 0) | (counts > most)):
        raise UserError(
            f"{path}:1: not {size} counts of {most} at most, as its manifest has them; copy it again", code=4
        )
    return counts
