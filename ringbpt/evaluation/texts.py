"""Passkey texts: a number hidden at a chosen depth of real text, and asked for at its end; made offline.

The haystack is the source of Python's standard library with its digits taken out, so that the only number is the key.
Ref: the task is that of Landmark Attention, arXiv:2305.16300, section 4.2.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ringbpt.config import PythonDatasetConfig, UserError
from ringbpt.data.reading.sources import PythonSource

NEEDLE = "\nThe pass key is {key}. Remember it: {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
ANSWER = " {key}"  # with the space: most tokenizers have it at the head of a word
KEY_DIGITS = 5
LONGEST = 1 << 24  # tokens of a text: what it is cut from has a few million characters, again and again


class Passkey(NamedTuple):
    """before + needle + after + question is the prompt, answer what is asked for; each a text."""

    before: str
    needle: str
    after: str
    question: str
    answer: str


def python_texts(split: str, path: str = "") -> list[str]:
    """The files of one split of the standard library's source, or of a folder's."""
    source = PythonSource(PythonDatasetConfig(path=path, split=split))
    return [str(source[i]["text"]) for i in range(len(source))]


class Haystack:
    """Endless text, cut at any place: the files of one split, one after the other."""

    def __init__(self, split: str = "heldout", path: str = ""):
        text = "\n".join(python_texts(split, path))
        self._text = re.sub(r"[0-9]+", "", text).encode("ascii", "ignore").decode()

    def cut(self, rng: np.random.Generator, characters: int) -> str:
        start = int(rng.integers(0, len(self._text)))
        text = self._text[start : start + characters]
        while len(text) < characters:
            text += self._text[: characters - len(text)]
        return text


def room_of(length: int, count: Callable[[str], int], key: str = "9" * KEY_DIGITS) -> int:
    """How many of a text's tokens are left for what the key is hidden in. Raises UserError where none are, and for a
    text that is too long."""
    if length > LONGEST:
        raise UserError(f"a passkey text of {length} tokens: {LONGEST} at most")
    room = length - count(NEEDLE.format(key=key) + QUESTION + ANSWER.format(key=key))
    if room < 0:
        raise UserError(f"a passkey text of {length} tokens has no room for its question: {length - room} would do")
    return room


def make_passkey(
    haystack: Haystack, rng: np.random.Generator, length: int, depth: float, count: Callable[[str], int] = len
) -> Passkey:
    """A text of at most `length` tokens, as `count` counts them, answer included; depth 0 is the start, 1 the end.

    Raises UserError where the needle and the question alone are longer.
    """
    key = str(rng.integers(10 ** (KEY_DIGITS - 1), 10**KEY_DIGITS))
    needle, answer, room = NEEDLE.format(key=key), ANSWER.format(key=key), room_of(length, count, key)
    hay = haystack.cut(rng, room)
    # A tokenizer makes fewer tokens than characters: take more text until it is full, then cut back to fit.
    while count(hay) < room:
        hay += haystack.cut(rng, max(room - count(hay), 16))
    while (over := count(hay) - room) > 0:
        hay = hay[: -max(over, 1)]
    place = round(depth * len(hay))
    return Passkey(hay[:place], needle, hay[place:], QUESTION, answer)


def training_rows(count: int, length: int, seed: int, path: str = "") -> Iterator[dict[str, str]]:
    """A course in finding keys, to be read in this order, for a JSONL: {given, again, between, answer} of one text.

    The key can be known where it is said again, in `again` and in `answer`: only these are to take loss, and both do,
    since the near one is soon learned and teaches the far one. The first third of the texts are as short as they can
    be, so that there are many; then they grow up to `length` characters, and most keys lie in the first half, where
    the way to them is long. All keys are equally likely.
    """
    rng, haystack = np.random.default_rng(seed), Haystack("train", path)
    shortest = len((NEEDLE + QUESTION + ANSWER).replace("{key}", "0" * KEY_DIGITS))
    for i in range(count):
        grown = min(1.0, max(0.0, 4 * i / count - 4 / 3))  # from a third of the texts to 7/12 of them
        longest = shortest + 50 + grown * (length - shortest - 50)
        size = int(shortest + (longest + 1 - shortest) * rng.uniform() ** (1 + grown))
        text = make_passkey(haystack, rng, min(size, length), float(rng.uniform() ** (1 + grown)))
        key = text.answer.strip()
        first, middle, last = text.needle.split(key)
        given, between = text.before + first + key + middle, last + text.after + text.question
        yield {"given": given, "again": key, "between": between, "answer": text.answer}
