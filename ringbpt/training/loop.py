"""The training run, from a Config to the last checkpoint; `train` reads top to bottom."""

import math
from collections.abc import Callable
from contextlib import closing
from functools import partial, reduce
from pathlib import Path
from typing import Any

import jax

from ringbpt import processes
from ringbpt.config import Config, UserError, describe_rates
from ringbpt.data.delivery import Delivery
from ringbpt.data.loader import Loader, make_loader
from ringbpt.data.text.chat import set_chat_template
from ringbpt.data.text.tokenizers import Tokenizer, describe_ends, make_tokenizer
from ringbpt.ending import Signals, Stopped
from ringbpt.evaluation.pairs import draw_pictured
from ringbpt.evaluation.probe import make_probe
from ringbpt.mesh import mesh_of
from ringbpt.model.llama import Model
from ringbpt.model.weights import merge
from ringbpt.objectives import Objective, objective_of
from ringbpt.rollout.ahead import Interrupted
from ringbpt.rollout.collect import Rollouts
from ringbpt.training.agreement import Agreement, Wish
from ringbpt.training.guards import Watch
from ringbpt.training.memory import decided_for, describe
from ringbpt.training.metrics import Clock, bits_per_byte, due, say
from ringbpt.training.profile import Profile
from ringbpt.training.reference import ask_reference
from ringbpt.training.replicas import make_compare
from ringbpt.training.run import Run, open_run
from ringbpt.training.state import StateLayout, TrainState
from ringbpt.training.step import Metrics, make_eval_step, make_train_step
from ringbpt.training.watchdog import Watchdog
from ringbpt.types import Batch, Params

TRAIN, EVAL = "train_dataset", "eval_dataset"


def train(config: Config, signals: Signals | None = None) -> Path:
    """Trains as the config says and returns the run's folder; what is wrong with the data or a checkpoint is a
    UserError before anything is written. Stopped by an exception, it leaves the metrics, their picture and whole
    checkpoints behind; what `signals` are told ends it after a step, with a checkpoint of that step, by Stopped.
    """
    with closing(open_run(config)) as run:
        _train(config, run, signals or Signals())
        run.leave_adapter()
    say(f"done: {run.folder}")
    return run.folder


def _train(config: Config, run: Run, signals: Signals) -> None:
    # ── what there is to train, and on what: the quick refusals first, then the data, then the devices ────────────
    mesh, config = mesh_of(config), decided_for(config, jax.devices()[0].device_kind)
    tokenizer, objective = make_tokenizer(config.tokenizer), objective_of(config)
    model = Model.of(config, mesh)
    layout = StateLayout(config, model, has_reference=objective.in_step(config))
    rollouts, loaders = _data(layout, objective, tokenizer, run.folder, signals)
    state = run.first_state(layout, (rollouts or loaders[TRAIN]).fingerprint)
    if objective.reference or layout.has_reference:
        state, loaders = ask_reference(run, layout, state, loaders)
    loader, held_out = rollouts or loaders[TRAIN], loaders.get(EVAL)
    evaluate = held_out and _evaluation(layout, objective, tokenizer, run.folder, held_out)
    _set_template(config, tokenizer)
    say(_describe(config, model, run, tokenizer, loader, held_out))

    def log(row: dict[str, float]) -> None:
        row |= rollouts.facts(int(row["step"]), row) if rollouts else {}
        if len(row) > 1:  # held-out data of which nothing takes loss gives no number
            clock.spend("save", run.await_first)
            writer.write(row)
            writer.progress(int(row["step"]), row)

    def tick(pending: tuple[int, Metrics] | None) -> None:
        if pending is not None and (row := clock.tick(*pending)):
            log(row)

    # ── the programs ─────────────────────────────────────────────────────────────────────────────────────────────
    train_step, compare = make_train_step(layout, objective), make_compare(layout)
    source = rollouts or _delivery(model, loaders[TRAIN], run)
    clock = _clock(run, objective, loader, source)
    # ── the run's folder: from here on something is written ──────────────────────────────────────────────────────
    with (
        closing(clock),
        closing(run.start_writing(tokenizer)) as writer,
        clock.closing("save", run.checkpointer),
        closing(source),
        closing(Watchdog(config.jax_distributed.step_timeout, run.folder)) as watchdog,
        closing(Profile(config, run.folder, run.start)) as profile,
        processes.guarded(),
        clock.spending("steps"),
    ):
        clock.spend("save", run.save_first, state)
        if evaluate and run.start == 0:
            log(clock.spend("eval", evaluate, state, 0))
        agreement = Agreement(config.save_minutes or 0.0, signals.told)
        pending: tuple[int, Metrics] | None = None  # fetched one step late: logging never waits for the step just sent
        for step in range(run.start, config.total_steps):
            batch = _batch(source, run, step, state, clock, partial(tick, pending))
            if step == run.start:
                clock.spend("compile", compile_ahead, "the step", train_step, state, batch)
                signals.hold()  # from here on there is something to save
            # The first metrics are waited for in the second step: until then connections are made.
            watchdog.at(step, watched=step > run.start + 1)
            done = step + 1
            state, metrics = profile(done, train_step, state, batch)
            run.checkpointer.poll()
            tick(pending)
            pending = (done, metrics)
            compare(state, done, now=False)
            last, wish = done == config.total_steps, agreement.after(done)
            evaluates, saves = due(done, config.eval_steps), due(done, config.save_model_freq)
            milestone = due(done, config.save_milestone_freq)
            if last or evaluates or saves or milestone or wish:
                tick(pending)
                pending = None
                if evaluate and (last or (evaluates and not wish.code)):
                    watchdog.at(done, watched=False)  # it may compile
                    log(clock.spend("eval", evaluate, state, done))
                watchdog.at(done)
                ends = (last or wish.code) and config.save_final
                if saves or milestone or ends or (wish is Wish.SAVE and not last):
                    compare(state, done, now=True)
                    whole = bool(wish) and not last  # a step to go on from
                    clock.spend("save", run.save, done, state, milestone, clock.means, whole)
                    if whole or config.checkpointer.save_optimizer_state:
                        agreement.saved()
                clock.restart()  # what was just done is no step's time
                if wish.code and not last:
                    saved = f"saved step {done}" if ends else f"after step {done}, not saved (--nosave_final)"
                    raise Stopped(wish.code, saved, run.folder.name)


