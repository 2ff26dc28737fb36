"""How much attention each device does, counted instead of timed: visible pairs and blocks, by device and by hop.

What a layout is worth under a mask and a packing does not need a pod to be seen: a pair of tokens is visible or not.
Everything here is numpy on the host.
"""

from dataclasses import dataclass

import jax
import numpy as np

from ringbpt.attention.core import MaskSpec, block_visibility
from ringbpt.attention.parallel.ring import needed_hops
from ringbpt.layouts import order_of
from ringbpt.types import TokenMeta


@dataclass(frozen=True)
class Work:
    """What device r meets at hop h of a ring, that is, on the keys of device (r - h) % sp. All [sp, hops], int64.

    pairs: visible pairs of a query and a key. blocks: the blocks that are computed, in some of which only a part is
    visible; full: those of them that need no mask. blocks_a_hop: how many there are, computed or skipped.
    """

    pairs: np.ndarray
    blocks: np.ndarray
    full: np.ndarray
    blocks_a_hop: int

    @property
    def balance(self) -> float:
        """The most loaded device's visible pairs over the average: what a causal mask costs a layout. 1 is best."""
        return _balance(self.pairs.sum(axis=1))

    @property
    def block_balance(self) -> float:
        """The most loaded device's computed blocks over the average."""
        return _balance(self.blocks.sum(axis=1))

    @property
    def hop_balance(self) -> float:
        """The same of visible pairs where all devices wait for each other after every hop: each hop lasts as long as
        its most loaded device needs. A ring waits at most so long; what one device has more at one hop, another at the
        next, costs nothing as long as keys that have arrived wait to be used.
        """
        return float(self.pairs.max(axis=0).sum() / self.pairs.sum() * len(self.pairs)) if self.pairs.any() else 1.0

    @property
    def skipped(self) -> float:
        """The share of all blocks that nobody computes."""
        return 1 - float(self.blocks.sum()) / (self.blocks.size * self.blocks_a_hop)

    @property
    def hops(self) -> int:
        """Hops after which no device meets anything visible any more: transfers of K and V that are needed."""
        return int(np.flatnonzero(self.pairs.any(axis=0)).max(initial=0))

    def __str__(self) -> str:
        """A table: a line for each device, and what it comes to."""
        lines = [
            f"{'device':>6} {'visible pairs':>15} {'share':>7} {'blocks':>9} {'no mask':>9} {'hops with work':>15}"
        ]
        total = max(self.pairs.sum(), 1)
        for r, (pairs, blocks, full) in enumerate(zip(self.pairs, self.blocks, self.full, strict=True)):
            lines.append(
                f"{r:>6} {pairs.sum():>15,} {pairs.sum() / total:>7.1%} {blocks.sum():>9,} {full.sum():>9,} "
                f"{np.count_nonzero(pairs):>15}"
            )
        lines.append(
            f"max/mean {self.balance:.3f} in pairs ({self.hop_balance:.3f} hop by hop), {self.block_balance:.3f} in "
            f"blocks; {self.skipped:.1%} of the blocks skipped; {self.hops} of {self.pairs.shape[1] - 1} hops needed"
        )
        return "\n".join(lines)


def _balance(loads: np.ndarray) -> float:
    return float(loads.max() / loads.mean()) if loads.any() else 1.0


