"""The one thread that owns the device: each row of what is generated takes the next request as soon as it is free.

What is under way grows where one that waits has no room in it. Sizes are powers of two, so that few programs are
compiled, and a text's tokens depend on its own seed and number, not on what it stands beside, nor when it began.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ringbpt.config import complain
from ringbpt.config.shown import one_line
from ringbpt.data.text.tokenizers import Tokenizer
from ringbpt.generation.generator import Generator, rounded_length
from ringbpt.generation.sampling import Sampling
from ringbpt.generation.stream import PLACES, BatchShape, Draw, Stream, Unit, places, rows_at_once
from ringbpt.generation.text import BEFORE, Text


class News(NamedTuple):
    """What there is new of a text. finish: "stop", "length", or "" while it goes on; error: why it has no end."""

    text: str
    tokens: list[int]
    logps: list[float]
    finish: str = ""
    error: str = ""


@dataclass(eq=False)
class Row:
    """A prompt and its answers, which stand in one row of what is generated.

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
    """Generates what is submitted, and does what else concerns the weights while nothing is under way."""

    def __init__(self, generator: Generator, tokenizer: Tokenizer, batch_size: int):
        """batch_size: texts generated at a time, at most."""
        self.generator, self._tokenizer, self.batch_size = generator, tokenizer, batch_size
        self._most = PLACES * generator.model.mesh.size
        self._rows: deque[Row] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future]] = deque()
        self._changed = threading.Condition()
        self.paused, self._closing = False, False
        self._stream: Stream | None = None  # of this thread alone, as are those under way in its rows
        self._under_way: dict[int, tuple[Row, list[Answer]]] = {}
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
        """Has it done in the worker's thread, once what is under way has ended: nothing else begins before."""
        done: Future = Future()
        with self._changed:
            self._calls.append((function, done))
            self._changed.notify()
        return done

    def pause(self, paused: bool) -> None:
        """Whether what waits goes on waiting; what is under way goes on to its end."""
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
                while not self._under_way and not self._calls and (self.paused or not self._rows):
                    if self._closing:
                        return
                    self._changed.wait()
                call = self._calls.popleft() if self._calls and not self._under_way else None
                shape, taken = self._take() if not (call or self._calls or self.paused) else (None, [])
            if call:
                self._do(*call)
                continue
            try:
                if shape:
                    self._begin(shape, taken)
                if self._under_way:
                    self._step()
            except Exception as error:  # memory, most likely: these have no answer, the next may have one
                line = one_line(error)
                under_way = [row for row, _ in self._under_way.values()]
                rows = under_way + [row for row in taken if row not in under_way]
                complain(f"a batch of {len(rows)} has failed: {line}")
                for row in rows:
                    for number in range(row.samples):
                        row.tell(number, News("", [], [], error=line))
                self._under_way.clear()
            if not self._under_way:
                self._stream = None  # the next begins with what it wants

    @staticmethod
    def _do(function: Callable[[], Any], done: Future) -> None:
        try:
            done.set_result(function())
        except BaseException as error:  # whoever asked is told
            done.set_exception(error)

    def _take(self) -> tuple[BatchShape | None, list[Row]]:
        """Those that have waited longest, as many as there is room for beside what is under way, and the shape that has
        it; None where nobody begins.
        """
        self._rows = deque(row for row in self._rows if not row.cancelled)
        shape, taken = self._stream.shape if self._stream else None, list[Row]()
        while self._rows:
            wanted = self._shape(shape, self._rows[0], len(self._under_way) + len(taken) + 1)
            if wanted is None:
                break
            shape = wanted
            taken.append(self._rows.popleft())
        return shape if taken else None, taken

    def _shape(self, shape: BatchShape | None, row: Row, count: int) -> BatchShape | None:
        """The shape that has room for this row too, as the last of so many; None where there is none beside the others.

        shape: of the others, or None where there are none. There is one row, so that one client alone pays for no more,
        or as many as there may be: two programs.
        """
        model = self.generator.model
        parts = model.mesh.shape["dp"] * model.mesh.shape["fsdp"]
        length, new_tokens = rounded_length(len(row.prompt), model), 1 << max(row.max_tokens - 1, 63).bit_length()
        wanted = BatchShape(parts, length, row.samples, new_tokens)
        if shape is None:
            return wanted
        wanted = BatchShape(*map(max, shape, wanted))
        at_most = self.batch_size // row.samples
        if count > wanted.rows:
            wanted = wanted._replace(rows=rows_at_once(wanted, at_most, model.mesh))
        fits = count <= min(wanted.rows, at_most) and places(wanted) <= self._most
        return wanted if fits and row.samples == shape.texts else None

    def _begin(self, shape: BatchShape, taken: Sequence[Row]) -> None:
        """Rows of a stream of this shape begin what was taken."""
        if self._stream is None:
            self._stream = self.generator.stream(shape, shared=shape.texts > 1)
        elif self._stream.shape != shape:
            while not self._stream.may_grow:
                self._step()
            moved = self._stream.grow(shape)
            self._under_way = {moved[at]: found for at, found in self._under_way.items()}
        units = {}
        for at, row in zip(self._stream.free, taken, strict=False):
            draws = [Draw(row.sampling, row.number + number) for number in range(row.samples)]
            units[at] = Unit([row.prompt], draws, row.max_tokens)
            self._under_way[at] = row, [Answer(row, number, self._tokenizer) for number in range(row.samples)]
        self._stream.fill(units)

    def _step(self) -> None:
        """One more token of each answer; a row whose answers have ended is free."""
        assert self._stream
        for at, tokens in self._stream.step().items():
            _, answers = self._under_way[at]
            for answer, token in zip(answers, tokens, strict=True):
                if not answer.over:
                    answer.add(*token)
            if all(answer.over for answer in answers):
                del self._under_way[at]
                if at in self._stream.under_way:
                    self._stream.stop(at)
