"""Ring Attention: queries stay, keys and values travel once round the sp axis and hide behind the computation.

Everything here runs inside shard_map on one device's share. n devices need n - 1 hops. K and V travel in ONE
array, in the compute dtype; the gradients of K and V travel behind them in float32.
Ref: Ring Attention, arXiv:2310.01889.
"""

import jax
import jax.numpy as jnp
from jax import lax

from ringbpt.attention.core import Local, MaskSpec, Partial
from ringbpt.types import TokenMeta


def _send(tree, axis: str, size: int):
    """To the next device of the ring; what arrives is the previous one's."""
    return lax.ppermute(tree, axis, [(i, (i + 1) % size) for i in range(size)])


def forward(local: Local, axis: str, q, k, v, q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec) -> Partial:
    """Attention of this device's queries over the keys of every device of the ring."""
    size = lax.axis_size(axis)

    def hop(state, _):
        part, kv, kv_meta = state
        next_kv, next_meta = _send((kv, kv_meta), axis, size)  # issued first: it hides behind the computation
        part = local.attend(q, kv[0], kv[1], q_meta, kv_meta, mask, part)
        return (part, next_kv, next_meta), None

    state = (Partial.empty(q.shape), jnp.stack([k, v]), kv_meta)
    (part, kv, kv_meta), _ = lax.scan(hop, state, length=size - 1)
    return local.attend(q, kv[0], kv[1], q_meta, kv_meta, mask, part)


def backward(
    local: Local, axis: str, q, k, v, out, lse, d_out, q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients towards this device's q, k and v (float32), from the global out and lse.

    The sum of dK and dV for a device's keys is handed on with the keys, one hop behind: while hop i computes,
    the sum of hop i - 1 is on its way. It comes home after n - 1 hops. So that the first sending of K and V and
    the homecoming hide behind computation too, the device's own keys are done in two halves: the first half of
    its queries before the ring starts, the second while its sum comes home. 2 (n - 1) transfers, none exposed.
    """
    size = lax.axis_size(axis)
    half = q.shape[1] // 2
    rows = (q, out, lse, d_out, q_meta)
    first, second = (jax.tree.map(lambda x, part=part: x[:, part], rows) for part in (slice(half), slice(half, None)))

    def grads(rows, kv, kv_meta):
        q, out, lse, d_out, q_meta = rows
        dq, dk, dv = local.attend_bwd(q, kv[0], kv[1], out, lse, d_out, q_meta, kv_meta, mask)
        return dq, jnp.stack([dk, dv])

    own = jnp.stack([k, v])
    if size == 1:
        dq, d_kv = grads(rows, own, kv_meta)
        return dq, d_kv[0], d_kv[1]

    kv, meta = _send((own, kv_meta), axis, size)
    dq_first, d_own = grads(first, own, kv_meta) if half else (q[:, :0].astype(jnp.float32), 0.0)
    dq = jnp.concatenate([dq_first, jnp.zeros(second[0].shape, jnp.float32)], axis=1)

    def hop(state, _):
        dq, d_kv, kv, meta = state
        next_kv, next_meta = _send((kv, meta), axis, size)
        arrived = _send(d_kv, axis, size)
        dq_hop, d_kv_hop = grads(rows, kv, meta)
        return (dq + dq_hop, arrived + d_kv_hop, next_kv, next_meta), None

    # The sum that hop 1 receives is nobody's yet: zeros, sent so that all hops are one loop body.
    state = (dq, jnp.zeros(own.shape, jnp.float32), kv, meta)
    (dq, d_kv, kv, meta), _ = lax.scan(hop, state, length=size - 2)
    arrived = _send(d_kv, axis, size) if size > 2 else d_kv
    dq_hop, d_kv_hop = grads(rows, kv, meta)

    home = _send(arrived + d_kv_hop, axis, size)
    dq_second, d_own_second = grads(second, own, kv_meta)
    dq = (dq + dq_hop).at[:, half:].add(dq_second)
    d_kv = home + d_own + d_own_second
    return dq, d_kv[0], d_kv[1]
