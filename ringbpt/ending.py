"""How a process ends: the exit codes, what signals ask of a run, and leaving from any thread."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

PEER_LOST, PREEMPTED, INTERRUPTED = 5, 75, 130
STOPS = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: PREEMPTED, signal.SIGHUP: PREEMPTED}
TWICE_SECONDS = 1.0  # two signals within it: at once


class Stopped(BaseException):
    """A run that ends after a step because a signal asked for it; str() says what was saved. code: of the exit."""

    def __init__(self, code: int, what: str, experiment_id: str):
        super().__init__(what)
        self.code, self.experiment_id = code, experiment_id


def stopped_by(code: int) -> str:
    """The first word of the line with which a process that was told to stop ends."""
    return "interrupted" if code == INTERRUPTED else "preempted"


# --- who is told ---

_before_leaving: list[Callable[[int, str], None]] = []
_at_the_end: list[Callable[[int], None]] = []
_leaving = threading.Lock()


def tell(before_leaving: Callable[[int, str], None], at_the_end: Callable[[int], None]) -> None:
    """Whom to tell: before a thread leaves, its code and its line; at an entry's end, once it has spoken, its code."""
    _before_leaving.append(before_leaving)
    _at_the_end.append(at_the_end)


def is_awaited() -> bool:
    """Whether somebody is to be told of this process's end."""
    return bool(_at_the_end)


def end(code: int) -> None:
    """Tells of an entry's end; the process then goes on to end by itself."""
    for told in _at_the_end:
        told(code)


def leave(code: int, line: str) -> NoReturn:
    """Ends the process from any thread, with a line on standard error: what blocks the others does not matter, and no
    `finally` is run. What is on the disk stays, and files that are half written have no final name yet.
    """
    if not _leaving.acquire(blocking=False):
        threading.Event().wait()  # another thread is leaving
    for told in _before_leaving:
        with suppress(Exception):
            told(code, line)
    exit_now(code, line)


def exit_now(code: int, line: str) -> NoReturn:
    """Ends the process with a line on standard error, and tells nobody."""
    with suppress(OSError):  # nobody reads it
        os.write(2, f"{line}\n".encode(errors="replace"))
    os._exit(code)


# --- what signals ask ---


class Signals:
    """What SIGINT, SIGTERM and SIGHUP have asked of this process.

    Until `hold` there is nothing to save, and the first one ends it. Then it is noted, for whoever asks `told` after a
    step. A second one within TWICE_SECONDS ends the process at once, wherever it is.
    """

    def __init__(self, leave: Callable[[int, str], Any] = leave, exit_now: Callable[[int, str], Any] = exit_now):
        self._leave, self._exit_now = leave, exit_now
        self._number, self._held, self._last = 0, False, -TWICE_SECONDS
        self._lock = threading.Lock()

    def told(self) -> int:
        """The exit code that was asked for, or 0."""
        return STOPS[signal.Signals(self._number)] if self._number else 0

    def hold(self) -> None:
        """From now on, and to the end, there is something to save."""
        with self._lock:
            self._held = True

    def note(self, number: int, seconds: float) -> None:
        """A signal has come, at this time of a clock that never goes back."""
        twice, self._last = seconds - self._last < TWICE_SECONDS, seconds
        name, code = signal.Signals(number).name, STOPS[signal.Signals(number)]
        if twice:
            at_once = code if code == INTERRUPTED else 128 + number
            self._exit_now(at_once, f"{stopped_by(code)}: {name} twice, at once; the newest checkpoint stays")
        with self._lock:
            self._number, held = self._number or number, self._held
        if held:
            with suppress(OSError):
                os.write(1, f"\n{name}: stopping after this step; twice within a second: at once\n".encode())
        else:
            before = "before the first step of this start: there is nothing to save, the same command goes on"
            self._leave(code, f"{stopped_by(code)} ({name}) {before}")


@contextmanager
def listening() -> Iterator[Signals]:
    """The signals that come from now on, in the main thread of an entry that saves before it ends.

    Python runs a handler only between two instructions of its main thread, which may compile for minutes, or wait for
    ever; so a thread of our own reads the numbers that the interpreter's C handler writes into a pipe. A SIGHUP that
    is ignored, as under nohup, stays so.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield signals
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        while data := os.read(reader, 1):
            if data[0] in numbers:
                signals.note(data[0], time.monotonic())
        os.close(reader)

    numbers = {int(one) for one in STOPS if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN}
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=listen, name="signals", daemon=True).start()
    _end_with_supervisor()
    try:
        yield signals
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)


# What a launcher says in the environment of its processes: its process id, and the command that goes on with the run.
SUPERVISOR, COMMAND = "RINGBPT_SUPERVISOR", "RINGBPT_COMMAND"


def _end_with_supervisor() -> None:
    """A launcher that is killed leaves no rank behind: Linux then sends SIGTERM, and the run is saved."""
    if SUPERVISOR in os.environ and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != int(os.environ[SUPERVISOR]):
            os.kill(os.getpid(), signal.SIGTERM)
