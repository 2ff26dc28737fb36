"""The one thread that owns the device: what waits becomes a batch, and each text's tokens are told as they come.

What arrives meanwhile waits for the next batch. Sizes are rounded up to powers of two, so that few programs are
compiled, and a text's tokens depend on its own seed and number, not on what it shares the batch with.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ringbpt.config import complain
from ringbpt.config.shown import one_line
from ringbpt.data.text.tokenizers import Tokenizer
from ringbpt.generation.generator import Generator, Rows, rounded_length
from ringbpt.generation.sampling import Sampling
from ringbpt.generation.stream import BatchShape, Draw
from ringbpt.generation.text import BEFORE, Text

TOGETHER_SECONDS = 0.005  # what is sent at once arrives within it, and stands in one batch
BATCH_TOKENS = 1 << 16  # places of a batch, unless one text of the model's length is more


class News(NamedTuple):
    """What there is new of a text. finish: "stop", "length", or "" while it goes on; error: why it has no end."""

    text: str
    tokens: list[int]
    logps: list[float]
    finish: str = ""
    error: str = ""


@dataclass(eq=False)
class Row:
    """A prompt and its answers, which stand in one row of a batch.

    number: of its first answer among those of its seed. ends: tokens that end an answer. piecemeal: tell of every
    token, or else of the whole answer. tell(number of the answer, its news): called in the worker's thread.
    """

    prompt: np.ndarray
    samples: int
    sampling: Sampling
    number: int
    max_tokens: int
    stops: Sequence[str]
    ends: frozenset[int]
    piecemeal: bool
    tell: Callable[[int, News], None]
    cancelled: bool = False  # nobody listens any more

    @property
    def program(self) -> tuple[int, bool, bool]:
        """What must be alike in a batch."""
        return self.samples, self.sampling.temperature > 0, self.sampling.repetition_penalty != 1.0


class Answer:
    """One answer under way."""

    def __init__(self, row: Row, number: int, tokenizer: Tokenizer):
        self._row, self._number = row, number
        self._text = Text(tokenizer, row.stops, row.prompt[-BEFORE:].tolist())
        self._tokens: list[int] = []
        self._logps: list[float] = []
        self.over = False

    def add(self, token: int, logp: float) -> None:
        if self.over or self._row.cancelled:
            self.over = True
            return
        if not math.isfinite(logp):
            self.over = True
            return self._row.tell(self._number, News("", [], [], error="the model's weights say no number"))
        self._tokens.append(token)
        self._logps.append(logp)
        looked_at = self._row.piecemeal or bool(self._row.stops)
        piece = self._text.add(token) if looked_at else ""
        stopped = token in self._row.ends or self._text.finished
        self.over = stopped or len(self._tokens) >= self._row.max_tokens
        finish = ("stop" if stopped else "length") if self.over else ""
        if self._row.piecemeal:
            piece += self._text.rest() if self.over else ""
            self._row.tell(self._number, News(piece, [token], [logp], finish))
        elif self.over:
            if not looked_at:
                self._text.add_all(self._tokens)
            self._row.tell(self._number, News(self._text.text, self._tokens, self._logps, finish))


class Worker:
    """Generates what is submitted, and does what else concerns the weights between two batches."""

    def __init__(self, generator: Generator, tokenizer: Tokenizer, batch_size: int):
        """batch_size: texts generated at a time, at most."""
        self.generator, self._tokenizer, self.batch_size = generator, tokenizer, batch_size
        self._most = max(BATCH_TOKENS, 2 * generator.model.architecture.max_sequence_length)
        self._rows: deque[Row] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future]] = deque()
        self._changed = threading.Condition()
        self.paused, self._closing, self.batches = False, False, 0
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._rows)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, rows: Sequence[Row]) -> None:
        with self._changed:
            self._rows.extend(rows)
            self._changed.notify()

    def call(self, function: Callable[[], Any]) -> Future:
        """Has it done in the worker's thread, before the next batch."""
        done: Future = Future()
        with self._changed:
            self._calls.append((function, done))
            self._changed.notify()
        return done

    def pause(self, paused: bool) -> None:
        """Whether batches wait; one that is under way goes on to its end."""
        with self._changed:
            self.paused = paused
            self._changed.notify()

    def close(self) -> None:
        """Generates what waits, and ends: nothing else arrives."""
        with self._changed:
            self.paused, self._closing = False, True
            self._changed.notify()
        self._thread.join()

    # --- the thread ---

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._calls and (self.paused or not self._rows):
                    if self._closing:
                        return
                    self._changed.wait()
                call = self._calls.popleft() if self._calls else None
            if call:
                self._do(*call)
                continue
            time.sleep(TOGETHER_SECONDS)
            batch = self._take()
            try:
                self._generate(batch)
            except Exception as error:  # memory, most likely: these have no answer, the next may have one
                line = one_line(error)
                complain(f"a batch of {len(batch)} has failed: {line}")
                for row in batch:
                    for number in range(row.samples):
                        row.tell(number, News("", [], [], error=line))

    @staticmethod
    def _do(function: Callable[[], Any], done: Future) -> None:
        try:
            done.set_result(function())
        except BaseException as error:  # whoever asked is told
            done.set_exception(error)

    def _take(self) -> list[Row]:
        """The row that has waited longest, and those that one program generates with it."""
        with self._changed:
            if self.paused:
                return []
            waiting = [row for row in self._rows if not row.cancelled]
            batch = waiting[:1]
            for row in waiting[1:]:
                whole = (len(batch) + 1) * row.samples
                if whole > self.batch_size:
                    break
                if row.program == batch[0].program and _places(self._shape([*batch, row])) <= self._most:
                    batch.append(row)
            taken = set(map(id, batch))
            self._rows = deque(row for row in waiting if id(row) not in taken)
        return batch

    def _shape(self, batch: Sequence[Row]) -> BatchShape:
        model = self.generator.model
        parts = model.mesh.shape["dp"] * model.mesh.shape["fsdp"]
        rows = 1 << (-(-len(batch) // parts) - 1).bit_length()
        longest, new = max(len(row.prompt) for row in batch), max(row.max_tokens for row in batch)
        new_tokens = 1 << max(new - 1, 15).bit_length()
        return BatchShape(rows * parts, rounded_length(longest, model), batch[0].samples, new_tokens)

    def _generate(self, batch: Sequence[Row]) -> None:
        if not batch:
            return
        self.batches += 1
        shape, samples = self._shape(batch), batch[0].samples
        rows: Rows = [[i] for i in range(len(batch))]
        texts = [(row, number) for row in batch for number in range(samples)]
        draws = [Draw(row.sampling, row.number + number) for row, number in texts]
        answers = [Answer(row, number, self._tokenizer) for row, number in texts]
        prompts = [row.prompt for row in batch]
        for new in self.generator.tokens(prompts, shape, rows, batch[0].sampling, samples, draws):
            for number, answer in enumerate(answers):
                if not answer.over:
                    answer.add(*new[number])
            if all(answer.over for answer in answers):
                break


def _places(shape: BatchShape) -> int:
    """Tokens that the cache of a batch has room for."""
    return shape.rows * (shape.length + shape.texts * shape.new_tokens)
