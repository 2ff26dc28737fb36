"""Weights that stay, kept in 4 or 8 bits: what they are quantised to, by which blocks, and back again.

A block is 64 numbers along D, of which the largest size is kept beside their codes, so blocks lie whole on a device
wherever D is sharded by multiples of 64, and a gather sends codes and scales. Codes and scales have as many dims as the
weight, in the same order, so that its letters are theirs too. Ref: QLoRA, arXiv:2305.14314.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ringbpt.config.fields import BLOCK, DOUBLE_BLOCK, QUANTISED
from ringbpt.host_memory import fetch
from ringbpt.model.adapters import IN_OUT

# NF4: the quantiles of a normal distribution at which its 16 values are equally likely, 0 and both ends among them.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
LARGEST = {"nf4": 1.0, "int8": 127.0}  # the level that a block's largest number gets


class Quantised(NamedTuple):
    """A weight, or what belongs to one, in place of its array.

    codes: nf4: uint8, two numbers each, [..., D / 2, ...], of a block the first 32 in the lower bits and the others
    above; int8: [..., D, ...]. scales: float32 [..., D / 64, ...], what a level counts; doubly quantised uint8,
    and then tops: float32, the largest scale of each head, or of 64 of F, over 255.
    """

    codes: Any
    scales: Any
    tops: Any = None

    @property
    def kind(self) -> str:
        return "int8" if self.codes.dtype == jnp.int8 else "nf4"


IS_QUANTISED = lambda x: isinstance(x, Quantised)  # noqa: E731


class Kept(NamedTuple):
    """How weights are kept: kind, "nf4" or "int8", and whether their scales are quantised too."""

    kind: str
    double: bool = False

    @staticmethod
    def of(base_dtype: str, double: bool) -> "Kept | None":
        """What --lora.base_dtype says, where it says that."""
        return Kept(base_dtype, double) if base_dtype in QUANTISED else None

    def like(self, leaf: Any) -> Quantised:
        """The same leaf for each array, as a sharding."""
        return Quantised(leaf, leaf, leaf if self.double else None)

    def abstract(self, x: jax.ShapeDtypeStruct, dims: str) -> Quantised:
        """Of a weight's shape; each array is sharded as it is."""
        shapes = jax.eval_shape(partial(quantise, kept=self, dims=dims), x)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=x.sharding), shapes)

    def in_layers(self, x: jax.ShapeDtypeStruct, dims: str, layer: Callable[[int], jax.Array]) -> Quantised:
        """A stacked weight of layer(number), each dropped when it is quantised. x: its shape and sharding."""
        L = dims.split().index("L")
        abstract, one = self.abstract(x, dims), " ".join(dims.split()[:L] + dims.split()[L + 1 :])

        @partial(jax.jit, donate_argnums=0, out_shardings=jax.tree.map(lambda a: a.sharding, abstract))
        def put(stack: Quantised, w: jax.Array, i: jax.Array) -> Quantised:
            new = quantise(w, self, one)
            return jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, i, L), stack, new)

        stack = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), abstract)
        for i in range(x.shape[L]):
            stack = put(stack, layer(i), jnp.int32(i))
        return stack

    def of_stack(self, w: jax.Array, dims: str) -> Quantised:
        """Of a stacked weight, on the devices or in the host's memory, of which one layer at a time is fetched."""
        L = dims.split().index("L")
        take = jax.jit(lambda w, i: fetch(lax.dynamic_index_in_dim(w, i, L, keepdims=False)))
        sharding = w.sharding.with_memory_kind("device")
        abstract = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=sharding)
        return self.in_layers(abstract, dims, lambda i: take(w, jnp.int32(i)))


def stacked_dims(weight: str, axis: int) -> str:
    """ "w_q", 0 -> "L D N H"."""
    dims = " ".join(IN_OUT[weight]).split()
    dims.insert(min(axis, len(dims)), "L")
    return " ".join(dims)


def _blocks(x: jax.Array, axis: int, size: int) -> jax.Array:
    """[..., n, ...] -> [..., n / size, size, ...]."""
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def _joined(x: jax.Array, axis: int) -> jax.Array:
    """The inverse of _blocks."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _across(dims: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(axis, size) of the scales that have a top in common: those of a head, or of 64 of F."""
    letters = dims.split()
    axis = letters.index("H" if "H" in letters else "F")
    return axis, shape[axis] if "H" in letters else DOUBLE_BLOCK


def quantise(w: jax.Array, kept: Kept, dims: str) -> Quantised:
    """Each number becomes the nearest of the levels times what is kept of its block's largest size.

    dims: of w, with "D", which 64 divides.
    """
    axis = dims.split().index("D")
    block = _blocks(w.astype(jnp.float32), axis, BLOCK)
    scales = jnp.max(jnp.abs(block), axis=axis + 1) / LARGEST[kept.kind]
    tops = None
    if kept.double:
        across, size = _across(dims, scales.shape)
        tiles = _blocks(scales, across, size)
        tops = jnp.max(tiles, axis=across + 1) / 255
        ratio = tiles / _nonzero(jnp.expand_dims(tops, across + 1))
        # None is rounded to 0, which would take the block with it.
        scales = _joined(jnp.where(tiles > 0, jnp.clip(jnp.round(ratio), 1, 255), 0), across).astype(jnp.uint8)
    level = block / _nonzero(jnp.expand_dims(_scales(scales, tops, dims), axis + 1))
    if kept.kind == "int8":
        codes = _joined(jnp.clip(jnp.round(level), -127, 127), axis).astype(jnp.int8)
        return Quantised(codes, scales, tops)
    between = [(a + b) / 2 for a, b in pairwise(LEVELS)]
    code = sum((level > middle).astype(jnp.uint8) for middle in between)
    lower, upper = jnp.split(code, 2, axis=axis + 1)
    return Quantised(_joined(lower | upper << 4, axis), scales, tops)


def dequantised(w: Quantised, dims: str, dtype: Any) -> jax.Array:
    """The numbers that the codes stand for, computed in float32. dims: of w, as `quantise` had them."""
    axis = dims.split().index("D")
    if w.kind == "int8":
        level = _blocks(w.codes, axis, BLOCK).astype(jnp.float32)
    else:
        # What depends on no layer is computed ahead of the scan over layers: each level, spread over a weight's shape.
        packed, levels = lax.optimization_barrier((w.codes, tuple(map(jnp.float32, LEVELS))))
        codes = _blocks(packed, axis, BLOCK // 2)
        level = _level(jnp.concatenate([codes & 15, codes >> 4], axis=axis + 1), levels)
    return _joined(level * jnp.expand_dims(_scales(w.scales, w.tops, dims), axis + 1), axis).astype(dtype)


def _scales(scales: jax.Array, tops: jax.Array | None, dims: str) -> jax.Array:
    if tops is None:
        return scales
    across, size = _across(dims, scales.shape)
    return _joined(_blocks(scales, across, size).astype(jnp.float32) * jnp.expand_dims(tops, across + 1), across)


def _level(code: jax.Array, levels: tuple[jax.Array, ...]) -> jax.Array:
    """levels[code], chosen bit by bit: looking up in a table is slow where products are fast."""
    values: list[Any] = list(levels)
    for bit in range(4):
        is_set = (code >> bit) & 1 == 1
        values = [jnp.where(is_set, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _nonzero(x: jax.Array) -> jax.Array:
    return jnp.where(x == 0, 1.0, x)
