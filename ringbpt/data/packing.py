"""Which tokens stand in which row: a plan that is made once and read at random, so a batch depends on its step alone.

A plan is a pure function of (documents, seq_length, packing, seed, shuffle); `epoch` only chooses an order, and every
epoch has the same number of rows. So the place in the data is one integer, for any number of hosts and workers.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from typing import Protocol

import numpy as np

from ringbpt.balanced import pairs_seen, to_the_least
from ringbpt.data.documents import Piece, Row, Values, columns_of, make_row

OPEN_ROWS = 16  # first_fit looks for room in this many rows at most, which keeps it linear in the documents
# Where documents stand several times in an epoch: how many rows best_fit compares for a copy, among how many the next
# row is looked for (for all rows together, and at least), and how far from each other rows with copies are put at most.
COMPARED_ROWS, AHEAD_IN_ALL, AHEAD, FARTHEST = 64, 1 << 22, 16, 16
ALIKE = 1.01  # where rows of like work make a step: those up to so many times as much are alike

Arrays = dict[str, np.ndarray]
# Makes the named arrays, or finds them where an earlier run has left them.
Store = Callable[[str, Callable[[], Arrays]], Arrays]
# The row of each item, and the number of rows, from the items' lengths, the room of a row and, int64 [items] or None,
# where there are several of one, the number that copies share, -1 of what stands there once; for even_fit their work.
Fit = Callable[[np.ndarray, int, np.ndarray | None], tuple[np.ndarray, int]]


@dataclass(frozen=True)
class Corpus:
    """What is packed: document d is tokens[starts[d]:stops[d]], both int64 [documents].

    seed: of the order; None: as they are. units int64 [documents], 0, 0, 1, ...: documents of one number must share a
    row (a pair, the branches of a prompt); None: each is a unit of its own. shared int64 [documents]: how many of its
    first tokens a document has in common with the one before it in its unit, where they stand once; None: nothing is
    shared. store: where a plan is kept. For `balanced` alone, batch_size: rows of a step; window: how many tokens a
    token sees, None: all.
    """

    starts: np.ndarray
    stops: np.ndarray
    seq_length: int
    seed: int | None = None
    store: Store = lambda name, build: build()
    units: np.ndarray | None = None
    shared: np.ndarray | None = None
    batch_size: int = 1
    window: int | None = None

    @property
    def own_starts(self) -> np.ndarray:
        """Where what each document takes a place for begins, int64."""
        return self.starts if self.shared is None else self.starts + self.shared

    def unit_lengths(self) -> np.ndarray:
        """The places that each unit takes, int64."""
        lengths = self.stops - self.own_starts
        return lengths if self.units is None else np.bincount(self.units, weights=lengths).astype(np.int64)

    def take(self, order: np.ndarray) -> "Corpus":
        """The units in this order, numbered from 0 in it."""
        units, documents = None, order
        if self.units is not None:
            counts = np.bincount(self.units)
            first, counts = (np.cumsum(counts) - counts)[order], counts[order]
            units = np.repeat(np.arange(len(order)), counts)
            documents = np.arange(len(units)) + (first - np.cumsum(counts) + counts)[units]
        shared = None if self.shared is None else self.shared[documents]
        return replace(self, starts=self.starts[documents], stops=self.stops[documents], units=units, shared=shared)


class Packing(Protocol):
    """rows: of an epoch. dropped: tokens that stand in no row, by reason; the rest stand in exactly one."""

    rows: int
    dropped: dict[str, int]

    def row(self, epoch: int, row: int, values: Values) -> Row:
        """Row `row` of an epoch; values [tokens] are the whole data's, mapped from disk, read in slices."""

    def tokens_in(self, epoch: int, rows: int) -> int:
        """How many tokens stand in the first `rows` rows of an epoch."""


def mix(
    lengths: Sequence[np.ndarray], weights: Sequence[float], seed: int | None, by_tokens: bool = False
) -> Iterator[np.ndarray]:
    """How often each document of each source stands in an epoch of the mixture: int64 [documents] of each.

    lengths: tokens of each source's documents. An epoch has as many documents (or tokens) as the sources together, and
    of source i the share weights[i] of them, of tokens to within half a document: a source with a larger share than its
    own goes round, one with a smaller share loses the rest, chosen by the seed (without one, its last).
    """
    total = sum(weights)
    for number, (own, weight) in enumerate(zip(lengths, weights, strict=True)):
        order = np.arange(len(own)) if seed is None else shuffled(len(own), seed, 1 << 32, number)
        if by_tokens:
            ends = np.cumsum(own[order])
            rounds, rest = divmod(sum(int(each.sum()) for each in lengths) * weight / total, max(1, int(ends[-1])))
            more = int(np.argmin(np.abs(np.concatenate([[0], ends]) - rest)))
        else:
            rounds, more = divmod(max(1, round(sum(map(len, lengths)) * weight / total)), len(own))
        times = np.full(len(own), int(rounds), np.int64)
        times[order[:more]] += 1
        if not times.any():
            times[order[:1]] = 1
        yield times


