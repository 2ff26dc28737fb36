"""Tokens on disk: a data set tokenised once, mapped from disk, read at random, and checked as it is read.

The folder of a finished store holds, for each shard N of consecutive documents, N.token (uint16 or int32), N.mask
(uint8) and N.check (crc32 of each block of both), and of all shards offset.npy and, written last, summary.json.
units.npy says which documents must share a row, where there are such; further columns: see columns.py.
"""

import hashlib
import json
import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ringbpt.config import UserError
from ringbpt.config.foreign import read_file
from ringbpt.config.shown import one_line
from ringbpt.data.documents import Values
from ringbpt.data.reading.files import digest_of, load_array, replacing, write_whole

# Part of every key; raised when the same inputs give other files.
FORMAT, FORMAT_OF_SHAPES = "2", "3"
TOKEN_DTYPES = ("uint16", "int32")
WRITTEN_TOKENS = 1 << 18  # at a time
BLOCK_BYTES = 1 << 16  # checked as one when first read
# Of a store. without_loss: documents of which no token is learnt; split: conversations that make several documents.
COUNTED = ("documents", "tokens", "loss_tokens", "loss_bytes", "bad", "without_loss", "split")
COUNTED_LATER = COUNTED[-2:]  # which a store of an older version lacks


class Joined:
    """Consecutive arrays, read in slices as if they were one."""

    def __init__(self, parts: Sequence[Any], lengths: Sequence[int]):
        self._parts = parts
        self._ends = np.cumsum([0, *lengths]).tolist()

    def __getitem__(self, index: slice) -> np.ndarray:
        """A slice of whole steps inside one document, and so inside one part."""
        if index.stop <= index.start:
            return np.zeros(0, np.int32)
        part = bisect_right(self._ends, index.start) - 1
        before = self._ends[part]
        return self._parts[part][index.start - before : index.stop - before]


