"""From an example to token ids and a loss mask: by the `fields` that the flags name, or by the shape it has."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import cached_property, lru_cache
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np

from ringbpt.config import TextProcessorConfig, UserError, read_literals
from ringbpt.data.documents import ALONE, Known
from ringbpt.data.reading.files import json_type
from ringbpt.data.text.chat import ChatTemplate
from ringbpt.data.text.shapes import (
    Message,
    Pair,
    alike,
    answers_of,
    conversation,
    desirable,
    preference,
    prompt_and_completion,
    settings_of,
    tools_of,
    trained,
)
from ringbpt.data.text.template import Span
from ringbpt.data.text.tokenizers import Places, Tokenizer


class FieldGroup(NamedTuple):
    """One part of an example: the fields whose texts are joined, or (keys empty) the one token of id `token`."""

    keys: tuple[str, ...]
    token: int
    loss: int  # 0 or 1


class Document(NamedTuple):
    """token int32 and mask uint8 [n]: the mask is 1 where predicting that token takes loss.

    loss_bytes: UTF-8 bytes of the text that takes loss. known: of the document as a whole.
    """

    token: np.ndarray
    mask: np.ndarray
    loss_bytes: int
    known: Known = ALONE


class TextProcessor:
    """Reads `fields`: what stands between two commas is a field, fields joined by `+`, or a special token.

    `[..]` around it takes its loss away; `<|bos|>`, `<|eos|>` and `<|123|>` stand for one token. prepend_text
    goes before the first field's text. bos is put first without loss, eos last with it, where the config says so.

    Without `fields` the shape decides (data/text/shapes.py): conversations go through a chat template, which places its
    own special tokens; a prompt and its completion are one text, tokenised once, of which the completion takes loss.
    """

    def __init__(self, config: TextProcessorConfig, tokenizer: Tokenizer, flag: str = "train_dataset", shape: str = ""):
        """Raises UserError for `fields` that cannot be read, and for a special token that the tokenizer lacks."""
        if shape == "text" and not (config.fields or config.fields_from_example):
            config = replace(config, fields=config.input_key or "text")
        self._config, self.tokenizer, self._flag = config, tokenizer, f"--{flag}.text_processor"
        self._shape = "" if config.fields or config.fields_from_example else shape
        self._groups = lru_cache(maxsize=1024)(self._parse)
        if self._shape in CONVERSATIONS or config.apply_chat_template:
            self._template  # noqa: B018  (what is wrong with it is said before the first example)
        self._bos: tuple[int, ...] = ()
        if config.add_bos_token:  # where the tokenizer itself begins a text with it, as a prompt does
            bos = self._special("bos", f"{self._flag}.add_bos_token=True")
            self._bos = (bos,) if tokenizer.ends.begins else ()
        self._eos = (self._special("eos", f"{self._flag}.add_eos_token=True"),) if config.add_eos_token else ()
        if not config.fields_from_example and not self._shape:
            self._groups(config.fields, f"{self._flag}.fields={config.fields!r}")

    def __call__(self, example: dict[str, Any], location: Any) -> Document:
        """The only document of an example, or the last of several; arguments and errors as of `documents`."""
        return self.documents(example, location)[-1]

    def documents(self, example: dict[str, Any], location: Any, other: dict[str, Any] | None = None) -> list[Document]:
        """The documents of an example: of a "preference" one the chosen and the rejected; of a "kto" one the example
        and, where there is `other`, its prompt with the other example's completion; of a conversation one for each text
        in which some of its turns are learnt (see ChatTemplate.learnt); of another shape one, or one for each of the
        completions that are given for a prompt.

        location: anything whose text is `file:line`. Raises UserError that begins with it where a field is missing, no
        string, or all of them empty.
        """
        if self._shape in CONVERSATIONS:
            return self._chat(conversation(example, self._shape, self._config, location), example, location)
        if self._shape == "preference":
            chosen, rejected, margin = preference(example, self._config, location)
            pair = [self._whole(self._pair(pair, example, location), location) for pair in (chosen, rejected)]
            return _unit(pair, (CHOSEN, REJECTED), margin)
        if self._shape == "kto":
            own, label = (
                self._answer(example, location),
                CHOSEN if desirable(example, self._config, location) else REJECTED,
            )
            return _unit([own] if other is None else [own, self._answer(example, location, other)], (label, MISMATCHED))
        if self._shape:
            pairs = answers_of(example, self._shape, self._config, location)
            if len(pairs) == 1:
                return self._pair(pairs[0], example, location)
            return _unit([self._whole(self._pair(pair, example, location), location) for pair in pairs], repeat(0))
        return [self._joined(example, location)]

    def _answer(self, example: dict[str, Any], location: Any, other: dict[str, Any] | None = None) -> Document:
        """The prompt and the completion of a "kto" example, or of another one."""
        pair = prompt_and_completion(example, "kto", self._config, location)
        if other is not None:
            pair = alike(pair.prompt, prompt_and_completion(other, "kto", self._config, location).completion, location)
        return self._whole(self._pair(pair, example, location), location)

    def _whole(self, documents: list[Document], location: Any) -> Document:
        if len(documents) > 1:
            raise UserError(
                f"{location}: the chat template drops what earlier turns of the completion have thought: compare the "
                "last turn alone, and move the others into the prompt"
            )
        return documents[0]

    def _joined(self, example: dict[str, Any], location: Any) -> Document:
        """A document of the `fields`."""
        config = self._config
        parts: list[tuple[Any, int]] = [(self._bos, 0)] if self._bos else []  # ids, and whether they take loss
        prepend, characters, loss_bytes = config.prepend_text, 0, 0
        for group in self._groups_of(example, location):
            if not group.keys:
                parts.append(((group.token,), group.loss))
                continue
            texts = [self._text(example, key, location) for key in group.keys]
            text = prepend + config.subfield_separator.join(texts)
            prepend = ""
            try:
                size = len(text.encode("utf-8"))
            except UnicodeEncodeError as error:
                raise UserError(
                    f"{location}: field {'+'.join(group.keys)!r} has half of a surrogate pair "
                    f"(\\u{ord(text[error.start]):04x}) at character {error.start}, which is no Unicode text"
                ) from None
            characters += sum(map(len, texts))
            loss_bytes += size * group.loss
            parts.append((self.tokenizer.encode(text), group.loss))
        if not characters:
            raise UserError(f"{location}: the text is empty; leave the example out")
        if self._eos:
            parts.append((self._eos, 1))
        token = np.concatenate([ids for ids, _ in parts], dtype=np.int32)
        loss = np.array([loss for _, loss in parts], np.uint8)
        return Document(token, np.repeat(loss, [len(ids) for ids, _ in parts]), loss_bytes)

    @cached_property
    def _template(self) -> ChatTemplate:
        flag = f"{self._flag[2:]}.chat_template"
        settings = read_literals(f"{self._flag}.chat_template_kwargs", self._config.chat_template_kwargs)
        return ChatTemplate.of(self.tokenizer, self._config.chat_template, flag, settings)

    def _chat(self, messages: list[Message], example: dict[str, Any], location: Any, first: int = 0) -> list[Document]:
        """A conversation, of which the trained messages from the number `first` on take loss."""
        roles = tuple(role.strip() for role in self._config.roles_to_train.split(","))
        numbers = [number for number in trained(messages, roles, location) if number >= first]
        tools, settings = tools_of(example, location), settings_of(example, location)
        learnt = self._template.learnt(messages, numbers, tools, location, settings)
        return [self._learnt(text, spans, location) for text, spans in learnt]

    def _learnt(self, text: str, spans: list[Span], location: Any) -> Document:
        places = self._encode(text, True, location)
        mask = np.zeros(len(places.ids), np.uint8)
        for span in spans:
            mask |= _covers(places, span)
        if self.tokenizer.special_ids:
            return Document(places.ids, self._ends(places, text, spans, mask), _bytes_of(text, spans))
        return self._framed(places.ids, mask, _bytes_of(text, spans))

    def _ends(self, places: Places, text: str, spans: list[Span], mask: np.ndarray) -> np.ndarray:
        """The mask with the special tokens that end turns in it or not, as train_on_eos says."""
        special = np.isin(places.ids, list(self.tokenizer.special_ids))
        found = [end for span in spans if (end := self._end_of(places, text, span, special)) is not None]
        match self._config.train_on_eos:
            case "turn":
                mask[found] = 1
            case "none":
                mask[found] = 0
            case "last":
                mask[found] = 0
                mask[found[-1:]] = 1
            case "all":
                mask[np.isin(places.ids, places.ids[found])] = 1
        return mask

    def _end_of(self, places: Places, text: str, span: Span, special: np.ndarray) -> int | None:
        """Where the special token is that ends a turn: the last one inside, or one that follows its marks at once."""
        inside = np.flatnonzero(_covers(places, span) & special)
        if len(inside) and not text[places.end[inside[-1]] : span[1]].strip():
            return int(inside[-1])
        if not self._template.marked:
            return None
        after = np.flatnonzero(special & (places.begin == span[1]))
        return int(after[0]) if len(after) and not text[span[1] - 1].isspace() else None

    def _pair(self, pair: Pair, example: dict[str, Any], location: Any) -> list[Document]:
        prompt, completion = pair
        if isinstance(prompt, str) and self._config.apply_chat_template:
            prompt = [{"role": "user", "content": prompt}]
            completion = [{"role": "assistant", "content": completion}]
        if not isinstance(prompt, str):
            return self._chat([*prompt, *completion], example, location, len(prompt))
        if self._config.input_template:
            prompt = self._around(prompt, example, location)
        text, span = prompt + completion, (len(prompt), len(prompt) + len(completion))
        places = self._encode(text, False, location)
        return [self._framed(places.ids, _covers(places, span).astype(np.uint8), _bytes_of(text, [span]))]

    def _around(self, prompt: str, example: dict[str, Any], location: Any) -> str:
        """The prompt in input_template, where {} is the prompt itself and {key} a field of the example: its reward,
        say, where the model is to learn answers by what they were worth.
        """

        def value(found: re.Match[str]) -> str:
            if not (key := found[1]):
                return prompt
            if not isinstance(example.get(key), str | int | float):
                kind = json_type(example[key]) if key in example else "missing"
                raise UserError(f"{location}: field {key!r}, which {self._flag}.input_template names, is {kind}")
            return str(example[key])

        return re.sub(r"\{(\w*)\}", value, self._config.input_template.replace("\\n", "\n"))

    def _encode(self, text: str, special: bool, location: Any) -> Places:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{location}: half of a surrogate pair (\\u{ord(text[error.start]):04x}), which is no Unicode text"
            ) from None
        return self.tokenizer.encode_places(text, special)

    def _framed(self, ids: np.ndarray, mask: np.ndarray, loss_bytes: int) -> Document:
        """bos before and eos after, as the flags say."""
        token = np.concatenate([self._bos, ids, self._eos], dtype=np.int32, casting="unsafe")
        before, after = np.zeros(len(self._bos), np.uint8), np.ones(len(self._eos), np.uint8)
        return Document(token, np.concatenate([before, mask, after]), loss_bytes)

    def _groups_of(self, example: dict[str, Any], location: Any) -> tuple[FieldGroup, ...]:
        if not self._config.fields_from_example:
            return self._groups(self._config.fields, f"{self._flag}.fields={self._config.fields!r}")
        fields = self._text(example, self._config.fields_from_example, location)
        return self._groups(fields, f"{location}: fields {fields!r}")

    def _text(self, example: dict[str, Any], key: str, location: Any) -> str:
        if key not in example:
            flag = "fields_from_example" if key == self._config.fields_from_example else "fields"
            close = (get_close_matches(key, example, 1, 0.0) or [None])[0]
            hint = f"; the nearest is {close!r}" if close else ": the example is empty"
            raise UserError(f"{location}: no field {key!r} ({self._flag}.{flag}){hint}")
        value = example[key]
        if not isinstance(value, str):
            raise UserError(f"{location}: field {key!r} is {json_type(value)}; it must be a string")
        return value

    def _parse(self, fields: str, where: str) -> tuple[FieldGroup, ...]:
        if not fields.strip():
            raise UserError(f"{where}: it must name the field of an example that holds its text, as in 'text'")
        return tuple(self._parse_group(part.strip(), where) for part in fields.split(","))

    def _parse_group(self, part: str, where: str) -> FieldGroup:
        loss = not (part.startswith("[") and part.endswith("]"))
        part = part if loss else part[1:-1].strip()
        special = re.fullmatch(r"<\|(\w+)\|>", part)
        if special:
            return FieldGroup((), self._special(special[1], where), int(loss))
        keys = tuple(part.split("+"))
        if not all(keys):
            raise UserError(f"{where}: an empty field name; 'a+b,[c]' joins a and b, and then takes c without loss")
        return FieldGroup(keys, 0, int(loss))

    def _special(self, name: str, where: str) -> int:
        """The id behind `<|name|>`."""
        if name.isdecimal() and name.isascii() and len(name) < 10:
            return int(name)
        ids = {"bos": self.tokenizer.ends.bos, "eos": self.tokenizer.ends.eos}
        if name not in ids:
            raise UserError(f"{where}: <|{name}|> is unknown; <|bos|>, <|eos|> and an id as in <|123|> work")
        token = ids[name]
        if token is None:
            works = "set it to False" if where.endswith("=True") else "leave it out or give its id, as in <|123|>"
            raise UserError(f"{where}: the tokenizer ({self.tokenizer.describe()}) has no {name} token; {works}")
        return token


CONVERSATIONS = ("messages", "sharegpt")
CHOSEN, REJECTED, MISMATCHED = 1, -1, 2  # what COLUMNS says of `label`


def _unit(documents: list[Document], labels: Iterable[int], margin: float = 0.0) -> list[Document]:
    """The documents as one packing unit, each sharing with the one before it what neither learns."""
    found: list[Document] = []
    for document, label in zip(documents, labels, strict=False):
        shared = _shared(found[-1], document) if found else 0
        found.append(document._replace(known=Known(not found, shared, label, margin)))
    return found


def _shared(before: Document, document: Document) -> int:
    """How many first tokens of a document can stand in the row once for both: their targets too are in both, and take
    no loss in either, so that each begins anew with the last token of what they have in common."""
    length = min(len(before.token), len(document.token))
    alike = (before.token[:length] == document.token[:length]) & (before.mask[:length] + document.mask[:length] == 0)
    alike[:1] = before.token[:1] == document.token[:1]  # the first token is nobody's target
    return max(0, (length if alike.all() else int(np.argmin(alike))) - 1)


def _covers(places: Places, span: Span) -> np.ndarray:
    """Which tokens stand for a character of the span, bool [tokens]."""
    inside = (places.begin < span[1]) & (places.end > span[0])
    return inside | ((places.begin == places.end) & (places.begin >= span[0]) & (places.begin < span[1]))


def _bytes_of(text: str, spans: Sequence[Span]) -> int:
    return sum(len(text[begin:end].encode("utf-8")) for begin, end in spans)
