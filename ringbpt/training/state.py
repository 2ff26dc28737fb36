"""What a training step carries on: step, params, optimizer state; made on the mesh, sharded from the first byte."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from ringbpt.model.llama import Model
from ringbpt.training.optimizer import state_specs
from ringbpt.types import Array, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """step: int32, optimizer steps done. params: float32. opt_state: what the optimizer's init made of them."""

    step: Array
    params: Params
    opt_state: Any


def state_shardings(model: Model, optimizer: optax.GradientTransformation) -> TrainState:
    """Optimizer state that mirrors a param is sharded like it; the rest is on every device."""
    specs = TrainState(
        step=PartitionSpec(),
        params=model.specs,
        opt_state=state_specs(optimizer, model.abstract_params, model.specs),
    )
    return jax.tree.map(
        lambda s: NamedSharding(model.mesh, s), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )


def abstract_state(model: Model, optimizer: optax.GradientTransformation) -> TrainState:
    """The state as ShapeDtypeStructs with shardings; nothing is allocated."""
    params = model.abstract_params
    shapes = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32), params=params, opt_state=jax.eval_shape(optimizer.init, params)
    )
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, state_shardings(model, optimizer)
    )


def start_state(
    model: Model, optimizer: optax.GradientTransformation, params: Params, step: int = 0, opt_state: Any = None
) -> TrainState:
    """The state for these params; opt_state None starts the optimizer afresh."""
    shardings = state_shardings(model, optimizer)
    if opt_state is None:
        opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    return TrainState(step=jax.device_put(jnp.int32(step), shardings.step), params=params, opt_state=opt_state)
