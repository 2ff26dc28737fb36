"""Text in and text out around a Generator: its tokenizer and chat template, ends and stop strings."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ringbpt.checkpoint.load import Found
from ringbpt.config import TokenizerConfig, UserError
from ringbpt.data.prompts import encode_prompt
from ringbpt.data.text.chat import ChatTemplate, set_chat_template
from ringbpt.data.text.tokenizers import FLAG, Tokenizer, make_tokenizer
from ringbpt.generation.generator import Generator, check_vocabulary, plan_rows
from ringbpt.generation.sampling import Sampling

REPLACEMENT = "\ufffd"  # what an unfinished UTF-8 sequence decodes to
BEFORE = 8  # tokens of a prompt that may change how the first of its completion reads


def find_tokenizer(found: Found, vocab_file: str, chat_template: str = "") -> Tokenizer:
    """The tokenizer asked for, or the one that came with the checkpoint, with its own chat template or another.

    Raises UserError where there is none.
    """
    try:
        tokenizer = make_tokenizer(TokenizerConfig(vocab_file or found.vocab_file))
    except UserError as error:
        raise UserError(str(error).replace(FLAG, "--tokenizer")) from None
    set_chat_template(tokenizer, chat_template, "chat_template")
    return tokenizer


def make_chat_encoder(tokenizer: Tokenizer) -> Callable[..., np.ndarray]:
    """encode(messages, tools, where, settings) -> the tokens of a conversation up to where the next answer begins.

    int32 [tokens], by the tokenizer's template, as in training; tools and settings (see ChatTemplate): for it, or None.
    Raises UserError where there is no template; encode does, and begins with `where`, for what is no conversation and
    for one that the template refuses.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "this model's tokenizer has no chat template: give it plain prompts, --chat_template=chatml (or a .jinja "
            "file), or --tokenizer=<a Hugging Face folder that has one>"
        )
    template = ChatTemplate.of(tokenizer, "", "tokenizer")
    return lambda *conversation: tokenizer.encode_places(template.prompt(*conversation), special=True).ids


def encode_prompts(rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, where: str) -> list[np.ndarray]:
    """The tokens of each row's prompt or conversation, see data.prompts.encode_prompt. Raises UserError, with `where`
    and the row's number, for the first that cannot be had.
    """
    talks = any(not isinstance(row.get("prompt"), str) for row in rows)
    encode = make_chat_encoder(tokenizer) if talks else None
    return [encode_prompt(dict(row), tokenizer, encode, f"{where}, prompt {n}") for n, row in enumerate(rows, 1)]


class Completion(NamedTuple):
    """A text that has ended: its tokens, an end token among them, and the log-probability of each (see NewToken).

    reason: "stop", by an end token or a stop string, or "length", by the number of tokens.
    """

    text: str
    tokens: list[int]
    logps: list[float]
    reason: str


@dataclass
class Text:
    """One text under way. New characters are handed out as soon as no stop string can begin in them.

    before: the last tokens of its prompt: what a token looks like may depend on what it follows. text: what is shown,
    without special tokens; stop strings are looked for with them.
    """

    tokenizer: Tokenizer
    stops: Sequence[str]
    before: Sequence[int] = ()
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finished: bool = False
    shown: int = 0

    def add(self, token: int) -> str:
        """What is certain to belong to the text and was not handed out yet."""
        if self.finished:
            return ""
        self.tokens.append(token)
        if token in self.tokenizer.ends.stop:
            self.finished = True
            return self._show(len(self.text))
        named = self._decoded(len(self.tokens), special=True)
        places = [place for stop in self.stops if (place := named.find(stop)) >= 0]
        if places:
            self.text, self.finished = self._until(min(places)), True
            return self._show(len(self.text))
        self.text = self._decoded(len(self.tokens))
        held = max((n for stop in self.stops for n in range(1, len(stop)) if named.endswith(stop[:n])), default=0)
        certain = len(self.text.rstrip(REPLACEMENT)) if self.text.endswith(REPLACEMENT) else len(self.text)
        return self._show(min(certain, len(self.text) - held))

    def add_all(self, tokens: Sequence[int]) -> None:
        """As if each was added, where there are no stop strings, and nobody looks at what is shown in between."""
        self.tokens += tokens[:-2]
        for token in tokens[-2:]:  # of which the last may be an end, which shows what there was before it
            self.add(token)

    def rest(self) -> str:
        """What was held back, once no token follows."""
        return self._show(len(self.text))

    def _decoded(self, count: int, special: bool = False) -> str:
        """The first tokens as they read behind the prompt."""
        before = self.tokenizer.decode(self.before, special)
        whole = self.tokenizer.decode([*self.before, *self.tokens[:count]], special)
        return whole[len(before) :] if whole.startswith(before) else self.tokenizer.decode(self.tokens[:count], special)

    def _until(self, place: int) -> str:
        """What is shown of the text before this place among the characters with special tokens."""
        whole = max(n for n in range(len(self.tokens)) if len(self._decoded(n, special=True)) <= place)
        token, begun = self.tokens[whole], self._decoded(whole, special=True)
        rest = "" if token in self.tokenizer.special_ids else self._decoded(whole + 1, special=True)[len(begun) : place]
        return self._decoded(whole) + rest

    def _show(self, end: int) -> str:
        start, self.shown = self.shown, max(end, self.shown)
        return self.text[start:end]


def complete(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    max_new_tokens: int,
    batch_size: int = 8,
    stops: Sequence[str] = (),
) -> Iterator[tuple[int, Completion]]:
    """(number of the prompt, its completion) as each ends; the longest prompts begin first, batch_size at a time."""
    if not prompts:
        return
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {number + 1} has no tokens: write something")
    check_vocabulary(prompts, generator.model.architecture.vocab_size)
    shape, rows = plan_rows([len(prompt) for prompt in prompts], generator.model, batch_size, max_new_tokens)
    texts = [Text(tokenizer, stops, prompt[-BEFORE:]) for prompt in prompts]
    logps: list[list[float]] = [[] for _ in prompts]
    over: set[int] = set()
    for new in generator.tokens(prompts, shape, rows, sampling, over=over):
        for number, token in new.items():
            text = texts[number]
            text.add(token.id)
            logps[number].append(token.logp)
            if text.finished or len(text.tokens) == max_new_tokens:
                over.add(number)
                reason = "stop" if text.finished else "length"
                yield number, Completion(text.text, text.tokens, logps[number], reason)
