"""The training run, from a Config to the last checkpoint; `train` reads top to bottom."""

import json
import time
from collections.abc import Callable
from contextlib import closing
from datetime import datetime
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ringbpt.config import Config, DatasetConfig, UserError, to_dict
from ringbpt.data.delivery import Delivery
from ringbpt.data.loader import Loader, make_loader
from ringbpt.data.tokenizers import make_tokenizer
from ringbpt.evaluation.probe import Probe, make_probe
from ringbpt.mesh import make_mesh, put_batch
from ringbpt.model.llama import Model
from ringbpt.objectives import OBJECTIVES
from ringbpt.training.checkpoint import Checkpointer, find_checkpoint
from ringbpt.training.memory import describe
from ringbpt.training.metrics import Clock, MetricsWriter, bits_per_byte, due, say
from ringbpt.training.optimizer import make_optimizer
from ringbpt.training.state import first_state
from ringbpt.training.step import Metrics, make_eval_step, make_train_step
from ringbpt.types import Batch, Params


def train(config: Config) -> Path:
    """Trains as the config says and returns the run's folder; what is wrong with the data or a checkpoint is a
    UserError before anything is written. Stopped by an exception, it leaves the metrics, their picture and whole
    checkpoints behind.
    """
    # ── what there is to train, and on what: the quick refusals first, then the data, then the devices ────────────
    run_dir = _run_dir(config)
    if config.load_checkpoint:
        find_checkpoint(config.load_checkpoint)
    mesh = make_mesh(config.mesh_shape, plain_order=config.mesh_dim.startswith("!"))
    tokenizer = make_tokenizer(config.tokenizer)
    loader = _loader(config, config.train_dataset, tokenizer, "train_dataset")
    eval_loader = _loader(config, config.eval_dataset, tokenizer, "eval_dataset") if config.eval_steps else None
    model = Model.of(config, mesh)
    model.check_kernel(config.train_dataset.seq_length)
    optimizer, schedule = make_optimizer(config.optimizer, config.architecture.param_scan_axis)
    checkpointer = Checkpointer(run_dir / "checkpoints", config.checkpointer)
    state, data_step = first_state(config, model, optimizer, checkpointer, loader.fingerprint)
    start = int(state.step)
    say(_describe(config, loader, eval_loader, run_dir, start))

    def save(step: int, milestone: bool) -> None:
        meta = {"data": {"step": data_step + step - start, "fingerprint": loader.fingerprint}}
        checkpointer.save(step, state.params, state.opt_state, meta, milestone)

    def log(row: dict[str, float]) -> None:
        writer.write(row)
        writer.progress(int(row["step"]), row)

    # ── the programs ─────────────────────────────────────────────────────────────────────────────────────────────
    train_step = make_train_step(config, model, OBJECTIVES[config.objective], optimizer, schedule)
    eval_step = make_eval_step(config, model, OBJECTIVES[config.objective])
    probe = make_probe(config, model, tokenizer, run_dir)
    batches = Delivery(
        lambda step: _put(config, model, loader, data_step + step - start), range(start, config.total_steps)
    )
    clock = Clock(config, loader.bytes_per_token, batches.take_waited)
    # ── the run's folder: from here on something is written ──────────────────────────────────────────────────────
    with closing(_start_writing(config, run_dir, start)) as writer, closing(checkpointer):
        if eval_loader and start == 0:
            log(_evaluate(config, model, eval_step, probe, state.params, eval_loader, 0))
        pending: tuple[int, Metrics] | None = None  # fetched one step late: logging never waits for the step just sent
        for step, batch in batches:
            state, metrics = train_step(state, batch)
            done = step + 1
            if pending is not None and (row := clock.tick(*pending)):
                log(row)
            pending = (done, metrics)
            evaluates, saves = due(done, config.eval_steps), due(done, config.save_model_freq)
            milestone = due(done, config.save_milestone_freq)
            if done == config.total_steps or evaluates or saves or milestone:
                if row := clock.tick(*pending):
                    log(row)
                pending = None
                if eval_loader and (evaluates or done == config.total_steps):
                    log(_evaluate(config, model, eval_step, probe, state.params, eval_loader, done))
                if saves or milestone:
                    save(done, milestone)
                clock.restart()  # what was just done is no step's time
        if config.save_final:
            save(config.total_steps, due(config.total_steps, config.save_milestone_freq))
    say(f"done: {run_dir}")
    return run_dir


