"""Which tokens stand in which row: a plan that is made once and read at random, so a batch depends on its step alone.

A plan is a pure function of (offsets, seq_length, packing, seed, shuffle); `epoch` only chooses an order, and every
epoch has the same number of rows. So the place in the data is one integer, for any number of hosts and workers.
"""

from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

OPEN_ROWS = 16  # first_fit looks for room in this many rows at most, which keeps it linear in the documents


class Row(NamedTuple):
    """One row of a batch, the fields of types.Batch in their order, each [T]; weight float32, the others int32."""

    token: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    position: np.ndarray
    segment: np.ndarray


class Plan(Protocol):
    """rows: of an epoch. dropped: tokens that stand in no row, by reason; the rest stand in exactly one."""

    rows: int
    dropped: dict[str, int]

    def row(self, epoch: int, row: int, tokens: np.ndarray, mask: np.ndarray) -> Row:
        """Row `row` of an epoch; tokens int32 and mask uint8 are the whole data, [offsets[-1]], mapped from disk."""
        ...

    def tokens_in(self, epoch: int, rows: int) -> int:
        """How many tokens stand in the first `rows` rows of an epoch."""
        ...


def make_plan(offsets: np.ndarray, seq_length: int, *, packing: str, seed: int, shuffle: bool) -> Plan:
    """offsets int64 [documents + 1]: document d is tokens[offsets[d]:offsets[d + 1]]. packing: see PACKINGS."""
    return PACKINGS[packing](np.asarray(offsets, np.int64), seq_length, seed if shuffle else None)


def shuffled(count: int, *seeds: int) -> np.ndarray:
    """A permutation of range(count), int64. From the raw bits, which numpy promises to keep from release to release."""
    bits = np.random.Philox(np.random.SeedSequence([seed % (1 << 64) for seed in seeds])).random_raw(count)
    return np.argsort(bits, kind="stable")


