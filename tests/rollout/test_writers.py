"""`python -m ringbpt.rollout`: data sets of a model's own answers, by what they are worth."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from ringbpt.config import run_main
from ringbpt.rollout.__main__ import kept, main
from ringbpt.training.metrics import read_rows
from tests.rollout.test_rollouts import data  # noqa: F401
from tests.training.test_loop import FULL, TINY, train

pytestmark = pytest.mark.usefixtures("compiled_once")
TALK = {"messages": [{"role": "user", "content": "say"}], "worth": 1}


def test_what_is_kept():
    row, said, ends = {"prompt": "p", "worth": 2}, ["a", "b", "c"], ["stop", "length", "stop"]
    assert kept("best", row, said, ends, [0.0, 3.0, 1.0]) == [row | {"completion": "b", "reward": 3.0}]
    assert kept("all", row, said, ends, [math.nan, 3.0, 1.0]) == [
        row | {"completion": "b", "finish_reason": "length", "reward": 3.0},
        row | {"completion": "c", "finish_reason": "stop", "reward": 1.0},
    ]
    assert [line["completion"] for line in kept("all", row, said, ends, [math.nan] * 3)] == said
    assert kept("pair", row, said, ends, [0.0, 3.0, 1.0]) == [
        {"worth": 2, "prompt": "p", "chosen": "b", "rejected": "a", "margin": 3.0, "reward": 3.0}
    ]
    for equal in ([1.0, 1.0, 1.0], [math.nan, 1.0, math.nan]):
        assert kept("pair", row, said, ends, equal) == []
    (pair,) = kept("pair", TALK, said[:2], ends, [1.0, 0.0])
    assert pair["prompt"] == TALK["messages"] and pair["chosen"] == [{"role": "assistant", "content": "a"}]
    (best,) = kept("best", TALK, said[:2], ends, [1.0, 0.0])
    assert best["messages"][-1] == {"role": "assistant", "content": "a"} and len(TALK["messages"]) == 1


def test_the_best_of_n_of_a_uniform_reward_is_worth_n_of_n_plus_1():
    rng, n, prompts = np.random.default_rng(0), 4, 4000
    found = [kept("best", {"prompt": ""}, ["x"] * n, [""] * n, rng.random(n).tolist())[0] for _ in range(prompts)]
    best = np.array([line["reward"] for line in found])
    assert abs(best.mean() - n / (n + 1)) <= 3 * best.std() / prompts**0.5


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_best_answers_are_rows_that_a_run_learns_from(data, tmp_path, capsys):  # noqa: F811
    """Two rounds of the best of sixteen, and what is learnt from them: what answers are worth grows with each."""
    prompts, reward = (word.partition("=")[2] for word in data[:2])
    # Of random bytes few are text, which is what rows hold: it has learnt a little.
    run, means = train(tmp_path, *data, "--objective=grpo", *FULL, "--total_steps=15", name="first"), []
    for number in range(3):
        words = [f"--load_checkpoint=params::{run}", f"--prompts={prompts}", f"--reward={reward}", "--mesh_dim=8,1,1,1"]
        words += ["--samples=16", "--max_new_tokens=6", "--keep=best", f"--output={tmp_path}/best{number}.jsonl"]
        assert run_main(main, words) == 0
        said = capsys.readouterr().out
        means.append(float(said.rpartition("mean reward of all answers ")[2].partition(",")[0]))
        rows = lines(tmp_path / f"best{number}.jsonl")
        assert len(rows) == 20 and rows[0].keys() == {"prompt", "worth", "completion", "reward"}
        run = train(
            tmp_path, TINY[0].replace("length=64", "length=128"), "--total_steps=12", *FULL,
            "--optimizer.adamw_optimizer.lr=3e-3",
            f"--train_dataset.json_dataset.path={tmp_path}/best{number}.jsonl",
            "--train_dataset.json_dataset.batch_size=2", f"--load_checkpoint=params::{run}",
            "--train_dataset.text_processor.fields=", name=f"sft{number}",
        )  # fmt: skip
        assert read_rows(run / "metrics.jsonl")[-1]["loss"] < read_rows(run / "metrics.jsonl")[0]["loss"]
    assert means[0] + 0.05 < means[1] and means[1] < means[2]


HALVES = "def halves(prompt, completion, row):\n    return round(2 * sum(map(str.isalpha, completion)) / 6) / 2\n"


@pytest.mark.slow
def test_what_was_learnt_with_its_worth_is_said_when_it_is_asked_for(data, tmp_path, capsys):  # noqa: F811
    """Conditional fine-tuning on all answers of a policy: asked for high worth and for low, it gives either."""
    prompts, long = data[0].partition("=")[2], TINY[0].replace("length=64", "length=128")
    (tmp_path / "halves.py").write_text(HALVES)
    reward = f"--reward={tmp_path}/halves.py:halves"
    long = long.replace("hidden_size=32,intermediate_size=64", "hidden_size=64,intermediate_size=128")
    first = train(tmp_path, *data, long, "--objective=grpo", *FULL, "--total_steps=15", name="first")
    asked = ["--max_new_tokens=6", "--mesh_dim=8,1,1,1", reward]
    words = [f"--load_checkpoint=params::{first}", f"--prompts={prompts}", *asked, "--samples=96"]
    assert run_main(main, [*words, f"--output={tmp_path}/all.jsonl"]) == 0
    worth = [row["reward"] for row in lines(tmp_path / "all.jsonl")]
    assert min(worth.count(0.0), worth.count(1.0)) > 20  # there is something to be learnt of either
    run = train(
        tmp_path, long, "--total_steps=1500", *FULL, "--optimizer.adamw_optimizer.lr=2e-3", "--log_freq=100",
        "--optimizer.adamw_optimizer.lr_decay_steps=1500", "--train_dataset.shuffle",
        f"--train_dataset.json_dataset.path={tmp_path}/all.jsonl", "--train_dataset.json_dataset.batch_size=4",
        "--train_dataset.text_processor.fields=", f"--load_checkpoint=params::{first}",
        "--train_dataset.text_processor.input_template={} <{reward}> ", name="conditional",
    )  # fmt: skip
    means = {}
    for wanted in (0.0, 1.0):
        rows = [json.dumps({"prompt": f"{n % 7}: <{wanted}> ", "worth": 1.0}) for n in range(20)]
        (tmp_path / "asked.jsonl").write_text("\n".join(rows))
        words = [f"--load_checkpoint=params::{run}", f"--prompts={tmp_path}/asked.jsonl", *asked, "--samples=8"]
        assert run_main(main, [*words, f"--output={tmp_path}/said{wanted}.jsonl"]) == 0
        means[wanted] = np.mean([row["reward"] for row in lines(tmp_path / f"said{wanted}.jsonl")])
    with capsys.disabled():
        print(f"asked for 0: {means[0.0]:.3f}, for 1: {means[1.0]:.3f}, learnt from {np.mean(worth):.3f}")
    assert means[1.0] >= means[0.0] + 0.5
