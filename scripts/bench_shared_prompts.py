"""What it saves that the answers of one prompt share it: tokens, pairs, time and memory of a train step, as ratios.

  python scripts/bench_shared_prompts.py [--length=8192] [--prompt=0.9] [--answers=2 --answers=8] <flags of a run>

A step on documents of `length` tokens, which stand in one row with their prompt once, over the same step with a prompt
for each, and the same of the pass by which a rollout knows what its tokens' log-probabilities are; the two take turns.
The flags are those of ringbpt.train, of which the objective, the model and the mesh count.
"""

import re
import sys

from ringbpt.config import Flag, UserError, parse, parse_args, printed_help, run_main, split_flags

FLAGS = {
    "length": Flag(int, 8192, "tokens of a document", at_least=8, at_most=1 << 26),
    "prompt": Flag(float, 0.9, "the share of a document that is its prompt", above=0, below=1),
    "answers": Flag(list, ["2", "8"], "to one prompt"),
    "repeats": Flag(int, 5, "timed runs of each", at_least=1),
}


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    own, rest = split_flags(argv, FLAGS)
    if not all(re.fullmatch("[1-9][0-9]{0,3}", text) for text in own["answers"]):
        raise UserError(f"--answers={','.join(own['answers'])}: a number each time: --answers=2")
    tree = parse_args(rest)
    from ringbpt.mesh import start_jax

    config = parse(tree, start_jax(tree))
    from ringbpt.bench.prompts import measure

    print("answers  tokens  pairs   time    of log-probs  temporary bytes  difference of the losses")
    for answers in map(int, own["answers"]):
        row = measure(config, own["length"], own["prompt"], answers, own["repeats"])
        print(
            f"{answers:7}  {row.tokens:.3f}   {row.pairs:.3f}   {row.seconds:.3f}   {row.said:.3f}"
            f"         {row.temporaries:.3f}            {row.loss:.1e}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
