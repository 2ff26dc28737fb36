"""Packing units: documents that must share a row do, whole and side by side."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringbpt.config import UserError
from ringbpt.data.packing import PACKINGS, Corpus
from tests.data.test_columns import B, dataset, load, write_store

T = 24
WHOLE = ["first_fit", "best_fit"]
units_of_lengths = st.lists(
    st.one_of(
        st.lists(st.integers(0, 60), min_size=1, max_size=1),  # a document of its own, which may be split
        st.lists(st.integers(1, 6), min_size=2, max_size=4),
    ),
    min_size=1,
    max_size=20,
)


def corpus_of(units: list[list[int]], seed: int | None = None) -> Corpus:
    lengths = np.array([length for unit in units for length in unit], np.int64)
    numbers = np.repeat(np.arange(len(units)), [len(unit) for unit in units])
    stops = np.cumsum(lengths)
    return Corpus(stops - lengths, stops, T, seed, units=numbers)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(WHOLE), units_of_lengths, st.sampled_from([None, 5]), st.integers(0, 2))
def test_units_stay_whole_and_in_one_row(packing, units, seed, epoch):
    corpus = corpus_of(units, seed)
    plan = PACKINGS[packing](corpus)
    tokens = np.arange(corpus.stops[-1])
    values = {"token": tokens, "mask": np.ones(len(tokens), np.uint8)}
    places: dict[int, tuple[int, int]] = {}  # token -> row, place
    predicted = []
    for number in range(plan.rows):
        row = plan.row(epoch, number, values)
        for place in np.flatnonzero(row["segment"]).tolist():
            assert places.setdefault(int(row["token"][place]), (number, place)) == (number, place)
        predicted += row["target"][row["weight"] > 0].tolist()
    assert len(places) == plan.tokens_in(epoch, plan.rows)
    assert len(places) + sum(plan.dropped.values()) == len(tokens)
    spans = list(zip(corpus.starts.tolist(), corpus.stops.tolist(), strict=True))
    assert sorted(predicted) == [token for start, stop in spans for token in range(start + 1, stop)]
    for number, unit in enumerate(units):
        if len(unit) > 1:
            first = corpus.starts[np.flatnonzero(corpus.units == number)[0]]
            found = [places[token] for token in range(first, first + sum(unit))]  # every token, those of one too
            row, place = found[0]
            assert found == [(row, place + i) for i in range(len(found))]


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(WHOLE), st.lists(st.integers(0, 60), min_size=1, max_size=20), st.sampled_from([None, 5]))
def test_documents_of_their_own_are_packed_as_without_units(packing, lengths, seed):
    corpus = corpus_of([[length] for length in lengths], seed)
    some, other = PACKINGS[packing](corpus), PACKINGS[packing](replace(corpus, units=None))
    assert (some.rows, some.dropped) == (other.rows, other.dropped)
    assert [some.pieces(1, row) for row in range(some.rows)] == [other.pieces(1, row) for row in range(some.rows)]


@pytest.mark.parametrize("packing", WHOLE)
def test_a_unit_that_no_row_can_hold(packing):
    assert PACKINGS[packing](corpus_of([[12, 12]])).rows == 1
    with pytest.raises(ValueError, match="a unit of 25 tokens, and rows of 24"):
        PACKINGS[packing](corpus_of([[3], [12, 13]]))
    with pytest.raises(ValueError, match="concat"):
        PACKINGS["concat"](corpus_of([[3, 4]]))


# --- as a store says them ---

LENGTHS = (5, 4, 3, 9, 6, 2, 40, 7, 7, 1, 3, 5, 8, 2, 2, 4)
UNITS = (0, 0, 1, 2, 2, 3, 4, 5, 5, 6, 6, 7, 8, 8, 8, 9)


def rows_with(loader, first: int) -> list[tuple[int, int]]:
    """The rows of two epochs in which each pair of a pair's documents begins; those that must share one do."""
    starts = first + np.cumsum([0, *LENGTHS])[:-1]
    found = []
    for epoch in (0, 1):
        rows = [loader.row(epoch, number)["token"] for number in range(loader.epoch_rows)]
        holds = lambda token, rows=rows: [n for n, row in enumerate(rows) if token in row]
        for unit in set(UNITS):
            inside = [holds(int(starts[d])) for d in np.flatnonzero(np.array(UNITS) == unit)]
            if len(inside) > 1:
                assert inside[0] and all(rows == inside[0] for rows in inside), unit
                found.append((unit, len(inside[0])))
    return found


@pytest.mark.parametrize("packing", WHOLE)
def test_a_store_says_its_units(tmp_path, packing):
    write_store(tmp_path / "a", LENGTHS, 1, UNITS)
    loader = load(dataset(str(tmp_path / "a"), tmp_path, packing=packing), [])
    assert rows_with(loader, 1) and loader.lengths.tolist() == list(LENGTHS)
    write_store(tmp_path / "plain", LENGTHS, 1)
    plain = load(dataset(str(tmp_path / "plain"), tmp_path, packing=packing), [])
    assert plain.fingerprint != loader.fingerprint and plain.tokens_in == loader.tokens_in
    write_store(tmp_path / "own", LENGTHS, 1, range(len(LENGTHS)))
    assert load(dataset(str(tmp_path / "own"), tmp_path, packing=packing), []).fingerprint == plain.fingerprint


def test_a_mixture_mixes_units(tmp_path):
    write_store(tmp_path / "a", LENGTHS, 1, UNITS)
    write_store(tmp_path / "b", (6,) * 20, 1 + sum(LENGTHS))
    loader = load(dataset(f"{tmp_path / 'a'}:0.7,{tmp_path / 'b'}:0.3", tmp_path), [])
    found = dict(rows_with(loader, 1))
    assert set(found) == {0, 2, 5, 6, 8} and max(found.values()) > 1  # some stand twice in an epoch
    joined = load(dataset(f"{tmp_path / 'b'},{tmp_path / 'a'}", tmp_path), [])
    assert rows_with(joined, 1) and joined.tokens_in == sum(LENGTHS) + 120


def test_units_that_do_not_fit(tmp_path):
    write_store(tmp_path / "a", LENGTHS, 1, UNITS)
    config = dataset(str(tmp_path / "a"), tmp_path)
    shorter = replace(config, files_dataset=replace(config.files_dataset, seq_length=14, batch_size=1))

    def error(config) -> str:
        with pytest.raises(UserError) as caught:
            load(config, [])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "--train_dataset.packing=best_fit" in error(replace(config, packing="concat"))
    assert error(shorter) == (
        "--train_dataset.long_documents=split: 1 packing units are longer than --train_dataset.files_dataset."
        "seq_length=14, the first of them packing unit 3 with 15 tokens: --train_dataset.long_documents=drop, "
        "or seq_length=40"
    )
    assert "long_documents=refuse: 2 packing units" in error(replace(shorter, long_documents="refuse"))
    dropped = load(replace(shorter, long_documents="drop"), [])
    assert dropped.tokens_dropped["documents longer than seq_length"] == 15 + 40
    assert B * dropped.epoch_rows > 0
    for bad in (UNITS[1:], (1, *UNITS[1:]), (*UNITS[:-1], 12), (*UNITS[:-1], 0)):
        np.save(tmp_path / "a" / "units.npy", np.array(bad))
        assert error(config).startswith(f"{tmp_path}/a/units.npy:1: not 0, 0, 1, ... for ")
