"""Requests join what is under way, leave it when they have ended, and wait where there is no room for them."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ringbpt.checkpoint.load import load_model
from ringbpt.config import TokenizerConfig
from ringbpt.data.text.tokenizers import make_tokenizer
from ringbpt.generation.generator import Generator, rounded_length
from ringbpt.generation.sampling import Sampling
from ringbpt.generation.stream import BatchShape, Draw, Stream
from ringbpt.serving.worker import News, Row, Worker
from tests.golden.make_families import restore

SECONDS = 60  # that anything may take


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> Generator:
    folder = tmp_path_factory.mktemp("llama")
    restore("llama", folder)
    return Generator(*load_model(f"huggingface::{folder}", (1, 1, 1, 1)))


class Asked:
    """A request of a worker's, and what has come of it. at: what to do once an answer has so many tokens."""

    def __init__(self, name: str, log: list[str], prompt: int = 9, most: int = 4, samples: int = 1, **sampling: Any):
        self.name, self.log, self.over = name, log, threading.Event()
        self.tokens: list[list[int]] = [[] for _ in range(samples)]
        self.at: dict[int, Callable[[], None]] = {}
        self.sampling = Sampling(**{"temperature": 1.0, "seed": len(name)} | sampling)
        prompt_T = np.arange(2, 2 + prompt).astype(np.int32)
        self.row = Row(prompt_T, samples, self.sampling, 0, most, (), frozenset(), True, self.told)

    def told(self, number: int, new: News) -> None:
        assert not new.error
        self.tokens[number] += new.tokens
        if act := self.at.pop(len(self.tokens[number]), None):
            act()
        if all(len(tokens) == self.row.max_tokens for tokens in self.tokens):
            self.log.append(self.name)
            self.over.set()

    def alone(self, generator: Generator) -> list[list[int]]:
        """Its tokens, where nothing is beside it."""
        draws = [Draw(self.sampling, number) for number in range(self.row.samples)]
        length = rounded_length(len(self.row.prompt), generator.model)
        shape = BatchShape(1, length, self.row.samples, self.row.max_tokens)
        prompts = [self.row.prompt]
        steps = [*generator.tokens(prompts, shape, [[0]], self.sampling, self.row.samples, draws)]
        return [[step[number].id for step in steps] for number in range(self.row.samples)]


def worker_of(generator: Generator, batch_size: int) -> Worker:
    return Worker(generator, make_tokenizer(TokenizerConfig("bytes")), batch_size)


def ended(generator: Generator, worker: Worker, *asked: Asked) -> None:
    """All have ended, each with the tokens that it has alone."""
    for each in asked:
        assert each.over.wait(SECONDS), each.name
    worker.close()
    for each in asked:
        assert each.tokens == each.alone(generator), each.name


def test_a_request_joins_what_is_under_way(generator):
    """Of whatever options and lengths: a longer prompt and a longer answer than there was room for."""
    log: list[str] = []
    worker = worker_of(generator, 4)
    long = Asked("long", log, most=60)
    greedy, longer = Asked("greedy", log, temperature=0.0), Asked("longer", log, prompt=70, repetition_penalty=1.4)
    last = Asked("last", log, most=100)
    long.at = {5: lambda: worker.submit([greedy.row]), 12: lambda: worker.submit([longer.row, last.row])}
    worker.submit([long.row])
    ended(generator, worker, long, greedy, longer, last)
    assert log == ["greedy", "longer", "long", "last"]


def test_a_row_is_free_once_its_answers_have_ended_or_nobody_listens(generator):
    log: list[str] = []
    worker = worker_of(generator, 2)
    gone, long = Asked("gone", log, most=60), Asked("long", log, most=40)
    waiting = [Asked(name, log, most=6) for name in ("first", "second", "third")]
    gone.at = {3: lambda: setattr(gone.row, "cancelled", True)}
    worker.submit([asked.row for asked in (gone, long, *waiting)])
    ended(generator, worker, long, *waiting)
    assert log == ["first", "second", "third", "long"] and len(gone.tokens[0]) == 3


def test_requests_of_unequal_length_keep_the_rows_busy(generator, monkeypatch):
    """32 in 8 rows: in no more steps than each row's share, and the longest answer at its end."""
    steps, step, log = [], Stream.step, list[str]()
    monkeypatch.setattr(Stream, "step", lambda stream: steps.append(1) or step(stream))
    lengths = np.random.default_rng(0).integers(3, 60, 32).tolist()
    asked = [Asked(str(most), log, most=most) for most in lengths]
    worker = worker_of(generator, 8)
    worker.submit([each.row for each in asked])
    for each in asked:
        assert each.over.wait(SECONDS)
    worker.close()
    assert sum(lengths) / 8 <= len(steps) <= sum(lengths) / 8 + max(lengths)


def test_who_has_no_room_waits_and_nobody_overtakes(generator):
    """Several answers to a prompt beside others with one, and more places than there may be."""
    log: list[str] = []
    worker = worker_of(generator, 8)
    worker._most = 2 * (64 + 2 * 64)  # places: two rows of two answers
    long, several, large, last = (
        Asked("long", log, most=20), Asked("several", log, samples=2), Asked("large", log, prompt=300, samples=2),
        Asked("last", log, samples=2),
    )  # fmt: skip
    long.at = {2: lambda: worker.submit([several.row, large.row, last.row])}
    worker.submit([long.row])
    assert long.over.wait(SECONDS)
    ended(generator, worker, long, several, large, last)
    assert log == ["long", "several", "large", "last"]


def test_what_is_called_waits_for_what_is_under_way_alone(generator):
    log: list[str] = []
    worker = worker_of(generator, 4)
    long, later = Asked("long", log, most=30), Asked("later", log)

    def meanwhile() -> None:
        worker.call(lambda: log.append("called"))
        worker.submit([later.row])

    long.at = {3: meanwhile}
    worker.submit([long.row])
    ended(generator, worker, long, later)
    assert log == ["long", "called", "later"]


def test_a_pause_lets_what_is_under_way_go_on(generator):
    log: list[str] = []
    worker = worker_of(generator, 4)
    long, later = Asked("long", log, most=30), Asked("later", log)

    def meanwhile() -> None:
        worker.pause(True)
        worker.submit([later.row])

    long.at = {3: meanwhile}
    worker.submit([long.row])
    assert long.over.wait(SECONDS) and worker.waiting == 1
    worker.call(lambda: log.append("called")).result(SECONDS)
    assert worker.waiting == 1 and log == ["long", "called"]
    worker.pause(False)
    ended(generator, worker, long, later)


def test_a_batch_that_fails_takes_nobody_along(generator, monkeypatch, capsys):
    log: list[str] = []
    worker = worker_of(generator, 4)
    monkeypatch.setattr(generator, "stream", lambda *_, **__: 1 / 0)
    told: list[News] = []
    failed = Asked("failed", log)
    failed.row.tell = lambda _, new: told.append(new) or failed.over.set()
    worker.submit([failed.row])
    assert failed.over.wait(SECONDS)
    monkeypatch.undo()
    later = Asked("later", log)
    worker.submit([later.row])
    ended(generator, worker, later)
    assert [new.error for new in told] == ["division by zero"] and "a batch of 1 has failed" in capsys.readouterr().err
