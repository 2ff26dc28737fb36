"""What a training step holds on one device, by name: the account that a compiled program is compared with.

The step is fullest at one of a few moments: in a layer, going forward or back, or in the backward of the loss. The
account names what is alive at the fullest one, so its sum is the peak. The counts below were read off the compiled
program's buffer assignment (XLA's --xla_dump_to); tests/training/test_memory.py holds them to new ones.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from ringbpt.config import Config
from ringbpt.dims import AXES
from ringbpt.hardware import find
from ringbpt.model.llama import COMPUTE_DTYPES, Model, make_dims
from ringbpt.objectives import objective_of
from ringbpt.training.state import StateLayout, TrainState


@dataclass(frozen=True)
class Arrays:
    """A device's arrays of one layer that are alive together, by their shape and dtype.

    model: [b, t, D], query: [b, t, N, H], key: [b, t, K, H], in the compute dtype; *_sums: the same in float32.
    """

    model: float
    query: int
    query_sums: int
    key: int
    key_sums: int


@dataclass(frozen=True)
class Moment:
    """A layer at work. adapted: (model, query) more arrays, or fewer, beside adapters: weights that do not learn have
    no gradients, of which each takes what it multiplied in an order of its own.

    gathered: the unembedding is there in the compute dtype; whole: its gradient is not yet scattered, or begun.
    weights: how many matrices are gathered of w_gate, w_up and w_down, of w_q and w_o, and of w_k and w_v.
    sums: gradients of the first of these in float32: of each the sum over chunks, and one chunk's about to be added.
    """

    arrays: Arrays
    adapted: tuple[int, int] = (0, 0)
    gathered: bool = False
    whole: bool = True
    weights: tuple[int, int, int] = (3, 2, 2)
    sums: int = 2


# By compiler. The CPU's schedule begins all gradients ahead of the first layer, and gathers the unembedding there; but
# it scatters the unembedding's gradient before the layers go back. So there are three moments:
# - going forward, before or in attention: the layer's input, after its norm, the norm's factors (which the CPU writes
#   out for long sequences), and the outputs of the feedforward and of the loss in chunks, begun; q, the empty
#   out of the ring and of a hop, and q as a hop has it; k and v, and one of the ring's pairs;
# - back, in the feedforward: the saved input, the input of the feedforward, both after their norms, those again
#   transposed or in chunks for the weights' gradients, the feedforward's input gradient, the gradient handed to the
#   layer, and two factors of each norm; q, out, out transposed for w_o's gradient, two halves of what the ring's
#   backward cuts in two, and of a key's arrays k, v, half a rotated one and those on their way;
# - back, in attention: the saved input, after its norm, its factors, the gradient; q, out, out transposed, d_out and a
#   rotated half; dq and that of a hop; k and v, those at hand and on their way; dk and dv of the own keys, of a hop,
#   and on their way.
# The others write fewer arrays out, and are fullest going back.
LAYER = {
    "cpu": (
        Moment(Arrays(5, 4, 0, 4, 0), adapted=(0, 1), gathered=True, weights=(3, 1, 0), sums=0),
        Moment(Arrays(12, 4, 0, 5, 0), adapted=(-2, 0), whole=False),
        Moment(Arrays(5, 5, 2, 6, 6), adapted=(-1, 2), whole=False, weights=(0, 1, 2), sums=0),
    ),
    "tpu": (Moment(Arrays(model=5.5, query=3, query_sums=1, key=4, key_sums=10)),),
    "cuda": (Moment(Arrays(model=3, query=3, query_sums=1, key=4, key_sums=10)),),
}
# Keys where nothing travels: k and v, dk and dv, and one of them on its way into the other dtype.
KEYS_ALONE, KEY_SUMS_ALONE = 2, 3
# A layer in blocks (kv_heads_at_a_time): its input, the gradient, and one of them on its way in or out; attention's
# output; dk and dv; and of one group of heads what attention needs. Going forward on a CPU as above, and out.
BLOCKS_BACK = Arrays(model=3, query=1, query_sums=0, key=2, key_sums=0)
BLOCKS = {
    "cpu": (
        Moment(Arrays(5, 1, 0, 0, 0), gathered=True, sums=0),
        Moment(BLOCKS_BACK, whole=False),
    ),
    "tpu": (Moment(BLOCKS_BACK),),
    "cuda": (Moment(replace(BLOCKS_BACK, model=2)),),  # none is on its way
}
# Of a group of heads at its fullest, round a ring: on GPUs q, its output and d_out; dq and that of a hop; k and v as a
# hop has them, and two of their pairs; dk and dv of a hop, and three of their pairs.
GROUP = Arrays(model=0, query=2, query_sums=1, key=2, key_sums=3)
GROUPS = {"cpu": GROUP, "tpu": GROUP, "cuda": Arrays(model=0, query=3, query_sums=2, key=6, key_sums=8)}
GROUP_ALONE = {"cpu": GROUP, "tpu": GROUP, "cuda": Arrays(model=0, query=3, query_sums=1, key=2, key_sums=2)}
# [b, chunk, F], compute dtype: gate, up and their product.
FEEDFORWARD_CHUNKS = 3
# Layers' inputs that are on the device at once, on their way to the host or back: in a layer, and beside the loss.
OFFLOADED_LAYERS = {"cpu": 2, "tpu": 2, "cuda": 1}
LOSS_OFFLOADED_LAYERS = {"cpu": 2, "tpu": 2, "cuda": 0}
# The step's arguments, by their names in the account; where there is no base or reference, there is no such name.
ARGUMENTS = ("params", "base", "reference", "optimizer")
# Of a device's memory what a step may take by the account, which is within 15 %, for gathered weights to be kept in it.
KEEPING_FRACTION = 0.85
COUNTED_POLICIES = ("nothing_saveable", "save_attention", "offload_inputs")
# [D, V], float32, in the loss's backward: the gradient's sum over chunks and one chunk's gradient.
UNEMBEDDING_SUMS = 2
# [b, t, D], compute dtype, beside the loss: the last layer's output, its norm, the same in chunks, its gradient; on a
# CPU two of the norm's factors.
LOSS_MODEL_ARRAYS = {"cpu": 6, "tpu": 4, "cuda": 4}


def account(config: Config, rows: int, seq_length: int, platform: str = "cpu") -> dict[str, int]:
    """Bytes on one device at the fullest moment of a training step over `rows` x `seq_length` tokens, by name.

    ARGUMENTS are the step's arguments; the sum of all others is its temporary memory. 'base' is what stays beside
    adapters, as it is kept; a CPU has 'base in float32' too, of one in bfloat16. A name whose arrays are not alive at
    that moment has 0. platform: whose compiler, tpu, cuda or cpu. No device is needed, whatever the mesh. Raises
    NotImplementedError for programs that it has no count of.
    """
    architecture, execution = config.architecture, config.execution
    if not (execution.remat_block in COUNTED_POLICIES and execution.scan_mlp and execution.scan_layers):
        raise NotImplementedError(
            "the account of memory is of --llama.scan_layers with --llama.scan_mlp and "
            "--llama.remat_block=nothing_saveable, save_attention or offload_inputs"
        )
    if architecture.num_experts:
        raise NotImplementedError("the account of memory is of a dense feedforward: --llama.num_experts=0")
    if not execution.attention_type.endswith("blockwise"):
        raise NotImplementedError("the account of memory is of --llama.attention_type=blockwise or ring_blockwise")
    if config.mesh_shape[3] > 1 and execution.sequence_parallel != "ring":
        raise NotImplementedError("the account of memory is of --llama.sequence_parallel=ring")
    state, sizes = _abstract_state(config), _sizes(config, rows, seq_length, platform)
    stored = _stored(config, state)
    if platform == "cpu" and (widened := _widened(state)):
        stored["base in float32"] = widened
    gathered = _gathered_bytes(config, state, sizes, platform)
    layer = (BLOCKS if execution.kv_heads_at_a_time else LAYER)[platform]
    moments = [_layer_moment(config, state, sizes, gathered, moment, platform) for moment in layer]
    moments.append(_loss_moment(config, sizes, gathered, platform))
    return stored | max(moments, key=lambda moment: sum(moment.values()))


def host_traffic(config: Config, rows: int, seq_length: int) -> tuple[int, int]:
    """Bytes that one device exchanges with the host's memory in a step: (while it computes, in the update after that).

    Layers' inputs go and come back. Weights come for the forward and for the backward, and their gradients go, with
    every micro-batch, of which all but one add them up there; the update reads gradients twice (for their norm first),
    weights and the optimizer's state once, and writes the latter two.
    """
    execution, optimizer, state = config.execution, config.optimizer, _abstract_state(config)
    meanwhile = after = 0
    micros = optimizer.accumulate_gradient_steps
    if execution.remat_block == "offload_inputs":
        layers = config.architecture.num_hidden_layers
        meanwhile += 2 * _saved(config, _sizes(config, rows, seq_length), away=layers) * micros
    if optimizer.offload_params:
        meanwhile += _shard_bytes(state.trained) * micros * (3 if micros == 1 else 6)
        after += 4 * _shard_bytes(state.trained)
    if optimizer.offload_state:
        after += 2 * _shard_bytes(state.opt_state)
    return meanwhile, after


def closed_form(config: Config, platform: str) -> dict[str, int] | None:
    """The account of the config's own batches, by name; None for a program that it has no count of."""
    try:
        return account(config, config.train_dataset.batch_size, config.train_dataset.seq_length, platform)
    except NotImplementedError:
        return None


