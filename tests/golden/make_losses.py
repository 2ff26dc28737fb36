"""Writes losses.json: the losses of 20 steps of configs/debug.py on the plainest program there is.

    python -m tests.golden.make_losses

One device, dense attention, layers in a Python loop, the feedforward in one piece, nothing rematerialised. The text is
made from a seed, because the recipe's own, the standard library, differs from Python to Python.
"""

import json
import math
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS = 20
FILE = Path(__file__).with_name("losses.json")
PLAINEST = [
    "--llama.attention_type=standard",
    "--llama.sequence_layout=contiguous",
    "--llama.scan_layers=False",
    "--llama.scan_mlp=False",
    "--llama.remat_block=",
    "--llama.loss_chunk_size=1000000",
]


def write_text(folder: Path) -> None:
    """600 documents of 8 to 1500 bytes, in which a word foretells the next: the same on every machine."""
    rng = random.Random(0)
    words = ["".join(chr(97 + int(26 * rng.random())) for _ in range(2 + int(7 * rng.random()))) for _ in range(64)]
    follows = [[int(64 * rng.random()) for _ in range(3)] for _ in words]
    folder.mkdir()
    for number in range(600):
        size, word, text = 8 + int(1492 * rng.random() ** 2), int(64 * rng.random()), ""
        while len(text) < size:
            text += words[word] + (".\n" if rng.random() < 0.1 else " ")
            word = follows[word][int(3 * rng.random())]
        (folder / f"{number:03}.py").write_text(text)


def losses(mesh: tuple[int, int, int, int], flags: list[str], folder: str | Path, steps: int = STEPS) -> list[float]:
    """The losses of the debug recipe's first steps on `mesh`, changed by `flags`: the command as a user runs it."""
    text = Path(folder) / "text"
    write_text(text)
    command = [
        *(sys.executable, "-m", "ringbpt.train", "--config=configs/debug.py", *flags),
        *(f"--mesh_dim={','.join(map(str, mesh))}", f"--num_cpu_devices={math.prod(mesh)}"),
        *(f"--total_steps={steps}", "--log_freq=1", "--eval_steps=0", "--nosave_final", "--save_minutes=0"),
        *(f"--train_dataset.python_dataset.path={text}", "--train_dataset.python_dataset.split=all"),
        *(f"--logger.output_dir={folder}", "--logger.experiment_id=golden"),
    ]
    # Without the tests' own flags: a run is to be compiled as users compile it.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = (Path(folder) / "golden" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in rows]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        FILE.write_text(json.dumps(losses((1, 1, 1, 1), PLAINEST, folder), indent=1) + "\n")
    print(FILE.read_text())
