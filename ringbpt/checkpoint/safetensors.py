"""Folders of safetensors, read by byte ranges and written tensor by tensor: nothing is ever held whole.

The format is eight bytes of header length, a JSON header, and raw tensors. Reading it here, and not with the library
of that name, is what lets a process take only the bytes of its own shards, in any dtype that jax has.
Ref: https://huggingface.co/docs/safetensors
"""

import json
import os
import re
import shutil
import struct
from collections.abc import Iterable
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ringbpt.config import UserError
from ringbpt.config.foreign import open_regular, read_json, strict_json

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # bytes, as in the format's own library


class Stored(NamedTuple):
    """Where a tensor is: its file, dtype, shape, and first byte."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int


class Planned(NamedTuple):
    """A tensor that is to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]


class TensorFolder:
    """The tensors of a folder, by name: of `<stem>.safetensors`, or of the files that `<stem>.safetensors.index.json`
    names, each tensor from the file that the index names for it. bytes_read counts what was asked for.

    Raises UserError in one line for a folder without such files or with two sets of them, a damaged or truncated file,
    and a tensor that is in the index and not in its file, or the other way round.
    """

    def __init__(self, folder: Path, stem: str = "model"):
        self.folder, self.bytes_read = folder, 0
        index, whole = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
        places = _weight_map(index) if index.is_file() else {}
        _check_one_set(folder, index, whole, {*places.values()})
        if not index.is_file():
            if not whole.is_file():
                raise UserError(f"{folder}: {_why_nothing(folder)}")
            self.entries = _entries(whole)
            return
        self.entries = {}
        for name in dict.fromkeys(places.values()):
            for tensor, stored in _entries(folder / name).items():
                if tensor not in places:
                    raise UserError(f"{index}: {name} has a tensor {tensor}, which the index does not name")
                if places[tensor] == name:
                    self.entries[tensor] = stored
        for tensor, name in places.items():
            if tensor not in self.entries:
                raise UserError(f"{index}: tensor {tensor} is not in {name}: the download is incomplete")

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A tensor, or a box of it; only the rows (and where cut across, the pages) of the box are read."""
        entry = self.entries[name]
        index = cut_box(index, entry.shape)
        shape = tuple(part.stop - part.start for part in index)
        self.bytes_read += prod(shape) * entry.dtype.itemsize
        if shape[1:] == entry.shape[1:]:  # whole rows stand together
            first = index[0].start * prod(shape[1:]) * entry.dtype.itemsize if index else 0
            return np.fromfile(entry.file, entry.dtype, prod(shape), offset=entry.start + first).reshape(shape)
        return np.array(np.memmap(entry.file, entry.dtype, "r", entry.start, entry.shape)[index])


def cut_box(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The first and last places of a box in every dim of a tensor; what an index leaves out is whole."""
    index = (*index, *(slice(None) for _ in shape[len(index) :]))
    return tuple(slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))


def _check_one_set(folder: Path, index: Path, whole: Path, named: set[str]) -> None:
    """Raises UserError where a folder has files of two sets of weights: which are meant is not for us to choose."""
    shard = re.compile(re.escape(whole.stem) + r"-\d+-of-\d+\.safetensors")
    stale = sorted(file.name for file in folder.glob("*.safetensors") if shard.fullmatch(file.name))
    stale = [name for name in stale if name not in named]
    if index.is_file() and whole.is_file() and whole.name not in named:
        raise UserError(f"{folder}: both {whole.name} and {index.name}: remove the one that is out of date")
    if stale and index.is_file():
        raise UserError(f"{folder}: {stale[0]} is in no line of {index.name}: remove the one that is out of date")
    if stale:
        other = f"{whole.name} stands beside it" if whole.is_file() else f"there is no {index.name}"
        raise UserError(f"{folder}: no index names {stale[0]}, and {other}: copy the folder again, or remove the shard")


def _weight_map(index: Path) -> dict[str, str]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in places.values()
    ):
        raise UserError(f"{index}: no index of safetensors with plain file names; copy it again")
    return places


