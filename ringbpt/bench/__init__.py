"""Attention and training steps timed; and what entries know of that without importing jax."""

from ringbpt.config import DTYPES, Flag

AUTOTUNE_FLAGS = {
    "kernel": Flag(str, "", "one that reads the table; empty: the one that auto tries first on this device"),
    "head_dim": Flag(str, "64,128", "whose sizes to find"),
    "blocks": Flag(str, "", "sizes to try, for queries and for keys: 128,256,512,1024; of pallas_triton 32,64,128"),
    "tokens": Flag(int, 8192, "queries and keys of a device", at_least=1, at_most=1 << 30),
    "heads": Flag(int, 8, "query heads of a device", at_least=1, at_most=1 << 16),
    "kv_heads": Flag(int, 2, "key/value heads of a device", at_least=1, at_most=1 << 16),
    "dtype": Flag(str, "bf16", choices=tuple(dict.fromkeys(DTYPES.values()))),
    "budget_s": Flag(int, 540, "seconds after which nothing further is tried", at_least=0, at_most=1 << 20),
    "print_only": Flag(bool, False, "leave the table as it is"),
}

# What scripts/bench_step.py measures: the sections of its report.
SECTIONS = ("kernels", "steps", "host", "decode", "debug")
NO_DEVICE = "no accelerator: jax finds only CPUs here; --tiny measures them"
