"""A run's saving: steps written behind the training, named once they are whole, and those that they replace deleted."""

import asyncio
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ringbpt.checkpoint import digests
from ringbpt.checkpoint.store import (
    Entry,
    StoredStep,
    Wanted,
    first_line,
    handler_of,
    is_whole,
    numbered,
    open_orbax,
    read_object,
    storage_errors,
)
from ringbpt.checkpoint.tensors import flatten
from ringbpt.config import UserError
from ringbpt.types import Array

log = logging.getLogger("ringbpt")
Entries = Mapping[str, Entry | dict[str, Any]]
SAVING, DELETED = ".saving", ".deleted"
PEERS_SECONDS = 600.0  # for the digests of other processes, once one has its own


class Checkpointer:
    """Saves and restores one run's steps in `directory`, which is made by the first save.

    Saving is asynchronous: `save` returns once the arrays are copied off the devices (they may be donated then), and
    what goes wrong in the writing leaves the checkpoints before as they are: `poll` says it, and the next save may do
    better. Every process of a run calls each method, with the same arguments.
    """

    def __init__(self, directory: Path, keep: int = 2, keep_period: int = 0):
        """keep: how many of the newest steps stay that are no milestones, at least 1. keep_period: steps that it
        divides stay for ever; 0: none for that.
        """
        self.directory = directory.absolute()
        self._keep, self._keep_period = keep, keep_period
        self._thread: threading.Thread | None = None
        # Step and milestone of a save that was begun, and is not known to have failed.
        self._last_save: tuple[int, bool] | None = None
        self._error: BaseException | None = None  # of the newest save
        self._said: set[str] = set()

    def save(self, step: int, entries: Entries, milestone: bool) -> None:
        """Begin to save `step`, once the save before it has ended.

        entries: an Entry or a JSON object each; "step", "milestone" and "digests", the number of processes that write
        some, are added to that of "meta". A milestone is kept for ever, of the others the newest. A step this object
        has just saved isn't written again, unless now as a milestone; an older folder of the same step is replaced.
        """
        self._join()
        self.poll()
        if self._last_save in ((step, milestone), (step, True)):
            return
        self._last_save, self._error = (step, milestone), None
        more = {"step": step, "milestone": milestone, "digests": jax.process_count()}
        meta = entries.get("meta", {})
        assert not isinstance(meta, Entry)
        entries = {**entries, "meta": {**meta, **more}}
        _hush()
        try:
            write = self._begin(step, entries)
        except Exception as error:
            self._failed(step, error)
            return
        is_first, shares = jax.process_index() == 0, (jax.process_index(), jax.process_count())

        def finish() -> None:
            try:
                write()
                digests.write(self._folder(step, SAVING), *shares)
                if is_first:
                    self._await_peers(step, shares[1])
                    self._name(step)
                    self._drop_replaced(step)
            except BaseException as error:  # told by whoever looks next
                self._failed(step, error)

        self._thread = threading.Thread(target=finish, name=f"checkpoint {step}")
        self._thread.start()

    def poll(self) -> None:
        """Says, once, what has gone wrong with the newest save. Raises UserError where the weights are no numbers."""
        error = self._error
        if error is None:
            return
        if not isinstance(error, UserError) or error.code == 3:
            raise error
        self._say_once(f"{error}: not saved; the run goes on, and saves again when it is time")

    def wait(self) -> None:
        """Until the save under way has ended. Raises what has gone wrong with the newest save: a UserError, code 4
        for the storage."""
        self._join()
        if self._error is not None:
            raise self._error

    close = wait

    def steps(self) -> list[int]:
        """Numbers of the steps' folders, whole or not, newest first."""
        return numbered(self.directory)[::-1]

    def latest_step(self) -> int | None:
        """The newest whole checkpoint, or None. Unfinished and foreign folders are passed over."""
        return next((step for step in self.steps() if is_whole(self._folder(step))), None)

    def restore(self, step: int, wanted: Mapping[str, Wanted]) -> dict[str, Any]:
        """The entries of a step; see StoredStep.restore."""
        return self.open(step).restore(wanted)

    def open(self, step: int) -> StoredStep:
        """One of the steps."""
        return StoredStep(self._folder(step))

    def clear(self) -> None:
        """What a killed process left: a step that is whole but for its name gets it, all else unfinished is deleted.

        For the one run that may write here, before it asks for its steps.
        """
        if jax.process_index() == 0 and self.directory.is_dir():
            for folder in self.directory.iterdir():
                name, dot, rest = folder.name.partition(".")
                if name.isdecimal() and dot and rest.startswith((SAVING[1:], DELETED[1:], "orbax-checkpoint-tmp")):
                    with storage_errors(folder):
                        if folder.name == f"{name}{SAVING}" and _is_finished(folder):
                            self._name(int(name))
                        else:
                            _delete(folder)

    def _folder(self, step: int, suffix: str = "") -> Path:
        return self.directory / f"{step}{suffix}"

    def _begin(self, step: int, entries: Entries) -> Callable[[], None]:
        """What writes the entries into the step's folder, for another thread; the arrays may be donated now."""
        step_folder, folder = self._folder(step), self._folder(step, SAVING)
        if jax.process_index() == 0:
            with storage_errors(step_folder):
                self.directory.mkdir(parents=True, exist_ok=True)
            for unfinished in self.directory.glob(f"*{SAVING}*"):  # Orbax may still have written while it failed
                _delete(unfinished, ignore_errors=True)
            needed, free = sum(map(_bytes, entries.values())), shutil.disk_usage(self.directory).free
            if needed > free:  # Orbax would find out in the middle, once in each of its threads
                what = f"No space left on device: it takes {needed:,} bytes of {free:,} that are free"
                raise UserError(f"checkpoint {step_folder}: {what}", code=4)
        if jax.process_count() > 1:
            # Orbax's own copies, of each process's shards; it meets the other processes here and not on a thread.
            orbax = open_orbax(*_kinds(entries))
            with storage_errors(step_folder):
                orbax.save(folder, args=ocp.args.Composite(**_args(entries)), force=True)

            def write() -> None:
                with storage_errors(step_folder):
                    orbax.close()
        else:
            entries = {name: _on_host(entry) for name, entry in entries.items()}

            def write() -> None:
                for entry in entries.values():
                    _check_finite(step_folder, entry)
                with storage_errors(step_folder), closing(ocp.Checkpointer(handler_of(*_kinds(entries)))) as orbax:
                    orbax.save(folder, args=ocp.args.Composite(**_args(entries)), force=True)

        return write

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _failed(self, step: int, error: BaseException) -> None:
        self._last_save = None
        if isinstance(error, OSError):
            error = UserError(f"checkpoint {self._folder(step)}: {error.strerror or error}", code=4)
        self._error = error
        if jax.process_index() == 0:  # room for the next one
            for folder in self.directory.glob(f"{step}{SAVING}*"):
                shutil.rmtree(folder, ignore_errors=True)

    def _await_peers(self, step: int, count: int) -> None:
        until = time.monotonic() + PEERS_SECONDS
        while not digests.has_all(self._folder(step, SAVING), count):
            if time.monotonic() > until:
                raise UserError(f"checkpoint {self._folder(step)}: not all processes have written their part", code=4)
            time.sleep(0.02)

    def _name(self, step: int) -> None:
        """The step's folder has its own name from now on; an older one of that name goes."""
        folder, old = self._folder(step), self._folder(step, DELETED)
        digests.sync(self._folder(step, SAVING))
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        self._folder(step, SAVING).rename(folder)
        digests.sync(self.directory)
        shutil.rmtree(old, ignore_errors=True)

    def _drop_replaced(self, saved: int) -> None:
        """Deletes the steps that `saved`, which is whole on the disk, makes superfluous; never what it cannot read."""
        rolling = []
        for step in numbered(self.directory):
            if step <= saved:
                try:
                    meta = read_object(self._folder(step))
                    is_kept = bool(meta.get("milestone", True)) or (self._keep_period and step % self._keep_period == 0)
                except (OSError, ValueError, AttributeError) as error:
                    self._say_once(f"checkpoint {self._folder(step)} cannot be read, and is left: {first_line(error)}")
                else:
                    rolling += [] if is_kept else [step]
        for step in rolling[: -self._keep]:
            # Out of the numbered names first: killed in mid-deletion, it isn't taken for a whole checkpoint.
            doomed = self._folder(step, DELETED)
            shutil.rmtree(doomed, ignore_errors=True)
            try:
                self._folder(step).rename(doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                self._say_once(f"checkpoint {self._folder(step)} cannot be deleted: {first_line(error)}")

    def _say_once(self, line: str) -> None:
        if line not in self._said and jax.process_index() == 0:
            self._said.add(line)
            log.info(line)


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that nobody's late answer finds closed."""

    def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        with suppress(RuntimeError):
            return super().call_soon_threadsafe(*args, **kwargs)


class _Policy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _Loop()


@cache
def _hush() -> None:
    """From now on: where one write fails, Orbax closes its event loop, and TensorStore prints a traceback for each of
    the others that ends later; they say nothing that the first does not.
    """
    asyncio.set_event_loop_policy(_Policy())


def _kinds(entries: Entries) -> tuple[set[str], set[str]]:
    """Names of the trees, and of the JSON objects."""
    trees = {name for name, entry in entries.items() if isinstance(entry, Entry)}
    return trees, entries.keys() - trees


def _bytes(entry: Entry | dict[str, Any]) -> int:
    """What an entry takes at most, as it is saved."""
    if not isinstance(entry, Entry):
        return 0
    return sum(leaf.size * np.dtype(_dtype(entry, leaf) or leaf.dtype).itemsize for leaf in jax.tree.leaves(entry.tree))


def _dtype(entry: Entry, leaf: Array) -> Any:
    """As what a leaf is saved; None: as what it is."""
    cast = entry.dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating)
    return np.dtype(entry.dtype) if cast else None


