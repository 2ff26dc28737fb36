"""Conversion of a synthetic sharded bf16 checkpoint, measured: peak memory, and the rate beside a plain copy's.

    python scripts/bench_convert.py --folder=/a/disk/with/room --gb=8

Writes a Hugging Face folder of that size, copies it file by file, converts it, all in one run, and removes all three.
Each of the two is timed to the end of its sync, the caches of the files it reads dropped before.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from ringbpt.config import Architecture, Flag, check_writable, printed_help, read_flags, run_main, user_path

FLAGS = {
    "folder": Flag(str, "", "a folder on a disk with room, where all of it is made", required=True),
    "gb": Flag(float, 8.0, "of the checkpoint", above=0, at_most=10000),
    "shard_gb": Flag(float, 2.0, "of each of its files", above=0),
    "child": Flag(list, [], "what is converted, and where to: the script's own, in a process that is measured"),
}
ROOT = Path(__file__).resolve().parents[1]


def write_model(folder: Path, gb: float, shard_gb: float) -> None:
    """LLaMA 3 8B's layers, as many as make up the size; each tensor random bits repeated."""
    import numpy as np

    from ringbpt.checkpoint.export import write_settings
    from ringbpt.checkpoint.safetensors import FolderWriter, Planned
    from ringbpt.checkpoint.tensors import conversions
    from ringbpt.config.families import FAMILIES, hf_settings, rows_for

    def model(layers: int) -> Architecture:
        return Architecture(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        )  # fmt: skip

    def tensors(llama: Architecture) -> list[Planned]:
        table = conversions(rows_for(FAMILIES["LlamaForCausalLM"], llama), llama)
        return [Planned(name, BF16, conversion.their_shape) for conversion in table for name in conversion.names()]

    import jax.numpy as jnp

    BF16 = np.dtype(jnp.bfloat16)
    size = lambda plan: sum(2 * int(np.prod(tensor.shape)) for tensor in plan)  # noqa: E731
    one, two = size(tensors(model(1))), size(tensors(model(2)))
    llama = model(max(1, round((gb * 1e9 - one) / (two - one)) + 1))
    noise = np.random.default_rng(0).integers(0, 1 << 14, 1 << 20, dtype=np.uint16)
    with FolderWriter(folder, tensors(llama), int(shard_gb * 1e9)) as writer:
        for tensor in tensors(llama):
            writer.write(tensor.name, np.resize(noise, tensor.shape).view(BF16))
    write_settings(folder, hf_settings(llama, "bfloat16"))


def drop_caches(folder: Path) -> None:
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def synced(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    args = SimpleNamespace(**read_flags(argv, FLAGS))
    args.folder, args.child = user_path(args.folder), [Path(name) for name in args.child]
    check_writable("--folder", args.folder)
    if args.child:
        from ringbpt.checkpoint.huggingface import to_ours

        baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        started = time.perf_counter()
        to_ours(*args.child, max_shard_bytes=int(args.shard_gb * 1e9))
        synced(args.child[1])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak, "baseline": baseline}))
        return 0
    source, copy, ours = (args.folder / f"bench-{name}" for name in ("source", "copy", "ours"))
    try:
        write_model(source, args.gb, args.shard_gb)
        files = sorted(source.glob("*.safetensors"))
        total, largest = sum(file.stat().st_size for file in files), max(file.stat().st_size for file in files)
        drop_caches(source)
        started = time.perf_counter()
        shutil.copytree(source, copy)
        synced(copy)
        copied = time.perf_counter() - started
        shutil.rmtree(copy)
        drop_caches(source)
        command = [sys.executable, __file__, f"--folder={args.folder}", f"--shard_gb={args.shard_gb}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = subprocess.run(
            [*command, f"--child={source}", f"--child={ours}"],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        found = json.loads(run.stdout.splitlines()[-1])
    finally:
        for folder in (source, copy, ours):
            shutil.rmtree(folder, ignore_errors=True)
    tensor = 2 * 128256 * 4096
    held, bound = found["peak"] - found["baseline"], 1.3 * largest + tensor
    print(f"checkpoint {total / 1e9:.2f} GB in {len(files)} files, the largest {largest / 1e9:.2f} GB")
    print(f"memory held {held / 1e9:.2f} GB (whole process {found['peak'] / 1e9:.2f}), bound {bound / 1e9:.2f} GB")
    seconds = found["seconds"]
    print(f"plain copy {copied:.1f} s, {total / copied / 1e9:.2f} GB/s")
    print(f"conversion {seconds:.1f} s, {total / seconds / 1e9:.2f} GB/s: {100 * copied / seconds:.0f} % of the copy")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