def decided(config: Config, platform: str, memory: int | None) -> Config:
    """The config with --llama.gathered_weights=auto decided for devices of so many bytes.

    Kept where anything is gathered and the step then leaves room for the account's error; gathered again where that is
    not known, so on a CPU too.
    """
    execution, (_, fsdp, _, sp) = config.execution, config.mesh_shape
    if execution.gathered_weights != "auto":
        return config
    keeps, again = (replace(config, execution=replace(execution, gathered_weights=way)) for way in ("keep", "again"))
    if memory is None or fsdp * sp == 1 or config.optimizer.offload_params:
        return again
    parts = closed_form(keeps, platform)
    return keeps if parts and sum(parts.values()) <= KEEPING_FRACTION * memory else again


def decided_for(config: Config, device_kind: str) -> Config:
    """As `decided`, of a `jax.Device.device_kind`."""
    known = find(device_kind)
    return decided(config, _platform(device_kind), int(known.hbm_gib * 2**30) if known else None)


def _platform(device_kind: str) -> str:
    return next((name for name, word in (("tpu", "TPU"), ("cuda", "NVIDIA")) if word in device_kind), "cpu")


def describe(config: Config, device_kind: str) -> str:
    """The account in one line for the run's start, with a warning where the device's memory cannot suffice."""
    parts = closed_form(config, _platform(device_kind))
    if parts is None:
        return (
            "memory not estimated: python -m ringbpt.plan with these flags and --topology=<machine> compiles the step"
        )
    gib, known = sum(parts.values()) / 2**30, find(device_kind)
    line = f"memory about {gib:.2f} GiB a device by the closed form"
    if kept := parts["kept weights"]:
        line += f", {kept / 2**30:.2f} of it gathered weights"
    if known is None:
        return line
    line += f", of {known.hbm_gib:g} GiB"
    if gib <= known.hbm_gib:
        return line
    return f"{line}: WARNING: it will hardly fit; python -m ringbpt.plan with these flags says what would"


