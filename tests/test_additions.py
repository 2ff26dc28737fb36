"""What ringbpt/README.md says one has to touch is enough: toys are added to a copy of the house, and trained with."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

OBJECTIVE = """
import jax.numpy as jnp

from ringbpt.objectives.objective import Objective
from ringbpt.types import Mean


def toy(stats, batch, config):
    return {"likelihood": Mean(jnp.sum(stats.logp_BT * batch.weight_BT), jnp.sum(batch.weight_BT))}


OBJECTIVE = Objective(toy, lambda config: {"likelihood": -2.0}, ("text",), needs=("logp_BT",))
"""
KERNEL = """
from ringbpt.attention.core import Local
from ringbpt.attention.local import reference


def make_toy(device, query_chunk_size, key_chunk_size):
    return Local(reference.attend, reference.attend_bwd)
"""

# What is added -> {file: [(before this text, this one)], or the text of a new file}.
TOYS = {
    "an optimizer": {
        "config/fields.py": [
            ("class OptimizerConfig:", "class ToyConfig:\n    lr: float = flag(0.5)\n"
             "    init_lr: float = 0.0\n    end_lr: float = 0.0\n    lr_warmup_steps: int = 0\n"
             "    lr_decay_steps: int = 10\n    clip_gradient: float = 0.0\n\n\n@dataclass(frozen=True)\n"),
            ("    muon_optimizer: MuonConfig", "    toy_optimizer: ToyConfig = field(default_factory=ToyConfig)\n"),
            ('"lion", "muon")', '"toy", '),
        ],
        "training/optimizer.py": [
            ('    "adamw": _adamw,', '    "toy": lambda group, schedule, axis: optax.sgd(schedule),\n')
        ],
    },
    "an objective": {
        "objectives/toy.py": OBJECTIVE,
        "objectives/__init__.py": [
            ("from ringbpt.objectives.objective", "from ringbpt.objectives import toy\n"),
            ('"pretrain": sft', '"toy": toy.OBJECTIVE, '),
        ],
        "config/fields.py": [('"pretrain", "sft",', '"toy", ')],
    },
    "a kernel": {
        "attention/local/toy.py": KERNEL,
        "attention/api.py": [
            ("from ringbpt.attention.parallel import", "from ringbpt.attention.local.toy import make_toy\n"),
            ('    "reference": lambda', '    "toy": make_toy,\n'),
        ],
        "config/fields.py": [('            "reference",', '            "toy",\n')],
    },
    "a family": {
        "config/families.py": [
            ('    "LlamaForCausalLM": Family(',
             '    "ToyForCausalLM": Family("toy", _ENDS + _ATTENTION + _FEEDFORWARD, writes=_NO_BIAS),\n'),
        ]
    },
}  # fmt: skip
PROGRAM = """
import sys
from ringbpt.config import run_main
from ringbpt.config.families import find_family, llama_fields
from ringbpt.train import main
settings = {"architectures": ["ToyForCausalLM"], "model_type": "toy", "hidden_size": 32, "num_attention_heads": 2,
            "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 99}
assert llama_fields(settings, "config.json")["vocab_size"] == 99
assert find_family(settings, "config.json")[0] == "ToyForCausalLM"
sys.exit(run_main(main))
"""


def said(what: str) -> set[str]:
    """The files and folders that the page names for adding it."""
    page = (ROOT / "ringbpt" / "README.md").read_text()
    [row] = re.findall(rf"^\| {what} \|(.*)\|$", page, re.M)
    return set(re.findall(r"\]\(([^)]+)\)", row))


@pytest.mark.parametrize("what", TOYS)
def test_no_other_file_is_touched(what):
    named = said(what)
    strangers = [file for file in TOYS[what] if file not in named and f"{Path(file).parent}/" not in named]
    assert strangers == []


def test_the_toys_work(tmp_path):
    house = tmp_path / "ringbpt"
    shutil.copytree(ROOT / "ringbpt", house, ignore=shutil.ignore_patterns("__pycache__"))
    for files in TOYS.values():
        for name, change in files.items():
            file = house / name
            if isinstance(change, str):
                file.write_text(change)
                continue
            for before, new in change:
                text = file.read_text()
                assert text.count(before) >= 1, (name, before)
                file.write_text(text.replace(before, new + before, 1))
    flags = [
        "--objective=toy", "--optimizer.type=toy", "--llama.attention_kernel=toy", "--llama.attention_type=blockwise",
        "--update_llama_config=dict(vocab_size=288,hidden_size=32,intermediate_size=64,num_hidden_layers=1,"
        "num_attention_heads=2,max_sequence_length=64)",
        "--mesh_dim=1,1,1,1", "--num_cpu_devices=1", "--dtype=fp32", "--total_steps=3", "--log_freq=1",
        "--save_final=False",
        "--tokenizer.vocab_file=bytes", "--train_dataset.type=python", "--train_dataset.python_dataset.seq_length=64",
        "--train_dataset.python_dataset.batch_size=2", f"--train_dataset.python_dataset.path={house}/objectives",
        "--train_dataset.python_dataset.split=all", f"--train_dataset.cache_dir={tmp_path}/cache",
        f"--logger.output_dir={tmp_path}/runs", "--logger.experiment_id=toy",
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *flags],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "runs" / "toy" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["loss"] == pytest.approx(-2 * row["likelihood"]) for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
