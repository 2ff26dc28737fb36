"""Rollouts in a run: it learns, goes on as if nothing had been, and what it needs is said first."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from ringbpt import generate
from ringbpt.checkpoint.export import to_huggingface
from ringbpt.checkpoint.safetensors import TensorFolder
from ringbpt.config import TokenizerConfig, UserError, run_main
from ringbpt.data.text.tokenizers import make_tokenizer
from ringbpt.rollout.engine import LocalEngine, Sample
from ringbpt.rollout.page import page
from ringbpt.training.metrics import read_rows
from tests.training.test_loop import FULL, TINY, configured, losses, refusal, train

pytestmark = pytest.mark.usefixtures("compiled_once")
REWARD = 'def letters(prompt, completion, row):\n    return sum(map(str.isalpha, completion)) / 6 * row["worth"]\n'


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "mine.py").write_text(REWARD)
    rows = [f'{{"prompt": "{n % 7}:", "worth": 1.0}}\n' for n in range(20)]
    (folder / "prompts.jsonl").write_text("".join(rows))
    return (
        f"--rollout.prompts={folder}/prompts.jsonl", f"--rollout.reward={folder}/mine.py:letters", "--log_freq=1",
        "--rollout.max_new_tokens=6", "--rollout.prompts_per_step=4", "--rollout.samples_per_prompt=4",
        "--train_dataset.json_dataset.seq_length=128", TINY[0].replace("length=64", "length=128"),
    )  # fmt: skip


# Of tokens' advantages and of answers', with a critic and without; what stands between them only slowly.
OBJECTIVES = ("grpo", "ppo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rloo", "reinforce_pp")))


def rewards(run: Path) -> list[float]:
    return [row["reward"] for row in read_rows(run / "metrics.jsonl")]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rewards_grow(data, tmp_path, objective):
    run = train(tmp_path, *data, f"--objective={objective}", "--total_steps=40", "--rollout.prompts_per_step=8")
    found = rewards(run)
    assert np.mean(found[:3]) < 0.35 and np.mean(found[-3:]) > np.mean(found[:3]) + 0.25


def test_answers_are_seen_on_a_page(data, tmp_path):
    """All of them, whatever is in them, and nothing that a browser would obey."""
    tokenizer = make_tokenizer(TokenizerConfig("bytes"))
    spoken = list(b"<script>alert(1)</script>")
    answers = [
        Sample(spoken, [-0.1] * len(spoken), "length"),
        Sample([*spoken, 257], [-3.0] * (len(spoken) + 1), "stop"),
    ]
    mixed = Sample([104, 105], [-0.5, 0.0], "stop", [True, False])
    found = page(
        3, tokenizer, [np.array([97]), np.array([98])], [answers, [mixed, mixed]], np.array([[0.2, np.nan], [1, 0]])
    )
    assert "<script" not in found and found.count("its reward has failed") == 1 and "<i title" in found
    assert "2 prompts, 4 answers; mean reward 0.400" in found and "probability 0.905" in found
    run = train(tmp_path, *data, "--objective=grpo", "--total_steps=2")
    text = (run / "samples.html").read_text()
    assert "Rollout 1" in text and text.count('<div class="answer">') == 16


def test_answers_that_another_drew_are_said_and_no_longer_learnt(data, tmp_path, monkeypatch, capsys):
    """Log-probabilities of another temperature, as some servers give them: a little off, and far."""
    generate, factor = LocalEngine.generate, 0.95

    def off(self, *given):
        found = generate(self, *given)
        return [[s._replace(logps=[factor * x for x in s.logps]) for s in answers] for answers in found]

    monkeypatch.setattr(LocalEngine, "generate", off)
    train(tmp_path, *data, "--objective=grpo", "--total_steps=2", name="near")
    assert capsys.readouterr().out.count("warning: step") == 2
    factor = 0.5
    with pytest.raises(UserError, match=r"mismatch .* is the most that is learnt from") as error:
        train(tmp_path, *data, "--objective=grpo", "--total_steps=3", name="far")
    assert error.value.code == 3


def stored(run: Path) -> dict[str, dict[str, np.ndarray]]:
    found = {}
    for file in sorted((run / "rollouts").iterdir()):
        with np.load(file) as arrays:
            found[file.name] = {name: arrays[name] for name in arrays.files if name != "about"}
    return found


def test_it_goes_on_and_samples_nothing_again(data, tmp_path):
    """With two steps a rollout, stopped in the middle of one; and once more where a file was damaged."""
    words = (*data, "--objective=grpo", *FULL, "--rollout.updates=2")
    whole = train(tmp_path, *words, "--total_steps=6", name="whole")
    train(tmp_path, *words, "--total_steps=3", name="run")
    before = (tmp_path / "run" / "rollouts" / "00000001.npz").stat().st_mtime_ns
    run = train(tmp_path, *words, "--total_steps=6", "--autoresume", name="run")
    assert (run / "rollouts" / "00000001.npz").stat().st_mtime_ns == before
    assert losses(run) == losses(whole)
    for name, arrays in stored(whole).items():
        for column, array in arrays.items():
            np.testing.assert_array_equal(array, stored(run)[name][column], err_msg=f"{name} {column}")
    assert stored(whole)["00000000.npz"]["old_logp"].any()
    shutil.rmtree(run)
    train(tmp_path, *words, "--total_steps=3", name="run")
    damaged = run / "rollouts" / "00000001.npz"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    train(tmp_path, *words, "--total_steps=6", "--autoresume", name="run")
    assert len(damaged.read_bytes()) > 100 and len(losses(run)) == 6
    (run / "rollouts" / "00000002.npz").unlink()
    assert refusal(tmp_path, *words, "--total_steps=9", "--rollout.temperature=0.5", "--autoresume", name="run")


def test_the_reference_is_subtracted_or_a_part_of_the_loss(data, tmp_path):
    """At first the policy is the reference: its distance is 0; then it has one."""
    rows = []
    for more in (("--objective=grpo",), ("--objective=reinforce_pp", "--policy.kl_in_reward")):
        run = train(tmp_path, *data, *more, "--policy.kl_coefficient=0.5", "--total_steps=5", name=more[0][12:])
        rows.append(read_rows(run / "metrics.jsonl"))
    for found in rows:
        assert found[0]["kl"] == pytest.approx(0, abs=1e-6) and found[-1]["kl"] > 1e-6
    assert "kl_loss" in rows[0][0]


def test_adapters_learn_from_rollouts_beside_a_base_in_4_bits(data, tmp_path):
    """The reference is the base without a second copy, and the sampler dequantises it."""
    wide = TINY[0].replace("hidden_size=32", "hidden_size=64").replace("length=64", "length=128")
    words = (wide, "--lora.rank=4", "--lora.base_dtype=nf4")
    run = train(tmp_path, *data, *words, "--objective=grpo", "--policy.kl_coefficient=0.1", "--total_steps=3")
    found = read_rows(run / "metrics.jsonl")
    assert found[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert found[0]["mismatch"] == pytest.approx(1.0, abs=1e-3)
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


def test_a_critic_learns_beside_the_policy_and_stays_in_the_run(data, tmp_path, capsys):
    """From weights that have no values yet; a folder for others, and a text, know nothing of them."""
    base = train(tmp_path, *data, "--objective=grpo", *FULL, "--total_steps=1", name="base")
    words = (*data, f"--load_checkpoint=params::{base}", "--objective=ppo", "--rollout.updates=2", *FULL)
    run = train(
        tmp_path, *words, "--policy.kl_coefficient=0.1", "--policy.kl_in_reward", "--total_steps=20", name="run"
    )
    found = [row["value_loss"] for row in read_rows(run / "metrics.jsonl")]
    assert np.mean(found[-4:]) < np.mean(found[:4])
    assert stored(run)["00000000.npz"].keys() >= {"old_value", "return", "old_logp", "ref_logp"}
    to_huggingface(f"params::{run}", tmp_path / "hf")
    assert "score.weight" not in TensorFolder(tmp_path / "hf", "model").entries
    assert run_main(generate.main, [f"--load_checkpoint=params::{run}", "--prompt=3:", "--max_new_tokens=4"]) == 0
    again = train(tmp_path, *data, f"--load_checkpoint=params::{run}", "--objective=grpo", "--total_steps=1", name="b")
    assert "reward" in read_rows(again / "metrics.jsonl")[0]


def test_rows_are_as_long_as_a_prompt_with_all_its_answers(data, tmp_path):
    found = refusal(tmp_path, *data, "--objective=grpo", "--train_dataset.json_dataset.seq_length=16")
    assert "does not hold a prompt of" in found and found.endswith("--train_dataset.json_dataset.seq_length=26")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--objective=grpo",), "--rollout.prompts=FILE.jsonl"),
        (("--objective=grpo", "--rollout.prompts=x"), "--rollout.reward=FILE.py:NAME"),
        (("--rollout.prompts=x",), "--objective=grpo"),
        (("--objective=grpo", "--rollout.prompts=x", "--rollout.reward=y", "--eval_steps=5"), "--eval_steps=0"),
        (
            ("--objective=rloo", "--rollout.prompts=x", "--rollout.reward=y", "--rollout.samples_per_prompt=1"),
            "--rollout.samples_per_prompt=8",
        ),
        (
            ("--objective=grpo", "--rollout.prompts=x", "--rollout.reward=y", "--policy.kl_in_reward"),
            "--policy.kl_in_reward is of rewards a token",
        ),
        (
            ("--objective=ppo", "--rollout.prompts=x", "--rollout.reward=y", "--policy.kl_in_reward"),
            "--policy.kl_coefficient=0.01",
        ),
        (
            ("--objective=grpo", "--rollout.prompts=x", "--rollout.reward=y", "--rollout.top_p=0.9"),
            "--rollout.top_p=1, and",
        ),
        (
            ("--objective=grpo", "--rollout.prompts=x", "--rollout.reward=y", "--rollout.top_k=50"),
            "--rollout.top_k=0, and",
        ),
        (("--objective=distill", "--rollout.prompts=x"), "--reference_checkpoint=PREFIX::PATH"),
        (
            (
                "--objective=distill",
                "--rollout.prompts=x",
                "--reference_checkpoint=params::y",
                "--policy.kl_coefficient=1",
            ),
            "leave it out",
        ),
        (
            ("--objective=grpo", "--rollout.prompts=x", "--rollout.reward=y", "--rollout.max_staleness=1"),
            "--rollout.servers=http://HOST:PORT",
        ),
        (
            (
                "--objective=grpo",
                "--rollout.prompts=x",
                "--rollout.reward=y",
                "--rollout.max_staleness=1",
                "--rollout.servers=http://a:1",
            ),
            "--policy.correction=token_truncate",
        ),
        (
            ("--objective=grpo", "--rollout.prompts=x", "--rollout.reward=y", "--rollout.servers=http://a:1,a:2"),
            "--rollout.servers=a:2 is no address",
        ),
        (
            ("--objective=grpo", "--rollout.prompts=x", "--rollout.reward=y", "--rollout.servers=http://a,http://a/"),
            "names http://a twice",
        ),
    ],
)
def test_what_is_missing_is_said(flags, message):
    with pytest.raises(UserError) as error:
        configured(*flags)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("updates", (pytest.param(1, marks=pytest.mark.slow), 2))
def test_a_student_comes_near_its_teacher(data, tmp_path, updates):
    """Another model, with more layers, which has learnt something that no fresh one does; no reward is asked for."""
    deeper = TINY[0].replace("length=64", "length=128").replace("layers=2", "layers=3")
    teacher = train(tmp_path, *data, deeper, "--objective=grpo", *FULL, "--total_steps=20", name="teacher")
    words = [word for word in data if "reward" not in word]
    words += ["--objective=distill", f"--reference_checkpoint=params::{teacher}", f"--rollout.updates={updates}"]
    run = train(tmp_path, *words, "--total_steps=60", "--rollout.samples_per_prompt=16", name="student")
    rows = read_rows(run / "metrics.jsonl")
    kl = [row["kl"] for row in rows]
    assert "reward" not in rows[0] and np.mean(kl[-3:]) < 0.2 * np.mean(kl[:3]), kl