class Checked:
    """An array in a file, each of whose blocks is compared with its crc32 when it is first read."""

    def __init__(self, path: Path, dtype: str, checks: np.ndarray):
        self._path, self._dtype, self._checks = path, np.dtype(dtype), checks
        self._bytes: np.ndarray | None = None
        self._good = np.zeros(len(checks), bool)

    def __getitem__(self, index: slice) -> np.ndarray:
        if self._bytes is None:
            self._bytes = np.memmap(self._path, np.uint8, "r").view(np.ndarray)  # whose slices cost less
        start, stop = index.start * self._dtype.itemsize, index.stop * self._dtype.itemsize
        for block in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            if not self._good[block]:
                content = self._bytes[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
                if zlib.crc32(content) != self._checks[block]:
                    where = f"{self._path}: the bytes from {block * BLOCK_BYTES} on are not those that were written"
                    raise UserError(f"{where}; remove {self._path.parent}: it is made again", code=4)
                self._good[block] = True
        return self._bytes[start:stop].view(self._dtype)


@dataclass(frozen=True)
class TokenStore:
    """All documents as tokens.

    values: what is known of the tokens, read in slices: token (integers), mask (uint8) and any further column. offset:
    int64 [documents + 1]. summary: documents, tokens, max_token (-1 where it is not known), loss_tokens (mask 1),
    loss_bytes (UTF-8 bytes of the text behind those; 0 where it is not known), bad (examples left out; a document of no
    tokens stands for each). key: the hex digest of everything that decides the content. units: int64 [documents], see
    packing.Corpus. folder: where its files are, if it has one.
    """

    values: Values
    offset: np.ndarray
    summary: dict[str, Any]
    key: str
    units: np.ndarray | None = None
    folder: Path | None = None


# --- writing ---


class CheckedWriter:
    """Writes a file, and remembers its size, its digest, and the crc32 of each of its blocks."""

    def __init__(self, file: BinaryIO):
        self._file, self._rest = file, b""
        self.sha256, self.checks = hashlib.sha256(), list[int]()

    def write(self, array: np.ndarray) -> None:
        content = array.tobytes()
        self._file.write(content)
        self.sha256.update(content)
        content = self._rest + content
        whole = len(content) // BLOCK_BYTES * BLOCK_BYTES
        self.checks += [zlib.crc32(content[at : at + BLOCK_BYTES]) for at in range(0, whole, BLOCK_BYTES)]
        self._rest = content[whole:]

    def all_checks(self) -> list[int]:
        return [*self.checks, *([zlib.crc32(self._rest)] if self._rest else [])]


class ShardWriter:
    """Writes one shard, a document at a time; complete once `close` has written its summary, by renaming it."""

    def __init__(self, folder: Path, shard: int, dtype: str, check: Callable[[int], None]):
        """check: told the largest token id now and then, may raise."""
        self._base, self._dtype, self._check = folder / f"{shard:05d}", np.dtype(dtype), check
        paths = [self._base.with_suffix(suffix) for suffix in (".token", ".mask")]
        self._files = [open(path, "wb") for path in paths]  # noqa: SIM115  (closed by close and abandon)
        self._token, self._mask = map(CheckedWriter, self._files)
        self._lengths: list[int] = []
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []  # tokens and masks that are not written yet
        self._waiting_tokens = 0
        self._counts = dict.fromkeys(COUNTED, 0)
        self._max_token, self._bad_lines = 0, list[str]()

    def add(self, token: np.ndarray, mask: np.ndarray, loss_bytes: int) -> None:
        self._waiting.append((token, mask))
        self._counts["without_loss"] += not mask[1:].any()
        self._waiting_tokens += len(token)
        self._lengths.append(len(token))
        self._counts["loss_bytes"] += loss_bytes
        if self._waiting_tokens > WRITTEN_TOKENS:
            self._flush()

    def _flush(self) -> None:
        """Many documents at once: each call of numpy costs as much as a short document."""
        if not self._waiting_tokens:
            return
        token, mask = (np.concatenate(arrays) for arrays in zip(*self._waiting, strict=True))
        self._waiting, self._waiting_tokens = [], 0
        largest = int(token.max())
        if largest > np.iinfo(self._dtype).max:
            raise ValueError(f"{largest} does not fit {self._dtype}")
        self._check(largest)
        self._max_token = max(self._max_token, largest)
        self._token.write(token.astype(self._dtype, copy=False))
        self._mask.write(mask)
        self._counts["tokens"] += len(token)
        self._counts["loss_tokens"] += int(np.count_nonzero(mask))

    def add_split(self) -> None:
        """The documents that come next are of one conversation."""
        self._counts["split"] += 1

    def add_bad(self, message: str) -> tuple[int, list[str]]:
        """An example that is left out: a document of no tokens. Returns how many there are, and what the first were."""
        self._lengths.append(0)
        self._counts["bad"] += 1
        if len(self._bad_lines) < 3:
            self._bad_lines.append(message)
        return self._counts["bad"], self._bad_lines

    def close(self) -> dict[str, Any]:
        self._flush()
        self._counts["documents"] = len(self._lengths)
        checks = np.array(self._token.all_checks() + self._mask.all_checks(), np.uint32)
        self.abandon()
        np.array(self._lengths, np.int64).tofile(self._base.with_suffix(".length"))
        checks.tofile(self._base.with_suffix(".check"))
        summary = {
            **self._counts,
            "max_token": self._max_token,
            "dtype": self._dtype.name,
            "bad_lines": self._bad_lines,
            "sha256": {"token": self._token.sha256.hexdigest(), "mask": self._mask.sha256.hexdigest()},
        }
        write_whole(self._base.with_suffix(".json"), json.dumps(summary))
        return summary

    def abandon(self) -> None:
        for file in self._files:
            file.close()


def shard_summary(folder: Path, shard: int) -> dict[str, Any] | None:
    """The summary of a shard that is complete."""
    try:
        return json.loads(read_file(folder / f"{shard:05d}.json"))
    except (UserError, ValueError, RecursionError):
        return None


def join_shards(folder: Path, shards: int, extra: dict[str, Any]) -> dict[str, Any]:
    """Makes of the complete shards of a folder one store; any number of processes may do it, all the same.

    Returns the store's summary, less `extra`, which is written with it. Raises FileNotFoundError where one of the
    processes has given the folder its last name meanwhile.
    """
    found = [shard_summary(folder, shard) for shard in range(shards)]
    summaries = [summary for summary in found if summary is not None]
    if len(summaries) < shards:
        raise FileNotFoundError(folder)
    lengths = [np.fromfile(folder / f"{shard:05d}.length", np.int64) for shard in range(shards)]
    offset = np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths]))
    with replacing(folder / "offset.npy") as file:
        np.save(file, offset)
    checks = [np.fromfile(folder / f"{shard:05d}.check", np.uint32) for shard in range(shards)]
    totals: dict[str, Any] = {name: sum(summary.get(name, 0) for summary in summaries) for name in COUNTED}
    totals["max_token"] = max(summary["max_token"] for summary in summaries)
    totals["bad_lines"] = [line for summary in summaries for line in summary["bad_lines"]][:3]
    kept = ("documents", "tokens", "dtype", "sha256")
    totals["shards"] = [{name: summary[name] for name in kept} for summary in summaries]
    totals["crc32"] = _crc32(offset, checks)
    write_whole(folder / "summary.json", json.dumps(totals | extra))
    return totals


