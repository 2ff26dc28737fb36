"""What every entry shares: the one scanner of `--name=value`, the help that declarations make, and `run_main`.

An entry has flags of its own, {name: Flag}, or takes a training run's, or both.
"""

import difflib
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from typing import Any, TextIO

from ringbpt import ending
from ringbpt.config.aliases import without_effect
from ringbpt.config.fields import RUN_FLAGS
from ringbpt.config.foreign import user_path
from ringbpt.config.places import check_writable
from ringbpt.config.shown import LONGEST_LINE, one_line, printable
from ringbpt.config.values import BOOLS, Flag, UserError, check_value, nearest_name, read_value

# --- reading ---


def scan(argv: list[str], flags: Mapping[str, Flag]) -> tuple[dict[str, Any], list[str]]:
    """(the values given of `flags`, in order, of their declared types; the words that are none of them).

    A flag is written `--name=value`, `--name value`, one that is on or off `--name` or `--noname`, and one that has a
    `bare` value `--name` too. Raises UserError for one that is given twice, lacks its value, or is of another type.
    """
    given: dict[str, Any] = {}
    others, words = [], list(argv)
    while words:
        word = words.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        group, dot, leaf = name.rpartition(".")
        positive = f"{group}{dot}{leaf.removeprefix('no')}"
        if name not in flags and not equals and positive in flags and flags[positive].kind is bool:
            name, equals, text = positive, "=", "False"
        if not word.startswith("--") or name not in flags:
            others.append(word)
            continue
        flag = flags[name]
        if not equals and flag.kind is bool:
            text = words.pop(0) if words and words[0].lower() in BOOLS else "True"
        elif not equals:
            if flag.bare and (not words or words[0].startswith("--")):
                words.insert(0, flag.bare)
            if not words or words[0].startswith("--"):
                example = "..." if flag.default in (None, "", []) else flag.default
                raise UserError(f"--{name} needs a value: --{name}={example}")
            text = words.pop(0)
        if flag.kind is list:
            given.setdefault(name, []).append(text)
            continue
        if name in given:
            raise UserError(f"--{name} is given twice, the second time as '{text}': leave one of them out")
        given[name] = read_value(f"--{name}", text, flag.kind, flag.default)
    return given, others


def split_flags(argv: list[str], flags: Mapping[str, Flag]) -> tuple[dict[str, Any], list[str]]:
    """(the value of each of an entry's own flags; the words that are none of them), for one that takes a run's too."""
    given, others = scan(argv, flags)
    for word in others:
        name = word.removeprefix("--").partition("=")[0]
        # The reader of a run's flags knows nothing of these, and would name a flag of its own.
        if word.startswith("--") and (near := difflib.get_close_matches(name, flags, 1, 0.85)):
            raise UserError(f"--{name} is no flag: did you mean --{near[0]}?")
    for name, value in given.items():
        check_value(name, flags[name], value)
    return {name: flag.default for name, flag in flags.items()} | given, others


def read_flags(argv: list[str], flags: Mapping[str, Flag]) -> dict[str, Any]:
    """The value of each of an entry's own flags. Raises UserError for a word that is none, and for a wrong value."""
    values, others = split_flags(argv, flags)
    if others:
        name = others[0].partition("=")[0]
        raise UserError(f"{name!r} is no flag here: did you mean --{nearest_name(name.removeprefix('--'), flags)}?")
    for name, flag in flags.items():
        if flag.required and not values[name]:
            raise UserError(f"--{name} is missing: {flag.help}")
    return values


def check_folders(values: dict[str, Any], *names: str) -> None:
    """Raises UserError where a file that is to be written, once the work is done, has no folder to be in."""
    for name in names:
        file = user_path(values[name])
        if values[name] and values[name] != STDOUT:
            check_writable(f"--{name}", file, folder=False)
            if not file.parent.is_dir():
                raise UserError(f"--{name}={values[name]}: there is no folder {file.parent}: make it first")


# --- JSON for other programs ---

