"""Checkpoints: saved from and restored to the mesh with Orbax; and the files of the original project, read.

A run's `checkpoints/` holds one folder a step, named by its number: `params`, `opt_state` (a full train state only)
and `meta` (JSON). Orbax writes into a temporary name and renames at the end, so a numbered folder is a whole one.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ringbpt.checkpoint.huggingface import is_own, load_folder
from ringbpt.checkpoint.original import load_original
from ringbpt.checkpoint.tensors import flatten
from ringbpt.config import Architecture, CheckpointerConfig, UserError, choices
from ringbpt.model.llama import COMPUTE_DTYPES
from ringbpt.types import Array, Params, PyTree

PREFIXES = choices("load_checkpoint")


class Checkpointer:
    """Saves and restores one run's steps in `directory`, which is made by the first save.

    Saving is asynchronous: `save` returns once the arrays are copied off the devices (they may be donated then),
    and a failure of the writing comes up in the next `save`, `wait` or `close`, as a UserError with exit code 4.
    Every process of a run calls each method, with the same arguments.
    """

    def __init__(self, directory: Path, config: CheckpointerConfig):
        self.directory = directory.absolute()
        self._config = config
        self._orbax = _orbax()
        self._last_save: tuple[int, bool] | None = None  # step, milestone

    def save(self, step: int, params: Params, opt_state: PyTree | None, meta: dict[str, Any], milestone: bool) -> None:
        """Begin to save `step`, once the save before it has ended.

        With `config.save_optimizer_state` (and an opt_state) the whole train state, exactly; otherwise the params
        alone, as `config.float_dtype`. A milestone is kept for ever, of the others only the newest. `meta` is a JSON
        object; "step" and "milestone" are added to it. A step this object has just saved isn't written again, unless
        now as a milestone; an older folder of the same step is replaced.
        """
        self.wait()
        if self._last_save in ((step, milestone), (step, True)):
            return
        full = self._config.save_optimizer_state and opt_state is not None
        float_dtype = np.dtype(COMPUTE_DTYPES[self._config.float_dtype])

        def save_args(leaf: Array) -> ocp.SaveArgs:
            cast = not full and jnp.issubdtype(leaf.dtype, jnp.floating)
            return ocp.SaveArgs(dtype=float_dtype if cast else None)

        items = {
            "params": ocp.args.PyTreeSave(params, save_args=jax.tree.map(save_args, params)),
            "meta": ocp.args.JsonSave({**meta, "step": step, "milestone": milestone}),
        }
        if full:
            items["opt_state"] = ocp.args.PyTreeSave(flatten(opt_state))
        with _storage_errors(self._folder(step)):
            if jax.process_index() == 0:
                # Where nothing can be written, say so here: Orbax's threads would wait for their folder for minutes.
                self.directory.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self.directory).close()
            self._orbax.save(self._folder(step), args=ocp.args.Composite(**items), force=True)
        self._last_save = (step, milestone)

    def latest_step(self) -> int | None:
        """The newest whole checkpoint, or None. Unfinished and foreign folders are passed over."""
        return max(_steps(self.directory), default=None)

    def restore(
        self, step: int, abstract_params: Params, abstract_opt_state: PyTree | None
    ) -> tuple[Params, PyTree | None, dict[str, Any]]:
        """(params, opt_state, meta) of a step, each array placed as its abstract one says (ShapeDtypeStruct, sharding).

        opt_state is None where none is asked for or none was saved. Floats are cast to the abstract dtype.
        Raises UserError where a name, a shape or a kind of dtype differs, or a file is missing or damaged.
        """
        folder = self._folder(step)
        return _restore(self._orbax, folder, f"checkpoint {folder}", abstract_params, abstract_opt_state)

    def wait(self) -> None:
        """Until the save under way is on the disk; then the rolling checkpoints it replaces are deleted."""
        with _storage_errors(self.directory):
            self._orbax.wait_until_finished()
            self._drop_replaced()

    def close(self) -> None:
        """Wait, then free Orbax's threads."""
        self.wait()
        self._orbax.close()

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _drop_replaced(self) -> None:
        if self._last_save is None or self._last_save[1] or jax.process_index() != 0:
            return
        for step in _steps(self.directory):
            if step < self._last_save[0] and not _meta(self._folder(step)).get("milestone", True):
                # Out of the numbered names first: killed in mid-deletion, it isn't taken for a whole checkpoint.
                doomed = self._folder(step).rename(self.directory / f"{step}.deleted")
                shutil.rmtree(doomed)


# ---------------------------------------------------------------------------------------------- our own folders


def _orbax() -> ocp.AsyncCheckpointer:
    tree, opt_tree, meta = ocp.PyTreeCheckpointHandler(), ocp.PyTreeCheckpointHandler(), ocp.JsonCheckpointHandler()
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(params=tree, opt_state=opt_tree, meta=meta))


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("_CHECKPOINT_METADATA", "params/_METADATA", "meta/metadata"))


def _steps(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdecimal() and _is_whole(entry))


def _meta(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "meta" / "metadata").read_text())


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # tensorstore reports a full disk or a damaged file as a ValueError
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"checkpoint {path}: {lines[0]}", code=4) from error


