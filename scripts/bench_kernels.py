"""Attention kernels on this machine's device: checked against float32, then timed beside those of others.

python scripts/bench_kernels.py [--out=bench.json]      a GPU: within 10 minutes; JSON, and a table beside it
python scripts/bench_kernels.py --tiny                  anything: the same at sizes an interpreter can do
"""

import faulthandler
import os
import re
import sys
from functools import partial
from types import SimpleNamespace

from ringbpt.config import Flag, UserError, choices, printed_help, read_flags, run_main, user_path
from ringbpt.config.places import check_writable

FLAGS = {
    "out": Flag(str, "bench_kernels.json", "the JSON file; a table stands beside it"),
    "budget_s": Flag(float, 570.0, "seconds after which nothing further is tried", above=0),
    "lengths": Flag(str, "4096,8192,16384,32768", "tokens"),
    "head_dims": Flag(str, "64,128", "numbers of a head"),
    "heads": Flag(str, "64/8,32/32", "query heads / key and value heads"),
    "kernels": Flag(str, "auto,cudnn,pallas_hopper,pallas_triton", "names of kernels"),
    "check_length": Flag(int, 2048, "tokens at which kernels are checked", at_least=1),
    "ring": Flag(str, "8192x8", "tokens a rank x ranks; empty: none"),
    "tiny": Flag(bool, False, "interpreted Triton kernels and blockwise, 64 tokens"),
}
LIST = "[1-9][0-9]{0,8}(,[1-9][0-9]{0,8})*"
FORMS = {"lengths": LIST, "head_dims": LIST, "ring": "([1-9][0-9]{0,8}x[1-9][0-9]{0,8})?"} | {
    "heads": "[1-9][0-9]{0,8}/[1-9][0-9]{0,8}(,[1-9][0-9]{0,8}/[1-9][0-9]{0,8})*"
}


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    args = SimpleNamespace(**read_flags(argv, FLAGS))
    for name, form in FORMS.items():
        if not re.fullmatch(form, getattr(args, name)):
            raise UserError(f"--{name}={getattr(args, name)!r} cannot be read: --{name}={FLAGS[name].default}")
    if unknown := [name for name in args.kernels.split(",") if name not in choices("llama.attention_kernel")]:
        raise UserError(f"--kernels={unknown[0]} is no kernel: --kernels={FLAGS['kernels'].default}")
    args.out = user_path(args.out)
    check_writable("--out", args.out, folder=False)
    if args.tiny:
        args.lengths, args.head_dims, args.heads, args.check_length, args.ring = "64", "16", "2/1", 64, "32x2"
        args.kernels = "blockwise,pallas_triton_interpreted,pallas_hopper"
    # PyTorch needs room beside jax.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")
    # A kernel that hangs must not hang the rest: what was measured is in the file.
    faulthandler.dump_traceback_later(args.budget_s + 20, exit=True)
    import jax

    from ringbpt.bench import kernels

    if jax.default_backend() == "cpu" and not args.tiny:
        raise UserError("no GPU: jax finds only CPUs here, where kernels run in interpreters; --tiny does that")
    heads = [(int(n), int(k)) for n, k in (pair.split("/") for pair in args.heads.split(","))]
    todo = kernels.problems(
        [int(n) for n in args.lengths.split(",")], [int(n) for n in args.head_dims.split(",")], heads
    )
    tokens, _, ranks = args.ring.partition("x")
    ring = (int(tokens), int(ranks)) if args.ring else None
    keep = partial(kernels.save, path=args.out)
    report = kernels.run(args.kernels.split(","), todo, args.check_length, ring, args.budget_s, keep=keep)
    print(kernels.table(report))
    wrong = [name for name, error in report["errors"].items() if max(error.values()) > kernels.TOLERANCE]
    if wrong:
        print(f"wrong, and not timed: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
