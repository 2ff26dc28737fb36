"""What a flag is, and from text to its typed value: its type, its choices, its bounds, literals, a mesh's sizes.

Text is parsed as literals and never evaluated. Each mistake raises UserError with one line that says what would work.
"""

import ast
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import NoneType
from typing import Any, get_args

from ringbpt.dims import AXES, MeshShape


class UserError(Exception):
    """A mistake of the user's: one line, naming the flag or file:line, what is wrong, and what would work.

    The entry points print it on stderr and exit with `code`: 2 bad input, 4 storage.
    """

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Flag:
    """One flag: what a value may be, what it is if nothing is said, and a line of help.

    kind: bool, int, float, str, one of them `| None`, or list, which collects the texts of a repeated flag.
    choices: all there are. prefixes: what may stand before the `::` of a text. A number obeys `at_least <= value <=
    at_most` and `above < value < below`. shown: the heading under which the short help has it, if it does. required:
    of an entry's own, must be given. bare: the value of one that is written without any; empty: it wants one. usual: of
    a rate, what None means, for a model from nothing and for weights that were loaded.
    """

    kind: Any
    default: Any
    help: str = ""
    choices: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    shown: str = ""
    required: bool = False
    bare: str = ""
    usual: tuple[float, float] | None = None


def flag(default: Any, help: str = "", **rules: Any) -> Any:
    """A dataclass field that is a flag; `rules` are the other attributes of Flag."""
    return field(default=default, metadata={"help": help, **rules})


BOOLS = {
    "true": True, "1": True, "yes": True, "on": True, "t": True, "y": True,
    "false": False, "0": False, "no": False, "off": False, "f": False, "n": False,
}  # fmt: skip
KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
LARGEST_INT = 2**53


def nearest_name(name: str, names: Iterable[str]) -> str:
    """The closest of `names`, or the first one if nothing is close."""
    names = list(names)
    return (get_close_matches(name, names, n=1, cutoff=0.3) or names)[0]


def read_value(label: str, value: Any, declared: Any, example: Any) -> Any:
    """`value`, text or a Python literal, as the declared type of a flag: bool, int, float, str, or one `| None`.

    "", "None" and None mean None where the type allows it; integers are good for floats, and 0 and 1 for bools.
    Raises UserError, with `label` as the culprit and `example` as what would work.
    """
    kind = declared
    if NoneType in get_args(declared):
        (kind,) = (member for member in get_args(declared) if member is not NoneType)
        if value is None or value in ("", "None", "none"):
            return None
    if kind is str and isinstance(value, str):
        if "\0" in value:
            raise UserError(f"{label} contains a NUL character: leave it out")
        return value
    try:
        if kind is bool and (isinstance(value, bool | str) or value in (0, 1)):
            return BOOLS[str(value).strip().lower()]
        if kind is int and type(value) in (int, str) and abs(int(value)) <= LARGEST_INT:
            return int(value)
        if kind is float and type(value) in (int, float, str):
            return float(value)
    except (ValueError, KeyError, OverflowError):
        pass
    shown = repr(value) if len(repr(value)) < 60 else repr(value)[:57] + "..."
    raise UserError(f"{label}={shown} is not {KINDS[kind]}{_as(kind, value, example)}")


def _as(kind: Any, value: Any, example: Any) -> str:
    """What to write instead: 1e4 means a whole number; otherwise the default, if the flag has one."""
    if kind is int:
        try:
            return f": write {int(float(value))}"
        except (TypeError, ValueError, OverflowError):
            pass
    return "" if example in (None, "") else f", as {example}"


