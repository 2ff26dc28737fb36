"""A run's folder: what it is called, what is written there, and where the run goes on from."""

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ringbpt.checkpoint.checkpointer import Checkpointer
from ringbpt.checkpoint.load import TOKENIZER, find_checkpoint, load_checkpoint
from ringbpt.checkpoint.peft import write_adapter
from ringbpt.checkpoint.store import Entry, Rule, StoredStep, Wanted, first_good, first_of_all, read_object
from ringbpt.checkpoint.tensors import flatten
from ringbpt.config import CheckpointerConfig, Config, UserError, to_dict
from ringbpt.config.foreign import user_path
from ringbpt.config.lora import pairs_of
from ringbpt.data.text.tokenizers import Tokenizer, keep_tokenizer
from ringbpt.evaluation.reference import weights_fingerprint
from ringbpt.model.adapters import Pair
from ringbpt.model.llama import COMPUTE_DTYPES
from ringbpt.model.weights import merge, part_of
from ringbpt.training.metrics import MetricsWriter, check_wandb, say
from ringbpt.training.state import StateLayout, TrainState, divide
from ringbpt.types import Mean, Means, Params


@dataclass
class Run:
    """One training run. data_step, start: the step of the data, and of the run, with which it begins.

    fingerprint: of the training data, its order and its packing; a checkpoint of other data isn't gone on from. means:
    of the steps before `start` that no row of metrics holds yet. is_stored: whether a checkpoint of it is on the disk.
    goes_on: whether it began with one of its own. reference: what it is compared with (training/reference.py). base: of
    the weights beside its adapters, if it trains some, the fingerprint. began: when, by time.perf_counter.
    """

    config: Config
    folder: Path
    checkpointer: Checkpointer
    fingerprint: str = ""
    data_step: int = 0
    start: int = 0
    means: Means = field(default_factory=dict)
    is_stored: bool = False
    goes_on: bool = False
    reference: dict[str, str] | None = None
    base: str = ""
    began: float = field(default_factory=time.perf_counter)
    _lock: IO[str] | None = None

    def first_state(self, layout: StateLayout, fingerprint: str) -> TrainState:
        """The state of the run's own newest good checkpoint, of another's, or a fresh one; nothing is written.

        Raises UserError where the checkpoint was trained on other data, or as far as total_steps already; with code 4
        where the run has been trained, and nothing of it can be read: it is never begun anew.
        """
        config, self.fingerprint = self.config, fingerprint
        abstract = layout.abstract
        model, tables = layout.model, layout.model.tables
        wanted = {
            "params": Wanted(abstract.trained, tables=tables, fresh=model.fresh, left=model.left),
            "opt_state": Wanted(abstract.opt_state, Rule.FRESH_IF_ABSENT, tables),
            "guard": Wanted(abstract.guard, Rule.FRESH_IF_ABSENT if abstract.guard else Rule.IGNORED),
        }
        found: dict[str, Any] = dict.fromkeys((*wanted, "meta"))
        own, key = self._own_checkpoint(wanted) if config.autoresume else None, jax.random.key(config.seed)
        if own is not None:
            found, self.is_stored, self.goes_on = own, True, True
            where = f"--autoresume from {self.checkpointer.directory}"
        elif config.load_checkpoint and not model.pairs:
            found, note = load_checkpoint(config.load_checkpoint, wanted, config.architecture)
            where = f"--load_checkpoint={config.load_checkpoint}"
            if note:
                say(note)
        elif not model.pairs:
            found["params"] = model.init(key)
        if model.pairs:
            found["params"] = merge(self._base(layout, found["meta"]), found["params"] or {})
        found["params"] = model.with_fresh(found["params"], key)
        params, opt_state, meta = found["params"], found["opt_state"], found["meta"]
        self.reference = (meta or {}).get("reference")
        if meta is None:
            return layout.start(params)
        if meta["data"]["fingerprint"] != fingerprint:
            raise UserError(
                f"{where}: the training data, its order or its packing is not what step {meta['step']} was trained "
                "on: give the flags of that run, or take its weights alone with "
                "--load_checkpoint=trainstate_params::<path>"
            )
        if meta["step"] >= config.total_steps:
            raise UserError(
                f"{where}: step {meta['step']} is not below --total_steps={config.total_steps}: "
                f"--total_steps={meta['step'] + 1} or more would go on"
            )
        if opt_state is None:
            say(f"{where}: no optimizer state was saved (--checkpointer.save_optimizer_state); it starts anew")
        self.start, self.data_step = meta["step"], meta["data"]["step"]
        self.means = {name: Mean(*sums) for name, sums in meta.get("means", {}).items()}
        return layout.start(params, self.start, opt_state, found["guard"])

    def _base(self, layout: StateLayout, meta: dict[str, Any] | None) -> Params:
        """The weights beside the adapters, of --load_checkpoint or of the seed: in no checkpoint of the run, which has
        their fingerprint. Raises UserError where they are others than the run began with.
        """
        config, model = self.config, layout.model
        frozen = part_of(layout.frozen_as_read, divide(model.base.specs, layout.is_frozen)[1])
        if config.load_checkpoint:
            wanted = Wanted(frozen, tables=model.tables, fresh=model.fresh, left=model.left, quantised=layout.in_blocks)
            params = load_checkpoint(config.load_checkpoint, {"params": wanted}, config.architecture)[0]["params"]
            params = {name: x for name, x in params.items() if x is not None}
        else:
            params = layout.kept(part_of(model.base.init(jax.random.key(config.seed)), frozen))
        self.base = weights_fingerprint(params)
        if meta is not None and meta.get("base") != self.base:
            raise UserError(
                f"--load_checkpoint={config.load_checkpoint}: its weights are not those beside which the adapters of "
                f"{self.folder} were trained: give the same, or another --logger.experiment_id"
            )
        return params

    def _own_checkpoint(self, wanted: Mapping[str, Wanted]) -> dict[str, Any] | None:
        """The entries of the newest good step; None of a new run.

        Milestones of weights alone are passed over where a whole step is before them: the run goes on from that as if
        nothing had been.
        """
        folders = [self.checkpointer.directory / str(step) for step in self.checkpointer.steps()]
        front = list(takewhile(_is_kept_weights, folders))
        if len(front) < len(folders) and (folders[len(front)] / "opt_state").is_dir():
            folders = folders[len(front) :] + front
        found = first_good(folders, lambda folder: StoredStep(folder).restore(wanted))
        rows = self.folder / "metrics.jsonl"
        if found is None and rows.exists() and rows.stat().st_size:
            raise UserError(
                f"--autoresume: {self.folder} has metrics and no checkpoint: it is not begun anew over them; give "
                f"another --logger.experiment_id than {self.folder.name}, or remove {rows}",
                code=4,
            )
        return found

    def lock(self) -> None:
        """Makes the folder and takes it for this process, as long as that lives. Raises UserError where it cannot be
        made, and where another process has it.
        """
        found = ""
        if jax.process_index() == 0 and self._lock is None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = take_lock(self.folder / "lock")
            except BlockingIOError as error:
                found = f"--logger.experiment_id={self.folder.name}: {self.folder} is in use by {error}"
            except OSError as error:
                found = f"--logger.output_dir={self.config.logger.output_dir}: {self.folder}: {error.strerror}"
        if found := first_of_all(found):
            raise UserError(found, code=4)

    def start_writing(self, tokenizer: Tokenizer) -> MetricsWriter:
        """Makes the folder, with its config.json and its tokenizer; the metrics go on after step `start`."""
        is_main = jax.process_index() == 0
        writer = MetricsWriter(self.folder, self.config, is_main)
        self.lock()
        if is_main:
            (self.folder / "config.json").write_text(json.dumps(to_dict(self.config), indent=2) + "\n")
            begins = self.config.train_dataset.text_processor.add_bos_token
            keep_tokenizer(tokenizer, self.folder / TOKENIZER, begins)
        writer.resume_from(self.start)
        return writer

    def save_first(self, state: TrainState) -> None:
        """Begins to save what the run starts from, where it saves on its way: what follows is then never without a
        checkpoint, and a place that cannot be written is said before anything is computed in vain.
        """
        config = self.config
        if not self.is_stored and (config.save_minutes or config.save_model_freq or config.save_milestone_freq):
            self.save(self.start, state, False, {}, whole=bool(config.save_minutes))
        else:
            self.is_stored = True

    def await_first(self) -> None:
        """Before the first row: until what save_first began is on the disk. Raises UserError where it cannot be."""
        if not self.is_stored:
            self.checkpointer.wait()
            self.is_stored = True

    def leave_adapter(self) -> None:
        """Writes what was trained beside weights that stay into `adapter`, in PEFT's layout, as it was saved last."""
        config, folder = self.config, self.folder / "adapter"
        pairs = tuple(Pair(*pair) for pair in pairs_of(config.lora, config.architecture))
        newest = self.checkpointer.latest_step()
        if not pairs or newest is None or jax.process_index():
            return
        step = StoredStep(self.checkpointer.directory / str(newest))
        names = [name for name in step.dtypes("params") if name.startswith("layers.")]
        layers = {name.removeprefix("layers."): step.read("params", name) for name in names}
        score = step.read("params", "score") if config.architecture.head == "score" else None
        new = self.folder / "adapter.new"
        shutil.rmtree(new, ignore_errors=True)
        base = config.load_checkpoint.partition("::")[2]
        write_adapter(new, layers, config.lora, pairs, config.architecture, base, score)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
        say(f"wrote {folder}: {sum(x.size for x in layers.values()):,} numbers beside {base or 'fresh weights'}")

    def close(self) -> None:
        """Ends what is being saved, and lets another process have the folder. Raises UserError where the newest
        checkpoint could not be written.
        """
        try:
            self.checkpointer.close()
        finally:
            if self._lock is not None:
                self._lock.close()

    def data_step_of(self, step: int) -> int:
        """The step of the data that the run's step `step` is trained on."""
        return self.data_step + step - self.start

    def save(self, step: int, state: TrainState, milestone: bool, means: Means, whole: bool) -> None:
        """Begins to save the state after `step` steps, and the sums of the means that no row of metrics holds yet.

        whole: the optimizer's state too, whatever the flags say: a run is to go on from here as if nothing had been.
        """
        meta: dict[str, Any] = {"data": {"step": self.data_step_of(step), "fingerprint": self.fingerprint}}
        if self.reference:
            meta["reference"] = self.reference
        if self.base:
            meta["base"] = self.base
        if means:
            meta["means"] = {name: [mean.total, mean.weight] for name, mean in means.items()}
        config = self.config.checkpointer
        config = replace(config, save_optimizer_state=config.save_optimizer_state or whole)
        self.checkpointer.save(step, {**entries(state, config), "meta": meta}, milestone)


