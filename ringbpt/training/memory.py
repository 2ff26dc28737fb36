"""What a training step holds on one device, by name: the account that a compiled program is compared with.

The step is fullest at one of two moments: in the backward of a layer's feedforward, or in the backward of the loss.
The account names what is alive at the fuller one, so its sum is the peak. The counts below were read off the
compiled program's buffer assignment (XLA's --xla_dump_to); tests/training/test_memory.py holds them to new ones.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

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
    """A device's arrays of one layer's backward that are alive together, by their shape and dtype.

    model: [b, t, D], query: [b, t, N, H], key: [b, t, K, H], in the compute dtype; *_sums: the same in float32.
    """

    model: float
    query: int
    query_sums: int
    key: int
    key_sums: int


# By compiler. The CPU's: the saved input, the input of the feedforward, both after their norms (2), those again
# transposed or in chunks for the weights' gradients (3), the feedforward's output gradient in chunks, its input
# gradient, the gradient handed to the layer, and the norms' factors (4), which the CPU writes out for long sequences;
# q, out, out transposed for w_o's gradient, and both halves of q, out and d_out (6 halves), into which the ring's
# backward cuts its own part; dq; k, v, and the ring's on their way; dk and dv of the three places in which the ring's
# backward computes them, and their sum on its way. The others write fewer arrays out.
ARRAYS = {
    "cpu": Arrays(model=13, query=6, query_sums=1, key=4, key_sums=8),
    "tpu": Arrays(model=5.5, query=3, query_sums=1, key=4, key_sums=10),
    "cuda": Arrays(model=3, query=3, query_sums=1, key=4, key_sums=10),
}
# How many of these there are for the gradients of a layer's matrices, which have none beside adapters: model.
GRADIENT_MODEL = {"cpu": 2, "tpu": 0, "cuda": 0}
# Keys where nothing travels: k and v, dk and dv, and one of them on its way into the other dtype.
KEYS_ALONE = {"key": 2, "key_sums": 3}
# A layer in blocks (kv_heads_at_a_time): its input, the gradient, and one of them on its way in or out; attention's
# output; dk and dv; and of one group of heads what attention needs.
BLOCK_MODEL, BLOCK_QUERY, BLOCK_KEY = 3, 1, 2
GROUP = Arrays(model=0, query=2, query_sums=1, key=2, key_sums=3)
# [D, F], each times w_gate, w_up and w_down: gathered in the compute dtype; in float32, the gradient's sum over chunks
# and one chunk's gradient about to be added to it.
FEEDFORWARD_SUMS = 2
# [b, chunk, F], compute dtype: gate, up and their product.
FEEDFORWARD_CHUNKS = 3
# Layers' inputs that are on the device at once, on their way to the host or back.
OFFLOADED_LAYERS = 2
# The step's arguments, by their names in the account; where there is no base or reference, there is no such name.
ARGUMENTS = ("params", "base", "reference", "optimizer")
COUNTED_POLICIES = ("nothing_saveable", "save_attention", "offload_inputs")
# [D, V], float32, in the loss's backward: the gradient's sum over chunks and one chunk's gradient.
UNEMBEDDING_SUMS = 2
# [b, t, D], compute dtype, beside the loss: the last layer's output, its norm, the same in chunks, its gradient.
LOSS_MODEL_ARRAYS = 4


def account(config: Config, rows: int, seq_length: int, platform: str = "cpu") -> dict[str, int]:
    """Bytes on one device at the fullest moment of a training step over `rows` x `seq_length` tokens, by name.

    ARGUMENTS are the step's arguments; the sum of all others is its temporary memory. 'base' is what stays beside
    adapters, as it is kept. A name whose arrays are not alive at that moment has 0. platform: whose compiler, tpu, cuda
    or cpu. No device is needed, whatever the mesh. Raises NotImplementedError for programs that it has no count of.
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
    stored = _stored(config)
    moments = [make(config, rows, seq_length, platform) for make in (_layer_moment, _loss_moment)]
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
        kept = replace(config, execution=replace(execution, remat_block="nothing_saveable"))
        meanwhile += 2 * _saved(kept, rows, seq_length) * micros
    if optimizer.offload_params:
        meanwhile += _shard_bytes(state.trained) * micros * (3 if micros == 1 else 6)
        after += 4 * _shard_bytes(state.trained)
    if optimizer.offload_state:
        after += 2 * _shard_bytes(state.opt_state)
    return meanwhile, after


def describe(config: Config, device_kind: str) -> str:
    """The account in one line for the run's start, with a warning where the device's memory cannot suffice."""
    platform = next((name for name, word in (("tpu", "TPU"), ("cuda", "NVIDIA")) if word in device_kind), "cpu")
    try:
        parts = account(config, config.train_dataset.batch_size, config.train_dataset.seq_length, platform)
    except NotImplementedError:
        return (
            "memory not estimated: python -m ringbpt.plan with these flags and --topology=<machine> compiles the step"
        )
    gib, known = sum(parts.values()) / 2**30, find(device_kind)
    line = f"memory about {gib:.2f} GiB a device by the closed form"
    if known is None:
        return line
    line += f", of {known.hbm_gib:g} GiB"
    if gib <= known.hbm_gib:
        return line
    return f"{line}: WARNING: it will hardly fit; python -m ringbpt.plan with these flags says what would"


