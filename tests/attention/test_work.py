"""What is counted is what is there: pairs against the dense mask, balance of the layouts, hops that can be left out."""

import numpy as np
import pytest

from ringbpt.attention import MaskSpec
from ringbpt.attention.core import visible
from ringbpt.attention.work import count
from ringbpt.layouts import LAYOUTS, order_of
from ringbpt.types import TokenMeta
from tests.attention.test_local import packed_meta

MASKS = [MaskSpec(), MaskSpec(causal=False), MaskSpec(window=5), MaskSpec(causal=False, window=9)]


def documents(length: int, number: int = 1) -> TokenMeta:
    """One row of documents of equal length."""
    place = np.arange(length, dtype=np.int32)[None]
    return TokenMeta(place % (length // number), 1 + place // (length // number))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_pairs_are_those_of_the_mask_and_blocks_hold_them(layout, mask):
    sp, length, chunks = 4, 96, (8, 5)  # 5 does not divide the 24 tokens of a device
    meta = packed_meta(np.random.default_rng(0), 2, length, 3, padding=7)
    work = count(meta, layout, sp, mask, *chunks)
    order = order_of(layout, meta, sp, mask.window)
    laid_out = TokenMeta(*map(order.lay_out, (meta.position_BT, meta.segment_BT)))
    seen = np.asarray(visible(laid_out, laid_out, mask)).reshape(2, sp, 24, sp, 24)
    for r in range(sp):
        for hop in range(sp):
            tile = seen[:, r, :, (r - hop) % sp]
            assert work.pairs[r, hop] == tile.sum()
            padded = np.pad(tile, ((0, 0), (0, 0), (0, 1))).reshape(2, 3, 8, 5, 5)
            held = padded.any((0, 2, 4)).sum()  # blocks with something to see: all of them are computed
            assert held <= work.blocks[r, hop] <= work.blocks_a_hop == 15
            assert work.full[r, hop] <= padded.all((0, 2, 4)).sum()


@pytest.mark.parametrize("layout", ["zigzag", "striped"])
@pytest.mark.parametrize("sp", [2, 8, 64])
def test_balanced_layouts_are_balanced(layout, sp):
    work = count(documents(sp * 256), layout, sp, MaskSpec(), 32, 32)
    assert work.balance <= 1.02 and work.hop_balance <= 1.02 and work.block_balance <= 1.02
    # Half of all pairs are invisible under a causal mask, and of the blocks nearly as many are skipped.
    assert work.pairs.sum() == sp * 256 * (sp * 256 + 1) // 2
    assert work.skipped > {"zigzag": 0.5 - 1 / (8 * sp), "striped": 0.5 - 1 / 8}[layout] - 1e-3


def test_contiguous_is_not_balanced():
    work = count(documents(8 * 64), "contiguous", 8, MaskSpec(), 32, 32)
    assert 1.85 < work.balance < 1.9  # 2 - 1/8: the last device sees everything, the first its own
    assert work.hop_balance > 1.7


@pytest.mark.parametrize(
    ("layout", "meta", "mask", "hops"),
    [
        ("contiguous", documents(512), MaskSpec(), 7),
        ("contiguous", documents(512), MaskSpec(window=1), 0),
        ("contiguous", documents(512), MaskSpec(window=2), 1),
        ("contiguous", documents(512), MaskSpec(window=65), 1),  # ceil((window - 1) / 64)
        ("contiguous", documents(512), MaskSpec(window=66), 2),
        ("contiguous", documents(512, 8), MaskSpec(), 0),
        ("contiguous", documents(512, 4), MaskSpec(), 1),
        ("zigzag", documents(512), MaskSpec(window=32), 7),  # the second half comes from the other side
        ("striped", documents(512), MaskSpec(window=4), 3),
    ],
)
def test_hops_that_are_needed(layout, meta, mask, hops):
    assert count(meta, layout, 8, mask, 16, 16).hops == hops


def test_the_table_says_what_was_counted():
    lines = str(count(documents(256), "contiguous", 4, MaskSpec(), 16, 16)).splitlines()
    assert lines[1].split() == ["0", "2,080", "6.3%", "10", "6", "1"]
    assert lines[4].split() == ["3", "14,368", "43.7%", "58", "54", "4"]
    assert lines[5] == (
        "max/mean 1.747 in pairs (1.747 hop by hop), 1.706 in blocks; 46.9% of the blocks skipped; 3 of 3 hops needed"
    )