def check_value(name: str, flag: Flag, value: Any, bounds: bool = True) -> None:
    """Raises UserError for what the flag by itself cannot be; without `bounds`, of numbers NaN and infinity."""
    if flag.choices and value not in flag.choices:
        listed = ", ".join(choice or "''" for choice in flag.choices)
        nearest = nearest_name(value, flag.choices)
        raise UserError(f"--{name}='{value}' is none of {listed}: did you mean --{name}='{nearest}'?")
    if flag.prefixes and value:
        _check_prefix(name, flag.prefixes, value)
    example = flag.usual[0] if flag.usual else flag.default
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--{name}={value} is not a finite number: try --{name}={example}")
    if value is None or not bounds:
        return
    if flag.at_least is not None and value < flag.at_least:
        raise UserError(f"--{name}={value} is below {flag.at_least}: use --{name}={flag.at_least} or more")
    if flag.above is not None and value <= flag.above:
        raise UserError(f"--{name}={value} must be above {flag.above}: try --{name}={example}")
    if flag.at_most is not None and value > flag.at_most:
        raise UserError(f"--{name}={value} is above {flag.at_most}: use --{name}={flag.at_most} at most")
    if flag.below is not None and value >= flag.below:
        raise UserError(f"--{name}={value} must be below {flag.below}: try --{name}={example}")


def _check_prefix(name: str, prefixes: tuple[str, ...], text: str) -> None:
    """`kind::path`; whether the path holds such a thing is for its reader to say."""
    kind, separator, path = text.partition("::")
    if not separator:
        raise UserError(
            f"--{name}={text!r} does not say what it holds: --{name}='{prefixes[0]}::{text}', or one of "
            f"{', '.join(f'{other}::' for other in prefixes[1:])} before the path"
        )
    if kind not in prefixes:
        raise UserError(
            f"--{name}={text!r}: '{kind}::' is none of {', '.join(f'{k}::' for k in prefixes)}: "
            f"did you mean '{nearest_name(kind, prefixes)}::{path}'?"
        )
    if not path:
        raise UserError(f"--{name}={text!r} has no path: write '{kind}::/path/of/the/checkpoint'")


LITERAL_LENGTH, LITERAL_DEPTH = 8192, 4


def read_literals(label: str, text: str) -> dict[str, Any]:
    """`"dict(a=1, b='x')"` or `"{'a': 1}"` -> the dict; "" is empty. Only literals, whatever else is refused.

    Values are strings, numbers, True, False, None, and dicts, lists and tuples of them. Raises UserError.
    """
    if not text.strip():
        return {}
    if len(text) > LITERAL_LENGTH:
        raise UserError(f"{label} is {len(text)} characters long: {LITERAL_LENGTH} at most")
    text = text.strip()
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(f"{label}={text[:60]!r} cannot be read: write dict(key=value, ...)") from None
    if not isinstance(tree.body, ast.Call | ast.Dict):
        raise UserError(f"{label}={text[:60]!r} is no dict: write dict(key=value, ...)")
    return _literal(label, text, tree.body, LITERAL_DEPTH)


def _literal(label: str, text: str, node: ast.expr, depth: int) -> Any:
    match node:
        case ast.Constant(value=str() | int() | float() | None):
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case _ if depth == 0:
            raise UserError(f"{label} is nested more than {LITERAL_DEPTH} deep: write dict(key=value, ...)")
        case ast.Tuple() | ast.List():
            return [_literal(label, text, item, depth - 1) for item in node.elts]
        case ast.Call(func=ast.Name(id="dict"), args=[]):
            pairs = [(keyword.arg, keyword.value) for keyword in node.keywords]
        case ast.Dict():
            pairs = [(getattr(key, "value", None), value) for key, value in zip(node.keys, node.values, strict=True)]
        case _:
            shown = ast.get_source_segment(text, node) or text
            raise UserError(
                f"{label}: {shown[:60]!r} is no literal: only text, numbers, True, False, None and dict(...)"
            )
    found: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise UserError(f"{label}: a key is no plain name: write dict(key=value, ...)")
        if key in found:
            raise UserError(f"{label} gives {key} twice: leave one of them out")
        found[key] = _literal(label, text, value, depth - 1)
    return found


