"""Documents to rows, and back: the only place where the columns of a row are filled.

What a document has is told token by token. In a row some of it stands at the token's own place, and some where that
token is predicted, one place earlier: COLUMNS says which. So targets are shifted here, once, and nowhere else.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ringbpt.types import ALWAYS, COLUMNS, Batch

Row = dict[str, np.ndarray]  # one row of a batch: its columns by name, each [T]
Values = dict[str, Any]  # of tokens, by name: "token" (ids), "mask" (weights in the loss) and any column but ALWAYS


class Piece(NamedTuple):
    """What stands together in a row as one segment.

    length: how many of its tokens take a place. values: arrays [length], or [length + 1] where the document goes on
    behind its last place, which then has that next token as its target. Positions count from `shared`, unless values
    have a "position". unit: pieces next to each other with one such number are a unit; None: a unit of its own. shared:
    how many tokens of the document stand in the row already, as the beginning of the unit's piece before this one.
    """

    length: int
    values: Values
    unit: int | None = None
    shared: int = 0


class Known(NamedTuple):
    """What is known of a document as a whole.

    first: whether a packing unit begins with it. shared: how many of its first tokens, none of which takes loss, it has
    in common with the document before it. label, margin: as in COLUMNS.
    """

    first: bool = True
    shared: int = 0
    label: int = 0
    margin: float = 0.0


ALONE = Known()


def columns_of(values: Iterable[str], *more: str) -> tuple[str, ...]:
    """The columns of a row whose pieces have these values; more: of those that follow from the row itself."""
    return ALWAYS + tuple(name for name in (*values, *more) if name in COLUMNS and name not in ALWAYS)


def make_row(pieces: Iterable[Piece], length: int, columns: Sequence[str] = ALWAYS) -> Row:
    """Pieces one after the other as segments 1, 2, ... of a row of `length` places, the rest of it padding.

    A document's last token has nothing to predict: where it doesn't go on, target and weight are padding there.
    """
    row = _padding((length,), columns)
    _fill(row, pieces)
    return row


def make_batch(rows: Sequence[Iterable[Piece]], shape_BT: tuple[int, int], columns: Sequence[str] = ALWAYS) -> Batch:
    """A host batch with the pieces of each row, see make_row; rows that have none are padding."""
    arrays = _padding(shape_BT, columns)
    for number, pieces in enumerate(rows):
        _fill({name: array[number] for name, array in arrays.items()}, pieces)
    return Batch.of(arrays)


def _padding(shape: tuple[int, ...], columns: Sequence[str]) -> Row:
    return {name: np.full(shape, COLUMNS[name].padding, COLUMNS[name].dtype) for name in columns}


def _fill(row: Row, pieces: Iterable[Piece]) -> None:
    told = [
        (array, COLUMNS[name].source or name, int(COLUMNS[name].of != "token"))
        for name, array in row.items()
        if COLUMNS[name].of != "row"
    ]
    start, units, unit, path = 0, 0, None, list[tuple[int, int]]()
    for number, piece in enumerate(pieces, start=1):
        length, values = piece.length, piece.values
        stop = start + length
        if piece.unit is None or piece.unit != unit:
            units, path = units + 1, []
        unit = piece.unit
        row["position"][start:stop] = values.get("position", np.arange(piece.shared, piece.shared + length))
        row["segment"][start:stop] = number
        if "unit" in row:
            row["unit"][start:stop] = units
        if "last" in row:
            row["last"][start:stop] = number
            path = _beginning(path, piece.shared)
            for begin, end in path:
                row["last"][begin:end] = number
            path.append((start, stop))
        for array, source, shift in told:
            found = values[source][shift : length + shift]
            array[start : start + len(found)] = found
        start = stop


def _beginning(path: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """The first `count` places of a document whose tokens stand at these stretches of the row, in this order."""
    found = []
    for begin, end in path:
        end = min(end, begin + count)
        if begin < end:
            found.append((begin, end))
        count -= end - begin
    assert not count, "a document shares more than the one before it has"
    return found


def learnt(row: Row) -> np.ndarray:
    """bool [T]: whether the token of a place is itself learnt in this row, where the place before it predicts it."""
    follows = row["segment"][1:] == row["segment"][:-1]
    return np.concatenate([[False], follows & (row["weight"][:-1] > 0)])


def pieces_of(row: Row, apart: bool = False) -> list[Piece]:
    """The pieces of a row: make_row makes the same row of them. The first token's mask is not known, and is 0.

    apart: each document whole, as if it shared nothing with another.
    """
    found = []
    for number in np.unique(row["segment"][row["segment"] > 0]):
        own = row["segment"] == number
        # What a document shares stands in front of what is its own.
        inside = own | ((row["segment"] < number) & (row["last"] >= number)) if apart and "last" in row else own
        values: Values = {"position": row["position"][inside]}
        for name in [name for name in row if COLUMNS[name].of != "row" and name != "target"]:
            column, array = COLUMNS[name], row[name][inside]
            if column.of == "document":  # as it stands at a place of its own; the last one predicts nothing
                array = np.append(np.full_like(array[1:], row[name][own][0]), array[-1:])
            first = np.full(int(column.of != "token"), column.padding, array.dtype)
            values[column.source or name] = np.concatenate([first, array])
        values["token"] = np.concatenate([values["token"], row["target"][inside][-1:]])
        unit = int(row["unit"][own][0]) if "unit" in row else None
        shared = 0 if apart else int(row["position"][own][0]) if "last" in row else 0
        found.append(Piece(int(inside.sum()), values, unit, shared))
    return found
