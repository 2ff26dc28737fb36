"""The optimizer and its learning-rate schedule from the flags, and where the optimizer's state lives on the mesh."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jax.tree_util import DictKey, tree_flatten_with_path, tree_map_with_path

from ringbpt.config import AdamWConfig, LionConfig, MuonConfig, OptimizerConfig, PalmConfig, ScheduledConfig
from ringbpt.types import Params, PyTree

Schedule = Callable[[int | jax.Array], jax.Array]
Path = tuple[str, ...]

# The matrices that muon orthogonalises, layer by layer: the dims of one layer's weight, and which of them it reads.
# Everything else (embedding, unembedding, vectors) takes adam.
MUON_WEIGHTS = {
    "w_q": ("D N H", "D"),
    "w_k": ("D K H", "D"),
    "w_v": ("D K H", "D"),
    "w_o": ("N H D", "N H"),
    "w_gate": ("D F", "D"),
    "w_up": ("D F", "D"),
    "w_down": ("F D", "F"),
}  # an expert's matrices have an E in front of these


def make_optimizer(config: OptimizerConfig, layer_axis: int = 0) -> tuple[optax.GradientTransformation, Schedule]:
    """The gradient transformation that `config` names, and its schedule: step -> learning rate.

    `config` has all its rates, as complete_rates fills them in.
    `layer_axis` is the axis over which stacked layers are stacked (llama.param_scan_axis); only muon looks at it.
    Accumulation and clipping are not in here: the train step adds totals over micro-batches, multiplies by
    clip_factor, for which all gradients are needed, and calls the optimizer once, or for one weight after the other.
    Raises KeyError for a type that isn't one of OPTIMIZERS.
    """
    group = config.chosen
    schedule = _palm_schedule(group) if isinstance(group, PalmConfig) else _schedule(config, group)
    optimizer = OPTIMIZERS[config.type](group, schedule, layer_axis)
    if group.clip_gradient > 0:
        # Where clipping once stood: states that were saved with it keep their names.
        optimizer = optax.chain(optax.identity(), optimizer)
    return optimizer, schedule


def clip_factor(config: OptimizerConfig, norm: jax.Array) -> jax.Array:
    """What gradients of this global norm are multiplied by, so that it is at most clip_gradient; 0 clips nothing."""
    limit = config.chosen.clip_gradient
    return jnp.where(norm < limit, 1.0, limit / norm) if limit > 0 else jnp.ones_like(norm)


def state_specs(optimizer: optax.GradientTransformation, params_abstract: Params, param_specs: PyTree) -> PyTree:
    """PartitionSpecs with the structure of `optimizer.init(params)`.

    A leaf of the state that mirrors a parameter (its path ends in the parameter's path, and it has its shape) takes
    the parameter's spec; counters, coefficients and placeholders of shape (1,) are replicated.
    """
    specs = jax.tree.leaves(param_specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    params, _ = tree_flatten_with_path(params_abstract)
    known = {_names(path): (leaf.shape, spec) for (path, leaf), spec in zip(params, specs, strict=True)}

    def spec_of(path: tuple, leaf: jax.ShapeDtypeStruct) -> PartitionSpec:
        # Optax keeps a copy of the parameter tree below a field of a named tuple (mu, nu, ema, v), so the trailing
        # run of dict keys is the parameter's path.
        shape, spec = known.get(_names(path), (None, PartitionSpec()))
        return spec if shape == leaf.shape else PartitionSpec()

    return tree_map_with_path(spec_of, jax.eval_shape(optimizer.init, params_abstract))


def _names(path: tuple) -> Path:
    """The trailing run of dict keys of a tree path."""
    names: list[str] = []
    for key in reversed(path):
        if not isinstance(key, DictKey):
            break
        names.append(key.key)
    return tuple(reversed(names))


def _decayed(params: Params) -> PyTree:
    """True where weight decay applies: everywhere but in the norms' vectors and the biases (b_q, b_k, b_v)."""
    return tree_map_with_path(
        lambda path, _: not (_names(path)[-1].endswith("norm") or _names(path)[-1].startswith("b_")), params
    )


def _momentum_dtype(bf16_momentum: bool) -> jnp.dtype:
    return jnp.dtype(jnp.bfloat16 if bf16_momentum else jnp.float32)


# ---------------------------------------------------------------------------------------------- schedules


def _schedule(config: OptimizerConfig, group: ScheduledConfig) -> Schedule:
    """init_lr -> lr over lr_warmup_steps, then down to end_lr at lr_decay_steps (counted from step 0), then flat."""
    warmup, end = group.lr_warmup_steps, group.lr_decay_steps
    assert warmup is not None and end is not None
    if config.schedule == "warmup_cosine":
        return optax.warmup_cosine_decay_schedule(group.init_lr, group.lr, warmup, end, group.end_lr)
    starts = {"warmup_linear": warmup, "wsd": max(warmup, end - round(config.wsd_decay_fraction * end))}
    decay_start = starts[config.schedule]
    rise = optax.linear_schedule(group.init_lr, group.lr, warmup)
    fall = optax.linear_schedule(group.lr, group.end_lr, end - decay_start)
    return optax.join_schedules([rise, optax.constant_schedule(group.lr), fall], [warmup, decay_start])


def _palm_schedule(group: PalmConfig) -> Schedule:
    """PaLM's rate: flat during the warm-up, then 1/sqrt(step).

    As the original has it, `lr` is relative to PaLM's 0.01: the flat part is lr only with 10,000 warm-up steps.
    """
    assert group.lr is not None
    share = group.lr / 0.01
    return lambda step: share * jax.lax.rsqrt(jnp.maximum(step, group.lr_warmup_steps).astype(jnp.float32))


# ---------------------------------------------------------------------------------------------- optimizers


def _adamw(group: AdamWConfig, schedule: Schedule, layer_axis: int) -> optax.GradientTransformation:
    if group.multiply_by_parameter_scale:
        return _adafactor(group, schedule, lambda step: group.weight_decay * schedule(step))
    return _decoupled(optax.adamw, group, schedule)


def _lion(group: LionConfig, schedule: Schedule, layer_axis: int) -> optax.GradientTransformation:
    return _decoupled(optax.lion, group, schedule)


def _decoupled(make: Callable, group: AdamWConfig | LionConfig, schedule: Schedule) -> optax.GradientTransformation:
    """An optimizer of optax with two betas, momentum, and a weight decay apart from the gradient."""
    mu_dtype = _momentum_dtype(group.bf16_momentum)
    return make(schedule, b1=group.b1, b2=group.b2, weight_decay=group.weight_decay, mask=_decayed, mu_dtype=mu_dtype)


def _palm(group: PalmConfig, schedule: Schedule, layer_axis: int) -> optax.GradientTransformation:
    """Ref: PaLM, https://arxiv.org/abs/2204.02311, section 5: weight decay is the square of the rate (at 1e-4)."""
    return _adafactor(group, schedule, lambda step: (group.weight_decay / 1e-4) * schedule(step) ** 2)


def _adafactor(
    group: AdamWConfig | PalmConfig, schedule: Schedule, weight_decay: Schedule
) -> optax.GradientTransformation:
    """Adafactor without factoring: Adam's second moment, steps in units of each weight's own RMS."""
    return optax.adafactor(
        schedule,
        decay_rate=group.b2,
        multiply_by_parameter_scale=True,
        clipping_threshold=None,
        momentum=group.b1,
        dtype_momentum=_momentum_dtype(group.bf16_momentum),
        weight_decay_rate=weight_decay,
        weight_decay_mask=_decayed,
        factored=False,
    )


def _muon(group: MuonConfig, schedule: Schedule, layer_axis: int) -> optax.GradientTransformation:
    """Muon on the layers' matrices, adam on the rest, whose rate follows the same schedule at adam_lr.

    Ref: https://kellerjordan.github.io/posts/muon
    """

    def dimension_numbers(path: tuple, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        if _names(path)[-1] not in MUON_WEIGHTS:
            return None
        dims, reads = MUON_WEIGHTS[_names(path)[-1]]
        letters = ["E", *dims.split()] if leaf.ndim == len(dims.split()) + 2 else dims.split()
        letters.insert(layer_axis, "L")
        return optax.contrib.MuonDimensionNumbers(
            reduction_axis=tuple(i for i, letter in enumerate(letters) if letter in reads.split()),
            output_axis=tuple(i for i, letter in enumerate(letters) if letter not in ["L", "E", *reads.split()]),
        )

    assert group.lr is not None and group.adam_lr is not None
    adam_share = group.adam_lr / group.lr
    return optax.contrib.muon(
        schedule,
        beta=group.beta,
        weight_decay=group.weight_decay,
        adam_b2=0.95,  # as modded-nanogpt has it; optax's 0.999 is slow next to muon's steps
        adam_learning_rate=lambda step: schedule(step) * adam_share,
        muon_weight_dimension_numbers=lambda params: tree_map_with_path(dimension_numbers, params),
    )


# Each: (the group of its flags, the schedule, the axis of stacked layers) -> the transformation.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": _adamw,
    "palm": _palm,
    "lion": _lion,
    "muon": _muon,
}
