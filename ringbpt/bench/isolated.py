"""A measurement in a process of its own, which tells what it finds as it goes, and may hang or die."""

import faulthandler
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax

from ringbpt.bench import kernels
from ringbpt.mesh import choose_platform

GRACE_S = 15.0  # beyond its time, after which a process is ended

Tell = Callable[[dict], None]
Measure = Callable[[float, Tell], None]  # of the seconds that it has, and whom to tell


class Ended(Exception):
    """Why a measurement is not whole."""


def in_a_process(measure: Measure, seconds: float, module: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("found", what `measure`, which is pickled, tells) each time; first of all ("versions", of the device and jax).

    seconds: after these and a grace the process is ended. module: where `measure` is from. Raises Ended with the reason
    where it fails, hangs or dies.
    """
    # Forks of a process that has imported the module once, and has touched no device.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(measure, seconds, theirs))  # no daemon: it may have workers
    with _environment():
        child.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    deadline = time.monotonic() + seconds + GRACE_S
    try:
        while ours.poll(max(0.0, deadline - time.monotonic())):
            kind, found = ours.recv()
            if kind == "end":
                child.join(GRACE_S)
                return
            if kind == "failure":
                raise Ended(found)
            yield kind, found
        raise Ended(f"it was ended after {seconds + GRACE_S:.0f} s, whatever it had told by then")
    except EOFError:
        child.join(GRACE_S)
        raise Ended(f"its process ended by itself, with {child.exitcode}") from None
    finally:
        child.kill()
        child.join()


@contextmanager
def _environment() -> Iterator[None]:
    """What the first process is started with, and all after it inherit, where the user has not said otherwise: the part
    of the device's memory that plans count on; and of the host's all, of which XLA would pin 64 * 10^9 bytes.
    """
    own = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": str(min(host_memory(), 1 << 50) // 10**9),
    }
    added = [name for name in own if name not in os.environ]
    os.environ.update({name: own[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _measure(measure: Measure, seconds: float, pipe: Connection) -> None:
    begin = time.monotonic()
    faulthandler.dump_traceback_later(seconds + GRACE_S, exit=True)  # says where it hangs
    try:
        choose_platform()
        device = jax.devices()[0]
        pipe.send(("versions", kernels.versions(device) | {"platform": device.platform}))
        measure(seconds - (time.monotonic() - begin), lambda found: pipe.send(("found", found)))
    except Exception as failure:  # of whatever kind: it must not end the others' measurements
        pipe.send(("failure", kernels.line(failure)))
    else:
        pipe.send(("end", None))


def host_memory() -> int:
    """Bytes of the host's memory that are free; more than there can be where nobody says."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    return 1 << 62