def _crc32(offset: np.ndarray, checks: list[np.ndarray]) -> dict[str, int]:
    return {"offset": zlib.crc32(np.ascontiguousarray(offset)), "check": zlib.crc32(np.concatenate(checks))}


# --- reading ---


def open_store(folder: Path, key: str, foreign: bool = False) -> TokenStore | None:
    """The store in a folder, or None where a file is missing or isn't what the summary says of it.

    foreign: one that we cannot make again, so that what is wrong is told as a UserError.
    """
    try:
        return _read_store(folder, key)
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if not foreign:
            return None
        if isinstance(error, UserError):
            raise
        what = f"it has no {error}" if isinstance(error, KeyError) else one_line(error)
        raise UserError(f"{folder}/summary.json:1: {what}; copy the folder again", code=4) from None


def _read_store(folder: Path, key: str) -> TokenStore:
    """Raises ValueError, and what damaged JSON makes of the look into it, for whatever contradicts the summary."""
    summary: dict[str, Any] = json.loads(read_file(folder / "summary.json"))
    offset = load_array(folder / "offset.npy", mapped=True)
    tokens, masks, all_checks = [], [], []
    for number, shard in enumerate(summary["shards"]):
        base, count, dtype = folder / f"{number:05d}", shard["tokens"], np.dtype(shard["dtype"])
        _require(dtype.name in TOKEN_DTYPES, f"shards: dtype {dtype} is none of {', '.join(TOKEN_DTYPES)}")
        sizes = (count * dtype.itemsize, count)
        paths = (base.with_suffix(".token"), base.with_suffix(".mask"))
        for path, size in zip(paths, sizes, strict=True):
            _require(path.stat().st_size == size, f"shards: {path.name} has not the {size} bytes of its tokens")
        checks = np.fromfile(base.with_suffix(".check"), np.uint32)
        blocks = [-(-size // BLOCK_BYTES) for size in sizes]
        _require(len(checks) == sum(blocks), f"shards: {base.name}.check has not the checks of {sum(blocks)} blocks")
        all_checks.append(checks)
        tokens.append(Checked(paths[0], dtype.name, checks[: blocks[0]]))
        masks.append(Checked(paths[1], "uint8", checks[blocks[0] :]))
    _check_offset(offset, summary)
    _require(_crc32(offset, all_checks) == summary["crc32"], "crc32: offset.npy or a .check is not what was written")
    units, lengths = _read_units(folder, len(offset) - 1), [shard["tokens"] for shard in summary["shards"]]
    if units is not None:
        key = digest_of([key, hashlib.sha256(units).hexdigest()])
    values = {"token": Joined(tokens, lengths), "mask": Joined(masks, lengths)}
    return TokenStore(values, offset, summary, key, units, folder)


def is_count(value: Any) -> bool:
    """Whether a value of JSON counts something."""
    return type(value) is int and value >= 0


def _require(true: bool, what: str) -> None:
    if not true:
        raise ValueError(what)


def _check_offset(offset: np.ndarray, summary: dict[str, Any]) -> None:
    """Raises ValueError where the documents are not the shards', or the summary's numbers not those of its shards."""
    shards = summary["shards"]
    for name in ("documents", "tokens"):
        counts = [shard[name] for shard in shards]
        _require(all(map(is_count, counts)), f"shards: {name} is no count")
        _require(summary[name] == sum(counts), f"{name}: {summary[name]}, and its shards have {sum(counts)}")
    for name in (*COUNTED, "max_token"):
        _require(is_count(summary.get(name, 0 if name in COUNTED_LATER else None)), f"{name} is no count")
    documents, tokens = ([0, *accumulate(shard[name] for shard in shards)] for name in ("documents", "tokens"))
    _require(offset.dtype == np.int64 and offset.shape == (documents[-1] + 1,), "offset.npy: not one for each document")
    falls = bool(offset[0]) or bool(np.any(offset[1:] < offset[:-1]))
    _require(not falls, "offset.npy: it does not begin with 0, or falls")
    _require(offset[documents].tolist() == tokens, "offset.npy: its documents are not those of the shards")


def _read_units(folder: Path, documents: int) -> np.ndarray | None:
    """The units of a store's documents, None where each is one of its own. Raises ValueError for what are none."""
    if not (folder / "units.npy").exists():
        return None
    units = load_array(folder / "units.npy")
    whole = units.dtype == np.int64 and units.shape == (documents,)
    if not whole or not set(np.diff(units, prepend=-1).tolist()) <= {0, 1} or units[:1].any():
        raise UserError(
            f"{folder}/units.npy:1: not 0, 0, 1, ... for {documents} documents; copy the folder again", code=4
        )
    return units if units[-1] + 1 < documents else None