def entries(state: TrainState, config: CheckpointerConfig) -> dict[str, Entry]:
    """What a checkpoint holds of a state: all of it, exactly, or its weights alone, as config.float_dtype."""
    if config.save_optimizer_state:
        # What is optax's business (named tuples, masks, empty states) holds no arrays, and stays out of the files.
        guard = {"guard": Entry(flatten(state.guard))} if state.guard else {}
        return {"params": Entry(state.trained), "opt_state": Entry(flatten(state.opt_state)), **guard}
    # What is trained beside weights that stay is small, and kept as it is.
    return {"params": Entry(state.trained, None if state.frozen else COMPUTE_DTYPES[config.float_dtype])}


def open_run(config: Config) -> Run:
    """The run that the flags name: <output_dir>/<experiment_id>; without an id <time>-<name>, or just <name> where a
    later run must find it. Nothing is written yet. Raises UserError where another run's metrics are there already, for
    a --load_checkpoint that isn't there, and where Weights & Biases cannot be had.
    """
    name = config.logger.experiment_id
    if not name:
        name = config.load_llama_config or "run"
        if not config.autoresume:
            now = np.int64(time.time())
            if jax.process_count() > 1:
                now = multihost_utils.broadcast_one_to_all(now)  # one run, one folder
            name = f"{datetime.fromtimestamp(int(now)):%Y%m%d-%H%M%S}-{name}"
    folder = user_path(config.logger.output_dir) / name
    if (folder / "metrics.jsonl").exists() and not config.autoresume:
        raise UserError(
            f"--logger.experiment_id={name}: {folder} holds a run already: add --autoresume to go on with it, or "
            "choose another name"
        )
    if config.load_checkpoint:
        find_checkpoint(config.load_checkpoint)
    if config.logger.online and (jax.process_index() == 0 or config.log_all_worker):
        check_wandb()
    data_step = _dataset_step(config.load_dataset_state) if config.load_dataset_state else 0
    keep = config.checkpointer.keep, config.checkpointer.keep_period
    run = Run(config, folder, Checkpointer(folder / "checkpoints", *keep), data_step=data_step)
    if folder.is_dir():
        run.lock()
        run.checkpointer.clear()  # before it is asked for its steps: one that lacks nothing but its name is one
    return run


def _is_kept_weights(folder: Path) -> bool:
    """Whether a step is a milestone of weights alone."""
    try:
        return not (folder / "opt_state").is_dir() and bool(read_object(folder)["milestone"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def take_lock(path: Path) -> IO[str]:
    """The file, locked for this process until it is closed or the process ends, with its host and number in it.

    Raises BlockingIOError, with the other's, where another process has it. Where the file system knows no locks that
    is said, and nothing is locked.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    file = os.fdopen(handle, "r+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = file.read(200).strip()
        file.close()
        raise BlockingIOError(owner or "another process") from None
    except OSError as error:
        say(f"{path}: {error.strerror}: a second run in this folder would not be noticed")
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _dataset_step(path: str) -> int:
    """The place in the data that one of our checkpoints (a step's folder) stands at."""
    try:
        return int(read_object(Path(path))["data"]["step"])
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"--load_dataset_state={path}: no step folder of a checkpoint, such as runs/<run>/checkpoints/<step>"
        ) from None