def _data(
    layout: StateLayout, objective: Objective, tokenizer: Tokenizer, folder: Path, signals: Signals
) -> tuple[Rollouts | None, dict[str, Loader]]:
    """What the policy itself samples, where the objective learns from that, or the loaders of a run's data sets."""

    def weights(state: TrainState) -> tuple[Params, Params | None]:
        return merge(state.trained, state.frozen), layout.reference_of(state)

    config, model = layout.config, layout.model
    if objective.rollouts:  # before anything is sampled, which its ends end
        _set_template(config, tokenizer)
    asked = (weights, say, signals.told)
    rollouts = Rollouts(config, model, tokenizer, folder, *asked) if objective.rollouts else None
    loaders = {} if rollouts else loaders_of(config, tokenizer)
    shares = bool(rollouts) or any(loader.shares for loader in loaders.values())
    model.check_kernel(config.train_dataset.seq_length, shares)
    fingerprint = (rollouts or loaders[TRAIN]).fingerprint
    processes.agree("the data", {"the training data that --train_dataset finds": fingerprint})
    return rollouts, loaders


def _set_template(config: Config, tokenizer: Tokenizer) -> None:
    template = config.train_dataset.text_processor.chat_template
    set_chat_template(tokenizer, template, "train_dataset.text_processor.chat_template")


def _clock(run: Run, objective: Objective, loader: Loader | Rollouts, source: Rollouts | Delivery[Batch]) -> Clock:
    config = run.config
    bytes_per_token = loader.bytes_per_token if objective.is_in_nats(config) else math.inf
    look = Watch(config.guard, say).look
    return Clock(config, objective, bytes_per_token, source.take_waited, run.means, look, run.began)


def _batch(
    source: Rollouts | Delivery[Batch], run: Run, step: int, state: TrainState, clock: Clock, tick: Callable[[], None]
) -> Batch:
    """What the step learns from. Where it cannot be had any more, as without servers, or a signal ends the waiting for
    it, what was learnt is saved.
    """
    try:
        return source.batch(step, state)
    except (UserError, Interrupted) as error:
        saves = step > run.start and run.config.save_final
        if saves:
            tick()
            clock.spend("save", run.save, step, state, False, clock.means, True)
        if isinstance(error, UserError):
            raise
        raise Stopped(
            error.code, f"saved step {step}" if saves else f"before step {step + 1}", run.folder.name
        ) from None


