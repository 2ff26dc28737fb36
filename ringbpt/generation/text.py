"""Text in and text out around a Generator: its tokenizer and chat template, ends and stop strings."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ringbpt.checkpoint.load import Found
from ringbpt.config import TokenizerConfig, UserError
from ringbpt.data.text.chat import ChatTemplate
from ringbpt.data.text.tokenizers import FLAG, Tokenizer, make_tokenizer
from ringbpt.generation.generator import Generator, check_vocabulary, plan_batches
from ringbpt.generation.sampling import Sampling

REPLACEMENT = "\ufffd"  # what an unfinished UTF-8 sequence decodes to


def find_tokenizer(found: Found, vocab_file: str) -> Tokenizer:
    """The tokenizer asked for, or the one that came with the checkpoint. Raises UserError where there is none."""
    try:
        return make_tokenizer(TokenizerConfig(vocab_file or found.vocab_file))
    except UserError as error:
        raise UserError(str(error).replace(FLAG, "--tokenizer")) from None


def make_chat_encoder(tokenizer: Tokenizer) -> Callable[[Any, Any, Any], np.ndarray]:
    """encode(messages, tools, where) -> the tokens of a conversation, int32, up to where the next answer begins.

    By the tokenizer's own template, as in training; tools: for it, or None. Raises UserError where there is no
    template; encode does, and begins with `where`, for what is no conversation and for one that the template refuses.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "this model's tokenizer has no chat template: give it plain prompts, or --tokenizer=<a Hugging Face folder "
            "that has one>"
        )
    template = ChatTemplate.of(tokenizer, "", "tokenizer")
    return lambda *conversation: tokenizer.encode_places(template.prompt(*conversation), special=True).ids


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
    """One text under way. New characters are handed out as soon as no stop string can begin in them."""

    tokenizer: Tokenizer
    stops: Sequence[str]
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
        self.text = self.tokenizer.decode(self.tokens)
        places = [place for stop in self.stops if (place := self.text.find(stop)) >= 0]
        if places:
            self.text, self.finished = self.text[: min(places)], True
            return self._show(len(self.text))
        held = max((n for stop in self.stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0)
        certain = len(self.text.rstrip(REPLACEMENT)) if self.text.endswith(REPLACEMENT) else len(self.text)
        return self._show(min(certain, len(self.text) - held))

    def rest(self) -> str:
        """What was held back, once no token follows."""
        return self._show(len(self.text))

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
    """(number of the prompt, its completion), batch by batch, the longest prompts first."""
    if not prompts:
        return
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {number + 1} has no tokens: write something")
    check_vocabulary(prompts, generator.model.architecture.vocab_size)
    shape, batches = plan_batches([len(prompt) for prompt in prompts], generator.model, batch_size, max_new_tokens)
    for batch in batches:
        texts = {number: Text(tokenizer, stops) for row in batch for number in row}
        logps: dict[int, list[float]] = {number: [] for number in texts}
        for new in generator.tokens(prompts, shape, batch, sampling):
            for number, token in new.items():
                texts[number].add(token.id)
                logps[number].append(token.logp)
            if all(text.finished for text in texts.values()):
                break
        for number, text in texts.items():
            reason = "stop" if text.finished else "length"
            yield number, Completion(text.text, text.tokens, logps[number][: len(text.tokens)], reason)
