"""Batches made ahead of the steps that take them, and how long a step had to wait for one."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

AHEAD = 2  # batches on the devices besides the one that is worked on; they are small beside the activations

T = TypeVar("T")


class Delivery(Generic[T]):
    """Iterates (step, make(step)) over some steps, while a thread makes the next ones.

    waited: seconds that the taker has stood still since `take_waited` was last asked. An exception of `make` is
    raised where its batch would have come.
    """

    def __init__(self, make: Callable[[int], T], steps: range):
        self._make, self._steps, self._waited = make, steps, 0.0

    def __iter__(self) -> Iterator[tuple[int, T]]:
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            waiting: deque[Future[T]] = deque()
            try:
                for number, step in enumerate(self._steps):
                    while len(waiting) <= AHEAD and number + len(waiting) < len(self._steps):
                        waiting.append(pool.submit(self._make, self._steps[number + len(waiting)]))
                    begin = time.perf_counter()
                    batch = waiting.popleft().result()
                    self._waited += time.perf_counter() - begin
                    yield step, batch
            finally:
                pool.shutdown(cancel_futures=True)

    def take_waited(self) -> float:
        """Seconds waited since this was last asked."""
        seconds, self._waited = self._waited, 0.0
        return seconds
