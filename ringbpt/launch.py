"""`python -m ringbpt.launch --nproc=N -- train ...`: trains in N processes of this machine, and starts them again.

All are started anew, from the newest checkpoint, when one is killed, loses another (exit code 5) or is preempted by
somebody else (75). Bad input, a fault of numbers or of storage ends them all, with the code of the one that met it.
SIGTERM, SIGHUP and Ctrl-C are handed on: all save, and the exit code is 75, or 130.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from ringbpt.config import Flag, UserError, complain, printed_help, read_flags, run_main, say
from ringbpt.ending import COMMAND, PEER_LOST, PREEMPTED, STOPS, SUPERVISOR
from ringbpt.train import going_on, named

FLAGS = {
    "nproc": Flag(int, 2, "processes", at_least=1),
    "devices_each": Flag(int, 0, "GPUs or TPUs of each process, in order; 0: each sees all", at_least=0),
    "restarts": Flag(int, 3, "in a row, without a new checkpoint between them", at_least=0),
}
AGAIN = {PEER_LOST, PREEMPTED, *STOPS.values(), *(128 + number for number in STOPS)}  # and every signal
GRACE_SECONDS = 10  # for the others, once one has failed: they hear of it, and end by themselves
LONGEST_PAUSE = 60.0
STACK = re.compile(r"\s+@ +0x[0-9a-f]+ |\*\*\* Check failure stack trace")  # C++'s, of a peer of a killed process 0


def main(argv: list[str]) -> int:
    own, words = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    if printed_help(own, doc=__doc__, own=FLAGS):
        return 0
    flags = read_flags(own, FLAGS)
    if words[:1] != ["train"]:
        raise UserError("what to launch is missing: python -m ringbpt.launch --nproc=2 -- train --config=...")
    words, folder = named(words[1:])

    def commands(attempt: int) -> list[list[str]]:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{listener.getsockname()[1]}"
        own_words = going_on(words, folder.name) if attempt else words
        together = ["--initialize_jax_distributed", f"--coordinator_address={address}", f"--num_processes={count}"]
        return [
            [
                *(sys.executable, "-m", "ringbpt.train", *own_words),
                *(f"--jax_distributed.{flag[2:]}" for flag in (*together, f"--process_id={number}", *ids(number))),
            ]
            for number in range(count)
        ]

    def ids(number: int) -> list[str]:
        mine = range(number * each, (number + 1) * each)
        return [f"--local_device_ids={','.join(map(str, mine))}"] if each else []

    count, each = flags["nproc"], flags["devices_each"]
    command = shlex.join(["python", "-m", "ringbpt.launch", *own, "--", "train", *going_on(words, folder.name)])
    return supervise(commands, flags["restarts"], lambda: newest_step(folder), command)


def newest_step(folder: Path) -> int:
    """Of a run's checkpoints; -1 where it has none."""
    found = folder.glob("checkpoints/*")
    return max((int(path.name) for path in found if path.name.isdecimal()), default=-1)


# --- what an end means ---


def verdict(codes: dict[int, int], asked: int) -> tuple[int, bool]:
    """(the exit code for all, whether to start again), from each process's code in the order in which they ended.

    asked: the signal that was handed on to them, or 0.
    """
    failed = [code for code in codes.values() if code]
    if not failed:
        return 0, False
    ours = [code for code in failed if code > 0 and code not in AGAIN]
    if ours:
        return ours[0], False
    plain = [code if code > 0 else PEER_LOST for code in failed]
    if asked:
        wanted = STOPS[signal.Signals(asked)]
        return next((code for code in plain if code != wanted), wanted), False
    done = len(failed) < len(codes)  # a process ends with 0 only after the last checkpoint
    return (PREEMPTED if set(plain) == {PREEMPTED} else PEER_LOST), not done


