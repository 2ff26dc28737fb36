"""Further columns of a store's tokens, as reference log-probs: written into its folder later, read as its tokens are.

For each shard N of the store there are N.<column>, the values of its tokens, and, written last, N.<column>.json: their
dtype and the crc32 of each block.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ringbpt.config import UserError
from ringbpt.data.reading.files import digest_of, replacing, write_whole
from ringbpt.data.stored.tokens import BLOCK_BYTES, Checked, CheckedWriter, Joined, TokenStore
from ringbpt.types import COLUMNS


def add_column(
    store: TokenStore,
    name: str,
    values: Callable[[int], np.ndarray],
    shards: Iterable[int] | None = None,
    folder: Path | None = None,
    key: str = "",
) -> None:
    """Writes a column of COLUMNS beside the tokens of a store, for all of its shards or for some.

    values(document) are those of the document's tokens, [tokens], asked for in order. folder: where it is written, else
    the store's own. key: what it was made of, which a reader compares. A shard that is there, whole, is left: a killed
    run goes on, and processes may share the shards. Raises ValueError for values of another shape.
    """
    dtype, lengths, begin = COLUMNS[name].dtype, np.diff(store.offset).tolist(), 0
    for shard, about in enumerate(store.summary["shards"]):
        documents = range(begin, begin + about["documents"])
        begin = documents.stop
        path = _path(store, shard, name, folder)
        if (shards is not None and shard not in shards) or _read(store, shard, name, folder) is not None:
            continue
        with replacing(path) as file:
            writer = CheckedWriter(file)
            for document in documents:
                array = np.asarray(values(document), dtype)
                if array.shape != (lengths[document],):
                    raise ValueError(f"{name}: {array.shape} values for the {lengths[document]} tokens of {document}")
                writer.write(array)
        write_whole(_about(path), json.dumps({"dtype": dtype, "key": key, "crc32": writer.all_checks()}))


def with_columns(store: TokenStore, names: Sequence[str], where: str) -> TokenStore:
    """The store with these columns, which its key then depends on. Raises UserError for one that it doesn't have."""
    values, digests = dict(store.values), list[str]()
    for name in names:
        shards = range(len(store.summary.get("shards", [])))
        parts = [_read(store, shard, name, None) for shard in shards]
        if None in parts or not parts:
            place = f": {store.folder} holds none, or not for all of its shards" if store.folder else ""
            raise UserError(f"{where} has no column {name!r}{place}; write it there first")
        values[name] = _joined(store, [part[0] for part in parts if part])
        digests += [part[1] for part in parts if part]
    return replace(store, values=values, key=digest_of([store.key, *names, *digests])) if names else store


def missing_shards(store: TokenStore, name: str, folder: Path, key: str) -> list[int]:
    """The shards whose values of the column are not in the folder, whole and made of what `key` stands for.

    Raises UserError where others' values are there.
    """
    missing = []
    for shard in range(len(store.summary["shards"])):
        found = _read(store, shard, name, folder)
        if found is None:
            missing.append(shard)
        elif found[2] != key:
            about = _about(_path(store, shard, name, folder))
            raise UserError(
                f"{about}:1: the column was computed by other weights, or of other tokens, than this run's: remove "
                f"{folder}, and it is computed again",
                code=4,
            )
    return missing


def read_column(store: TokenStore, name: str, folder: Path) -> Joined:
    """The column of all shards, from a folder that misses none (see missing_shards)."""
    parts = [_read(store, shard, name, folder) for shard in range(len(store.summary["shards"]))]
    assert None not in parts, folder
    return _joined(store, [part[0] for part in parts if part])


def _joined(store: TokenStore, parts: Sequence[Checked]) -> Joined:
    return Joined(parts, [shard["tokens"] for shard in store.summary["shards"]])


def _read(store: TokenStore, shard: int, name: str, folder: Path | None) -> tuple[Checked, str, str] | None:
    """(a shard's values, the digest of what is said of them, what they were made of); None where they aren't whole."""
    path = _path(store, shard, name, folder)
    try:
        content = _about(path).read_bytes()
        about = json.loads(content)
        size = store.summary["shards"][shard]["tokens"] * np.dtype(COLUMNS[name].dtype).itemsize
        assert about["dtype"] == COLUMNS[name].dtype and path.stat().st_size == size
        checks = np.array(about["crc32"], np.uint32)
        assert checks.shape == (-(-size // BLOCK_BYTES),)
        key = str(about.get("key", ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, OverflowError, RecursionError):
        return None
    return Checked(path, about["dtype"], checks), hashlib.sha256(content).hexdigest(), key


def _path(store: TokenStore, shard: int, name: str, folder: Path | None) -> Path:
    folder = folder or store.folder
    assert folder is not None
    return folder / f"{shard:05d}.{name}"


def _about(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
