"""Engine `http`: one or several servers, asked for token ids and log-probabilities over HTTP.

A server is asked once it has read the newest weights and was probed: what it says of some texts must be what the
trainer says. One that comes back after it was lost reads them again first. By `ringbpt.serve` a text is drawn by its
seed and number wherever it is asked for, so what a lost server was asked another one answers with the same tokens;
servers of other kinds answer with others, as good.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from http.client import HTTPException
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np

from ringbpt.config import UserError
from ringbpt.config.shown import one_line
from ringbpt.rollout.engine import Sample
from ringbpt.rollout.handover import Probe, Version
from ringbpt.rollout.servers import KINDS, Kind, kind_of

AT_ONCE = 64  # requests under way at a server
MOST_FAILURES = 5  # of a request, wherever it was asked
HEALTH_SECONDS, PERIOD_SECONDS = 5.0, 0.5
LOST_SECONDS = 15.0  # without a sign of health, though its address takes connections
TOLERANCE = 0.02  # nats, of a mean over the probe's texts: a float32 pair is within 1e-4, one of bf16 within 1e-2
MOVED = 1e-3  # nats, of the same mean: what must change an answer's last digit, whatever dtype a server computes in


class Said(NamedTuple):
    """A server's answer to a probe, the tokens and their log-probabilities, and what the trainer said of these."""

    tokens: list[int]
    logps: list[float]
    trainers: np.ndarray


class Lost(Exception):
    """A request without an answer: it is asked again, there or elsewhere. busy: the server says to come back later."""

    def __init__(self, why: str, busy: bool = False):
        super().__init__(why)
        self.busy = busy


class Address:
    """A server, as a client sees it. up: whether it answers. kind: once it has said. has, refused: the versions of
    weights that it has read, and was probed with, and that it is not asked with any more; had: what it had at the end
    of the work before. said: its last good answer
    to a probe. reading: held while it is told to read weights and probed.
    """

    kind: Kind | None = None
    has: int | None = None
    had: int | None = None
    refused: int | None = None
    said: Said | None = None
    tries: int = 0  # to have it read the newest

    def __init__(self, url: str, api_key: str, seconds: float):
        self.url, self.up, self.seen = url.rstrip("/"), True, time.monotonic()
        self._seconds, self.reading = seconds, threading.Lock()
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._open = build_opener(ProxyHandler({})).open  # no proxy stands between a trainer and its servers

    def ask(self, path: str, body: dict[str, Any] | None = None, seconds: float = 0.0) -> Any:
        """Its JSON answer, None where that is empty. Raises Lost where none comes, UserError where it refuses."""
        content = None if body is None else json.dumps(body).encode()
        try:
            request = Request(f"{self.url}{path}", content, self._headers)
            with self._open(request, timeout=seconds or self._seconds) as response:
                return json.loads(response.read() or b"null")
        except HTTPError as error:
            with error:
                why = _reason(error)
            if error.code >= 500 or error.code in (408, 429):
                raise Lost(f"{error.code}: {why}", busy=error.code in (408, 429, 503)) from None
            raise UserError(f"{self.url}{path}: {error.code}: {why}", code=3) from None
        except (URLError, OSError, HTTPException, ValueError) as error:
            refused = isinstance(getattr(error, "reason", error), ConnectionRefusedError)
            self.up = self.up and not refused
            self.has = self.kind = None  # another process may answer there next
            raise Lost(one_line(getattr(error, "reason", None) or error)) from None

    def meet(self, seconds: float = HEALTH_SECONDS) -> tuple[Kind, int | None]:
        """Its kind, and the longest text that it takes, where it says so. Raises UserError for a kind that is unknown,
        and for one that can be told to read no weights.
        """
        about = self.ask("/v1/models", seconds=seconds)
        kind = kind_of(self.url, about)
        try:
            if kind.needs:
                self.ask(kind.needs, seconds=seconds)
        except UserError as error:
            raise UserError(f"{error}: it can be told to read no weights: start it as {kind.start}") from None
        self.kind = kind
        return kind, about["data"][0].get("max_model_len")

    def sample(self, body: dict[str, Any], samples: int) -> list[Sample]:
        """The answers to a request of ours. Raises as ask does, and UserError for one that holds none."""
        answer = self.ask("/v1/completions", self._kind().asked(body))
        try:
            return _samples(answer, samples)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            what = f"no answer with tokens and their log-probabilities: {one_line(error)}"
            raise UserError(f"{self.url}: {what}", code=3) from None

    def _kind(self) -> Kind:
        """Another thread may have found meanwhile that it is gone."""
        if (kind := self.kind) is None:
            raise Lost("it was lost")
        return kind

    def reread(self, version: Version) -> None:
        """Has it read a version's weights. Raises as ask does."""
        for path, body in self._kind().reread(version):
            found = self.ask(path, body)
            if isinstance(found, dict) and found.get("success") is False:
                raise Lost(f"{path}: {one_line(found)}")

    def look(self) -> None:
        """Whether it is up; one that is silent for LOST_SECONDS no longer is."""
        try:
            self.ask("/health", seconds=HEALTH_SECONDS)
        except (Lost, UserError):
            self.up = self.up and time.monotonic() - self.seen < LOST_SECONDS
            self.has = self.has if self.up else None
        else:
            self.up, self.seen = True, time.monotonic()


