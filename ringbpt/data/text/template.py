"""A chat template as a program: run in a sandbox, and asked which message wrote which characters.

Hugging Face's templates are Jinja2. Where the body of a loop begins, whose variable is a message, a mark is put into
the parsed template: so one rendering tells what the template writes for each message, whatever it writes. What
{% generation %} marks is told too. Marks are Unicode's noncharacters, and are taken out of what is rendered.
"""

import datetime
import json
import re
import resource
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

from ringbpt.config import UserError
from ringbpt.data.reading.files import optional

Span = tuple[int, int]

PAGE = resource.getpagesize()
SECONDS, MEMORY, CHARACTERS = 2, 1 << 28, 1 << 25  # of one run: what a template may take, and write

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # around what {% generation %} marks
TURN, END = "\ufdd2", "\ufdd3"  # around "loop,message": there begins what a loop writes for it, or (-1) the loop ends
PIECES = re.compile(f"({TURN}[0-9]+,-?[0-9]+{END}|{OPEN}|{CLOSE})")
NONCHARACTERS = re.compile("[\ufdd0-\ufdd3]")
# Templates that write the date would give other tokens tomorrow: they get this one, always.
TODAY = datetime.datetime(2024, 7, 26)


class Rendered(NamedTuple):
    """A text, its parts [begin, end) that each message wrote (by the message's number), and those that
    {% generation %} marks, in order. A message that wrote nothing, or in several places, has no turn."""

    text: str
    turns: dict[int, Span]
    marked: list[Span]


class Template:
    """A compiled template. errors: what its rendering may raise. source: its text."""

    def __init__(self, source: str, flag: str):
        """Raises UserError, with the flag that gave it as the culprit, for what is no template."""
        jinja2 = optional("jinja2", f"--{flag}")
        self.source, self._flag = source, flag
        self.errors = (jinja2.TemplateError,)
        environment = _environment()
        try:
            with _limited(flag):
                parsed = environment.parse(source)
                _mark_loops(parsed)
                code = environment.compile(parsed)
                self._template = jinja2.Template.from_code(environment, code, environment.make_globals(None))
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"--{flag}: line {error.lineno}: {error.message}") from None
        except jinja2.TemplateError as error:
            raise UserError(f"--{flag}: {error}") from None

    def _run(self, **names: Any) -> str:
        with _limited(self._flag):
            text = self._template.render(**names)
        if len(text) > CHARACTERS:
            raise _too_much(self._flag, f"writes more than {CHARACTERS} characters")
        return text

    def text(self, messages: Iterable[dict[str, Any]], **names: Any) -> str:
        """What transformers renders."""
        return NONCHARACTERS.sub("", self._run(messages=list(messages), _turn=_nothing, **names))

    def render(self, messages: Sequence[dict[str, Any]], **names: Any) -> Rendered:
        """The text, and who wrote what; no turns where the template's text depends on the marks in it."""
        own = [dict(message) for message in messages]  # one object twice would be two messages
        numbers = {id(message): number for number, message in enumerate(own)}
        under_way = set()

        def turn(loop: int, *values: Any) -> str:
            number = next((numbers[id(value)] for value in values if id(value) in numbers), -1)
            if number >= 0:
                under_way.add(loop)
            elif values or loop not in under_way:
                return ""
            return f"{TURN}{loop},{number}{END}"

        found = _told(self._run(messages=own, _turn=turn, **names))
        plain = _told(self._run(messages=own, _turn=_nothing, **names))
        return found if found.text == plain.text else plain


@contextmanager
def _limited(flag: str) -> Iterator[None]:
    """A template's run, which may take SECONDS of this process's time and MEMORY bytes more than it has.

    Raises UserError where it takes more; whatever else it does wrong is a TemplateError. There is no limit of memory
    where the system has none, and none at all in another thread than the main one: signals come to that, and a limit of
    memory is the whole process', so that what other threads do meanwhile would fail by it, and two would undo each
    other's. A template that is given by a user has run in the main thread before any other runs it.
    """
    from jinja2 import TemplateError, TemplateRuntimeError

    def late(*_: Any) -> None:
        raise _too_much(flag, f"takes more than {SECONDS} seconds")

    before, timed = resource.getrlimit(resource.RLIMIT_AS), threading.current_thread() is threading.main_thread()
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            most = int(file.read(20).split()[0]) * PAGE + MEMORY
        if timed and (before[0] in (resource.RLIM_INFINITY, -1) or most < before[0]):
            resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    except (OSError, ValueError):
        pass
    handler = signal.signal(signal.SIGVTALRM, late) if timed else None
    try:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        yield
    except (TemplateError, UserError):
        raise
    except MemoryError:
        raise _too_much(flag, f"takes more than {MEMORY >> 20} MiB") from None
    except Exception as error:
        raise TemplateRuntimeError(str(error) or type(error).__name__) from None
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, handler)
            resource.setrlimit(resource.RLIMIT_AS, before)


