"""A real engine: vLLM on this machine's CPU samples by our weights what our trainer says, and for a run that learns.

`make test-engine` builds an environment for it, and names its Python by RINGBPT_ENGINE_PYTHON.
"""

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import jax
import numpy as np
import pytest

from ringbpt.checkpoint.export import to_huggingface
from ringbpt.checkpoint.load import load_model
from ringbpt.config import UserError
from ringbpt.data.documents import make_batch
from ringbpt.mesh import put_batch
from ringbpt.rollout.collect import _piece
from ringbpt.rollout.engine import Sample
from ringbpt.rollout.handover import Shelf
from ringbpt.rollout.http_engine import HttpEngine
from ringbpt.training.metrics import read_rows
from ringbpt.types import ALWAYS
from tests.rollout.test_rollouts import data, rewards  # noqa: F401
from tests.training.test_loop import refusal, train

PYTHON = os.environ.get("RINGBPT_ENGINE_PYTHON", "")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.usefixtures("compiled_once"),
    pytest.mark.skipif(not PYTHON, reason="vLLM has an environment of its own: make test-engine"),
]
TEMPERATURE, NEW, LENGTH, READY_SECONDS = 0.7, 24, 128, 300
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 256, size).astype(np.int32) for size in (3, 1, 40, 17, 64, 9, 33, 5)]
ENDS = frozenset({32, 101})  # of 288 tokens, so that some answers end
# vLLM's kernels for the CPU have heads of 32 channels and more. First weights that are large: what is likely is so
# by far, and a wrong temperature is seen.
SHAPE = ("--llama.head_dim=32", "--llama.initializer_range=0.3")


@contextmanager
def vllm(folder: Path, *flags: str, development: bool = True) -> Iterator[str]:
    """The address of a server, ready. Its log is beside the folder."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", f"--model={folder}", f"--port={port}"]
    command += [
        "--host=127.0.0.1",
        "--dtype=float32",
        "--block-size=32",
        "--enforce-eager",
        f"--max-model-len={LENGTH}",
    ]
    command += ["--skip-tokenizer-init", *(flags or ("--logprobs-mode=processed_logprobs",))]
    own = {"VLLM_SERVER_DEV_MODE": str(int(development)), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = folder.with_name(f"vllm-{port}.log")
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | own | {"HF_HUB_OFFLINE": "1"})
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, process, log)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-5000:]
        try:
            with urlopen(f"{url}/health", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-5000:])


@pytest.fixture(scope="module")
def base(data, tmp_path_factory) -> Path:  # noqa: F811
    """The model that all begin with, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("base")
    run = train(folder, *data, *SHAPE, "--objective=grpo", "--total_steps=1", "--optimizer.adamw_optimizer.lr=0")
    to_huggingface(f"params::{run}", folder / "hf", dtype="fp32")
    return folder / "hf"


@pytest.fixture(scope="module")
def policy(base) -> tuple[Any, Any]:
    model, params = load_model(f"huggingface::{base}", (1, 1, 1, 1))
    return replace(model, temperature=TEMPERATURE), params


@pytest.fixture(scope="module")
def server(base) -> Iterator[str]:
    with vllm(base) as url:
        yield url


@pytest.fixture
def shelf(tmp_path, base, policy) -> Shelf:
    """Version 0, what is served at first, and two others of one model."""
    model, params = policy
    found = Shelf(tmp_path, model, "fp32", json.loads((base / "config.json").read_text()), PROMPTS[4])
    for number, scale in enumerate((1.0, 1.5, 0.6)):
        found.put(number, params | {"unembed": params["unembed"] * scale})
    return found


@pytest.fixture
def tell(capsys) -> Callable[[str], None]:
    """Says a figure where pytest hides what else is said."""

    def say(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}")

    return say


def engine_of(url: str) -> HttpEngine:
    engine = HttpEngine([url], NEW, ENDS, TEMPERATURE, say=lambda _: None)
    engine.find(LENGTH)
    return engine


def differences(policy: tuple[Any, Any], samples: list[list[Sample]]) -> np.ndarray:
    """Of each token that was drawn: the trainer's log-probability less the engine's."""
    model, params = policy
    pairs = [(prompt, sample) for prompt, answers in zip(PROMPTS, samples, strict=True) for sample in answers]
    rows = [[_piece(prompt, sample, 0.0, 0, True)] for prompt, sample in pairs]
    host = make_batch(rows, (len(rows), LENGTH), [*ALWAYS, "rollout_logp", "last"])
    batch = put_batch(host.rows, (len(rows), LENGTH), model.mesh, model.execution.sequence_layout)
    logp = np.asarray(jax.jit(lambda p, b: model.token_stats(p, b).logp_BT)(params, batch))
    return (logp - np.asarray(batch.columns["rollout_logp"]))[np.asarray(batch.weight_BT) > 0]