def _delivery(model: Model, loader: Loader, run: Run) -> Delivery[Batch]:
    steps = range(run.start, run.config.total_steps)
    return Delivery(lambda step: _put(model, loader, run.data_step_of(step)), steps)


def loaders_of(config: Config, tokenizer: Tokenizer) -> dict[str, Loader]:
    """The loaders of a run's data sets by their names, of the held-out one where it is evaluated."""
    return {flag: loader_of(config, tokenizer, flag) for flag in (TRAIN, *([EVAL] if config.eval_steps else []))}


def loader_of(config: Config, tokenizer: Tokenizer, flag: str = TRAIN) -> Loader:
    """The loader of one of the config's data sets, with what its objective reads."""
    objective, name = objective_of(config), f"--objective={config.objective}"
    if objective.rollouts:
        raise UserError(f"{name} learns from what the run itself samples, and has no data set to look at beforehand")
    return make_loader(
        getattr(config, flag),
        tokenizer,
        vocab_size=config.architecture.vocab_size,
        flag=flag,
        seed=config.seed,
        columns=objective.columns,
        optional=objective.optional,
        shapes=objective.shapes,
        taker=name,
        whole_documents=objective.whole_documents,
        mismatched=objective.mismatched,
        window=config.architecture.sliding_window,
    )


def compile_ahead(name: str, program: Any, *arguments: Any) -> None:
    """Compiles a jitted function for these arguments, and waits until all processes have: its collectives then start
    at one time, and none gives up waiting for a process that still compiles.
    """
    program.lower(*arguments).compile()
    processes.meet(f"{name} is compiled")


def _put(model: Model, loader: Loader, step: int) -> Batch:
    shape = (loader.batch_size, loader.seq_length)
    return model.put_batch(partial(loader.rows, step), shape)


def _evaluation(
    layout: StateLayout, objective: Objective, tokenizer: Tokenizer, folder: Path, loader: Loader
) -> Callable[[TrainState, int], dict[str, float]]:
    """evaluate(state, step) measures the objective over the first eval_batches batches of the held-out data, and what
    is probed, as a row of metrics; pictures go to `folder`.
    """
    config, model = layout.config, layout.model
    eval_step, probe = make_eval_step(layout, objective), make_probe(config, model, tokenizer, folder)
    numbers = range(min(config.eval_batches, loader.steps_per_epoch))
    compiled: list[bool] = []

    def evaluate(state: TrainState, step: int) -> dict[str, float]:
        if not compiled:
            compile_ahead("the evaluation", eval_step, state, _put(model, loader, 0))
            compiled.append(True)
        # Each is fetched before the next is sent off, and added here: see mesh.be_patient.
        sums = [jax.device_get(eval_step(state, _put(model, loader, i))) for i in numbers]
        means = reduce(lambda a, b: {name: a[name] + b[name] for name in a}, sums)
        draw_pictured(folder, means, step)
        values = objective.values(means, config)
        values |= bits_per_byte(values, loader.bytes_per_token) if objective.is_in_nats(config) else {}
        row = {f"eval_{name}": value for name, value in values.items()}
        if probe:
            # Text is made with all weights on the device, wherever training keeps them.
            params = jax.device_put(merge(state.trained, state.frozen), model.shardings)
            row |= probe(params, (_put(model, loader, i) for i in numbers))
        return {"step": step, **row}

    return evaluate


def _describe(
    config: Config, model: Model, run: Run, tokenizer: Tokenizer, loader: Loader | Rollouts, held_out: Loader | None
) -> str:
    execution = config.execution
    mesh = ",".join(map(str, config.mesh_shape))
    lines = [
        f"run    {run.folder}" + (f", from step {run.start}" if run.start else ""),
        f"mesh   dp,fsdp,tp,sp = {mesh} on {jax.device_count()} x {jax.devices()[0].device_kind}, "
        f"{execution.attention_type}, {execution.sequence_layout} layout, {config.dtype}",
        *([f"vocab  {padded}"] if (padded := model.describe_tables()) else []),
        f"tokens {tokenizer.describe()}, {describe_ends(tokenizer)}",
        f"data   {loader.describe()}",
        f"rate   {describe_rates(config)}",
        describe(config, jax.devices()[0].device_kind),
    ]
    return "\n".join(lines + ([f"eval   {held_out.describe()}"] if held_out else []))
