"""`python -m ringbpt.autotune`: measures block sizes of attention on the device that is here, and keeps the best."""

import sys

from ringbpt.bench import AUTOTUNE_FLAGS as FLAGS  # noqa: F401  (shell completion reads every entry's)
from ringbpt.config import run_main


def main(argv: list[str]) -> int:
    from ringbpt.bench.autotune import main as tune
    from ringbpt.mesh import choose_platform

    choose_platform()
    return tune(argv)


if __name__ == "__main__":
    sys.exit(run_main(main))
