"""Adapters of PEFT's: its loss and gradients beside the same base, its folders there and back, and what is refused.

The values of golden/adapters.npz are PEFT's own, by tests/golden/make_adapters.py.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ringbpt.checkpoint.export import logits, write_weights
from ringbpt.checkpoint.huggingface import write_settings
from ringbpt.checkpoint.load import load_model
from ringbpt.checkpoint.peft import read_adapter, write_adapter
from ringbpt.checkpoint.safetensors import FolderWriter, Planned, TensorFolder
from ringbpt.checkpoint.tensors import flatten
from ringbpt.config import LoraConfig, UserError
from ringbpt.config.lora import pairs_of
from ringbpt.mesh import make_mesh, put_batch
from ringbpt.model.adapters import SCALE, A, B
from ringbpt.model.llama import Model
from ringbpt.types import Batch
from tests.checkpoint.test_huggingface import jax2hf
from tests.golden import make_adapters as peft
from tests.golden.make_llama import documents
from tests.model.helpers import make_model
from tests.model.test_oracle import llama_flags, our_params


def with_adapter(case: str, folder: Path, mesh=(1, 1, 1, 1), **execution: Any) -> tuple[Model, Any, dict]:
    """(the model, its params with PEFT's adapter, PEFT's numbers)."""
    found = peft.restore(case, folder)
    model = make_model(mesh, **llama_flags(peft.CASE), **execution)
    params = jax.device_put(our_params(peft.CASE), model.shardings)
    model, params = read_adapter(folder, model.architecture).on(model, params)
    return model, params, found


WAYS = [
    ((1, 1, 1, 1), {"attention_type": "standard", "scan_mlp": False}, "all"),
    ((1, 2, 2, 2), {"scan_layers": False}, "all"),
    ((1, 1, 1, 4), {"kv_heads_at_a_time": 1, "sequence_layout": "zigzag"}, "all"),
    ((1, 1, 2, 1), {"attention_type": "blockwise"}, "all-linear"),
    ((1, 1, 1, 1), {"attention_type": "standard", "scan_mlp": False}, "patterns"),
    ((1, 1, 1, 1), {"attention_type": "standard", "scan_mlp": False}, "one layer"),
]


@pytest.mark.parametrize(("mesh", "execution", "case"), WAYS)
def test_the_loss_and_gradients_of_peft(mesh, execution, case, tmp_path):
    model, params, golden = with_adapter(case, tmp_path / "adapter", mesh, **execution)
    (document,) = documents(peft.CASE)
    token = np.asarray(document, np.int32)[None]
    place = np.arange(token.shape[1], dtype=np.int32)[None]
    weight = (place < token.shape[1] - 1).astype(np.float32)
    host = Batch(token, np.roll(token, -1, 1), weight, place, np.ones_like(place))
    rows = mesh[0] * mesh[1]
    host = jax.tree.map(lambda x: np.concatenate([x, *[np.zeros_like(x)] * (rows - 1)]), host)
    batch = put_batch(host.rows, host.token_BT.shape, model.mesh, model.execution.sequence_layout)

    def loss(pairs: Any, params: Any) -> Any:
        params = params | {"layers": params["layers"] | pairs}
        return -(model.token_stats(params, batch).logp_BT * batch.weight_BT).sum() / batch.weight_BT.sum()

    pairs = {name: x for name, x in params["layers"].items() if name.endswith((A, B))}
    value, grads = jax.jit(jax.value_and_grad(loss))(pairs, params)
    assert float(value) == pytest.approx(float(golden["loss"]), rel=1e-5)
    ours = tensors(tmp_path / "grads", jax.device_get(grads), model)
    theirs = {name.removeprefix("grad "): x for name, x in golden.items() if name.startswith("grad ")}
    difference, norm = 0.0, 0.0
    for name, grad in theirs.items():
        difference += np.sum((np.float64(ours[name]) - grad) ** 2)
        norm += np.sum(np.float64(grad) ** 2)
    assert difference**0.5 <= 1e-4 * norm**0.5


def tensors(folder: Path, layers: dict, model: Model) -> dict[str, np.ndarray]:
    """Pairs, or their gradients, as PEFT lays them out; those of a lower rank with zeros behind them."""
    largest = max(pair.rank for pair in model.pairs)
    write_adapter(folder, layers, LoraConfig(rank=largest), model.pairs, model.architecture, "base")
    files = TensorFolder(folder, "adapter_model")
    return {name: files.read(name) for name in files.entries}


@pytest.mark.parametrize("case", peft.CASES)
def test_logits_are_those_of_peft(case, tmp_path):
    model, params, golden = with_adapter(case, tmp_path, attention_type="standard", scan_mlp=False)
    (document,) = documents(peft.CASE)
    ours = logits(model, params, np.asarray(document, np.int32)[None])[0]
    assert np.abs(ours - golden["logits"]).max() <= 2e-5 * np.abs(golden["logits"]).max()  # both in float32


@pytest.mark.parametrize("case", ["all", "all-linear"])
def test_there_and_back_is_the_same_bits(case, tmp_path):
    peft.restore(case, tmp_path / "theirs")
    architecture = make_model(**llama_flags(peft.CASE)).architecture
    found = read_adapter(tmp_path / "theirs", architecture)
    settings = peft.CASES[case]
    lora = LoraConfig(rank=settings["r"], alpha=settings["lora_alpha"], rslora=settings.get("use_rslora", False))
    assert [pair[:2] for pair in found.pairs] == [pair[:2] for pair in pairs_of(lora, architecture)]
    write_adapter(tmp_path / "back", found.layers, lora, found.pairs, architecture, "base")
    before, after = (TensorFolder(tmp_path / name, "adapter_model") for name in ("theirs", "back"))
    assert before.entries.keys() == after.entries.keys()
    for name in before.entries:
        np.testing.assert_array_equal(before.read(name), after.read(name), err_msg=name)
    again = read_adapter(tmp_path / "back", architecture)
    assert again.layers["w_q" + SCALE].tolist() == found.layers["w_q" + SCALE].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3': only LORA"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"r": 5}, "means a pair of rank 5"),
        ({"r": "4"}, "r='4' is no number above 0"),
        ({"lora_alpha": 0}, "lora_alpha=0 is no number above 0"),
        ({"rank_pattern": {"q_proj": 2}}, "means a pair of rank 2"),
        ({"rank_pattern": ["q_proj"]}, "is no object of patterns"),
        ({"alpha_pattern": {"(": 2}}, "is no object of patterns"),
    ],
)
def test_other_kinds_are_refused(change, message, tmp_path):
    peft.restore("all", tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError) as error:
        read_adapter(tmp_path, make_model(**llama_flags(peft.CASE)).architecture)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("base_model.model.model.embed_tokens.lora_A.weight", (4, 48), "has no place"),
        ("base_model.model.model.layers.7.mlp.up_proj.lora_A.weight", (4, 32), "the model has 2 layers"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", (4, 31), "it is of another base model"),
        ("base_model.model.model.layers.0.mlp.q_proj.lora_A.weight", (4, 32), "has no place"),
    ],
)
def test_other_tensors_are_refused(name, shape, message, tmp_path):
    peft.restore("all", tmp_path / "good")
    files = TensorFolder(tmp_path / "good", "adapter_model")
    found = {each: files.read(each) for each in files.entries} | {name: np.zeros(shape, np.float32)}
    with FolderWriter(
        tmp_path / "bad", [Planned(n, x.dtype, x.shape) for n, x in found.items()], 1 << 30, "adapter_model"
    ) as writer:
        for each, array in found.items():
            writer.write(each, array)
    (tmp_path / "bad" / "adapter_config.json").write_bytes((tmp_path / "good" / "adapter_config.json").read_bytes())
    with pytest.raises(UserError) as error:
        read_adapter(tmp_path / "bad", make_model(**llama_flags(peft.CASE)).architecture)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_the_file_is_what_peft_makes():
    pytest.importorskip("peft", reason="the extra `oracle` has PEFT")
    pytest.importorskip("torch", reason="the extra `oracle` has torch")
    with np.load(peft.FILE) as file:
        for case in peft.CASES:
            for name, array in peft.golden(case).items():
                if array.dtype != np.uint8:
                    np.testing.assert_allclose(array, file[f"{case}/{name}"], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_peft_reads_ours(tmp_path):
    pytest.importorskip("peft", reason="the extra `oracle` has PEFT")
    torch = pytest.importorskip("torch", reason="the extra `oracle` has torch")
    from peft import PeftModel

    model, params, golden = with_adapter("all", tmp_path / "theirs", attention_type="standard", scan_mlp=False)
    layers = {name: np.asarray(x) for name, x in params["layers"].items()}
    write_adapter(tmp_path / "ours", layers, LoraConfig(rank=4, alpha=6), model.pairs, model.architecture, "base")
    theirs = PeftModel.from_pretrained(peft.adapted("all").unload(), tmp_path / "ours").eval()
    (document,) = documents(peft.CASE)
    with torch.no_grad():
        found = theirs(torch.tensor(np.asarray(document)[None], dtype=torch.long)).logits.numpy()[0]
    np.testing.assert_allclose(found, golden["logits"], rtol=1e-5, atol=1e-5)


def test_where_there_is_no_adapter(tmp_path):
    architecture = make_model(**llama_flags(peft.CASE)).architecture
    with pytest.raises(UserError, match=r"no adapter_config.json there"):
        read_adapter(tmp_path, architecture)
    assert Model(architecture, make_model().execution, make_mesh((1, 1, 1, 1))).pairs == ()


def test_a_merged_folder_says_what_the_adapter_said(tmp_path, capsys):
    """In float32 to 1e-5; in bfloat16 what rounding has done is said, and is more."""
    peft.restore("patterns", tmp_path / "adapter")
    architecture, params = make_model(**llama_flags(peft.CASE)).architecture, flatten(our_params(peft.CASE))
    weights = {name: partial(np.asarray, x) for name, x in params.items()}
    dtype = np.dtype(np.float32)
    write_settings(
        tmp_path / "base", write_weights(weights, architecture, dtype, {}, tmp_path / "base", 1 << 40, "base")
    )
    spec = f"huggingface::{tmp_path / 'base'}"
    said = {}
    for dtype in ("fp32", "bf16"):
        words = [f"--load_checkpoint={spec}", f"--adapter={tmp_path}/adapter", f"--output_dir={tmp_path}/{dtype}"]
        assert jax2hf(*words, f"--dtype={dtype}") == 0
        found = re.search(r"largest change of a logit (\S+) \(largest logit (\S+)\)", capsys.readouterr().out)
        said[dtype] = float(found[1]) / float(found[2])
    assert said["fp32"] <= 1e-5 < said["bf16"] < 0.05
    golden = peft.restore("patterns", tmp_path / "again")
    _, merged = load_model(f"huggingface::{tmp_path}/fp32", (1, 1, 1, 1))
    (document,) = documents(peft.CASE)
    plain = make_model(**llama_flags(peft.CASE), attention_type="standard", scan_mlp=False)
    ours = logits(plain, merged, np.asarray(document, np.int32)[None])[0]
    assert np.abs(ours - golden["logits"]).max() <= 2e-5 * np.abs(golden["logits"]).max()
    assert merged["layers"].keys() == plain.init(jax.random.key(0))["layers"].keys()
    assert jax2hf(words[0], f"--output_dir={tmp_path}/x") == 2
    assert "is a Hugging Face folder already: copy it" in capsys.readouterr().err
    assert jax2hf(words[0], f"--adapter={tmp_path}", f"--output_dir={tmp_path}/x") == 2
    assert "no adapter_config.json there" in capsys.readouterr().err and not (tmp_path / "x").exists()
