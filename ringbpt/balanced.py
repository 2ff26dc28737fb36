"""The layout `balanced`: which stretches of a row each device of sp holds, from the lengths of the row's documents.

Every device gets as many tokens, and nearly as many visible pairs, whatever the documents. Of a few ways the first one
that is balanced is taken, in the order of how little they tear apart:

1. the text as it is, each device the next stretch of it;
2. where no document is more than a device's share of the work: whole documents, each to the device with the least work
   so far; the devices' documents stand in one line, of which each device takes its tokens, so that a document is cut at
   most where two neighbours of the ring meet, and one hop is enough;
3. zigzag;
4. the longest documents in chunks of a block or more, dealt out to and fro (which is zigzag, where there is but one),
   their beginnings, shorter than a chunk, and all other documents as in 2;
5. the same with chunks of two halves, one near the document's begin and one near its end, so that all have as much
   work: where one chunk alone was nearly a device's share.

Chunks stand first on a device, so that no block holds two documents there. Documents are numbered anew, in the order of
the line: a kernel skips a block by the least and the greatest number of what is in it.
"""

import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

GOOD = 1.045  # the most loaded device's work over the average, with which nothing better is looked for
# A device has so many chunks, and where that is not enough shorter ones, but none below the largest block of a kernel.
CHUNKS, LARGEST_BLOCK = 8, 1024
# The shares, of those documents that one device could hold, which are cut into chunks all the same.
LONG = (0, 1 / 8, 1 / 3, 1)

Stretch = tuple[int, int]  # places start..stop of the text
Item = tuple[int, int, int]  # work, start, stop
Chunk = tuple[int, int, int]  # work, the starts of its two halves


class Deal(NamedTuple):
    """What the devices hold: stretches of the text, int64 [stretches], device by device.

    number: int32, the new number of each document, by its number in the text; None: as they are.
    """

    start: np.ndarray
    stop: np.ndarray
    number: np.ndarray | None = None

    def order(self) -> np.ndarray:
        """int64 [T]: place i of the laid-out row holds token order[i] of the text."""
        lengths = self.stop - self.start
        return np.arange(lengths.sum()) + np.repeat(self.start - np.cumsum(lengths) + lengths, lengths)


