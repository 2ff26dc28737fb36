"""Environments for --rollout.environment=scripts/environments.py:NAME, and what configs/agent.py needs of the second.

python scripts/environments.py --output=runs/search

Calculator   a question, a calculator to call, and an answer
Search       a key in a text that the policy doesn't see: it asks what stands round a word, and says the key

An environment is any class with these two methods, or a function that makes one; of each trajectory it is a new one.
reset(row) -> messages that a conversation begins with, of a row of --rollout.prompts. step(messages) -> (messages that
follow the policy's turn, which is the last of those given; what the turn has earned; whether the trajectory is over).
"""

import json
import re
import sys
from collections.abc import Iterator
from operator import add, mul, sub
from random import Random
from string import ascii_uppercase, digits
from typing import Any

Message = dict[str, Any]


class Calculator:
    """A turn that begins with = is calculated; any other is the answer, and worth 1 if it is row["answer"]."""

    def reset(self, row: dict) -> list[Message]:
        self.answer = row["answer"]
        return [{"role": "user", "content": row["question"]}]

    def step(self, messages: list[Message]) -> tuple[list[Message], float, bool]:
        said = messages[-1]["content"].strip()
        if not said.startswith("="):
            return [], float(said == self.answer), True
        return [{"role": "tool", "content": calculated(said[1:])}], 0.0, False


def calculated(text: str) -> str:
    """What a + b, a - b or a * b is; ? of any other text."""
    match = re.fullmatch(r" *(-?[0-9]{1,9}) *([-+*]) *(-?[0-9]{1,9}) *", text)
    return str({"+": add, "-": sub, "*": mul}[match[2]](int(match[1]), int(match[3]))) if match else "?"


class Search:
    """A key stands behind row["word"] in row["text"], of which the policy sees what is round the words it asks for. A
    turn that is a number is the answer behind a first search. Worth: half for searching the word, half for the key;
    a tenth for what else is found, and for any other number.
    """

    window = 2

    def reset(self, row: dict) -> list[Message]:
        self.row, self.searched = row, False
        return [{"role": "user", "content": row["word"]}]

    def step(self, messages: list[Message]) -> tuple[list[Message], float, bool]:
        said = messages[-1]["content"].strip()
        if said.isdecimal():
            return [], (0.5 if said == self.row["label"] else 0.1) if self.searched else 0.0, True
        place = self.row["text"].find(said) if said else -1
        worth = 0.5 if said == self.row["word"] else 0.1 if place >= 0 else 0.0
        earned, self.searched = 0.0 if self.searched else worth, True
        found = self.row["text"][max(0, place - self.window) : place + len(said) + self.window] if place >= 0 else "?"
        return [{"role": "tool", "content": found}], earned, False


# --- a tokenizer of single characters, and texts with keys, for configs/agent.py ---

WORDS, FILLER = ascii_uppercase[:10], "abc."
SPECIAL = ("<|user|>", "<|assistant|>", "<|tool|>", "<|end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tokenizer() -> dict[str, Any]:
    """The files of a chat model's tokenizer, by name, whose tokens are characters."""
    vocab = {text: number for number, text in enumerate((*SPECIAL, *WORDS, *digits, *FILLER, "?"))}
    alike = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "tokenizer.json": {
            "version": "1.0",
            "model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "?"},
            "decoder": {"type": "Fuse"},
            "added_tokens": [{"id": vocab[text], "content": text} | alike for text in SPECIAL],
        },
        "tokenizer_config.json": {"eos_token": "<|end|>", "chat_template": TEMPLATE},
    }


def rows(count: int, length: int = 300) -> Iterator[dict[str, Any]]:
    """Texts in which each word stands once, a key behind it."""
    rng = Random(0)
    for _ in range(count):
        keys = {word: rng.choice(digits) for word in WORDS}
        parts = [*map(str.__add__, keys, keys.values()), *[""] * (length // 2)]
        rng.shuffle(parts)
        word = rng.choice(WORDS)
        yield {"word": word, "text": "".join(part + 2 * rng.choice(FILLER) for part in parts), "label": keys[word]}


def main(argv: list[str]) -> int:
    from ringbpt.config import Flag, check_writable, json_line, printed_help, read_flags, user_path

    own = {
        "output": Flag(str, "", "the folder to write", required=True),
        "count": Flag(int, 2000, "of texts", at_least=1, at_most=1 << 20),
    }
    if printed_help(argv, doc=__doc__, own=own):
        return 0
    flags = read_flags(argv, own)
    output = user_path(flags["output"])
    check_writable("--output", output)
    output.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer().items():
        (output / name).write_text(json.dumps(content))
    (output / "prompts.jsonl").write_text("".join(json_line(row) + "\n" for row in rows(flags["count"])))
    print(f"wrote {output}: a tokenizer, and prompts.jsonl of {flags['count']} texts with keys")
    return 0


if __name__ == "__main__":
    from ringbpt.config import run_main

    sys.exit(run_main(main))
