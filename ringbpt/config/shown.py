"""What others have written, made fit to be shown: no control characters, no secrets, one line where one is wanted.

A file's name, a key, a tensor's name or a document may hold what a terminal obeys (ESC, CR, the C1 controls) or what
turns the order of a line round (bidirectional overrides). Shown are such characters as Python would write them.
"""

import json
import os
import re
import sys
import unicodedata
from typing import Any, TextIO

LONGEST_LINE = 2000  # characters of a message; the rest says no more
_PLAIN = re.compile(r"[\n\t\x20-\x7e]*")
# Who may look at what: variables whose values are nobody's to see.
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
_PASSWORD = re.compile(r"(?<=://)([^\s/@:'\"]*):[^\s/'\"]*@")
_HIDDEN = "***"


def printable(text: str) -> str:
    r"""The text with every control, format and half character escaped, but \n and \t; secrets masked."""
    text = without_secrets(text)
    return text if _PLAIN.fullmatch(text) else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character
    return character.encode("unicode_escape").decode("ascii")


def for_terminal(text: str, out: TextIO | None = None) -> str:
    """The text as it may be written to `out` (standard output): on a terminal printable, to a file or a program as it
    is, since it is its content that they ask for."""
    return printable(text) if (out or sys.stdout).isatty() else text


def one_line(text: object, most: int = 200) -> str:
    """A message in one printable line of at most `most` characters; of an exception without words, its type."""
    words = " ".join(str(text).split()) or type(text).__name__
    if len(words) > most:  # what would work stands at its end
        words = f"{words[: most - most // 4 - 5]} ... {words[len(words) - most // 4 :]}"
    return printable(words)


def json_line(value: Any) -> str:
    """A value as JSON in one line, in which nothing stands that a terminal obeys: escapes mean the same to a reader."""
    text = json.dumps(value, ensure_ascii=False)
    if _PLAIN.fullmatch(text):
        return text
    return "".join(json.dumps(one)[1:-1] if _escaped(one) != one else one for one in text)


def without_secrets(text: str) -> str:
    """The text with the password of a URL, and what the environment keeps for Hugging Face and Weights & Biases, as
    ***."""
    if "://" in text:
        text = _PASSWORD.sub(rf"\1:{_HIDDEN}@", text)
    for name in _SECRETS:
        if len(secret := os.environ.get(name, "").strip()) >= 8:
            text = text.replace(secret, _HIDDEN)
    return text
