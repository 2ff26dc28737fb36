"""The Hopper kernels in Mosaic GPU's interpreter, through the suite in bf16; and compiled for GPUs that aren't here."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringbpt.attention.core import MaskSpec
from ringbpt.attention.local.pallas_hopper import make_interpreted, make_pallas_hopper
from ringbpt.types import TokenMeta
from tests.attention import suite
from tests.attention.gpu_programs import kernels, train_like
from tests.attention.suite import SMALL
from tests.planning.test_overlap import check as check_overlap
from tests.planning.test_overlap import compiler, program


@pytest.mark.parametrize("case", suite.cases(small=True), ids=str)
def test_the_kernels_pass_the_suite(case):
    suite.check(make_interpreted(jax.devices()[0], None, None), replace(case, dtype="bfloat16"))


@pytest.mark.slow
def test_heads_of_64():
    """dq is shared otherwise between the warpgroups than where heads are of 128."""
    (window,) = (case for case in SMALL if case.name == "a small window over trees")
    case = replace(window, head_dim=64, dtype="bfloat16", name="heads of 64")
    suite.check(make_interpreted(jax.devices()[0], None, None), case)


def test_what_it_cannot_do_it_refuses_by_name():
    meta = TokenMeta(np.zeros((1, 16), np.int32), np.ones((1, 16), np.int32))
    cpu = jax.devices()[0]
    x = jnp.ones((1, 16, 1, 264))
    with pytest.raises(NotImplementedError, match="bfloat16, not float32: use blockwise"):
        make_interpreted(cpu, None, None).attend(x, x, x, meta, meta, MaskSpec())
    x = x.astype(jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="at most 256, not 264: use blockwise"):
        make_interpreted(cpu, None, None).attend_bwd(x, x, x, x, x[..., 0], x, meta, meta, MaskSpec())
    with pytest.raises(NotImplementedError, match="not 64 x 1024: use pallas_triton"):
        make_interpreted(cpu, 64, 1024)
    with pytest.raises(NotImplementedError, match="this is cpu: use blockwise"):
        make_pallas_hopper(cpu, None, None)


# --- for GPUs that aren't here ---


@pytest.mark.slow  # test_pallas_triton.py looks for spills in every test run
# Mosaic GPU compiles what it has compiled before no second time, and says nothing of it: no two tests share a length.
@pytest.mark.parametrize(
    ("name", "head_dim", "length", "trees"),
    [
        ("h200", 128, 1920, False), ("h100", 128, 1792, False), ("h200", 64, 1920, False), ("h200", 128, 1664, True),
        ("h200", 64, 1664, True), ("h200", 256, 1920, False),
    ],
)  # fmt: skip
def test_no_kernel_spills(name, head_dim, length, trees, tmp_path, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    machine = compiler(name)
    local = make_pallas_hopper(machine.devices[0], None, None)
    train_like(machine, local, head_dim, "bfloat16", tmp_path, length, trees)
    found = [kernel for kernel in kernels(tmp_path, machine) if kernel.name.endswith("_mosaic_gpu_kernel")]
    print(name, head_dim, *found, sep="\n  ")
    assert len(found) == 2, found  # forward and backward; more shared memory than there is would not have compiled
    assert all(kernel.spilled_bytes == 0 for kernel in found), found


@pytest.mark.slow
def test_every_hop_hides_behind_the_kernels():
    check_overlap(program("4xh200", local="pallas_hopper"), 4)


def test_ampere_has_no_wgmma():
    with pytest.raises(NotImplementedError, match="this is NVIDIA A100-SXM4-80GB: use pallas_triton"):
        make_pallas_hopper(compiler("a100").devices[0], None, None)
