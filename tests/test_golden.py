"""The promise of the house: the same numbers on every mesh, layout and split of the batch.

20 steps of the debug recipe in float32, through the whole loop, against golden/losses.json, which one device with
dense attention and nothing clever made (`python -m tests.golden.make_losses`).
"""

import json
from itertools import product

import pytest

from tests.golden.make_losses import FILE, STEPS, losses

MESHES = ((1, 1, 1, 1), (1, 1, 1, 8), (1, 2, 2, 2), (2, 2, 1, 2), (1, 8, 1, 1))
# (mesh, layout, scan_layers, accumulate): steps. The recipe's own and the one that is least like it, as far as the
# weights have changed: no loss depends on how many steps are to come. The product, to the end, is slow.
CASES = {((1, 1, 1, 8), "zigzag", True, 1): 5, ((1, 2, 2, 2), "striped", False, 4): 4}
PRODUCT = list(product(MESHES, ("contiguous", "zigzag", "striped"), (True, False), (1, 4)))


def check(mesh, layout, scan_layers, accumulate, tmp_path, steps=STEPS):
    got = losses(
        mesh,
        [
            f"--llama.sequence_layout={layout}",
            f"--llama.scan_layers={scan_layers}",
            f"--optimizer.accumulate_gradient_steps={accumulate}",
        ],
        tmp_path,
        steps,
    )
    want = json.loads(FILE.read_text())[:steps]
    worst = max(abs(a - b) for a, b in zip(got, want, strict=True))
    assert worst <= 1e-5, (worst, got)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_losses(case, tmp_path):
    check(*case, tmp_path, CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", PRODUCT, ids=str)
def test_same_losses_product(case, tmp_path):
    check(*case, tmp_path)


def test_the_losses_fall():
    """A golden file of a model that learns nothing would prove nothing."""
    want = json.loads(FILE.read_text())
    assert len(want) == STEPS and want[-1] < want[0] - 1.5
