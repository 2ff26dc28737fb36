"""Over dp the gradients of several micro-batches are summed once a step, and are the same."""

import math

import jax
import numpy as np
import pytest

from ringbpt.config import parse, parse_args
from ringbpt.mesh import make_mesh
from ringbpt.model.llama import Model
from ringbpt.objectives import OBJECTIVES
from ringbpt.planning.collectives import transfers
from ringbpt.planning.hlo import parse as program
from ringbpt.training.late_sums import SCOPE, LateSums
from ringbpt.training.state import StateLayout
from ringbpt.training.step import make_totals
from ringbpt.types import Batch

ROWS, TOKENS = 16, 32
FLAGS = (
    "--config=tests/recipe.py",
    f"--train_dataset.python_dataset.seq_length={TOKENS}",
    f"--train_dataset.python_dataset.batch_size={ROWS}",
    "--eval_steps=0",
    "--llama.intermediate_size=64",
    "--llama.num_hidden_layers=2",
    "--llama.hidden_size=64",
    "--llama.num_attention_heads=8",
    "--llama.num_key_value_heads=4",
)
BIASED = ("--llama.qkv_bias", "--llama.qk_norm")
BLOCKS = ("--llama.kv_heads_at_a_time=1", "--llama.scan_mlp", "--llama.scan_mlp_chunk_size=8")


def setting(mesh: str, micros: int, *flags: str):
    shape = tuple(map(int, mesh.split(",")))
    given = (f"--mesh_dim={mesh}", f"--optimizer.accumulate_gradient_steps={micros}", *flags)
    config = parse(parse_args([*FLAGS, *given]), math.prod(shape))
    return config, Model.of(config, make_mesh(config.mesh_shape))


def gradients(mesh: str, micros: int, *flags: str):
    """(the compiled program, the gradients of the mean loss towards weights of which none is zero)."""
    config, model = setting(mesh, micros, *flags)
    state = StateLayout(config, model).start(model.init(jax.random.key(0)))
    shifted = lambda x: x + 0.01 * jax.random.normal(jax.random.key(x.size), x.shape)
    trained = jax.tree.map(shifted, state.trained)
    token = np.random.default_rng(0).integers(0, 256, (ROWS, TOKENS + 1)).astype(np.int32)
    ones, place = np.ones((ROWS, TOKENS), np.int32), np.tile(np.arange(TOKENS, dtype=np.int32), (ROWS, 1))
    host = Batch(token[:, :-1], token[:, 1:], ones.astype(np.float32), place, ones)
    batch = model.put_batch(lambda a, b: jax.tree.map(lambda x: x[a:b], host), (ROWS, TOKENS))
    compiled = jax.jit(make_totals(config, model, OBJECTIVES["sft"])).lower(trained, state.frozen, batch).compile()
    grads, divisor, *_ = compiled(trained, state.frozen, batch)
    return program(compiled.as_text()), jax.device_get(jax.tree.map(lambda g: g / divisor, grads))


@pytest.mark.parametrize(
    ("mesh", "flags"),
    [
        ("2,1,2,2", (*BIASED, *BLOCKS)),
        *(
            pytest.param(mesh, flags, marks=pytest.mark.slow)
            for mesh in ("4,2,1,1", "2,1,2,2")
            for flags in (
                BIASED,
                ("--llama.num_experts=4", "--llama.num_experts_per_tok=2"),
                ("--lora.rank=4",),
                ("--llama.tie_word_embeddings", "--llama.scan_layers=False"),
                ("--llama.param_scan_axis=1", "--llama.scan_mlp", "--llama.gathered_weights=keep"),
            )
        ),
    ],
)
def test_they_go_over_dp_once_and_are_the_same(mesh, flags):
    module, late = gradients(mesh, 2, *flags)
    _, want = gradients("1,1,1,1", 1, *flags)
    for (path, a), b in zip(jax.tree.leaves_with_path(want), jax.tree.leaves(late), strict=True):
        assert np.abs(a).max() > 0, path
        np.testing.assert_allclose(b, a, atol=3e-6 * np.abs(a).max(), err_msg=jax.tree_util.keystr(path))

    shape = tuple(map(int, mesh.split(",")))
    over_dp = [transfer for transfer in transfers(module, shape) if transfer.axis == "dp"]
    matrices = [x for x in jax.tree.leaves(late) if x.ndim > 2]
    late_bytes = sum(x.bytes for x in over_dp if f"/{SCOPE}/" in x.instruction.op_name)
    share = 2 * (shape[0] - 1) / shape[0]
    assert late_bytes >= share * sum(x.nbytes for x in matrices) / np.prod(shape[1:])
    # Besides, gradients of vectors, and scalars.
    assert sum(x.bytes for x in over_dp if x.kind == "all-reduce") < 1.1 * late_bytes


def test_one_micro_batch_and_gradients_in_the_hosts_memory_do_not_wait():
    waits = lambda *args: bool(LateSums.of(*setting(*args)).model.later)
    away = ("--optimizer.offload_params", "--optimizer.offload_state", "--llama.remat_block=nothing_saveable")
    assert waits("2,1,1,1", 2)
    assert not (waits("2,1,1,1", 1) or waits("1,2,1,1", 2) or waits("2,1,1,1", 2, *away))