def _start_writing(config: Config, run_dir: Path, start: int) -> MetricsWriter:
    """Makes the run's folder, with its config.json, and its metrics go on after step `start`."""
    is_main = jax.process_index() == 0
    writer = MetricsWriter(run_dir, config, is_main)
    if is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
    writer.resume_from(start)
    return writer


def _loader(config: Config, dataset: DatasetConfig, tokenizer: Any, flag: str) -> Loader:
    vocab_size = config.architecture.vocab_size
    return make_loader(dataset, tokenizer, seed=config.seed, vocab_size=vocab_size, flag=flag)


def _put(config: Config, model: Model, loader: Loader, step: int) -> Batch:
    shape = (loader.batch_size, loader.seq_length)
    return put_batch(lambda a, b: loader.rows(step, a, b), shape, model.mesh, config.execution.sequence_layout)


def _evaluate(
    config: Config,
    model: Model,
    eval_step: Callable,
    probe: Probe | None,
    params: Params,
    loader: Loader,
    step: int,
) -> dict[str, float]:
    """The objective's means over the first eval_batches batches of the held-out data, as a row, and what is probed."""
    numbers = range(min(config.eval_batches, loader.steps_per_epoch))
    sums = [eval_step(params, _put(config, model, loader, i)) for i in numbers]
    means = reduce(lambda a, b: {name: add(a[name], b[name]) for name in a}, sums)
    values = {f"eval_{name}": float(mean.value()) for name, mean in means.items()}
    if probe:
        # Text is made with all weights on the device, wherever training keeps them.
        params = jax.device_put(params, model.shardings)
        values |= probe(params, (_put(config, model, loader, i) for i in numbers))
    return {"step": step, **values, "eval_bits_per_byte": bits_per_byte(values["eval_loss"], loader.bytes_per_token)}


def _run_dir(config: Config) -> Path:
    """<output_dir>/<experiment_id>; without an id <time>-<name>, or just <name> where a later run must find it."""
    name = config.logger.experiment_id
    if not name:
        name = config.load_llama_config or "run"
        if not config.autoresume:
            now = np.int64(time.time())
            if jax.process_count() > 1:
                now = multihost_utils.broadcast_one_to_all(now)  # one run, one folder
            name = f"{datetime.fromtimestamp(int(now)):%Y%m%d-%H%M%S}-{name}"
    run_dir = Path(config.logger.output_dir).expanduser() / name
    if (run_dir / "metrics.jsonl").exists() and not config.autoresume:
        raise UserError(
            f"--logger.experiment_id={name}: {run_dir} holds a run already: add --autoresume to go on with it, or "
            "choose another name"
        )
    return run_dir


def _describe(config: Config, loader: Loader, eval_loader: Loader | None, run_dir: Path, start: int) -> str:
    execution = config.execution
    mesh = ",".join(map(str, config.mesh_shape))
    lines = [
        f"run    {run_dir}" + (f", from step {start}" if start else ""),
        f"mesh   dp,fsdp,tp,sp = {mesh} on {jax.device_count()} x {jax.devices()[0].device_kind}, "
        f"{execution.attention_type}, {execution.sequence_layout} layout, {config.dtype}",
        f"data   {loader.describe()}",
        describe(config, jax.devices()[0].device_kind),
    ]
    return "\n".join(lines + ([f"eval   {eval_loader.describe()}"] if eval_loader else []))