def _reason(error: HTTPError) -> str:
    """SGLang has its message at the top, and OpenAI's routes have it in an "error"."""
    try:
        found = json.loads(error.read())
        return one_line(found.get("error", found)["message"], 500)
    except (OSError, HTTPException, ValueError, KeyError, TypeError, AttributeError):
        return one_line(error.reason)


class Wanted(NamedTuple):
    """The weights that servers must have, and what proves it."""

    version: Version
    probe: Probe


class Work:
    """Requests, each taken by some server until it has an answer; those of a lost server go back."""

    def __init__(self, bodies: Sequence[dict[str, Any]], servers: Sequence[Address], wanted: Wanted | None):
        """wanted: the weights that a server must have; None: whatever it has."""
        self.bodies, self._servers, self.wanted = bodies, servers, wanted
        self._version = wanted.version.number if wanted else None
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
                ready = self._is_ready(server)
                if self._todo and ready and self._load(server) == min(map(self._load, self._those_ready())):
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

    def is_behind(self, server: Address) -> bool:
        """Whether it is to read the weights before it is asked."""
        return self._version is not None and self._version not in (server.has, server.refused)

    @property
    def left(self) -> list[Address]:
        """The servers that have not been refused by these weights."""
        return [s for s in self._servers if self._version is None or s.refused != self._version]

    def _is_ready(self, server: Address) -> bool:
        return server.up and server.kind is not None and self._version in (None, server.has)

    def _those_ready(self) -> list[Address]:
        return [*filter(self._is_ready, self._servers)]

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

    def look_again(self) -> None:
        """A server has become ready."""
        with self._changed:
            self._changed.notify_all()

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
        temperature: float = 1.0,
        api_key: str = "",
        seconds: float = 600.0,
        say: Callable[[str], None] = print,
    ):
        """urls: as http://127.0.0.1:8000. temperature: of the probe, as sampling will have it. seconds: how long no
        server may be up, and one may take for an answer.
        """
        self._servers = [Address(url, api_key, seconds) for url in urls]
        self._most, self._ends, self._temperature = max_new_tokens, ends, temperature
        self._seconds, self._say = seconds, say
        self._wanted: Wanted | None = None
        self._work: Work | None = None
        self._closed = False

    def find(self, longest: int) -> None:
        """Raises UserError where no server answers, and where one takes no text of so many tokens: at once, before
        anything else is done.
        """
        why = ""
        for server in self._servers:
            try:
                kind, most = server.meet(HEALTH_SECONDS / len(self._servers))
            except Lost as lost:
                server.up, why = False, f"{server.url}: {lost}"
            else:
                if most is not None and most < longest:
                    raise UserError(
                        f"--rollout.servers={server.url} takes texts of {most} tokens, and a prompt with its answer "
                        f"has {longest}: start it with {kind.length}={longest}"
                    )
        if not any(server.up for server in self._servers):
            raise UserError(f"--rollout.servers: {why}: start one: {KINDS['ringbpt'].start}")

    def update(self, version: Version) -> None:
        """Servers are asked for what these weights say from now on; each reads them when it is needed next."""
        if self._wanted is None or self._wanted.version != version:
            self._wanted = Wanted(version, version.probe())

    def close(self) -> None:
        """Ends what is under way, by a UserError where it is waited for."""
        self._closed = True
        if self._work:
            self._work.fail(UserError("the run ends: no rollout is sampled any more", code=3))

    def generate(
        self, prompts: Sequence[np.ndarray], samples: int, temperature: float, seed: int
    ) -> list[list[Sample]]:
        """`samples` answers to each prompt, in the order of the prompts; the same seed draws the same. An empty prompt
        holds a place, and has no answers.

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
        there = [i for i, prompt in enumerate(prompts) if len(prompt)]
        bodies = [alike | {"prompt": prompts[i].tolist(), "number": i * samples} for i in there]
        work = self._work = Work(bodies, self._servers, self._wanted)
        if self._closed:
            self.close()
        start = time.monotonic()
        for server in self._servers:
            server.seen, server.had, server.has = start, server.has, None  # another process may answer there since
            watch = threading.Thread(target=self._watch, args=(server, work), daemon=True)
            askers = min(AT_ONCE, len(bodies))
            for thread in (watch, *(self._thread(server, work, samples) for _ in range(askers))):
                thread.start()
        while not work.wait(PERIOD_SECONDS):
            self._check_some_are_left(work)
        if work.error is not None:
            raise work.error
        found = {i: work.found[number] for number, i in enumerate(there)}
        return [found.get(i, []) for i in range(len(prompts))]

    def _thread(self, server: Address, work: Work, samples: int) -> threading.Thread:
        return threading.Thread(target=self._ask, args=(server, work, samples), daemon=True)

    def _ask(self, server: Address, work: Work, samples: int) -> None:
        """Asks for one after the other."""
        while (number := work.take(server)) is not None:
            try:
                work.put(number, server.sample(work.bodies[number], samples))
            except Lost as why:
                if not work.over:
                    self._say(f"{server.url}: {why}: what it was asked is asked again")
                if not why.busy and work.failed(number) >= MOST_FAILURES:
                    work.fail(UserError(f"{server.url}: a prompt has failed {MOST_FAILURES} times: {why}", code=3))
                work.give_back(server, number)
                time.sleep(PERIOD_SECONDS)
            except UserError as error:
                work.fail(error)
            except Exception as error:  # what nobody has thought of ends the run, and leaves nobody waiting
                work.fail(UserError(f"{server.url}: {type(error).__name__}: {one_line(error)}", code=3))

    def _watch(self, server: Address, work: Work) -> None:
        """Sees whether it is up, and that it has the weights that are wanted, as long as there is work."""
        try:
            while not work.over:
                self._look(server, work)
                time.sleep(PERIOD_SECONDS)
        except Exception as error:  # as in _ask
            work.fail(UserError(f"{server.url}: {type(error).__name__}: {one_line(error)}", code=3))

    def _look(self, server: Address, work: Work) -> None:
        server.look()
        if not server.up:
            work.give_back(server)
        elif self._is_known(server, work) and work.wanted and work.is_behind(server):
            with server.reading:  # what was begun for work before may still go on
                if work.is_behind(server) and not work.over:
                    self._renew(server, work, work.wanted)

    def _is_known(self, server: Address, work: Work) -> bool:
        """Whether it has said what kind it is, now or before; one that was away may be another since."""
        if server.kind is None:
            try:
                server.meet()
            except Lost:
                return False  # it is looked at again
            except UserError as error:
                work.fail(error)
                return False
            work.look_again()
        return True

    def _check_some_are_left(self, work: Work) -> None:
        silent = time.monotonic() - max((server.seen for server in work.left), default=0.0)
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

    def _renew(self, server: Address, work: Work, wanted: Wanted) -> None:
        """Has a server read the weights, and makes sure that they are the trainer's; one that refuses, or says other
        numbers than the trainer, is not asked by this version. Where none is left, the work fails.
        """
        version = wanted.version
        try:
            if server.had != version.number or not self._is_as_before(server, wanted):
                server.had = None
                server.reread(version)
                self._check(server, wanted)
        except Lost as why:
            server.tries += not why.busy
            self._say(f"{server.url}: {why}: it is told again to read {version.folder}")
            if server.tries >= MOST_FAILURES:
                what = f"{server.url} has failed to read {version.folder}: {why}"
                self._refuse(server, work, version, UserError(what, code=3))
        except UserError as error:
            self._refuse(server, work, version, error)
        else:
            server.has, server.tries = version.number, 0
            work.look_again()

    def _refuse(self, server: Address, work: Work, version: Version, error: UserError) -> None:
        server.refused, server.tries = version.number, 0
        self._say(f"{error}: it is asked no more by these weights")
        if not work.left:
            work.fail(error)

    def _is_as_before(self, server: Address, wanted: Wanted) -> bool:
        """Whether it answers the probe to the last digit as when it had last read these weights."""
        before = server.said
        try:
            self._check(server, wanted)
        except UserError:
            return False
        return before is not None and server.said is not None and before[:2] == server.said[:2]

    def _check(self, server: Address, wanted: Wanted) -> None:
        """The probe: one token behind each text, drawn as sampling will draw.

        Raises UserError, code 3, where what the server says is not what the trainer does, and where it is to the last
        digit what it said before, though the trainer's own has changed: it has not read the folder.
        """
        version, probe = wanted
        prompts = probe.prompts
        body = {"prompt": prompts, "temperature": self._temperature, "max_tokens": 1, "seed": 0}
        answers = server.sample(body | {"logprobs": 0, "return_token_ids": True}, len(prompts))
        tokens, logps = [answer.tokens[0] for answer in answers], [answer.logps[0] for answer in answers]
        try:
            trainers = probe.said(tokens)
        except IndexError:
            raise UserError(f"{server.url} samples tokens that the run's model does not have", code=3) from None
        where, apart = f"{server.url}: after reading {version.folder}", np.abs(trainers - np.asarray(logps)).mean()
        if not apart <= TOLERANCE:
            raise UserError(
                f"{where} it says log-probabilities that are {apart:.3g} nats from the trainer's, {TOLERANCE:g} at "
                "most: stale weights, or another model, dtype or kind of log-probabilities",
                code=3,
            )
        if (before := server.said) and (tokens, logps) == (before.tokens, before.logps):
            moved = np.abs(trainers - before.trainers).mean()
            if moved > MOVED:
                raise UserError(
                    f"{where} it says to the last digit what it said before, and the trainer's log-probabilities have "
                    f"moved by {moved:.3g} nats: stale weights",
                    code=3,
                )
        server.said = Said(tokens, logps, trainers)


def _samples(answer: Any, samples: int) -> list[Sample]:
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if len(choices) != samples:
        raise ValueError(f"{len(choices)} answers, {samples} were asked for")
    found = [Sample(c["token_ids"], c["logprobs"]["token_logprobs"], c["finish_reason"]) for c in choices]
    if any(len(sample.tokens) != len(sample.logps) or not sample.tokens for sample in found):
        raise ValueError("an answer whose tokens and log-probabilities are not as many")
    if others := {sample.finish for sample in found} - {"stop", "length"}:
        raise Lost(f"an answer was ended by {one_line(others.pop())}")
    return found
