"""Conversations to text, and which characters of it take loss: everything that a template writes for a trained turn.

The loss of a turn begins where the model would begin: behind what the template writes to open an answer. It ends with
what ends the turn. Where the template marks what the model said ({% generation %}), the marks decide. A template that
drops what earlier turns have thought makes several documents of a conversation, so that each turn is learnt once, in
the text in which the model would have said it. Nothing is ever tokenised apart from what it stands in.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ringbpt.config import UserError
from ringbpt.config.foreign import read_file, user_path
from ringbpt.data.reading.files import nearest_path
from ringbpt.data.text.shapes import Message, check_messages
from ringbpt.data.text.template import NONCHARACTERS, Rendered, Span, Template, merged
from ringbpt.data.text.tokenizers import TEMPLATE_BYTES, Tokenizer

CHATML = "".join(map(str.strip, Path(__file__).with_name("chatml.jinja").read_text(encoding="utf-8").splitlines()))
NAMED = {"chatml": CHATML}
MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Names of what a model thought before it answered; a template knows one of them.
REASONING = ("reasoning_content", "reasoning", "thinking")
THOUGHTS = re.compile("</?think>")
# A word that no template writes, and the same as what is said: to see what a template makes of it.
PROBE = "\ufdd8probe"
NOTHING = "\ufdd9"
CERTAIN = 8  # characters of what a message says that stand in a text for no other reason
OURS = ("weight", "train")  # what a message says to us, not to a template


class Learnt(NamedTuple):
    """A text, and its parts [begin, end) that take loss, in order: those of its trained turns."""

    text: str
    spans: list[Span]


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
    path = user_path(text)
    try:
        return read_file(path, TEMPLATE_BYTES).decode("utf-8")
    except (UserError, ValueError):
        raise UserError(
            f"--{flag}={text!r} is no .jinja file that can be read{nearest_path(path)}; "
            f"{', '.join(NAMED)} is known by name"
        ) from None


class ChatTemplate:
    """A template, and the names that it may use besides the messages (bos_token, ...)."""

    def __init__(self, template: str, names: dict[str, str], flag: str, settings: Mapping[str, Any] | None = None):
        """flag: the flag that gave it, for messages. settings: further names, that a row's own go before.

        Raises UserError for what is no template.
        """
        self._template, self._names = Template(template, flag), names | dict(settings or {})
        self.source, self.marked = template, bool(MARKED.search(template))
        self._parts = not self._leaves("probe", _user("probe")) and self._leaves("probe", _user(_parts("probe")))
        self._known = [name for name in REASONING if re.search(rf"[.'\"]{name}\b", template)]
        # Some templates join a call's arguments to text, and want them as JSON; the others want what the JSON means.
        self._json = not self._leaves('"?probe"?', *_calling({"probe": 1})) and self._leaves(
            '"probe"', *_calling('{"probe": 1}')
        )

    @staticmethod
    def of(tokenizer: Tokenizer, text: str, flag: str, settings: Mapping[str, Any] | None = None) -> "ChatTemplate":
        """The template that the flag's text names (see find_template), with the tokenizer's own special tokens."""
        names = {"bos_token": "", "eos_token": ""} | tokenizer.special_names
        return ChatTemplate(find_template(text, tokenizer.chat_template, flag), names, flag, settings)

    def _leaves(self, pattern: str, *messages: Message) -> bool:
        """Whether the messages' text has the pattern, with no other quotes around it; False where it is refused."""
        try:
            return bool(re.search(f"(?<!'){pattern}(?!')", self.render(messages).text))
        except self._template.errors:
            return False

    def render(
        self, messages: Sequence[Message], tools: Any = None, settings: Mapping[str, Any] | None = None
    ) -> Rendered:
        """The conversation's text, with what each message wrote."""
        return self._template.render(messages, **self._given(tools, settings, False))

    def _prompt(self, messages: Sequence[Message], tools: Any, settings: Mapping[str, Any] | None) -> str:
        """The text up to where the next answer begins."""
        return self._template.text(messages, **self._given(tools, settings, True))

    def _given(self, tools: Any, settings: Mapping[str, Any] | None, prompt: bool) -> dict[str, Any]:
        return {
            **{"documents": None, **self._names},
            **(settings or {}),
            **{"tools": tools, "add_generation_prompt": prompt},
        }

    def prompt(self, messages: list[Message], tools: Any, where: Any, settings: Mapping[str, Any] | None = None) -> str:
        """The text of a conversation up to where the next answer begins, as training renders what comes before it."""
        messages = self._as_taken(check_messages(messages, "messages", where), tools, where)
        try:
            return self._prompt(messages, tools, settings)
        except self._template.errors as error:
            raise _refused(where, error) from None

    def learnt(
        self,
        messages: list[Message],
        trained: Sequence[int],
        tools: Any,
        where: Any,
        settings: Mapping[str, Any] | None = None,
    ) -> list[Learnt]:
        """The texts of a conversation, in each of which some of the trained messages (by number) take loss, each once.

        One text, unless the template drops something of a trained turn once others follow: then the turn is learnt in
        the text that ends with it, or with a later one that leaves it whole. Raises UserError where nobody knows what
        takes loss.
        """
        messages = self._as_taken(messages, tools, where)
        try:
            return _Conversation(self, messages, tools, settings, where).learnt(trained)
        except self._template.errors as error:
            raise _refused(where, error) from None

    def _as_taken(self, messages: list[Message], tools: Any, where: Any) -> list[Message]:
        """The messages as the template takes them. Raises UserError for what has no place in a text."""
        if NONCHARACTERS.search(json.dumps([messages, tools], ensure_ascii=False)):
            raise UserError(f"{where}: a noncharacter (U+FDD0 to U+FDD3), which is no text")
        return [self._message(message, number, where) for number, message in enumerate(messages)]

    def _message(self, message: Message, number: int, where: Any) -> Message:
        content = message["content"]
        if self._parts:
            content = _parts(content)
        elif isinstance(content, list):
            content = "".join(_text_of(part, f"{where}: message {number}") for part in content)
        taken = {key: value for key, value in message.items() if key not in OURS} | {"content": content}
        if calls := message.get("tool_calls"):
            taken["tool_calls"] = [self._call(call) for call in calls]
        thought = next((name for name in REASONING if message.get(name)), None)
        if thought and thought not in self._known:
            taken |= dict.fromkeys(self._known[:1], message[thought])
        return taken

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        if isinstance(call.get("function"), dict):
            return call | {"function": self._call(call["function"])}
        arguments = call.get("arguments")
        if self._json and isinstance(arguments, dict):
            return call | {"arguments": json.dumps(arguments, ensure_ascii=False)}
        return call

    @cached_property
    def writes_behind(self) -> bool:
        """Whether something may stand behind a turn of the last message that belongs to it."""
        try:
            text, turns, _ = self.render([_user("q"), {"role": "assistant", "content": "a"}])
        except self._template.errors:
            return True
        return 1 not in turns or bool(text[turns[1][1] :].strip())

    def errors(self) -> tuple[type[Exception], ...]:
        return self._template.errors

    def turn_end(self, tokenizer: Tokenizer) -> int | None:
        """The special token with which the template ends what the model says, None where there is none."""
        try:
            text, spans = self.learnt([_user("q"), {"role": "assistant", "content": "a"}], [1], None, "")[0]
        except UserError:
            return None
        places = tokenizer.encode_places(text, special=True)
        end = len(text[: spans[-1][1]].rstrip()) if spans else 0
        found = [int(token) for token, at in zip(places.ids, places.end, strict=True) if at == end]
        return found[-1] if found and found[-1] in tokenizer.special_ids else None


