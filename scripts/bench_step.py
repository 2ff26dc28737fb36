"""The first minutes with an accelerator: kernels, training steps of Llama-3-8B's layers, the host's memory, decoding.

python scripts/bench_step.py [--out=bench_step.json]    within 8 minutes; JSON, and a table beside it
python scripts/bench_step.py --parts=steps --steps=1048576x4 --out=more.json        what there was no time for
python scripts/bench_step.py --tiny                     anything: the same at sizes a CPU does in a minute
"""

import re
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

from ringbpt.bench import NO_DEVICE, SECTIONS
from ringbpt.config import Flag, UserError, choices, printed_help, read_flags, run_main, user_path
from ringbpt.config.places import check_writable

FLAGS = {
    "out": Flag(str, "bench_step.json", "the JSON file; a table stands beside it"),
    "budget_s": Flag(float, 455.0, "seconds after which nothing further is begun", above=0),
    "parts": Flag(str, ",".join(SECTIONS), "what is measured"),
    "steps": Flag(str, "131072x2,1048576x2,524288x2,131072x4,524288x4,1048576x4", "tokens x layers, first ones first"),
    "offload_from": Flag(int, 262144, "tokens from which inputs of layers and AdamW's state are offloaded", at_least=0),
    "kernels": Flag(str, "auto,cudnn", "names of kernels"),
    "tiny": Flag(bool, False, "two layers of 128 numbers, 64 and 128 tokens, on a CPU too"),
}
STEPS = "[1-9][0-9]{0,8}x[1-9][0-9]{0,2}(,[1-9][0-9]{0,8}x[1-9][0-9]{0,2})*"


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    args = SimpleNamespace(**read_flags(argv, FLAGS))
    if not re.fullmatch(STEPS, args.steps):
        raise UserError(f"--steps={args.steps!r} cannot be read: --steps={FLAGS['steps'].default}")
    for flag, known in (("parts", SECTIONS), ("kernels", choices("llama.attention_kernel"))):
        if unknown := [name for name in getattr(args, flag).split(",") if name not in known]:
            raise UserError(f"--{flag}={unknown[0]} is none that there is: --{flag}={FLAGS[flag].default}")
    args.out = user_path(args.out)
    check_writable("--out", args.out, folder=False)
    import jax

    from ringbpt.mesh import choose_platform

    choose_platform()  # no device is touched here: each part has a process of its own, and all of the memory
    if jax.config.jax_platforms == "cpu" and not args.tiny:
        raise UserError(NO_DEVICE)
    from ringbpt.bench import kernels, step

    asked = step.TINY
    if not args.tiny:
        sizes = [tuple(map(int, each.split("x"))) for each in args.steps.split(",")]
        names = tuple(args.kernels.split(","))
        asked = replace(step.DEFAULT, steps=tuple(sizes), offload_from=args.offload_from, kernels=names)
    asked = replace(asked, parts=tuple(args.parts.split(",")))
    report = step.run(asked, args.budget_s, keep=partial(kernels.save, path=args.out, table=step.table))
    print(step.table(report))
    return 1 if report["refused"] else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
