"""The visits of a kernel: core.row_visibility as a flat list of (block of queries, block of keys).

A kernel's grid walks the list, whose length is known when it runs: what nobody sees, in whatever layout, mask or
packing, forward or backward, is neither fetched nor computed nor even a step of the grid.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

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


def visits(some_Bij: Bool[Array, "B i j"], every_Bij: Bool[Array, "B i j"]) -> Visits:
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
