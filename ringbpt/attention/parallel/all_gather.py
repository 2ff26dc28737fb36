"""Gathered keys: every device sees all keys and values, a few heads at a time, and keeps its own queries.

One collective for each group of heads instead of a ring of them: less to hide behind computation when a device
holds few tokens, at the price of memory for sp times as many keys. The gradients of K and V are summed in
float32 and scattered. Everything here runs inside shard_map. Ref: Llama 3 (arXiv:2407.21783, section 3.3.2).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ringbpt.attention.core import Local, MaskSpec, Partial, gather_meta, join, split
from ringbpt.reduction import Reduction
from ringbpt.types import TokenMeta

HEADS = 2  # their dim in [B, T, N, ...]


def _stride(heads_k_stride: int | None, kv_heads: int) -> int:
    stride = heads_k_stride or kv_heads
    if kv_heads % stride:
        divisors = [d for d in range(1, kv_heads + 1) if kv_heads % d == 0]
        nearest = min(divisors, key=lambda d: abs(d - stride))
        raise ValueError(f"heads_k_stride={stride} does not divide a device's {kv_heads} kv heads: {nearest} does")
    return stride


def forward(
    local: Local, axis: str, q, k, v, q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec, heads_k_stride=None
) -> Partial:
    """Attention of this device's queries over everybody's keys."""
    count = k.shape[2] // _stride(heads_k_stride, k.shape[2])
    whole_meta = gather_meta(kv_meta, axis)

    def group(heads):
        q, kv = heads[0], _gather_pair(heads[1], heads[2], axis)
        return local.attend(q, kv[0], kv[1], q_meta, whole_meta, mask)

    part = lax.map(group, tuple(split(x, count, HEADS) for x in (q, k, v)))
    return jax.tree.map(partial(join, dim=HEADS), part)


def _gather_pair(k, v, axis: str) -> jax.Array:
    return lax.all_gather(jnp.stack([k, v]), axis, axis=2, tiled=True)


def backward(
    local: Local, axis: str, q, k, v, out, lse, d_out, q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec,
    *, reduction: Reduction, heads_k_stride=None,
):  # fmt: skip
    """Gradients towards this device's q, k and v (float32); K and V are gathered again, not kept."""
    count = k.shape[2] // _stride(heads_k_stride, k.shape[2])
    whole_meta = gather_meta(kv_meta, axis)

    def group(heads):
        q, k, v, out, lse, d_out = heads
        kv = _gather_pair(k, v, axis)
        dq, dk, dv = local.attend_bwd(q, kv[0], kv[1], out, lse, d_out, q_meta, whole_meta, mask)
        return dq, reduction.scatter(jnp.stack([dk, dv]), axis, 2)

    dq, d_kv = lax.map(group, tuple(split(x, count, HEADS) for x in (q, k, v, out, lse, d_out)))
    d_kv = jnp.moveaxis(d_kv, 1, 0)
    return join(dq, HEADS), join(d_kv[0], HEADS), join(d_kv[1], HEADS)
