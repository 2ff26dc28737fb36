"""Products of rows with their own group's matrix, as a mixture of experts needs them, on each kind of device.

Rows are dealt out so that each expert's stand side by side, from a whole block on: a block of places has one expert,
and a product visits only the blocks in use. On TPUs the compiler has such a product (`lax.ragged_dot`); of it XLA makes
on every other device the product of all rows with all experts, so GPUs have kernels here, and the rest a loop.
Ref: MegaBlocks, arXiv:2211.15841.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from ringbpt.hardware import cuda_capability
from ringbpt.model.weights import dot

_LEAST = 16  # the smallest side of a matrix product on a GPU


class Deal(NamedTuple):
    """Which row stands in which place; int32. All places of a block are one expert's."""

    row: jax.Array  # [places]: which row stands there; one beyond the last where none does
    place: jax.Array  # [rows]: where each stands
    expert: jax.Array  # [blocks]: whose each is
    first: jax.Array  # [E + 1]: each expert's first block; the last is how many blocks are in use

    def spread(self, x: jax.Array, copies: int = 1) -> jax.Array:
        """[places, ...]: what stands in each place, zeros where no row does.

        x: [rows / copies, ...]; its i-th stands for the `copies` rows from i * copies on.
        """
        return x.at[self.row // copies].get(mode="fill", fill_value=0)


def deal(expert: jax.Array, num_experts: int, block: int) -> Deal:
    """The Deal of rows whose experts are these, [rows]; as many places as the least even loads need."""
    rows = expert.shape[0]
    count = jnp.bincount(expert, length=num_experts).astype(jnp.int32)
    before = jnp.cumulative_sum(count, include_initial=True)
    first = jnp.cumulative_sum(-(-count // block), include_initial=True)
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    mine = expert[order]
    places = (first * block)[mine] + jnp.arange(rows, dtype=jnp.int32) - before[mine]
    chosen = min(rows, num_experts)  # at most; each has a last block that may be nearly empty
    blocks = chosen + (rows - chosen) // block
    return Deal(
        row=jnp.full(blocks * block, rows, jnp.int32).at[places].set(order, unique_indices=True),
        place=jnp.zeros(rows, jnp.int32).at[order].set(places, unique_indices=True),
        expert=jnp.minimum(jnp.searchsorted(first[1:], jnp.arange(blocks), side="right"), num_experts - 1),
        first=first,
    )


@dataclass(frozen=True)
class Grouped:
    """The products of one kind of device; sums are in float32, and float32 operands are not rounded.

    product(a [places, K], w [E, K, N], deal) -> [places, N] in a's dtype; turned: w is [E, N, K].
    outer(a [places, K], b [places, N], deal, num_experts) -> aᵀ b of each expert's rows, [E, K, N] float32.
    block(rows, num_experts, dtype): how many places its blocks have.
    """

    product: Callable[..., jax.Array]
    outer: Callable[..., jax.Array]
    block: Callable[[int, int, jnp.dtype], int]


def make_grouped(device: jax.Device, interpret: bool = False) -> Grouped:
    """The fastest for a device. interpret: the GPU's kernels on any device, slowly."""
    if interpret or cuda_capability(device) >= 8:
        return Grouped(partial(_triton_product, interpret), partial(_triton_outer, interpret), _triton_block)
    if device.platform == "tpu":
        return ragged()
    return Grouped(_loop_product, _loop_outer, partial(_block, 128))


def ragged() -> Grouped:
    """By lax.ragged_dot, which is a product of groups on TPUs only."""
    return Grouped(_ragged_product, _ragged_outer, lambda rows, num_experts, dtype: 1)


def _block(most: int, rows: int, num_experts: int, dtype: jnp.dtype) -> int:
    """A power of two, at most half of an expert's share of the rows: its last block is half empty in the mean."""
    return max(_LEAST, min(most, 1 << (rows // num_experts // 2).bit_length() >> 1))


def _precision(x: jax.Array) -> lax.Precision | None:
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


# --- TPUs ---


def _ragged(a: jax.Array, b: jax.Array, sizes: jax.Array, contract: tuple[int, int], groups: list[int]) -> jax.Array:
    numbers = lax.RaggedDotDimensionNumbers((((contract[0],), (contract[1],)), ((), ())), [0], groups)
    return lax.ragged_dot_general(a, b, sizes, numbers, _precision(a), jnp.float32)


def _ragged_product(a: jax.Array, w: jax.Array, deal: Deal, turned: bool = False) -> jax.Array:
    return _ragged(a, w, jnp.diff(deal.first), (1, 2 if turned else 1), [0]).astype(a.dtype)


def _ragged_outer(a: jax.Array, b: jax.Array, deal: Deal, num_experts: int) -> jax.Array:
    return _ragged(a, b, jnp.diff(deal.first), (0, 0), [])


# --- any device ---


def _loop_product(a: jax.Array, w: jax.Array, deal: Deal, turned: bool = False) -> jax.Array:
    block = a.shape[0] // deal.expert.shape[0]
    equation = "mk,nk->mn" if turned else "mk,kn->mn"

    def step(i, out):
        part = dot(equation, lax.dynamic_slice_in_dim(a, i * block, block), w[deal.expert[i]], a.dtype)
        return lax.dynamic_update_slice_in_dim(out, part, i * block, 0)

    return lax.fori_loop(0, deal.first[-1], step, jnp.zeros((a.shape[0], w.shape[1 if turned else 2]), a.dtype))


def _loop_outer(a: jax.Array, b: jax.Array, deal: Deal, num_experts: int) -> jax.Array:
    block = a.shape[0] // deal.expert.shape[0]

    def step(i, sums):
        rows_a, rows_b = (lax.dynamic_slice_in_dim(x, i * block, block) for x in (a, b))
        return sums.at[deal.expert[i]].add(dot("mk,mn->kn", rows_a, rows_b, jnp.float32))

    return lax.fori_loop(0, deal.first[-1], step, jnp.zeros((num_experts, a.shape[1], b.shape[1]), jnp.float32))


# --- NVIDIA GPUs, in Pallas by Triton ---


class _Sizes(NamedTuple):
    """rows: of a block of places, at most. side: of what a program computes. depth: of what is fetched at once."""

    rows: int
    side: int
    depth: int
    warps: int
    stages: int


# By bytes of a number; no kernel spills registers on sm_80 and sm_90 (tests/model/test_grouped.py compiles them).
_SIZES = {2: _Sizes(128, 128, 64, 8, 3), 4: _Sizes(64, 64, 32, 4, 2)}


def _triton_block(rows: int, num_experts: int, dtype: jnp.dtype) -> int:
    return _block(_SIZES[dtype.itemsize].rows, rows, num_experts, dtype)


def _part(size: int, most: int) -> int:
    """The largest power of two up to `most` that divides a size."""
    return min(most, size & -size)


def _padded(x: jax.Array) -> jax.Array:
    """Zeros up to whole products in its last two dims; those of models are."""
    widths = [(0, 0)] * (x.ndim - 2) + [(0, -size % _LEAST) for size in x.shape[-2:]]
    return jnp.pad(x, widths) if any(right for _, right in widths) else x


def _dot(a: jax.Array, b: jax.Array, **turned: bool) -> jax.Array:
    return pltriton.dot(a, b, precision=_precision(a), **turned)


def _product_kernel(expert, first, a, w, out, *, depth: int, turned: bool):
    mine, used = expert[...], pl.program_id(0) < first[first.shape[0] - 1]

    def step(i, total):
        inner = pl.ds(i * depth, depth)
        part = w[mine, :, inner] if turned else w[mine, inner, :]
        return total + _dot(a[:, inner], part, trans_b=turned)

    steps = used.astype(jnp.int32) * (a.shape[1] // depth)  # a block that nobody uses reads no weights
    out[...] = lax.fori_loop(0, steps, step, jnp.zeros(out.shape, jnp.float32)).astype(out.dtype)


def _outer_kernel(first, a, b, out, *, block: int, depth: int):
    expert = pl.program_id(2)

    def step(i, total):
        rows = pl.ds(i * depth, depth)
        return total + _dot(a[rows, :], b[rows, :], trans_a=True)

    begin, end = (first[expert + after] * (block // depth) for after in (0, 1))
    out[...] = lax.fori_loop(begin, end, step, jnp.zeros(out.shape, jnp.float32))


def _call(kernel: partial, interpret: bool, sizes: _Sizes, **rest) -> Callable[..., jax.Array]:
    how = pltriton.CompilerParams(num_warps=sizes.warps, num_stages=sizes.stages)
    return pl.pallas_call(
        kernel, compiler_params=how, interpret=interpret, name=f"triton{kernel.func.__name__}", **rest
    )


def _triton_product(interpret: bool, a: jax.Array, w: jax.Array, deal: Deal, turned: bool = False) -> jax.Array:
    N, sizes, blocks = w.shape[1 if turned else 2], _SIZES[a.dtype.itemsize], deal.expert.shape[0]
    a, w = _padded(a), _padded(w)
    (places, K), E, wide = a.shape, w.shape[0], w.shape[1 if turned else 2]
    side, block = _part(wide, sizes.side), places // blocks
    kernel = partial(_product_kernel, depth=_part(K, sizes.depth), turned=turned)
    # The blocks of an expert, one after the other, take the same columns of its matrix.
    return _call(
        kernel, interpret, sizes,
        grid=(blocks, wide // side),
        in_specs=[
            pl.BlockSpec((None,), lambda i, j: (i,)),
            pl.BlockSpec((E + 1,), lambda i, j: (0,)),
            pl.BlockSpec((block, K), lambda i, j: (i, 0)),
            pl.BlockSpec((E, side, K), lambda i, j: (0, j, 0)) if turned
            else pl.BlockSpec((E, K, side), lambda i, j: (0, 0, j)),
        ],
        out_specs=pl.BlockSpec((block, side), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((places, wide), a.dtype),
    )(deal.expert, deal.first, a, w)[:, :N]  # fmt: skip


def _triton_outer(interpret: bool, a: jax.Array, b: jax.Array, deal: Deal, num_experts: int) -> jax.Array:
    (places, K), N, sizes, block = a.shape, b.shape[1], _SIZES[a.dtype.itemsize], a.shape[0] // deal.expert.shape[0]
    a, b = _padded(a), _padded(b)
    side = [_part(x.shape[1], sizes.side) for x in (a, b)]
    kernel = partial(_outer_kernel, block=block, depth=min(block, sizes.depth))
    return _call(
        kernel, interpret, sizes,
        grid=(b.shape[1] // side[1], a.shape[1] // side[0], num_experts),
        in_specs=[
            pl.BlockSpec((num_experts + 1,), lambda j, i, e: (0,)),
            pl.BlockSpec((places, side[0]), lambda j, i, e: (0, i)),
            pl.BlockSpec((places, side[1]), lambda j, i, e: (0, j)),
        ],
        out_specs=pl.BlockSpec((None, *side), lambda j, i, e: (e, i, j)),
        out_shape=jax.ShapeDtypeStruct((num_experts, a.shape[1], b.shape[1]), jnp.float32),
    )(deal.first, a, b)[:, :K, :N]  # fmt: skip
