"""`python -m ringbpt.autotune`: measures block sizes of attention on the device that is here, and keeps the best."""

import sys

from ringbpt.bench.autotune import main
from ringbpt.config import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
