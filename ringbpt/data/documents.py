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
    behind its last place, which then has that next token as its target. Positions count from 0, unless values have
    a "position".
    """

    length: int
    values: Values


def columns_of(values: Iterable[str]) -> tuple[str, ...]:
    """The columns of a row whose pieces have these values."""
    return ALWAYS + tuple(name for name in values if name in COLUMNS and name not in ALWAYS)


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
        (array, COLUMNS[name].source or name, int(COLUMNS[name].of == "target"))
        for name, array in row.items()
        if name not in ("position", "segment")
    ]
    start = 0
    for number, (length, values) in enumerate(pieces, start=1):
        stop = start + length
        row["position"][start:stop] = values["position"] if "position" in values else np.arange(length, dtype=np.int32)
        row["segment"][start:stop] = number
        for array, source, shift in told:
            found = values[source][shift : length + shift]
            array[start : start + len(found)] = found
        start = stop


def learnt(row: Row) -> np.ndarray:
    """bool [T]: whether the token of a place is itself learnt in this row, where the place before it predicts it."""
    follows = row["segment"][1:] == row["segment"][:-1]
    return np.concatenate([[False], follows & (row["weight"][:-1] > 0)])


def pieces_of(row: Row) -> list[Piece]:
    """The pieces of a row: make_row makes the same row of them. The first token's mask is not known, and is 0."""
    found = []
    for number in np.unique(row["segment"][row["segment"] > 0]):
        inside = row["segment"] == number
        values: Values = {"position": row["position"][inside]}
        for name in row.keys() - {"target", "position", "segment"}:
            column, array = COLUMNS[name], row[name][inside]
            first = np.full(int(column.of == "target"), column.padding, array.dtype)
            values[column.source or name] = np.concatenate([first, array])
        values["token"] = np.concatenate([values["token"], row["target"][inside][-1:]])
        found.append(Piece(int(inside.sum()), values))
    return found
