"""Files that somebody else has written: read within limits, whatever they turn out to be, and their JSON by its types.

Everything here raises UserError in one line. A file is a regular one or is not read: a pipe never ends, nor does
/dev/zero. JSON has a depth, a number of values and a size that are more than anything honest has, no NaN, no number
beyond what a float holds, no key twice and no half of a surrogate pair.
"""

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO, get_args

from ringbpt.config.shown import one_line
from ringbpt.config.values import KINDS, LARGEST_INT, Flag, UserError

MIB = 1 << 20
SETTINGS_BYTES = 64 * MIB  # of a JSON file; an index of 100,000 tensors has 10
MOST_VALUES = 4_000_000  # of a JSON file: each costs about a hundred bytes
DEPTH = 64  # of lists and objects in each other
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def user_path(text: str) -> Path:
    """A path as a user writes it: ~ is their home, where there is such a user."""
    return Path(os.path.expanduser(text))


@contextmanager
def open_regular(file: Path | str, where: str = "") -> Iterator[BinaryIO]:
    """A regular file, open for reading; where: the culprit of a message, else the file itself."""
    where = where or str(file)
    try:
        # Without O_NONBLOCK the open of a pipe would wait for somebody who writes into it.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {getattr(error, 'strerror', None) or error}") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise UserError(f"{where}: {what}, where a file is expected")
    with open(descriptor, "rb") as stream:
        yield stream


def read_file(file: Path | str, most: int = SETTINGS_BYTES, where: str = "") -> bytes:
    """The content of a regular file of at most `most` bytes."""
    where = where or str(file)
    with open_regular(file, where) as stream:
        try:
            if (size := os.fstat(stream.fileno()).st_size) > most:
                raise UserError(f"{where}: {size} bytes, and no such file has more than {most}")
            content = stream.read(most + 1)
        except OSError as error:
            raise UserError(f"{where}: {error.strerror}") from None
    if len(content) > most:  # it has grown, or its size was a lie, as those in /proc are
        raise UserError(f"{where}: more than {most} bytes, and no such file has so many")
    return content


def read_json(file: Path, most: int = SETTINGS_BYTES) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError with file and line."""
    value = parse_json(read_file(file, most), str(file))
    if not isinstance(value, dict):
        raise UserError(f"{file}:1: it must hold a JSON object")
    return value


def parse_json(content: bytes | str, where: str, numbered: bool = True) -> Any:
    """What JSON text says. Raises UserError that begins with `where`, and (numbered) the line inside of the text."""
    try:
        return strict_json(content, where)
    except (ValueError, RecursionError) as error:
        line = f":{getattr(error, 'lineno', 1)}" if numbered else ""
        raise UserError(f"{where}{line}: malformed JSON; copy it again") from None


def strict_json(content: bytes | str, where: str) -> Any:
    """What JSON text says. Raises ValueError, or RecursionError, for what is none, and UserError for too much of it."""
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    if sum(map(text.count, ",[{")) > MOST_VALUES:
        raise UserError(f"{where}: more than {MOST_VALUES} values, and no such file has so many")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise UserError(f"{where}: {_twice(key for key, _ in pairs)} stands there twice: leave one of them out")
        return found

    value = json.loads(text, object_pairs_hook=once, parse_constant=_no_number, parse_float=_finite)
    check_depth(value, where)
    if _HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{where}: half of a surrogate pair, which is no text; copy it again") from None
    return value


def _twice(keys: Iterable[str]) -> str:
    return Counter(keys).most_common(1)[0][0]


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON's")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is beyond every float")
    return number


def check_depth(value: Any, where: str) -> None:
    """Raises UserError for lists and objects that stand in each other more than DEPTH deep."""
    level = [value]
    for _ in range(DEPTH + 1):
        level = [
            item
            for holder in level
            if isinstance(holder, dict | list)
            for item in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise UserError(f"{where}: JSON that is nested more than {DEPTH} deep")


def shown(value: Any) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def is_of(kind: Any, value: Any) -> bool:
    """Whether a value of JSON is of a type: a whole number is a number too, and True is none."""
    return type(value) is kind or (kind is float and type(value) is int)


def read_field(value: Any, flag: Flag, label: str) -> Any:
    """A field's value, of the type and within the bounds of our flag: text is no number, 288.5 no size.

    Raises UserError, with `label` as the culprit.
    """
    kind = next(member for member in (*get_args(flag.kind), flag.kind) if member is not NoneType)
    if value is None and NoneType in get_args(flag.kind):
        return None
    if not is_of(kind, value) or (kind is float and not is_finite(value)):
        raise UserError(f"{label}={shown(value)} is not {KINDS[kind]}")
    if kind is int and abs(value) > LARGEST_INT:
        raise UserError(f"{label}={shown(value)} is above {LARGEST_INT}")
    if kind is str and flag.choices and value not in flag.choices:
        raise UserError(f"{label}={shown(value)} is none of {', '.join(filter(None, flag.choices))}")
    if flag.at_least is not None and value < flag.at_least:
        raise UserError(f"{label}={value} is below {flag.at_least}")
    if flag.above is not None and value <= flag.above:
        raise UserError(f"{label}={value} is not above {flag.above}")
    if flag.at_most is not None and value > flag.at_most:
        raise UserError(f"{label}={value} is above {flag.at_most}")
    if flag.below is not None and value >= flag.below:
        raise UserError(f"{label}={value} is not below {flag.below}")
    return kind(value)


def is_finite(value: float) -> bool:
    """Whether a number of JSON's is one that a float holds."""
    try:
        return math.isfinite(float(value))
    except OverflowError:  # a whole number of hundreds of digits
        return False


@contextmanager
def refusing(where: str, advice: str = "") -> Iterator[None]:
    """Whatever a library raises over a file becomes a UserError with `where` as the culprit.

    A panic of Rust's is no Exception for Python, and is one for us.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{where}: {one_line(error)}{advice}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """While it lasts, nothing reaches the process's stderr: a library's own complaints, where the exception says it."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
