"""Conversations to text, and which characters of it take loss: a chat template rendered once, to be tokenised once.

Where the template marks what the model said ({% generation %}), the marks decide. Where it doesn't, a turn is what
the text grows by when the turn is added; where the template rewrites earlier turns, the messages' own texts are
followed through it. Nothing is ever tokenised apart from what it stands in.
"""

import datetime
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ringbpt.config import UserError
from ringbpt.data.reading.files import nearest_path, optional
from ringbpt.data.text.shapes import Message, check_messages
from ringbpt.data.text.tokenizers import Tokenizer

Span = tuple[int, int]

CHATML = "".join(map(str.strip, Path(__file__).with_name("chatml.jinja").read_text(encoding="utf-8").splitlines()))
NAMED = {"chatml": CHATML}
# Unicode's noncharacters mark where something begins and ends; they are taken out of what is rendered.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
OURS = ("\ufdd2", "\ufdd3")  # put into messages, to be followed through a template that may have marks of its own
MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
NONCHARACTERS = re.compile("[\ufdd0-\ufdd3]")
# Templates that write the date would give other tokens tomorrow: they get this one, always.
TODAY = datetime.datetime(2024, 7, 26)


def find_template(text: str, own: str | None, flag: str) -> str:
    """The template that a flag names: a name of NAMED, a .jinja file, the template itself; empty: the tokenizer's own.

    Raises UserError where there is none.
    """
    if not text:
        if own:
            return own
        raise UserError(
            f"--{flag} is empty, and the tokenizer has no template for conversations: "
            f"--{flag}=chatml is a common one, a .jinja file works too"
        )
    if text in NAMED:
        return NAMED[text]
    if "{" in text:
        return text
    path = Path(text).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise UserError(
            f"--{flag}={text!r} is no .jinja file that can be read{nearest_path(path)}; "
            f"{', '.join(NAMED)} is known by name"
        ) from None


