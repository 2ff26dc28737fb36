"""After which step a run saves by time, and after which it stops for Ctrl-C: the same on all its processes."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LOOK_SECONDS, MOST_STEPS = 2.0, 100  # between two times that processes ask each other, about; and at most


class Wish(IntEnum):
    """What a process would do after a step; of several wishes the largest is granted."""

    GO_ON = 0
    SAVE = 1
    STOP = 2


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, of a run whose folder is there. experiment_id: its name, by which it goes on."""

    def __init__(self, experiment_id: str):
        super().__init__()
        self.experiment_id = experiment_id


@contextmanager
def ctrl_c(experiment_id: str) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, as a function: an exception in the midst of a step would leave no state to save.

    The second one is a KeyboardInterrupt, and each of those goes on as Interrupted. Outside of the main thread, which
    alone may listen, it is always False.
    """
    pressed = False

    def note(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        with suppress(OSError):  # not print, which may have been interrupted itself
            os.write(1, b"\nstopping after this step; Ctrl-C again: at once\n")

    listens = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, note) if listens else None
    try:
        yield lambda: pressed
    except KeyboardInterrupt:
        raise Interrupted(experiment_id) from None
    finally:
        if listens:
            signal.signal(signal.SIGINT, before)


class Agreement:
    """after(step): what to do after a step, the same on all processes.

    Process 0's clock says when to save, and any process when to stop. Several processes ask each other by a tiny
    program that is sent off behind a step and fetched behind the next, when the step's metrics have come too: nobody
    waits for it. That is done about every LOOK_SECONDS, or each step where steps are longer.
    """

    def __init__(self, minutes: float, pressed: Callable[[], bool], seconds: Callable[[], float] = time.monotonic):
        """minutes: between two saves by time, 0 for none. pressed: whether this process was told to stop."""
        self._limit, self._pressed, self._seconds = minutes * 60, pressed, seconds
        self._saved = self._looked = seconds()
        self._sent: jax.Array | None = None
        self._asked = 0  # the step after which the others were asked, and after which they are asked again
        self._next = 0
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
            self._sent, self._next = None, step + apart
            if wish:
                return Wish(wish)
        if step >= self._next:
            self._sent = self._largest(self._ask(step))
        return Wish.GO_ON

    def _wish(self) -> Wish:
        if self._pressed():
            return Wish.STOP
        late = self._limit > 0 and self._seconds() - self._saved >= self._limit
        return Wish.SAVE if late and jax.process_index() == 0 else Wish.GO_ON

    def _ask(self, step: int) -> jax.Array:
        """Of each process, on each of its devices: its wish, and how many steps it would let pass until the next."""
        seconds = (self._seconds() - self._looked) / max(1, step - self._asked)
        self._looked, self._asked = self._seconds(), step
        own = np.array([[self._wish(), min(MOST_STEPS, max(1, LOOK_SECONDS / max(seconds, 1e-9)))]], np.int32)
        sharding = NamedSharding(self._mesh, PartitionSpec("all"))
        return jax.make_array_from_callback((jax.device_count(), 2), sharding, lambda index: own)
