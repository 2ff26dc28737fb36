"""Ring Attention: queries stay, keys and values travel once round the sp axis and hide behind the computation.

Everything here runs inside shard_map on one device's share. n devices need n - 1 hops. K and V travel in ONE
array, in the compute dtype; the gradients of K and V travel behind them in float32.
Ref: Ring Attention, arXiv:2310.01889.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from ringbpt.attention.core import Local, MaskSpec, Partial
from ringbpt.types import TokenMeta


def _send(x: jax.Array, axis: str, size: int) -> jax.Array:
    """To the next device of the ring; what arrives is the previous one's."""
    return lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)])


def _all_metas(meta: TokenMeta, axis: str) -> Callable[[jax.Array | int], TokenMeta]:
    """hop -> the places of the keys that this device holds at that hop.

    Gathered once, eight bytes a token, and not sent along: so each hop is one transfer, which schedulers overlap.
    """
    everybody = lax.all_gather(meta, axis)
    device, size = lax.axis_index(axis), lax.axis_size(axis)

    def at(hop: jax.Array | int) -> TokenMeta:
        source = (device - hop) % size
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, source, keepdims=False), everybody)

    return at


def forward(local: Local, axis: str, q, k, v, q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec) -> Partial:
    """Attention of this device's queries over the keys of every device of the ring."""
    size, meta_at = lax.axis_size(axis), _all_metas(kv_meta, axis)

    def hop(state, i):
        part, kv = state
        next_kv = _send(kv, axis, size)  # issued first: it hides behind the computation
        return (local.attend(q, kv[0], kv[1], q_meta, meta_at(i), mask, part), next_kv), None

    (part, kv), _ = lax.scan(hop, (Partial.empty(q.shape), jnp.stack([k, v])), jnp.arange(size - 1))
    return local.attend(q, kv[0], kv[1], q_meta, meta_at(size - 1), mask, part)


def backward(
    local: Local, axis: str, q, k, v, out, lse, d_out, q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients towards this device's q, k and v (float32), from the global out and lse.

    The sum of dK and dV for a device's keys is handed on with the keys, one hop behind: while hop i computes,
    the sum of hop i - 1 is on its way. It comes home after n - 1 hops. So that the first sending of K and V and
    the homecoming hide behind computation too, the device's own keys are done in two halves: the first half of
    its queries before the ring starts, the second while its sum comes home. 2 (n - 1) transfers, none exposed.
    """
    size, meta_at = lax.axis_size(axis), _all_metas(kv_meta, axis)
    half = q.shape[1] // 2
    rows = (q, out, lse, d_out, q_meta)
    first, second = (jax.tree.map(lambda x, part=part: x[:, part], rows) for part in (slice(half), slice(half, None)))

    def grads(rows, kv, hop):
        q, out, lse, d_out, q_meta = rows
        dq, dk, dv = local.attend_bwd(q, kv[0], kv[1], out, lse, d_out, q_meta, meta_at(hop), mask)
        return dq, jnp.stack([dk, dv])

    own = jnp.stack([k, v])
    if size == 1:
        dq, d_kv = grads(rows, own, 0)
        return dq, d_kv[0], d_kv[1]

    kv = _send(own, axis, size)
    dq_first, d_own = grads(first, own, 0) if half else (q[:, :0].astype(jnp.float32), 0.0)
    dq = jnp.concatenate([dq_first, jnp.zeros(second[0].shape, jnp.float32)], axis=1)

    def hop(state, i):
        dq, d_kv, kv = state
        next_kv, arrived = _send(kv, axis, size), _send(d_kv, axis, size)
        dq_hop, d_kv_hop = grads(rows, kv, i)
        return (dq + dq_hop, arrived + d_kv_hop, next_kv), None

    # The sum that hop 1 receives is nobody's yet: zeros, sent so that all hops are one loop body.
    state = (dq, jnp.zeros(own.shape, jnp.float32), kv)
    (dq, d_kv, kv), _ = lax.scan(hop, state, jnp.arange(1, size - 1))
    arrived = _send(d_kv, axis, size) if size > 2 else d_kv
    dq_hop, d_kv_hop = grads(rows, kv, size - 1)

    home = _send(arrived + d_kv_hop, axis, size)
    dq_second, d_own_second = grads(second, own, 0)
    dq = (dq + dq_hop).at[:, half:].add(dq_second)
    d_kv = home + d_own + d_own_second
    return dq, d_kv[0], d_kv[1]
