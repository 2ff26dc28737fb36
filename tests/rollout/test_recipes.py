"""What the recipes with tools and with long prompts learn, as docs/post_training.md says it: minutes each."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ringbpt.training.metrics import read_rows

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
SHORT = (
    "--rollout.prompts_per_step=16", "--total_steps=800", "--policy.entropy_coefficient=0.05",
    "--optimizer.adamw_optimizer.lr_decay_steps=800",
)  # fmt: skip


def run(*words: str) -> None:
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, timeout=3600)


def rewards(folder: Path, name: str, *words: str) -> list[float]:
    """Of the rows of metrics.jsonl of a run."""
    run("-m", "ringbpt.train", *words, f"--logger.output_dir={folder}", f"--logger.experiment_id={name}")
    return [row["reward"] for row in read_rows(folder / name / "metrics.jsonl")]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_tool_is_learnt(tmp_path, seed):
    run("scripts/environments.py", f"--output={tmp_path}")
    words = (f"--tokenizer.vocab_file={tmp_path}", f"--rollout.prompts={tmp_path}/prompts.jsonl", f"--seed={seed}")
    found = rewards(tmp_path, "run", "--config=configs/agent.py", *words)
    assert found[0] <= 0.3 and np.mean(found[-3:]) >= 0.8


def test_a_key_is_found_in_1024_tokens(tmp_path):
    for name, more in (("short", ["--length=64"]), ("long", [])):
        run("scripts/make_prompts.py", "--task=passkey", f"--output={tmp_path}/{name}", *more)
    recipe = "--config=configs/grpo_passkey.py"
    first = (f"--rollout.prompts={tmp_path}/short/prompts.jsonl", "--train_dataset.json_dataset.seq_length=128")
    learnt = rewards(tmp_path, "first", recipe, *first, *SHORT)
    assert learnt[0] <= 0.3
    then = (f"--rollout.prompts={tmp_path}/long/prompts.jsonl", f"--load_checkpoint=params::{tmp_path}/first")
    assert np.mean(rewards(tmp_path, "then", recipe, *then)[-3:]) >= 0.9
