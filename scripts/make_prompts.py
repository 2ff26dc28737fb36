"""Prompts whose answers a program can check, for configs/grpo.py: each asks for one kind of characters.

python scripts/make_prompts.py --output=runs/prompts
"""

import sys

from ringbpt.config import Flag, check_writable, json_line, printed_help, read_flags, run_main, user_path

KINDS = {"lower": str.islower, "upper": str.isupper, "digit": str.isdigit}
FLAGS = {
    "output": Flag(str, "", "the folder to write", required=True),
    "count": Flag(int, 240, "of prompts", at_least=1, at_most=1 << 20),
}


def reward(prompt: str, completion: str, row: dict) -> float:
    """The share of the answer's characters that are of the kind that was asked for."""
    return sum(map(KINDS[row["label"]], completion)) / len(completion) if completion else 0.0


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    flags = read_flags(argv, FLAGS)
    output = user_path(flags["output"])
    check_writable("--output", output)
    output.mkdir(parents=True, exist_ok=True)
    kinds = list(KINDS)
    rows = [{"prompt": f"{n}: {kinds[n % 3]} ", "label": kinds[n % 3]} for n in range(flags["count"])]
    (output / "prompts.jsonl").write_text("".join(json_line(row) + "\n" for row in rows))
    print(f"wrote {output}/prompts.jsonl: {len(rows)} prompts")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