@dataclass(frozen=True)
class Documents:
    """The documents of a row of `length` places, as they stand in the text.

    starts, positions, segments: of its runs, stretches of one segment with consecutive positions, or of padding; seen:
    the visible pairs of all queries before each, and of all. groups: what is not cut without need, a document or those
    that share their beginning: its work, where it starts and stops. padding: the stretches without documents. window:
    how many tokens a token sees; None: all.
    """

    length: int
    window: int | None
    starts: list[int]
    positions: list[int]
    segments: list[int]
    groups: list[Item]
    padding: list[Stretch]
    seen: list[int]
    _halves: dict[tuple[int, int], list[Stretch]] = field(default_factory=dict)

    @staticmethod
    def of(position_T: np.ndarray, segment_T: np.ndarray, last_T: np.ndarray, window: int | None) -> "Documents":
        """Of a row's columns; last is segment where no document shares anything."""
        goes_on = segment_T[1:] == segment_T[:-1]
        goes_on &= (position_T[1:] - position_T[:-1] == 1) | (segment_T[1:] == 0)
        at = np.concatenate([[0], np.flatnonzero(~goes_on) + 1])
        starts, positions, segments, lasts = (x.tolist() for x in (at, position_T[at], segment_T[at], last_T[at]))
        groups, padding, seen, done, reached = list[Item](), list[Stretch](), [0], 0, 0
        stops = [*starts[1:], len(segment_T)]
        for start, stop, position, segment, last in zip(starts, stops, positions, segments, lasts, strict=True):
            if not segment:
                padding.append((start, stop))
                reached = 0
            else:
                own = pairs_seen(position + stop - start, window) - pairs_seen(position, window)
                if segment <= reached:  # part of what came before
                    work, begin, _ = groups.pop()
                    groups.append((work + own, begin, stop))
                else:
                    groups.append((own, start, stop))
                reached, done = max(reached, last), done + own
            seen.append(done)
        return Documents(len(segment_T), window, starts, positions, segments, groups, padding, seen)

    def before(self, places: Sequence[int]) -> list[int]:
        """The visible pairs of all queries before each of these places of the text, which ascend."""
        found, starts, window = list[int](), self.starts, self.window
        run = bisect_right(starts, places[0]) - 1
        while len(found) < len(places):
            # Those of one run: all queries before it, and of its own those of the first `count` tokens of a document.
            end = len(places) if run + 1 == len(starts) else bisect_left(places, starts[run + 1])
            seen, position, real = self.seen[run], self.positions[run], self.segments[run] != 0
            seen -= pairs_seen(position, window) if real else 0
            first = position - starts[run]
            some = places[len(found) : end]
            if not real:
                found += [seen] * len(some)
            elif window is None:
                found += [seen + (first + place) * (first + place + 1) // 2 for place in some]
            else:
                found += [seen + pairs_seen(first + place, window) for place in some]
            run += 1
        return found

    def item(self, start: int, stop: int) -> Item:
        """A stretch with its work."""
        before, behind = self.before((start, stop))
        return behind - before, start, stop

    def chunks(self, group: Item, size: int, mirrored: bool) -> list[Chunk]:
        """The chunks of a group, counted from its end, the least work first; size: even."""
        _, start, stop = group
        half, begin = size // 2, stop - (stop - start) // size * size
        if (start, half) not in self._halves:
            edges = range(begin, stop + 1, half)
            works = (b - a for a, b in pairwise(self.before(edges)))
            self._halves[start, half] = list(zip(works, edges, strict=False))
        halves = self._halves[start, half]
        if mirrored:
            halves = sorted(halves)
            pairs = zip(halves[: len(halves) // 2], reversed(halves), strict=False)
        else:
            pairs = zip(halves[::2], halves[1::2], strict=True)
        return sorted((a + b, first, second) for (a, first), (b, second) in pairs)

    @cached_property
    def by_work(self) -> list[Item]:
        """The groups, the most work first."""
        return sorted(self.groups, reverse=True)

    @cached_property
    def in_order(self) -> bool:
        """Whether each document stands in one place and none before one of a smaller number, as make_row has it."""
        numbers = [number for number in self.segments if number]
        return all(a <= b for a, b in pairwise(numbers))


def to_the_least(
    works: Sequence[int], sizes: Sequence[int], load: list[int], room: list[int], capacity: int = 0
) -> list[int | None]:
    """Where each item goes, the most work first: to the place with the least load so far of those with room for it.

    Where there is none: to a new place, of this capacity; None where that is 0. load and room, of each place, are
    brought up to date.
    """
    found = list[int | None]()
    with_room, full = [(of, place) for place, of in enumerate(load)], list[tuple[int, int]]()
    heapq.heapify(with_room)  # full: a heap too, the most room first
    for work, size in zip(works, sizes, strict=True):
        while full and -full[0][0] >= size:
            place = heapq.heappop(full)[1]
            heapq.heappush(with_room, (load[place], place))
        while with_room and room[with_room[0][1]] < size:
            place = heapq.heappop(with_room)[1]
            heapq.heappush(full, (-room[place], place))
        if not with_room and not capacity:
            found.append(None)
            continue
        if not with_room:
            with_room.append((0, len(load)))
            load.append(0)
            room.append(capacity)
        place = with_room[0][1]
        room[place] -= size
        load[place] += work
        heapq.heapreplace(with_room, (load[place], place))
        found.append(place)
    return found


def pairs_seen(count: Any, window: int | None) -> Any:
    """What the first `count` tokens of a document see, each itself and those before it in the window; int or array."""
    if window is None:
        return count * (count + 1) // 2
    outside = (count - window) * (count > window)
    inside = count - outside
    return inside * (inside + 1) // 2 + outside * window


def deal(documents: Documents, sp: int) -> Deal:
    """How `documents` is dealt out to sp devices; 2 sp divides its length. A pure function of what it is given."""
    least, best = math.inf, None
    for uneven, make in _ways(documents, sp):
        if uneven < least:
            least, best = uneven, make
        if least <= GOOD:
            break
    assert best
    return best()


def _ways(documents: Documents, sp: int) -> Iterator[tuple[float, Callable[[], Deal]]]:
    """(the most loaded device's work over the average, what makes it), what tears apart the least first."""
    half = documents.length // (2 * sp)
    seen = documents.before(range(0, documents.length + 1, half))
    works = [b - a for a, b in pairwise(seen)]
    fair = max(1, seen[-1]) / sp

    def halves(first: np.ndarray, second: np.ndarray) -> Deal:
        begin = half * np.stack([first, second], axis=1).ravel()
        return Deal(begin, begin + half)

    def uneven(pairs: Iterable[tuple[int, int]]) -> float:
        return max(map(sum, pairs)) / fair

    device = np.arange(sp)
    yield uneven(zip(works[::2], works[1::2], strict=True)), lambda: halves(2 * device, 2 * device + 1)
    longer = sum(work > fair for work, *_ in documents.groups)
    if documents.in_order and not longer:
        row = _Row(documents, sp)
        yield max(row.load) / fair, row.deal
    yield uneven(zip(works[:sp], works[: sp - 1 : -1], strict=True)), lambda: halves(device, 2 * sp - 1 - device)
    if not documents.in_order:
        return
    counts = dict.fromkeys(longer + math.ceil((len(documents.groups) - longer) * share) for share in LONG)
    counts.pop(0, None)
    chunk = 1 << max(1, (2 * half // CHUNKS).bit_length() - 1)
    lengths = [chunk]
    while lengths[-1] >= 2 * LARGEST_BLOCK:
        lengths.append(lengths[-1] // 2)
    for length, mirrored in [*((length, False) for length in lengths), (lengths[-1], True)]:
        for count in counts:
            row = _Row(documents, sp, count, length, mirrored)
            yield max(row.load) / fair, row.deal


class _Row:
    """One way: the `count` groups with the most work in chunks, everything else in a line. load: each device's work."""

    def __init__(self, documents: Documents, sp: int, count: int = 0, chunk: int = 0, mirrored: bool = False):
        self._documents, self._sp, self._chunk, self._mirrored = documents, sp, chunk, mirrored
        self.load, self._room = [0] * sp, [documents.length // sp] * sp
        self._chunks: list[list[Chunk]] = [[] for _ in range(sp)]
        rest = self._deal_chunks(documents.by_work[:count])
        rooms = list(self._room)
        self._line = self._line_of(sorted(documents.by_work[count:] + rest, reverse=True), rooms)
        self._parts = self._cut(rooms)
        self._exchange()

    def _deal_chunks(self, groups: list[Item]) -> list[Item]:
        """Deals out the groups' chunks; what remains of them: their beginnings, and chunks without room.

        The chunks with the most work go to and fro, an even number of times, so that each device meets as much at each
        hop; the others, each to the device with the least work so far.
        """
        chunk, sp = self._chunk, self._sp
        rest, others = list[Item](), list[Chunk]()
        for group in groups:
            _, start, stop = group
            chunks = self._documents.chunks(group, chunk, self._mirrored)
            if begin := (stop - start) % chunk:
                rest.append(self._documents.item(start, start + begin))
            few = len(chunks) % (2 * sp)
            others += chunks[:few]
            for number, one in enumerate(chunks[few:]):
                turn, place = divmod(number, sp)
                device = sp - 1 - place if turn % 2 else place
                self._chunks[device].append(one)
                self.load[device] += one[0]
        self._room = [room - chunk * len(own) for room, own in zip(self._room, self._chunks, strict=True)]
        others.sort(reverse=True)
        devices = to_the_least([work for work, *_ in others], [chunk] * len(others), self.load, self._room)
        for r, one in zip(devices, others, strict=True):
            if r is None:
                rest += [self._documents.item(start, start + chunk // 2) for start in one[1:]]
            else:
                self._chunks[r].append(one)
        return rest

    def _line_of(self, items: list[Item], rooms: list[int]) -> list[Item]:
        """These items and padding, device by device, in one line, which is as long as all rooms together: where a
        device's own are too long for its room, its neighbour takes the end of the last.
        """
        own: list[list[Item]] = [[] for _ in range(self._sp)]
        devices = to_the_least(
            [w for w, *_ in items], [stop - start for _, start, stop in items], self.load, self._room
        )
        for r, item in zip(devices, items, strict=True):
            if r is None:
                most = max(range(self._sp), key=self._room.__getitem__)
                self._room[most] -= item[2] - item[1]
            own[most if r is None else r].append(item)
        line, padding, missing = list[Item](), self._documents.padding[::-1], 0
        for r, found in enumerate(own):
            line += found  # the longest where blocks begin, the shortest where one may be cut
            missing += rooms[r] - sum(stop - start for _, start, stop in found)
            while missing > 0 and padding:
                start, stop = padding.pop()
                end = min(stop, start + missing)
                line.append((0, start, end))
                missing -= end - start
                if end < stop:
                    padding.append((end, stop))
        return line

    def _cut(self, rooms: list[int]) -> list[list[Stretch]]:
        """What each device has of the line; its load is corrected where that is not what it was given."""
        parts: list[list[Stretch]] = [[] for _ in range(self._sp)]
        self.load = [sum(work for work, *_ in own) for own in self._chunks]
        device, room = 0, rooms[0]
        for work, start, stop in self._line:
            while start < stop:
                while not room:
                    device, room = device + 1, rooms[device + 1]
                end = min(stop, start + room)
                own = work if end == stop else self._documents.item(start, end)[0]
                parts[device].append((start, end))
                self.load[device] += own
                work, start, room = work - own, end, room - (end - start)
        return parts

    def _exchange(self) -> None:
        """Exchanges chunks, all of one length, of the most and the least loaded device, as long as that helps."""
        load, limit = self.load, GOOD * sum(self.load) / self._sp
        for _ in range(2 * self._sp):
            most, least = load.index(max(load)), load.index(min(load))
            a, b = self._chunks[most], self._chunks[least]
            if load[most] <= limit or not a or not b:
                return
            gap = load[most] - load[least]
            left, i, j = min(
                (abs(gap - 2 * (x - y)), i, j) for i, (x, *_) in enumerate(a) for j, (y, *_) in enumerate(b)
            )
            if left >= gap:
                return
            moved = a[i][0] - b[j][0]
            a[i], b[j] = b[j], a[i]
            load[most] -= moved
            load[least] += moved

    def deal(self) -> Deal:
        """Groups of which nothing is in the line are numbered first, the others as they come in it."""
        begins = [begin for _, begin, _ in self._documents.groups]
        group_of = [bisect_right(begins, start) - 1 for work, start, _ in self._line if work]
        lined = dict.fromkeys(group_of)
        order = [group for group in range(len(begins)) if group not in lined] + list(lined)
        place = {group: number for number, group in enumerate(order)}
        found = list[Stretch]()
        for chunks, parts in zip(self._chunks, self._parts, strict=True):
            here = sorted((place[bisect_right(begins, a) - 1], min(a, b), max(a, b)) for _, a, b in chunks)
            found += [(at, at + self._chunk // 2) for _, *both in here for at in both] + parts
        flat = np.array(found, np.int64)
        return Deal(flat[:, 0], flat[:, 1], self._numbers(begins, place))

    def _numbers(self, begins: list[int], place: dict[int, int]) -> np.ndarray:
        """The new number of each document, by its number in the text: by its group's place, then as they were."""
        runs = zip(self._documents.segments, self._documents.starts, strict=True)
        keys = {segment: place[bisect_right(begins, start) - 1] for segment, start in runs if segment}
        number = np.zeros(max(keys) + 1, np.int32)
        number[sorted(keys, key=lambda segment: (keys[segment], segment))] = np.arange(1, len(keys) + 1)
        return number
