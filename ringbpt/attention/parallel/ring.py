"""Ring Attention: queries stay, keys and values travel round the sp axis and hide behind the computation.

Everything here runs inside shard_map on one device's share. n devices need n - 1 hops, and fewer where documents or a
window leave nothing to see on devices further apart. K and V travel in ONE array, in the compute dtype; the gradients
of K and V travel behind them in float32. A bidirectional ring sends the first half of a device's keys one way and the
second half the other: links that carry both ways at once need half the time for a hop.
Ref: Ring Attention, arXiv:2310.01889.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from ringbpt.attention.core import Local, MaskSpec, Partial, block_visibility
from ringbpt.types import TokenMeta

Hops: TypeAlias = Any  # how far the keys travel: an int32 scalar, or None for all the way
Streams = tuple[tuple[int, slice], ...]  # which way (+1: to the next device), and which of a device's keys go there
ONE_WAY: Streams = ((1, slice(None)),)
# The name under which dK and dV travel and are added up in a compiled program; planning.traffic looks for it.
GRADIENTS_SCOPE = "key_gradients"


def _streams(bidirectional: bool, tokens: int) -> Streams:
    if not bidirectional:
        return ONE_WAY
    if tokens % 2:
        raise ValueError(f"a bidirectional ring halves a device's {tokens} keys: {tokens - 1} or {tokens + 1} would do")
    return ((1, slice(tokens // 2)), (-1, slice(tokens // 2, None)))


def needed_hops(meta: TokenMeta, mask: MaskSpec, size: int, bidirectional: bool = False) -> jax.Array:
    """int32: how far round a ring of `size` the keys must travel to have met all queries that see any of them.

    Outside shard_map, of the whole batch in layout order: one number for all devices, of all rings of the mesh, so
    that none waits for a transfer that another one skips. In the contiguous layout it is ceil((window - 1) / tokens
    of a device) for a window, and for packed documents the device boundaries that the longest one spans.
    """
    tokens = meta.position_BT.shape[1] // size
    parts = 2 - tokens % 2  # half of a device's tokens may come from elsewhere in the text (zigzag)
    some, _ = block_visibility(meta, meta, mask, tokens // parts, tokens // parts)
    seen = some.reshape(size, parts, size, parts).any(axis=1)  # [query device, key device, part of the keys]
    distance = (np.arange(size)[:, None] - np.arange(size)[None]) % size
    ways = [(step * distance % size, keys) for step, keys in _streams(bidirectional, parts)]
    return jnp.max(jnp.stack([jnp.max(jnp.where(seen[:, :, keys].any(axis=-1), far, 0)) for far, keys in ways]))


def _send(x: jax.Array, axis: str, size: int, step: int = 1) -> jax.Array:
    """To the next device of the ring; what arrives is the previous one's. step=-1: the other way round."""
    return lax.ppermute(x, axis, [(i, (i + step) % size) for i in range(size)])


def everybodys(meta: TokenMeta, axis: str) -> TokenMeta:
    """The places of every device's keys, [devices, B, S]: gathered once, eight or twelve bytes a token, and not sent
    along with keys, so that each hop is one transfer, which schedulers overlap.
    """
    return lax.all_gather(meta, axis)


def _metas_of(everybody: TokenMeta, axis: str, streams: Streams = ONE_WAY) -> Callable[[jax.Array | int], TokenMeta]:
    """hop -> the places of the keys that this device holds at that hop."""
    device, size = lax.axis_index(axis), lax.axis_size(axis)

    def at(hop: jax.Array | int) -> TokenMeta:
        def held(x):
            sources = [((device - step * hop) % size, keys) for step, keys in streams]
            parts = [lax.dynamic_index_in_dim(x, source, keepdims=False)[:, keys] for source, keys in sources]
            return jnp.concatenate(parts, axis=1)

        return jax.tree.map(held, everybody)

    return at


def _split(kv: jax.Array, streams: Streams) -> list[jax.Array]:
    """K and V, or their gradients, [2, B, S, K, H], into what goes each way; _join is its inverse."""
    return [kv[:, :, keys] for _, keys in streams]


def _join(kvs: list[jax.Array]) -> jax.Array:
    return jnp.concatenate(kvs, axis=2)


def forward(
    local: Local, axis: str, q, k, v, q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec,
    hops: Hops = None, everybody: TokenMeta | None = None, bidirectional: bool = False,
) -> Partial:  # fmt: skip
    """Attention of this device's queries over the keys of every device of the ring that is `hops` away or nearer.

    everybody: everybodys(kv_meta), where it is there already.
    """
    size, streams = lax.axis_size(axis), _streams(bidirectional, k.shape[1])
    meta_at = _metas_of(everybody or everybodys(kv_meta, axis), axis, streams)
    hops = size - 1 if hops is None else hops

    def attend(part, kvs, i):
        kv = _join(kvs)
        return local.attend(q, kv[0], kv[1], q_meta, meta_at(i), mask, part)

    def hop(i, state):
        part, kvs = state
        # Issued first: it hides behind the computation.
        next_kvs = [_send(kv, axis, size, step) for (step, _), kv in zip(streams, kvs, strict=True)]
        return attend(part, kvs, i), next_kvs

    state = (Partial.empty(q.shape), _split(jnp.stack([k, v]), streams))
    part, kvs = lax.fori_loop(0, hops, hop, state)
    return attend(part, kvs, hops)