STDOUT = "-"
JSON = Flag(str, "", "the report as JSON, in a file; alone: on standard output, and nothing else there", bare=STDOUT)


@contextmanager
def json_to(where: str) -> Iterator[Callable[[str], None]]:
    """write(text), which puts an entry's JSON where its --json says: "" nowhere, a file, or STDOUT.

    On standard output it is alone: whatever else is printed meanwhile goes to standard error. write raises UserError
    where the file cannot be written.
    """
    out = sys.stdout

    def write(text: str) -> None:
        if where == STDOUT:
            out.write(text)
        elif where:
            try:
                user_path(where).write_text(text, encoding="utf-8")
            except OSError as error:
                raise UserError(f"--json={where}: {error.strerror}; give another name", code=4) from None

    with redirect_stdout(sys.stderr) if where == STDOUT else nullcontext():
        yield write


# --- help ---

# The entries' own: they say where flags come from, or ask about them, and are none.
ENTRY_FLAGS = {
    "config": Flag(str, "", "a recipe, configs/<name>.py; the flags after it override it", shown="start from"),
    "print_config": Flag(bool, False, "every flag, as this command line resolves it"),
    "help": Flag(str, "", "these lines, or --help=llama, --help=all: every flag of a group"),
}
SECTIONS = ("start from", "devices", "model", "data", "training", "the run")


def _line(name: str, flag: Flag, room: int = 999) -> str:
    """A flag's name and default, its help, and as many of its choices as have room."""
    shown = f"  --{name}" if flag.default in ("", None, []) else f"  --{name}={flag.default}"
    names = [*filter(None, flag.choices), *(f"{prefix}::" for prefix in flag.prefixes)]
    kept = [one for at, one in enumerate(names, 1) if len(", ".join(names[:at])) <= room]
    listed = ", ".join([*kept, *(["..."] if len(kept) < len(names) else [])])
    help = flag.help or (f"no effect: {without_effect(name)}" if without_effect(name) else "")
    if flag.usual:
        usual = "None: {:g}, on loaded weights {:g}".format(*flag.usual)
        help = f"{help}; {usual}" if help else usual
    return f"{shown:<55} {f'{help} ({listed})' if help and listed else help or listed}".rstrip()


def help_text(verb: str = "train", group: str = "") -> str:
    """A run's flags with their defaults: those that people use, on a screen and a half, or every one of a group.

    group: "llama", "train_dataset", ..., or "all". Raises UserError for another.
    """
    if group:
        groups = ["all", *dict.fromkeys(name.partition(".")[0] for name in RUN_FLAGS if "." in name)]
        if group not in groups:
            raise UserError(
                f"--help={group} is none of {', '.join(groups)}: did you mean {nearest_name(group, groups)}?"
            )
        return "\n".join(
            _line(name, flag) for name, flag in RUN_FLAGS.items() if group in ("all", name.partition(".")[0])
        )
    lines = [
        f"usage: python -m ringbpt.{verb} [--config=configs/<name>.py] [--name=value ...]",
        "",
        "Flags that name no recipe, model, data or tokenizer start from configs/debug.py. A flag that is on or off may",
        "be written --name and --noname.",
    ]
    for section in SECTIONS:
        lines += ["", f"{section} (eval_dataset has the same flags):" if section == "data" else f"{section}:"]
        for name, flag in (ENTRY_FLAGS | RUN_FLAGS).items():
            if flag.shown == section and not name.startswith("eval_dataset."):
                lines.append(_line(name, flag, room=56))
    more = "all flags of a group: --help=llama, of every group: --help=all; as this command line resolves them: "
    return "\n".join([*lines, "", f"{more}--print_config", ""])


def printed_help(
    argv: list[str], verb: str = "", doc: str | None = None, own: Mapping[str, Flag] | None = None
) -> bool:
    """Prints the help that the words ask for, and says whether they did.

    doc and own are an entry's docstring and its own flags; verb is its name where it takes a run's flags too.
    """
    asked = [word for word in argv if word in ("-h", "--help") or word.startswith("--help=")]
    if not asked:
        return False
    group = asked[0].partition("=")[2] if verb else ""
    text = help_text(verb, group) if verb else ""
    if doc and not group:
        text = "\n".join([doc.strip(), "", *(_line(name, flag) for name, flag in (own or {}).items()), "", text])
    print(text)
    return True


