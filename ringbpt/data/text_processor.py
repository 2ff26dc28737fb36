"""From an example to token ids and a loss mask, and from a source to all of them, in worker processes."""

import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ringbpt.config import TextProcessorConfig, TokenizerConfig, UserError
from ringbpt.data.sources import Source, json_type
from ringbpt.data.tokenizers import Tokenizer, make_tokenizer


class Segment(NamedTuple):
    """One part of an example: the fields whose texts are joined, or (keys empty) the one token of id `token`."""

    keys: tuple[str, ...]
    token: int
    loss: int  # 0 or 1


class Document(NamedTuple):
    """token int32 and mask uint8 [n]: the mask is 1 where predicting that token takes loss.

    loss_bytes: UTF-8 bytes of the text that takes loss.
    """

    token: np.ndarray
    mask: np.ndarray
    loss_bytes: int


class TextProcessor:
    """Reads `fields`: segments between commas, each a field, fields joined by `+`, or a special token.

    `[..]` around a segment takes its loss away; `<|bos|>`, `<|eos|>` and `<|123|>` stand for one token. prepend_text
    goes before the first field's text. bos is put first without loss, eos last with it, where the config says so.
    """

    def __init__(self, config: TextProcessorConfig, tokenizer: Tokenizer, flag: str = "train_dataset"):
        """Raises UserError for `fields` that cannot be read, and for a special token that the tokenizer lacks."""
        self._config, self._tokenizer, self._flag = config, tokenizer, f"--{flag}.text_processor"
        self._segments = lru_cache(maxsize=1024)(self._parse)
        if config.add_bos_token:
            self._special("bos", f"{self._flag}.add_bos_token=True")
        if config.add_eos_token:
            self._special("eos", f"{self._flag}.add_eos_token=True")
        if not config.fields_from_example:
            self._segments(config.fields, f"{self._flag}.fields={config.fields!r}")

    def __call__(self, example: dict[str, Any], location: str) -> Document:
        """Raises UserError that begins with `location` where a field is missing, no string, or all of them empty."""
        config = self._config
        parts: list[tuple[Sequence[int] | np.ndarray, int]] = []  # ids, and whether they take loss
        if config.add_bos_token:
            parts.append(((self._special("bos", ""),), 0))
        prepend, characters, loss_bytes = config.prepend_text, 0, 0
        for segment in self._segments_of(example, location):
            if not segment.keys:
                parts.append(((segment.token,), segment.loss))
                continue
            texts = [self._text(example, key, location) for key in segment.keys]
            text = prepend + config.subfield_separator.join(texts)
            prepend = ""
            try:
                size = len(text.encode("utf-8"))
            except UnicodeEncodeError as error:
                raise UserError(
                    f"{location}: field {'+'.join(segment.keys)!r} has half of a surrogate pair "
                    f"(\\u{ord(text[error.start]):04x}) at character {error.start}, which is no Unicode text"
                ) from None
            characters += sum(map(len, texts))
            loss_bytes += size * segment.loss
            parts.append((self._tokenizer.encode(text), segment.loss))
        if not characters:
            raise UserError(f"{location}: the text is empty; leave the example out")
        if config.add_eos_token:
            parts.append(((self._special("eos", ""),), 1))
        token = np.concatenate([ids for ids, _ in parts], dtype=np.int32)
        loss = np.array([loss for _, loss in parts], np.uint8)
        return Document(token, np.repeat(loss, [len(ids) for ids, _ in parts]), loss_bytes)

    def _segments_of(self, example: dict[str, Any], location: str) -> tuple[Segment, ...]:
        if not self._config.fields_from_example:
            return self._segments(self._config.fields, f"{self._flag}.fields={self._config.fields!r}")
        fields = self._text(example, self._config.fields_from_example, location)
        return self._segments(fields, f"{location}: fields {fields!r}")

    def _text(self, example: dict[str, Any], key: str, location: str) -> str:
        if key not in example:
            flag = "fields_from_example" if key == self._config.fields_from_example else "fields"
            close = (get_close_matches(key, example, 1, 0.0) or [None])[0]
            hint = f"; the nearest is {close!r}" if close else ": the example is empty"
            raise UserError(f"{location}: no field {key!r} ({self._flag}.{flag}){hint}")
        value = example[key]
        if not isinstance(value, str):
            raise UserError(f"{location}: field {key!r} is {json_type(value)}; it must be a string")
        return value

    def _parse(self, fields: str, where: str) -> tuple[Segment, ...]:
        if not fields.strip():
            raise UserError(f"{where}: it must name the field of an example that holds its text, as in 'text'")
        return tuple(self._parse_segment(part.strip(), where) for part in fields.split(","))

    def _parse_segment(self, part: str, where: str) -> Segment:
        loss = not (part.startswith("[") and part.endswith("]"))
        part = part if loss else part[1:-1].strip()
        special = re.fullmatch(r"<\|(\w+)\|>", part)
        if special:
            return Segment((), self._special(special[1], where), int(loss))
        keys = tuple(part.split("+"))
        if not all(keys):
            raise UserError(f"{where}: an empty field name; 'a+b,[c]' joins a and b, and then takes c without loss")
        return Segment(keys, 0, int(loss))

    def _special(self, name: str, where: str) -> int:
        """The id behind `<|name|>`."""
        if name.isdecimal() and name.isascii() and len(name) < 10:
            return int(name)
        ids = {"bos": self._tokenizer.bos_token_id, "eos": self._tokenizer.eos_token_id}
        if name not in ids:
            raise UserError(f"{where}: <|{name}|> is unknown; <|bos|>, <|eos|> and an id as in <|123|> work")
        token = ids[name]
        if token is None:
            works = "set it to False" if where.endswith("=True") else "leave it out or give its id, as in <|123|>"
            raise UserError(f"{where}: the tokenizer ({self._tokenizer.describe()}) has no {name} token; {works}")
        return token


