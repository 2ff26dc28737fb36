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
from ringbpt.data.documents import Row
from ringbpt.data.packing import shuffled
from ringbpt.data.reading.files import digest_of
from ringbpt.data.reading.hub import open_array_record
from ringbpt.data.stored.tokenise import check_tokenizer
from ringbpt.data.stored.tokens import COUNTED, TokenStore
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
        self._row_tokens = np.load(folder / "row_tokens.npy", mmap_mode="r", allow_pickle=False)
        self._order = lru_cache(maxsize=2)(self._make_order)
        self._records: Any = None
        self._opening = threading.Lock()

    def _make_order(self, epoch: int) -> np.ndarray:
        return np.arange(self.rows) if self._seed is None else shuffled(self.rows, self._seed, 1 + epoch)

    def row(self, epoch: int, row: int, values: Any) -> Row:
        with self._opening:
            if self._records is None:
                self._records = open_array_record(self._names)
        number = int(self._order(0 if self._seed is None else epoch)[row])
        record = self._records[number]
        if len(record) != self._record.itemsize:
            raise UserError(f"{self._names[0]}: row {number} has {len(record)} bytes; write the folder again", code=4)
        (found,) = np.frombuffer(record, self._record)
        return {name: found[name] for name in self._columns}

    def tokens_in(self, epoch: int, rows: int) -> int:
        return int(self._row_tokens[self._order(0 if self._seed is None else epoch)[:rows]].sum())


def open_rows(
    path: str, dataset: DatasetConfig, tokenizer: Tokenizer, seed: int, flag: str, columns: Sequence[str] = ALWAYS
) -> tuple[TokenStore, PackedRows] | None:
    """The rows in a folder and the account of their tokens; None for a folder that is none of packed rows.

    Raises UserError for another seq_length, another tokenizer, for files that are missing or of another length, and
    for rows without one of the columns.
    """
    folder = Path(path).expanduser()
    group = f"--{flag}.{dataset.group}"
    try:
        content = (folder / "manifest.json").read_bytes()
    except OSError:
        return None
    try:
        manifest = json.loads(content)
        assert manifest["format"] == FORMAT
    except (ValueError, KeyError, TypeError, AssertionError):
        raise UserError(f"{folder}/manifest.json:1: no manifest of {FORMAT!r}; write the folder again") from None
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
    offset = np.cumsum([0, *np.load(folder / "lengths.npy", allow_pickle=False)])
    return TokenStore({}, offset, summary, key), PackedRows(
        folder, manifest, columns, seed if dataset.shuffle else None
    )
