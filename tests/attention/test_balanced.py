"""The layout `balanced`: equal work on every device, whatever the documents, and nothing is another but the order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringbpt.attention import MaskSpec
from ringbpt.attention.core import visible
from ringbpt.attention.work import count
from ringbpt.balanced import Documents
from ringbpt.bench.balance import DISTRIBUTIONS, blocks_and_hops, meta_of, planning_ms, rows_of, unevenness
from ringbpt.layouts import by_length, order_of, permutation
from ringbpt.neighbours import balanced_order
from ringbpt.types import TokenMeta


def trees_of(rng: np.random.Generator, length: int) -> TokenMeta:
    """One row of prompts with some answers each, which share all of the prompt."""
    meta, at, number = meta_of([], length), 0, 1
    last_BT = np.zeros_like(meta.segment_BT)
    while at < length:
        prompt, answers = int(rng.integers(1, 12)), rng.integers(1, 20, rng.integers(1, 4)).tolist()
        if at + prompt + sum(answers) > length:
            break
        own = slice(at, at + prompt)
        meta.position_BT[0, own], meta.segment_BT[0, own] = np.arange(prompt), number
        last_BT[0, own] = number + len(answers) - 1
        at += prompt
        for answer in answers:
            own = slice(at, at + answer)
            meta.position_BT[0, own], meta.segment_BT[0, own] = np.arange(prompt, prompt + answer), number
            last_BT[0, own] = number
            at, number = at + answer, number + 1
    return TokenMeta(meta.position_BT, meta.segment_BT, last_BT)


def assert_is_the_same(meta: TokenMeta, sp: int, window: int | None) -> np.ndarray:
    """A row dealt out has each token once, and sees what it saw; returns each device's visible pairs."""
    order = order_of("balanced", meta, sp, window)
    length, mask = meta.position_BT.shape[1], MaskSpec(window=window)
    places = order.lay_out(np.arange(length)[None])[0]
    assert sorted(places.tolist()) == list(range(length))
    np.testing.assert_array_equal(order.in_text_order(places[None])[0], np.arange(length))
    numbered = order.meta(meta)
    laid_out = TokenMeta(*(x if x is None else order.lay_out(x) for x in (
        numbered.position_BT, numbered.segment_BT, numbered.last_BT
    )))  # fmt: skip
    seen = np.asarray(visible(meta, meta, mask))[0]
    np.testing.assert_array_equal(np.asarray(visible(laid_out, laid_out, mask))[0], seen[places][:, places])
    np.testing.assert_array_equal(meta.segment_BT == 0, numbered.segment_BT == 0)
    assert numbered.segment_BT.max(initial=0) == len(np.unique(meta.segment_BT[meta.segment_BT > 0]))
    return seen.sum(axis=1)[places].reshape(sp, -1).sum(axis=1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 90), max_size=25), st.sampled_from([2, 4, 8]), st.sampled_from([None, 1, 7]))
def test_the_order_alone_is_another(lengths, sp, window):
    ends = np.cumsum([0, *lengths])
    assert_is_the_same(meta_of(lengths[: int((ends <= 192).sum()) - 1], 192), sp, window)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("seed", range(4))
def test_answers_with_their_prompt(seed, window):
    rng = np.random.default_rng(seed)
    meta = trees_of(rng, 512)
    loads = assert_is_the_same(meta, 4, window)
    assert loads.max() / loads.mean() <= 1.05
    # What is planned with is what there is.
    documents = Documents.of(meta.position_BT, meta.segment_BT, meta.last_BT, window)
    assert documents.before(np.array([512]))[0] == loads.sum() == documents.works.sum()


def test_one_document_is_zigzag_and_equal_ones_stay_where_they_are():
    one, equal = meta_of([512], 512), meta_of([32] * 16, 512)
    np.testing.assert_array_equal(order_of("balanced", one, 8).order[0], permutation("zigzag", 512, 8))
    np.testing.assert_array_equal(order_of("balanced", equal, 8).order[0], np.arange(512))
    np.testing.assert_array_equal(permutation("balanced", 512, 8), permutation("zigzag", 512, 8))
    assert by_length("balanced") == "zigzag" and by_length("striped") == "striped"
    # A window that reaches not far: nothing is gained by tearing the text apart.
    np.testing.assert_array_equal(order_of("balanced", one, 8, 8).order[0], np.arange(512))


def test_documents_that_stand_in_no_order_are_left_to_zigzag():
    meta = meta_of([100, 28, 100, 28], 256)
    meta.segment_BT[0] = 1 + (meta.segment_BT[0] == 2)  # documents 1, 2, 1, 1
    order = order_of("balanced", meta, 4)
    assert order.number.tolist() == [[0, 1, 2]]
    assert order.order[0].tolist() in (list(range(256)), permutation("zigzag", 256, 4).tolist())


def test_one_long_document_and_many_short():
    """The row that gave 2.52: 40 Ki and 24 of 1 Ki, over 8."""
    meta = meta_of([1024] * 12 + [40960] + [1024] * 12, 65536)
    before, after = (count(meta, layout, 8) for layout in ("contiguous", "balanced"))
    assert before.balance > 2.3 and count(meta, "zigzag", 8).balance > 1.5
    assert after.balance <= 1.05 and after.block_balance <= 1.05 and after.hop_balance <= 1.15
    assert after.blocks.sum() == before.blocks.sum() and after.pairs.sum() == before.pairs.sum()


