"""Runs that are compared with a reference model: its column, its weights in the step, killed and gone on with."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ringbpt.config import UserError
from ringbpt.evaluation.reference import weights_fingerprint
from ringbpt.mesh import make_mesh
from ringbpt.model.llama import Model
from ringbpt.training import reference as references
from ringbpt.training.metrics import read_rows
from tests.training.test_loop import UNSAVED, losses, train

PAIRED = ("--objective=dpo", "--train_dataset.json_dataset.batch_size=2", "--eval_dataset.json_dataset.batch_size=2")
TEXT = "--train_dataset.text_processor.fields=", "--eval_dataset.text_processor.fields="
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("compiled_once")


def pairs(count: int) -> str:
    rng = random.Random(0)
    words = ["ant", "bee", "cat", "dog", "elk", "fox"]
    rows = [
        {"prompt": f"say {a} {b}:", "chosen": f" {a} {b}", "rejected": f" {b}"}
        for a, b in (rng.sample(words, 2) for _ in range(count))
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "pairs.jsonl").write_text(pairs(40))
    names = ("train", "eval")
    return (
        *PAIRED,
        *TEXT,
        *(f"--{name}_dataset.json_dataset.path={folder}/pairs.jsonl" for name in names),
        *(f"--{name}_dataset.cache_dir={folder}/cache" for name in names),
    )


def cache(data: tuple[str, ...]) -> Path:
    return Path(data[-1].partition("=")[2])


def columns(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.glob("columns-*/*"))}


def test_a_column_and_a_model_in_the_step_say_the_same(data, tmp_path):
    # In an order of each row's own, which the column's pass undoes.
    flags = (*data, *UNSAVED, "--eval_steps=3", "--llama.sequence_layout=balanced")
    by_column = train(tmp_path, *flags, name="column")
    by_step = train(tmp_path, *flags, "--reference=step", name="step")
    first, second = (read_rows(run / "metrics.jsonl") for run in (by_column, by_step))
    assert first[0]["eval_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert losses(by_column)[1] == pytest.approx(0.693147, abs=1e-6) and losses(by_column)[3] != losses(by_column)[1]
    for a, b in zip(first, second, strict=True):
        shared = {key for key in a if "reward" in key or "loss" in key or "logps" in key}
        assert shared and shared == {key for key in b if "reward" in key or "loss" in key or "logps" in key}
        for key in shared:
            assert a[key] == pytest.approx(b[key], abs=1e-6), key


def test_a_run_that_goes_on_keeps_its_reference(data, tmp_path, monkeypatch):
    saved = (*data, "--save_model_freq=2", "--checkpointer.save_optimizer_state", "--autoresume")
    whole = train(tmp_path, *saved, "--total_steps=4", name="whole")
    train(tmp_path, *saved, "--total_steps=2", name="run")
    with monkeypatch.context() as patch:  # what the first part has computed is there
        patch.setattr(references, "load_checkpoint", None)
        patch.setattr(Model, "init", None)
        run = train(tmp_path, *saved, "--total_steps=4", name="run")
    assert losses(run) == losses(whole)
    # Without the cache it is computed again, by the weights that the run began with.
    before = columns(cache(data))
    for folder in cache(data).glob("columns-*"):
        shutil.rmtree(folder)
    train(tmp_path, *saved, "--total_steps=5", name="run")
    assert columns(cache(data)) == before
    with pytest.raises(UserError) as error:
        train(tmp_path, *saved, "--total_steps=6", f"--reference_checkpoint=params::{run}", name="run")
    what = "has other weights than the reference that this run began with"
    assert what in str(error.value) and "\n" not in str(error.value)


def test_another_reference_has_another_column(data, tmp_path):
    first = train(tmp_path, *data, name="first")
    other = train(tmp_path, *data, *UNSAVED, f"--reference_checkpoint=params::{first}", "--total_steps=1", name="other")
    again = train(
        tmp_path, *data, *UNSAVED, f"--reference_checkpoint=params::{first}", f"--load_checkpoint=params::{first}",
        "--total_steps=1", name="again",
    )  # fmt: skip
    assert losses(other)[1] != pytest.approx(0.693147, abs=1e-4)
    assert losses(again)[1] == pytest.approx(0.693147, abs=1e-6)


def test_a_column_of_others_is_refused_and_a_damaged_one_made_again(data, tmp_path):
    # A cache of its own: of the columns of other tests nobody here asks for.
    data = (*data, *(f"--{name}_dataset.cache_dir={tmp_path}/cache" for name in ("train", "eval")))
    train(tmp_path, *data, *UNSAVED, "--total_steps=1", name="first")
    before = columns(cache(data))
    about = next(cache(data).glob("columns-*/00000.ref_logp.json"))
    content = about.read_text()
    about.write_text(content.replace(json.loads(content)["key"], "0" * 64))
    with pytest.raises(UserError) as error:
        train(tmp_path, *data, *UNSAVED, "--total_steps=1", name="second")
    assert str(error.value).startswith(f"{about}:1: the column was computed by other weights, or of other tokens")
    about.write_text(content[:20])
    train(tmp_path, *data, *UNSAVED, "--total_steps=1", name="third")
    assert columns(cache(data)) == before


def test_a_fingerprint_is_of_the_values_and_their_places():
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(16, 8)).astype(np.float32), "b": {"c": rng.normal(size=8).astype(np.float32)}}
    found = weights_fingerprint(params)
    mesh = make_mesh((1, 2, 1, 2))
    sharded = jax.device_put(params, NamedSharding(mesh, PartitionSpec("sp")))
    assert weights_fingerprint(sharded) == found
    swapped = params["a"].copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    bent = params["a"].copy()
    bent[3, 3] = np.nextafter(bent[3, 3], 1)
    for other in (swapped, bent):
        assert weights_fingerprint(params | {"a": other}) != found
    assert weights_fingerprint({"b": params["b"], "a": params["a"]}) == found


@pytest.mark.slow
def test_a_pass_that_is_killed_five_times_ends_as_if_it_had_not_been(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(pairs(1500))

    def words(name: str) -> list[str]:
        return [
            *PAIRED, "--update_llama_config=dict(vocab_size=288,hidden_size=32,intermediate_size=64,"
            "num_hidden_layers=2,num_attention_heads=4,max_sequence_length=64)", "--dtype=fp32", "--mesh_dim=1,1,1,1",
            "--tokenizer.vocab_file=bytes", "--train_dataset.json_dataset.seq_length=64",
            f"--train_dataset.json_dataset.path={tmp_path}/pairs.jsonl", f"--train_dataset.cache_dir={tmp_path}/{name}",
        ]  # fmt: skip

    # Shards of few pairs, so that there is something to go on with.
    small = "import sys, ringbpt.data.stored.tokenise as t; t.SHARD_BYTES = 5000\nfrom ringbpt.columns import main\n"
    start = [sys.executable, "-c", f"{small}sys.exit(main(sys.argv[1:]))"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}

    def run(name: str) -> subprocess.Popen:
        return subprocess.Popen([*start, *words(name)], env=environment, stdout=subprocess.DEVNULL)

    def written() -> int:
        return len(list(tmp_path.glob("killed/columns-*/*.json")))

    assert run("calm").wait(300) == 0
    for number in range(5):
        before, process = written(), run("killed")
        until = time.monotonic() + 120
        while written() < before + 2 and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and written() > before, f"kill {number}"
    assert run("killed").wait(300) == 0
    assert columns(tmp_path / "killed") == columns(tmp_path / "calm")
