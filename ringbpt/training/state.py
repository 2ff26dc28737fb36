"""What a training step carries on: step, params, optimizer state; made on the mesh, sharded from the first byte."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from ringbpt.config import Config, UserError
from ringbpt.model.llama import Model
from ringbpt.training import offload
from ringbpt.training.checkpoint import Checkpointer, load_checkpoint
from ringbpt.training.metrics import say
from ringbpt.training.optimizer import state_specs
from ringbpt.types import Array, Params, PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """step: int32, optimizer steps done. params: float32. opt_state: what the optimizer's init made of them."""

    step: Array
    params: Params
    opt_state: Any


def state_shardings(config: Config, model: Model, optimizer: optax.GradientTransformation) -> TrainState:
    """Optimizer state that mirrors a param is sharded like it; the rest is on every device."""

    def leaf(spec: PartitionSpec, away: bool) -> NamedSharding:
        sharding = NamedSharding(model.mesh, spec)
        return sharding.with_memory_kind("pinned_host") if away else sharding

    specs = _specs(config, model, optimizer)
    return jax.tree.map(leaf, specs, host_leaves(config, model, optimizer), is_leaf=_is_spec)


def host_leaves(config: Config, model: Model, optimizer: optax.GradientTransformation) -> TrainState:
    """True for each leaf of a TrainState that lives in the host's memory, by optimizer.offload_params and _state."""
    specs = _specs(config, model, optimizer)

    def away(tree: PyTree, asked: bool) -> PyTree:
        # Only what is large, and that is what is or mirrors a matrix.
        return jax.tree.map(lambda spec: asked and any(spec), tree, is_leaf=_is_spec)

    return TrainState(
        step=False,
        params=away(specs.params, config.optimizer.offload_params),
        opt_state=away(specs.opt_state, config.optimizer.offload_state),
    )


def _specs(config: Config, model: Model, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(
        step=PartitionSpec(),
        params=model.specs,
        opt_state=state_specs(optimizer, model.abstract_params, model.specs),
    )


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def abstract_state(config: Config, model: Model, optimizer: optax.GradientTransformation) -> TrainState:
    """The state as ShapeDtypeStructs with shardings; nothing is allocated."""
    params = model.abstract_params
    shapes = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32), params=params, opt_state=jax.eval_shape(optimizer.init, params)
    )
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        state_shardings(config, model, optimizer),
    )


def start_state(
    config: Config,
    model: Model,
    optimizer: optax.GradientTransformation,
    params: Params,
    step: int = 0,
    opt_state: Any = None,
) -> TrainState:
    """The state for these params; opt_state None starts the optimizer afresh."""
    shardings = state_shardings(config, model, optimizer)
    params = jax.device_put(params, shardings.params)
    if opt_state is None and (config.optimizer.offload_params or config.optimizer.offload_state):
        opt_state = offload.init(optimizer, params, shardings.opt_state)
    elif opt_state is None:
        opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    return TrainState(step=jax.device_put(jnp.int32(step), shardings.step), params=params, opt_state=opt_state)


def first_state(
    config: Config,
    model: Model,
    optimizer: optax.GradientTransformation,
    checkpointer: Checkpointer,
    data_fingerprint: str,
) -> tuple[TrainState, int]:
    """(state, the step of the data to begin with): the run's own newest checkpoint, another's, or fresh."""
    abstract = abstract_state(config, model, optimizer)
    meta: dict[str, Any] | None
    data_step = _dataset_step(config.load_dataset_state) if config.load_dataset_state else 0
    latest = checkpointer.latest_step() if config.autoresume else None
    if latest is not None:
        params, opt_state, meta = checkpointer.restore(latest, abstract.params, abstract.opt_state)
        where = f"--autoresume from {checkpointer.directory}"
    elif config.load_checkpoint:
        loaded = load_checkpoint(config.load_checkpoint, abstract.params, abstract.opt_state, config.architecture)
        params, opt_state, meta = loaded.params, loaded.opt_state, loaded.meta
        where = f"--load_checkpoint={config.load_checkpoint}"
        if loaded.note:
            say(loaded.note)
    else:
        return start_state(config, model, optimizer, model.init(jax.random.key(config.seed))), data_step
    if meta is None:
        return start_state(config, model, optimizer, params), data_step
    if meta["data"]["fingerprint"] != data_fingerprint:
        raise UserError(
            f"{where}: the training data, its order or its packing is not what step {meta['step']} was trained on: "
            "give the flags of that run, or take its weights alone with --load_checkpoint=trainstate_params::<path>"
        )
    if meta["step"] >= config.total_steps:
        raise UserError(
            f"{where}: step {meta['step']} is not below --total_steps={config.total_steps}: "
            f"--total_steps={meta['step'] + 1} or more would go on"
        )
    if opt_state is None:
        say(f"{where}: no optimizer state was saved (--checkpointer.save_optimizer_state); it starts anew")
    state = start_state(config, model, optimizer, params, meta["step"], opt_state)
    return state, meta["data"]["step"]


def _dataset_step(path: str) -> int:
    """The place in the data that one of our checkpoints (a step's folder) stands at."""
    try:
        return int(json.loads((Path(path) / "meta" / "metadata").read_text())["data"]["step"])
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"--load_dataset_state={path}: no step folder of a checkpoint, such as runs/<run>/checkpoints/<step>"
        ) from None
