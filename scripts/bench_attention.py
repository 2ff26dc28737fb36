"""Attention against a rival, alternating in one process: a table, JSON and a plot of the ratios.

pip install -e '.[bench]'
python scripts/bench_attention.py                                  # 8 CPU devices, against ringattention 0.1.2
python scripts/bench_attention.py --rival=cudnn --dtype=bfloat16 --T=32768 --heads=32 --kv_heads=8 --H=128   # one GPU
python scripts/bench_attention.py --rival=one_device --ranks=8     # a ring's ranks one by one, without transfers
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from ringbpt.config import Flag, UserError, printed_help, read_flags, run_main

FLAGS = {
    "rival": Flag(str, "ringattention", "what to compare with", choices=("ringattention", "cudnn", "one_device")),
    "T": Flag(int, 8192, "tokens"),
    "heads": Flag(int, 4, "query heads"),
    "kv_heads": Flag(int, 0, "key/value heads; 0: as many as query heads"),
    "H": Flag(int, 64, "head dim"),
    "dtype": Flag(str, "float32", "of q, k and v"),
    "local": Flag(str, "blockwise", "our local attention"),
    "strategy": Flag(str, "ring", "how our devices meet"),
    "chunk_size": Flag(int, 128, "tokens of our blocks"),
    "rival_chunk_size": Flag(list, ["128", "256", "512"], "tokens of the rival's blocks; its best counts"),
    "devices": Flag(int, 8, "virtual CPU devices, with --rival=ringattention"),
    "ranks": Flag(int, 8, "devices of the ring, with --rival=one_device"),
    "repeats": Flag(int, 5, "timed runs of each"),
    "out": Flag(str, "bench_attention", "FILE: writes FILE.json and FILE.png"),
}


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    values = read_flags(argv, FLAGS)
    blocks = values["rival_chunk_size"]
    if not all(text.isdecimal() and int(text) for text in blocks):
        raise UserError(f"--rival_chunk_size={','.join(blocks)}: a number each time: --rival_chunk_size=128")
    values |= {"rival_chunk_size": [int(text) for text in blocks], "kv_heads": values["kv_heads"] or values["heads"]}
    out = values.pop("out")
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
