"""Reward models as checkpoints: begun from a base model, gone on with, and as transformers' sequence classification."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from ringbpt import evaluate, generate
from ringbpt.checkpoint.export import parity, to_huggingface
from ringbpt.checkpoint.huggingface import to_ours
from ringbpt.checkpoint.load import load_model
from ringbpt.checkpoint.safetensors import FolderWriter, Planned
from ringbpt.checkpoint.store import StoredStep
from ringbpt.config import UserError, run_main
from tests.checkpoint.test_huggingface import same, tensors
from tests.golden.make_families import restore
from tests.training.test_loop import FULL, refusal, train
from tests.training.test_reference import TEXT, pairs

pytestmark = pytest.mark.usefixtures("compiled_once")
PAD = 3


def score_folder(case: str, folder: Path) -> None:
    """A family's golden folder as a reward model's: a score in place of the head."""
    restore(case, folder / "base")
    found = tensors(folder / "base")
    found = {name: array for name, array in found.items() if name != "lm_head.weight"}
    found["score.weight"] = np.random.RandomState(0).randn(1, 32).astype(np.float32)
    plan = [Planned(name, array.dtype, array.shape) for name, array in found.items()]
    with FolderWriter(folder / "hf", plan, 1 << 30) as writer:
        for name, array in found.items():
            writer.write(name, array)
    settings = json.loads((folder / "base" / "config.json").read_text())
    settings["architectures"] = [settings["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")]
    more = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": PAD, "eos_token_id": 2}
    (folder / "hf" / "config.json").write_text(json.dumps(settings | more))


@pytest.mark.parametrize("case", ["llama3", "mistral", "qwen2", "qwen2.5"])
def test_there_and_back_is_the_same_bits(case, tmp_path):
    score_folder(case, tmp_path)
    to_ours(tmp_path / "hf", tmp_path / "ours")
    to_huggingface(f"params::{tmp_path}/ours", tmp_path / "back")
    same(tensors(tmp_path / "hf"), tensors(tmp_path / "back"))
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "back"))
    for key in ("architectures", "id2label", "label2id", "pad_token_id"):
        assert before[key] == after[key], key
    ours, params = load_model(f"params::{tmp_path}/ours", (1, 1, 1, 2))
    _, direct = load_model(f"huggingface::{tmp_path}/hf", (1, 1, 1, 2))
    assert ours.architecture.head == "score" and "unembed" not in params
    jax.tree.map(np.testing.assert_array_equal, params, direct)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_labels": 2}, "num_labels=2: a reward model has one"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "num_labels=3: a reward model has one"),
        ({"id2label": None}, "num_labels=2: a reward model has one"),
        ({"id2label": [1]}, "num_labels=2: a reward model has one"),
        ({"architectures": ["BertForSequenceClassification"]}, "architecture 'BertForCausalLM' is none of"),
    ],
)
def test_other_classifiers_are_refused(change, message, tmp_path):
    score_folder("llama3", tmp_path)
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(UserError, match=message):
        load_model(f"huggingface::{tmp_path}/hf", (1, 1, 1, 1))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "pairs.jsonl").write_text(pairs(40))
    (folder / "texts.jsonl").write_text('{"text": "say ant bee: ant bee"}\n' * 40)
    return (f"--train_dataset.json_dataset.path={folder}/pairs.jsonl", f"--train_dataset.cache_dir={folder}/cache")


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> Path:
    """A model of language, and a reward model that began from it."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder, *data, data[0].replace("pairs.jsonl", "texts.jsonl"), *FULL, "--total_steps=1", name="base")
    reward = ("--objective=reward", TEXT[0], f"--load_checkpoint=params::{folder}/base")
    train(folder, *data, *reward, *FULL, "--total_steps=2", "--optimizer.adamw_optimizer.lr=0", name="reward")
    return folder


def stored(run: Path) -> dict[str, np.ndarray]:
    step = StoredStep(max((run / "checkpoints").iterdir(), key=lambda path: int(path.name)))
    return {name: step.read("params", name) for name in step.dtypes("params")}


def test_it_begins_from_a_base_model_with_a_fresh_head(runs):
    """At a rate of 0: the base's weights to the bit, its head left, and a score that is drawn like other weights."""
    base, reward = stored(runs / "base"), stored(runs / "reward")
    assert base.keys() - reward.keys() == {"unembed"} and reward.keys() - base.keys() == {"score"}
    for name in base.keys() & reward.keys():
        np.testing.assert_array_equal(base[name], reward[name], err_msg=name)
    assert 0.01 < reward["score"].std() < 0.04


def test_what_a_reward_model_is_not_taken_for(runs, data, tmp_path, capsys):
    again = ("--objective=reward", TEXT[0], f"--load_checkpoint=params::{runs}/reward", "--total_steps=1")
    train(tmp_path, *data, *again, "--optimizer.adamw_optimizer.lr=0", *FULL, name="again")
    same(stored(runs / "reward"), stored(tmp_path / "again"))
    found = refusal(tmp_path, *data, "--objective=dpo", TEXT[0], f"--load_checkpoint=params::{runs}/reward")
    assert "parameter unembed is not in the checkpoint" in found
    load = f"--load_checkpoint=params::{runs}/reward"
    for entry, more in ((generate, "--prompt=hello"), (evaluate, "--passkey=64")):
        assert run_main(entry.main, [load, more]) == 2
        assert "is a reward model, which scores texts and predicts none" in capsys.readouterr().err


def test_a_run_becomes_a_sequence_classifier(runs, tmp_path):
    """Padded with what no text ends with: eos would hide a text's own last token from transformers."""
    to_huggingface(f"params::{runs}/reward", tmp_path / "hf")
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForSequenceClassification"]
    assert settings["pad_token_id"] == settings["bos_token_id"] == 256 != settings["eos_token_id"]
    _, params = load_model(f"huggingface::{tmp_path}/hf", (1, 1, 1, 1))
    ours = stored(runs / "reward")
    np.testing.assert_array_equal(np.asarray(params["score"]), ours["score"])
    np.testing.assert_array_equal(np.asarray(params["layers"]["w_q"]), ours["layers.w_q"])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama3", "mistral", "qwen2", "qwen2.5"])
def test_scores_are_those_of_transformers(case, tmp_path):
    score_folder(case, tmp_path)
    to_ours(tmp_path / "hf", tmp_path / "ours")
    to_huggingface(f"params::{tmp_path}/ours", tmp_path / "back")
    model, params = load_model(f"params::{tmp_path}/ours", (1, 1, 1, 1))
    for folder in ("hf", "back"):
        found = parity(tmp_path / folder, model, params)
        assert found["largest_difference"] <= 1e-5 * max(1.0, found["largest_logit"])