def count(
    meta: TokenMeta,
    layout: str,
    sp: int,
    mask: MaskSpec = MaskSpec(),
    query_chunk_size: int = 1024,
    key_chunk_size: int = 1024,
) -> Work:
    """The work of attention over the host batch `meta` (in text order) dealt out to sp devices.

    Raises ValueError where the layout cannot deal out the length (see layouts.permutation).
    """
    meta = jax.tree.map(np.asarray, meta)
    order, tokens = order_of(layout, meta, sp, mask.window), meta.position_BT.shape[1] // sp
    numbered = order.meta(meta)
    devices = [
        jax.tree.map(lambda x, r=r: order.lay_out(x, slice(r * tokens, (r + 1) * tokens)).astype(np.int64), numbered)
        for r in range(sp)
    ]
    size_T, size_S = min(query_chunk_size, tokens), min(key_chunk_size, tokens)
    pairs, blocks, full = np.zeros((3, sp, sp), np.int64)
    for hop in range(sp):
        for r, q in enumerate(devices):
            kv = devices[(r - hop) % sp]
            pairs[r, hop] = visible_pairs(q, kv, mask)
            some, every = block_visibility(_padded(q, size_T), _padded(kv, size_S), mask, size_T, size_S)
            blocks[r, hop], full[r, hop] = some.sum(), every.sum()
    return Work(pairs, blocks, full, -(-tokens // size_T) * -(-tokens // size_S))


def loads(meta: TokenMeta, layout: str, sp: int, window: int | None = None) -> tuple[np.ndarray, int]:
    """(visible pairs of the queries of each device in each row, int64 [B, sp]; hops that a causal ring needs).

    Of a host batch's places in text order; in no time, for what a query sees follows from its position alone.
    """
    meta = jax.tree.map(np.asarray, meta)
    order = order_of(layout, meta, sp, window)
    laid_out = jax.tree.map(order.lay_out, order.meta(meta))
    position_BT = laid_out.position_BT.astype(np.int64)
    seen_BT = np.where(
        laid_out.segment_BT > 0, position_BT + 1 if window is None else np.minimum(position_BT + 1, window), 0
    )
    hops = int(needed_hops(laid_out, MaskSpec(window=window), sp)) if sp > 1 else 0
    return seen_BT.reshape(len(seen_BT), sp, -1).sum(axis=2), hops


# What different documents are part of stands this far apart on one line: further than any window reaches.
_FAR = 2**34


def visible_pairs(q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec) -> int:
    """Pairs of a query and a key that see each other, without making the mask: n log n in the number of tokens.

    n: where documents share their beginning, a query counts once for each of the shared parts that it goes on from.
    """
    total = 0
    for row in range(len(q_meta.position_BT)):
        q, k = _on_one_line(*(jax.tree.map(lambda x, row=row: np.asarray(x)[row], meta) for meta in (q_meta, kv_meta)))
        reach = _FAR // 4 if mask.window is None else mask.window - 1
        ahead = 0 if mask.causal else reach
        total += int((np.searchsorted(k, q + ahead, "right") - np.searchsorted(k, q - reach, "left")).sum())
    return total


def _on_one_line(q_meta: TokenMeta, kv_meta: TokenMeta) -> tuple[np.ndarray, np.ndarray]:
    """Places of queries and, sorted, of keys of a row on a line, on which near each other means of one document.

    Keys of the same documents, segment..last, lie side by side by position, others far away; a query stands once
    beside each lot of keys that its document has.
    """
    real = kv_meta.segment_BT != 0
    segment = kv_meta.segment_BT[real].astype(np.int64)
    last = segment if kv_meta.last_BT is None else kv_meta.last_BT[real].astype(np.int64)
    lots, lot = np.unique(segment << 32 | last, return_inverse=True)
    k = np.sort(kv_meta.position_BT[real] + lot * _FAR)
    order = np.argsort(q_meta.segment_BT, kind="stable")
    q_segment = q_meta.segment_BT[order]
    start = np.searchsorted(q_segment, lots >> 32, "left")
    count = np.searchsorted(q_segment, lots & 0xFFFFFFFF, "right") - start
    skipped = np.repeat(start - (np.cumsum(count) - count), count)
    q_position = q_meta.position_BT[order][np.arange(len(skipped)) + skipped]
    return q_position + np.repeat(np.arange(len(lots)), count) * _FAR, k


def _padded(meta: TokenMeta, size: int) -> TokenMeta:
    rest = -meta.position_BT.shape[1] % size
    return jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, rest))), meta)
