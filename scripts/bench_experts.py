"""A mixture of experts on this device: time, rate and memory of a chunk's forward and backward.

  python scripts/bench_experts.py [--tokens=4096] [--experts=8] [--chosen=2] [--hidden=4096] [--intermediate=14336]

experts: as ringbpt computes them; ragged_dot: by jax.lax.ragged_dot; dense: one feedforward for all, of as many
products. TFLOP/s count what the chosen experts have to compute.
"""

import math
import sys

from ringbpt.config import Flag, UserError, printed_help, read_flags, run_main

FLAGS = {
    "tokens": Flag(int, 4096, "of a chunk", at_least=1, at_most=1 << 24),
    "experts": Flag(int, 8, "in all", at_least=1, at_most=4096),
    "chosen": Flag(int, 2, "of each token", at_least=1, at_most=4096),
    "hidden": Flag(int, 4096, "the model's width", at_least=1, at_most=1 << 20),
    "intermediate": Flag(
        int, 14336, "an expert's width; with tensor parallelism, a device's part", at_least=1, at_most=1 << 20
    ),
    "dtype": Flag(str, "bfloat16", "of tokens and weights", choices=("float32", "bfloat16", "float16")),
}


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    flags = read_flags(argv, FLAGS)
    if flags["chosen"] > flags["experts"]:
        raise UserError(f"--chosen={flags['chosen']} is above --experts={flags['experts']}: at most that")
    from ringbpt.bench.experts import measure

    print("            forward, ms   backward, ms   TFLOP/s   temporaries, GiB", flush=True)
    for row in measure(**flags):
        if math.isnan(row.tflops):
            print(f"{row.side:<10}   the device's memory is too small", flush=True)
            continue
        times = f"{1e3 * row.forward:>12.2f} {1e3 * row.backward:>14.2f}"
        print(f"{row.side:<10} {times} {row.tflops:>9.2f} {row.temporaries / 2**30:>18.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
