"""The benchmark checks before it times, counts visible pairs only, and says what it left out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringbpt.attention.api import LOCALS
from ringbpt.attention.core import Local, visible
from ringbpt.attention.local import reference
from ringbpt.bench import kernels
from ringbpt.bench.kernels import Problem

TINY = Problem(32, 16, 2, 1, documents=4)


@pytest.mark.parametrize("mask", ["causal", "packed", "window"])
def test_flops_are_those_of_visible_pairs(mask):
    problem = Problem(32, 16, 2, 1, mask, documents=4)
    pairs = int(np.asarray(visible(problem.meta(), problem.meta(), problem.spec)).sum())
    assert problem.flops("forward") == 2 * pairs * 4 * 16
    assert problem.flops("backward") == 2.5 * problem.flops("forward")


def test_a_wrong_kernel_is_told_and_not_timed(monkeypatch, tmp_path):
    def wrong_bwd(*args):
        dq, dk, dv = reference.attend_bwd(*args)
        return dq, dk * 1.1, dv

    monkeypatch.setitem(LOCALS, "wrong", lambda device, *sizes: Local(reference.attend, wrong_bwd))
    monkeypatch.setattr(kernels, "_REPEATS", 1)
    said = []
    keep = lambda report: kernels.save(report, tmp_path / "bench.json")
    names = ["reference", "wrong", "pallas_hopper"]
    report = kernels.run(names, [TINY], 16, (16, 2), 60.0, say=said.append, keep=keep)
    assert [entry["kernel"] for entry in report["tflops"]] == ["reference"]
    assert set(report["ring"]) == {"reference"} and set(report["ring"]["reference"]) == {"forward", "both"}
    assert "use blockwise" in report["refused"]["pallas_hopper"]
    assert any("WRONG" in line and "wrong" in line for line in said)
    assert json.loads((tmp_path / "bench.json").read_text())["tflops"] == report["tflops"]
    assert "| 32 | 16 | 2/1 | causal |" in (tmp_path / "bench.md").read_text()


def test_what_there_is_no_time_for_is_listed():
    said = []
    report = kernels.run(["reference"], [TINY], 16, (16, 2), 0.0, say=said.append)
    assert report["tflops"] == [] and len(report["left_out"]) == 3  # its check, itself and the ring
    assert sum("left out" in line for line in said) == 3


def test_the_order_is_that_of_importance():
    order = kernels.problems([8, 16], [64, 128], [(64, 8), (32, 32)])
    assert len(order) == 2 * 2 * 2 * 3
    assert order[0] == Problem(16, 128, 64, 8, "causal") and order[1].length == 8
    assert order[-1].head_dim == 64 and order[-1].heads == order[-1].kv_heads


def test_jax_itself_is_a_peer():
    peer = kernels.differentiated("jax", lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True))
    assert max(kernels.errors(TINY, *peer(TINY)).values()) < kernels.TOLERANCE
    with pytest.raises(NotImplementedError, match="plain causal"):
        peer(Problem(32, 16, 2, 1, "packed"))


def test_the_table_compares_auto_with_the_better_of_pytorch():
    speeds = {"auto": (600.0, 500.0), "torch flash": (500.0, 400.0), "torch cudnn": (625.0, 250.0)}
    entries = [
        {"kernel": name, "length": 1, "head_dim": 2, "heads": 3, "kv_heads": 4, "mask": "m"}
        | dict(zip(("forward", "backward"), speed, strict=True))
        for name, speed in speeds.items()
    ]
    text = kernels.table({"tflops": entries, "ring": {"auto": {"forward": 0.93, "both": 0.95}}})
    assert "| 625 / 250 | 0.96 / 1.25 |" in text and "0.930 of one shot" in text


@pytest.mark.slow
def test_torch_is_a_peer():
    peer = kernels.torch_sdpa("MATH")
    assert max(kernels.errors(TINY, *peer(TINY)).values()) < kernels.TOLERANCE
    speed = kernels.measure(TINY, *peer(TINY))
    assert speed["forward"] > 0 and jnp.isfinite(speed["backward"])
