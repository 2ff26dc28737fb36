"""Our own checkpoints: named entries in a folder, written and read with Orbax, straight from and onto the mesh.

A run's `checkpoints/` holds one folder a step, named by its number, with a folder for each entry: a tree of arrays, or
a JSON object. Which there are is for others to say (training/run.py names those of a run); `params` and `meta` are in
every checkpoint. A step is written as `<step>.saving`, then its digests (checkpoint/digests.py), and is renamed at the
end: a numbered folder is a whole one, whenever the process is killed. Whatever reads one compares the digests first, so
that Orbax, which takes a flipped bit without a word and a missing file with a hundred lines, never meets a damaged one.
"""

import errno
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from ringbpt.checkpoint import digests
from ringbpt.checkpoint.tensors import fill, flatten, leaf_name
from ringbpt.config import UserError
from ringbpt.model.quantised import Kept
from ringbpt.types import PyTree

log = logging.getLogger("ringbpt")
NEEDED = ("_CHECKPOINT_METADATA", "params/_METADATA", "meta/metadata")  # without them a folder is no checkpoint
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
    are at least); what is more is zero, and cut or made (see Model.tables). fresh: names of leaves that are None where
    they are absent. left: those that are passed over where they are stored and not wanted. quantised: those that are
    wanted in blocks, the name of a leaf whose abstract one is plain -> how, and the dims of it.
    """

    abstract: PyTree = None
    rule: Rule = Rule.REQUIRED
    tables: Mapping[str, tuple[int, int]] = MappingProxyType({})
    fresh: frozenset[str] = frozenset()
    left: frozenset[str] = frozenset()
    quantised: Mapping[str, tuple[Kept, str]] = MappingProxyType({})


class StoredStep:
    """One step's checkpoint. Raises UserError, with `where` as the culprit, where the folder holds no whole one."""

    def __init__(self, folder: Path, where: str = ""):
        self.folder, self._where = folder, where or f"checkpoint {folder}"
        self._verified: set[str] = set()
        if not is_whole(folder):
            whole = [step for step in numbered(folder.parent) if is_whole(folder.parent / str(step))]
            gone = next(name for name in NEEDED if not (folder / name).is_file())
            lacks, code = (f": {gone} is missing", 4) if any(folder.glob("*/*")) else ("", 2)
            raise UserError(f"{self._where}: no whole checkpoint there{lacks}; steps: {whole or 'none'}", code=code)
        self.trees, self.objects = (
            {path.parent.name for path in folder.glob(f"*/{file}")} for file in ("_METADATA", "metadata")
        )
        for entry in {path.name for path in folder.iterdir() if path.is_dir()} - self.trees - self.objects:
            of_arrays = any(path.is_dir() or path.suffix == ".ocdbt" for path in (folder / entry).iterdir())
            lost = f"{entry}/{'_METADATA' if of_arrays else 'metadata'}"
            raise UserError(f"{self._where}: its entry {entry} is damaged: {lost} is missing", code=4)

    def verify(self, entries: Iterable[str] | None = None) -> None:
        """Raises UserError, code 4, naming the file, where one of these entries (None: of any) is not as it was
        written. Of several processes each reads its share, so all call it. A checkpoint of before there were digests
        is believed.
        """
        chosen = self.trees | self.objects if entries is None else {*entries} & (self.trees | self.objects)
        if chosen <= self._verified:
            return
        with storage_errors(self.folder, reading=True):
            if digests.are_in(self.folder):
                shares = (jax.process_index(), jax.process_count())
                self._refuse(first_of_all(digests.problem(self.folder, chosen | {"meta"}, *shares)))
            meta, name = read_object(self.folder), self.folder.name
            if "digests" in meta and not digests.are_in(self.folder):
                self._refuse(f"{digests.NAME.format(0, meta['digests'])}: it is missing")
            if name.isdecimal() and meta.get("step") != int(name):
                self._refuse(f"meta/metadata says step {meta.get('step')!r}")
        self._verified |= chosen

    def _refuse(self, what: str) -> None:
        if what:
            raise UserError(f"{self._where}: {what}", code=4)

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
        self.verify(wanted)
        trees = {name: want.abstract for name, want in wanted.items() if name in self.trees}
        with closing(open_orbax(self.trees, self.objects)) as orbax:
            with storage_errors(self.folder, reading=True):
                saved = orbax.metadata(self.folder).item_metadata
            args = {}
            for name, abstract in trees.items():
                # Orbax itself would pad, cut or cast without a word.
                leaves, tables, there = flatten(abstract), wanted[name].tables, flatten(saved[name].tree)
                leaves |= {leaf: _on_host(leaves[leaf], there.get(leaf)) for leaf in wanted[name].quantised}
                absent = wanted[name].fresh - there.keys()
                passed = (wanted[name].left & there.keys()) - leaves.keys()
                leaves = {leaf: x for leaf, x in leaves.items() if leaf not in absent}
                kept = {leaf: x for leaf, x in there.items() if leaf not in passed}
                _check(self._where, WHAT.get(name, name), kept, leaves, tables)
                tree = _without(saved[name].tree, passed)
                tree = fill(tree, leaves)
                restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
                for leaf, args_of in flatten(restore_args).items():
                    if leaf.rpartition(".")[2] in tables:
                        args_of.strict = False
                args[name] = ocp.args.PyTreeRestore(tree, restore_args=restore_args, partial_restore=bool(passed))
            with storage_errors(self.folder, reading=True):
                restored = dict(orbax.restore(self.folder, args=ocp.args.Composite(**args)).items())
                found |= {name: read_object(self.folder, name) for name in wanted if name in self.objects}
        found["meta"].pop("digests", None)
        for name, abstract in trees.items():
            leaves = dict.fromkeys(wanted[name].fresh) | flatten(restored.pop(name))
            for leaf, (how, dims) in wanted[name].quantised.items():
                leaves[leaf] = how.of_stack(leaves[leaf], dims)
            found[name] = fill(abstract, leaves)
        return found

    def dtypes(self, entry: str) -> dict[str, np.dtype]:
        """Of an entry's leaves, by name."""
        self.verify([entry])
        return {name: np.dtype(leaf.dtype) for name, leaf in flatten(self._described(entry)).items()}

    def read(self, entry: str, name: str) -> np.ndarray:
        """One leaf of an entry, whole, on the host."""
        self.verify([entry])
        described = self._described(entry)
        # A name may be that of a nested dict's leaf, or of one in a flat dict: only the description knows.
        (keys,) = (path for path, _ in jax.tree.leaves_with_path(described) if leaf_name(path) == name)
        tree: Any = ocp.RestoreArgs(restore_type=np.ndarray)
        for key in reversed(keys):
            tree = {key.key: tree}
        item = jax.tree.map(lambda _: 0, tree)
        args = ocp.args.PyTreeRestore(item=item, restore_args=tree, partial_restore=True)
        with closing(open_orbax(self.trees, self.objects)) as orbax, storage_errors(self.folder, reading=True):
            found = orbax.restore(self.folder, args=ocp.args.Composite(**{entry: args}))[entry]
        return np.asarray(jax.tree.leaves(found)[0], flatten(described)[name].dtype)  # an int, of an integer alone

    def _described(self, entry: str) -> PyTree:
        """What Orbax knows of each leaf of an entry."""
        with closing(open_orbax(self.trees, self.objects)) as orbax, storage_errors(self.folder, reading=True):
            return orbax.metadata(self.folder).item_metadata[entry].tree


