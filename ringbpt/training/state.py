"""What a training step carries on: step, weights, optimizer state; made on the mesh, sharded from the first byte.

Weights that are trained and weights that stay as they are (`frozen`, the base of adapters) stand apart: gradients,
optimizer state, offload and checkpoints know the former alone, and the two are merged where the model is computed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from ringbpt.config import Config, complete_rates
from ringbpt.model.adapters import IN_OUT
from ringbpt.model.llama import COMPUTE_DTYPES, Model
from ringbpt.model.quantised import Kept, stacked_dims
from ringbpt.training import offload
from ringbpt.training.guards import Guard
from ringbpt.training.optimizer import make_optimizer, state_specs
from ringbpt.types import Array, Params, PyTree

IS_SPEC = lambda x: isinstance(x, PartitionSpec)  # noqa: E731


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """step: int32, optimizer steps done. trained: float32, nested dicts. opt_state: what the optimizer's init made of
    them. frozen: the rest of the model's weights, in whatever dtype they were given; {} where all are trained. guard:
    what the steps' guard remembers; None where there is none. reference: another model's weights, in the dtype that it
    is computed in, where each step asks it what it says; None where none does. It is in no checkpoint.
    """

    step: Array
    trained: Params
    opt_state: Any
    frozen: Params = field(default_factory=dict)
    guard: Guard | None = None
    reference: Params | None = None


def divide(params: PyTree, is_frozen: Callable[[str], bool], prefix: str = "") -> tuple[PyTree, PyTree]:
    """(trained, frozen): nested dicts of weights, or of what belongs to them, by their dotted names ("layers.w_q")."""
    parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name, value in params.items():
        if isinstance(value, dict):
            for part, inner in zip(parts, divide(value, is_frozen, f"{prefix}{name}."), strict=True):
                part |= {name: inner} if inner else {}
        else:
            parts[is_frozen(prefix + name)][name] = value
    return parts


@dataclass(frozen=True)
class StateLayout:
    """Which weights a run trains, by which optimizer, and where each leaf of its TrainState lives.

    frozen_by(dotted name) says of a weight that it stays as it is; None: the model says it. has_reference: whether a
    reference model is computed in each step, which is the model without its adapters where it has some and no other
    is named: that one has no weights of its own. Nothing is allocated but by `start`.
    """

    config: Config
    model: Model
    frozen_by: Callable[[str], bool] | None = None
    has_reference: bool = False

    def is_frozen(self, name: str) -> bool:
        return (self.frozen_by or self.model.is_frozen)(name)

    @property
    def has_own_reference(self) -> bool:
        """Whether the reference has weights of its own."""
        return self.has_reference and not (self.model.pairs and not self.config.reference_checkpoint)

    def reference_of(self, state: TrainState) -> Params | None:
        """The weights of the reference model that a step computes, if it does."""
        return state.frozen if self.has_reference and not self.has_own_reference else state.reference

    @cached_property
    def made(self) -> tuple[optax.GradientTransformation, optax.Schedule]:
        """The optimizer, and its schedule: step -> learning rate."""
        return make_optimizer(complete_rates(self.config), self.config.architecture.param_scan_axis)

    @cached_property
    def _specs(self) -> TrainState:
        trained, frozen = divide(self.model.specs, self.is_frozen)
        abstract, _ = divide(self.model.abstract_params, self.is_frozen)
        opt_state = state_specs(self.made[0], abstract, trained)
        frozen = self._as_kept(frozen, lambda kept, _, spec: kept.like(spec))
        guard = jax.tree.map(lambda _: PartitionSpec(), self._guard)
        reference = self.model.base.specs if self.has_own_reference else None
        return TrainState(PartitionSpec(), trained, opt_state, frozen, guard, reference)

    @property
    def _guard(self) -> Guard | None:
        return Guard.new(self.config.guard) if self.config.guard.skip else None

    @cached_property
    def on_host(self) -> TrainState:
        """True for each leaf in the host's memory: what is or mirrors a matrix, where that is asked for."""

        def away(tree: PyTree, asked: bool) -> PyTree:
            return jax.tree.map(lambda spec: asked and any(spec), tree, is_leaf=IS_SPEC)

        specs, config = self._specs, self.config.optimizer
        trained, frozen = away((specs.trained, specs.frozen), config.offload_params)
        guard = jax.tree.map(lambda _: False, self._guard)
        reference = jax.tree.map(lambda _: False, specs.reference, is_leaf=IS_SPEC)
        return TrainState(False, trained, away(specs.opt_state, config.offload_state), frozen, guard, reference)

    @cached_property
    def shardings(self) -> TrainState:
        """Optimizer state that mirrors a weight is sharded like it; the rest is on every device."""

        def leaf(spec: PartitionSpec, away: bool) -> NamedSharding:
            sharding = NamedSharding(self.model.mesh, spec)
            return sharding.with_memory_kind("pinned_host") if away else sharding

        return jax.tree.map(leaf, self._specs, self.on_host, is_leaf=IS_SPEC)

    @cached_property
    def abstract(self) -> TrainState:
        """The state as ShapeDtypeStructs with shardings."""
        trained, _ = divide(self.model.abstract_params, self.is_frozen)
        opt_state = jax.eval_shape(self.made[0].init, trained)
        guard = jax.eval_shape(lambda: self._guard)
        frozen = self._as_kept(self.frozen_as_read, lambda kept, dims, x: kept.abstract(x, dims))
        base = self.model.base
        reference = jax.tree.map(self._in_reference, base.abstract_params) if self.has_own_reference else None
        shapes = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trained, opt_state, frozen, guard, reference)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.shardings)

    @property
    def in_blocks(self) -> dict[str, tuple[Kept, str]]:
        """The weights that are kept quantised beside adapters, by their dotted names: how, and their dims."""
        lora, axis = self.config.lora, self.config.architecture.param_scan_axis
        kept = Kept.of(lora.base_dtype, lora.double_quantization) if self.model.pairs else None
        return {f"layers.{name}": (kept, stacked_dims(name, axis)) for name in IN_OUT} if kept else {}

    @property
    def frozen_as_read(self) -> Params:
        """What stays, as ShapeDtypeStructs, before what is in_blocks is quantised."""
        lora, in_blocks = self.config.lora, bool(self.in_blocks)

        def leaf(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            # Adapters' scales, a number a layer, are exact.
            dtype = COMPUTE_DTYPES[self.config.dtype if in_blocks or not lora.base_dtype else lora.base_dtype]
            dtype = dtype if self.model.pairs and x.ndim > 1 else x.dtype
            return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

        return jax.tree.map(leaf, divide(self.model.abstract_params, self.is_frozen)[1])

    def kept(self, frozen: Params) -> Params:
        """What stays, of arrays, as it is kept beside adapters."""
        return self._as_kept(frozen, lambda kept, dims, w: kept.of_stack(w, dims))

    def _as_kept(self, frozen: Params, make: Callable[[Kept, str, Any], Any]) -> Params:
        """What stays, or belongs to it, with make(how, dims, leaf) in place of what is quantised."""
        if not self.in_blocks:
            return frozen
        layers = dict(frozen["layers"])
        for name, (kept, dims) in self.in_blocks.items():
            weight = name.removeprefix("layers.")
            layers[weight] = make(kept, dims, layers[weight])
        return frozen | {"layers": layers}

    def _in_reference(self, x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, COMPUTE_DTYPES[self.config.dtype])

    def with_reference(self, state: TrainState, params: Params) -> TrainState:
        """The state with all of another model's params as the reference."""
        dtype = COMPUTE_DTYPES[self.config.dtype]
        cast = jax.jit(
            lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree), out_shardings=self.shardings.reference
        )
        return replace(state, reference=cast(params))

    def start(self, params: Params, step: int = 0, opt_state: Any = None, guard: Guard | None = None) -> TrainState:
        """The state for all of the model's params; opt_state None starts the optimizer afresh, guard None the guard."""
        shardings = self.shardings
        trained, frozen = jax.device_put(divide(params, self.is_frozen), (shardings.trained, shardings.frozen))
        frozen = jax.tree.map(lambda x, as_kept: x.astype(as_kept.dtype), frozen, self.abstract.frozen)
        if opt_state is None and self.config.optimizer.is_offloaded:
            opt_state = offload.init(self.made[0], trained, shardings.opt_state)
        elif opt_state is None:
            opt_state = jax.jit(self.made[0].init, out_shardings=shardings.opt_state)(trained)
        guard = jax.device_put(guard or self._guard, shardings.guard)
        return TrainState(jax.device_put(jnp.int32(step), shardings.step), trained, opt_state, frozen, guard)
