"""Which blocks a kernel visits, as data made of core.row_visibility: what nobody sees is neither fetched nor computed.

`visits` is one flat list of (block of queries, block of keys), for a kernel whose grid walks it: what is not listed, in
whatever layout, mask or packing, forward or backward, is no step of the grid. `block_lists` is a list for each row of
blocks, for kernels and loops that take one row a program.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

# What a visit says of itself, as bits.
FIRST, LAST, VISIBLE, MASKED = 1, 2, 4, 8
FLAG_BITS = 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Visits:
    """A flat list of (row of blocks, block of that row), rows one after the other; the first `count` are real.

    row: b * rows + i. step: j << FLAG_BITS | flags: FIRST and LAST of its row; VISIBLE unless the row has nothing to
    visit (then it is there once, so that its output is written); MASKED where not every pair is visible.
    """

    row: jax.Array  # int32 [B * rows * columns], as is step
    step: jax.Array
    count: jax.Array  # int32 []


def visits(some_Bij: jax.Array, every_Bij: jax.Array) -> Visits:
    """The visits of each row i, in ascending j; transpose both arguments to walk keys instead of queries."""
    columns = some_Bij.shape[2]
    empty_Bi1 = ~jnp.any(some_Bij, axis=2, keepdims=True)
    listed = (some_Bij | (empty_Bi1 & (jnp.arange(columns) == 0)[None, None])).ravel()
    count = jnp.sum(listed, dtype=jnp.int32)
    place = jnp.arange(listed.size, dtype=jnp.int32)
    seen = jnp.where(some_Bij, VISIBLE, 0) | jnp.where(every_Bij, 0, MASKED)
    # One number a visit, sorted: its place in front, what it says of itself behind; those not listed come last.
    numbers = jnp.sort(jnp.where(listed, place << FLAG_BITS | seen.ravel(), jnp.iinfo(jnp.int32).max))
    order = jnp.minimum(numbers >> FLAG_BITS, listed.size - 1)
    row, column = order // columns, order % columns
    first = (place == 0) | (row != jnp.roll(row, 1))
    last = (place == count - 1) | (row != jnp.roll(row, -1))
    ends = jnp.where(first, FIRST, 0) | jnp.where(last, LAST, 0)
    return Visits(row, column << FLAG_BITS | numbers & (VISIBLE | MASKED) | ends, count)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockLists:
    """For each row of blocks, the blocks on the other side with which it shares a visible pair.

    blocks: those of one kind, then those of the other, each ascending; what follows them is to be ignored. counts: how
    many there are of the first kind, and how many in all.
    """

    blocks: jax.Array  # int32 [..., rows, columns]
    counts: jax.Array  # int32 [..., rows, 2]


def block_lists(some: jax.Array, every: jax.Array, *, by_key: bool = False, full_first: bool = False) -> BlockLists:
    """The lists of key blocks for each block of queries or, by_key, of query blocks for each block of keys.

    some, every: bool [..., query blocks, key blocks], as core.row_visibility has them. First come the blocks that need
    the mask or, full_first, those in which every pair is visible.
    """
    if by_key:
        some, every = jnp.swapaxes(some, -1, -2), jnp.swapaxes(every, -1, -2)
    kind = jnp.where(some, jnp.where(every == full_first, 0, 1), 2)
    columns = kind.shape[-1]
    # One number a block, its column within it: a sort of plain integers is the one that is quick on a GPU.
    order = jnp.sort(kind * columns + jax.lax.broadcasted_iota(kind.dtype, kind.shape, kind.ndim - 1), axis=-1)
    counts = jnp.stack([jnp.sum(kind == 0, axis=-1), jnp.sum(kind < 2, axis=-1)], axis=-1)
    return BlockLists(order.astype(jnp.int32) % columns, counts.astype(jnp.int32))