def _restore(
    orbax: ocp.AsyncCheckpointer,
    folder: Path,
    where: str,
    abstract_params: Params,
    abstract_opt_state: PyTree | None,
) -> tuple[Params, PyTree | None, dict[str, Any]]:
    if not _is_whole(folder):
        raise UserError(f"{where}: no whole checkpoint there; steps: {_steps(folder.parent) or 'none'}")
    with _storage_errors(folder):
        saved = orbax.metadata(folder).item_metadata
    # Orbax itself would pad, cut or cast without a word.
    _check(where, "parameter", flatten(saved["params"].tree), flatten(abstract_params))
    abstract = {"params": abstract_params}
    if abstract_opt_state is not None and (folder / "opt_state").is_dir():
        abstract["opt_state"] = flatten(abstract_opt_state)
        _check(where, "optimizer state", flatten(saved["opt_state"].tree), abstract["opt_state"])
    args = {
        name: ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
        for name, tree in abstract.items()
    }
    with _storage_errors(folder):
        restored = orbax.restore(folder, args=ocp.args.Composite(meta=ocp.args.JsonRestore(), **args))
    opt_state = None
    if "opt_state" in abstract:
        leaves = [restored["opt_state"][name] for name in abstract["opt_state"]]
        opt_state = jax.tree.unflatten(jax.tree.structure(abstract_opt_state), leaves)
    return restored["params"], opt_state, restored["meta"]


def _check(where: str, what: str, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise UserError for the first leaf that is missing, has another shape or kind of dtype, or isn't wanted."""
    for name, leaf in wanted.items():
        if name not in saved:
            raise UserError(f"{where}: {what} {name} is not in the checkpoint; give the flags it was saved with")
        if tuple(saved[name].shape) != tuple(leaf.shape):
            shapes = f"{tuple(saved[name].shape)} in the checkpoint and {tuple(leaf.shape)} here"
            raise UserError(f"{where}: {what} {name} has shape {shapes}; give the flags it was saved with")
        floats = [jnp.issubdtype(dtype, jnp.floating) for dtype in (saved[name].dtype, leaf.dtype)]
        if saved[name].dtype != leaf.dtype and not all(floats):
            raise UserError(f"{where}: {what} {name} is {saved[name].dtype} in the checkpoint and {leaf.dtype} here")
    for name in saved:
        if name not in wanted:
            raise UserError(
                f"{where}: {what} {name} of the checkpoint has no place here; give the flags it was saved with"
            )


# ---------------------------------------------------------------------------------------------- --load_checkpoint


@dataclass(frozen=True)
class LoadedState:
    """What --load_checkpoint gave: opt_state and meta are None where the file has none or they weren't asked for.

    note: one line for the user, when something the prefix asks for was left out; else empty.
    """

    params: Params
    opt_state: PyTree | None = None
    meta: dict[str, Any] | None = None
    note: str = ""


def load_checkpoint(
    spec: str,
    abstract_params: Params,
    abstract_opt_state: PyTree | None = None,
    architecture: Architecture | None = None,
) -> LoadedState:
    """Read what `--load_checkpoint=PREFIX::PATH` names, straight onto the mesh.

    `params::` and `trainstate_params::` take the weights, `trainstate::` the optimizer state and the place in the
    data too, `flax_params::` the weights of a flax msgpack file. PATH is a folder of ours (a step, a `checkpoints`
    folder or a run, of which the newest step is taken) or a file of the original project, streaming or flax msgpack
    (its content says which); of a file's train state the weights alone are taken, and `note` says so. `huggingface::`
    takes a Hugging Face folder, and `params::` one that scripts/hf2jax.py wrote; both need `architecture`, as
    files do.

    abstract_*: ShapeDtypeStructs with shardings. architecture: the model's, whose param_scan_axis says where stacked
    weights have L.
    Raises UserError for an unknown prefix, a missing path, a pickle, a truncated file, and any tensor that is
    missing, has no place or has another shape.
    """
    prefix, path = find_checkpoint(spec)
    where, name = f"--load_checkpoint={spec}", spec.partition("::")[2]
    if prefix == "huggingface" or (prefix == "params" and is_own(path)):
        assert architecture is not None
        return LoadedState(load_folder(path, architecture, abstract_params))
    if path.is_file():
        assert architecture is not None
        params = load_original(path, where, prefix.startswith("trainstate"), architecture, abstract_params)
        note = f"{where}: took the weights; the original's optimizer state is not read, a new one starts"
        return LoadedState(params, note=note if prefix == "trainstate" else "")
    if prefix == "flax_params":
        raise UserError(f"{where}: a folder, where a flax msgpack file is expected; for a folder use params::{name}")
    folder = newest_step(path, where)
    if prefix != "trainstate":
        orbax = _orbax()
        params, _, _ = _restore(orbax, folder, where, abstract_params, None)
        orbax.close()
        return LoadedState(params)
    if not (folder / "opt_state").is_dir():
        raise UserError(f"{where}: saved without optimizer state; use params::{name}")
    orbax = _orbax()
    params, opt_state, meta = _restore(orbax, folder, where, abstract_params, abstract_opt_state)
    orbax.close()
    return LoadedState(params, opt_state, meta)


def find_checkpoint(spec: str) -> tuple[str, Path]:
    """(prefix, path) of `--load_checkpoint=PREFIX::PATH`. Raises UserError for another prefix and a missing path."""
    prefix, _, name = spec.partition("::")
    where = f"--load_checkpoint={spec}"
    if prefix not in PREFIXES or not name:
        raise UserError(f"{where}: expected one of {', '.join(f'{prefix}::PATH' for prefix in PREFIXES)}")
    path = Path(name).expanduser().absolute()
    if not path.exists():
        raise UserError(f"{where}: no such file or folder")
    return prefix, path


def newest_step(path: Path, where: str) -> Path:
    """The step folder that `path` means: itself, or the newest of a checkpoints folder or of a run's."""
    if _is_whole(path):
        return path
    for directory in (path, path / "checkpoints"):
        if steps := _steps(directory):
            return directory / str(steps[-1])
    raise UserError(f"{where}: no whole checkpoint in this folder")