def set_chat_template(tokenizer: Tokenizer, text: str, flag: str) -> None:
    """Gives a tokenizer the template that a flag's text names, or (empty) leaves it its own; what ends a turn by it is
    one of the tokenizer's ends from then on, since a model that was taught conversations ends a text with it.

    Raises UserError for a text that names none.
    """
    if text:
        tokenizer.chat_template = find_template(text, None, flag)
    if not tokenizer.chat_template:
        return
    try:
        end = ChatTemplate.of(tokenizer, "", flag).turn_end(tokenizer)
    except UserError:
        if text:
            raise
        return  # said where the tokenizer's own is asked for
    if end is not None:
        tokenizer.ends = tokenizer.ends._replace(others=tokenizer.ends.others | {end})


class _Conversation:
    """One conversation under a template: what of its texts each turn has written, and how much of that is said."""

    def __init__(self, template: ChatTemplate, messages: list[Message], tools: Any, settings: Any, where: Any):
        self._template, self._messages, self._where = template, messages, where
        self._given = tools, settings
        self._texts: dict[int, Rendered] = {}
        self._prompts: dict[int, str | None] = {}

    def learnt(self, trained: Sequence[int]) -> list[Learnt]:
        if not trained:
            return [Learnt(self._text(len(self._messages)).text, [])]
        found: list[Learnt] = []
        left, end = list(trained), len(self._messages)
        while left:
            spans = {number: self._spans(number, end) for number in left}
            taken = {number: some for number, some in spans.items() if some is not None}
            if taken:
                found.append(Learnt(self._text(end).text, [span for some in taken.values() for span in some]))
                left = [number for number in left if number not in taken]
            elif end == left[-1] + 1:
                raise self._unknown()
            end = left[-1] + 1 if left else 0
        return found[::-1]

    def _unknown(self) -> UserError:
        return UserError(
            f"{self._where}: the chat template rewrites what was said, so that nobody knows what takes loss: "
            "put {% generation %} and {% endgeneration %} around it in the template"
        )

    def _text(self, end: int) -> Rendered:
        """The first `end` messages."""
        if end not in self._texts:
            self._texts[end] = self._template.render(self._messages[:end], *self._given)
        return self._texts[end]

    def _try_text(self, end: int) -> Rendered | None:
        try:
            return self._text(end)
        except self._template.errors():  # some refuse a conversation that ends here
            return None

    def _prompt(self, end: int) -> str | None:
        """The first `end` messages and the begin of an answer; None where the template refuses that."""
        if end not in self._prompts:
            try:
                self._prompts[end] = self._template._prompt(self._messages[:end], *self._given)
            except self._template.errors():
                self._prompts[end] = None
        return self._prompts[end]

    def _turn(self, number: int, end: int) -> Span | None:
        """What message `number` has written in the text of the first `end` ones."""
        whole = self._text(end)
        if (turn := whole.turns.get(number)) is not None:
            return turn
        before, own = self._try_text(number), self._try_text(number + 1)  # by how much the text grows with it
        if before and own and own.text.startswith(before.text) and whole.text.startswith(own.text):
            return len(before.text), len(own.text)
        return None

    def _spans(self, number: int, end: int) -> list[Span] | None:
        """What of message `number` takes loss in the text of the first `end` ones; None: it isn't all there."""
        turn, text = self._turn(number, end), self._text(end).text
        if turn is None:
            return None
        message, written = self._messages[number], text[slice(*turn)]
        own_text, own_turn = None, None
        if end > number + 1 and not self._is_all_there(number, end, written):
            own_text = self._try_text(number + 1)
            own_turn = self._turn(number, number + 1) if own_text is not None else None
        if own_text is None or own_turn is None:  # nothing more would be seen, or only with others behind it
            own_text, own_turn = self._text(end), turn
        else:
            own = own_text.text[slice(*own_turn)]
            if self._strangers(number, end, own, written):  # what answers a call may be written into the call's turn
                if not written.startswith(own.rstrip()):
                    return None
                turn, written = (turn[0], turn[0] + len(own.rstrip())), own.rstrip()
            elif _lacks(message, own, written):
                return None
        for call in message.get("tool_calls") or []:
            name = (call.get("function") or call).get("name")
            if isinstance(name, str) and name not in written:
                raise UserError(f"{self._where}: the chat template writes nothing of the call of {name!r}")
        if self._template.marked and message["role"] == "assistant":
            _, turns, marked = self._text(end)
            others = [begin for begin, _ in turns.values() if begin > turn[0]]
            # An end may be marked behind the loop; of a turn that was told by how the text grows, all is in it.
            following = min(others, default=len(text)) if number in turns else turn[1]
            return merged([span for span in marked if turn[0] <= span[0] < following])
        prompt = self._prompt(number) if message["role"] == "assistant" else None
        begin = turn[0] + self._opening(number, end, written, prompt, own_text.text, own_turn[0])
        stop = turn[0] + len(written.rstrip())
        tail = "" if own_turn == turn and end > number + 1 else own_text.text[own_turn[1] :].strip()
        if tail:  # an end that is written behind the last turn alone
            behind = text[turn[1] :]
            if not (prompt or "").rstrip().endswith(tail) and behind.lstrip().startswith(tail):
                stop = turn[1] + behind.index(tail) + len(tail)
        return [(begin, stop)] if begin < stop else []

    def _is_all_there(self, number: int, end: int, written: str) -> bool:
        """Whether what is written for a message plainly has all that it says and nothing that later ones say, with a
        template that writes nothing behind a turn: then its text needs no look at where it is the last."""
        if self._template.writes_behind:
            return False
        if any(text.strip() in written for later in self._messages[number + 1 : end] for text in _said(later)):
            return False
        for piece in sorted(_pieces(self._messages[number]), key=len, reverse=True):
            before, found, after = written.partition(piece)
            if not found or len(piece) < CERTAIN or piece in self._template.source:
                return False
            written = f"{before}{NOTHING}{after}"
        return True

    def _strangers(self, number: int, end: int, own: str, written: str) -> bool:
        """Whether what is written for a message says more of what later ones say than where it is the last."""
        rest = written[len(_common([own, written])) :]
        if not any(text.strip() in rest for later in self._messages[number + 1 : end] for text in _said(later)):
            return False
        told = [
            message | {"content": message["content"] + PROBE} if isinstance(message["content"], str) else message
            for message in self._messages[number + 1 : end]
        ]
        rendered = self._template.render([*self._messages[: number + 1], *told], *self._given)
        return number not in rendered.turns or PROBE in rendered.text[slice(*rendered.turns[number])]

    def _opening(self, number: int, end: int, written: str, prompt: str | None, own: str, begin: int) -> int:
        """How many characters of what is written for a message only open it: what isn't the model's to say."""
        if prompt is not None and prompt[:begin] == own[:begin]:
            opening = prompt[begin:]
            if opening and written.startswith(opening):
                return len(opening)
            before = self._try_text(number)
            if before is None or before.text != prompt:  # else the template knows of no begin of an answer
                return len(_common([written, opening, *self._probed(number, end)])) if opening else 0
        return len(_common([written, *self._probed(number, end)]))

    def _probed(self, number: int, end: int) -> list[str]:
        """What the template writes where the message has said something else."""
        found = []
        said = ("content", "tool_calls", *REASONING)
        rest = {key: value for key, value in self._messages[number].items() if key not in said}
        content = _parts(PROBE) if self._template._parts else PROBE
        for more in ({}, dict.fromkeys(self._template._known[:1], PROBE)):
            other = rest | {"content": content} | more
            messages = [*self._messages[:number], other, *self._messages[number + 1 : end]]
            try:
                rendered = self._template.render(messages, *self._given)
            except self._template.errors():
                continue
            turn, before = rendered.turns.get(number), self._try_text(number)
            if turn is not None:
                found.append(rendered.text[slice(*turn)])
            elif before and rendered.text.startswith(before.text):
                found.append(rendered.text[len(before.text) :])
        if not found:
            raise self._unknown()
        return found


