"""What layouts and packings are worth on documents of uneven length: work, blocks, hops and rows of a step, counted,
and ring attention on CPU devices, timed.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ringbpt.attention.api import AttentionSpec, make_attention
from ringbpt.attention.core import MaskSpec, block_visibility
from ringbpt.attention.local.blockwise import make_blockwise
from ringbpt.attention.work import count, loads
from ringbpt.balanced import Documents, deal
from ringbpt.bench.attention import program
from ringbpt.bench.kernels import ring_rank
from ringbpt.config import PythonDatasetConfig
from ringbpt.data.packing import PACKINGS, Corpus, first_fit
from ringbpt.data.reading.sources import PythonSource
from ringbpt.layouts import order_of
from ringbpt.mesh import make_mesh
from ringbpt.types import TokenMeta

BYTES_A_TOKEN = 3  # of code, by usual tokenizers


def _code(rng: np.random.Generator, count: int, most: int) -> np.ndarray:
    """The files of Python's standard library, again and again."""
    source = PythonSource(PythonDatasetConfig(split="all"))
    sizes = np.array([len(source[i]["text"]) for i in range(len(source))])
    return np.resize(rng.permutation(sizes), count) // BYTES_A_TOKEN


def _one_long(rng: np.random.Generator, count: int, most: int) -> np.ndarray:
    """Rows of one document of five eighths of them, and 1,024-token ones."""
    row = [most * 5 // 8, *[1024] * (most * 3 // 8 // 1024)]
    return np.concatenate([rng.permutation(row) for _ in range(max(1, -(-count // len(row))))])


# name -> (numbers, how many documents, the longest there may be) -> their lengths
DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "log-normal": lambda rng, count, most: np.exp(rng.normal(np.log(2000), 1.2, count)),
    "one long, many short": _one_long,
    "code files": _code,
    "chats": lambda rng, count, most: np.minimum(np.exp(rng.normal(np.log(600), 0.8, count)), 4096),
    "uniform": lambda rng, count, most: rng.integers(64, 8192, count),
}


def lengths_of(name: str, tokens: int, most: int, seed: int) -> np.ndarray:
    """int64 lengths of documents, 2 to `most` tokens long, of `tokens` tokens or a few more."""
    rng, found, total = np.random.default_rng(seed), list[np.ndarray](), 0
    while total < tokens:
        found.append(np.clip(DISTRIBUTIONS[name](rng, 4096, most), 2, most).astype(np.int64))
        total += int(found[-1].sum())
    whole = np.concatenate(found)
    return whole[: np.searchsorted(np.cumsum(whole), tokens) + 1]


def rows_of(name: str, length: int, count: int, seed: int) -> list[np.ndarray]:
    """The documents' lengths in each of `count` rows, filled as first_fit does."""
    lengths = lengths_of(name, (count + 2) * length, length, seed)
    row, _ = first_fit(lengths, length)
    return [lengths[row == number] for number in range(count)]


def meta_of(lengths: np.ndarray, length: int) -> TokenMeta:
    """One row of these documents, then padding."""
    ends = np.cumsum([0, *lengths])
    segment_T, position_T = np.zeros((2, length), np.int32)
    segment_T[: ends[-1]] = np.repeat(np.arange(1, 1 + len(lengths)), lengths)
    position_T[: ends[-1]] = np.arange(ends[-1]) - np.repeat(ends[:-1], lengths)
    return TokenMeta(position_T[None], segment_T[None])


def laid_out(meta: TokenMeta, layout: str, sp: int) -> TokenMeta:
    """A row's places as the devices hold them, one device after the other."""
    order = order_of(layout, meta, sp)
    numbered = order.meta(meta)
    return TokenMeta(order.lay_out(numbered.position_BT), order.lay_out(numbered.segment_BT))


def unevenness(meta: TokenMeta, layout: str, sp: int) -> float:
    """The most loaded device's visible pairs over the average."""
    pairs = loads(meta, layout, sp)[0]
    return float(pairs.max() / pairs.mean())


def blocks_and_hops(meta: TokenMeta, layout: str, sp: int, block: int) -> tuple[int, int]:
    """(blocks that all devices compute, hops after which none has anything left to compute)."""
    there = laid_out(meta, layout, sp)
    some, _ = block_visibility(there, there, MaskSpec(), block, block)
    a_device = len(some) // sp
    met = some.reshape(sp, a_device, sp, a_device).any(axis=(1, 3))
    return int(some.sum()), int((met * ((np.arange(sp)[:, None] - np.arange(sp)) % sp)).max())


def planning_ms(name: str, length: int, sp: int, steps: int = 5, documents: int = 1024) -> list[float]:
    """Milliseconds of a core that `balanced` takes to plan each of some steps: rows of other documents each time, as
    many as hold so many documents; those that the last row has too many are taken off in proportion.
    """
    found = list[float]()
    a_row = np.mean([len(own) for own in rows_of(name, length, 8, 0)])
    for seed in range(steps):
        rows = rows_of(name, length, 2 + int(1.2 * documents / a_row), seed)
        ends = np.cumsum([len(own) for own in rows])
        count = 1 + int(np.searchsorted(ends, documents))
        metas = [meta_of(own, length) for own in rows[:count]]
        position_BT, segment_BT = (
            np.concatenate(x) for x in zip(*((m.position_BT, m.segment_BT) for m in metas), strict=True)
        )
        begin = time.process_time()
        deal(Documents.of(position_BT, segment_BT, segment_BT, None), sp)
        found.append((time.process_time() - begin) * 1e3 * documents / ends[count - 1])
    return found


def layouts_table(sp: int, tokens: int, rows: int, block: int, seed: int = 0) -> list[str]:
    """Lines of a table: each distribution over sp devices of so many tokens, by layout, over some rows; last, how many
    milliseconds of a core it takes to plan `balanced` for a step of 1,024 documents, in the median and at most.
    """
    layouts = ("contiguous", "zigzag", "balanced")
    lines = []
    for name in DISTRIBUTIONS:
        found, taken = {layout: np.zeros((rows, 3)) for layout in layouts}, planning_ms(name, sp * tokens, sp)
        for number, lengths in enumerate(rows_of(name, sp * tokens, rows, seed)):
            meta = meta_of(lengths, sp * tokens)
            for layout in layouts:
                found[layout][number] = unevenness(meta, layout, sp), *blocks_and_hops(meta, layout, sp, block)
        own = found["balanced"]
        columns = [
            f"{name}, sp={sp}",
            *(f"{found[layout][:, 0].mean():.2f}" for layout in layouts[:2]),
            f"{own[:, 0].mean():.3f}, at most {own[:, 0].max():.3f}",
            f"{own[:, 1].sum() / found['zigzag'][:, 1].sum():.3f}",
            " / ".join(f"{found[layout][:, 2].mean():.1f}" for layout in layouts),
            f"{np.median(taken):.0f}, at most {max(taken):.0f}",
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return lines


def packings_table(length: int, steps: int, batch_size: int, seed: int = 0) -> list[str]:
    """Lines of a table: each distribution in rows of `length`, `batch_size` a step, by packing, over one epoch."""
    lines = []
    for name in DISTRIBUTIONS:
        lengths = lengths_of(name, steps * batch_size * length, length, seed)
        ends = np.cumsum(lengths)
        uneven, rows = [], []
        for packing in ("first_fit", "best_fit", "balanced"):
            plan = PACKINGS[packing](Corpus(ends - lengths, ends, length, seed, batch_size=batch_size))
            positions = dict.fromkeys(("token", "mask"), np.empty(ends[-1], np.int8))  # nothing is read of them
            whole = (plan.row(0, row, positions) for row in range(plan.rows // batch_size * batch_size))
            works = [np.sum(row["position"], dtype=np.int64) + np.count_nonzero(row["segment"]) for row in whole]
            works = np.reshape(works, (-1, batch_size))
            uneven.append((works.max(axis=1) / works.mean(axis=1)).mean())
            rows.append(plan.rows)
        shown = " | ".join(f"{value:.3f}" for value in uneven)
        lines.append(f"| {name} | {shown} | {rows[2]:,} rows, best_fit {rows[1]:,} |")
    return lines


def _medians(calls: dict[Any, Callable[[], Any]], repeats: int, clock: Callable[[], float]) -> dict[Any, float]:
    """Seconds of each by this clock, the calls taking turns."""
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            begin = clock()
            jax.block_until_ready(call())
            if turn:  # the first one warms up
                seconds[name].append(clock() - begin)
    return {name: statistics.median(runs) for name, runs in seconds.items()}


def timed_table(repeats: int, devices: tuple[int, ...] = (2, 8), unit: int = 128) -> Iterator[str]:
    """Lines of a table: ring attention forward and backward in `balanced` over the same in zigzag, on CPU devices.

    One document of 40 units and 24 of one in a row, units of 128 tokens, as many in a block; float32, 4 heads of 64.
    Seconds of all devices at once, and seconds of a core that the busiest rank computes, each rank alone and without
    transfers: medians of some runs by turns. Computed blocks: of all devices, of the busiest, and of the busiest at
    each hop, for which devices wait that go hand in hand.
    """
    lengths = np.array([unit] * 12 + [40 * unit] + [unit] * 12)
    meta, layouts = meta_of(lengths, 64 * unit), ("zigzag", "balanced")
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 64 * unit, 4, 64)).astype(np.float32)
    local, spec = make_blockwise(unit, unit), AttentionSpec("ring", "blockwise", MaskSpec(), unit, unit)
    for sp in devices:
        mesh = make_mesh((1, 1, 1, sp), devices=jax.devices()[:sp])
        whole, ranks, counted = dict[str, Callable](), dict[tuple[str, int], Callable](), []
        rank = jax.jit(ring_rank(local, MaskSpec(), sp, backward=True))
        for layout in layouts:
            there = laid_out(meta, layout, sp)
            given = jax.device_put((q, k, v, there), NamedSharding(mesh, PartitionSpec(None, "sp")))
            step = jax.jit(program(make_attention(mesh, spec), "forward+backward"))
            whole[layout] = partial(step, *given)
            ranks |= {(layout, r): partial(rank, q, k, v, q, there, r) for r in range(sp)}
            blocks = count(meta, layout, sp, MaskSpec(), unit, unit).blocks
            counted.append((blocks.sum(), blocks.sum(axis=1).max(), blocks.max(axis=0).sum()))
        zigzag, balanced = _medians(whole, repeats, time.perf_counter).values()
        alone = _medians(ranks, repeats, time.process_time)
        busiest = [max(alone[layout, r] for r in range(sp)) for layout in layouts]
        columns = [
            f"{zigzag:.2f} / {balanced:.2f} s, {balanced / zigzag:.2f}",
            f"{busiest[0]:.3f} / {busiest[1]:.3f} s, {busiest[1] / busiest[0]:.2f}",
            *(f"{theirs:,} / {ours:,}, {ours / theirs:.2f}" for theirs, ours in zip(*counted, strict=True)),
        ]
        yield f"| {sp} | {' | '.join(columns)} |"
