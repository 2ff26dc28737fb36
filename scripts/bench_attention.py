"""Attention against a rival, alternating in one process: a table, JSON and a plot of the ratios.

pip install -e '.[bench]'
python scripts/bench_attention.py                                  # 8 CPU devices, against ringattention 0.1.2
python scripts/bench_attention.py --rival=cudnn --dtype=bfloat16 --T=32768 --heads=32 --kv_heads=8 --H=128   # one GPU
python scripts/bench_attention.py --rival=one_device --ranks=8     # a ring's ranks one by one, without transfers
"""

import json
from dataclasses import asdict, fields
from pathlib import Path

from absl import app, flags

flags.DEFINE_enum("rival", "ringattention", ["ringattention", "cudnn", "one_device"], "what to compare with")
flags.DEFINE_integer("T", 8192, "tokens")
flags.DEFINE_integer("heads", 4, "query heads")
flags.DEFINE_integer("kv_heads", 0, "key/value heads; 0: as many as query heads")
flags.DEFINE_integer("H", 64, "head dim")
flags.DEFINE_string("dtype", "float32", "of q, k and v")
flags.DEFINE_string("local", "blockwise", "our local attention")
flags.DEFINE_string("strategy", "ring", "how our devices meet")
flags.DEFINE_integer("chunk_size", 128, "tokens of our blocks")
flags.DEFINE_multi_integer("rival_chunk_size", [128, 256, 512], "tokens of the rival's blocks; its best counts")
flags.DEFINE_integer("devices", 8, "virtual CPU devices, with --rival=ringattention")
flags.DEFINE_integer("ranks", 8, "devices of the ring, with --rival=one_device")
flags.DEFINE_integer("repeats", 5, "timed runs of each")
flags.DEFINE_string("out", "bench_attention", "FILE: writes FILE.json and FILE.png")


def main(argv: list[str]) -> None:
    import jax

    from ringbpt.bench import attention as bench

    values = {field.name: flags.FLAGS[field.name].value for field in fields(bench.Settings)}
    settings = bench.Settings(**values | {"kv_heads": values["kv_heads"] or values["heads"]})
    if settings.rival == "ringattention":
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", settings.devices)
    rows = bench.run(settings)
    out = flags.FLAGS.out
    about = {"settings": asdict(settings), "jax": jax.__version__, "device": jax.devices()[0].device_kind}
    Path(f"{out}.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    bench.plot(rows, f"{out}.png")


if __name__ == "__main__":
    app.run(main)
