"""A step that takes too long ends the run: all stacks go into its folder, and the exit code is that of a lost peer."""

import faulthandler
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ringbpt import processes


class Watchdog:
    """at(step) says how far this process is; longer than `limit` seconds until the next is too long.

    limit: 0 for none. A process that hangs in a collective, or whose peer does, can end by no exception: a thread dumps
    the stacks and leaves.
    """

    def __init__(
        self,
        limit: float,
        folder: Path,
        give_up: Callable[[str], Any] = processes.give_up,
        seconds: Callable[[], float] = time.monotonic,
    ):
        self._limit, self._give_up, self._seconds = limit, give_up, seconds
        worker = f".worker{jax.process_index()}" if jax.process_index() else ""
        self._path = folder / f"stacks{worker}.txt"
        self._step, self._until = 0, 0.0  # 0: not watched
        self._closed = threading.Event()
        if limit:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def at(self, step: int, watched: bool = True) -> None:
        """After `step` steps another one begins; or what takes its time, as an evaluation that may compile."""
        processes.at(step)
        self._step, self._until = step, self._seconds() + self._limit if watched and self._limit else 0.0

    def close(self) -> None:
        self._closed.set()

    def look(self) -> None:
        """Gives up where it has been too long."""
        if not 0 < self._until < self._seconds():
            return
        self._until = 0.0
        with open(self._path, "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        limit = f"{self._limit:g} s (--jax_distributed.step_timeout)"
        self._give_up(f"step {self._step + 1} has taken more than {limit}: all stacks are in {self._path}")

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._limit / 4)):
            self.look()
