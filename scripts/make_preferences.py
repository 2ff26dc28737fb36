"""A preference set to learn from without a network: questions, and two answers each, of which one was chosen.

  python scripts/make_preferences.py --output=FOLDER [--pairs=2000] [--held_out=1000] [--seed=0]

Writes pairs.jsonl and pairs_held_out.jsonl ({"prompt", "chosen", "rejected"}), and the same answers one by one as
answers.jsonl and answers_held_out.jsonl ({"prompt", "completion", "label"}). An answer repeats the words of its
question: the chosen one in their order, the rejected one in another. Nothing else tells them apart.
"""

import json
import random
import sys

from ringbpt.config import Flag, check_writable, printed_help, read_flags, run_main, user_path

FLAGS = {
    "output": Flag(str, "", "the folder, made where it is not there", required=True),
    "pairs": Flag(int, 2000, "to learn from", at_least=1, at_most=1 << 30),
    "held_out": Flag(int, 1000, "for evaluations", at_least=1, at_most=1 << 30),
    "seed": Flag(int, 0, "of every choice", at_least=0),
}
WORDS = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay"]


def pair(chosen: random.Random) -> dict[str, str]:
    words = chosen.sample(WORDS, 3)
    other = words[:]
    while other == words:
        chosen.shuffle(other)
    return {"prompt": f"say {' '.join(words)}:", "chosen": f" {' '.join(words)}", "rejected": f" {' '.join(other)}"}


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    args = read_flags(argv, FLAGS)
    folder, source = user_path(args["output"]), random.Random(args["seed"])
    check_writable("--output", folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("", args["pairs"]), ("_held_out", args["held_out"])):
        pairs = [pair(source) for _ in range(count)]
        answers = [
            {"prompt": each["prompt"], "completion": each[which], "label": which == "chosen"}
            for each in pairs
            for which in ("chosen", "rejected")
        ]
        for kind, rows in (("pairs", pairs), ("answers", answers)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{kind}{name}.jsonl").write_text(text, encoding="utf-8")
    print(f"{folder}: {args['pairs']:,} pairs, {args['held_out']:,} held out, and their answers one by one")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
