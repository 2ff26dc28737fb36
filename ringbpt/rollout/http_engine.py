"""Engine `http`: one or several `ringbpt.serve`, asked for token ids and log-probabilities over HTTP.

A text is drawn by its seed and number wherever it is asked for, so what a lost server was asked another one answers
with the same tokens. After an update each server is probed: what it says of a text must be what the trainer says.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np

from ringbpt.config import UserError
from ringbpt.config.shown import one_line
from ringbpt.evaluation.score import Item, Scorer
from ringbpt.model.llama import Model
from ringbpt.rollout.engine import Sample
from ringbpt.types import Params

AT_ONCE = 64  # requests under way at a server
MOST_FAILURES = 5  # of a request, wherever it was asked
HEALTH_SECONDS, PERIOD_SECONDS = 5.0, 0.5
LOST_SECONDS = 15.0  # without a sign of health, though its address takes connections
PROBE_TOKENS = 16
TOLERANCE = 0.02  # nats, of a mean over the probe's tokens: a float32 pair is within 1e-4, one of bf16 within 1e-2
Says = Callable[[np.ndarray, Sequence[int]], Sequence[float]]  # (prompt, tokens behind it) -> log-probability of each


class Lost(Exception):
    """A request without an answer: it is asked again, there or elsewhere. busy: the server says to come back later."""

    def __init__(self, why: str, busy: bool = False):
        super().__init__(why)
        self.busy = busy


class Address:
    """A server, as a client sees it."""

    def __init__(self, url: str, api_key: str, seconds: float):
        self.url, self.up, self.seen = url.rstrip("/"), True, time.monotonic()
        self._seconds = seconds
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._open = build_opener(ProxyHandler({})).open  # no proxy stands between a trainer and its servers

    def ask(self, path: str, body: dict[str, Any] | None = None, seconds: float = 0.0) -> Any:
        """Its JSON answer. Raises Lost where none comes, UserError where it refuses."""
        content = None if body is None else json.dumps(body).encode()
        try:
            request = Request(f"{self.url}{path}", content, self._headers)
            with self._open(request, timeout=seconds or self._seconds) as response:
                return json.loads(response.read())
        except HTTPError as error:
            with error:
                why = _reason(error)
            if error.code >= 500 or error.code in (408, 429):
                raise Lost(f"{error.code}: {why}", busy=error.code in (408, 429, 503)) from None
            raise UserError(f"{self.url}{path}: {error.code}: {why}", code=3) from None
        except (URLError, OSError, HTTPException, ValueError) as error:
            refused = isinstance(getattr(error, "reason", error), ConnectionRefusedError)
            self.up = self.up and not refused
            raise Lost(one_line(getattr(error, "reason", None) or error)) from None

    def look(self) -> None:
        """Whether it is up; one that is silent for LOST_SECONDS no longer is."""
        try:
            self.ask("/health", seconds=HEALTH_SECONDS)
        except (Lost, UserError):
            self.up = self.up and time.monotonic() - self.seen < LOST_SECONDS
        else:
            self.up, self.seen = True, time.monotonic()


def _reason(error: HTTPError) -> str:
    try:
        return one_line(json.loads(error.read())["error"]["message"], 500)
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        return one_line(error.reason)


class Work:
    """Requests, each taken by some server until it has an answer; those of a lost server go back."""

    def __init__(self, bodies: Sequence[dict[str, Any]], servers: Sequence[Address]):
        self.bodies, self._servers = bodies, servers
        self.found: dict[int, Any] = {}
        self.error: Exception | None = None
        self._todo, self._taken = deque(range(len(bodies))), dict[int, Address]()
        self._failed = [0] * len(bodies)
        self._changed = threading.Condition()

    @property
    def over(self) -> bool:
        return self.error is not None or len(self.found) == len(self.bodies)

    def take(self, server: Address) -> int | None:
        """The number of a request for this server, once it is up and no other has fewer; None when all is over."""
        with self._changed:
            while not self.over:
                if self._todo and server.up and self._load(server) == min(map(self._load, self._those_up())):
                    number = self._todo.popleft()
                    if number not in self.found:
                        self._taken[number] = server
                        self._changed.notify_all()
                        return number
                    continue
                self._changed.wait(PERIOD_SECONDS)
        return None

    def _load(self, server: Address) -> int:
        return sum(taker is server for taker in self._taken.values())

    def _those_up(self) -> list[Address]:
        return [server for server in self._servers if server.up] or [*self._servers]

    def put(self, number: int, found: Any) -> None:
        """The first answer counts; one of a server that was given up may come later, and says the same."""
        with self._changed:
            self.found.setdefault(number, found)
            self._taken.pop(number, None)
            self._changed.notify_all()

    def give_back(self, server: Address, number: int | None = None) -> None:
        """One request, or all that the server has."""
        with self._changed:
            mine = [n for n, taker in self._taken.items() if taker is server and number in (None, n)]
            for each in mine:
                del self._taken[each]
                self._todo.appendleft(each)
            self._changed.notify_all()

    def failed(self, number: int) -> int:
        """How often this request has failed, with this time."""
        with self._changed:
            self._failed[number] += 1
            return self._failed[number]

    def fail(self, error: Exception) -> None:
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.over, seconds)


class HttpEngine:
    """Samples several answers to each prompt by servers; the same seed draws what LocalEngine draws."""

    def __init__(
        self,
        urls: Sequence[str],
        max_new_tokens: int,
        ends: frozenset[int],
        api_key: str = "",
        seconds: float = 600.0,
        say: Callable[[str], None] = print,
    ):
        """urls: as http://127.0.0.1:8000. seconds: how long no server may be up, and one may take for an answer."""
        self._servers = [Address(url, api_key, seconds) for url in urls]
        self._most, self._ends, self._seconds, self._say, self._version = max_new_tokens, ends, seconds, say, 0

    def generate(
        self, prompts: Sequence[np.ndarray], samples: int, temperature: float, seed: int
    ) -> list[list[Sample]]:
        """`samples` answers to each prompt, in the order of the prompts; the same seed draws the same.

        Raises UserError, code 3, where no server is left, and for what a server refuses.
        """
        alike: dict[str, Any] = {
            "n": samples,
            "temperature": temperature,
            "seed": seed,
            "max_tokens": self._most,
            "logprobs": 0,
        }
        alike |= {"stop_token_ids": sorted(self._ends), "return_token_ids": True}
        bodies = [alike | {"prompt": p.tolist(), "number": i * samples} for i, p in enumerate(prompts)]
        work = Work(bodies, self._servers)
        start = time.monotonic()
        for server in self._servers:
            server.seen = start
            watch = threading.Thread(target=self._watch, args=(server, work), daemon=True)
            askers = min(AT_ONCE, len(bodies))
            for thread in (watch, *(self._thread(server, work, samples) for _ in range(askers))):
                thread.start()
        while not work.wait(PERIOD_SECONDS):
            self._check_some_are_left(work)
        if work.error is not None:
            raise work.error
        return [work.found[number] for number in range(len(bodies))]

    def _thread(self, server: Address, work: Work, samples: int) -> threading.Thread:
        return threading.Thread(target=self._ask, args=(server, work, samples), daemon=True)

    def _ask(self, server: Address, work: Work, samples: int) -> None:
        """Asks for one after the other."""
        while (number := work.take(server)) is not None:
            try:
                work.put(number, _samples(server.ask("/v1/completions", work.bodies[number]), samples))
            except (KeyError, TypeError, IndexError, ValueError) as error:
                work.fail(UserError(f"{server.url}: no answer of ringbpt.serve's: {one_line(error)}", code=3))
            except Lost as why:
                if not work.over:
                    self._say(f"{server.url}: {why}: what it was asked is asked again")
                if not why.busy and work.failed(number) >= MOST_FAILURES:
                    work.fail(UserError(f"{server.url}: a prompt has failed {MOST_FAILURES} times: {why}", code=3))
                work.give_back(server, number)
                time.sleep(PERIOD_SECONDS)
            except UserError as error:
                work.fail(error)

    def _watch(self, server: Address, work: Work) -> None:
        while not work.over:
            server.look()
            if not server.up:
                work.give_back(server)
            time.sleep(PERIOD_SECONDS)

    def _check_some_are_left(self, work: Work) -> None:
        silent = time.monotonic() - max(server.seen for server in self._servers)
        if silent > self._seconds:
            which = ", ".join(server.url for server in self._servers)
            work.fail(
                UserError(
                    f"no server has been up for {self._seconds:g} s: {which}: {len(work.bodies) - len(work.found)} of "
                    f"{len(work.bodies)} prompts have no answer; start one and go on",
                    code=3,
                )
            )

    # --- weights ---

    def update(self, load_checkpoint: str, probe: np.ndarray, says: Says, tolerance: float = TOLERANCE) -> None:
        """Has every server read these weights, and makes sure that they are the trainer's.

        probe: a prompt, which each server goes on with greedily; says: what the trainer's weights say of those tokens.
        Raises UserError, code 3, for a server that is lost or refuses, that has another version, or that says other
        numbers than the trainer (a mean of more than `tolerance` nats apart: a smaller change is not seen).
        """
        self._version += 1
        for server in self._servers:
            found = {}
            for path, body in (
                ("/update_weights_from_disk", {"load_checkpoint": load_checkpoint, "version": self._version}),
                ("/weight_info", None),
            ):
                found = self._told(server, path, body)
            if found.get("version") != self._version:
                raise UserError(
                    f"{server.url}: its weights are of version {found.get('version')!r} after an update to "
                    f"{self._version}",
                    code=3,
                )
            self._probe(server, load_checkpoint, probe, says, tolerance)

    def _told(self, server: Address, path: str, body: dict[str, Any] | None) -> Any:
        try:
            return server.ask(path, body)
        except Lost as why:
            raise UserError(f"{server.url}{path}: {why}", code=3) from None

    def _probe(self, server: Address, source: str, probe: np.ndarray, says: Says, tolerance: float) -> None:
        body: dict[str, Any] = {
            "prompt": probe.tolist(),
            "temperature": 0.0,
            "max_tokens": min(PROBE_TOKENS, self._most),
        }
        body |= {"logprobs": 0, "return_token_ids": True, "seed": 0}
        try:
            [sample] = _samples(self._told(server, "/v1/completions", body), 1)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise UserError(f"{server.url}: no answer of ringbpt.serve's: {one_line(error)}", code=3) from None
        apart = np.abs(np.asarray(says(probe, sample.tokens)) - np.asarray(sample.logps)).mean()
        if not apart <= tolerance:
            raise UserError(
                f"{server.url}: after reading {source} it says log-probabilities that are {apart:.3g} nats from the "
                f"trainer's, {tolerance:g} at most: stale weights, or another model",
                code=3,
            )


def _samples(answer: Any, samples: int) -> list[Sample]:
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if len(choices) != samples:
        raise ValueError(f"{len(choices)} answers, {samples} were asked for")
    found = [Sample(c["token_ids"], c["logprobs"]["token_logprobs"], c["finish_reason"]) for c in choices]
    if any(len(sample.tokens) != len(sample.logps) or not sample.tokens for sample in found):
        raise ValueError("an answer whose tokens and log-probabilities are not as many")
    return found


def trainer_says(model: Model, params: Params) -> Says:
    """What these weights say, at temperature 1, of the tokens behind a prompt: for HttpEngine.update."""
    scorer = Scorer(replace(model, temperature=1.0), rows=1)

    def says(prompt: np.ndarray, tokens: Sequence[int]) -> list[float]:
        whole = np.concatenate([prompt, tokens]).astype(np.int32)
        ends = range(len(prompt) + 1, len(whole) + 1)  # of each text the last token is judged
        items = [Item(whole[:end], end - 1) for end in ends]
        return scorer.score(params, items, scorer.row_length(len(whole))).logp.tolist()

    return says
