"""An order of a row's documents in which the row, cut into as many tokens for each device, is balanced.

Nothing else is torn apart: a document that is cut is on two devices, neighbours of the ring, and one hop is enough.

A token of a document is the more work the further behind it stands, so an order decides what each device gets. Device
by device, those that it has whole and the one that is cut at its end are chosen so that its tokens and its work come
out nearly together: long ones first, as long as there are short ones to fill up with. Then documents change places,
two at a time, where that relieves the device with the most work.
"""

from bisect import bisect_left
from collections.abc import Callable

import numpy as np

# (documents, of each a number of its tokens) -> the work of those first tokens: int64 arrays of one shape.
Heads = Callable[[np.ndarray, np.ndarray], np.ndarray]
# What a long document leaves of a device's work, over the average work of as many tokens: no less than this, or no
# others are short enough; tried one after the other. With less than CUT it is cut.
LEAST, CUT = (0.3, 0.25, 0.35, 0.2), 0.5
FEWEST, TIGHT = 4, 0.98  # documents a device, or there is no choice; how near to what is impossible is tried
# How many exchanges, and one more for each four devices. Each is the best of about so many of a document of the most
# loaded device with one of it or of so many before and after it; where none is good of more. With HOPELESS
# times the average it is past helping.
EXCHANGES, TRIED, AROUND, HOPELESS = 6, 128, 2, 1.5


def balanced_order(
    sizes: np.ndarray, works: np.ndarray, heads: Heads, room: int, sp: int, good: float
) -> np.ndarray | None:
    """int64: the documents in an order in which no device, each with room for so many tokens, has more than `good`
    times the average work; None where none was found.

    sizes, works: of the documents, in tokens and in visible pairs, int64.
    """
    if len(sizes) < FEWEST * sp or sizes.max() > room:
        return None
    # What fills up the two devices that have the longest is at least so much work, and hardly ever so little.
    ascending = np.argsort(sizes)
    filling = ascending[np.cumsum(sizes[ascending]) <= 2 * room - sizes.max()]
    if works.max() + works[filling].sum() > TIGHT * 2 * good * works.sum() / sp:
        return None
    for least in LEAST:
        order = _Filled(sizes.tolist(), works.tolist(), heads, room, sp, least).order
        if (found := _exchanged(np.array(order), sizes, works, heads, room, sp, good)) is not None:
            return found
    return None


class _Filled:
    """`order`: the documents, device by device."""

    def __init__(self, sizes: list[int], works: list[int], heads: Heads, room: int, sp: int, least: float):
        self._sizes, self._works, self._least = sizes, works, least
        length, total = sum(sizes), sum(works)
        self._average, self._share = total / length, total / sp
        self._left = sorted(range(len(sizes)), key=sizes.__getitem__)
        self._left_sizes = [sizes[document] for document in self._left]
        self.order, placed, coming, coming_work = list[int](), 0.0, 0, 0
        ends = [min(room * device, length) for device in range(sp + 1)]
        for device in range(sp - 1):
            target = (total - placed) / (sp - device)
            tokens, work = ends[device + 1] - ends[device] - coming, target - coming_work
            cut, part, estimate = self._cut(tokens, work, ends[device + 2] - ends[device + 1])
            if cut is None:
                tokens, work = self._whole(tokens, work)
            tokens, work, begun = self._fill(tokens - part, work - estimate, cut is not None)
            document = begun if cut is None else cut
            coming = coming_work = 0
            if document is not None:
                part = min(max(0, part + tokens), sizes[document])
                head = int(heads(np.array(document), np.array(part)))
                self.order.append(document)
                work += estimate - head
                coming, coming_work = sizes[document] - part, works[document] - head
            placed += target - work
        self.order += self._left

    def _take(self, i: int) -> int:
        del self._left_sizes[i]
        return self._left.pop(i)

    def _nearest(self, size: float) -> int:
        """Which of those that are left is nearest to this long."""
        left = self._left_sizes
        i = min(bisect_left(left, size), len(left) - 1)
        return i - 1 if i and size - left[i - 1] < left[i] - size else i

    def _long(self, tokens: int, work: float, size: int, own: float) -> bool:
        """Whether what is left of a device's tokens and work, had it this one of a document, is too little work."""
        return work - own < self._least * self._average * (tokens - size)

    def _cut(self, tokens: int, work: float, following: int) -> tuple[int | None, int, float]:
        """The longest document that is to be cut at the end of this device, how many of its tokens are best before the
        cut, and about how much work they are; (None, 0, 0) where no document has to be cut, or none can be.
        """
        for i in range(len(self._left) - 1, -1, -1):
            size, own = self._left_sizes[i], self._works[self._left[i]]
            if self._share - own >= CUT * self._average * (following - size):
                break
            # What is left of both devices is to be as much work a token.
            few, many = max(0, size - following), min(size, tokens)
            while many - few > 16:
                part = (few + many) // 2
                head = own * (part / size) ** 2
                here, there = (work - head, tokens - part), (self._share - own + head, following - size + part)
                few, many = (part, many) if here[0] * there[1] > there[0] * here[1] else (few, part)
            head = own * (few / size) ** 2
            if few < min(size, tokens) and not self._long(tokens, work, few, head):
                return self._take(i), few, head
        return None, 0, 0.0

    def _whole(self, tokens: int, work: float) -> tuple[int, float]:
        """Gives the device the longest document that it can have whole; what is left of its tokens and its work."""
        for i in range(len(self._left) - 1, -1, -1):
            size, own = self._left_sizes[i], self._works[self._left[i]]
            if own <= self._average * size:
                break
            if size < tokens and not self._long(tokens, work, size, own):
                self.order.append(self._take(i))
                return tokens - size, work - own
        return tokens, work

    def _fill(self, tokens: int, work: float, has_cut: bool) -> tuple[int, float, int | None]:
        """Gives the device documents of the length of which all its tokens would be the work that it lacks; what is
        left of both, and, where it has none that is cut yet, the one for which there is no room, taken already.
        """
        while self._left and tokens > 0:
            i = self._nearest(2 * work / tokens)
            if self._left_sizes[i] > tokens:
                if not has_cut:
                    return tokens, work, self._take(i)
                i = self._nearest(tokens)
                if self._left_sizes[i] >= 2 * tokens:
                    break
            self.order.append(self._take(i))
            tokens, work = tokens - self._sizes[self.order[-1]], work - self._works[self.order[-1]]
        return tokens, work, None


