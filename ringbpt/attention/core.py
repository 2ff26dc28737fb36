"""What every attention shares: who sees whom, a partial result, and how two partial results become one."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from ringbpt.types import Array, TokenMeta


def split(x: jax.Array, count: int, dim: int) -> jax.Array:
    """x cut along `dim` into `count` equal pieces, [count, ...], to be scanned over; join is its inverse."""
    return jnp.moveaxis(x.reshape(*x.shape[:dim], count, -1, *x.shape[dim + 1 :]), dim, 0)


def join(pieces: jax.Array, dim: int) -> jax.Array:
    """Pieces [count, ...] behind each other along `dim`."""
    x = jnp.moveaxis(pieces, 0, dim)
    return x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :])


@jax.tree_util.register_static
@dataclass(frozen=True)
class MaskSpec:
    """The static half of a mask. A query sees a key of its own document (0, padding, sees and is seen by none) ...

    which is a key of the query's segment or, where documents share their beginning, of segment..last around it.

    causal: ... at its own position or before it. window: ... at most window - 1 positions away.
    """

    causal: bool = True
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"MaskSpec(window={self.window}): a window holds at least the token itself: use window=1")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Partial:
    """Attention over some of the keys: out_BTNH float32, normalised over them, and lse_BTN float32, their weight.

    A row that saw no key has out = 0 and lse = -inf.
    """

    out_BTNH: jax.Array
    lse_BTN: jax.Array

    @staticmethod
    def empty(shape_BTNH: tuple[int, ...]) -> "Partial":
        return Partial(jnp.zeros(shape_BTNH, jnp.float32), jnp.full(shape_BTNH[:-1], -jnp.inf, jnp.float32))


@dataclass(frozen=True)
class Local:
    """Attention of some queries to some keys on one device: the two functions of every implementation in local/.

    attend(q_BTNH, k_BSKH, v_BSKH, q_meta, kv_meta, mask, carry=None) -> Partial, carry merged in;
    attend_bwd(q, k, v, out, lse, d_out, q_meta, kv_meta, mask) -> (dq, dk, dv), float32, where out and lse are
    the GLOBAL ones: over all keys, not only those given.
    """

    attend: Callable[..., Partial]
    attend_bwd: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def visible(q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec) -> jax.Array:
    """The mask itself, bool [B, T, S]: only blocks of it are ever made outside local/reference.py.

    Of a query, last is not read: what several documents share is computed as part of the first of them.
    """
    distance_BTS = q_meta.position_BT[:, :, None] - kv_meta.position_BT[:, None, :]
    q_segment_BT1, kv_segment_B1S = q_meta.segment_BT[:, :, None], kv_meta.segment_BT[:, None, :]
    if kv_meta.last_BT is None:
        seen_BTS = (q_segment_BT1 == kv_segment_B1S) & (q_segment_BT1 != 0)
    else:
        kv_last_B1S = kv_meta.last_BT[:, None, :]
        seen_BTS = (kv_segment_B1S <= q_segment_BT1) & (q_segment_BT1 <= kv_last_B1S) & (q_segment_BT1 != 0)
    if mask.causal:
        seen_BTS &= distance_BTS >= 0
    if mask.window is not None:
        seen_BTS &= jnp.abs(distance_BTS) < mask.window
    return seen_BTS


_BEYOND = 2**31 - 1
Bounds = tuple[Array, Array]  # least and greatest


@dataclass(frozen=True)
class _Range:
    """Bounds of what is in each block of each row, [B, blocks]; padding is in nobody's.

    lowest and highest: of the positions of the least segment and of the greatest last alone.
    """

    segment: Bounds
    last: Bounds
    position: Bounds
    lowest: Bounds
    highest: Bounds
    padded: Array


def _ranges(meta: TokenMeta, size: int, axis: int) -> _Range:
    """With one more dim at `axis`, for the blocks on the other side."""
    blocks = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, size), meta)
    position, segment = blocks.position_BT, blocks.segment_BT
    xp = position.__array_namespace__()
    real = segment != 0

    def bounds(values: Array, of: Array) -> Bounds:
        return xp.min(xp.where(of, values, _BEYOND), axis=-1), xp.max(xp.where(of, values, -1), axis=-1)

    def widen(pair: Bounds) -> Bounds:
        return xp.expand_dims(pair[0], axis), xp.expand_dims(pair[1], axis)

    segments = bounds(segment, real)
    last, lasts = (segment, segments) if blocks.last_BT is None else (blocks.last_BT, bounds(blocks.last_BT, real))
    lowest = bounds(position, real & (segment == segments[0][..., None]))
    highest = bounds(position, real & (last == lasts[1][..., None]))
    return _Range(
        segment=widen(segments),
        last=widen(lasts),
        position=widen(bounds(position, real)),
        lowest=widen(lowest),
        highest=widen(highest),
        padded=xp.expand_dims(~xp.all(real, axis=-1), axis),
    )


def row_visibility(
    q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec, query_chunk_size: int, key_chunk_size: int
) -> tuple[Array, Array]:
    """(some, all), bool [B, blocks of queries, blocks of keys]: may a pair be visible; is every pair visible.

    `some` is never wrong about a visible pair and may be wrong about an invisible block. The sizes divide the
    lengths here. Of jax arrays on the device, of numpy arrays on the host: one rule for what is done and counted.
    """
    q = _ranges(replace(q_meta, last_BT=None), query_chunk_size, axis=2)
    k = _ranges(kv_meta, key_chunk_size, axis=1)
    xp = q.padded.__array_namespace__()
    # The documents that both sides may be part of. Blocks of one text have one in common at most, the last of the one
    # and the first of the other, but for what documents share: where there is one, only its positions count.
    first, last = xp.maximum(q.segment[0], k.segment[0]), xp.minimum(q.last[1], k.last[1])

    def positions(side: _Range) -> Bounds:
        shared = [
            xp.where(side.segment[0] == last, low, xp.where(side.last[1] == first, high, either))
            for low, high, either in zip(side.lowest, side.highest, side.position, strict=True)
        ]
        return shared[0], shared[1]

    (q_min, q_max), (k_min, k_max) = positions(q), positions(k)
    some = first <= last
    every = (k.segment[1] <= q.segment[0]) & (q.segment[1] <= k.last[0]) & ~q.padded & ~k.padded
    if mask.causal:
        some &= k_min <= q_max
        every &= k_max <= q_min
    if mask.window is not None:
        some &= q_min - k_max < mask.window
        every &= q_max - k_min < mask.window
        if not mask.causal:
            some &= k_min - q_max < mask.window
            every &= k_max - q_min < mask.window
    return some, every


def block_visibility(
    q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec, query_chunk_size: int, key_chunk_size: int
) -> tuple[Array, Array]:
    """(some, all), bool [blocks of queries, blocks of keys], of all rows: may a pair be visible; is every pair."""
    some, every = row_visibility(q_meta, kv_meta, mask, query_chunk_size, key_chunk_size)
    return some.any(axis=0), every.all(axis=0)


def merge(a: Partial, b: Partial) -> Partial:
    """The attention over both sets of keys. Neither exp overflows, and two empty rows make an empty row."""
    lse_BTN = jnp.logaddexp(a.lse_BTN, b.lse_BTN)
    finite_BTN = jnp.where(lse_BTN == -jnp.inf, 0.0, lse_BTN)
    out_BTNH = sum(part.out_BTNH * jnp.exp(part.lse_BTN - finite_BTN)[..., None] for part in (a, b))
    return Partial(out_BTNH, lse_BTN)


def gather_meta(meta: TokenMeta, axis: str) -> TokenMeta:
    """Inside shard_map: the places of the tokens of every device of the axis, one after the other."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis, axis=1, tiled=True), meta)


def row_delta(out_BTNH: jax.Array, d_out_BTNH: jax.Array) -> jax.Array:
    """sum_H out * d_out, [B, T, N], subtracted from each score's gradient. Ref: arXiv:2307.08691, eq. 4."""
    wide = jnp.promote_types(out_BTNH.dtype, jnp.float32)
    # A product by name: XLA for CPUs takes ten times as long over a sum of products, and others make one of it.
    return jnp.einsum("BTNH,BTNH->BTN", out_BTNH.astype(wide), d_out_BTNH.astype(wide), precision="highest")
