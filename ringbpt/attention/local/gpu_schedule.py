"""Which blocks a kernel has to visit, as data: kernels on GPUs read it instead of testing every pair of blocks."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from ringbpt.attention.core import MaskSpec, row_visibility
from ringbpt.types import TokenMeta


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Schedule:
    """For each row of the batch and block on one side, the blocks on the other side that it shares a visible pair with.

    blocks: first those that need the mask, then those in which every pair is visible, ascending; what follows is
    junk. counts: how many of them need the mask, and how many there are in all.
    """

    blocks: Int32[Array, "B rows columns"]
    counts: Int32[Array, "B rows 2"]


def make_schedule(
    q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec, size_T: int, size_S: int, *, by_key: bool = False
) -> Schedule:
    """Key blocks to visit for each query block or, by_key, query blocks for each key block. Sizes divide lengths."""

    some, every = row_visibility(q_meta, kv_meta, mask, size_T, size_S)
    if by_key:
        some, every = (jnp.swapaxes(x, 1, 2) for x in (some, every))
    kind = jnp.where(some, jnp.where(every, 1, 0), 2)
    columns = kind.shape[-1]
    # One key per block, its number within it: a sort of plain integers is the one that is quick on a GPU.
    order = jnp.sort(kind * columns + jnp.arange(columns)[None, None], axis=-1)
    counts = jnp.stack([jnp.sum(kind == 0, axis=-1), jnp.sum(kind < 2, axis=-1)], axis=-1)
    return Schedule(order.astype(jnp.int32) % columns, counts.astype(jnp.int32))