# --- running ---


class _Printed(logging.Handler):
    """What the house logs, said on stdout as it comes."""

    def emit(self, record: logging.LogRecord) -> None:
        say(printable(self.format(record)))


_LINES = threading.RLock()  # a signal's handler may have a line to say too


def say(text: str) -> None:
    """Prints a line for whoever still reads: a pipe that was closed, or a full disk, ends the printing and no work."""
    _print_whole(text, sys.stdout)


def complain(text: str) -> None:
    """Prints a line on standard error for whoever still reads, as `say` does on standard output."""
    _print_whole(text, sys.stderr)


def _print_whole(text: str, stream: TextIO) -> None:
    """A line that no other thread's comes into, nor another process's where it has less than 4,096 bytes (PIPE_BUF).

    With its end in the same write: print's own is a second one, and reaches the pipe by itself where nothing is
    buffered, as with PYTHONUNBUFFERED in most containers. What the stream's encoding lacks is escaped.
    """
    encoding = getattr(stream, "encoding", None) or "utf-8"
    line = f"{text}\n".encode(encoding, "backslashreplace").decode(encoding)
    try:
        with _LINES:
            print(line, end="", file=stream, flush=True)
    except OSError:
        _stop_printing(stream)


def _stop_printing(stream: TextIO) -> None:
    """Whatever is printed from now on, and what is left to be flushed as the process ends, goes nowhere."""
    with suppress(OSError, ValueError, AttributeError):  # no file behind it, as in a notebook
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run_main(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Runs an entry on the command line; returns its exit code: `sys.exit(run_main(main))`.

    A UserError is one line on stderr and its own code; so is a run that was told to stop (Ctrl-C: 130), with what was
    saved; memory that is too small is a line and 2, a pipe that nobody reads 141. Whatever else is a fault of ours and
    keeps its traceback. Processes that wait for this one hear of its end.
    """
    log, printed = logging.getLogger("ringbpt"), _Printed(logging.INFO)
    log.addHandler(printed)
    log.setLevel(logging.INFO)
    log.propagate = False  # a handler that some library gave to all logs would say each line again, on stderr
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed from the start
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (it lives as long as the process)
    try:
        code = _code_of(main, sys.argv[1:] if argv is None else argv)
        ending.end(code)
        return code
    finally:
        log.removeHandler(printed)
        log.propagate = True


def _code_of(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    try:
        code = main(argv) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        complain(f"error: {one_line(error, LONGEST_LINE)}")
        return error.code
    except ending.Stopped as stop:
        complain(printable(f"{ending.stopped_by(stop.code)}: {stop}"))
        return stop.code
    except KeyboardInterrupt:
        complain("interrupted")
        return ending.INTERRUPTED
    except BrokenPipeError:  # whoever reads the output has had enough of it, as `head` does
        _stop_printing(sys.stdout)
        return 141
    except Exception as error:
        if line := _out_of_memory(error):
            complain(f"error: {line}")
            return 2
        if not ending.is_awaited():
            raise
        traceback.print_exc()
        return 1


def _out_of_memory(error: Exception) -> str | None:
    """What to say of memory that is too small, or None; for a device's, jax has no type of its own."""
    if isinstance(error, MemoryError):
        return f"this machine's memory is too small: {one_line(error, 200) or 'Python says no more'}"
    if type(error).__name__ != "JaxRuntimeError" or "RESOURCE_EXHAUSTED" not in str(error):
        return None
    asked = one_line(str(error).partition("RESOURCE_EXHAUSTED: ")[2].partition(" [")[0], 200)
    return (
        f"a device's memory is too small: {asked}; python -m ringbpt.plan with these flags, "
        "--topology=<machine> and --suggest says what takes it and what would fit"
    )
