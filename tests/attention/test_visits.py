"""The lists of blocks to visit against a plain loop over blocks."""

import numpy as np
import pytest

from ringbpt.attention.core import MaskSpec, row_visibility, visible
from ringbpt.attention.local.visits import FIRST, FLAG_BITS, LAST, MASKED, VISIBLE, block_lists, visits
from ringbpt.types import TokenMeta
from tests.attention.suite import packed_meta


def listed(some, every) -> list[tuple[int, int, int, int]]:
    """(row of the batch, row of blocks, block, flags) in order."""
    found = visits(some, every)
    rows = some.shape[1]
    steps = zip(np.asarray(found.row), np.asarray(found.step), strict=True)
    return [(r // rows, r % rows, s >> FLAG_BITS, s & (2**FLAG_BITS - 1)) for r, s in list(steps)[: int(found.count)]]


@pytest.mark.parametrize("walks", ["queries", "keys"])
def test_every_visit_once_in_order_and_every_row_at_least_once(walks):
    rng = np.random.default_rng(0)
    some = rng.random((2, 5, 7)) < 0.3
    some[1, 2] = False  # a row of blocks that sees nothing
    some[0, :, 3] = False
    every = some & (rng.random(some.shape) < 0.5)
    if walks == "keys":
        some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
    want = []
    for b, i in np.ndindex(some.shape[:2]):
        columns = np.flatnonzero(some[b, i])
        for j in columns:
            flags = VISIBLE | (0 if every[b, i, j] else MASKED)
            want.append((b, i, j, flags | FIRST * (j == columns[0]) | LAST * (j == columns[-1])))
        if not len(columns):
            want.append((b, i, 0, FIRST | LAST | MASKED))
    assert listed(some, every) == want


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("full_first", [False, True])
def test_each_row_lists_its_blocks_of_one_kind_and_then_the_other(by_key, full_first):
    rng = np.random.default_rng(0)
    some = rng.random((2, 5, 7)) < 0.5
    every = some & (rng.random(some.shape) < 0.5)
    found = block_lists(some, every, by_key=by_key, full_first=full_first)
    if by_key:
        some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
    for row in np.ndindex(some.shape[:2]):
        masked, full = np.flatnonzero(some[row] & ~every[row]), np.flatnonzero(every[row])
        want = np.concatenate([full, masked] if full_first else [masked, full])
        first, total = np.asarray(found.counts)[row]
        assert (first, total) == (len(full) if full_first else len(masked), len(want))
        assert np.asarray(found.blocks)[row][:total].tolist() == want.tolist()


@pytest.mark.parametrize("mask", [MaskSpec(), MaskSpec(causal=False), MaskSpec(window=20), MaskSpec(False, 9)], ids=str)
def test_what_is_skipped_is_invisible_and_what_is_unmasked_is_visible(mask):
    rng = np.random.default_rng(1)
    whole = packed_meta(rng, 3, 96, 4, padding=10)
    order = rng.permutation(96)
    for meta in (whole, TokenMeta(whole.position_BT[:, order], whole.segment_BT[:, order])):
        pairs = np.asarray(visible(meta, meta, mask)).reshape(3, 12, 8, 6, 16)
        some, every = (np.asarray(x) for x in row_visibility(meta, meta, mask, 8, 16))
        assert not (pairs.any(axis=(2, 4)) & ~some).any()
        assert not (every & ~pairs.all(axis=(2, 4))).any()