def newest_step(path: Path, where: str) -> StoredStep:
    """The step that a folder means: itself, or the newest of a checkpoints folder or of a run's.

    Of these the newest that is as it was written, and what is wrong with newer ones is said; where there is none, the
    UserError says what is wrong with the newest.
    """
    if is_whole(path):
        return StoredStep(path, where)
    for directory in (path, path / "checkpoints"):
        steps = [directory / str(step) for step in numbered(directory)[::-1]]
        if steps and (found := first_good(steps, lambda folder: _verified(folder, where))):
            return found
    raise UserError(f"{where}: no whole checkpoint in this folder")


def first_good(candidates: Iterable[Path], read: Callable[[Path], Any]) -> Any:
    """What `read` makes of the first candidate that is not damaged; of the damaged ones before it, what is wrong is
    said. Raises the first one's UserError where all are damaged; None of nothing.
    """
    first: UserError | None = None
    said: list[str] = []
    for candidate in candidates:
        try:
            result = read(candidate)
        except UserError as error:
            if error.code != 4:
                raise
            first = first or error
            said.append(str(error))
        else:
            for line in said:
                log.info("%s: going on from %s", line, candidate)
            return result
    if first:
        raise first
    return None


def _verified(folder: Path, where: str) -> StoredStep:
    step = StoredStep(folder, f"{where}: {folder.name}")
    step.verify()
    return step


