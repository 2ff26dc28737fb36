"""The Triton kernels in Pallas's interpreter, through the suite; and compiled for GPUs that aren't here."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringbpt.attention.core import MaskSpec
from ringbpt.attention.local import block_sizes, pallas_triton
from ringbpt.attention.local.pallas_triton import make_interpreted, make_pallas_triton
from ringbpt.types import TokenMeta
from tests.attention import suite
from tests.attention.gpu_programs import kernels, train_like
from tests.planning.test_overlap import check as check_overlap
from tests.planning.test_overlap import compiler, program

REFUSED = {"wide heads"}  # of 256, in float32


@pytest.mark.parametrize("case", suite.cases(), ids=str)
def test_the_kernels_pass_the_suite(case):
    suite.check(make_interpreted(jax.devices()[0], 64, 64), case, refuses=REFUSED)


def test_wide_heads_in_half_precision():
    case = suite.Case("wide", T=128, S=256, head_dim=256, heads=(2, 1), documents=2, dtype="float16")
    suite.check(make_interpreted(jax.devices()[0], None, None), case)


@pytest.mark.slow
def test_a_ring_over_the_kernels_is_dense_attention():
    suite.check_ring("pallas_triton_interpreted", 128, 32, head_dim=16)


def test_what_it_cannot_do_it_refuses_by_name():
    meta = TokenMeta(np.zeros((1, 16), np.int32), np.ones((1, 16), np.int32))

    def attend(head_dim=8, dtype=jnp.float32):
        x = jnp.ones((1, 16, 1, head_dim), dtype)
        return make_interpreted(jax.devices()[0], None, None).attend(x, x, x, meta, meta, MaskSpec())

    with pytest.raises(NotImplementedError, match="not float8_e4m3fn: use blockwise"):
        attend(dtype=jnp.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="at most 256 in bfloat16, not 512: use blockwise"):
        attend(512, jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="this is cpu: use blockwise"):
        make_pallas_triton(jax.devices()[0], None, None)


def test_the_table_of_block_sizes_is_read(monkeypatch):
    """Of half precision; and a user's limits cut what it says."""
    entry = {"forward": [64, 32], "backward": [16, 128], "from": "a test"}
    monkeypatch.setitem(block_sizes.table(), "pallas_triton", {"A100": {"128": entry}})
    half, full = (jax.ShapeDtypeStruct((1, 4096, 1, 128), dtype) for dtype in (jnp.bfloat16, jnp.float32))

    def sizes(x, *limits):
        tiles = pallas_triton._tiles(x, x, pallas_triton._Options("NVIDIA A100-SXM4-80GB", limits, False))
        return [(tile.query, tile.key) for tile in (tiles.forward, tiles.dq, tiles.dkv)]

    assert sizes(half, None, None) == [(64, 32), (128, 16), (16, 128)]
    assert sizes(half, 50, 1000) == [(32, 32), (32, 16), (16, 128)]
    assert sizes(full, None, None)[0] == (16, 16)


# --- for GPUs that aren't here ---

MACHINES = ("a100", "h100", "h200")
SHARED_MEMORY = {"a100": 166912, "h100": 232448, "h200": 232448}  # bytes that one block of threads can have
PROGRAMS = [
    ("a100", "bfloat16", 128, False),
    *[pytest.param(name, "bfloat16", 128, False, marks=pytest.mark.slow) for name in MACHINES[1:]],
    *[
        pytest.param(name, dtype, head_dim, False, marks=pytest.mark.slow)
        for name in MACHINES
        for dtype, head_dim in (("bfloat16", 64), ("float16", 256), ("float32", 64), ("float32", 128))
    ],
    *[
        pytest.param(name, dtype, head_dim, True, marks=pytest.mark.slow)
        for name, dtype, head_dim in product(("a100", "h200"), ("bfloat16", "float32"), (64, 128))
    ],
]


@pytest.mark.parametrize(("name", "dtype", "head_dim", "trees"), PROGRAMS)
def test_no_kernel_spills(name, dtype, head_dim, trees, tmp_path):
    machine = compiler(name)
    local = make_pallas_triton(machine.devices[0], None, None)
    train_like(machine, local, head_dim, dtype, dump=tmp_path, trees=trees)
    found = {kernel.name: kernel for kernel in kernels(tmp_path, machine)}
    print(name, dtype, head_dim, *[kernel for kernel in found.values() if "triton" in kernel.name], sep="\n  ")
    for kernel in ("triton_forward", "triton_dq", "triton_dkv"):
        assert found[kernel].spilled_bytes == 0, found[kernel]
        assert 0 < found[kernel].registers <= 255, found[kernel]
        assert 0 < found[kernel].shared_bytes <= SHARED_MEMORY[name], found[kernel]


@pytest.mark.slow
def test_a_spill_is_seen(tmp_path, monkeypatch):
    """The check above has teeth: keys in blocks of 128 and 4 warps hold two accumulators of 128 x 128 too many."""
    tile = pallas_triton.Tile(64, 128, 4, 2)
    tiles = pallas_triton.Tiles(pallas_triton.Tile(32, 32, 4, 1), pallas_triton.Tile(32, 32, 4, 1), tile)
    monkeypatch.setitem(pallas_triton._TILES, (2, 128), tiles)
    machine = compiler("a100")
    train_like(machine, make_pallas_triton(machine.devices[0], None, None), 128, "bfloat16", dump=tmp_path)
    assert {k.name for k in kernels(tmp_path, machine) if k.spilled_bytes} >= {"triton_dkv"}


@pytest.mark.slow
def test_every_hop_hides_behind_the_kernels():
    check_overlap(program("4xh200", local="pallas_triton"), 4)
