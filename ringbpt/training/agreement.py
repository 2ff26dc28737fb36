"""After which step a run saves by time, and after which it stops for a signal: the same on all its processes."""

import time
from collections.abc import Callable
from enum import IntEnum

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ringbpt.ending import INTERRUPTED, PREEMPTED

LOOK_SECONDS, MOST_STEPS = 2.0, 100  # between two times that processes ask each other, about; and at most


class Wish(IntEnum):
    """What a process would do after a step; of several wishes the largest is granted."""

    GO_ON = 0
    SAVE = 1
    STOP = 2  # PREEMPTED is to be the exit code
    INTERRUPT = 3  # INTERRUPTED

    @property
    def code(self) -> int:
        """The exit code with which the run is to end after this step; 0: it goes on."""
        return {Wish.STOP: PREEMPTED, Wish.INTERRUPT: INTERRUPTED}.get(self, 0)


class Agreement:
    """after(step): what to do after a step, the same on all processes.

    Process 0's clock says when to save, and any process when to stop. Several processes ask each other by a tiny
    program that is sent off behind a step and fetched behind the next, when the step's metrics have come too: nobody
    waits for it. That is done about every LOOK_SECONDS, or each step where steps are longer.
    """

    def __init__(self, minutes: float, told: Callable[[], int], seconds: Callable[[], float] = time.monotonic):
        """minutes: between two saves by time, 0 for none. told: the exit code that a signal asked for, or 0."""
        self._limit, self._told, self._seconds = minutes * 60, told, seconds
        self._saved = seconds()
        self._sent: jax.Array | None = None
        self._pace = Pace()
        self._next = 0  # the step after which the others are asked again
        if jax.process_count() > 1:
            self._mesh = Mesh(np.array(jax.devices()), "all")
            whole = NamedSharding(self._mesh, PartitionSpec())
            self._largest = jax.jit(lambda wishes: wishes.max(0), out_shardings=whole)

    def saved(self) -> None:
        """The clock starts anew."""
        self._saved = self._seconds()

    def after(self, step: int) -> Wish:
        """To be called after each step has been sent off, and the metrics of the one before have come."""
        if jax.process_count() == 1:
            return self._wish()
        if self._sent is not None:
            wish, apart = np.asarray(self._sent).tolist()
            self._sent, self._next = None, step - apart
            if wish:
                return Wish(wish)
        if step >= self._next:
            self._sent = self._largest(self._ask(step))
        return Wish.GO_ON

    def _wish(self) -> Wish:
        if code := self._told():
            return Wish.INTERRUPT if code == INTERRUPTED else Wish.STOP
        late = self._limit > 0 and self._seconds() - self._saved >= self._limit
        return Wish.SAVE if late and jax.process_index() == 0 else Wish.GO_ON

    def _ask(self, step: int) -> jax.Array:
        """Of each process, on each of its devices: its wish, and, below zero, so that the most cautious one's is the
        largest, how many steps it would let pass until the next.
        """
        own = np.array([[self._wish(), -self._pace.steps_apart(step, self._seconds())]], np.int32)
        sharding = NamedSharding(self._mesh, PartitionSpec("all"))
        return jax.make_array_from_callback((jax.device_count(), 2), sharding, lambda index: own)


class Pace:
    """How many steps are LOOK_SECONDS, by those between two questions; 1 where there has been none yet: a run that goes
    on may begin at any step, and how long its steps are nobody knows.
    """

    def __init__(self) -> None:
        self._last: tuple[int, float] | None = None

    def steps_apart(self, step: int, now: float) -> int:
        last, self._last = self._last, (step, now)
        if last is None:
            return 1
        seconds = (now - last[1]) / max(1, step - last[0])
        return int(min(MOST_STEPS, max(1, LOOK_SECONDS / max(seconds, 1e-9))))
