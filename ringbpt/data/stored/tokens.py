"""Tokens on disk: a data set tokenised once, mapped from disk, read at random, and checked as it is read.

The folder of a finished store holds, for each shard N of consecutive documents, N.token (uint16 or int32), N.mask
(uint8) and N.check (crc32 of each block of both), and of all shards offset.npy and, written last, summary.json.
Of documents that come several an example, BY_DOCUMENT says more, an array each; further columns: see columns.py.
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
from ringbpt.data.documents import ALONE, Known, Values
from ringbpt.data.reading.files import digest_of, load_array, replacing, write_whole

# Part of every key; raised when the same inputs give other files.
FORMAT, FORMAT_OF_SHAPES = "2", "3"
TOKEN_DTYPES = ("uint16", "int32")
OWN = "own_crc32"  # of a summary, which one of an older version lacks
WRITTEN_TOKENS = 1 << 18  # at a time
BLOCK_BYTES = 1 << 16  # checked as one when first read
# Of a store. without_loss: documents of which no token is learnt; split: conversations that make several documents;
# alike: pairs whose two answers are the same.
COUNTED = ("documents", "tokens", "loss_tokens", "loss_bytes", "bad", "without_loss", "split", "alike")
COUNTED_LATER = COUNTED[-3:]  # which a store of an older version lacks
# What is known of whole documents, each in a file of its own, [documents]: units, whose documents must share a row;
# shared, how many first tokens a document has in common with the one before it, and neither learns; and of COLUMNS.
BY_DOCUMENT = {"units": "int64", "shared": "int64", "label": "int8", "margin": "float32"}


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


class Spread:
    """What is known of whole documents, read in slices of their tokens, as if each token had it."""

    def __init__(self, each: np.ndarray, offset: np.ndarray):
        self._each, self._offset = each, offset

    def __getitem__(self, index: slice) -> np.ndarray:
        """A slice inside one document."""
        count = max(0, index.stop - index.start)
        document = int(np.searchsorted(self._offset, index.start, side="right")) - 1 if count else 0
        return np.full(count, self._each[document], self._each.dtype)


@dataclass(frozen=True)
class TokenStore:
    """All documents as tokens.

    values: what is known of the tokens, read in slices: token (integers), mask (uint8) and any further column. offset:
    int64 [documents + 1]. summary: documents, tokens, max_token (-1 where it is not known), loss_tokens (mask 1),
    loss_bytes (UTF-8 bytes of the text behind those; 0 where it is not known), bad (examples left out; a document of no
    tokens stands for each). key: the hex digest of everything that decides the content. units, shared: int64
    [documents], see packing.Corpus. folder: where its files are, if it has one.
    """

    values: Values
    offset: np.ndarray
    summary: dict[str, Any]
    key: str
    units: np.ndarray | None = None
    folder: Path | None = None
    shared: np.ndarray | None = None


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
        self._known: list[Known] = []
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []  # tokens and masks that are not written yet
        self._waiting_tokens = 0
        self._counts = dict.fromkeys(COUNTED, 0)
        self._max_token, self._bad_lines = 0, list[str]()

    def add(self, token: np.ndarray, mask: np.ndarray, loss_bytes: int, known: Known = ALONE) -> None:
        self._waiting.append((token, mask))
        self._known.append(known)
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

    def add_alike(self) -> None:
        """The two documents that come next are a pair of the same answer."""
        self._counts["alike"] += 1

    def add_bad(self, message: str) -> tuple[int, list[str]]:
        """An example that is left out: a document of no tokens. Returns how many there are, and what the first were."""
        self._lengths.append(0)
        self._known.append(ALONE)
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
        if any(known is not ALONE for known in self._known):
            np.save(self._base.with_suffix(".known.npy"), np.array(self._known, np.float64))
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
    arrays = _by_document(folder, [len(each) for each in lengths])
    for name, array in arrays.items():
        with replacing(folder / f"{name}.npy") as file:
            np.save(file, array)
    checks = [np.fromfile(folder / f"{shard:05d}.check", np.uint32) for shard in range(shards)]
    totals: dict[str, Any] = {name: sum(summary.get(name, 0) for summary in summaries) for name in COUNTED}
    totals["max_token"] = max(summary["max_token"] for summary in summaries)
    totals["bad_lines"] = [line for summary in summaries for line in summary["bad_lines"]][:3]
    kept = ("documents", "tokens", "dtype", "sha256")
    totals["shards"] = [{name: summary[name] for name in kept} for summary in summaries]
    totals["crc32"] = _crc32(offset, checks) | {name: zlib.crc32(array) for name, array in arrays.items()}
    whole = totals | extra
    write_whole(folder / "summary.json", json.dumps(whole | {OWN: _own_crc32(whole)}))
    return totals


def _own_crc32(summary: dict[str, Any]) -> int:
    """Of all that a summary says: its counts are in no other file."""
    return zlib.crc32(json.dumps(summary, sort_keys=True).encode())


def _by_document(folder: Path, documents: list[int]) -> dict[str, np.ndarray]:
    """The arrays of BY_DOCUMENT of the shards of so many documents; {} where nothing is known of any."""
    files = [folder / f"{shard:05d}.known.npy" for shard in range(len(documents))]
    if not any(file.exists() for file in files):
        return {}
    known = [np.load(f) if f.exists() else np.tile(ALONE, (n, 1)) for f, n in zip(files, documents, strict=True)]
    by_name = dict(zip(Known._fields, np.concatenate(known).T, strict=True))
    by_name["units"] = np.cumsum(by_name.pop("first")) - 1
    return {name: by_name[name].astype(dtype) for name, dtype in BY_DOCUMENT.items()}


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
    own = summary.pop(OWN, None)
    _require(own is None or own == _own_crc32(summary), f"{OWN}: the summary does not say what was written")
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
    whole = {**_crc32(offset, all_checks)}
    _require(whole.items() <= summary["crc32"].items(), "crc32: offset.npy or a .check is not what was written")
    lengths = [shard["tokens"] for shard in summary["shards"]]
    known = _read_by_document(folder, len(offset) - 1, summary["crc32"])
    units, shared = known.pop("units", None), known.pop("shared", None)
    if units is not None:
        key = digest_of([key, hashlib.sha256(units).hexdigest()])
    if shared is not None:
        _require(units is not None and bool(np.all(shared[_first_of(units)] == 0)), "shared.npy: a unit begins with it")
        _require(bool(np.all((shared == 0) | ((shared > 0) & (shared < np.diff(offset))))), "shared.npy: not so long")
        shared = shared if shared.any() else None
    values: Values = {"token": Joined(tokens, lengths), "mask": Joined(masks, lengths)}
    values |= {name: Spread(array, offset) for name, array in known.items()}
    return TokenStore(values, offset, summary, key, units, folder, shared)


def _first_of(units: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.diff(units, prepend=-1))


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


def _read_by_document(folder: Path, documents: int, checks: dict[str, int]) -> dict[str, np.ndarray]:
    """The arrays of BY_DOCUMENT that a store has. Raises UserError for units that are none, ValueError for the rest.

    units are as good as none where each document is a unit of its own; they may be given to a store later, by hand.
    """
    found = {}
    for name, dtype in BY_DOCUMENT.items():
        path = folder / f"{name}.npy"
        if not path.exists():
            _require(name not in checks, f"{path.name}: it is missing")
            continue
        array = load_array(path)
        whole = array.dtype == dtype and array.shape == (documents,)
        if name == "units":
            rises = whole and set(np.diff(array, prepend=-1).tolist()) <= {0, 1} and not array[:1].any()
            if not rises:
                raise UserError(
                    f"{folder}/units.npy:1: not 0, 0, 1, ... for {documents} documents; copy the folder again", code=4
                )
            if array[-1] + 1 == documents and "units" not in checks:
                continue
        _require(whole, f"{path.name}: not one for each document")
        _require(name not in checks or zlib.crc32(array) == checks[name], f"{path.name}: not what was written")
        found[name] = array
    return found
