"""Signals, exit codes and memory that is too small, by calls alone or in processes that never import jax."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ringbpt.ending import PREEMPTED, Signals

ROOT = Path(__file__).parent.parent


class Left(Exception):
    """What stands for the end of a process: how, with which code, and with which line."""


def noted(*signals_at: tuple[int, float], held: bool) -> tuple[Signals, list[tuple[str, int, str]]]:
    """What comes of signals at these seconds: (the signals, the ways in which the process would have ended)."""
    ends: list[tuple[str, int, str]] = []
    signals = Signals(lambda code, line: ends.append(("left", code, line)), lambda *end: ends.append(("at once", *end)))
    if held:
        signals.hold()
    for number, seconds in signals_at:
        signals.note(number, seconds)
    return signals, ends


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, 75, "preempted"), (signal.SIGHUP, 75, "preempted"), (signal.SIGINT, 130, "interrupted")],
)
def test_before_there_is_something_to_save_a_signal_ends_and_afterwards_it_is_noted(number, code, word, capfd):
    signals, ends = noted((number, 5.0), held=False)
    [(how, found, line)] = ends
    assert (how, found) == ("left", code) and line.startswith(f"{word} ({number.name}) before the first step")
    signals, ends = noted((number, 5.0), held=True)
    assert ends == [] and signals.told() == code
    assert capfd.readouterr().out == f"\n{number.name}: stopping after this step; twice within a second: at once\n"
    assert Signals().told() == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_twice_within_a_second_is_at_once_and_no_later(number, code):
    _, ends = noted((number, 5.0), (number, 5.9), held=True)
    [(how, found, line)] = ends
    assert (how, found) == ("at once", code) and "at once" in line
    signals, ends = noted((number, 5.0), (number, 6.1), held=True)
    assert ends == []
    # What came first says with which code the run ends.
    signals, ends = noted((signal.SIGTERM, 5.0), (signal.SIGINT, 7.0), held=True)
    assert ends == [] and signals.told() == PREEMPTED


# The main thread is in C all the time, as in a compiler: a handler in Python would never be run.
BUSY = """
import hashlib, sys
from ringbpt.ending import listening
with listening() as signals:
    HOLD
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


@pytest.mark.parametrize(
    ("hold", "numbers", "code", "said"),
    [
        ("", [signal.SIGTERM], 75, "preempted (SIGTERM) before the first step"),
        ("", [signal.SIGINT], 130, "interrupted (SIGINT) before the first step"),
        ("signals.hold()", [signal.SIGTERM, signal.SIGTERM], 143, "preempted: SIGTERM twice, at once"),
    ],
)
def test_a_process_whose_main_thread_never_comes_back(hold, numbers, code, said):
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY.replace("HOLD", hold)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        for number in numbers:
            process.send_signal(number)
            if len(numbers) > 1:
                process.stdout.readline(), process.stdout.readline()  # it has been noted; two at once would be one
        _, stderr = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == code and stderr.startswith(said) and stderr.count("\n") == 1


def test_a_devices_memory_that_is_too_small_is_one_line(capsys):
    """jax says RESOURCE_EXHAUSTED, here of 8 PB; what else goes wrong in it keeps its traceback."""
    import jax
    import jax.numpy as jnp

    from ringbpt.config import run_main

    assert run_main(lambda argv: print(jnp.zeros(10**15).sum()), []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: a device's memory is too small: Out of memory allocating 4000000000000000 bytes")
    assert "ringbpt.plan" in line

    def fails(argv):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        run_main(fails, [])