def interleave(times: Sequence[np.ndarray], lengths: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """Documents, numbered on through the sources, so that any stretch holds each source's share: int64.

    The share is of the documents, or of the tokens where `lengths`, of each source's documents, are given.
    """
    documents, places, first = [], [], 0
    for number, counts in enumerate(times):
        repeated = np.concatenate(
            [np.flatnonzero(counts > each) for each in range(int(counts.max(initial=0)))] or [np.arange(0)]
        )
        documents.append(first + repeated)
        sizes = np.ones(len(repeated)) if lengths is None else lengths[number][repeated]
        places.append((np.cumsum(sizes) - 0.5 * sizes) / max(1, sizes.sum()))
        first += len(counts)
    return np.concatenate(documents)[np.argsort(np.concatenate(places), kind="stable")]


def shuffled(count: int, *seeds: int) -> np.ndarray:
    """A permutation of range(count), int64. From the raw bits, which numpy promises to keep from release to release."""
    bits = np.random.Philox(np.random.SeedSequence([seed % (1 << 64) for seed in seeds])).random_raw(count)
    return np.argsort(bits, kind="stable")


class Concat:
    """Documents joined end to end and cut every T tokens, whatever stands there (the original's way).

    Row r is tokens r*T .. r*T + T of the stream; the target of a place is the stream's next token, across documents
    and across rows. Position 0..T-1, segment 1. With a seed the documents are joined in another order each epoch.
    """

    def __init__(self, corpus: Corpus):
        if corpus.units is not None:
            raise ValueError("concat cuts documents anywhere: it keeps no units of several")
        self._corpus, self._seq_length, self._seed = corpus, corpus.seq_length, corpus.seed
        self._stream = lru_cache(maxsize=2)(self._load_stream)
        total = int(self._stream(0)[1][-1]) if len(corpus.starts) else 0
        self.rows = max(0, total - 1) // self._seq_length  # the last target takes one token more
        self.dropped = {"end of the stream": total - self.rows * self._seq_length}

    def _load_stream(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [documents] each: where a document begins in the data, and where it ends in the stream."""

        def make() -> Arrays:
            corpus = self._corpus
            if self._seed is not None:
                corpus = corpus.take(shuffled(len(corpus.starts), self._seed, epoch))
            return {"start": corpus.starts, "end": np.cumsum(corpus.unit_lengths())}

        found = self._corpus.store(f"stream {epoch}", make)
        return found["start"], found["end"]

    def pieces(self, epoch: int, row: int) -> list[slice]:
        return self._read(epoch, row * self._seq_length, (row + 1) * self._seq_length)

    def _read(self, epoch: int, first: int, last: int) -> list[slice]:
        """The slices of the data that make up places first..last of the stream."""
        starts, ends = self._stream(0 if self._seed is None else epoch)
        document, slices = int(np.searchsorted(ends, first, side="right")), []
        while first < last:
            length = min(int(ends[document]), last) - first
            if not length:  # a document of no tokens
                document += 1
                continue
            begin = int(starts[document]) + first - (int(ends[document - 1]) if document else 0)
            slices.append(slice(begin, begin + length))
            first += length
            document += 1
        return slices

    def row(self, epoch: int, row: int, values: Values) -> Row:
        first = row * self._seq_length
        slices = self._read(epoch, first, first + self._seq_length + 1)
        joined = {name: np.concatenate([array[piece] for piece in slices]) for name, array in values.items()}
        return make_row([Piece(self._seq_length, joined)], self._seq_length, columns_of(values))

    def tokens_in(self, epoch: int, rows: int) -> int:
        return rows * self._seq_length


class WholeDocuments:
    """Whole documents, each into a row with room for it, rows filled up with padding (segment, weight 0).

    Segments count from 1 in each row, positions from 0 in each segment. A document's last token has nothing to
    predict: weight 0. A document longer than a row is split into pieces of T tokens, each a segment of its own, and
    the last token of a piece predicts the document's next one. With a seed the documents are packed in one shuffled
    order, and the rows come in another order each epoch. The documents of a unit of several stand in one row, side by
    side, in their order, those of one token too. spreads: what an epoch has several times, `fit` lays into different
    rows, and those rows don't follow each other. alike: `fit` is told the work of what it lays, the pairs that its
    queries see, and the rows of a step have about as much of it each; the rows that fill no step are others each epoch.
    """

    def __init__(self, corpus: Corpus, fit: Fit, spreads: bool = False, alike: bool = False):
        self._seq_length, self._seed, self._store = corpus.seq_length, corpus.seed, corpus.store
        packed = self._store("rows", lambda: self._pack(corpus, fit, spreads, alike))
        self._start, self._stop, self._has_next = packed["start"], packed["stop"], packed["has_next"]
        self._row_ends, self._row_tokens = packed["row_end"], packed["row_tokens"]
        self._copies, self._unit, self._shared = packed.get("copy"), packed.get("unit"), packed.get("shared")
        self._batch_size, self._row_work = corpus.batch_size, packed.get("row_work")
        self._more = ("unit",) * (self._unit is not None) + ("last",) * (self._shared is not None)
        self.rows = len(self._row_ends)
        tokens, lone = packed["counts"].tolist()
        self.dropped = {
            "documents of one token": lone,
            "last tokens of split documents": tokens - lone - int(self._row_tokens.sum()),
        }
        if corpus.shared is not None:
            self.dropped["beginnings that stand in the row already"] = int(corpus.shared.sum())
        self._order = lru_cache(maxsize=2)(self._make_order)

    def _pack(self, corpus: Corpus, fit: Fit, spreads: bool, alike: bool) -> Arrays:
        """Each piece's place in the data, row by row, and where each row's pieces end and how many tokens it holds."""
        if self._seed is not None:
            corpus = corpus.take(shuffled(len(corpus.unit_lengths()), self._seed))
        starts, stops, units = corpus.own_starts, corpus.stops, corpus.units
        together = np.zeros(len(starts), bool) if units is None else (np.bincount(units) > 1)[units]
        start, stop, document = split_documents(starts, stops, self._seq_length, together)
        lengths = stop - start
        item = np.arange(len(lengths))  # what is fitted: a piece, or those of a unit of several documents
        if units is not None:
            item = np.cumsum((np.diff(units[document], prepend=-1) != 0) | ~together[document]) - 1
        sizes = np.bincount(item, weights=lengths).astype(np.int64)
        if sizes.max(initial=0) > self._seq_length:
            raise ValueError(f"a unit of {sizes.max()} tokens, and rows of {self._seq_length}")
        copies = copies_of(start[np.flatnonzero(np.diff(item, prepend=-1))]) if spreads else None
        before = 0 if corpus.shared is None else corpus.shared[document]
        work = pairs_seen(before + lengths, corpus.window) - pairs_seen(before, corpus.window)
        works = np.bincount(item, weights=work).astype(np.int64) if alike else None
        row_of_item, rows = fit(sizes, self._seq_length, works if alike else copies)
        row_of_piece = row_of_item[item]
        by_row = np.argsort(row_of_piece, kind="stable")  # keeps the order of the documents inside a row
        lone = (stops - starts == 1) & ~together
        more = {} if copies is None else {"copy": copies[item][by_row]}
        if units is not None:
            more["unit"] = units[document][by_row]
        if corpus.shared is not None:
            more["shared"] = corpus.shared[document][by_row]
        if alike:
            more["row_work"] = np.bincount(row_of_piece, weights=work, minlength=rows).astype(np.int64)
        return more | {
            "counts": np.array([np.sum(stops - starts), np.sum(lone)], np.int64),
            "start": start[by_row],
            "stop": stop[by_row],
            "has_next": (stop < stops[document])[by_row],
            "row_end": np.cumsum(np.bincount(row_of_piece, minlength=rows)),
            "row_tokens": np.bincount(row_of_piece, weights=lengths, minlength=rows).astype(np.int64),
        }

    def _make_order(self, epoch: int) -> np.ndarray:
        seed, copies = self._seed, self._copies

        def make() -> Arrays:
            order = np.arange(self.rows) if seed is None else shuffled(self.rows, seed, 1 + epoch)
            if self._row_work is not None:
                order = steps_of_like(order, self._row_work, self._batch_size)
            return {"row": order if copies is None else apart(order, copies, self._row_ends)}

        return make()["row"] if seed is None and copies is None else self._store(f"order {epoch}", make)["row"]

    def _pieces(self, epoch: int, row: int) -> range:
        row = int(self._order(0 if self._seed is None else epoch)[row])
        return range(int(self._row_ends[row - 1]) if row else 0, int(self._row_ends[row]))

    def pieces(self, epoch: int, row: int) -> list[slice]:
        return [slice(int(self._start[piece]), int(self._stop[piece])) for piece in self._pieces(epoch, row)]

    def row(self, epoch: int, row: int, values: Values) -> Row:
        pieces = []
        for piece in self._pieces(epoch, row):
            start, stop = int(self._start[piece]), int(self._stop[piece])
            read = slice(start, stop + bool(self._has_next[piece]))
            unit = None if self._unit is None else int(self._unit[piece])
            shared = 0 if self._shared is None else int(self._shared[piece])
            pieces.append(Piece(stop - start, {name: array[read] for name, array in values.items()}, unit, shared))
        return make_row(pieces, self._seq_length, columns_of(values, *self._more))

    def tokens_in(self, epoch: int, rows: int) -> int:
        return int(self._row_tokens[self._order(0 if self._seed is None else epoch)[:rows]].sum())


def split_documents(
    starts: np.ndarray, stops: np.ndarray, seq_length: int, together: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents cut into pieces of at most `seq_length`: each piece's start, stop and document, all int64.

    A piece of one token at a document's end is left out: the piece before it has it as its last target, and it has
    nothing to predict itself. So is a document of one token, unless it is `together` (bool [documents]) with others.
    """
    lengths = stops - starts
    counts = np.where(lengths > 1, -(-(lengths - 1) // seq_length), together & (lengths == 1))
    document = np.repeat(np.arange(len(starts)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = starts[document] + number * seq_length
    return start, np.minimum(start + seq_length, stops[document]), document


def copies_of(starts: np.ndarray) -> np.ndarray | None:
    """The number that items with one start share, int64 [items], -1 of what stands there once; None without copies."""
    _, number, times = np.unique(starts, return_inverse=True, return_counts=True)
    return np.where(times[number] > 1, number, -1) if (times > 1).any() else None


def apart(order: np.ndarray, copies: np.ndarray, row_ends: np.ndarray) -> np.ndarray:
    """Rows in nearly this order, int64, such that rows with copies of one piece don't follow each other, if it can be.

    copies: the number of each piece, -1 of what stands there once; row r has those up to row_ends[r]. Each next row is
    the first to come of whose pieces no copy has just been there. That is done once more from the end, for the last
    rows had none to choose from.
    """
    count, held = len(order), [set(part.tolist()) - {-1} for part in np.split(copies, row_ends[:-1])]
    times = Counter(copy for row in held for copy in row)
    distance = {copy: min(FARTHEST, max(2, count // (2 * rows))) for copy, rows in times.items()}
    for _ in range(2):
        seen: dict[int, int] = {}  # when a piece has been there last
        found, coming = [], iter(order.tolist())
        ahead = list(islice(coming, max(AHEAD, AHEAD_IN_ALL // max(1, count))))
        for now in range(count):
            best, most = 0, -count
            for place, row in enumerate(ahead):
                slack = min((now - seen[copy] - distance[copy] for copy in held[row] if copy in seen), default=0)
                if slack > most:
                    best, most = place, slack
                if slack >= 0:
                    break
            row = ahead.pop(best)
            found.append(row)
            seen.update(dict.fromkeys(held[row], now))
            ahead.extend(islice(coming, 1))
        order = np.array(found[::-1], np.int64)
    return order


def steps_of_like(order: np.ndarray, works: np.ndarray, batch_size: int) -> np.ndarray:
    """Rows in another order, int64, of which each `batch_size` have about as much work; what fills no step stays last.

    order: of the rows, int64. Rows of the same work to within ALIKE keep their order, and the steps come as the first
    of the rows of each. works: int64 [rows].
    """
    whole = len(order) // batch_size * batch_size
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    alike = np.floor(np.log(np.maximum(works[order[:whole]], 1)) / np.log(ALIKE))
    steps = order[:whole][np.argsort(alike, kind="stable")].reshape(-1, batch_size)
    places = np.sort(place[steps], axis=1)  # inside a step, too, as they came: no place of it has always the most
    return order[np.concatenate([places[np.argsort(places[:, 0])].ravel(), np.arange(whole, len(order))])]


def first_fit(lengths: np.ndarray, capacity: int, copies: np.ndarray | None = None) -> tuple[np.ndarray, int]:
    """The row of each piece, int64, and the number of rows: the first of the open rows with room, else a new one.

    At most OPEN_ROWS rows are open; the fullest one is closed to make place for another. Copies are not looked at: they
    lie as far from each other as their order has them.
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


def best_fit(lengths: np.ndarray, capacity: int, copies: np.ndarray | None = None) -> tuple[np.ndarray, int]:
    """The row of each piece, int64, and the number of rows: longest first, each into the fullest row with room.

    Copies, which would all lie side by side, being of one length, go each into the fullest of those rows that hold the
    fewest of its like, or into a new row as long as there must be more anyway; before all that is shorter than half a
    row, as long as there are such rows. Rows are numbered by their first piece. Ref: arXiv:2404.10830,
    best-fit-decreasing.
    """
    row_of_piece = np.zeros(len(lengths), np.int64)
    rows_by_room: dict[int, list[int]] = {}  # room -> rows that have it
    rooms: list[int] = []  # its keys, sorted
    count, needed, held = 0, -(-int(lengths.sum()) // capacity), Counter[tuple[int, int]]()
    rank = lengths if copies is None else np.where(copies < 0, lengths, np.maximum(lengths, capacity // 2))
    for piece in np.lexsort((-lengths, -rank)).tolist():
        length, copy = int(lengths[piece]), -1 if copies is None else int(copies[piece])
        place, room, row = bisect_left(rooms, length), capacity, count
        if place < len(rooms):
            others, at, index = (0, place, -1) if copy < 0 else _fewest(copy, held, rooms, rows_by_room, place)
            if not others or count >= needed:
                room = rooms[at]
                row = rows_by_room[room].pop(index)
                if not rows_by_room[room]:
                    del rows_by_room[room], rooms[at]
        count += row == count
        row_of_piece[piece] = row
        if copy >= 0:
            held[row, copy] += 1
        room -= length
        if room >= 2:  # no piece is shorter
            if room not in rows_by_room:
                rows_by_room[room] = []
                insort(rooms, room)
            rows_by_room[room].append(row)
    _, first = np.unique(row_of_piece, return_index=True)
    number = np.empty(count, np.int64)
    number[np.argsort(first)] = np.arange(count)
    return number[row_of_piece], count


def _fewest(
    copy: int, held: Counter[tuple[int, int]], rooms: list[int], rows_by_room: dict[int, list[int]], place: int
) -> tuple[int, int, int]:
    """(copies there, its room's place in `rooms`, its index among the rows of that room), of the fullest such row.

    Rows whose room is before `place` are too full; of the others COMPARED_ROWS are looked at, the fullest first.
    """
    places = ((at, -1 - i) for at in range(place, len(rooms)) for i in range(len(rows_by_room[rooms[at]])))
    best = len(held) + 1, place, -1
    for at, index in islice(places, COMPARED_ROWS):
        others = held[rows_by_room[rooms[at]][index], copy]
        if others < best[0]:
            best = others, at, index
        if not others:
            break
    return best


def even_fit(lengths: np.ndarray, capacity: int, works: np.ndarray | None = None) -> tuple[np.ndarray, int]:
    """The row of each piece, int64, and the number of rows: longest first, each into the row with the least work so far
    of those with room. works: of the pieces, int64; None: their lengths.

    It begins with as many rows as there must be, and opens another where none has room. Copies are not looked at: being
    of one length, they mostly go into rows of their own.
    """
    works, count = lengths if works is None else works, -(-int(lengths.sum()) // capacity)
    order = np.argsort(-lengths, kind="stable")
    load, room = [0] * count, [capacity] * count
    row_of_piece = np.empty(len(lengths), np.int64)
    row_of_piece[order] = to_the_least(works[order].tolist(), lengths[order].tolist(), load, room, capacity)
    return row_of_piece, len(load)


PACKINGS: dict[str, Callable[[Corpus], Packing]] = {
    "concat": Concat,
    "first_fit": partial(WholeDocuments, fit=first_fit),
    "best_fit": partial(WholeDocuments, fit=best_fit, spreads=True),
    "balanced": partial(WholeDocuments, fit=even_fit, alike=True),
}