class Concat:
    """Documents joined end to end and cut every T tokens, whatever stands there (the original's way).

    Row r is tokens r*T .. r*T + T of the stream; the target of a place is the stream's next token, across documents
    and across rows. Position 0..T-1, segment 1. With a seed the documents are joined in another order each epoch.
    """

    def __init__(self, offsets: np.ndarray, seq_length: int, seed: int | None):
        self._offsets, self._seq_length, self._seed = offsets, seq_length, seed
        total = int(offsets[-1])
        self.rows = max(0, total - 1) // seq_length  # the last target takes one token more
        self.dropped = {"end of the stream": total - self.rows * seq_length}
        self._stream = lru_cache(maxsize=2)(self._make_stream)

    def _make_stream(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [documents] each: where a document begins in the data, and where it ends in the stream."""
        starts, lengths = self._offsets[:-1], np.diff(self._offsets)
        if self._seed is not None:
            order = shuffled(len(starts), self._seed, epoch)
            starts, lengths = starts[order], lengths[order]
        return starts, np.cumsum(lengths)

    def _read(self, epoch: int, first: int, last: int) -> list[slice]:
        """The slices of the data that make up places first..last of the stream."""
        starts, ends = self._stream(0 if self._seed is None else epoch)
        document, slices = int(np.searchsorted(ends, first, side="right")), []
        while first < last:
            length = min(int(ends[document]), last) - first
            begin = int(starts[document]) + first - (int(ends[document - 1]) if document else 0)
            slices.append(slice(begin, begin + length))
            first += length
            document += 1
        return slices

    def row(self, epoch: int, row: int, tokens: np.ndarray, mask: np.ndarray) -> Row:
        first = row * self._seq_length
        slices = self._read(epoch, first, first + self._seq_length + 1)
        token = np.concatenate([tokens[piece] for piece in slices])
        weight = np.concatenate([mask[piece] for piece in slices])
        position = np.arange(self._seq_length, dtype=np.int32)
        return Row(token[:-1], token[1:], weight[1:].astype(np.float32), position, np.ones_like(position))

    def tokens_in(self, epoch: int, rows: int) -> int:
        return rows * self._seq_length


class FirstFit:
    """Whole documents, each into the first row with room for it, rows filled up with padding (segment, weight 0).

    Segments count from 1 in each row, positions from 0 in each segment. A document's last token has nothing to
    predict: weight 0. A document longer than a row is split into pieces of T tokens, each a segment of its own, and
    the last token of a piece predicts the document's next one. With a seed the documents are packed in one shuffled
    order, and the rows come in another order each epoch.
    """

    def __init__(self, offsets: np.ndarray, seq_length: int, seed: int | None):
        self._seq_length, self._seed = seq_length, seed
        starts, stops = offsets[:-1], offsets[1:]
        if seed is not None:
            order = shuffled(len(starts), seed)
            starts, stops = starts[order], stops[order]
        self._start, self._stop, document_stop = split_documents(starts, stops, seq_length)
        self._has_next = self._stop < document_stop
        lengths = self._stop - self._start
        lone = int(np.sum(stops - starts == 1))
        self.dropped = {
            "documents of one token": lone,
            "last tokens of split documents": int(offsets[-1]) - lone - int(lengths.sum()),
        }
        row_of_piece, self.rows = first_fit(lengths, seq_length)
        by_row = np.argsort(row_of_piece, kind="stable")  # keeps the order of the documents inside a row
        self._start, self._stop, self._has_next = self._start[by_row], self._stop[by_row], self._has_next[by_row]
        self._row_ends = np.cumsum(np.bincount(row_of_piece, minlength=self.rows))
        self._row_tokens = np.bincount(row_of_piece, weights=lengths, minlength=self.rows).astype(np.int64)
        self._order = lru_cache(maxsize=2)(self._make_order)

    def _make_order(self, epoch: int) -> np.ndarray:
        if self._seed is None:
            return np.arange(self.rows)
        return shuffled(self.rows, self._seed, 1 + epoch)

    def row(self, epoch: int, row: int, tokens: np.ndarray, mask: np.ndarray) -> Row:
        row = int(self._order(0 if self._seed is None else epoch)[row])
        places = self._seq_length
        token, target, position, segment = (np.zeros(places, np.int32) for _ in range(4))
        weight = np.zeros(places, np.float32)
        place = 0
        pieces = range(int(self._row_ends[row - 1]) if row else 0, int(self._row_ends[row]))
        for number, piece in enumerate(pieces, start=1):
            start, stop = int(self._start[piece]), int(self._stop[piece])
            here = slice(place, place + stop - start)
            token[here] = tokens[start:stop]
            position[here] = np.arange(stop - start)
            segment[here] = number
            predicted = slice(start + 1, stop + bool(self._has_next[piece]))
            there = slice(place, place + predicted.stop - predicted.start)
            target[there] = tokens[predicted]
            weight[there] = mask[predicted]
            place = here.stop
        return Row(token, target, weight, position, segment)

    def tokens_in(self, epoch: int, rows: int) -> int:
        return int(self._row_tokens[self._order(0 if self._seed is None else epoch)[:rows]].sum())


PACKINGS: dict[str, type[Concat] | type[FirstFit]] = {"concat": Concat, "first_fit": FirstFit}


def split_documents(
    starts: np.ndarray, stops: np.ndarray, seq_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents cut into pieces of at most `seq_length`: each piece's start and stop, and its document's stop.

    All int64. A piece of one token at a document's end is left out: the piece before it has it as its last target,
    and it has nothing to predict itself. So is a document of one token.
    """
    lengths = stops - starts
    counts = np.where(lengths > 1, -(-(lengths - 1) // seq_length), 0)
    document = np.repeat(np.arange(len(starts)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = starts[document] + number * seq_length
    return start, np.minimum(start + seq_length, stops[document]), stops[document]


def first_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """The row of each piece, int64, and the number of rows: the first of the open rows with room, else a new one.

    At most OPEN_ROWS rows are open; the fullest one is closed to make place for another.
    """
    rows: list[int] = []
    open_rows: list[int] = []
    free: list[int] = []
    count = 0
    for length in lengths.tolist():
        for slot, room in enumerate(free):
            if room >= length:
                rows.append(open_rows[slot])
                free[slot] = room - length
                if free[slot] < 2:  # no piece is shorter than 2
                    del free[slot], open_rows[slot]
                break
        else:
            rows.append(count)
            if capacity - length >= 2:
                if len(free) == OPEN_ROWS:
                    fullest = free.index(min(free))
                    del free[fullest], open_rows[fullest]
                free.append(capacity - length)
                open_rows.append(count)
            count += 1
    return np.array(rows, np.int64), count
