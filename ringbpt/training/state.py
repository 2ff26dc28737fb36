"""What a training step carries on: step, weights, optimizer state; made on the mesh, sharded from the first byte.

Weights that are trained and weights that stay as they are (`frozen`, the base of adapters) stand apart: gradients,
optimizer state, offload and checkpoints know the former alone, and the two are merged where the model is computed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from ringbpt.config import Config
from ringbpt.model.llama import Model
from ringbpt.training import offload
from ringbpt.training.optimizer import state_specs
from ringbpt.types import Array, Params, PyTree

IsFrozen = Callable[[str], bool]  # of a weight's dotted name, "layers.w_q"


def nothing_frozen(name: str) -> bool:
    """All weights are trained."""
    return False


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """step: int32, optimizer steps done. trained: float32, nested dicts. opt_state: what the optimizer's init made of
    them. frozen: the rest of the model's weights, in whatever dtype they were given; {} where all are trained.
    """

    step: Array
    trained: Params
    opt_state: Any
    frozen: Params = field(default_factory=dict)


def divide(params: PyTree, is_frozen: IsFrozen, prefix: str = "") -> tuple[PyTree, PyTree]:
    """(trained, frozen): a nested dict of weights, or of what belongs to them, as two that hold a part each."""
    parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name, value in params.items():
        if isinstance(value, dict):
            inner = divide(value, is_frozen, f"{prefix}{name}.")
        else:
            frozen = is_frozen(prefix + name)
            inner = ({} if frozen else value, value if frozen else {})
        for part, of_it in zip(parts, inner, strict=True):
            if not isinstance(of_it, dict) or of_it:
                part[name] = of_it
    return parts


def state_shardings(
    config: Config, model: Model, optimizer: optax.GradientTransformation, is_frozen: IsFrozen = nothing_frozen
) -> TrainState:
    """Optimizer state that mirrors a weight is sharded like it; the rest is on every device."""

    def leaf(spec: PartitionSpec, away: bool) -> NamedSharding:
        sharding = NamedSharding(model.mesh, spec)
        return sharding.with_memory_kind("pinned_host") if away else sharding

    specs, offloaded = _specs(model, optimizer, is_frozen), host_leaves(config, model, optimizer, is_frozen)
    return jax.tree.map(leaf, specs, offloaded, is_leaf=_is_spec)


def host_leaves(
    config: Config, model: Model, optimizer: optax.GradientTransformation, is_frozen: IsFrozen = nothing_frozen
) -> TrainState:
    """True for each leaf of a TrainState that lives in the host's memory, by optimizer.offload_params and _state."""
    specs = _specs(model, optimizer, is_frozen)

    def away(tree: PyTree, asked: bool) -> PyTree:
        # Only what is large, and that is what is or mirrors a matrix.
        return jax.tree.map(lambda spec: asked and any(spec), tree, is_leaf=_is_spec)

    return TrainState(
        step=False,
        trained=away(specs.trained, config.optimizer.offload_params),
        opt_state=away(specs.opt_state, config.optimizer.offload_state),
        frozen=away(specs.frozen, config.optimizer.offload_params),
    )


def _specs(model: Model, optimizer: optax.GradientTransformation, is_frozen: IsFrozen) -> TrainState:
    trained, frozen = divide(model.specs, is_frozen)
    abstract, _ = divide(model.abstract_params, is_frozen)
    opt_state = state_specs(optimizer, abstract, trained)
    return TrainState(step=PartitionSpec(), trained=trained, opt_state=opt_state, frozen=frozen)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def abstract_state(
    config: Config, model: Model, optimizer: optax.GradientTransformation, is_frozen: IsFrozen = nothing_frozen
) -> TrainState:
    """The state as ShapeDtypeStructs with shardings; nothing is allocated."""
    trained, frozen = divide(model.abstract_params, is_frozen)
    opt_state = jax.eval_shape(optimizer.init, trained)
    shapes = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trained, opt_state, frozen)
    shardings = state_shardings(config, model, optimizer, is_frozen)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def start_state(
    config: Config,
    model: Model,
    optimizer: optax.GradientTransformation,
    params: Params,
    step: int = 0,
    opt_state: Any = None,
    is_frozen: IsFrozen = nothing_frozen,
) -> TrainState:
    """The state for these params, all of the model's; opt_state None starts the optimizer afresh."""
    shardings = state_shardings(config, model, optimizer, is_frozen)
    trained, frozen = divide(params, is_frozen)
    trained, frozen = jax.device_put((trained, frozen), (shardings.trained, shardings.frozen))
    if opt_state is None and (config.optimizer.offload_params or config.optimizer.offload_state):
        opt_state = offload.init(optimizer, trained, shardings.opt_state)
    elif opt_state is None:
        opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trained)
    return TrainState(jax.device_put(jnp.int32(step), shardings.step), trained, opt_state, frozen)