def _stored(config: Config, state: TrainState) -> dict[str, int]:
    """What is alive throughout. The gradient of an unembedding is counted where it is whole.

    What is in the host's memory is fetched a layer at a time: for the update, when the activations are gone.
    """
    params = 0 if config.optimizer.offload_params else _shard_bytes(state.trained)
    sums = params if config.optimizer.accumulate_gradient_steps > 1 else 0
    beside = {"base": state.frozen or None, "reference": state.reference}
    return {name: _shard_bytes(tree) for name, tree in beside.items() if tree is not None} | {
        "params": params,
        "optimizer": 0 if config.optimizer.offload_state else _shard_bytes(state.opt_state),
        "gradients": max(0, sums + params - _shard_bytes(state.trained.get("unembed", ()))),
    }


def _abstract_state(config: Config) -> TrainState:
    mesh = AbstractMesh(config.mesh_shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    has_reference = objective_of(config).in_step(config)
    return StateLayout(config, Model.of(config, mesh), has_reference=has_reference).abstract


def _shard_bytes(tree: Any) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


Sizes: TypeAlias = tuple[int, int, int, int]


def _sizes(config: Config, rows: int, seq_length: int, platform: str = "") -> Sizes:
    """(rows and tokens of a device's share of one micro-batch, tp, bytes of a number in the compute dtype).

    The CPU's compiler widens what it computes with to float32, saved inputs all at once.
    """
    dp, fsdp, tp, sp = config.mesh_shape
    parts = dp * fsdp * config.optimizer.accumulate_gradient_steps
    dtype = jnp.float32 if platform == "cpu" else COMPUTE_DTYPES[config.dtype]
    return rows // parts, seq_length // sp, tp, jnp.dtype(dtype).itemsize


def _saved(config: Config, sizes: Sizes, away: int) -> int:
    """away: how many layers' inputs count where they wait in the host's memory."""
    b, t, tp, size = sizes
    d = make_dims(config.architecture)
    saved = b * t * d.D * size // (tp if config.execution.residual_over_tp else 1)
    if config.execution.remat_block == "offload_inputs":
        return saved * away
    if config.execution.remat_block == "save_attention":
        saved += b * t * d.N // tp * (d.H * size + 4)  # out, and lse in float32
    return d.L * saved


def _kept_bytes(config: Config, sizes: Sizes) -> int:
    """Of all layers' matrices, gathered in the compute dtype, where they are kept for the backward."""
    if config.execution.gathered_weights != "keep":
        return 0
    d, (_, _, tp, size) = make_dims(config.architecture), sizes
    return d.L * d.D * (3 * d.F + 2 * d.N * d.H + 2 * d.K * d.H) // tp * size


def _layer_moment(
    config: Config, state: TrainState, sizes: Sizes, gathered: int, moment: Moment, platform: str
) -> dict[str, int]:
    """Where a layer is at work. With adapters only they have gradients. A layer in blocks then holds as much going
    forward, and there the unembedding, which the compiler gathers ahead of the layers, is alive too.
    """
    b, t, tp, size = sizes
    execution, d, adapted = config.execution, make_dims(config.architecture), bool(config.lora.rank)
    query, key, feedforward = d.N // tp * d.H, d.K // tp * d.H, d.F // tp
    a_token = _token_bytes(_arrays(config, moment), d.D, query, key, size)
    first, *others = (
        count * d.D * width for count, width in zip(moment.weights, (feedforward, query, key), strict=True)
    )
    sums = 0 if adapted else moment.sums * 4
    if execution.kv_heads_at_a_time:
        group = (GROUPS if config.mesh_shape[3] > 1 else GROUP_ALONE)[platform]
        a_token += int(execution.kv_heads_at_a_time * tp / d.K * _token_bytes(group, d.D, query, key, size))
    kept = execution.gathered_weights == "keep"
    gathers = 0 if kept else size  # those that are kept are read where they are
    weights = first * (gathers + sums) + sum(others) * (gathers + (sums if execution.kv_heads_at_a_time else 0))
    # The gather of the unembedding is the same for all micro-batches, so the compiler does it once, ahead of them.
    ahead = config.optimizer.accumulate_gradient_steps > 1 or (adapted and execution.kv_heads_at_a_time)
    held = gathered if moment.gathered or ahead else 0
    if not adapted:
        held += d.D * _vocabulary(config) * 4 if moment.whole else _shard_bytes(state.trained.get("unembed", ()))
    chunk = b * min(execution.scan_mlp_chunk_size, t) * feedforward * FEEDFORWARD_CHUNKS * size
    return {
        "saved layer inputs": _saved(config, sizes, OFFLOADED_LAYERS[platform]),
        "kept weights": _kept_bytes(config, sizes),
        "unembedding": held,
        "loss chunk": 0,
        "layer weights": weights,
        "layer activations": b * t * a_token + chunk,
    }


def _arrays(config: Config, moment: Moment) -> Arrays:
    """The moment's arrays in a program of this config."""
    arrays = moment.arrays
    if config.lora.rank:
        model, query = moment.adapted
        arrays = replace(arrays, model=arrays.model + model, query=arrays.query + query)
    if config.mesh_shape[3] == 1 and not config.execution.kv_heads_at_a_time:
        sums = min(arrays.key_sums, KEY_SUMS_ALONE)
        arrays = replace(arrays, key=min(arrays.key, KEYS_ALONE), key_sums=sums)
    if config.execution.kv_heads_at_a_time and config.execution.remat_block == "offload_inputs":
        arrays = replace(arrays, model=arrays.model - 1)  # the input is one of those on their way from the host
    return arrays


def _widened(state: TrainState) -> int:
    """Bytes of a base in bfloat16, in float32: the CPU's compiler has no other, and widens all layers at once."""
    layers = state.frozen.get("layers", {})
    return 2 * _shard_bytes([x for x in jax.tree.leaves(layers) if x.dtype == jnp.bfloat16])


def _gathered_bytes(config: Config, state: TrainState, sizes: Sizes, platform: str) -> int:
    """Of the unembedding, gathered in the compute dtype: 0 where that is the argument as it stands.

    The CPU's compiler copies even that.
    """
    _, fsdp, _, sp = config.mesh_shape
    kept = state.frozen.get("unembed")
    is_argument = kept is not None and kept.dtype == COMPUTE_DTYPES[config.dtype] and fsdp * sp == 1
    whole = make_dims(config.architecture).D * _vocabulary(config) * sizes[-1]
    return 0 if is_argument and platform != "cpu" else whole


def _vocabulary(config: Config) -> int:
    """How many logits a device computes of a token: none where the head says a score."""
    architecture = config.architecture
    return -(-architecture.vocab_size // config.mesh_shape[2]) if architecture.head != "score" else 0


def _token_bytes(arrays: Arrays, model: int, query: int, key: int, size: int) -> int:
    """Of one token: all of `arrays`; query and key are a device's heads times H."""
    numbers = model * arrays.model + query * arrays.query + key * arrays.key
    return int(numbers * size) + (query * arrays.query_sums + key * arrays.key_sums) * 4


def _loss_moment(config: Config, sizes: Sizes, gathered: int, platform: str) -> dict[str, int]:
    """In a chunk of the loss, going back: no layer is at work."""
    b, t, _, size = sizes
    d, sums = make_dims(config.architecture), 0 if config.lora.rank else UNEMBEDDING_SUMS * 4
    return {
        "saved layer inputs": _saved(config, sizes, LOSS_OFFLOADED_LAYERS[platform]),
        "kept weights": _kept_bytes(config, sizes),
        "unembedding": gathered + d.D * _vocabulary(config) * sums,
        "loss chunk": b * min(config.execution.loss_chunk_size, t) * _vocabulary(config) * 4,
        "layer weights": 0,
        "layer activations": b * t * d.D * LOSS_MODEL_ARRAYS[platform] * size,
    }