def _common(texts: Sequence[str]) -> str:
    """What all of the texts begin with."""
    shortest = min(texts, key=len)
    return shortest[: next((at for at, signs in enumerate(zip(*texts, strict=False)) if len(set(signs)) > 1), None)]


def _refused(where: Any, error: Exception) -> UserError:
    return UserError(f"{where}: the chat template refuses the conversation: {' '.join(str(error).split())}")


def _lacks(message: Message, own: str, written: str) -> bool:
    """Whether something that the message says stands in its own text more often than in what is written of it."""
    if own.strip() == written.strip():
        return False
    return any(own.count(piece) > written.count(piece) for piece in _pieces(message))


def _pieces(message: Message) -> list[str]:
    """What a message says, its thoughts apart."""
    said = [piece.strip() for text in _said(message) for piece in THOUGHTS.split(text)]
    return [piece for piece in said if piece]


def _said(message: Message) -> list[str]:
    """All text that a message says: its content, its reasoning, the arguments of its calls."""
    calls = [(call.get("function") or call).get("arguments") for call in message.get("tool_calls") or []]
    return [text for text in _texts([message["content"], *map(message.get, REASONING), calls]) if text.strip()]


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []


def _user(content: Any) -> Message:
    return {"role": "user", "content": content}


def _calling(arguments: Any) -> tuple[Message, Message]:
    call = {"type": "function", "id": "call00000", "function": {"name": "f", "arguments": arguments}}
    return _user("q"), {"role": "assistant", "content": "", "tool_calls": [call]}


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _text_of(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str) or (isinstance(part, dict) and part.get("type", "text") != "text"):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise UserError(f"{where} has a part of type {kind!r}, and the chat template takes text alone")
    return text
