"""Every family against transformers: logits, gradients and greedy text, from the folder that save_pretrained writes.

What `make test` compares with is golden/families.npz; with torch at hand (slow) transformers is asked itself.
"""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringbpt.attention import permutation
from ringbpt.checkpoint.huggingface import load_folder, open_folder
from ringbpt.checkpoint.store import Wanted
from ringbpt.config import Execution
from ringbpt.layouts import inverse
from ringbpt.mesh import make_mesh, put_batch
from ringbpt.model.llama import Model
from ringbpt.types import Batch
from tests.golden.make_families import CASES, LENGTHS, documents, live, restore

# The plainest program, and those that users run; meshes are dp,fsdp,tp,sp.
PLAIN = {"attention_type": "standard", "scan_layers": False, "scan_mlp": False, "sequence_layout": "contiguous"}
RING = {
    "attention_type": "ring_blockwise", "scan_layers": True, "scan_mlp": True, "scan_mlp_chunk_size": 8,
    "scan_query_chunk_size": 8, "scan_key_chunk_size": 8, "loss_chunk_size": 8, "sequence_layout": "zigzag",
}  # fmt: skip
PROGRAMS = {
    "one device": ((1, 1, 1, 1), PLAIN),
    "sp=4": ((1, 1, 1, 4), RING),
    "tp=2": ((1, 1, 2, 1), RING),
    "fsdp=2": ((1, 2, 1, 1), RING),
    "unscanned": ((1, 1, 1, 2), RING | {"scan_layers": False}),
    "scan axis 1": ((1, 1, 2, 2), RING | {"param_scan_axis": 1}),
}
# For `make test`: every family once, every mesh once.
COVER = [
    ("llama3.2", "sp=4"), ("mistral", "one device"), ("qwen2", "fsdp=2"), ("qwen3", "one device"),
    ("yarn", "one device"), ("mixtral", "tp=2"),
]  # fmt: skip


def make_model(folder: Path, program: str) -> Model:
    mesh_shape, flags = PROGRAMS[program]
    execution = {name: value for name, value in flags.items() if name != "param_scan_axis"}
    architecture = replace(open_folder(folder).architecture, param_scan_axis=flags.get("param_scan_axis", 0))
    return Model(architecture, Execution(**execution), make_mesh(mesh_shape))


def make_batch(model: Model, packed: bool) -> Batch:
    """The two documents in one row, or each in a row of its own with padding behind it; as many rows as fsdp wants."""
    docs, rows = documents(), [[0, 1]] if packed else [[0], [1]]
    rows = rows * 2 if packed else rows  # an fsdp of 2 splits the rows
    length = sum(LENGTHS)

    def row(numbers: list[int], of: str) -> np.ndarray:
        parts = {
            "token": [docs[i] for i in numbers],
            "target": [np.append(docs[i][1:], 0) for i in numbers],
            "weight": [np.arange(LENGTHS[i]) < LENGTHS[i] - 1 for i in numbers],
            "position": [np.arange(LENGTHS[i]) for i in numbers],
            "segment": [np.full(LENGTHS[i], place + 1) for place, i in enumerate(numbers)],
        }[of]
        joined = np.concatenate(parts)
        return np.pad(joined, (0, length - len(joined))).astype(np.float32 if of == "weight" else np.int32)

    columns = [
        np.stack([row(numbers, of) for numbers in rows]) for of in ("token", "target", "weight", "position", "segment")
    ]
    host = Batch(*columns)
    layout = model.execution.sequence_layout
    return put_batch(lambda a, b: jax.tree.map(lambda x: x[a:b], host), columns[0].shape, model.mesh, layout)


def check(folder: Path, want: dict[str, np.ndarray], program: str, packed: bool) -> None:
    model = make_model(folder, program)
    architecture = model.architecture
    params = load_folder(folder, architecture, Wanted(model.abstract_params))
    batch = make_batch(model, packed)

    def loss(params):
        stats = model.token_stats(params, batch)
        hidden_BTD = model.hidden(params, batch.token_BT, batch.meta)
        return -jnp.sum(stats.logp_BT * batch.weight_BT) / jnp.sum(batch.weight_BT), hidden_BTD

    grads, hidden_BTD = jax.jit(jax.grad(loss, has_aux=True))(params)
    to_text = inverse(permutation(model.execution.sequence_layout, sum(LENGTHS), model.mesh.shape["sp"]))
    hidden = np.asarray(hidden_BTD, np.float64)[:, to_text]
    if not packed:
        hidden = np.concatenate([hidden[row, : LENGTHS[row]] for row in range(2)])[None]
    logits = hidden[0] @ np.asarray(model.unembed(params), np.float64)
    np.testing.assert_allclose(logits, want["logits"], rtol=0, atol=2e-5)
    compared = set()
    for conversion in open_folder(folder, architecture=architecture).table:
        ours = grads
        for part in conversion.ours.split("."):
            ours = ours[part]
        whole = np.asarray(ours)
        for name, layer, expert in conversion.parts():
            if (theirs := want.get(f"gradient/{name}")) is not None:
                got = conversion.to_theirs(conversion.pick(whole, layer, expert))
                assert np.abs(got - theirs).max() <= 1e-4 * np.abs(theirs).max(), name
                compared.add(f"gradient/{name}")
    assert compared == {name for name in want if name.startswith("gradient/")}


@pytest.mark.parametrize(("case", "program"), COVER)
def test_same_as_transformers(case, program, tmp_path):
    check(tmp_path, restore(case, tmp_path), program, packed=program != "fsdp=2")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_same_as_transformers_live(case, tmp_path):
    want = live(case, tmp_path)
    for program in PROGRAMS:
        for packed in (True, False):
            check(tmp_path, want, program, packed)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen2", "qwen3", "mixtral"])
def test_windows_of_other_families_live(case, tmp_path):
    """What Mistral has always and these may have."""
    qwen = {"use_sliding_window": True, "max_window_layers": 0} if case.startswith("qwen") else {}
    want = live(case, tmp_path, sliding_window=12, **qwen)
    assert open_folder(tmp_path).architecture.sliding_window == 12
    for program in ("one device", "sp=4"):
        check(tmp_path, want, program, packed=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_golden_file_is_what_transformers_says(case, tmp_path):
    kept = restore(case, tmp_path / "kept")
    found = live(case, tmp_path / "live")
    for name, array in kept.items():
        np.testing.assert_allclose(array, found[name], rtol=0, atol=1e-5 * np.abs(found[name]).max(), err_msg=name)