def parse_mesh_dim(text: str, device_count: int, flag: str = "--mesh_dim") -> tuple[MeshShape, bool]:
    """`"1,-1,1,4"` or `"dp:1,fsdp:-1,tp:1,sp:4"` on `device_count` devices -> (sizes of AXES, plain device order).

    One -1 takes the devices that the others leave; in the named form an axis that is left out is 1; a leading `!`
    asks for the devices in plain order. Raises UserError, with `flag` as the name of the culprit, where the text is
    no mesh or its product is not the number of devices.
    """
    plain_order = text.strip().startswith("!")
    sizes = mesh_sizes(text, flag)
    fixed = math.prod(size for size in sizes if size != -1)
    resolved = [device_count // fixed if size == -1 else size for size in sizes]
    if math.prod(resolved) != device_count or 0 in resolved:
        multiple = "a multiple of " if -1 in sizes else ""
        fits = ",".join(map(str, _nearest_mesh(sizes, device_count)))
        raise UserError(
            f"{flag}='{text}' needs {multiple}{fixed} devices, but there are {device_count}: "
            f"{flag}='{fits}' fits (on a CPU, --num_cpu_devices={fixed} gives that many)"
        )
    return MeshShape(*resolved), plain_order


def parse_profile(text: str, total_steps: int) -> range:
    """--profile="10,3" -> the steps 10, 11 and 12, as metrics number them; "" -> none.

    Raises UserError where the text is no first,count, or a run of total_steps has not all of these.
    """
    if not text:
        return range(0)
    if not re.fullmatch("[1-9][0-9]{0,11},[1-9][0-9]{0,11}", text.strip()):
        raise UserError(f"--profile={text!r} is no first,count of steps, both 1 or more: as --profile=10,3")
    first, count = map(int, text.split(","))
    if first + count - 1 > total_steps:
        start = min(first, total_steps)
        works = f"{start},{min(count, total_steps - start + 1)}"
        raise UserError(
            f"--profile={text}: --total_steps={total_steps} is below {first + count - 1}: --profile={works}"
        )
    return range(first, first + count)


def mesh_sizes(text: str, flag: str) -> list[int]:
    """The four sizes as written, -1 included."""
    body, shown = text.strip().removeprefix("!"), f"{flag}='{text}'"
    form = "four sizes dp,fsdp,tp,sp, one of which may be -1, as '1,-1,1,1' or 'dp:1,fsdp:-1,tp:1,sp:1'"
    parts = [part.strip() for part in body.split(",")]
    if ":" in body:
        named = [part.partition(":")[::2] for part in parts]
        names = [name.strip() for name, _ in named]
        for name in names:
            if name not in AXES or names.count(name) > 1:
                what = "twice" if name in AXES else f"which is no axis (did you mean {nearest_name(name, AXES)}?)"
                raise UserError(f"{shown} names the axis '{name}' {what}: write {form}")
        parts = [dict(zip(names, (size for _, size in named), strict=True)).get(axis, "1").strip() for axis in AXES]
    if len(parts) != len(AXES):
        raise UserError(f"{shown} has {len(parts)} sizes: write {form}")
    for part in parts:
        if not re.fullmatch(r"-1|[0-9]{1,9}", part) or int(part) == 0:
            raise UserError(f"{shown}: '{part}' is no size of an axis (1 or more, or -1): write {form}")
    if parts.count("-1") > 1:
        raise UserError(f"{shown} has more than one -1: write {form}")
    return [int(part) for part in parts]


def _nearest_mesh(sizes: list[int], device_count: int) -> list[int]:
    """`sizes` with one axis replaced by what makes the product right, the least change first; else all on fsdp."""
    candidates = []
    for place in range(len(AXES)):
        others = math.prod(abs(size) for at, size in enumerate(sizes) if at != place)
        if others <= device_count and device_count % others == 0:
            replaced = [device_count // others if at == place else abs(size) for at, size in enumerate(sizes)]
            change = abs(math.log(replaced[place] / abs(sizes[place])))
            candidates.append((change, -abs(sizes[place]), replaced))
    return min(candidates)[2] if candidates else [1, device_count, 1, 1]
