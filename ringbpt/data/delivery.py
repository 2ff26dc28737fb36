"""Batches made ahead of the steps that take them, and how long a step had to wait for one."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, Generic, TypeVar

import jax

AHEAD = 2  # batches on the devices besides the one that is worked on; they are small beside the activations

T = TypeVar("T")


class Delivery(Generic[T]):
    """A source of batches that depend on their step alone: batch(step, state) of some steps, in order, made ahead.

    A thread calls make(step) for the next ones meanwhile. take_waited tells how long the taker has stood still. An
    exception of `make` is raised where its batch would have come.
    """

    def __init__(self, make: Callable[[int], T], steps: range):
        self._make, self._steps, self._waited = make, iter(steps), 0.0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._waiting: deque[tuple[int, Future[T]]] = deque()

    def batch(self, step: int, state: Any = None) -> T:
        """The batch of `step`, the one after the step before.

        state: of the training, arrays that the devices may still be at: meanwhile a batch that is late keeps nobody
        waiting.
        """
        for next_step in islice(self._steps, 1 + AHEAD - len(self._waiting)):
            self._waiting.append((next_step, self._pool.submit(self._make, next_step)))
        made_for, future = self._waiting.popleft()
        assert made_for == step, f"batch {step} was asked for, and {made_for} is next"
        if not future.done():
            jax.block_until_ready(state)
        begin = time.perf_counter()
        result = future.result()
        self._waited += time.perf_counter() - begin
        return result

    def take_waited(self) -> float:
        """Seconds waited since this was last asked."""
        seconds, self._waited = self._waited, 0.0
        return seconds

    def close(self) -> None:
        """Gives up what is still being made."""
        self._pool.shutdown(cancel_futures=True)
