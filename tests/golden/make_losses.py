"""Writes losses.json: the losses of 20 steps of configs/debug.py on the plainest program there is.

    python -m tests.golden.make_losses

One device, dense attention, layers in a Python loop, the feedforward in one piece, nothing rematerialised.
"""

import json
import tempfile
from pathlib import Path

import jax

STEPS = 20
FILE = Path(__file__).with_name("losses.json")
PLAINEST = [
    "--mesh_dim=1,1,1,1",
    "--llama.attention_type=standard",
    "--llama.sequence_layout=contiguous",
    "--llama.scan_layers=False",
    "--llama.scan_mlp=False",
    "--llama.remat_block=",
    "--llama.loss_chunk_size=1000000",
]


def losses(flags: list[str], folder: str | Path) -> list[float]:
    """The losses of the debug recipe's first steps, changed by `flags`, through the whole training loop."""
    from ringbpt.config import parse, parse_args
    from ringbpt.training.loop import train

    common = ["--config=configs/debug.py", f"--total_steps={STEPS}", "--log_freq=1", "--eval_steps=0", "--nosave_final"]
    tree = parse_args([*common, f"--logger.output_dir={folder}", "--logger.experiment_id=golden", *flags])
    mesh = [int(size) for size in tree.mesh_dim.split(",")]
    run = train(parse(tree, device_count=mesh[0] * mesh[1] * mesh[2] * mesh[3]))
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        FILE.write_text(json.dumps(losses(PLAINEST, folder), indent=1) + "\n")
    print(FILE.read_text())