def read_object(folder: Path, entry: str = "meta") -> dict[str, Any]:
    """A JSON entry of a step's folder. Raises OSError, also for what is no file, and ValueError for what is no JSON."""
    file = folder / entry / "metadata"
    if not file.is_file():  # nobody may ever write into a pipe
        raise FileNotFoundError(errno.ENOENT, "no such file", str(file))
    return json.loads(file.read_text())


def open_orbax(trees: Iterable[str], objects: Iterable[str]) -> ocp.AsyncCheckpointer:
    """Orbax, for folders with entries of these names: trees of arrays, and JSON objects."""
    return ocp.AsyncCheckpointer(handler_of(trees, objects))


def handler_of(trees: Iterable[str], objects: Iterable[str]) -> ocp.CompositeCheckpointHandler:
    handlers = {name: ocp.PyTreeCheckpointHandler() for name in trees}
    handlers |= {name: ocp.JsonCheckpointHandler() for name in objects}
    return ocp.CompositeCheckpointHandler(**handlers)


def _on_host(x: jax.ShapeDtypeStruct, saved: Any) -> jax.ShapeDtypeStruct:
    """A leaf that is to be quantised: as it is stored, in the host's memory, for the device has no room for it."""
    dtype = saved.dtype if saved is not None and jnp.issubdtype(saved.dtype, jnp.floating) else x.dtype
    return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding.with_memory_kind("pinned_host"))


def _without(tree: PyTree, names: Iterable[str]) -> PyTree:
    """A nested dict without its outermost leaves of these names."""
    return {name: leaf for name, leaf in tree.items() if name not in names} if names else tree


def first_of_all(line: str) -> str:
    """The line of the first process that has one."""
    if jax.process_count() == 1:
        return line
    rows = multihost_utils.process_allgather(np.frombuffer(line.encode()[:512].ljust(512), np.uint8))
    lines = (bytes(row).decode(errors="replace").strip() for row in np.asarray(rows).reshape(-1, 512))
    return next(filter(None, lines), "")


def _but(axis: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in NEEDED)


def numbered(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


class _Quiet(logging.Filter):
    """Nothing of Orbax's own account of a failure, which has a traceback for each thread: the exception says it all."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname and "never retrieved" not in record.getMessage()


QUIET = _Quiet()


@contextmanager
def storage_errors(path: Path, reading: bool = False) -> Iterator[None]:
    """What the storage raises, as a UserError with code 4 that names `path`.

    reading: what a damaged file makes of Orbax's look into it has any type.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(QUIET)
    try:
        yield
    except Exception as error:
        expected = isinstance(error, OSError | ValueError)  # so tensorstore reports a full disk or a damaged file
        if isinstance(error, UserError) or not (expected or reading):
            raise
        kind = "" if expected else f"{type(error).__name__}: "
        raise UserError(f"checkpoint {path}: {kind}{first_line(error)}", code=4) from error


# How tensorstore, which names every layer that an error has come through, quotes the system's at the end.
OS_ERROR = re.compile(r"\[OS error \d+: \S+ ([^\]]+)\]|(No space left on device|File too large|Disk quota exceeded)")


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    if found := OS_ERROR.search(str(error)):
        return found[1] or found[2]
    lines = str(error).strip().splitlines() or [""]
    return lines[0] or type(error).__name__


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
