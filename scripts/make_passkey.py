"""Writes passkey texts for training: python scripts/make_passkey.py --output=data/passkey.jsonl"""

import json
import sys
from itertools import chain

from ringbpt.config import Flag, check_writable, printed_help, read_flags, run_main, user_path

FLAGS = {
    "output": Flag(str, "", "the .jsonl file to write", required=True),
    "count": Flag(int, 27000, "how many texts", at_least=1, at_most=1 << 30),
    "length": Flag(int, 1022, "characters; a bos and an eos are added to them", at_least=1, at_most=1 << 24),
    "seed": Flag(int, 0, at_least=0),
}


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    flags = read_flags(argv, FLAGS)
    output = user_path(flags["output"])
    check_writable("--output", output, folder=False)
    from ringbpt.evaluation.texts import training_rows

    rows = training_rows(flags["count"], flags["length"], flags["seed"])
    first = next(rows)  # a length that has no room is told before anything is written
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w") as file:
        for row in chain([first], rows):
            file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