def _too_much(flag: str, what: str) -> UserError:
    return UserError(f"--{flag}: the chat template {what} for one conversation: give another template, or less text")


def _nothing(*_: Any) -> str:
    return ""


def _told(raw: str) -> Rendered:
    """A text with marks -> the text, and what they say."""
    plain: list[str] = []
    length, opened = 0, None
    written: list[tuple[int | None, int, int]] = []  # whose, begin, end
    marked: list[Span] = []
    loops: list[tuple[str, int]] = []  # those under way, the innermost last: the loop, its message
    for at, piece in enumerate(PIECES.split(raw)):
        if not at % 2:  # between two marks; half of one is the template's own
            piece = NONCHARACTERS.sub("", piece)
        if piece == OPEN:
            opened = length
        elif piece == CLOSE:
            if opened is not None and length > opened:
                marked.append((opened, length))
            opened = None
        elif piece[:1] == TURN:
            loop, number = piece[1:-1].split(",")
            if any(loop == under_way for under_way, _ in loops):
                while loops.pop()[0] != loop:
                    pass
            if number != "-1":
                loops.append((loop, int(number)))
        elif piece:
            written.append((loops[-1][1] if loops else None, length, length + len(piece)))
            plain.append(piece)
            length += len(piece)
    text = "".join(plain)
    return Rendered(text, _turns(text, written), marked)


def _turns(text: str, written: list[tuple[int | None, int, int]]) -> dict[int, Span]:
    """Who wrote one stretch of the text, and which; blanks of others inside it don't count."""
    turns: dict[int, Span] = {}
    torn = set()
    last: int | None = None
    for number, begin, end in written:
        if not text[begin:end].strip() and number != last:
            continue
        if number is not None:
            if number in turns and number != last:
                torn.add(number)
            turns[number] = (turns[number][0] if number in turns else begin, end)
        last = number
    return {number: span for number, span in turns.items() if number not in torn}


def merged(spans: Sequence[Span]) -> list[Span]:
    """Spans that touch as one: a template may mark a turn piece by piece."""
    found: list[Span] = []
    for begin, end in spans:
        if found and found[-1][1] == begin:
            begin = found.pop()[0]
        found.append((begin, end))
    return found


def _mark_loops(parsed: Any) -> None:
    """Puts calls of `_turn` into a parsed template: where a loop's body begins, with its variables, and behind it."""
    from jinja2 import nodes

    loops = list(parsed.find_all(nodes.For))

    def call(number: int, names: list[Any]) -> Any:
        values = [nodes.Const(number), *(nodes.Name(name.name, "load") for name in names)]
        return nodes.Output([nodes.Call(nodes.Name("_turn", "load"), values, [], None, None)])

    def rebuild(node: Any) -> None:
        for key, value in node.iter_fields():
            if isinstance(value, list):
                setattr(node, key, [new for item in value for new in replaced(item)])
            elif isinstance(value, nodes.Node):
                rebuild(value)

    def replaced(item: Any) -> list[Any]:
        if not isinstance(item, nodes.Node):
            return [item]
        rebuild(item)
        if not isinstance(item, nodes.For):
            return [item]
        number = next(number for number, loop in enumerate(loops) if loop is item)
        names = [item.target] if isinstance(item.target, nodes.Name) else list(item.target.find_all(nodes.Name))
        item.body.insert(0, call(number, names).set_lineno(item.lineno))
        return [item, call(number, []).set_lineno(item.lineno)]

    rebuild(parsed)


@lru_cache(maxsize=1)
def _environment() -> Any:
    """Jinja2 as the templates of Hugging Face's tokenizers expect it, in a sandbox: they are somebody's programs."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}...{% endgeneration %}: marks around what is inside."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{OPEN}{caller()}{CLOSE}"

    class Sandbox(ImmutableSandboxedEnvironment):
        """Numbers stay small: what is done with large ones, no signal interrupts."""

        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            numbers = isinstance(left, int) and isinstance(right, int)
            if numbers and max(abs(left), abs(right)) > (1 << 31 if operator == "*" else 64):
                raise jinja2.TemplateRuntimeError(f"{left!r:.40} {operator} {right!r:.40} is too much")
            return super().call_binop(context, operator, left, right)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": TODAY.strftime}
    return environment