# Tokens of a device, as a kernel for v5p has blocks of 1,024.
@pytest.mark.parametrize("sp", [8, 16, 64])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_five_distributions(name, sp):
    rows = rows_of(name, sp * 8192, 4 if sp < 64 else 2, seed=3)
    blocks, hops = dict.fromkeys(("contiguous", "zigzag", "balanced"), 0), dict[str, int]()
    for lengths in rows:
        meta = meta_of(lengths, sp * 8192)
        assert unevenness(meta, "balanced", sp) <= 1.05
        for layout in blocks:
            found, hops[layout] = blocks_and_hops(meta, layout, sp, 512)
            blocks[layout] += found
        # Short: nobody's work is more than a quarter of a device's.
        if 4 * sp * max(lengths) ** 2 <= np.square(lengths).sum():
            assert hops["balanced"] <= hops["contiguous"]
    assert blocks["balanced"] <= 1.02 * blocks["zigzag"]


def test_short_documents_need_no_more_hops():
    rng, found = np.random.default_rng(0), []
    for _ in range(6):
        lengths = rng.integers(64, 1500, 200)
        meta = meta_of(lengths[np.cumsum(lengths) <= 65536], 65536)
        layouts = ("contiguous", "balanced")
        contiguous, balanced = (blocks_and_hops(meta, layout, 8, 1024)[1] for layout in layouts)
        found.append(unevenness(meta, "contiguous", 8) > 1.05)
        assert balanced <= contiguous <= 1 and unevenness(meta, "balanced", 8) <= 1.05
    assert any(found)  # and there was something to balance


@pytest.mark.parametrize("sp", [8, 16, 64])
def test_chats_are_balanced_and_need_one_hop(sp):
    """The longest sees up to 1.6 times what a device has to do: it is cut between two neighbours, and no other hop."""
    blocks = dict.fromkeys(("balanced", "zigzag"), 0)
    for lengths in rows_of("chats", sp * 8192, 4 if sp < 64 else 2, seed=0):
        meta, hops = meta_of(lengths, sp * 8192), list[int]()
        for layout in blocks:
            found, far = blocks_and_hops(meta, layout, sp, 1024)
            blocks[layout] += found
            hops.append(far)
        assert unevenness(meta, "contiguous", sp) > 1.4 and unevenness(meta, "balanced", sp) <= 1.05
        assert hops == [1, sp - 1]
    assert blocks["balanced"] <= 1.02 * blocks["zigzag"]


@pytest.mark.parametrize("filled", [0.3, 0.6, 0.97])
def test_a_row_that_is_not_full_is_balanced_as_well(filled):
    """Padding is shared out too, and in nobody's way."""
    lengths = np.minimum(np.random.default_rng(1).integers(8, 700, 600), 600)
    lengths = lengths[np.cumsum(lengths) <= filled * 65536]
    meta = meta_of(lengths, 65536)
    assert_is_the_same(meta_of(lengths // 32 + 1, 4096), 8, None)  # a quadratic check: of shorter ones
    assert blocks_and_hops(meta, "balanced", 8, 1024)[1] == 1 and unevenness(meta, "balanced", 8) <= 1.05


def test_what_no_order_balances_is_known_at_once():
    """Documents that are more than two devices' work, alone or with the shortest ones that fill these up; few ones."""
    heads = lambda documents, counts: counts * (counts + 1) // 2
    for sizes, found in (
        ([1500] + [500] * 20 + [100] * 48, True),
        ([1900] + [300] * 46, False),  # two devices have 2.1 million pairs: it takes 1.8, and 0.9 fill them up
        ([4000] + [300] * 39, False),
        ([2048] * 7, False),
        ([5000] + [100] * 96, False),  # more than a device has room for
    ):
        own = np.array(sizes)
        order = balanced_order(own, heads(0, own), heads, 4096, 4, 1.05)
        assert (order is not None) == found, sizes
        assert order is None or sorted(order.tolist()) == list(range(len(own)))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(1, 90), max_size=25), min_size=2, max_size=4), st.sampled_from([None, 7]))
def test_rows_are_planned_together_as_each_alone(rows, window):
    fitting = [own[: int((np.cumsum(own) <= 192).sum())] for own in rows]
    metas = [meta_of(np.array(own, np.int64), 192) for own in fitting] + [trees_of(np.random.default_rng(0), 192)]
    lasts = [m.segment_BT if m.last_BT is None else m.last_BT for m in metas]
    position_BT, segment_BT = (
        np.concatenate([getattr(m, name) for m in metas]) for name in ("position_BT", "segment_BT")
    )
    together = order_of("balanced", TokenMeta(position_BT, segment_BT, np.concatenate(lasts)), 4, window)
    for row, meta in enumerate(metas):
        alone = order_of("balanced", meta, 4, window)
        np.testing.assert_array_equal(together.order[row], alone.order[0])
        np.testing.assert_array_equal(together.number[row][: alone.number.shape[1]], alone.number[0])


@pytest.mark.parametrize("sp", [8, 16, 64])
def test_a_step_is_planned_in_no_time(sp):
    """1,024 documents of the lengths that take the longest, in 20 ms of a core of one's own; here others use it too."""
    assert min(planning_ms("uniform", sp * 8192, sp, steps=3)) <= 30
