"""The promise of the house: the same numbers on every mesh, layout and split of the batch.

20 steps of the debug recipe in float32, through the whole loop, against golden/losses.json, which one device with
dense attention and nothing clever made (`python -m tests.golden.make_losses`).
"""

import json
from itertools import product

import pytest

from tests.golden.make_losses import FILE, losses

MESHES = ((1, 1, 1, 1), (1, 1, 1, 8), (1, 2, 2, 2), (2, 2, 1, 2), (1, 8, 1, 1))
# mesh, layout, scan_layers, accumulate: each value of each, and the pairs that differ most; the product is slow.
CASES = [
    ((1, 1, 1, 1), "contiguous", True, 4),
    ((1, 1, 1, 8), "zigzag", True, 1),
    ((1, 2, 2, 2), "striped", False, 4),
    ((2, 2, 1, 2), "contiguous", True, 1),
    ((1, 8, 1, 1), "zigzag", False, 4),
]
PRODUCT = [
    case for case in product(MESHES, ("contiguous", "zigzag", "striped"), (True, False), (1, 4)) if case not in CASES
]


def check(mesh, layout, scan_layers, accumulate, tmp_path):
    got = losses(
        mesh,
        [
            f"--llama.sequence_layout={layout}",
            f"--llama.scan_layers={scan_layers}",
            f"--optimizer.accumulate_gradient_steps={accumulate}",
        ],
        tmp_path,
    )
    want = json.loads(FILE.read_text())
    worst = max(abs(a - b) for a, b in zip(got, want, strict=True))
    assert worst <= 1e-5, (worst, got)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_losses(case, tmp_path):
    check(*case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", PRODUCT, ids=str)
def test_same_losses_product(case, tmp_path):
    check(*case, tmp_path)


def test_the_losses_fall():
    """A golden file of a model that learns nothing would prove nothing."""
    want = json.loads(FILE.read_text())
    assert len(want) == 20 and want[-1] < want[0] - 1.5
