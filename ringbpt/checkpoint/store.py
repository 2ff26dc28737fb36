"""Our own checkpoints: named entries in a folder, written and read with Orbax, straight from and onto the mesh.

A run's `checkpoints/` holds one folder a step, named by its number, with a folder for each entry: a tree of arrays, or
a JSON object. Which there are is for others to say (training/run.py names those of a run); `params` and `meta` are in
every checkpoint. Orbax writes into a temporary name and renames at the end, so a numbered folder is a whole one.
"""

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ringbpt.checkpoint.tensors import fill, flatten
from ringbpt.config import UserError
from ringbpt.types import Array, PyTree

WHAT = {"params": "parameter", "opt_state": "optimizer state"}  # one of an entry's leaves, in messages


class Entry(NamedTuple):
    """Nested dicts of arrays to be saved, as `flatten` makes of any tree. dtype: of its floats; None: as they are."""

    tree: PyTree
    dtype: Any = None


class Rule(Enum):
    """What a reader does about an entry: absent, a required one is an error, and one that may be fresh is None."""

    REQUIRED = "required"
    FRESH_IF_ABSENT = "fresh if absent"
    IGNORED = "ignored"


class Wanted(NamedTuple):
    """An entry to be read. abstract: a tree's ShapeDtypeStructs, whose shardings say where each array goes.

    tables: last names of leaves that may be stored with more or fewer rows than are wanted -> (axis, how many there
    are at least); what is more is zero, and cut or made (see Model.tables).
    """

    abstract: PyTree = None
    rule: Rule = Rule.REQUIRED
    tables: Mapping[str, tuple[int, int]] = MappingProxyType({})


class Checkpointer:
    """Saves and restores one run's steps in `directory`, which is made by the first save.

    Saving is asynchronous: `save` returns once the arrays are copied off the devices (they may be donated then),
    and a failure of the writing comes up in the next `save`, `wait` or `close`, as a UserError with exit code 4.
    Every process of a run calls each method, with the same arguments.
    """

    def __init__(self, directory: Path):
        self.directory = directory.absolute()
        self._saving: ocp.AsyncCheckpointer | None = None
        self._last_save: tuple[int, bool] | None = None  # step, milestone

    def save(self, step: int, entries: Mapping[str, Entry | dict[str, Any]], milestone: bool) -> None:
        """Begin to save `step`, once the save before it has ended.

        entries: an Entry or a JSON object each; "step" and "milestone" are added to that of "meta". A milestone is
        kept for ever, of the others only the newest. A step this object has just saved isn't written again, unless now
        as a milestone; an older folder of the same step is replaced.
        """
        self.wait()
        if self._last_save in ((step, milestone), (step, True)):
            return
        args = {}
        for name, entry in {"meta": {}, **entries}.items():
            if isinstance(entry, Entry):
                args[name] = _to_save(entry)
            else:
                more = {"step": step, "milestone": milestone} if name == "meta" else {}
                args[name] = ocp.args.JsonSave({**entry, **more})
        with _storage_errors(self._folder(step)):
            if jax.process_index() == 0:
                # Where nothing can be written, say so here: Orbax's threads would wait for their folder for minutes.
                self.directory.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self.directory).close()
            trees = {name for name, entry in entries.items() if isinstance(entry, Entry)}
            self._saving = _open_orbax(trees, args.keys() - trees)
            self._saving.save(self._folder(step), args=ocp.args.Composite(**args), force=True)
        self._last_save = (step, milestone)

    def latest_step(self) -> int | None:
        """The newest whole checkpoint, or None. Unfinished and foreign folders are passed over."""
        return max(_steps(self.directory), default=None)

    def restore(self, step: int, wanted: Mapping[str, Wanted]) -> dict[str, Any]:
        """The entries of a step; see StoredStep.restore."""
        return StoredStep(self._folder(step)).restore(wanted)

    def wait(self) -> None:
        """Until the save under way is on the disk; then the rolling checkpoints it replaces are deleted."""
        with _storage_errors(self.directory):
            if self._saving is not None:
                self._saving.close()  # waits, and raises what went wrong
                self._saving = None
            self._drop_replaced()

    close = wait

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _drop_replaced(self) -> None:
        if self._last_save is None or self._last_save[1] or jax.process_index() != 0:
            return
        for step in _steps(self.directory):
            if step < self._last_save[0] and not read_object(self._folder(step)).get("milestone", True):
                # Out of the numbered names first: killed in mid-deletion, it isn't taken for a whole checkpoint.
                doomed = self._folder(step).rename(self.directory / f"{step}.deleted")
                shutil.rmtree(doomed)


