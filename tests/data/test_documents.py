"""A row is filled in one place: what of a document stands where, and the same documents read back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringbpt.data.documents import Piece, make_batch, make_row, pieces_of
from ringbpt.types import ALWAYS, COLUMNS, Column

TOY = {"of_token": Column("int32", -1, "token", ""), "of_target": Column("float32", -2.0, "target", "")}
EVERY = (*ALWAYS, *TOY)


@pytest.fixture(autouse=True, scope="module")
def toy_columns():
    with pytest.MonkeyPatch.context() as patch:
        for name, column in TOY.items():
            patch.setitem(COLUMNS, name, column)
        yield


def piece(length: int, first: int, goes_on: bool, **more) -> Piece:
    """Tokens first, first + 1, ...; each value tells its token."""
    token = np.arange(first, first + length + goes_on)
    values = {"token": token, "mask": token % 3 != 0, "of_token": 10 * token, "of_target": token / 2}
    return Piece(length, values | more)


def test_a_row_by_hand():
    row = make_row([piece(3, 100, False), piece(2, 200, True)], 7, EVERY)
    assert {name: array.tolist() for name, array in row.items()} == {
        "token": [100, 101, 102, 200, 201, 0, 0],
        "target": [101, 102, 0, 201, 202, 0, 0],
        "weight": [1, 0, 0, 0, 1, 0, 0],
        "position": [0, 1, 2, 0, 1, 0, 0],
        "segment": [1, 1, 1, 2, 2, 0, 0],
        "of_token": [1000, 1010, 1020, 2000, 2010, -1, -1],
        "of_target": [50.5, 51, -2, 100.5, 101, -2, -2],
    }
    assert all(array.dtype == COLUMNS[name].dtype for name, array in row.items())
    own = make_row([piece(3, 100, False, position=np.array([5, 6, 9]))], 4)
    assert own["position"].tolist() == [5, 6, 9, 0]


def test_a_batch_of_rows():
    batch = make_batch([[piece(2, 10, False)], [], [piece(1, 20, True), piece(1, 30, False)]], (4, 3), EVERY)
    assert batch.segment_BT.tolist() == [[1, 1, 0], [0, 0, 0], [1, 2, 0], [0, 0, 0]]
    assert batch.columns["of_target"].tolist() == [[5.5, -2, -2], [-2] * 3, [10.5, -2, -2], [-2] * 3]
    assert list(batch.by_name()) == list(EVERY) and batch.rows(2, 4).token_BT.tolist() == [[20, 30, 0], [0, 0, 0]]
    with pytest.raises(KeyError, match="of_token"):
        make_row([Piece(1, {"token": np.ones(1), "mask": np.ones(1)})], 2, EVERY)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=6), st.integers(0, 5))
def test_pieces_are_read_back(lengths, padding):
    pieces = [piece(length, 100 * number, goes_on) for number, (length, goes_on) in enumerate(lengths)]
    places = sum(length for length, _ in lengths) + padding
    row = make_row(pieces, places, EVERY)
    again = pieces_of(row)
    assert [found.length for found in again] == [length for length, _ in lengths]
    for name, array in make_row(again, places, EVERY).items():
        np.testing.assert_array_equal(array, row[name])
