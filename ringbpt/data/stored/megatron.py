"""Megatron's indexed data sets, .bin and .idx, mapped as they are, once the index has been held to both files.

Ref: Megatron-LM, megatron/core/datasets/indexed_dataset.py, version 1 of the index: a head, then how many tokens each
sequence has, where it begins in the .bin, in bytes, and, of each document, the number of its first sequence.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np

from ringbpt.config import UserError
from ringbpt.config.foreign import open_regular
from ringbpt.data.reading.files import digest_of, file_digest, find_files
from ringbpt.data.stored.tokens import Joined, TokenStore

MAGIC = b"MMIDIDX\x00\x00"
HEAD_BYTES = 34
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
LARGEST_TOKEN = 2**31 - 1


class Ids:
    """Tokens of a type that could hold what is no id."""

    def __init__(self, tokens: np.ndarray, name: str):
        self._tokens, self._name = tokens, name

    def __getitem__(self, index: slice) -> np.ndarray:
        found = self._tokens[index]
        if found.size and not 0 <= found.min() <= found.max() <= LARGEST_TOKEN:
            bad = int(np.flatnonzero((found < 0) | (found > LARGEST_TOKEN))[0])
            raise UserError(f"{self._name}.bin:1: token {index.start + bad} is {found[bad]}, which is no id")
        return found


def open_megatron(path: str, cache_dir: Path, flag: str) -> TokenStore:
    """The documents of PATH.idx and PATH.bin, or of a glob of either; every token takes loss.

    Raises UserError, with the file and what in it is wrong, for files that are none or don't belong together.
    """
    if path and not path.endswith((".bin", ".idx")):
        path += ".idx"
    names = sorted({name[:-4] for name in find_files(path, flag, (".idx",))})
    columns, counts, lengths, digests = list[Any](), [], [], []
    for name in names:
        documents, tokens = _read(name)
        columns.append(Ids(tokens, name) if tokens.dtype.kind == "i" else tokens)
        counts.append(len(tokens))
        lengths.append(documents)
        digests += [file_digest(name + suffix, cache_dir) for suffix in (".idx", ".bin")]
    offset = np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths]))
    total = int(offset[-1])
    summary = {"documents": len(offset) - 1, "tokens": total, "max_token": -1, "bad": 0}
    summary |= {"loss_tokens": total, "loss_bytes": 0}
    values = {"token": Joined(columns, counts), "mask": np.broadcast_to(np.uint8(1), total)}
    return TokenStore(values, offset, summary, digest_of(["megatron", *digests]))


def _read(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens of each document int64, all tokens) of one pair of files."""
    where = f"{name}.idx:1"
    for suffix in (".idx", ".bin"):
        with open_regular(name + suffix, f"{name}{suffix}:1"):
            pass
    sizes, pointers, documents, dtype = _read_index(name, where)
    try:
        tokens = np.memmap(name + ".bin", dtype, "r")
    except (OSError, ValueError) as error:
        raise UserError(f"{name}.bin:1: {getattr(error, 'strerror', None) or error}") from None
    if (bad := np.flatnonzero(sizes < 0)).size:
        raise UserError(f"{where}: sequence lengths: sequence {bad[0]} has {sizes[bad[0]]} tokens; copy it again")
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
    if (bad := np.flatnonzero(pointers != before[:-1] * tokens.itemsize)).size:
        at, right = pointers[bad[0]], before[bad[0]] * tokens.itemsize
        raise UserError(
            f"{where}: sequence pointers: sequence {bad[0]} begins at byte {at} of {name}.bin, and those before it end "
            f"at {right}: sequences in another order are not read; copy both again"
        )
    if before[-1] != len(tokens):
        raise UserError(f"{name}.bin:1: it has {len(tokens)} tokens, and {name}.idx {before[-1]}; copy both again")
    if not len(documents) or documents[0] != 0 or documents[-1] != len(sizes) or np.any(np.diff(documents) < 0):
        first, last = (documents[0], documents[-1]) if len(documents) else ("nothing", "nothing")
        raise UserError(
            f"{where}: document index: it must begin with 0, never fall, and end with the {len(sizes)} sequences that "
            f"there are; it begins with {first} and ends with {last}; copy it again"
        )
    return np.diff(before[documents]), tokens


def _read_index(name: str, where: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """(tokens of each sequence int64, its first byte int64, each document's first sequence int64, dtype of a token)."""
    try:
        index = np.fromfile(name + ".idx", np.uint8)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from None
    head = index[:HEAD_BYTES].tobytes()
    if head[: len(MAGIC)] != MAGIC or len(head) < HEAD_BYTES:
        raise UserError(f"{where}: no index of Megatron's (it begins with {head[: len(MAGIC)]!r})")
    version, code, sequences, boundaries = struct.unpack("<QBQQ", head[len(MAGIC) :])
    if version != 1 or code not in DTYPES:
        raise UserError(f"{where}: version {version}, type of tokens {code}: 1 and one of 1, 2, 3, 4, 5, 8 work")
    ends = HEAD_BYTES + 4 * sequences, HEAD_BYTES + 12 * sequences, HEAD_BYTES + 12 * sequences + 8 * boundaries
    if len(index) != ends[2]:
        raise UserError(
            f"{where}: sequence count {sequences} and document count {boundaries} make {ends[2]} bytes, and it has "
            f"{len(index)} (modes of a multimodal data set are not read); copy it again"
        )
    sizes, pointers, documents = np.split(index[HEAD_BYTES:], [end - HEAD_BYTES for end in ends[:2]])
    return sizes.view("<i4").astype(np.int64), pointers.view("<i8"), documents.view("<i8"), DTYPES[code]
