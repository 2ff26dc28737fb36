"""What the compiled training program holds and sends; read from its HLO and its memory analysis."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from ringbpt.config import AdamWConfig, Config, LoraConfig, OptimizerConfig
from ringbpt.mesh import make_mesh
from ringbpt.model.llama import Model
from ringbpt.objectives import OBJECTIVES
from ringbpt.training.state import StateLayout
from ringbpt.training.step import make_train_step
from ringbpt.types import Batch
from tests.flags import llama_flags

VOCAB, LENGTH, CHUNK = 1088, 2048, 64  # sizes that no other dim shares


def compile_step(mesh_shape, llama: dict, rows: int, length: int, dtype="fp32", lora: LoraConfig | None = None):
    """The loop's own train step, compiled from abstract arrays: nothing is allocated."""
    config = Config(
        dtype=dtype,
        mesh_shape=mesh_shape,
        **llama,
        lora=lora or LoraConfig(),
        optimizer=OptimizerConfig(adamw_optimizer=AdamWConfig(lr_warmup_steps=1)),
    )
    model = Model.of(config, make_mesh(mesh_shape))
    layout = StateLayout(config, model)
    step = make_train_step(layout, OBJECTIVES["sft"])
    ints, floats = (jax.ShapeDtypeStruct((rows, length), dtype) for dtype in (jnp.int32, jnp.float32))
    return step.lower(layout.abstract, Batch(ints, ints, floats, ints, ints)).compile()


@pytest.fixture(scope="module")
def program() -> str:
    llama = llama_flags(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, attention_type="ring_blockwise", sequence_layout="contiguous",
        scan_query_chunk_size=CHUNK, scan_key_chunk_size=CHUNK, scan_mlp=True, scan_mlp_chunk_size=CHUNK,
        loss_chunk_size=CHUNK, remat_block="nothing_saveable",
    )  # fmt: skip
    return compile_step((1, 1, 2, 4), llama, 1, LENGTH).as_text()


def shapes(program: str) -> set[tuple[int, ...]]:
    found = re.findall(r"(?:f32|bf16|s32|pred|u8)\[([0-9,]+)\]", program)
    return {tuple(int(size) for size in dims.split(",")) for dims in found}


def test_no_logits_of_the_whole_sequence(program):
    """[T, V] never exists: not whole, not a device's part of it; only [chunk, V / tp] does."""
    with_vocabulary = {dims for dims in shapes(program) if VOCAB in dims or VOCAB // 2 in dims}
    assert any(CHUNK in dims for dims in with_vocabulary)
    assert not [dims for dims in with_vocabulary if LENGTH in dims or LENGTH // 4 in dims]


def test_no_array_holds_the_sequence_twice_or_whole(program):
    """No mask of all pairs, no table of positions, no activation gathered over sp: device shares and blocks only."""
    local = LENGTH // 4
    assert not [dims for dims in shapes(program) if dims.count(local) > 1]
    # The embedding looks all tokens up in a device's part of D: as large as the device's own activations.
    gathered = [dims for dims in shapes(program) if LENGTH in dims]
    assert max(math.prod(dims) for dims in gathered) <= local * 64, gathered


def test_no_large_constant_is_baked_in(program):
    for line in program.splitlines():
        if re.search(r"= \S+ constant\(", line):
            dims = re.search(r"\[([0-9,]*)\]", line.split("=", 1)[1])
            sizes = [int(size) for size in dims.group(1).split(",") if size] if dims else []
            assert max(sizes, default=0) < LENGTH, line[:200]