def backward(
    local: Local, axis: str, q, k, v, out, lse, d_out, q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec,
    hops: Hops = None, everybody: TokenMeta | None = None, bidirectional: bool = False,
    reduce_dtype: DTypeLike = jnp.float32,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Gradients towards this device's q, k and v (float32), from the global out and lse.

    The sum of dK and dV for a device's keys is handed on with the keys, one hop behind: while hop i computes, the sum
    of hop i - 1 is on its way, in reduce_dtype. So that the first sending of K and V and the sum's homecoming hide
    behind computation too, the device's own keys are done in two halves: the first half of its queries before the ring
    starts, the second while the sum comes home. What the own keys get at home never travels: n - 1 hops of each.
    """
    size, streams = lax.axis_size(axis), _streams(bidirectional, k.shape[1])
    meta_at = _metas_of(everybody or everybodys(kv_meta, axis), axis, streams)
    half, rows = q.shape[1] // 2, (q, out, lse, d_out, q_meta)

    def grads(rows, kv, i):
        """dq of these rows, and dK and dV."""
        q, out, lse, d_out, q_meta = rows
        dq, dk, dv = local.attend_bwd(q, kv[0], kv[1], out, lse, d_out, q_meta, meta_at(i), mask)
        return dq, _split(jnp.stack([dk, dv]), streams)

    def send(arrays, way=1):
        return [_send(x, axis, size, way * step) for (step, _), x in zip(streams, arrays, strict=True)]

    def send_sums(d_kvs, way=1):
        with jax.named_scope(GRADIENTS_SCOPE):
            return [x.astype(jnp.float32) for x in send([x.astype(reduce_dtype) for x in d_kvs], way)]

    def turn(i, state, onward: bool = True):
        """(dq, dK and dV of the keys at hand, those keys) -> the same after hop i: what goes on hides behind it."""
        dq, d_kvs, kvs = state
        coming = (send(kvs) if onward else None, send_sums(d_kvs) if d_kvs else None)
        dq_hop, d_hop = grads(rows, _join(kvs), i)
        # All has arrived before anything is added up: the additions alone would seem long enough to hide K and V.
        dq_hop, d_hop, (next_kvs, arrived) = lax.optimization_barrier((dq_hop, d_hop, coming))
        return dq + dq_hop, _add(arrived, d_hop) if arrived else d_hop, next_kvs or kvs

    alone = lambda: grads(rows, (k, v), 0)  # noqa: E731

    def round_trip():
        first = jax.tree.map(lambda x: x[:, :half], rows)
        kvs = send(_split(jnp.stack([k, v]), streams))
        if half:
            dq_first, d_first = grads(first, (k, v), 0)
        else:
            dq_first, d_first = jnp.zeros(first[0].shape, jnp.float32), [jnp.zeros(kv.shape, jnp.float32) for kv in kvs]
        # Not later, to save memory: it hides the first keys' way.
        (dq_first, d_first), kvs = _one_after_the_other((dq_first, d_first), kvs)
        dq = jnp.pad(dq_first, ((0, 0), (0, q.shape[1] - half), (0, 0), (0, 0)))
        dq, d_kvs = further((dq, None, kvs))

        # The rest of the own keys hides the homecoming: not begun before, nor its rows cut, nor added up till it ends.
        d_kvs, late = _one_after_the_other(d_kvs, rows)
        second = jax.tree.map(lambda x: x[:, half:], late)
        home = _homecoming(d_kvs, send_sums, size, hops)
        (dq_second, d_second), home = lax.optimization_barrier((grads(second, (k, v), 0), home))
        return dq.at[:, half:].add(dq_second), _add(_add(home, d_first), d_second)

    def further(state):
        """(dq, the sums at hand) after all hops. The first brings no sum with it, and the last sends no keys."""
        if size == 2:
            return turn(1, state, onward=False)[:2]
        last = size - 1 if hops is None else hops
        # Each turn's dq is added up before the next turn: without a loop round them XLA for GPUs would keep them all.
        state = lax.optimization_barrier(turn(1, state))

        def others(state):
            return turn(last, lax.optimization_barrier(lax.fori_loop(2, last, turn, state)), onward=False)

        return (others(state) if hops is None else lax.cond(hops > 1, others, lambda state: state, state))[:2]

    if size == 1:
        dq, d_kvs = alone()
    elif hops is None:
        dq, d_kvs = round_trip()
    else:
        dq, d_kvs = lax.cond(hops > 0, round_trip, alone)
    dk, dv = _join(d_kvs)
    return dq, dk, dv


def _one_after_the_other(first: Any, then: Any) -> tuple[Any, Any]:
    """The same arrays; what is computed of `then` is computed when `first` is there.

    XLA for CPUs drops an optimization_barrier, and would compute what is for later at once, and keep it: there, each of
    the numbers comes to depend on one that was first.
    """

    def depending(arrays, number):
        nothing = jnp.where(jnp.isnan(number), 1, 0)
        return jax.tree.map(lambda x: x + nothing.astype(x.dtype), arrays)

    first, then = lax.optimization_barrier((first, then))
    number = jax.tree.leaves(first)[-1][0, 0, 0, 0, 0]
    return first, lax.platform_dependent(then, number, cpu=depending, default=lambda arrays, _: arrays)


def _add(a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
    with jax.named_scope(GRADIENTS_SCOPE):
        return [x + y for x, y in zip(a, b, strict=True)]


def _homecoming(d_kvs: list[jax.Array], send: Callable, size: int, hops: Hops) -> list[jax.Array]:
    """The sums of dK and dV, `hops` devices away from where their keys belong, on to there: one step for a whole ring.

    Where hops were skipped it is not known ahead how far that is: step by step, by the shorter way.
    """
    if hops is None:
        return send(d_kvs)
    onward = jnp.where(2 * hops > size, size - hops, 0)
    back = jnp.where(2 * hops > size, 0, hops)
    d_kvs = lax.fori_loop(0, onward, lambda _, x: send(x), d_kvs)
    return lax.fori_loop(0, back, lambda _, x: send(x, way=-1), d_kvs)
