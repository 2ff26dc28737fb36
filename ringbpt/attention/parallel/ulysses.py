"""Ulysses: an all-to-all trades the sequence for heads, each device attends to all of it, a second one trades back.

On sp devices each attends with N / sp query heads over the whole sequence. Where there are fewer kv heads than
devices each kv head is given to every device whose query heads need it. `ulysses x ring` does this over groups of
neighbours and lets the groups form a ring. Everything here runs inside shard_map. Ref: arXiv:2309.14509, USP
arXiv:2405.07719.
"""

import jax
import jax.numpy as jnp
from jax import lax

from ringbpt.attention.core import Local, MaskSpec, Partial, gather_meta
from ringbpt.types import TokenMeta


def _to_heads(x_BTNx: jax.Array, axis: str) -> jax.Array:
    """[B, T/sp, N, ...] -> [B, T, N/sp, ...]."""
    return lax.all_to_all(x_BTNx, axis, split_axis=2, concat_axis=1, tiled=True)


def _to_sequence(x_BTNx: jax.Array, axis: str) -> jax.Array:
    """The inverse of _to_heads."""
    return lax.all_to_all(x_BTNx, axis, split_axis=1, concat_axis=2, tiled=True)


def _copies(heads: int, kv_heads: int, size: int) -> int:
    """How often each kv head must stand in the array for the all-to-all to deal it to all devices that need it."""
    if heads % size:
        raise NotImplementedError(
            f"ulysses deals {heads} query heads of a device out to sp={size}, which does not divide them: use ring"
        )
    if kv_heads % size and size % kv_heads:
        raise NotImplementedError(
            f"ulysses cannot deal {kv_heads} kv heads of a device out to sp={size}: use ring, or an sp that divides "
            "the kv heads or is a multiple of them"
        )
    return max(1, size // kv_heads)


def forward(local: Local, axis: str, q, k, v, q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec) -> Partial:
    """Attention of this device's queries over everybody's keys."""
    copies = _copies(q.shape[2], k.shape[2], lax.axis_size(axis))
    q, k, v = (_to_heads(x, axis) for x in (q, jnp.repeat(k, copies, 2), jnp.repeat(v, copies, 2)))
    part = local.attend(q, k, v, gather_meta(q_meta, axis), gather_meta(kv_meta, axis), mask)
    return Partial(_to_sequence(part.out_BTNH, axis), _to_sequence(part.lse_BTN, axis))


def backward(
    local: Local, axis: str, q, k, v, out, lse, d_out, q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec
):  # fmt: skip
    """Gradients towards this device's q, k and v (float32)."""
    kv_heads = k.shape[2]
    copies = _copies(q.shape[2], kv_heads, lax.axis_size(axis))
    rows = (q, jnp.repeat(k, copies, 2), jnp.repeat(v, copies, 2), out, lse, d_out)
    grads = local.attend_bwd(
        *(_to_heads(x, axis) for x in rows), gather_meta(q_meta, axis), gather_meta(kv_meta, axis), mask
    )
    dq, dk, dv = (_to_sequence(grad, axis) for grad in grads)

    def sum_copies(d_BTKH):
        return d_BTKH.reshape(*d_BTKH.shape[:2], kv_heads, copies, -1).sum(axis=3)

    return dq, sum_copies(dk), sum_copies(dv)
