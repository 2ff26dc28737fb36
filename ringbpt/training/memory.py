"""What a training step holds on one device, by name: the account that a compiled program is compared with.

The step is fullest at one of two moments: in the backward of a layer's feedforward, or in the backward of the loss.
The account names what is alive at the fuller one, so its sum is the peak. The counts below were read off the
compiled program's buffer assignment (XLA's --xla_dump_to); tests/training/test_memory.py holds them to new ones.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from ringbpt.config import Config
from ringbpt.dims import AXES
from ringbpt.hardware import find
from ringbpt.model.llama import COMPUTE_DTYPES, Model, make_dims
from ringbpt.training.optimizer import make_optimizer
from ringbpt.training.state import abstract_state

# A device's arrays of one layer's backward that are alive together, by their shape and dtype.
# [b, t, D], compute dtype: the saved input, the input of the feedforward, both after their norms (2), those again
# transposed or in chunks for the weights' gradients (3), the feedforward's output gradient in chunks, its input
# gradient, the gradient handed to the layer; and the norms' factors (4), which the CPU writes out for long sequences.
MODEL_ARRAYS = 13
# [b, t, N, H], compute dtype: q, out, out transposed for w_o's gradient, and both halves of q, out and d_out, into
# which the ring's backward cuts its own part (6 halves).
QUERY_ARRAYS = 6
# [b, t, N, H], float32: dq.
QUERY_SUMS = 1
# [b, t, K, H], compute dtype: k, v, and the ring's k and v on their way.
KEY_ARRAYS = 4
# [b, t, K, H], float32: dk and dv of the three places the ring's backward computes them in, and their sum on its way.
KEY_SUMS = 8
# [D, F], each times w_gate, w_up and w_down: gathered in the compute dtype; in float32, the gradient's sum over chunks
# and one chunk's gradient about to be added to it.
FEEDFORWARD_SUMS = 2
# [b, chunk, F], compute dtype: gate, up and their product.
FEEDFORWARD_CHUNKS = 3
# Layers' inputs that are on the device at once, on their way to the host or back.
OFFLOADED_LAYERS = 2
COUNTED_POLICIES = ("nothing_saveable", "save_attention", "offload_inputs")
# [D, V], float32, in the loss's backward: the gradient's sum over chunks and one chunk's gradient.
UNEMBEDDING_SUMS = 2
# [b, t, D], compute dtype, beside the loss: the last layer's output, its norm, the same in chunks, its gradient.
LOSS_MODEL_ARRAYS = 4


def account(config: Config, rows: int, seq_length: int) -> dict[str, int]:
    """Bytes on one device at the fullest moment of a training step over `rows` x `seq_length` tokens, by name.

    'params' and 'optimizer' are the step's arguments; the sum of all others is its temporary memory. A name whose
    arrays are not alive at that moment has 0. No device is needed, whatever the mesh. Raises NotImplementedError for
    programs that it has no count of.
    """
    llama = config.llama
    if not (llama.remat_block in COUNTED_POLICIES and llama.scan_mlp and llama.scan_layers):
        raise NotImplementedError(
            "the account of memory is of --llama.scan_layers with --llama.scan_mlp and "
            "--llama.remat_block=nothing_saveable, save_attention or offload_inputs"
        )
    if llama.num_experts:
        raise NotImplementedError("the account of memory is of a dense feedforward: --llama.num_experts=0")
    if not llama.attention_type.endswith("blockwise"):
        raise NotImplementedError("the account of memory is of --llama.attention_type=blockwise or ring_blockwise")
    if config.mesh_shape[3] > 1 and llama.sequence_parallel != "ring":
        raise NotImplementedError("the account of memory is of --llama.sequence_parallel=ring")
    stored = _stored(config)
    layer, loss = _layer_moment(config, rows, seq_length), _loss_moment(config, rows, seq_length)
    return stored | max(layer, loss, key=lambda moment: sum(moment.values()))


def describe(config: Config, device_kind: str) -> str:
    """The account in one line for the run's start, with a warning where the device's memory cannot suffice."""
    try:
        parts = account(config, config.train_dataset.batch_size, config.train_dataset.seq_length)
    except NotImplementedError as error:
        return f"memory not estimated: {error}"
    gib, known = sum(parts.values()) / 2**30, find(device_kind)
    line = f"memory about {gib:.2f} GiB a device by the closed form"
    if known is None:
        return line
    line += f", of {known.hbm_gib:g} GiB"
    if gib <= known.hbm_gib:
        return line
    return f"{line}: WARNING: it will hardly fit; python -m ringbpt.plan with these flags says what would"


def _stored(config: Config) -> dict[str, int]:
    """What is alive throughout. The gradient of an unembedding is counted where it is whole."""
    model = Model(config, AbstractMesh(config.mesh_shape, AXES, axis_types=(AxisType.Auto,) * len(AXES)))
    optimizer, _ = make_optimizer(config.optimizer, config.llama.param_scan_axis)
    state = abstract_state(model, optimizer)
    params = _shard_bytes(state.params)
    sums = params if config.optimizer.accumulate_gradient_steps > 1 else 0
    return {
        "params": params,
        # In the host's memory it is fetched, a part at a time, when the activations are gone.
        "optimizer": 0 if config.optimizer.offload_state else _shard_bytes(state.opt_state),
        "gradients": sums + params - _shard_bytes(state.params.get("unembed", ())),
    }


def _shard_bytes(tree: Any) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _sizes(config: Config, rows: int, seq_length: int) -> tuple[int, int, int, int]:
    """(rows and tokens of a device's share of one micro-batch, tp, bytes of a number in the compute dtype)."""
    dp, fsdp, tp, sp = config.mesh_shape
    parts = dp * fsdp * config.optimizer.accumulate_gradient_steps
    return rows // parts, seq_length // sp, tp, jnp.dtype(COMPUTE_DTYPES[config.dtype]).itemsize


def _saved(config: Config, rows: int, seq_length: int) -> int:
    b, t, tp, size = _sizes(config, rows, seq_length)
    d = make_dims(config.llama)
    saved = b * t * d.D * size // (tp if config.llama.residual_over_tp else 1)
    if config.llama.remat_block == "offload_inputs":
        return saved * OFFLOADED_LAYERS
    if config.llama.remat_block == "save_attention":
        saved += b * t * d.N // tp * (d.H * size + 4)  # out, and lse in float32
    return d.L * saved


def _layer_moment(config: Config, rows: int, seq_length: int) -> dict[str, int]:
    """In a layer's feedforward, going back: the loss is done, but its weight's gradient is not yet scattered."""
    b, t, tp, size = _sizes(config, rows, seq_length)
    d = make_dims(config.llama)
    token_rows, chunk = b * t, b * min(config.llama.scan_mlp_chunk_size, t)
    query, key, feedforward = d.N // tp * d.H, d.K // tp * d.H, d.F // tp
    # The gather of the unembedding is the same for all micro-batches, so the compiler does it once, ahead of them.
    gathered = size if config.optimizer.accumulate_gradient_steps > 1 else 0
    return {
        "saved layer inputs": _saved(config, rows, seq_length),
        "unembedding": d.D * d.V // tp * (gathered + 4),
        "loss chunk": 0,
        "layer weights": 3 * d.D * feedforward * (size + FEEDFORWARD_SUMS * 4) + 2 * d.D * (query + key) * size,
        "layer activations": token_rows * (d.D * MODEL_ARRAYS + query * QUERY_ARRAYS + key * KEY_ARRAYS) * size
        + token_rows * (query * QUERY_SUMS + key * KEY_SUMS) * 4
        + chunk * feedforward * FEEDFORWARD_CHUNKS * size,
    }


def _loss_moment(config: Config, rows: int, seq_length: int) -> dict[str, int]:
    """In a chunk of the loss, going back: no layer is at work."""
    b, t, tp, size = _sizes(config, rows, seq_length)
    d = make_dims(config.llama)
    return {
        "saved layer inputs": _saved(config, rows, seq_length),
        "unembedding": d.D * d.V // tp * (size + UNEMBEDDING_SUMS * 4),
        "loss chunk": b * min(config.llama.loss_chunk_size, t) * d.V // tp * 4,
        "layer weights": 0,
        "layer activations": b * t * d.D * LOSS_MODEL_ARRAYS * size,
    }
