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
    store: TokenStore, name: str, values: Callable[[int], np.ndarray], shards: Iterable[int] | None = None
) -> None:
    """Writes a column of COLUMNS beside the tokens of a store, for all of its shards or for some.

    values(document) are those of the document's tokens, [tokens], asked for in order. A shard that is there is left as
    it is: a killed run goes on, and processes may share the shards. Raises ValueError for values of another shape.
    """
    dtype, lengths, begin = COLUMNS[name].dtype, np.diff(store.offset).tolist(), 0
    for shard, about in enumerate(store.summary["shards"]):
        documents = range(begin, begin + about["documents"])
        begin = documents.stop
        path = _path(store, shard, name)
        if _about(path).exists() or (shards is not None and shard not in shards):
            continue
        with replacing(path) as file:
            writer = CheckedWriter(file)
            for document in documents:
                array = np.asarray(values(document), dtype)
                if array.shape != (lengths[document],):
                    raise ValueError(f"{name}: {array.shape} values for the {lengths[document]} tokens of {document}")
                writer.write(array)
        write_whole(_about(path), json.dumps({"dtype": dtype, "crc32": writer.all_checks()}))


def with_columns(store: TokenStore, names: Sequence[str], where: str) -> TokenStore:
    """The store with these columns, which its key then depends on. Raises UserError for one that it doesn't have."""
    values, digests = dict(store.values), list[str]()
    for name in names:
        parts, lengths = list[Checked](), [shard["tokens"] for shard in store.summary.get("shards", [])]
        for shard, tokens in enumerate(lengths):
            path = _path(store, shard, name)
            try:
                content = _about(path).read_bytes()
                about = json.loads(content)
                size = tokens * np.dtype(COLUMNS[name].dtype).itemsize
                assert about["dtype"] == COLUMNS[name].dtype and path.stat().st_size == size
                checks = np.array(about["crc32"], np.uint32)
                assert checks.shape == (-(-size // BLOCK_BYTES),)
            except (OSError, ValueError, KeyError, TypeError, AssertionError, OverflowError, RecursionError):
                parts = []
                break
            parts.append(Checked(path, about["dtype"], checks))
            digests.append(hashlib.sha256(content).hexdigest())
        if not parts:
            place = f": {store.folder} holds none, or not for all of its shards" if store.folder else ""
            raise UserError(f"{where} has no column {name!r}{place}; write it there first")
        values[name] = Joined(parts, lengths)
    return replace(store, values=values, key=digest_of([store.key, *names, *digests])) if names else store


def _path(store: TokenStore, shard: int, name: str) -> Path:
    assert store.folder is not None
    return store.folder / f"{shard:05d}.{name}"


def _about(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