class StoredStep:
    """One step's checkpoint. Raises UserError, with `where` as the culprit, where the folder holds no whole one."""

    def __init__(self, folder: Path, where: str = ""):
        self.folder, self._where = folder, where or f"checkpoint {folder}"
        if not _is_whole(folder):
            raise UserError(f"{self._where}: no whole checkpoint there; steps: {_steps(folder.parent) or 'none'}")
        self.trees, self.objects = (
            {path.parent.name for path in folder.glob(f"*/{file}")} for file in ("_METADATA", "metadata")
        )
        for entry in {path.name for path in folder.iterdir() if path.is_dir()} - self.trees - self.objects:
            raise UserError(f"{self._where}: its entry {entry} is damaged: a file is missing", code=4)

    def restore(self, wanted: Mapping[str, Wanted]) -> dict[str, Any]:
        """The wanted entries and "meta" by name, each array placed and cast as its abstract one says.

        None stands for an entry that is absent and may be, and for an ignored one. Raises UserError where a required
        entry is absent or one has no rule, where a leaf's name, shape or kind of dtype differs, and where a file is
        missing or damaged.
        """
        wanted, stored = {"meta": Wanted(), **wanted}, self.trees | self.objects
        for name in sorted(stored - wanted.keys()):
            raise UserError(f"{self._where}: its entry {name} has no place here; give the flags it was saved with")
        for name, want in wanted.items():
            if want.rule is Rule.REQUIRED and name not in stored:
                raise UserError(f"{self._where}: it holds no {name}; give the flags it was saved with")
        found: dict[str, Any] = dict.fromkeys(wanted)
        wanted = {name: want for name, want in wanted.items() if want.rule is not Rule.IGNORED}
        trees = {name: want.abstract for name, want in wanted.items() if name in self.trees}
        with closing(_open_orbax(self.trees, self.objects)) as orbax:
            with _storage_errors(self.folder, reading=True):
                saved = orbax.metadata(self.folder).item_metadata
            args = {}
            for name, abstract in trees.items():
                # Orbax itself would pad, cut or cast without a word.
                leaves, tables = flatten(abstract), wanted[name].tables
                _check(self._where, WHAT.get(name, name), flatten(saved[name].tree), leaves, tables)
                tree = fill(saved[name].tree, leaves)
                restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
                for leaf, args_of in flatten(restore_args).items():
                    if leaf.rpartition(".")[2] in tables:
                        args_of.strict = False
                args[name] = ocp.args.PyTreeRestore(tree, restore_args=restore_args)
            with _storage_errors(self.folder, reading=True):
                restored = orbax.restore(self.folder, args=ocp.args.Composite(**args))
                found |= {name: read_object(self.folder, name) for name in wanted if name in self.objects}
        return found | {name: fill(abstract, flatten(restored[name])) for name, abstract in trees.items()}

    def dtypes(self, entry: str) -> dict[str, np.dtype]:
        """Of an entry's leaves, by name."""
        with closing(_open_orbax(self.trees, self.objects)) as orbax, _storage_errors(self.folder, reading=True):
            tree = orbax.metadata(self.folder).item_metadata[entry].tree
        return {name: np.dtype(leaf.dtype) for name, leaf in flatten(tree).items()}

    def read(self, entry: str, name: str) -> np.ndarray:
        """One leaf of an entry, whole, on the host."""
        tree: Any = ocp.RestoreArgs(restore_type=np.ndarray)
        for part in reversed(name.split(".")):
            tree = {part: tree}
        item = jax.tree.map(lambda _: 0, tree)
        args = ocp.args.PyTreeRestore(item=item, restore_args=tree, partial_restore=True)
        with closing(_open_orbax(self.trees, self.objects)) as orbax, _storage_errors(self.folder, reading=True):
            return jax.tree.leaves(orbax.restore(self.folder, args=ocp.args.Composite(**{entry: args}))[entry])[0]


