"""What --llama.reduce_dtype=bf16 costs: gradients, and the loss of a run, beside those of sums in float32.

  python scripts/bench_reduce.py --config=configs/debug.py --total_steps=200

Two runs of these flags, one with each dtype, from the same weights on the same batches; sums go round in hops, as on
TPUs. Every so many steps: the cosine of both gradients at the weights of the float32 run, and the ratio of their norms.
"""

import sys

from ringbpt.config import Flag, parse, parse_args, printed_help, run_main, split_flags

FLAGS = {"every": Flag(int, 20, "steps between two lines", at_least=1)}


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    own, rest = split_flags(argv, FLAGS)
    tree = parse_args(rest)
    from ringbpt.mesh import start_jax

    config = parse(tree, start_jax(tree))
    from ringbpt.bench.reduce import costs

    print("step   1 - cosine   norm      loss in fp32   in bf16", flush=True)
    for cost in costs(config, own["every"]):
        losses = f"{cost.loss:.5f}        {cost.loss_in_bf16:.5f}"
        print(f"{cost.step:4}   {1 - cost.cosine:.2e}     {cost.norm:.5f}   {losses}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
