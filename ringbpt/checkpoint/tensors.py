"""Tensors of other people's files become our weights, and ours theirs, by one table read in either direction.

A row of a table names our weight, their tensor ({L} the layer, {E} the expert) and the pattern from theirs to ours:
`("layers.w_q", "model.layers.{L}.self_attn.q_proj.weight", "(N H) D -> D N H")`. The sides of a pattern are swapped to
go back. Tables are data: config/families.py has those of Hugging Face, original.py the original project's.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import product
from math import prod
from typing import Any

import einops
import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ringbpt.config import Architecture
from ringbpt.config.families import TensorRow
from ringbpt.dims import Dims
from ringbpt.model.llama import make_dims
from ringbpt.model.quantised import Kept
from ringbpt.types import PyTree

Box = tuple[slice, ...]
Read = Callable[[str, Box], np.ndarray]  # a box of one of their tensors, by its name


class Conversion:
    """One row for a model's sizes: how a weight of ours is made of tensors of theirs, and they of it.

    Ours is [L, E, *letters], with L and E where the row has them, and L at layer_axis; of theirs there is one tensor,
    of `their_shape`, for each (L, E). `pair` and `two` are the halves of a head: H = two * pair.
    """

    def __init__(self, row: TensorRow, dims: Dims, layer_axis: int = 0):
        theirs, ours = row.pattern.split(" -> ")
        self.ours, self.theirs = row.ours, row.theirs
        self._forth, self._back = row.pattern, f"{ours} -> {theirs}"
        self._their_groups, self._our_groups = _groups(theirs), _groups(ours)
        sizes = {**asdict(dims), "pair": dims.H // 2, "two": 2}
        self._sizes = {"1": 1} | {letter: sizes[letter] for group in self._our_groups for letter in group}
        self.their_shape = tuple(prod(self._sizes[letter] for letter in group) for group in self._their_groups)
        self.layer_axis = layer_axis if "{L}" in row.theirs else None
        self.has_experts = "{E}" in row.theirs
        self._counts = (dims.L if "{L}" in row.theirs else 1, dims.E if self.has_experts else 1)

    @property
    def our_shape(self) -> tuple[int, ...]:
        """Of our weight; a stored table may have more rows, so that tp divides them."""
        shape = [prod(self._sizes[letter] for letter in group) for group in self._our_groups]
        shape = [self._counts[1], *shape] if self.has_experts else shape
        if self.layer_axis is not None:
            shape.insert(self.layer_axis, self._counts[0])
        return tuple(shape)

    def cut(self, array: np.ndarray) -> np.ndarray:
        """A stored weight without such rows."""
        return array[tuple(map(slice, self.our_shape))]

    def name(self, layer: int | str = 0, expert: int = 0) -> str:
        """Of one of their tensors."""
        return self.theirs.replace("{L}", str(layer)).replace("{E}", str(expert))

    def parts(self) -> Iterator[tuple[str, int, int]]:
        """(name, layer, expert) of each of their tensors."""
        for layer, expert in product(*map(range, self._counts)):
            yield self.name(layer, expert), layer, expert

    def names(self) -> list[str]:
        return [name for name, *_ in self.parts()]

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """One of their tensors, or a box of it, as ours; a view where it can be one."""
        return einops.rearrange(tensor, self._forth, **self._inner(self._their_groups))

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """One (L, E) of ours as theirs; a view where it can be one."""
        return einops.rearrange(array, self._back, **self._inner(self._our_groups))

    def pick(self, array: np.ndarray, layer: int, expert: int) -> np.ndarray:
        """The (layer, expert) part of a whole weight of ours."""
        if self.layer_axis is not None:
            array = np.moveaxis(array, self.layer_axis, 0)[layer]
        return array[expert] if self.has_experts else array

    def read(self, index: Box, dtype: Any, read: Read) -> np.ndarray:
        """A box of our weight, from boxes of their tensors."""
        cut = list(index)
        layers = cut.pop(self.layer_axis) if self.layer_axis is not None else slice(0, 1)
        experts = cut.pop(0) if self.has_experts else slice(0, 1)
        box = self._box(cut)
        numbers = [range(part.start, part.stop) for part in (layers, experts)]
        out = np.empty([*map(len, numbers), *(part.stop - part.start for part in cut)], dtype)
        for i, layer in enumerate(numbers[0]):
            for j, expert in enumerate(numbers[1]):
                out[i, j] = self.to_ours(read(self.name(layer, expert), box))
        if not self.has_experts:
            out = out[:, 0]
        return out[0] if self.layer_axis is None else np.moveaxis(out, 0, self.layer_axis)

    def _box(self, index: list[slice]) -> Box:
        """The box of one of their tensors that a box of one (L, E) of ours comes from."""
        at = {"1": slice(0, 1)}
        for group, part in zip(self._our_groups, index, strict=True):
            size = prod(self._sizes[letter] for letter in group)
            whole = (part.start, part.stop) == (0, size)
            assert whole or len(group) == 1, f"{group} is sharded"
            at |= {letter: slice(0, self._sizes[letter]) if whole else part for letter in group}

        def cut(group: list[str]) -> slice:  # by its first letter; the others must be whole
            inner = prod(self._sizes[letter] for letter in group[1:])
            assert all(at[letter] == slice(0, self._sizes[letter]) for letter in group[1:]), f"{group} is sharded"
            return slice(at[group[0]].start * inner, at[group[0]].stop * inner)

        return tuple(cut(group) for group in self._their_groups)

    def _inner(self, groups: list[list[str]]) -> dict[str, int]:
        """What einops cannot tell from a shape; the first letter of a group, of which a box may have less, it can."""
        return {letter: self._sizes[letter] for group in groups for letter in group[1:]}


def _groups(side: str) -> list[list[str]]:
    """ "(N H) D" -> [["N", "H"], ["D"]]"""
    return [(several or one).split() for several, one in re.findall(r"\(([^)]*)\)|(\S+)", side)]


def conversions(rows: Iterable[TensorRow], architecture: Architecture) -> list[Conversion]:
    """The rows of a table for the sizes of a model."""
    return [Conversion(row, make_dims(architecture), architecture.param_scan_axis) for row in rows]


def flatten(tree: PyTree) -> dict[str, Any]:
    """A tree's leaves by name: `layers.w_q`, `0.mu.layers.w_q`."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def leaf_name(path: tuple[Any, ...]) -> str:
    """What `flatten` calls the leaf at a path."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def fill(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """The tree with the leaves of the same names in place of its own."""
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves[name] for name in flatten(tree)])


def place(
    conversion: Conversion, abstract: jax.ShapeDtypeStruct, read: Read, quantised: tuple[Kept, str] | None = None
) -> Any:
    """Our weight on the devices as `abstract` says (shape, dtype, sharding), each box read for its devices once.

    Rows that a table has besides those of its tokens are zero.
    Nothing is whole on the host, unless a device holds it whole. quantised: how, and the dims of the stacked weight, of
    which one layer at a time is read then, in float32.
    """
    if quantised:
        kept, dims = quantised
        return kept.in_layers(abstract, dims, lambda i: _place_layer(conversion, abstract, read, i))

    def read_box(box: Box) -> np.ndarray:
        inside = tuple(slice(min(x.start, n), min(x.stop, n)) for x, n in zip(box, conversion.our_shape, strict=True))
        array = conversion.read(inside, abstract.dtype, read)
        missing = [(0, x.stop - x.start - n) for x, n in zip(box, array.shape, strict=True)]
        return np.pad(array, missing) if any(count for _, count in missing) else array

    sharding = abstract.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return _from_boxes(abstract.shape, sharding, read_box)


def _place_layer(conversion: Conversion, abstract: jax.ShapeDtypeStruct, read: Read, layer: int) -> jax.Array:
    """One layer of our weight, float32, sharded as the whole is."""
    at = conversion.layer_axis
    assert at is not None
    shape = abstract.shape[:at] + abstract.shape[at + 1 :]
    sharding = NamedSharding(abstract.sharding.mesh, P(*(s for i, s in enumerate(abstract.sharding.spec) if i != at)))

    def read_box(box: Box) -> np.ndarray:
        return conversion.read((*box[:at], slice(layer, layer + 1), *box[at:]), np.float32, read).squeeze(at)

    return _from_boxes(shape, sharding, read_box)


def _from_boxes(
    shape: tuple[int, ...], sharding: jax.sharding.Sharding, read_box: Callable[[Box], np.ndarray]
) -> jax.Array:
    """An array on the devices, each box of it read once, for all the devices that have it."""
    boxes: dict[tuple, np.ndarray] = {}

    def shard(index: Box) -> np.ndarray:
        key = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        if key not in boxes:
            boxes[key] = read_box(tuple(slice(*part) for part in key))
        return boxes[key]

    return jax.make_array_from_callback(shape, sharding, shard)


def repack(tensor: np.ndarray, move: Callable[[np.ndarray], np.ndarray], cast: np.dtype | None) -> np.ndarray:
    """The tensor moved and cast, contiguous. Moved as plain integers: numpy copies its own dtypes far quicker."""
    if cast is not None and cast != tensor.dtype:
        tensor = tensor.astype(cast)
    bits = {2: np.uint16, 4: np.uint32}[tensor.dtype.itemsize]
    return _contiguous(move(tensor.view(bits))).view(tensor.dtype)


def _contiguous(view: np.ndarray) -> np.ndarray:
    """A contiguous copy of a strided view, in tiles that fit a cache: 2 GB/s a core, eight times a plain copy."""
    merged: list[list[int]] = []  # [size, stride]: neighbouring dims that lie as one, like N and H
    for size, stride in zip(view.shape, view.strides, strict=True):
        if merged and merged[-1][1] == size * stride:
            merged[-1] = [merged[-1][0] * size, stride]
        else:
            merged.append([size, stride])
    if len(merged) != 2 or view.flags.c_contiguous:
        return np.ascontiguousarray(view)
    flat = view.reshape([size for size, _ in merged])
    out = np.empty(flat.shape, flat.dtype)
    tile = 128
    for i in range(0, flat.shape[0], tile):
        for j in range(0, flat.shape[1], tile):
            # By way of a small copy: the rows of a large matrix, a power of two apart, share a cache's few places.
            out[i : i + tile, j : j + tile] = np.ascontiguousarray(flat[i : i + tile, j : j + tile].T).T
    return out.reshape(view.shape)
