"""Prompts whose answers a program can check, of one of two tasks.

python scripts/make_prompts.py --output=runs/prompts                   for configs/grpo.py: each asks for one kind of
                                                                       characters
python scripts/make_prompts.py --task=passkey --output=runs/passkeys   for configs/grpo_passkey.py: each hides a key,
                                                                       a letter and a digit, in a long text
"""

import random
import sys
from collections.abc import Iterator
from string import ascii_uppercase, digits

from ringbpt.config import Flag, check_writable, json_line, printed_help, read_flags, run_main, user_path

KINDS = {"lower": str.islower, "upper": str.isupper, "digit": str.isdigit}
FILLER = "the grass is green. the sky is blue. the sun is yellow. here we go. there and back again. "
FLAGS = {
    "output": Flag(str, "", "the folder to write", required=True),
    "task": Flag(str, "kinds", "which", choices=("kinds", "passkey")),
    "count": Flag(int, 240, "of prompts", at_least=1, at_most=1 << 20),
    "length": Flag(int, 1022, "characters of a prompt with a key", at_least=48, at_most=1 << 24),
}


def reward(prompt: str, completion: str, row: dict) -> float:
    """The share of the answer's characters that are of the kind that was asked for."""
    return sum(map(KINDS[row["label"]], completion)) / len(completion) if completion else 0.0


def found_key(prompt: str, completion: str, row: dict) -> float:
    """The mean over the key's two characters: 1 where it is said, 0.1 for another one of its kind."""
    kinds = zip(completion, row["label"], (str.isupper, str.isdigit), strict=False)
    return sum(1.0 if said == key else 0.1 * is_kind(said) for said, key, is_kind in kinds) / len(row["label"])


def kinds(count: int) -> Iterator[dict]:
    for n in range(count):
        kind = list(KINDS)[n % 3]
        yield {"prompt": f"{n}: {kind} ", "label": kind}


def passkeys(count: int, length: int) -> Iterator[dict]:
    rng = random.Random(0)
    for _ in range(count):
        key = rng.choice(ascii_uppercase[:10]) + rng.choice(digits)
        needle, question = f"the key is {key}. ", "what is the key? "
        filler = FILLER * (length // len(FILLER) + 2)
        place, start = rng.randrange(length - len(needle) - len(question)), rng.randrange(len(FILLER))
        text = filler[start : start + length - len(needle) - len(question)]
        yield {"prompt": text[:place] + needle + text[place:] + question, "label": key}


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    flags = read_flags(argv, FLAGS)
    output = user_path(flags["output"])
    check_writable("--output", output)
    output.mkdir(parents=True, exist_ok=True)
    rows = list(kinds(flags["count"]) if flags["task"] == "kinds" else passkeys(flags["count"], flags["length"]))
    (output / "prompts.jsonl").write_text("".join(json_line(row) + "\n" for row in rows))
    print(f"wrote {output}/prompts.jsonl: {len(rows)} prompts")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
