"""Attention kernels on this machine's device: checked against float32, then timed beside those of others.

python scripts/bench_kernels.py [--out=bench.json]      a GPU: within 10 minutes; JSON, and a table beside it
python scripts/bench_kernels.py --tiny                  anything: the same at sizes an interpreter can do
"""

import argparse
import faulthandler
import os
from functools import partial
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench_kernels.json"))
    parser.add_argument("--budget_s", type=float, default=570.0)
    parser.add_argument("--lengths", default="4096,8192,16384,32768")
    parser.add_argument("--head_dims", default="64,128")
    parser.add_argument("--heads", default="64/8,32/32")
    parser.add_argument("--kernels", default="auto,cudnn,pallas_hopper,pallas_triton")
    parser.add_argument("--check_length", type=int, default=2048)
    parser.add_argument("--ring", default="8192x8", help="tokens a rank x ranks; empty: none")
    parser.add_argument("--tiny", action="store_true", help="interpreted Triton kernels and blockwise, 64 tokens")
    args = parser.parse_args()
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
        raise SystemExit("no GPU: jax finds only CPUs here, where kernels run in interpreters; --tiny does that")
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
    raise SystemExit(main())
