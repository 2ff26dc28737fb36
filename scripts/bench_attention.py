"""Attention against a rival, alternating in one process: a table, JSON and a plot of the ratios.

pip install -e '.[bench]'
python scripts/bench_attention.py                                  # 8 CPU devices, against ringattention 0.1.2
python scripts/bench_attention.py --rival=cudnn --dtype=bfloat16 --T=32768 --heads=32 --kv_heads=8 --H=128   # one GPU
python scripts/bench_attention.py --rival=one_device --ranks=8     # a ring's ranks one by one, without transfers
python scripts/bench_attention.py --rival=unshared --strategy=none # 2 and 8 answers to one prompt, there once or not
"""

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

from ringbpt.config import Flag, UserError, check_writable, choices, printed_help, read_flags, run_main, user_path

RIVALS = ("ringattention", "cudnn", "one_device", "unshared")
FLAGS = {
    "rival": Flag(str, RIVALS[0], "what to compare with", choices=RIVALS),
    "T": Flag(int, 8192, "tokens; with --rival=unshared, of a document", at_least=1, at_most=1 << 30),
    "heads": Flag(int, 4, "query heads", at_least=1, at_most=1 << 16),
    "kv_heads": Flag(int, 0, "key/value heads; 0: as many as query heads", at_least=0, at_most=1 << 16),
    "H": Flag(int, 64, "head dim", at_least=1, at_most=1 << 16),
    "dtype": Flag(str, "float32", "of q, k and v", choices=("float32", "bfloat16", "float16")),
    "local": Flag(str, "blockwise", "our local attention", choices=choices("llama.attention_kernel")),
    "strategy": Flag(str, "ring", "how our devices meet", choices=("none", *choices("llama.sequence_parallel"))),
    "chunk_size": Flag(int, 128, "tokens of our blocks", at_least=1),
    "rival_chunk_size": Flag(list, ["128", "256", "512"], "tokens of the rival's blocks; its best counts"),
    "devices": Flag(int, 8, "virtual CPU devices, with --rival=ringattention", at_least=1, at_most=4096),
    "ranks": Flag(int, 8, "devices of the ring, with --rival=one_device", at_least=1, at_most=4096),
    "repeats": Flag(int, 5, "timed runs of each", at_least=1),
    "out": Flag(str, "bench_attention", "FILE: writes FILE.json and FILE.png"),
}


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    values = read_flags(argv, FLAGS)
    blocks = values["rival_chunk_size"]
    if not all(re.fullmatch("[1-9][0-9]{0,8}", text) for text in blocks):
        raise UserError(f"--rival_chunk_size={','.join(blocks)}: a number each time: --rival_chunk_size=128")
    values |= {"rival_chunk_size": [int(text) for text in blocks], "kv_heads": values["kv_heads"] or values["heads"]}
    out = values.pop("out")
    check_writable("--out", user_path(out), folder=False)
    import jax

    from ringbpt.bench import attention as bench

    settings = bench.Settings(**values)
    if settings.rival == "ringattention":
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", settings.devices)
    rows = bench.run(settings)
    about = {"settings": asdict(settings), "jax": jax.__version__, "device": jax.devices()[0].device_kind}
    Path(f"{out}.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    bench.plot(rows, f"{out}.png")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
