"""Writes passkey texts for training: python scripts/make_passkey.py --output=data/passkey.jsonl"""

import argparse
import json
from pathlib import Path

from ringbpt.evaluation.texts import training_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=27000)
    parser.add_argument("--length", type=int, default=1022, help="characters; a bos and an eos are added to them")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w") as file:
        for row in training_rows(args.count, args.length, args.seed):
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