def supervise(
    commands: Callable[[int], list[list[str]]], restarts: int, newest: Callable[[], int], command: str, pause: float = 1
) -> int:
    """Runs commands(attempt), all at once, until they are done or cannot be; returns the exit code.

    newest: the step of the newest checkpoint; while it grows, restarts are not counted. pause: seconds before the
    first restart, twice as many before each that follows in a row. command: what a process says would go on.
    """
    ranks = Ranks(command)
    attempt, in_a_row, reached = 0, 0, newest()
    with ranks.signals_handed_on():
        while True:
            codes = ranks.run(commands(attempt))
            code, again = verdict(codes, ranks.asked)
            if not again:
                return code
            in_a_row, reached = (1 if newest() > reached else in_a_row + 1), newest()
            ended = ", ".join(f"process {number} {_how(code)}" for number, code in codes.items())
            if in_a_row > restarts:
                complain(f"launch: {ended}: --restarts={restarts} in a row without a new checkpoint, giving up")
                return code
            attempt += 1
            step = f"step {reached}" if reached >= 0 else "the start: there is no checkpoint yet"
            complain(f"launch: {ended}: starting again from {step}")
            until = time.monotonic() + min(pause * 2 ** (in_a_row - 1), LONGEST_PAUSE)
            while time.monotonic() < until and not ranks.asked:
                time.sleep(0.05)
            if ranks.asked:
                return STOPS[signal.Signals(ranks.asked)]


def _how(code: int) -> str:
    return f"ended with {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"


# --- the processes ---


class Ranks:
    """The processes that run now, and the signal that was handed on to them, if one was."""

    def __init__(self, command: str):
        self.asked = 0
        self._running: dict[int, subprocess.Popen] = {}
        self._environment = os.environ | {SUPERVISOR: str(os.getpid()), COMMAND: command}

    def signals_handed_on(self) -> "HandedOn":
        return HandedOn(self._hand_on)

    def _hand_on(self, number: int) -> None:
        self.asked = number
        for process in self._running.values():
            process.send_signal(number)

    def run(self, commands: list[list[str]]) -> dict[int, int]:
        """Runs them to their ends: each one's code, in the order in which they ended."""
        pipe, shown = subprocess.PIPE, dict[str, str]()
        readers, codes = [], dict[int, int]()
        for number, words in enumerate(commands):
            if self.asked:
                break
            process = subprocess.Popen(
                # A session of its own: a terminal's Ctrl-C comes once, from here.
                words, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=self._environment, start_new_session=True
            )  # fmt: skip
            self._running[number] = process
            assert process.stdout and process.stderr
            prefix = f"[{number}] " if len(commands) > 1 else ""
            for stream, where in ((process.stdout, None), (process.stderr, shown)):
                reader = threading.Thread(target=_forward, args=(stream, prefix, where), daemon=True)
                reader.start()
                readers.append(reader)
        until = float("inf")
        while self._running:
            time.sleep(0.05)
            for number, process in list(self._running.items()):
                if process.poll() is not None:
                    del self._running[number]
                    codes[number] = process.returncode
            if any(codes.values()) and not self.asked:
                until = min(until, time.monotonic() + GRACE_SECONDS)
            if time.monotonic() > until:
                for process in self._running.values():
                    process.kill()
        for reader in readers:
            reader.join(5)
        return codes or {0: STOPS[signal.Signals(self.asked)]}


class HandedOn:
    """While it is entered, signals that ask a run to stop go to `hand_on`."""

    def __init__(self, hand_on: Callable[[int], None]):
        self._hand_on = hand_on

    def __enter__(self) -> None:
        numbers = [one for one in STOPS if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]
        self._before = {one: signal.signal(one, lambda number, _: self._hand_on(number)) for one in numbers}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _forward(stream: IO[bytes], prefix: str, shown: dict[str, str] | None) -> None:
    """Prints a process's lines as they come. shown: standard error's, and who said each first; others don't."""
    with stream:
        for data in stream:
            line = data.decode(errors="replace").rstrip("\n")
            if shown is None:
                say(line if prefix in ("", "[0] ") else prefix + line)
            elif not STACK.match(line) and shown.setdefault(line, prefix) == prefix:
                complain(prefix + line)


if __name__ == "__main__":
    sys.exit(run_main(main))
