"""What a layout is worth over sp, and a packing over dp and micro-batches, on documents of uneven length: counted.

python scripts/balance.py [--sp=8] [--rows=16]
python scripts/balance.py --timed_runs=5        # and timed: ring attention on 2 and on 8 CPU devices, a core each
"""

import os
import sys

from ringbpt.bench.balance import layouts_table, packings_table, timed_table
from ringbpt.config import Flag, printed_help, read_flags, run_main

FLAGS = {
    "sp": Flag(int, 0, "devices of a ring; 0: 8, 16 and 64", at_least=0, at_most=1024),
    "tokens": Flag(int, 8192, "of a device", at_least=1024, at_most=1 << 20),
    "rows": Flag(int, 16, "of each distribution", at_least=1, at_most=1024),
    "block": Flag(int, 1024, "tokens of a block, queries and keys", at_least=1, at_most=1024),
    "timed_runs": Flag(int, 0, "of attention, by turns in zigzag and balanced, instead of the tables", at_least=0),
    "steps": Flag(int, 64, "of an epoch, in the table of packings", at_least=1, at_most=1024),
    "batch_size": Flag(int, 16, "rows of a step, each on a device or in a micro-batch of its own", at_least=1),
}


def timed(runs: int) -> int:
    """A device has one core: it must not help itself to that of one that waits."""
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    print("zigzag / balanced, and what of zigzag's balanced takes\n")
    print("| devices | all at once | the busiest rank, of a core | blocks | of the busiest rank | hop by hop |")
    print("|---|---|---|---|---|---|")
    for line in timed_table(runs):
        print(line, flush=True)
    return 0


def main(argv: list[str]) -> int:
    if printed_help(argv, "scripts/balance.py", __doc__, FLAGS):
        return 0
    given = read_flags(argv, FLAGS)
    if given["timed_runs"]:
        return timed(given["timed_runs"])
    print("| documents | max/mean contiguous | zigzag | balanced | its blocks over zigzag's | hops of the three | ms |")
    print("|---|---|---|---|---|---|---|")
    for sp in (given["sp"],) if given["sp"] else (8, 16, 64):
        print("\n".join(layouts_table(sp, given["tokens"], given["rows"], given["block"])), flush=True)
    print("\n| documents | max/mean first_fit | best_fit | balanced | |\n|---|---|---|---|---|")
    print("\n".join(packings_table(8 * given["tokens"], given["steps"], given["batch_size"])))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