def _why_nothing(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        return (
            "only .bin or .pth files, which are pickles and could run code: save the model again with transformers' "
            "save_pretrained, which writes safetensors"
        )
    return "no model.safetensors and no model.safetensors.index.json"


def _entries(file: Path) -> dict[str, Stored]:
    """Every tensor of one file, by the format's own rules: the tensors fill what follows the header, without a gap,
    an overlap or a rest.
    """
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            if 8 + length > size or length > HEADER_LIMIT:
                raise UserError(f"{file}: truncated, or no safetensors file: {size} bytes do not hold its header")
            header = _read_header(file, stream.read(length))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    found = {name: _stored(file, name, about, 8 + length) for name, about in header.items() if name != "__metadata__"}
    end, last = 8 + length, "the header"
    for name, stored in sorted(found.items(), key=lambda item: (item[1].start, _nbytes(item[1]))):
        if stored.start != end:
            what = "overlaps" if stored.start < end else f"begins {stored.start - end} bytes after the end of"
            raise UserError(f"{file}: data_offsets: tensor {name} {what} {last}; copy it again")
        end, last = end + _nbytes(stored), f"tensor {name}"
        if end > size:
            raise UserError(f"{file}: truncated: {last} ends {end - size} bytes after the file does; copy it again")
    if end < size:
        raise UserError(f"{file}: data_offsets: {size - end} bytes after {last} belong to no tensor; copy it again")
    return found


def _read_header(file: Path, content: bytes) -> dict[str, Any]:
    """The JSON object of a header, each key of which stands once."""
    try:
        header = strict_json(content, f"{file}: its header")
        if not isinstance(header, dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise UserError(f"{file}: no safetensors file: its header is not JSON; copy it again") from None
    about = header.get("__metadata__")
    if about is not None and not (isinstance(about, dict) and all(isinstance(text, str) for text in about.values())):
        raise UserError(f"{file}: __metadata__ of its header is more than texts by name; copy it again")
    return header


def _stored(file: Path, name: str, about: Any, begin: int) -> Stored:
    """What a header says of one tensor. begin: the first byte after the header."""
    try:
        dtype, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
        start, end = offsets
        sizes = (*shape, start, end, prod(number or 1 for number in shape))
        if not all(type(number) is int and 0 <= number < 1 << 60 for number in sizes):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{file}: the header of tensor {name} is malformed; copy it again") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{file}: tensor {name} is {dtype!r}: only {', '.join(DTYPES)} are supported")
    stored = Stored(file, DTYPES[dtype], tuple(shape), begin + start)
    if end - start != _nbytes(stored):
        raise UserError(f"{file}: the header of tensor {name} contradicts itself; copy it again")
    return stored


class FolderWriter:
    """Writes a folder of safetensors whose tensors are known beforehand and arrive in any order, from any thread.

    A context: everything goes to `<folder>.partial`, which takes the folder's name at the end, and only then.
    Raises UserError where the folder is there already, and with exit code 4 where the disk is full.
    """

    def __init__(self, folder: Path, tensors: Iterable[Planned], max_shard_bytes: int, stem: str = "model"):
        if folder.exists():
            raise UserError(f"{folder} exists already: choose another name, or remove it first")
        self.folder, self.partial = folder, folder.with_name(f"{folder.name}.partial")
        shards: list[list[Planned]] = [[]]
        filled = 0
        for tensor in tensors:
            size = _nbytes(tensor)
            if shards[-1] and filled + size > max_shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(tensor)
            filled += size
        count, self._stem = len(shards), stem
        names = [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        self._shards = dict(zip(names if count > 1 else [f"{stem}.safetensors"], shards, strict=True))
        self._places: dict[str, tuple[int, int, Planned]] = {}  # file descriptor, first byte
        self._files: list[int] = []

    def __enter__(self) -> "FolderWriter":
        shutil.rmtree(self.partial, ignore_errors=True)
        try:
            self.partial.mkdir(parents=True)
            for name, tensors in self._shards.items():
                file = os.open(self.partial / name, os.O_CREAT | os.O_WRONLY, 0o644)
                self._files.append(file)
                self._write_header(file, tensors)
        except OSError as error:
            raise UserError(f"{self.partial}: {error.strerror}", code=4) from None
        return self

    def _write_header(self, file: int, tensors: list[Planned]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in tensors:
            start, end = end, end + _nbytes(tensor)
            header[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        os.pwrite(file, struct.pack("<Q", len(text)) + text, 0)
        for tensor in tensors:
            start = 8 + len(text) + header[tensor.name]["data_offsets"][0]
            self._places[tensor.name] = (file, start, tensor)

    def write(self, name: str, array: np.ndarray) -> None:
        file, start, planned = self._places[name]
        assert array.shape == planned.shape and array.dtype == planned.dtype, (name, array.shape, planned)
        view = memoryview(np.ascontiguousarray(array).view(np.uint8).reshape(-1))
        try:
            while view:  # one call writes 2 GiB at most
                written = os.pwrite(file, view, start)
                view, start = view[written:], start + written
        except OSError as error:
            raise UserError(f"{self.partial}: {error.strerror}", code=4) from None
        del self._places[name]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for file in self._files:
            os.close(file)
        if kind is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            return
        assert not self._places, f"never written: {next(iter(self._places))}"
        if len(self._shards) > 1:
            total = sum(_nbytes(tensor) for tensors in self._shards.values() for tensor in tensors)
            places = {tensor.name: name for name, tensors in self._shards.items() for tensor in tensors}
            index = {"metadata": {"total_size": total}, "weight_map": places}
            (self.partial / f"{self._stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        self.partial.rename(self.folder)


def _nbytes(tensor: Stored | Planned) -> int:
    return prod(tensor.shape) * tensor.dtype.itemsize
