"""The layout `balanced`: which stretches of a row each device of sp holds, from the lengths of the row's documents.

Every device gets as many tokens, and nearly as many visible pairs, whatever the documents. Of a few ways the first one
that is balanced is taken, in the order of how little they tear apart:

1. the text as it is, each device the next stretch of it;
2. where no document is more than two devices' share of the work: the documents in another order, of which each device
   takes its tokens, so that a document is cut at most where two neighbours of the ring meet, and one hop is enough
   (neighbours.py);
3. zigzag;
4. the longest documents in chunks of a block or more, dealt out to and fro (which is zigzag, where there is but one),
   their beginnings, shorter than a chunk, and all other documents whole, each to the device with the least work so far;
   they stand in one line, of which each device takes its tokens;
5. the same with chunks of two halves, one near the document's begin and one near its end, so that all have as much
   work: where one chunk alone was nearly a device's share.

Chunks stand first on a device, so that no block holds two documents there. Documents are numbered anew, in the order of
the line: a kernel skips a block by the least and the greatest number of what is in it.

All rows of a batch are planned at once, each as it would be alone, in arrays: the rows are one text, of which row b has
the places b * length..(b + 1) * length and the devices b * sp..(b + 1) * sp.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from heapq import heapify, heappop, heappush, heapreplace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ringbpt.neighbours import balanced_order

GOOD = 1.045  # the most loaded device's work over the average, with which nothing better is looked for
# A device has so many chunks, and where that is not enough shorter ones, but none below the largest block of a kernel.
CHUNKS, LARGEST_BLOCK = 8, 1024
# Of those documents that one device could hold, so many are cut into chunks all the same, and where that is not enough
# all of them: (their share, tried where the heaviest chunk is at most so much of a device's work; with a heavier one it
# hardly ever is enough).
LONG = ((0, 0.75), (1 / 8, 0.9), (1 / 3, 0.97))
_NONE = np.empty(0, np.int64)


class Deal(NamedTuple):
    """What the devices hold: stretches of the text, int64 [stretches], row by row, device by device.

    start: place of a row. number: int32 [rows, 1 + the greatest number of a document], the documents' new numbers.
    """

    start: np.ndarray
    size: np.ndarray
    number: np.ndarray

    def order(self) -> np.ndarray:
        """int64 [rows, T]: place i of a laid-out row holds its token order[i] of the text."""
        rows, ends = len(self.number), np.cumsum(self.size)
        length = ends[-1] // rows
        begins = (ends - self.size) % length
        return np.arange(length) + np.repeat(self.start - begins, self.size).reshape(rows, length)


class Stretches(NamedTuple):
    """Of the text, int64 [stretches]: where each starts and stops, and the device that holds it, in its order."""

    start: np.ndarray
    stop: np.ndarray
    device: np.ndarray

    def where(self, some: np.ndarray) -> "Stretches":
        """Those, by a bool or a number of each."""
        return Stretches(*(x[some] for x in self))


def _joined(parts: Sequence[Stretches]) -> Stretches:
    return Stretches(*map(np.concatenate, zip(*parts, strict=True)))


@dataclass(frozen=True)
class Documents:
    """The documents of `rows` rows of `length` places, as they stand in the text; all arrays int64.

    starts, positions, segments: of its runs, stretches of one segment with consecutive positions, or of padding; seen:
    the visible pairs of all queries before each. begins, ends: of its groups, which are not cut without need: a
    document or those that share their beginning. padding: starts and stops of the stretches without documents. window:
    how many tokens a token sees; None: all.
    """

    rows: int
    length: int
    window: int | None
    starts: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    seen: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    padding: tuple[np.ndarray, np.ndarray]

    @staticmethod
    def of(position_BT: np.ndarray, segment_BT: np.ndarray, last_BT: np.ndarray, window: int | None) -> "Documents":
        """Of the rows' columns; last is segment where no document shares anything."""
        rows, length = segment_BT.shape
        columns = zip(position_BT, segment_BT, strict=True)
        starts = np.concatenate([row * length + _starts(*own) for row, own in enumerate(columns)])
        positions, segments, lasts = (x.ravel()[starts].astype(np.int64) for x in (position_BT, segment_BT, last_BT))
        real, stops = segments != 0, np.append(starts[1:], rows * length)
        works = (pairs_seen(positions + stops - starts, window) - pairs_seen(positions, window)) * real
        # A run is part of what came before where its number is not beyond the last of that, in this row and since the
        # last padding.
        apart = np.cumsum(~real | (starts % length == 0)) << 32
        alone = ~real
        alone[0] = True
        alone[1:] |= (segments + apart)[1:] > np.maximum.accumulate(lasts + apart)[:-1]
        begins, real = starts[alone], real[alone]
        ends = np.append(begins[1:], rows * length)
        seen = np.cumsum(works) - works
        groups, padding = (begins[real], ends[real]), (begins[~real], ends[~real])
        return Documents(rows, length, window, starts, positions, segments, seen, *groups, padding)

    def before(self, places: np.ndarray) -> np.ndarray:
        """The visible pairs of all queries before each of these places of the text."""
        run = np.searchsorted(self.starts, places, "right") - 1
        first, real, base = self._of_run
        return base[run] + pairs_seen((places + first[run]) * real[run], self.window)

    @cached_property
    def _of_run(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What turns a place into its position, whether it has one, and what `before` counts from."""
        real = self.segments != 0
        return self.positions - self.starts, real, self.seen - pairs_seen(self.positions * real, self.window)

    def work(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """The visible pairs of the queries of each of these stretches."""
        return self.before(stop) - self.before(start)

    def heads(self, begins: np.ndarray, documents: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The visible pairs of so many first tokens of these, numbered, of groups that begin there."""
        return self.work(begins[documents], begins[documents] + counts)

    @cached_property
    def works(self) -> np.ndarray:
        """Of the groups."""
        return self.work(self.begins, self.ends)

    def row_of(self, places: np.ndarray) -> np.ndarray:
        """The row in which each of these places is."""
        return places // self.length

    def group_of(self, places: np.ndarray) -> np.ndarray:
        """The number of the group that each of these places is part of; none of them is padding."""
        return np.searchsorted(self.begins, places, "right") - 1

    @cached_property
    def by_work(self) -> np.ndarray:
        """The groups' numbers, row by row, the most work first."""
        return np.lexsort((-self.works, self.row_of(self.begins)))

    @cached_property
    def in_order(self) -> np.ndarray:
        """bool [rows]: whether each document stands in one place and none before one of a smaller number, as make_row
        has it.
        """
        real = self.segments != 0
        number, row = self.segments[real], self.row_of(self.starts[real])
        wrong = (number[1:] < number[:-1]) & (row[1:] == row[:-1])
        return np.bincount(row[1:][wrong], minlength=self.rows) == 0

    def chunks(self, groups: np.ndarray, size: int, mirrored: bool) -> tuple[np.ndarray, ...]:
        """The chunks of these groups, counted from the end of each, group by group, the least work first; size: even.

        The starts of their halves, [chunks, 2], their work, which of its group each is, and of how many.
        """
        half, number = size // 2, (self.ends - self.begins)[groups] // size
        group = np.repeat(np.arange(len(groups)), number)
        of, before = number[group], (np.cumsum(number) - number)[group]
        nth = np.arange(len(group)) - before
        halves = (self.ends[groups][group] - size * (of - nth))[:, None] + [0, half]
        if mirrored:  # a group's half with the least work and that with the most, and so on
            works = self.work(halves, halves + half)
            ascending = halves.ravel()[np.lexsort((works.ravel(), np.repeat(group, 2)))]
            halves = ascending[2 * before[:, None] + np.stack([nth, 2 * of - 1 - nth], axis=1)]
            works = self.work(halves, halves + half).sum(axis=1)
        else:
            works = self.work(halves[:, 0], halves[:, 0] + size)
        ascending = np.lexsort((works, group))
        return halves[ascending], works[ascending], nth, of


def _starts(position_T: np.ndarray, segment_T: np.ndarray) -> np.ndarray:
    """The places of a row at which a run starts."""
    goes_on = position_T[1:] - position_T[:-1] == 1
    goes_on |= segment_T[1:] == 0
    goes_on &= segment_T[1:] == segment_T[:-1]
    return np.concatenate([[0], 1 + np.flatnonzero(~goes_on)])


def to_the_least(
    works: Sequence[int], sizes: Sequence[int], load: list[int], room: list[int], capacity: int = 0, over: bool = False
) -> list[int]:
    """Where each item goes, the most work first: to the place with the least load so far of those with room for it.

    Where there is none: to a new place, of this capacity; where that is 0, to that with the most room if `over`, and
    else nowhere, -1. load and room, of each place, are brought up to date.
    """
    found = list[int]()
    # Two heaps, the least load first and the most room first. A number and its place are one integer, place + number *
    # places: that is compared faster than a pair.
    places = len(load) + len(works)
    with_room, full = [place + of * places for place, of in enumerate(load)], list[int]()
    heapify(with_room)
    for work, size in zip(works, sizes, strict=True):
        while full and -(full[0] // places) >= size:
            place = heappop(full) % places
            heappush(with_room, place + load[place] * places)
        while with_room and room[place := with_room[0] % places] < size:
            heappop(with_room)
            heappush(full, place - room[place] * places)
        if with_room:
            heapreplace(with_room, place + (load[place] + work) * places)
        elif capacity:
            place = len(load)
            load.append(0)
            room.append(capacity)
            with_room.append(place + work * places)
        elif over:
            place = full[0] % places
            heapreplace(full, place - (room[place] - size) * places)
        else:
            found.append(-1)
            continue
        load[place] += work
        room[place] -= size
        found.append(place)
    return found


def pairs_seen(count: Any, window: int | None) -> Any:
    """What the first `count` tokens of a document see, each itself and those before it in the window; int or array."""
    if window is None:
        return count * (count + 1) >> 1
    outside = (count - window) * (count > window)
    inside = count - outside
    return (inside * (inside + 1) >> 1) + outside * window


def deal(documents: Documents, sp: int) -> Deal:
    """How rows are dealt out to sp devices; 2 sp divides their length. A pure function of each row."""
    rows = documents.rows
    least_B, open_B = np.full(rows, np.inf), np.ones(rows, bool)
    ways, of_row = list[_Halves | _Line](), np.zeros(rows, np.int64)
    for way in _ways(documents, sp, open_B):
        uneven_B = sp * way.load_BR.max(axis=1) / np.maximum(way.load_BR.sum(axis=1), 1)
        better_B = way.rows_B & (uneven_B < least_B)
        least_B[better_B], of_row[better_B] = uneven_B[better_B], len(ways)
        open_B[:] = least_B > GOOD
        ways.append(way)
    number = np.tile(np.arange(1 + documents.segments.max(initial=0), dtype=np.int32), (rows, 1))
    found = list[Stretches]()
    for which, way in enumerate(ways):
        if (chosen_B := of_row == which).any():
            found.append(way.deal(chosen_B, number))
    held = _joined(found)
    held = held.where(np.argsort(held.device, kind="stable"))
    return Deal(held.start % documents.length, held.stop - held.start, number)


def _ways(documents: Documents, sp: int, open_B: np.ndarray) -> Iterator["_Halves | _Line"]:
    """The ways in which the rows can be dealt out that are still open, what tears them apart the least first."""
    device, half = np.arange(sp), documents.length // (2 * sp)
    yield _Halves(documents, sp, open_B, 2 * device, 2 * device + 1)
    row = documents.row_of(documents.begins)
    work_B = np.bincount(row, documents.works, documents.rows)
    groups_B = np.bincount(row, minlength=documents.rows)
    longer_B = np.bincount(row[documents.works > (work_B / sp)[row]], minlength=documents.rows)
    if (rows_B := open_B & documents.in_order).any():
        yield _Whole(documents, sp, rows_B)
    yield _Halves(documents, sp, open_B, device, 2 * sp - 1 - device)
    lengths = [1 << max(1, (2 * half // CHUNKS).bit_length() - 1)]
    while lengths[-1] >= 2 * LARGEST_BLOCK:
        lengths.append(lengths[-1] // 2)
    for length, mirrored in [*((length, False) for length in lengths), (lengths[-1], True)]:
        if not open_B.any():
            return
        heaviest_B, counts = 0 * work_B, [groups_B]
        if not mirrored:  # a document's last chunk sees the most
            last = np.maximum(documents.ends - length, documents.begins)
            np.maximum.at(heaviest_B, row, sp * documents.work(last, documents.ends))
        for share, most in reversed(LONG):
            count_B = longer_B + np.ceil((groups_B - longer_B) * share).astype(np.int64)
            counts.insert(0, np.where(heaviest_B <= most * work_B, count_B, counts[0]))
        for before_B, count_B in pairwise([0 * groups_B, *counts]):
            rows_B = open_B & documents.in_order & (count_B != before_B)
            if rows_B.any():
                yield _Line(documents, sp, rows_B, count_B, length, mirrored)


class _Halves:
    """One way: each device two of a row's 2 sp equal parts. load_BR: each device's work, int64 [rows, sp]."""

    def __init__(self, documents: Documents, sp: int, rows_B: np.ndarray, first: np.ndarray, second: np.ndarray):
        self.rows_B, self._half = rows_B.copy(), documents.length // (2 * sp)
        seen = documents.before(np.arange(0, documents.rows * documents.length + 1, self._half))
        work_BP = (seen[1:] - seen[:-1]).reshape(documents.rows, 2 * sp)
        self.load_BR = work_BP[:, first] + work_BP[:, second]
        self._parts = np.stack([first, second], axis=1).ravel()

    def deal(self, rows_B: np.ndarray, number: np.ndarray) -> Stretches:
        """What the devices of these rows hold; the documents keep their numbers."""
        row, sp = np.flatnonzero(rows_B)[:, None], self.load_BR.shape[1]
        start = self._half * (2 * sp * row + self._parts)
        device = sp * row + np.repeat(np.arange(sp), 2)
        return Stretches(start.ravel(), start.ravel() + self._half, device.ravel())


class _Line:
    """One way: of each row, the `count` groups with the most work in chunks, everything else in a line.

    rows_B: of which rows; load_BR: each device's work, int64 [rows, sp].
    """

    def __init__(
        self, documents: Documents, sp: int, rows_B: np.ndarray, count_B: np.ndarray, chunk: int = 2,
        mirrored: bool = False,
    ):  # fmt: skip
        self.rows_B, self._documents, self._sp, self._half = rows_B.copy(), documents, sp, chunk // 2
        row = documents.row_of(documents.begins[documents.by_work])
        groups, row = documents.by_work[rows_B[row]], row[rows_B[row]]
        long = np.arange(len(row)) - np.searchsorted(row, row) < count_B[row]
        long, short = groups[long], groups[~long]
        begin, end = documents.begins[long], documents.ends[long]
        left = self._deal_chunks(*documents.chunks(long, chunk, mirrored))
        start = np.concatenate([documents.begins[short], begin, left])
        stop = np.concatenate([documents.ends[short], begin + (end - begin) % chunk, left + self._half])
        some = stop > start
        self._put_in_line(start[some], stop[some])
        self._exchange()

    def _sums(self, device: np.ndarray, of: np.ndarray | None = None) -> np.ndarray:
        """int64 [rows, sp]: the sum over what each device has; of nothing: how many that is."""
        devices = self._documents.rows * self._sp
        return np.bincount(device, of, devices).astype(np.int64).reshape(-1, self._sp)  # exact: less than 2 ** 53

    def _deal_chunks(self, halves: np.ndarray, work: np.ndarray, nth: np.ndarray, of: np.ndarray) -> np.ndarray:
        """Deals out Documents.chunks; returns the halves of those for which there is no room.

        Those of a group with the most work go to and fro, an even number of times, so that each device meets as much
        at each hop; the others, each to the device with the least work so far.
        """
        sp, size, row = self._sp, 2 * self._half, self._documents.row_of(halves[:, 0])
        turn, place = np.divmod(nth - of % (2 * sp), sp)
        device, others = sp * row + np.where(turn & 1, sp - 1 - place, place), turn < 0
        load_BR = self._sums(device[~others], work[~others])
        room_BR = self._documents.length // sp - size * self._sums(device[~others])
        order = np.flatnonzero(others)[np.lexsort((-work[others], row[others]))]
        device[order] = self._to_the_least(row[order], work[order], np.full(len(order), size), load_BR, room_BR)
        dealt = device >= 0
        self._halves, self._work, self._device = halves[dealt], work[dealt], device[dealt]
        return halves[~dealt].ravel()

    def _to_the_least(
        self, row: np.ndarray, works: np.ndarray, sizes: np.ndarray, load_BR: np.ndarray, room_BR: np.ndarray,
        over: bool = False,
    ) -> np.ndarray:  # fmt: skip
        """The device of each of these stretches, row by row, the most work first, by to_the_least; -1: nowhere."""
        edges, found = np.searchsorted(row, np.arange(len(load_BR) + 1)), np.empty(len(row), np.int64)
        for number in np.flatnonzero(edges[1:] > edges[:-1]):
            own = slice(*edges[number : number + 2])
            load, room = load_BR[number].tolist(), room_BR[number].tolist()
            device = np.array(to_the_least(works[own].tolist(), sizes[own].tolist(), load, room, over=over))
            found[own] = np.where(device < 0, -1, number * self._sp + device)
        return found

    def _put_in_line(self, start: np.ndarray, stop: np.ndarray) -> None:
        """Puts these stretches and padding in one line, device by device, and cuts it: each device gets what it has
        room for. Where its own are too long, its neighbour takes the end of the last; padding fills up the others.
        """
        documents, sp = self._documents, self._sp
        works = documents.work(start, stop)
        order = np.lexsort((-works, documents.row_of(start)))
        start, stop, works = start[order], stop[order], works[order]
        load_BR = self._sums(self._device, self._work)
        room_BR = documents.length // sp - 2 * self._half * self._sums(self._device)
        room_BR[~self.rows_B] = 0
        device = self._to_the_least(documents.row_of(start), works, stop - start, load_BR, room_BR, over=True)
        # So much padding stands before the end of each device.
        behind_BR = np.cumsum(room_BR - self._sums(device, stop - start), axis=1)
        filled_BR = np.clip(np.maximum.accumulate(behind_BR, axis=1), 0, behind_BR[:, -1:])
        filled_BR += (np.cumsum(behind_BR[:, -1]) - behind_BR[:, -1])[:, None]
        some = self.rows_B[documents.row_of(documents.padding[0])]
        padding = _cut(documents.padding[0][some], documents.padding[1][some], filled_BR.ravel())
        # The longest stand where blocks begin, the shortest where one may be cut.
        order = np.argsort(np.concatenate([2 * device, 2 * padding.device + 1]), kind="stable")
        start, stop = np.concatenate([start, padding.start])[order], np.concatenate([stop, padding.stop])[order]
        self._parts = _cut(start, stop, np.cumsum(room_BR))
        self._seen = documents.work(self._parts.start, self._parts.stop)
        self.load_BR = load_BR + self._sums(self._parts.device, self._seen)

    def _exchange(self) -> None:
        """Exchanges chunks, all of one length, of the most and the least loaded device, as long as that helps."""
        limit_B = GOOD * self.load_BR.sum(axis=1) / self._sp
        edges = np.searchsorted(self._documents.row_of(self._halves[:, 0]), np.arange(len(limit_B) + 1))
        for row in np.flatnonzero(self.rows_B & (self.load_BR.max(axis=1) > limit_B)):
            own = slice(*edges[row : row + 2])
            load, work, device, first = self.load_BR[row], self._work[own], self._device[own], row * self._sp
            for _ in range(2 * self._sp):
                most, least = load.argmax(), load.argmin()
                a, b = (device == first + most).nonzero()[0], (device == first + least).nonzero()[0]
                if load[most] <= limit_B[row] or not len(a) or not len(b):
                    break
                half = (load[most] - load[least]) / 2  # what were best moved
                left = abs(work[a][:, None] - work[b] - half)
                i, j = divmod(int(left.argmin()), len(b))
                if left[i, j] >= half:
                    break
                a, b = a[i], b[j]
                device[a], device[b] = device[b], device[a]
                load[most] -= work[a] - work[b]
                load[least] += work[a] - work[b]

    def deal(self, rows_B: np.ndarray, number: np.ndarray) -> Stretches:
        """What the devices of these rows hold; the new numbers of their documents are written into `number`.

        Groups of which nothing is in the line are numbered first, the others as they come in it.
        """
        documents = self._documents
        lined = documents.group_of(self._parts.start[self._seen > 0])
        first = np.full(len(documents.begins), -1)
        first[lined[::-1]] = np.arange(len(lined))[::-1]
        halves = np.sort(self._halves, axis=1)
        order = np.lexsort((halves[:, 0], first[documents.group_of(halves[:, 0])]))
        halves, device = halves[order].ravel(), np.repeat(self._device[order], 2)
        held = [Stretches(halves, halves + self._half, device), self._parts]

        runs = np.flatnonzero((documents.segments != 0) & rows_B[documents.row_of(documents.starts)])
        row, segment = documents.row_of(documents.starts[runs]), documents.segments[runs]
        order = np.lexsort((segment, first[documents.group_of(documents.starts[runs])], row))
        row, segment = row[order], segment[order]
        new = np.append(True, (row[1:] != row[:-1]) | (segment[1:] != segment[:-1]))
        row, segment = row[new], segment[new]
        number[row, segment] = 1 + np.arange(len(row)) - np.searchsorted(row, row)
        return _joined([one.where(rows_B[one.device // self._sp]) for one in held])


class _Whole(_Line):
    """One way: of each row, whole documents in an order of neighbours.py, and as much padding behind each device's."""

    def __init__(self, documents: Documents, sp: int, rows_B: np.ndarray):
        self.rows_B, self._documents, self._sp, self._half = rows_B.copy(), documents, sp, 1
        self._halves, self._device = _NONE.reshape(0, 2), _NONE
        row, sizes, room = documents.row_of(documents.begins), documents.ends - documents.begins, documents.length // sp
        filled_BR, orders = np.zeros((documents.rows, sp), np.int64), [_NONE]
        for number in np.flatnonzero(rows_B):
            own = np.flatnonzero(row == number)
            heads, tokens = partial(documents.heads, documents.begins[own]), sizes[own].sum()
            share = -(-tokens // sp)
            order = balanced_order(sizes[own], documents.works[own], heads, share, sp, GOOD)
            self.rows_B[number] = order is not None
            if order is not None:
                orders.append(own[order])
                filled_BR[number] = np.clip(tokens - share * np.arange(sp), 0, share)
        group, some = np.concatenate(orders), self.rows_B[documents.row_of(documents.padding[0])]
        padding_BR = (room - filled_BR) * self.rows_B[:, None]
        self._parts = _joined([
            _cut(documents.begins[group], documents.ends[group], np.cumsum(filled_BR)),
            _cut(documents.padding[0][some], documents.padding[1][some], np.cumsum(padding_BR)),
        ])  # fmt: skip
        self._seen = documents.work(self._parts.start, self._parts.stop)
        self.load_BR = self._sums(self._parts.device, self._seen)


def _cut(start: np.ndarray, stop: np.ndarray, edges: np.ndarray) -> Stretches:
    """Stretches that stand in a line, cut at these places of it, each of which is the end of what a device holds."""
    ends = np.cumsum(stop - start)
    places = np.sort(np.concatenate([[0], ends, edges]))
    some = places[1:] > places[:-1]
    begin, end = places[:-1][some], places[1:][some]
    moved = (stop - ends)[np.searchsorted(ends, begin, "right")]
    return Stretches(begin + moved, end + moved, np.searchsorted(edges, begin, "right"))
