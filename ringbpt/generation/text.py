"""Text in and text out around a Generator: tokenizers, chat templates, ends and stop strings."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ringbpt.checkpoint.load import Found
from ringbpt.config import TokenizerConfig, UserError
from ringbpt.config.families import read_json
from ringbpt.data.text.tokenizers import make_tokenizer
from ringbpt.generation.generator import Generator, check_vocabulary, plan
from ringbpt.generation.sampling import Sampling

REPLACEMENT = "\ufffd"  # what an unfinished UTF-8 sequence decodes to


class Codec(Protocol):
    """ends: the tokens at which a text is over."""

    ends: frozenset[int]

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def chat(self, messages: list[dict[str, str]]) -> np.ndarray: ...


class PlainCodec:
    """One of our own tokenizers: bos before a prompt, as the text processor puts it before a document."""

    def __init__(self, vocab_file: str):
        self._tokenizer = make_tokenizer(TokenizerConfig(vocab_file))
        end = self._tokenizer.eos_token_id
        self.ends = frozenset([] if end is None else [end])

    def encode(self, text: str) -> np.ndarray:
        first = self._tokenizer.bos_token_id
        return np.array([*([] if first is None else [first]), *self._tokenizer.encode(text)], np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens)

    def chat(self, messages: list[dict[str, str]]) -> np.ndarray:
        raise UserError("this tokenizer has no chat template: give --tokenizer=<a Hugging Face folder that has one>")


class HuggingFaceCodec:
    """A folder's tokenizer as transformers has it, special tokens and chat template included."""

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        except Exception as error:  # transformers raises whatever its parts raise
            lines = str(error).splitlines() or [type(error).__name__]
            raise UserError(f"{folder}: its tokenizer cannot be read: {lines[0]}") from None
        self.ends = frozenset(end_tokens(folder) | {self._tokenizer.eos_token_id} - {None})

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer(text)["input_ids"], np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def chat(self, messages: list[dict[str, str]]) -> np.ndarray:
        if not self._tokenizer.chat_template:
            raise UserError("this model has no chat template: leave --chat out, and give it plain prompts")
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return np.array(self._tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def end_tokens(folder: Path) -> set[int]:
    """eos_token_id of generation_config.json and config.json: one, several, or none."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ends = read_json(folder / name).get("eos_token_id")
            found |= set(ends if isinstance(ends, list) else [ends]) - {None}
    return found


def make_codec(found: Found, vocab_file: str = "") -> Codec:
    """The tokenizer asked for, or the one that came with the checkpoint. Raises UserError where there is none."""
    name = vocab_file or found.vocab_file
    path = Path(name).expanduser()
    if path.is_file() and path.name == "tokenizer.json":
        path = path.parent
    if path.is_dir() and any((path / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        return HuggingFaceCodec(path)
    if path.is_dir() and not (path / "tokenizer.model").is_file():
        raise UserError(f"{path} holds no tokenizer: give --tokenizer=<folder, .model file, or bytes>")
    return PlainCodec(name)


class Completion(NamedTuple):
    text: str
    tokens: list[int]
    finished: bool  # by an end token or a stop string, and not by the number of tokens


@dataclass
class Text:
    """One text under way. New characters are handed out as soon as no stop string can begin in them."""

    codec: Codec
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
        if token in self.codec.ends:
            self.finished = True
            return self._show(len(self.text))
        self.text = self.codec.decode(self.tokens)
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
    codec: Codec,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    max_new_tokens: int,
    batch_size: int = 8,
    stops: Sequence[str] = (),
) -> Iterator[tuple[int, Completion]]:
    """(number of the prompt, its completion), group by group, longest prompts first."""
    if not prompts:
        return
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {number + 1} has no tokens: write something")
    check_vocabulary(prompts, generator.model.architecture.vocab_size)
    shape, groups = plan([len(prompt) for prompt in prompts], generator.model, batch_size, max_new_tokens)
    for group in groups:
        texts = {number: Text(codec, stops) for row in group.rows for number in row}
        for tokens in generator.tokens(prompts, shape, group, sampling):
            for number, token in tokens.items():
                texts[number].add(token)
            if all(text.finished for text in texts.values()):
                break
        for number, text in texts.items():
            yield number, Completion(text.text, text.tokens, text.finished)
