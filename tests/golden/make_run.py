"""Writes run.zip: a run, its checkpoints and converted weights as the code of one commit leaves them, and what it makes
of them afterwards. Later code must read them, and go on with the same numbers.

    git checkout 656404e ringbpt scripts && python -m tests.golden.make_run

In the zip:
  text.jsonl                       the data
  runs/full, runs/weights          runs of 4 steps: the train state of adamw in float32 (step 4); bf16 weights alone
  runs/hf, runs/ours               what scripts/jax2hf.py makes of the weights, and scripts/hf2jax.py of that
  expected.json                    losses by step of what is trained from them, digests of the tensors of each folder
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.golden.make_losses import write_text

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("run.zip")
SIZES = {
    "vocab_size": 288, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_sequence_length": 128,
}  # fmt: skip
MODEL = f"--update_llama_config=dict({','.join(f'{name}={size}' for name, size in SIZES.items())})"
TRAIN = (
    *("--mesh_dim=1,1,1,2", "--dtype=fp32", "--log_freq=1", "--llama.attention_type=ring_blockwise"),
    *("--llama.scan_query_chunk_size=32", "--llama.scan_key_chunk_size=32", "--llama.scan_mlp_chunk_size=32"),
    *("--llama.loss_chunk_size=32", "--optimizer.adamw_optimizer.lr=0.01"),
    *("--optimizer.adamw_optimizer.lr_warmup_steps=2", "--optimizer.adamw_optimizer.lr_decay_steps=100"),
    *("--train_dataset.type=json", "--train_dataset.json_dataset.path=text.jsonl"),
    *("--train_dataset.text_processor.fields=text", "--train_dataset.json_dataset.seq_length=128"),
    *("--train_dataset.json_dataset.batch_size=2", "--train_dataset.packing=best_fit"),
    *("--tokenizer.vocab_file=bytes", "--train_dataset.cache_dir=cache", "--logger.output_dir=runs"),
)
FULL = "--checkpointer.save_optimizer_state"
# What is trained from what is in the zip, each by a command of its own, in runs/<name>: full goes on in the old run's
# folder, and so comes last.
GOES_ON = {
    "trainstate": (MODEL, "--load_checkpoint=trainstate::runs/full/checkpoints/4", "--total_steps=6"),
    "from_weights": (MODEL, "--load_checkpoint=params::runs/weights", "--total_steps=2"),
    "from_ours": (MODEL, "--load_checkpoint=params::runs/ours", "--total_steps=2"),
    "from_huggingface": ("--load_checkpoint=huggingface::runs/hf", "--total_steps=2"),
    "full": (MODEL, FULL, "--autoresume", "--total_steps=8"),
}
SCRIPTS = {
    "hf": ("jax2hf", "--load_checkpoint=params::runs/weights", "--output_dir=runs/hf"),
    "ours": ("hf2jax", "--checkpoint_dir=runs/hf", "--output_file=runs/ours"),
    "hf_full": ("jax2hf", "--load_checkpoint=params::runs/full/checkpoints/4", "--output_dir=runs/hf_full"),
    "back": ("jax2hf", "--load_checkpoint=params::runs/ours", "--output_dir=runs/back"),
}


def losses(run_dir: Path) -> dict[str, float]:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {str(row["step"]): row["loss"] for row in rows if "loss" in row}


def digest(folder: Path) -> str:
    """Of the names, dtypes, shapes and bytes of a folder's safetensors, whatever their order in the file."""
    found = hashlib.sha256()
    (file,) = folder.glob("*.safetensors")
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for name, entry in sorted(json.loads(data[8:start]).items()):
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            found.update(f"{name} {entry['dtype']} {entry['shape']}".encode() + data[start + first : start + last])
    return found.hexdigest()


def main() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def run(*words: str) -> None:
            subprocess.run([sys.executable, *words], env=environment, cwd=folder, stdout=subprocess.DEVNULL, check=True)

        def train(name: str, *flags: str) -> None:
            run("-m", "ringbpt.train", *TRAIN, f"--logger.experiment_id={name}", "--num_cpu_devices=2", *flags)

        def keep() -> None:
            files = [folder / "text.jsonl", *(path for path in (folder / "runs").rglob("*") if path.is_file())]
            with zipfile.ZipFile(FILE, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
                for file in sorted(files):
                    if file.suffix != ".png" and "tensorboard" not in file.parts:
                        archive.write(file, file.relative_to(folder))

        write_text(folder / "text")
        texts = [file.read_text()[:300] for file in sorted((folder / "text").glob("*.py"))[:60]]
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        train("full", MODEL, FULL, "--total_steps=4")
        train("weights", MODEL, "--total_steps=4")
        for script in ("hf", "ours"):
            run(str(ROOT / "scripts" / f"{SCRIPTS[script][0]}.py"), *SCRIPTS[script][1:])
        keep()
        for script in ("hf_full", "back"):
            run(str(ROOT / "scripts" / f"{SCRIPTS[script][0]}.py"), *SCRIPTS[script][1:])
        for name, flags in GOES_ON.items():
            train(name, *flags)
        expected = {
            "losses": {name: losses(folder / "runs" / name) for name in GOES_ON},
            "digests": {name: digest(folder / "runs" / name) for name in SCRIPTS},
        }
    with zipfile.ZipFile(FILE, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("expected.json", json.dumps(expected, indent=1) + "\n")
    print(f"{FILE}: {FILE.stat().st_size} bytes", json.dumps(expected, indent=1))


if __name__ == "__main__":
    main()