def _args(entries: Entries) -> dict[str, Any]:
    return {
        name: _to_save(entry) if isinstance(entry, Entry) else ocp.args.JsonSave(entry)
        for name, entry in entries.items()
    }


def _to_save(entry: Entry) -> ocp.args.PyTreeSave:
    save_args = jax.tree.map(lambda leaf: ocp.SaveArgs(dtype=_dtype(entry, leaf)), entry.tree)
    return ocp.args.PyTreeSave(entry.tree, save_args=save_args)


def _on_host(entry: Entry | dict[str, Any]) -> Entry | dict[str, Any]:
    """The same with copies of its arrays in the host's memory, whole."""
    if not isinstance(entry, Entry):
        return entry
    for leaf in jax.tree.leaves(entry.tree):  # all on their way before the first is waited for
        leaf.copy_to_host_async()
    return entry._replace(tree=jax.tree.map(np.array, entry.tree))


def _check_finite(folder: Path, entry: Entry | dict[str, Any]) -> None:
    for name, leaf in flatten(entry.tree).items() if isinstance(entry, Entry) else ():
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not math.isfinite(np.sum(np.abs(leaf), dtype=np.float64)):
            raise UserError(f"checkpoint {folder}: {name} is not finite, and is not saved", code=3)


def _delete(path: Path, ignore_errors: bool = False) -> None:
    """A folder, or a file: digests lie beside the folder that is being written until they are whole."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=ignore_errors)
    else:
        path.unlink(missing_ok=True)


def _is_finished(folder: Path) -> bool:
    """Whether a folder that is still to be named is as it was written, of all processes."""
    try:
        return is_whole(folder) and not digests.problem(folder)
    except OSError:
        return False
