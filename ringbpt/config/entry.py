"""The flags of an entry that is no training run: a handful, each with its type, its default and a line of help."""

import difflib
from pathlib import Path
from typing import Any, NamedTuple

from ringbpt.config.checks import nearest_name
from ringbpt.config.fields import UserError
from ringbpt.config.parse import read_value


class Flag(NamedTuple):
    kind: Any
    default: Any
    help: str


def read_own_flags(argv: list[str], flags: dict[str, Flag]) -> dict[str, Any]:
    """`--name=value`, `--name value` and `--flag` -> every flag's value; one of kind list may be given several times.

    Raises UserError for what is no flag, is given twice, or is of another type.
    """
    given: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in flags:
            near = nearest_name(name, flags)
            raise UserError(f"{word.partition('=')[0]!r} is no flag here: did you mean --{near}?")
        kind, default, _ = flags[name]
        if not equals and kind is bool:
            text = "True"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{name} needs a value: --{name}=...")
            text = rest.pop(0)
        if kind is list:
            given.setdefault(name, []).append(text)
            continue
        if name in given:
            raise UserError(f"--{name} is given twice, the second time as '{text}': leave one of them out")
        given[name] = read_value(f"--{name}", text, kind, default)
    return {name: flag.default for name, flag in flags.items()} | given


def own_help(doc: str, flags: dict[str, Flag]) -> str:
    lines = [doc.strip(), ""]
    for name, (_, default, line) in flags.items():
        shown = f"  --{name}" if default in ("", None, [], False) else f"  --{name}={default}"
        lines.append(f"{shown:<40} {line}")
    return "\n".join([*lines, ""])


def split_flags(argv: list[str], flags: dict[str, Flag]) -> tuple[dict[str, Any], list[str]]:
    """(every flag's value, the words that are none of `flags`), for an entry that takes a training run's flags too."""
    mine, others, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        name, equals, _ = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in flags:
            # The training run's parser knows nothing of these, and would name a flag of its own.
            if word.startswith("--") and (near := difflib.get_close_matches(name, flags, 1, 0.85)):
                raise UserError(f"--{name} is no flag: did you mean --{near[0]}?")
            others.append(word)
            continue
        mine.append(word)
        if not equals and flags[name].kind is not bool and words and not words[0].startswith("--"):
            mine.append(words.pop(0))
    return read_own_flags(mine, flags), others


def check_folders(values: dict[str, Any], *names: str) -> None:
    """Raises UserError where a file that is to be written, once the work is done, has no folder to be in."""
    for name in names:
        folder = Path(values[name]).expanduser().parent
        if values[name] and not folder.is_dir():
            raise UserError(f"--{name}={values[name]}: there is no folder {folder}: make it first")
