"""The catalogue of silent bugs that trainers on long sequences have had: each is named, with the test that sees it."""

import ast
from pathlib import Path

import jax
import numpy as np
import pytest

from ringbpt.config import Config, OptimizerConfig
from ringbpt.mesh import make_mesh, put_batch
from ringbpt.model.llama import Model
from ringbpt.objectives import objective_of
from ringbpt.training.state import StateLayout
from ringbpt.training.step import batch_facts, make_eval_step
from ringbpt.types import Batch
from tests.flags import llama_flags
from tests.model.helpers import CHEAP, LLAMA

ROOT = Path(__file__).parent
CATALOGUE = {
    "labels shifted inside each chunk, so that its last token is never trained": (
        "data/test_documents.py::test_a_row_by_hand",
        "test_catalogue.py::test_a_shard_without_a_label_and_an_evaluation_over_shards",
    ),
    "packed documents attending across their boundary under ring": (
        "test_verify.py::test_a_document_boundary_ignored",
        "model/test_packed_documents.py",
    ),
    "padding attended as real tokens": ("attention/test_local.py::test_rows_without_keys_are_zero_and_never_nan",),
    "evaluation NaN, or an eighth of the truth, under sequence parallelism": (
        "test_catalogue.py::test_a_shard_without_a_label_and_an_evaluation_over_shards",
    ),
    "the sequence split twice": ("test_catalogue.py::test_a_shard_without_a_label_and_an_evaluation_over_shards",),
    "epochs and steps miscounted under sequence parallelism": (
        "test_catalogue.py::test_a_loader_does_not_know_the_mesh",
    ),
    "loss or gradient scaled by sp or by the accumulated steps": (
        "objectives/test_objectives.py::test_micro_batches_change_nothing",
        "model/test_llama.py::test_no_mesh_changes_anything",
    ),
    "a shard with every label masked giving NaN": (
        "test_catalogue.py::test_a_shard_without_a_label_and_an_evaluation_over_shards",
    ),
    "out and lse accumulated in bf16": ("attention/test_local.py::test_half_precision_is_accumulated_in_float32",),
    "exp overflowing where partial results are merged": (
        "attention/test_local.py::test_merge_does_not_overflow_and_knows_nothing_as_nothing",
    ),
    "gradients right in norm and wrong in direction": ("model/test_llama.py::test_no_mesh_changes_anything",),
    "lengths normalised locally, before the reduction": ("objectives/test_everywhere.py::test_the_same_step",),
    "a mean of means over accumulated steps": (
        "objectives/test_preferences.py::test_micro_batches_of_0_1_3_and_many_units_are_the_step",
    ),
    "RoPE's permutation lost on export": ("checkpoint/test_huggingface.py",),
    "prompt and answer tokenised apart": (
        "data/test_shapes.py::test_preferences_without_a_prompt_share_their_beginning",
    ),
    "a chat template without marks giving a mask of zeros": ("data/test_chat_kinds.py",),
    "a resume that changes the order of the data": (
        "data/test_processes.py::test_fifty_restarts_at_random_steps_change_nothing",
    ),
    "unknown configuration keys swallowed": ("test_config.py",),
}


def names_in(file: Path) -> dict[str, bool]:
    """The tests of a file, and whether each runs in `make test`."""
    tree = ast.parse(file.read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return {node.name: "pytest.mark.slow" not in map(ast.unparse, node.decorator_list) for node in found}


@pytest.mark.parametrize("bug", CATALOGUE)
def test_each_bug_has_a_test(bug):
    for name in CATALOGUE[bug]:
        file, _, test = name.partition("::")
        quick = names_in(ROOT / file)
        assert quick.get(test) if test else any(quick.values()), name


def batch() -> Batch:
    """Two rows over eight shards: labels in the first row's third shard and everywhere in the second's last ones."""
    place = np.tile(np.arange(64, dtype=np.int32), (2, 1))
    token, target = np.random.default_rng(0).integers(1, 64, (2, 2, 64)).astype(np.int32)
    weight = np.zeros((2, 64), np.float32)
    weight[0, 17:20] = weight[1, 48:] = 1
    return Batch(token, target, weight, place, np.ones_like(place))


def test_a_shard_without_a_label_and_an_evaluation_over_shards():
    found = {}
    for sp in (1, 8):
        kind = {"attention_type": "ring_blockwise" if sp > 1 else "standard"}
        config = Config(
            dtype="fp32", mesh_shape=(1, 1, 1, sp), optimizer=OptimizerConfig(), **llama_flags(**LLAMA | CHEAP | kind)
        )
        model = Model.of(config, make_mesh((1, 1, 1, sp)))
        layout = StateLayout(config, model)
        state = layout.start(model.init(jax.random.key(0)))
        host = batch()
        on_mesh = put_batch(host.rows, host.token_BT.shape, model.mesh, "zigzag" if sp > 1 else "contiguous")
        means = jax.device_get(make_eval_step(layout, objective_of(config))(state, on_mesh))
        facts = jax.device_get(batch_facts(on_mesh))
        found[sp] = [
            float(means["loss"].value()),
            float(means["loss"].weight),
            *(float(f.total) for f in facts.values()),
        ]
    assert np.isfinite(found[1]).all() and found[1][1] == 19 and found[1][3] == 128
    assert found[8] == pytest.approx(found[1], rel=1e-6)


def test_a_loader_does_not_know_the_mesh():
    """So an epoch has as many steps on any: no module below the mesh, and none that counts steps, reads its sizes."""
    for file in (ROOT.parent / "ringbpt" / "data").rglob("*.py"):
        names = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & {"mesh_shape", "device_count", "local_device_count"}, file