def _exchanged(
    order: np.ndarray, sizes: np.ndarray, works: np.ndarray, heads: Heads, room: int, sp: int, good: float
) -> np.ndarray | None:
    """This order after a few exchanges, with which no device has more than `good` times the average; None: they are not
    enough.
    """
    edges, mean = room * np.arange(1, sp), works.sum() / sp
    load = _loads(order[None], sizes, works, heads, edges)[0]
    most, exchanges = TRIED, EXCHANGES + sp // 4
    for turn in range(1 + exchanges):
        worst = int(load.argmax())
        if load[worst] <= good * mean:
            return order
        if load[worst] > HOPELESS * mean or turn == exchanges:
            break
        ends = np.cumsum(sizes[order])
        begins = ends - sizes[order]
        first, last = np.searchsorted(ends, room * np.array([worst - AROUND, worst]), "right")
        until, after = np.searchsorted(begins, room * np.array([worst + 1, worst + 1 + AROUND]))
        near = order[first:after]
        a, b = (x.ravel() for x in np.meshgrid(np.arange(last, until) - first, np.arange(after - first)))
        other = np.flatnonzero(sizes[near[a]] != sizes[near[b]])
        apart = 1 + len(other) // most
        a, b = a[other[::apart]], b[other[::apart]]
        tried = np.tile(near, (1 + len(a), 1))
        rows = np.arange(1, 1 + len(a))
        tried[rows, a], tried[rows, b] = near[b], near[a]
        inside = edges[(edges > begins[first]) & (edges < ends[after - 1])] - begins[first]
        change = _loads(tried, sizes, works, heads, inside)
        own = int(begins[first] // room)
        loads = (load[own : own + change.shape[1]] + change - change[0]) / mean
        cost = (np.maximum(0, loads - good + 0.005) ** 2).sum(axis=1) + 1e-3 * ((loads - 1) ** 2).sum(axis=1)
        best = int(cost.argmin())
        if best == 0 and apart == 1:
            break
        most = TRIED if best else 4 * most
        order = np.concatenate([order[:first], tried[best], order[after:]])
        load[own : own + change.shape[1]] += change[best] - change[0]
    return None


def _loads(orders: np.ndarray, sizes: np.ndarray, works: np.ndarray, heads: Heads, edges: np.ndarray) -> np.ndarray:
    """int64 [orders, 1 + edges]: of documents in several orders, the work before, between and after these places."""
    ends, until = np.cumsum(sizes[orders], axis=1), np.cumsum(works[orders], axis=1)
    # The documents that the edges cut; where an edge is behind all of them, the last.
    which = np.minimum((ends[:, None] <= edges[:, None]).sum(axis=2), orders.shape[1] - 1)
    cut, end, whole = (np.take_along_axis(x, which, axis=1) for x in (orders, ends, until))
    before = whole - works[cut] + heads(cut, sizes[cut] - np.maximum(end - edges, 0))
    return np.diff(before, axis=1, prepend=0, append=until[:, -1:])