def _stored(config: Config) -> dict[str, int]:
    """What is alive throughout. The gradient of an unembedding is counted where it is whole.

    What is in the host's memory is fetched a layer at a time: for the update, when the activations are gone.
    """
    state = _abstract_state(config)
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


def _sizes(config: Config, rows: int, seq_length: int) -> tuple[int, int, int, int]:
    """(rows and tokens of a device's share of one micro-batch, tp, bytes of a number in the compute dtype)."""
    dp, fsdp, tp, sp = config.mesh_shape
    parts = dp * fsdp * config.optimizer.accumulate_gradient_steps
    return rows // parts, seq_length // sp, tp, jnp.dtype(COMPUTE_DTYPES[config.dtype]).itemsize


def _saved(config: Config, rows: int, seq_length: int) -> int:
    b, t, tp, size = _sizes(config, rows, seq_length)
    d = make_dims(config.architecture)
    saved = b * t * d.D * size // (tp if config.execution.residual_over_tp else 1)
    if config.execution.remat_block == "offload_inputs":
        return saved * OFFLOADED_LAYERS
    if config.execution.remat_block == "save_attention":
        saved += b * t * d.N // tp * (d.H * size + 4)  # out, and lse in float32
    return d.L * saved


def _layer_moment(config: Config, rows: int, seq_length: int, platform: str) -> dict[str, int]:
    """In a layer, going back: the loss is done, but its weight's gradient is not yet scattered.

    With adapters only they have gradients. A layer in blocks then holds as much going forward, and there the
    unembedding, which the compiler gathers ahead of the layers, is alive too.
    """
    b, t, tp, size = _sizes(config, rows, seq_length)
    execution, d = config.execution, make_dims(config.architecture)
    query, key, feedforward = d.N // tp * d.H, d.K // tp * d.H, d.F // tp
    arrays, projections, adapted = ARRAYS[platform], 2 * d.D * (query + key), bool(config.lora.rank)
    sums = 0 if adapted else FEEDFORWARD_SUMS * 4
    if adapted:
        arrays = replace(arrays, model=arrays.model - GRADIENT_MODEL[platform])
    if config.mesh_shape[3] == 1:
        arrays = replace(arrays, **KEYS_ALONE)
    # The gather of the unembedding is the same for all micro-batches, so the compiler does it once, ahead of them.
    ahead = config.optimizer.accumulate_gradient_steps > 1 or (adapted and execution.kv_heads_at_a_time)
    gathered = _gathered_size(config, platform) if ahead else 0
    if execution.kv_heads_at_a_time:
        part = execution.kv_heads_at_a_time * tp / d.K
        away = execution.remat_block == "offload_inputs"  # then the input is one of those on their way from the host
        a_token = (d.D * (BLOCK_MODEL - away) + query * BLOCK_QUERY + key * BLOCK_KEY) * size
        a_token += int(part * _token_bytes(GROUP, d.D, query, key, size))
        weights = (3 * d.D * feedforward + projections) * (size + sums)
    else:
        a_token = _token_bytes(arrays, d.D, query, key, size)
        weights = 3 * d.D * feedforward * (size + sums) + projections * size
    chunk = b * min(execution.scan_mlp_chunk_size, t) * feedforward * FEEDFORWARD_CHUNKS * size
    return {
        "saved layer inputs": _saved(config, rows, seq_length),
        "unembedding": d.D * _vocabulary(config) * (gathered + (0 if adapted else 4)),
        "loss chunk": 0,
        "layer weights": weights,
        "layer activations": b * t * a_token + chunk,
    }


def _gathered_size(config: Config, platform: str) -> int:
    """Bytes of a number of the unembedding, gathered in the compute dtype: 0 where that is the argument as it stands.

    The CPU's compiler copies even that.
    """
    size, (_, fsdp, _, sp) = jnp.dtype(COMPUTE_DTYPES[config.dtype]).itemsize, config.mesh_shape
    kept = _abstract_state(config).frozen.get("unembed")
    is_argument = kept is not None and kept.dtype == COMPUTE_DTYPES[config.dtype] and fsdp * sp == 1
    return 0 if is_argument and platform != "cpu" else size


def _vocabulary(config: Config) -> int:
    """How many logits a device computes of a token: none where the head says a score."""
    architecture = config.architecture
    return -(-architecture.vocab_size // config.mesh_shape[2]) if architecture.head != "score" else 0


def _token_bytes(arrays: Arrays, model: int, query: int, key: int, size: int) -> int:
    """Of one token: all of `arrays`; query and key are a device's heads times H."""
    numbers = model * arrays.model + query * arrays.query + key * arrays.key
    return int(numbers * size) + (query * arrays.query_sums + key * arrays.key_sums) * 4


def _loss_moment(config: Config, rows: int, seq_length: int, platform: str) -> dict[str, int]:
    """In a chunk of the loss, going back: no layer is at work."""
    b, t, _, size = _sizes(config, rows, seq_length)
    d, sums = make_dims(config.architecture), 0 if config.lora.rank else UNEMBEDDING_SUMS * 4
    return {
        "saved layer inputs": _saved(config, rows, seq_length),
        "unembedding": d.D * _vocabulary(config) * (_gathered_size(config, platform) + sums),
        "loss chunk": b * min(config.execution.loss_chunk_size, t) * _vocabulary(config) * 4,
        "layer weights": 0,
        "layer activations": b * t * d.D * LOSS_MODEL_ARRAYS * size,
    }