def newest_step(path: Path, where: str) -> StoredStep:
    """The step that a folder means: itself, or the newest of a checkpoints folder or of a run's."""
    if _is_whole(path):
        return StoredStep(path, where)
    for directory in (path, path / "checkpoints"):
        if steps := _steps(directory):
            return StoredStep(directory / str(steps[-1]), where)
    raise UserError(f"{where}: no whole checkpoint in this folder")


def read_object(folder: Path, entry: str = "meta") -> dict[str, Any]:
    """A JSON entry of a step's folder."""
    return json.loads((folder / entry / "metadata").read_text())


def _open_orbax(trees: Iterable[str], objects: Iterable[str]) -> ocp.AsyncCheckpointer:
    """Orbax, for folders with entries of these names: trees of arrays, and JSON objects."""
    handlers = {name: ocp.PyTreeCheckpointHandler() for name in trees}
    handlers |= {name: ocp.JsonCheckpointHandler() for name in objects}
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))


def _to_save(entry: Entry) -> ocp.args.PyTreeSave:
    def save_args(leaf: Array) -> ocp.SaveArgs:
        cast = entry.dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating)
        return ocp.SaveArgs(dtype=np.dtype(entry.dtype) if cast else None)

    return ocp.args.PyTreeSave(entry.tree, save_args=jax.tree.map(save_args, entry.tree))


def _but(axis: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("_CHECKPOINT_METADATA", "params/_METADATA", "meta/metadata"))


def _steps(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdecimal() and _is_whole(entry))


@contextmanager
def _storage_errors(path: Path, reading: bool = False) -> Iterator[None]:
    """reading: what a damaged file makes of Orbax's look into it has any type."""
    try:
        yield
    except Exception as error:
        expected = isinstance(error, OSError | ValueError)  # so tensorstore reports a full disk or a damaged file
        if isinstance(error, UserError) or not (expected or reading):
            raise
        lines = str(error).strip().splitlines() or [""]
        kind = "" if expected else f"{type(error).__name__}: "
        raise UserError(f"checkpoint {path}: {kind}{lines[0] or type(error).__name__}", code=4) from error


def _check(
    where: str, what: str, saved: dict[str, Any], wanted: dict[str, Any], tables: Mapping[str, tuple[int, int]]
) -> None:
    """Raise UserError for the first leaf that is missing, has another shape or kind of dtype, or isn't wanted."""
    advice = "give the flags it was saved with"
    for name, leaf in wanted.items():
        if name not in saved:
            raise UserError(f"{where}: {what} {name} is not in the checkpoint; {advice}")
        there, here = tuple(saved[name].shape), tuple(leaf.shape)
        axis, rows = tables.get(name.rpartition(".")[2], (0, 0))
        same = there == here or (rows and len(there) == len(here) and _but(axis, there) == _but(axis, here))
        if not same or (there != here and min(there[axis], here[axis]) < rows):
            raise UserError(f"{where}: {what} {name} has shape {there} in the checkpoint and {here} here; {advice}")
        floats = [jnp.issubdtype(dtype, jnp.floating) for dtype in (saved[name].dtype, leaf.dtype)]
        if saved[name].dtype != leaf.dtype and not all(floats):
            raise UserError(f"{where}: {what} {name} is {saved[name].dtype} in the checkpoint and {leaf.dtype} here")
    for name in saved:
        if name not in wanted:
            raise UserError(f"{where}: {what} {name} of the checkpoint has no place here; {advice}")