def test_what_it_samples_is_what_the_trainer_says(server, policy, shelf, tell):
    """64 answers, in float32: what it draws, and by which log-probabilities."""
    engine = engine_of(server)
    engine.update(shelf.version(0))
    samples = engine.generate(PROMPTS, 8, TEMPERATURE, seed=7)
    answers = [sample for answers in samples for sample in answers]
    apart = np.abs(differences(policy, samples))
    tell(f"{len(answers)} answers, {apart.size} tokens: mean exp|d| {np.exp(apart).mean():.6f}, most {apart.max():.2g}")
    assert len(answers) == 64 and apart.size == sum(len(sample.tokens) for sample in answers)
    assert np.exp(apart).mean() <= 1.02
    assert {sample.finish for sample in answers} == {"stop", "length"}
    for sample in answers:
        ended = [token in ENDS for token in sample.tokens]
        assert any(ended) == (sample.finish == "stop") == ended[-1] and not any(ended[:-1])
        assert len(sample.tokens) == NEW or sample.finish == "stop"
    assert len({tuple(sample.tokens) for sample in answers}) > 48  # each by a seed of its own
    again = engine.generate(PROMPTS, 8, TEMPERATURE, seed=7)
    assert (
        np.mean([a.tokens == b.tokens for x, y in zip(samples, again, strict=True) for a, b in zip(x, y, strict=True)])
        > 0.9
    )


def test_two_updates_are_read_and_probed(server, shelf, tell):
    engine = engine_of(server)
    before = None
    for number in (0, 1, 2):
        engine.update(shelf.version(number))
        engine.generate(PROMPTS[:1], 1, TEMPERATURE, seed=0)
        said = engine._servers[0].said
        apart = np.abs(said.trainers - said.logps).max()
        moved = np.abs(shelf.version(number).probe().logp_PV - before).max() if number else 0.0
        tell(f"version {number}: the probe is {apart:.2g} nats from the trainer's, which has moved by {moved:.2g}")
        assert apart <= 1e-3 and (number == 0 or moved > 0.5)
        before = shelf.version(number).probe().logp_PV


STALE = {"far": ("/collective_rpc", 1.5), "near": ("/collective_rpc", 1.004), "cache": ("/reset_prefix_cache", 1.5)}


@pytest.mark.parametrize("what", STALE)
def test_a_planted_stale_update_is_found(server, policy, shelf, what):
    """It is not told to read the folder; or reads it, and keeps what it has of beginnings by the weights before."""
    left_out, scale = STALE[what]
    engine = engine_of(server)
    engine.update(shelf.version(0))
    engine.generate(PROMPTS[:1], 1, TEMPERATURE, seed=0)
    shelf.put(3, jax.tree.map(lambda weight: weight * scale, policy[1]))
    [address] = engine._servers
    ask = address.ask
    address.ask = lambda path, *more, **named: {} if path.startswith(left_out) else ask(path, *more, **named)
    engine.update(shelf.version(3))
    with pytest.raises(UserError, match="stale weights") as error:
        engine.generate(PROMPTS[:1], 1, TEMPERATURE, seed=0)
    assert error.value.code == 3 and "\n" not in str(error.value)


def test_a_run_learns_by_it(server, base, data, tmp_path, tell):  # noqa: F811
    words = (*data, "--objective=grpo", f"--load_checkpoint=huggingface::{base}", f"--rollout.servers={server}")
    run = train(tmp_path, *words, "--total_steps=40", "--rollout.prompts_per_step=8")
    rows, found = read_rows(run / "metrics.jsonl"), rewards(run)
    mismatches = [row["mismatch"] for row in rows]
    tell(f"rewards {np.mean(found[:3]):.3f} -> {np.mean(found[-3:]):.3f}, mismatch {max(mismatches):.6f} at most")
    assert np.mean(found[-3:]) > np.mean(found[:3]) + 0.25
    assert len(rows) == 40 and max(mismatches) <= 1.02


def test_raw_log_probabilities_and_a_server_that_reads_no_weights_are_refused(base, shelf, data, tmp_path):  # noqa: F811
    """Both are what vLLM does where it is not told otherwise."""
    with vllm(base, "--logprobs-mode=raw_logprobs") as url:
        engine = engine_of(url)
        engine.update(shelf.version(0))
        with pytest.raises(UserError, match="kind of log-probabilities"):
            engine.generate(PROMPTS[:1], 1, TEMPERATURE, seed=0)
    with vllm(base, development=False) as url:
        words = (*data, "--objective=grpo", f"--load_checkpoint=huggingface::{base}", f"--rollout.servers={url}")
        assert "VLLM_SERVER_DEV_MODE=1" in refusal(tmp_path, *words)
