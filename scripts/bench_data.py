"""How fast data come: bytes and tokens a second of each format and of the cache, and what a second worker gives.

python scripts/bench_data.py [--megabytes=64] [--tokenizer=bytes] [--folder=DIR]
"""

import sys

from ringbpt.config import Flag, check_writable, printed_help, read_flags, run_main, user_path

FLAGS = {
    "megabytes": Flag(int, 64, "of text, which is made here", at_least=1, at_most=1 << 16),
    "tokenizer": Flag(str, "bytes", "as --tokenizer.vocab_file; 'train' trains a SentencePiece model on the text"),
    "folder": Flag(str, "", "where the text and the caches are made; empty: a temporary one"),
}


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    flags = read_flags(argv, FLAGS)
    if flags["folder"]:
        check_writable("--folder", user_path(flags["folder"]))
    from ringbpt.bench.data import bench

    bench(**flags)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
