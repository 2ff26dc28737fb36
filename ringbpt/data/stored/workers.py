"""Tasks in worker processes, or in this one where one is enough."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

_made: Any = None


def each(
    task: Callable[..., Any], items: Sequence[tuple], start: Callable[[], Any], here: Callable[[], Any], processes: int
) -> Iterator[Any]:
    """task(made, *item) of each item, in order.

    made: what `start` makes, once in each worker process, or what `here` makes in this one. task, items and start are
    pickled. Raises what the task does, and BrokenProcessPool where a process dies.
    """
    processes = min(processes, len(items), os.cpu_count() or 1)
    if processes <= 1:
        made = here() if items else None
        yield from (task(made, *item) for item in items)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork of a process that runs jax may hang
    pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=_start, initargs=(start,))
    try:
        for future in [pool.submit(_run, task, item) for item in items]:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start(start: Callable[[], Any]) -> None:
    global _made  # noqa: PLW0603  (what a worker process is given once, and not with each task)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _made = start()


def _end_with_parent() -> None:
    """A worker would wait for ever for tasks of a parent that was killed: it holds both ends of their pipe."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(task: Callable[..., Any], item: tuple) -> Any:
    return task(_made, *item)