class Chunk(NamedTuple):
    """Some documents in a row: token int32 and mask uint8 joined, length int64 of each, and their loss_bytes."""

    token: np.ndarray
    mask: np.ndarray
    length: np.ndarray
    loss_bytes: int


def tokenise(
    source: Source,
    tokenizer: Tokenizer,
    config: TextProcessorConfig,
    flag: str,
    *,
    processes: int = 1,
    chunk_size: int = 32,
    ahead: int = 1024,
) -> Iterator[Chunk]:
    """All examples in order, `chunk_size` at a time; the result depends on the number of processes in nothing.

    At most about `ahead` examples are under way at once, and the first bad example in order is the one reported.
    No more processes run than there are chunks or processors, and none but this one where that leaves one.
    """
    processor = TextProcessor(config, tokenizer, flag)
    spans = [(start, min(start + chunk_size, len(source))) for start in range(0, len(source), chunk_size)]
    processes = min(processes, len(spans), os.cpu_count() or 1)
    if processes <= 1:
        for span in spans:
            yield _tokenise_span(source, processor, *span)
        return
    pool = ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),  # a fork of a process that runs jax may hang
        initializer=_start_worker,
        initargs=(source, tokenizer.config, config, flag),
    )
    waiting: deque[Future[Chunk]] = deque()
    try:
        for span in spans:
            waiting.append(pool.submit(_tokenise_in_worker, *span))
            if len(waiting) > max(processes, ahead // chunk_size):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"--{flag}.json_dataset.tokenizer_processes={processes}: a worker process died (out of memory, or a script "
            "without `if __name__ == '__main__'`); tokenizer_processes=1 works in this process",
            code=4,
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[Source, TextProcessor] | None = None


def _start_worker(source: Source, tokenizer: TokenizerConfig, config: TextProcessorConfig, flag: str) -> None:
    global _worker  # noqa: PLW0603  (what a worker process is given once, and not with each task)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = source, TextProcessor(config, make_tokenizer(tokenizer), flag)


def _end_with_parent() -> None:
    """A worker would wait for ever for tasks of a parent that was killed: it holds both ends of their pipe."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _tokenise_in_worker(start: int, stop: int) -> Chunk:
    assert _worker is not None
    return _tokenise_span(*_worker, start, stop)


def _tokenise_span(source: Source, processor: TextProcessor, start: int, stop: int) -> Chunk:
    documents = [processor(source[index], source.location(index)) for index in range(start, stop)]
    return Chunk(
        token=np.concatenate([document.token for document in documents]),
        mask=np.concatenate([document.mask for document in documents]),
        length=np.array([len(document.token) for document in documents], np.int64),
        loss_bytes=sum(document.loss_bytes for document in documents),
    )