class ChatTemplate:
    """A template, and the names that it may use besides the messages (bos_token, ...)."""

    def __init__(self, template: str, names: dict[str, str], flag: str):
        """flag: the flag that gave it, for messages. Raises UserError for what is no template."""
        jinja2 = optional("jinja2", f"--{flag}")
        self._names, self._errors = names, (jinja2.TemplateError, TypeError, ValueError, KeyError, RecursionError)
        self.marked = bool(MARKED.search(template))
        try:
            self._template = _environment().from_string(template)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"--{flag}: line {error.lineno}: {error.message}") from None
        self._parts = not self._takes("probe") and self._takes(_parts("probe"))

    @staticmethod
    def of(tokenizer: Tokenizer, text: str, flag: str) -> "ChatTemplate":
        """The template that the flag's text names (see find_template), with the tokenizer's own special tokens."""
        names = {"bos_token": "", "eos_token": ""} | tokenizer.special_names
        return ChatTemplate(find_template(text, tokenizer.chat_template, flag), names, flag)

    def _takes(self, probe: Any) -> bool:
        """Whether a message whose content is text (or, as some templates want it, a list of parts) leaves a trace."""
        try:
            return "probe" in self.render([{"role": "user", "content": probe}])
        except self._errors:
            return False

    def render(self, messages: Sequence[Message], tools: Any = None, *, prompt: bool = False) -> str:
        """The text, with OPEN and CLOSE around what {% generation %} marks. prompt: up to the answer's begin."""
        return self._template.render(
            messages=list(messages), tools=tools, documents=None, add_generation_prompt=prompt, **self._names
        )

    def prompt(self, messages: list[Message], tools: Any, where: Any) -> str:
        """The text of a conversation up to where the next answer begins, as training renders what comes before it."""
        messages = self._checked(check_messages(messages, "messages", where), tools, where)
        try:
            return unmark(self.render(messages, tools, prompt=True))[0]
        except self._errors as error:
            raise _refused(where, error) from None

    def _checked(self, messages: list[Message], tools: Any, where: Any) -> list[Message]:
        """The messages as the template takes them. Raises UserError where there is one of our marks in them."""
        if NONCHARACTERS.search(json.dumps([messages, tools], ensure_ascii=False)):
            raise UserError(f"{where}: a noncharacter (U+FDD0 to U+FDD3), which is no text")
        if not self._parts:
            return messages
        return [message | {"content": _parts(message["content"])} for message in messages]

    def spans(self, messages: list[Message], tools: Any, roles: tuple[str, ...], where: Any) -> tuple[str, list[Span]]:
        """The text of a conversation, and its parts [begin, end) that take loss: the turns of the `roles`, in order."""
        messages = self._checked(messages, tools, where)
        try:
            text, spans = unmark(self.render(messages, tools))
            if roles == ("assistant",):
                found = _merged(spans) if self.marked else self._grown(text, messages, tools)
                if found is not None:
                    return text, found
            marked = [m | {"content": _marked(m["content"])} if m["role"] in roles else m for m in messages]
            followed, spans = unmark(unmark(self.render(marked, tools))[0], *OURS)
        except self._errors as error:
            raise _refused(where, error) from None
        if followed != text or any(begin > end for begin, end in spans):
            raise UserError(
                f"{where}: the chat template rewrites what was said, so that nobody knows what takes loss: "
                "put {% generation %} and {% endgeneration %} around it in the template"
            )
        return text, spans

    def _grown(self, text: str, messages: list[Message], tools: Any) -> list[Span] | None:
        """What the text grows by with each answer; None where it doesn't simply grow, or by more than the answer."""
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                before = unmark(self.render(messages[:number], tools, prompt=True))[0]
                if before == unmark(self.render(messages[:number], tools))[0]:  # it knows of no answer's begin
                    return None
                after = unmark(self.render(messages[: number + 1], tools))[0]
            except self._errors:  # some refuse a conversation that ends here
                return None
            if not (text.startswith(after) and after.startswith(before)):
                return None
            said = after[len(before) :].rstrip()  # what stands between two turns is nobody's
            spans.append((len(before), len(before) + len(said)))
        return spans


def _refused(where: Any, error: Exception) -> UserError:
    return UserError(f"{where}: the chat template refuses the conversation: {' '.join(str(error).split())}")


def _merged(spans: list[Span]) -> list[Span]:
    """Spans that touch as one: a template may mark a turn piece by piece."""
    found: list[Span] = []
    for begin, end in spans:
        if found and found[-1][1] == begin:
            begin = found.pop()[0]
        found.append((begin, end))
    return found


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _marked(content: Any) -> Any:
    """Content with marks around its own words."""
    if isinstance(content, dict):  # a part of a list
        return content | {"text": _marked(content["text"])} if isinstance(content.get("text"), str) else content
    if isinstance(content, list):
        return [_marked(part) if isinstance(part, dict) else part for part in content]
    words = content.strip()  # templates trim
    if not words:
        return content
    before, _, after = content.partition(words)
    return f"{before}{OURS[0]}{words}{OURS[1]}{after}"


def unmark(text: str, opens: str = OPEN, closes: str = CLOSE) -> tuple[str, list[Span]]:
    """The text without its marks, and what they were around. A mark without its other half gives begin > end."""
    plain, spans, length, begin = [], [], 0, None
    for piece in re.split(f"([{opens}{closes}])", text):
        if piece == opens:
            if begin is not None:
                spans.append((length + 1, length))
            begin = length
        elif piece == closes:
            spans.append((length + 1, length) if begin is None else (begin, length))
            begin = None
        else:
            plain.append(piece)
            length += len(piece)
    if begin is not None:
        spans.append((length + 1, length))
    return "".join(plain), [span for span in spans if span[0] != span[1]]


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

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": TODAY.strftime}
    return environment
