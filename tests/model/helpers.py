"""A small model, a batch for it, and its loss: what the model's tests share."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ringbpt.config import Config
from ringbpt.mesh import make_mesh, put_batch
from ringbpt.model.llama import Model
from ringbpt.types import Batch
from tests.flags import llama_flags

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attention_type": "ring_blockwise",
    "scan_query_chunk_size": 8,
    "scan_key_chunk_size": 8,
    "scan_mlp": True,
    "scan_mlp_chunk_size": 4,
    "loss_chunk_size": 4,
    "sequence_layout": "contiguous",
    "initializer_range": 0.2,  # large enough for every part to matter
}
# For a test of neither attention nor chunks: less than half of the program to compile.
CHEAP = {"attention_type": "standard", "scan_mlp": False, "loss_chunk_size": 32}


def make_model(mesh_shape=(1, 1, 1, 1), dtype="fp32", **llama) -> Model:
    config = Config(dtype=dtype, mesh_shape=mesh_shape, **llama_flags(**LLAMA | llama))
    return Model.of(config, make_mesh(mesh_shape))


def make_batch(model: Model, rows=2, length=32, seed=0, shared=False) -> Batch:
    """Two documents a row; the first 4 places of each take no loss. shared: the second goes on from the first's 8th."""
    rng = np.random.default_rng(seed)
    token, target = rng.integers(0, model.architecture.vocab_size, (2, rows, length)).astype(np.int32)
    position = np.tile(np.concatenate([np.arange(length - 12), np.arange(12)]).astype(np.int32), (rows, 1))
    segment = np.tile(np.repeat([1, 2], [length - 12, 12]).astype(np.int32), (rows, 1))
    columns = {}
    if shared:
        position[:, -12:] += 8
        columns["last"] = np.where(np.arange(length) < 8, 2, segment).astype(np.int32)
    host = Batch(token, target, (position >= 4).astype(np.float32), position, segment, columns)
    layout = model.execution.sequence_layout
    return put_batch(lambda a, b: jax.tree.map(lambda x: x[a:b], host), (rows, length), model.mesh, layout)


def loss_and_grads(model: Model, params, batch: Batch):
    """Cross-entropy and a share of the entropy, so that both of the statistics' gradients are looked at."""

    def loss(params):
        stats = model.token_stats(params, batch)
        return jnp.sum((0.1 * stats.entropy_BT - stats.logp_BT) * batch.weight_BT) / math.prod(batch.weight_BT.shape)

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    return float(value), jax.tree.map(np.asarray, grads)


def assert_same(got, want, tolerance=2e-5):
    """Losses and every gradient, each relative to its own greatest entry."""
    assert abs(got[0] - want[0]) <= tolerance * abs(want[0])
    for (path, a), b in zip(jax.tree.leaves_with_path(got[1]), jax.tree.leaves(want[1]), strict=True):
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), jax.tree_util.keystr(path)
