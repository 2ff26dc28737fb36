"""Packing: every token is in one place or counted as dropped, and predicts what follows it in the text."""

import time
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringbpt.data.documents import Row
from ringbpt.data.packing import (
    OPEN_ROWS,
    PACKINGS,
    Corpus,
    WholeDocuments,
    apart,
    best_fit,
    even_fit,
    first_fit,
    interleave,
    mix,
    shuffled,
    steps_of_like,
)

documents = st.lists(st.integers(0, 40), min_size=1, max_size=30)
lengths_of_rows = st.integers(1, 24)


def offsets_of(lengths) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def data(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token i is 1000 + i, so a token says where it came from; every third takes no loss."""
    places = np.arange(offsets[-1])
    return (1000 + places).astype(np.int32), (places % 3 != 0).astype(np.uint8)


def values(tokens: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    return {"token": tokens, "mask": mask}


def rows(plan, offsets: np.ndarray, epoch: int = 0) -> list[Row]:
    return [plan.row(epoch, row, values(*data(offsets))) for row in range(plan.rows)]


def plan_of(lengths, seq_length: int, packing: str, seed: int = 0, shuffle: bool = False):
    offsets = offsets_of(lengths)
    return PACKINGS[packing](Corpus(offsets[:-1], offsets[1:], seq_length, seed if shuffle else None)), offsets


def assert_shapes(row: Row, seq_length: int) -> None:
    assert all(array.shape == (seq_length,) for array in row.values())
    assert [array.dtype.name for array in row.values()] == ["int32", "int32", "float32", "int32", "int32"]


def test_concat_by_hand():
    plan, offsets = plan_of([3, 4, 3], 4, "concat")
    tokens, mask = np.arange(10, 20, dtype=np.int32), np.array([0, 1, 1, 0, 1, 1, 1, 0, 1, 1], np.uint8)
    assert (offsets.tolist(), plan.rows, plan.dropped) == ([0, 3, 7, 10], 2, {"end of the stream": 2})
    second = plan.row(0, 1, values(tokens, mask))
    assert second["token"].tolist() == [14, 15, 16, 17]
    assert second["target"].tolist() == [15, 16, 17, 18]
    assert second["weight"].tolist() == [1, 1, 0, 1]
    assert second["position"].tolist() == [0, 1, 2, 3]
    assert second["segment"].tolist() == [1, 1, 1, 1]


def test_first_fit_by_hand():
    plan, _ = plan_of([3, 4, 2, 6, 1], 5, "first_fit")
    tokens, mask = np.arange(10, 26, dtype=np.int32), np.ones(16, np.uint8)
    mask[1] = 0
    first, second, third = (plan.row(0, row, values(tokens, mask)) for row in range(plan.rows))
    assert first["token"].tolist() == [10, 11, 12, 17, 18]  # documents 0 and 2
    assert first["target"].tolist() == [11, 12, 0, 18, 0]
    assert first["weight"].tolist() == [0, 1, 0, 1, 0]  # place 0 predicts token 1, which takes no loss
    assert first["position"].tolist() == [0, 1, 2, 0, 1]
    assert first["segment"].tolist() == [1, 1, 1, 2, 2]
    assert second["token"].tolist() == [13, 14, 15, 16, 0] and second["segment"].tolist() == [1, 1, 1, 1, 0]
    assert second["weight"].tolist() == [1, 1, 1, 0, 0] and second["position"].tolist() == [0, 1, 2, 3, 0]
    assert third["token"].tolist() == [19, 20, 21, 22, 23]  # document 3, whose last token is the last target
    assert third["target"].tolist() == [20, 21, 22, 23, 24] and third["weight"].tolist() == [1] * 5
    assert plan.dropped == {"documents of one token": 1, "last tokens of split documents": 1}
    assert plan.tokens_in(0, 3) == 14


@settings(max_examples=150, deadline=None)
@given(documents, lengths_of_rows, st.booleans(), st.integers(0, 3))
def test_concat_is_the_stream(lengths, seq_length, shuffle, epoch):
    plan, offsets = plan_of(lengths, seq_length, "concat", seed=5, shuffle=shuffle)
    every = rows(plan, offsets, epoch)
    assert plan.tokens_in(epoch, plan.rows) + sum(plan.dropped.values()) == sum(lengths)
    if not every:
        return
    order = shuffled(len(lengths), 5, epoch) if shuffle else range(len(lengths))
    stream = np.concatenate([1000 + np.arange(offsets[index], offsets[index + 1]) for index in order])
    count = plan.rows * seq_length
    np.testing.assert_array_equal(np.concatenate([row["token"] for row in every]), stream[:count])
    np.testing.assert_array_equal(np.concatenate([row["target"] for row in every]), stream[1 : count + 1])
    for row in every:
        assert_shapes(row, seq_length)
        np.testing.assert_array_equal(row["weight"], (row["target"] - 1000) % 3 != 0)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["first_fit", "best_fit", "balanced"]), documents, lengths_of_rows, st.booleans(), st.integers(0, 3)
)
def test_whole_documents_predict_each_next_token_once(packing, lengths, seq_length, shuffle, epoch):
    plan, offsets = plan_of(lengths, seq_length, packing, seed=5, shuffle=shuffle)
    tokens, mask = data(offsets)
    seen, predicted = [], []
    for number in range(plan.rows):
        row = plan.row(epoch, number, values(tokens, np.ones_like(mask)))
        assert_shapes(row, seq_length)
        real = row["segment"] > 0
        assert not row["token"][~real].any() and not row["weight"][~real].any() and not row["position"][~real].any()
        starts = np.flatnonzero(real & (row["position"] == 0))
        assert row["segment"][starts].tolist() == list(range(1, len(starts) + 1))
        for segment in range(1, len(starts) + 1):
            piece = row["segment"] == segment
            np.testing.assert_array_equal(row["position"][piece], np.arange(piece.sum()))
            np.testing.assert_array_equal(np.diff(row["token"][piece]), 1)  # consecutive: one document
        seen += row["token"][real].tolist()
        predicted += [(int(a), int(b)) for a, b, w in zip(row["token"], row["target"], row["weight"], strict=True) if w]
        masked = plan.row(epoch, number, values(tokens, mask))
        np.testing.assert_array_equal(masked["weight"], row["weight"] * ((row["target"] - 1000) % 3 != 0))
    pairs = [(1000 + i, 1001 + i) for a, b in pairwise(offsets) for i in range(a, b - 1)]
    assert sorted(predicted) == pairs
    assert len(set(seen)) == len(seen) == plan.tokens_in(epoch, plan.rows)
    assert len(seen) + sum(plan.dropped.values()) == sum(lengths)


@pytest.mark.parametrize("packing", ["first_fit", "best_fit", "balanced"])
def test_whole_documents_stay_whole(packing):
    plan, offsets = plan_of([5, 9, 16, 7, 3, 2, 16], 16, packing, seed=1, shuffle=True)
    pieces = [
        row["token"][row["segment"] == s].tolist()
        for row in rows(plan, offsets)
        for s in range(1, row["segment"].max() + 1)
    ]
    whole = [list(range(1000 + a, 1000 + b)) for a, b in pairwise(offsets)]
    assert sorted(pieces) == whole


@pytest.mark.parametrize("packing", ["concat", "first_fit", "best_fit", "balanced"])
def test_seed_and_epoch_choose_the_order(packing):
    lengths = np.random.default_rng(0).integers(1, 30, 60)

    def digest(seed: int, epoch: int, shuffle: bool = True) -> bytes:
        plan, offsets = plan_of(lengths, 16, packing, seed, shuffle)
        return b"".join(array.tobytes() for row in rows(plan, offsets, epoch) for array in row.values())

    assert digest(1, 2) == digest(1, 2)
    assert len({digest(1, 0), digest(1, 1), digest(1, 2), digest(2, 0), digest(-1, 0)}) == 5
    assert digest(1, 0, shuffle=False) == digest(2, 7, shuffle=False)
    plan, offsets = plan_of(lengths, 16, packing, 1, True)
    backwards = [plan.row(2, row, values(*data(offsets))) for row in reversed(range(plan.rows))][::-1]
    assert b"".join(array.tobytes() for row in backwards for array in row.values()) == digest(1, 2)


def test_the_order_of_a_seed_never_changes():
    """Recorded on numpy 2.4: another release must not change what a resumed run reads."""
    assert shuffled(8, 42, 0).tolist() == [0, 1, 4, 2, 6, 5, 7, 3]
    assert sorted(shuffled(1000, 3)) == list(range(1000))


def test_first_fit_takes_the_first_open_row_with_room():
    assert first_fit(np.array([6, 5, 3, 4, 2, 3]), 10)[0].tolist() == [0, 1, 0, 1, 2, 2]
    assert first_fit(np.array([], np.int64), 10)[1] == 0


def test_first_fit_is_dense_and_quick():
    lengths = np.random.default_rng(0).lognormal(5, 1, 40_000).astype(np.int64).clip(2, 2048)
    begin = time.process_time()
    row, count = first_fit(lengths, 2048)
    assert time.process_time() - begin < 3  # a scan of all rows takes minutes
    filled = np.bincount(row, weights=lengths, minlength=count)
    assert filled.max() <= 2048 and filled.sum() / (count * 2048) > 0.97
    assert count / 10 > OPEN_ROWS


def test_many_documents_are_planned_in_no_time():
    lengths = np.full(2_000_000, 100)
    begin = time.process_time()
    plan, offsets = plan_of(lengths, 4096, "concat", 0, True)
    tokens = np.broadcast_to(np.int32(7), offsets[-1:])
    row = plan.row(3, plan.rows - 1, values(tokens, np.broadcast_to(np.uint8(1), offsets[-1:])))
    assert row["token"].tolist() == [7] * 4096 and time.process_time() - begin < 3


def test_best_fit_takes_the_longest_first_and_the_fullest_row_with_room():
    row, count = best_fit(np.array([2, 7, 3, 8, 5, 5]), 10)
    assert (row.tolist(), count) == ([0, 1, 1, 0, 2, 2], 3)
    assert best_fit(np.array([], np.int64), 10)[1] == 0
    lengths = np.random.default_rng(0).lognormal(5, 1, 20_000).astype(np.int64).clip(2, 2048)
    row, count = best_fit(lengths, 2048)
    filled = np.bincount(row, weights=lengths, minlength=count)
    assert filled.max() <= 2048 and filled.min() > 0 and filled.sum() / (count * 2048) > 0.99
    assert count <= first_fit(lengths, 2048)[1]


def test_pieces_are_the_tokens_of_the_row():
    for packing in ("concat", "first_fit", "best_fit"):
        plan, offsets = plan_of([5, 9, 0, 16, 7, 31, 2], 16, packing, seed=1, shuffle=True)
        tokens, mask = data(offsets)
        for number in range(plan.rows):
            row = plan.row(1, number, values(tokens, mask))
            joined = np.concatenate([tokens[piece] for piece in plan.pieces(1, number)])
            np.testing.assert_array_equal(row["token"][row["segment"] > 0], joined)


@pytest.mark.parametrize("seed", [None, 3])
def test_a_mixture_has_its_shares(seed):
    times = list(mix([np.ones(count, int) for count in (100, 300, 600)], [0.5, 0.3, 0.2], seed))
    assert [(int(t.sum()), int(t.min()), int(t.max())) for t in times] == [(500, 5, 5), (300, 1, 1), (200, 0, 1)]
    order = interleave(times)
    assert len(order) == 1000
    np.testing.assert_array_equal(np.bincount(order, minlength=1000), np.concatenate(times))
    first = np.sum(order[:100] < 100)
    assert 49 <= first <= 51  # any stretch has the shares


sources = st.lists(
    st.tuples(st.lists(st.integers(0, 60), min_size=1, max_size=30).filter(any), st.floats(0.05, 1)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(sources, st.sampled_from([None, 3]))
def test_a_mixture_by_tokens_has_its_shares_of_the_tokens(parts, seed):
    lengths, weights = [np.array(own) for own, _ in parts], [weight for _, weight in parts]
    times, again = (list(mix(lengths, weights, seed, by_tokens=True)) for _ in range(2))
    total = sum(int(own.sum()) for own in lengths)
    taken = [int((count * own).sum()) for count, own in zip(times, lengths, strict=True)]
    for count, same, own, tokens, weight in zip(times, again, lengths, taken, weights, strict=True):
        np.testing.assert_array_equal(count, same)
        assert count.any() and count.max() - count.min() <= 1  # goes round, and no document is left behind twice
        wanted = total * weight / sum(weights)
        assert abs(tokens - wanted) <= own.max() / 2 or count.sum() == 1
    order, every = interleave(times, lengths), np.concatenate(lengths)
    np.testing.assert_array_equal(np.bincount(order, minlength=len(every)), np.concatenate(times))
    source = np.repeat(np.arange(len(lengths)), list(map(len, lengths)))[order]
    for number, (own, tokens) in enumerate(zip(lengths, taken, strict=True)):  # any stretch has its share
        so_far, mine = np.cumsum(every[order]), np.cumsum(every[order] * (source == number))
        room = own.max() + tokens / max(1, so_far[-1]) * sum(int(each.max()) for each in lengths)
        assert np.abs(mine - so_far * tokens / max(1, so_far[-1])).max() <= room


# --- documents that stand several times in an epoch ---


def mixture(parts, seq_length: int, seed: int | None) -> Corpus:
    lengths = [np.array(own) for own, _ in parts]
    stops = np.cumsum(np.concatenate(lengths))
    corpus = Corpus(stops - np.concatenate(lengths), stops, seq_length, seed)
    return corpus.take(interleave(list(mix(lengths, [weight for _, weight in parts], seed))))


def begins(plan, epoch: int = 0) -> list[list[int]]:
    """Where the pieces of each row begin in the data: copies of one begin at one place."""
    return [[piece.start for piece in plan.pieces(epoch, row)] for row in range(plan.rows)]


def side_by_side(rows: list[list[int]]) -> tuple[int, int]:
    """(copies in a row that holds another, pairs of neighbouring rows that hold copies of one piece)."""
    return sum(len(row) - len(set(row)) for row in rows), sum(bool(set(a) & set(b)) for a, b in pairwise(rows))


@settings(max_examples=150, deadline=None)
@given(sources, st.integers(2, 40), st.sampled_from([None, 5]), st.integers(0, 2))
def test_copies_are_packed_once_each_in_as_few_rows(parts, seq_length, seed, epoch):
    corpus = mixture(parts, seq_length, seed)
    plan, again = (PACKINGS["best_fit"](corpus) for _ in range(2))
    plain = WholeDocuments(corpus, lambda lengths, capacity, copies: best_fit(lengths, capacity))
    assert begins(plan, epoch) == begins(again, epoch)
    assert sorted(chain(*begins(plan, epoch))) == sorted(chain(*begins(plain, epoch)))
    assert plan.dropped == plain.dropped and plan.tokens_in(epoch, plan.rows) == plain.tokens_in(epoch, plain.rows)
    for row in range(plan.rows):
        assert sum(piece.stop - piece.start for piece in plan.pieces(epoch, row)) <= seq_length
    assert plan.rows <= 1.1 * plain.rows + 1


def test_copies_stand_apart():
    """Small sets, a part of which goes round: rows, copies beside copies, and neighbours, without and with care."""
    found = np.zeros((2, 3), int)
    for number in range(40):
        rng = np.random.default_rng(number)
        seq_length = int(rng.choice([64, 256, 1024]))
        few, many = (rng.integers(2, int(seq_length * rng.choice([0.2, 0.5, 1.2])), n) for n in rng.integers(4, 100, 2))
        corpus = mixture([(few[:8], 0.4), (many, 0.6)], seq_length, [None, 3][number % 2])
        plain = WholeDocuments(corpus, lambda lengths, capacity, copies: best_fit(lengths, capacity))
        for at, plan in enumerate((plain, PACKINGS["best_fit"](corpus))):
            found[at] += plan.rows, *side_by_side(begins(plan))
    (rows, beside, neighbours), (careful_rows, still_beside, still_neighbours) = found.tolist()
    assert careful_rows <= 1.01 * rows
    assert still_beside < beside / 4 and still_neighbours < neighbours / 2, found


@settings(max_examples=200, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 1000))
def test_rows_with_copies_do_not_follow_each_other_where_that_can_be(held, seed):
    """Of R rows, n with a copy: 2 n - R - 1 pairs of neighbours at least."""
    copies = np.array([0 if each else -1 for each in held])
    order = apart(shuffled(len(held), seed), copies, np.arange(1, len(held) + 1))
    assert sorted(order.tolist()) == list(range(len(held)))
    neighbours = sum(held[a] and held[b] for a, b in pairwise(order.tolist()))
    assert neighbours == max(0, 2 * sum(held) - len(held) - 1)


def test_many_copies_are_packed_in_no_time():
    rng = np.random.default_rng(0)
    corpus = mixture([(rng.integers(20, 600, 4000), 0.3), (rng.integers(20, 400, 40_000), 0.7)], 2048, 3)
    begin = time.process_time()
    plan = PACKINGS["best_fit"](corpus)
    beside, neighbours = side_by_side(begins(plan))
    assert time.process_time() - begin < 10 and beside + neighbours < plan.rows / 100


def test_a_kept_plan_is_made_once():
    kept, made = {}, []

    def store(name, build):
        if name not in kept:
            made.append(name)
            kept[name] = build()
        return kept[name]

    offsets = offsets_of([5, 9, 16, 7, 3, 2, 16])
    for packing, names in (("concat", ["stream 0", "stream 2"]), ("best_fit", ["rows", "order 0", "order 2"])):
        kept, made = {}, []
        plans = [PACKINGS[packing](Corpus(offsets[:-1], offsets[1:], 8, 1, store)) for _ in range(2)]
        rows_of = [[plan.row(epoch, 1, values(*data(offsets)))["token"].tolist() for epoch in (0, 2)] for plan in plans]
        assert rows_of[0] == rows_of[1] and made == names


def uneven(seed: int = 0) -> np.ndarray:
    lengths = np.exp(np.random.default_rng(seed).normal(np.log(200), 1.2, 3000)).astype(np.int64)
    return np.clip(lengths, 2, 4096)


def step_works(plan: WholeDocuments, epoch: int, batch_size: int, window: int | None = None) -> np.ndarray:
    """[steps, batch_size]: the pairs that each row's tokens see."""
    lengths = [[piece.stop - piece.start for piece in plan.pieces(epoch, row)] for row in range(plan.rows)]
    seen = np.cumsum([0, *(min(p + 1, window or p + 1) for p in range(4096))])
    works = [sum(int(seen[length]) for length in row) for row in lengths]
    return np.array(works[: plan.rows // batch_size * batch_size]).reshape(-1, batch_size)


@pytest.mark.parametrize("window", [None, 300])
def test_balanced_steps_have_rows_of_equal_work(window):
    ends, batch_size = np.cumsum(uneven()), 8
    corpus = Corpus(ends - uneven(), ends, 4096, seed=1, batch_size=batch_size, window=window)
    plans = {name: PACKINGS[name](corpus) for name in ("first_fit", "best_fit", "balanced")}
    uneven_by = {}
    for name, plan in plans.items():
        works = step_works(plan, 1, batch_size, window)
        uneven_by[name] = (works.max(axis=1) / works.mean(axis=1)).mean()
    assert uneven_by["balanced"] <= 1.05 < 1.12 < min(uneven_by["first_fit"], uneven_by["best_fit"])
    plan = plans["balanced"]
    assert plan.rows <= 1.01 * plans["best_fit"].rows
    # Every epoch has every row once, in other steps; what fills none is not always the same.
    first, second = ([tuple(map(str, plan.pieces(epoch, row))) for row in range(plan.rows)] for epoch in (1, 2))
    assert sorted(first) == sorted(second) and first != second
    rest = plan.rows % batch_size
    assert rest and set(first[-rest:]) != set(second[-rest:])


def test_steps_of_like_by_hand():
    order, works = np.array([4, 0, 5, 2, 1, 3, 6]), np.array([10, 100, 11, 1000, 101, 1001, 7])
    # The last of the order fills no step; of the others those of like work, steps by the first of their rows.
    assert steps_of_like(order, works, 2).tolist() == [4, 1, 0, 2, 5, 3, 6]
    assert steps_of_like(np.arange(3), works, 8).tolist() == [0, 1, 2]


def test_even_fit_takes_the_row_with_the_least_work():
    lengths = np.array([6, 3, 3, 2, 2, 2, 2])
    row, count = even_fit(lengths, 10, lengths * (lengths + 1) // 2)
    assert count == 2 and row.tolist() == [0, 1, 1, 1, 1, 0, 0]
    assert even_fit(np.array([6, 6, 6]), 10)[1] == 3  # three do not fit into the two that would hold as many tokens
    assert even_fit(np.array([], np.int64), 10)[1] == 0


def test_what_documents_share_is_work_once_for_each():
    """Two answers of 5 to a prompt of 4: the second one's own tokens see the prompt too."""
    starts, stops = np.array([0, 9]), np.array([9, 18])
    corpus = Corpus(starts, stops, 16, units=np.array([0, 0]), shared=np.array([0, 4]))
    assert PACKINGS["balanced"](corpus)._row_work.tolist() == [45 + 45 - 10]
