"""Where the answers of a rollout come from: the trainer's own mesh, in turns, or servers, while steps are learnt.

Servers are told to read the policy's weights and asked by one thread of process 0, one rollout after the other, and
max_staleness rollouts ahead: rollout n is sampled by the policy before rollout n - max_staleness was learnt, whichever
of them is ready sooner. So a run is the same however fast its servers are, and goes on as if nothing had been.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import numpy as np

from ringbpt.config import UserError
from ringbpt.processes import told
from ringbpt.rollout.engine import LocalEngine, Sample
from ringbpt.rollout.handover import Shelf
from ringbpt.rollout.http_engine import HttpEngine
from ringbpt.types import Params

LOOK_SECONDS = 0.5  # how often it is looked whether a signal has come


class Asked(NamedTuple):
    """A rollout's answers to each of its prompts, and what rewards that need no mesh say of each: float64 [rewards,
    answers], NaN where one has failed or is still to be asked. version: the rollout before which the policy's weights
    were these. seconds: that sampling took. facts: what an environment knows of it, for the log.
    """

    samples: list[list[Sample]]
    found: np.ndarray
    version: int
    seconds: float
    facts: dict[str, float]


Ask = Callable[[Any, int, int], Asked]  # (engine, number of a rollout, version)
IsMade = Callable[[int], bool]


class Interrupted(Exception):
    """A signal has come while a rollout was waited for. code: of the exit that it asks for."""

    def __init__(self, code: int):
        super().__init__(f"told to stop ({code})")
        self.code = code


class InTurns:
    """Sampling on the trainer's mesh, which holds the policy's weights a second time meanwhile."""

    def __init__(self, engine: LocalEngine, ask: Ask):
        self._engine, self._ask = engine, ask

    def hand_over(self, number: int, params: Params, have: bool, is_made: IsMade) -> None:
        pass

    def take(self, number: int, params: Params) -> Asked:
        self._engine.update(params)
        asked = self._ask(self._engine, number, number)
        self._engine.release()
        return asked

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


class Ahead:
    """Sampling by servers; all processes call the same methods, process 0 has the engine."""

    def __init__(
        self,
        engine: HttpEngine | None,
        ask: Ask,
        shelf: Shelf,
        staleness: int,
        count: int,
        say: Callable[[str], None],
        signalled: Callable[[], int] = lambda: 0,
    ):
        """staleness: how many rollouts are sampled ahead. count: of the run's rollouts. signalled: the exit code that a
        signal has asked this process for, or 0.
        """
        self._engine, self._ask, self._shelf, self._staleness, self._count = engine, ask, shelf, staleness, count
        self._thread = ThreadPoolExecutor(1, "rollouts")
        self._under_way: dict[int, Future[Asked]] = {}
        self._say, self._signalled = say, signalled

    def hand_over(self, number: int, params: Params, have: bool, is_made: IsMade) -> None:
        """Before rollout `number` is learnt, by these weights: begins what shall be sampled until then.

        have: whether that rollout is there already. is_made(n): whether a later one is.
        """
        wanted: list[tuple[int, int]] = []  # rollouts, and by the weights before which
        for n in range(number, number + self._staleness + 1) if self._engine else ():
            if n not in self._under_way and not (have if n == number else is_made(n)):
                version = max(n - self._staleness, 0)
                if version != number and not self._shelf.has(version):
                    self._say(
                        f"rollout {n} is sampled by newer weights than it would have been: those before rollout "
                        f"{version} are not in the run's folder any more"
                    )
                    version = number
                wanted.append((n, version))
        # Kept even where no rollout of this run is by them: one that goes on has it.
        if told(any(version == number for _, version in wanted) and not self._shelf.has(number)):
            self._shelf.put(number, params)
        if self._engine:
            self._shelf.drop_before(number - self._staleness)
        for n, version in wanted:
            if n < self._count:
                self._under_way[n] = self._thread.submit(self._one, n, version)

    def _one(self, number: int, version: int) -> Asked:
        assert self._engine is not None
        self._engine.update(self._shelf.version(version))
        return self._ask(self._engine, number, version)

    def take(self, number: int, params: Params) -> Asked:
        """Waits for it. Raises what has ended its sampling, on all processes a UserError or Interrupted."""
        if not self._engine:
            return decoded(told(None))
        under_way = self._under_way.pop(number)
        try:
            while not wait([under_way], LOOK_SECONDS).done:
                if code := self._signalled():
                    raise Interrupted(code)
            asked = under_way.result()
        except Exception as error:
            told({"error": str(error), "code": getattr(error, "code", 1), "stops": isinstance(error, Interrupted)})
            raise
        told(encoded(asked) if jax.process_count() > 1 else None)
        return asked

    def stop(self) -> None:
        """What is under way ends soon, once the rewards that it may ask do too."""
        if self._engine:
            self._engine.close()

    def close(self) -> None:
        self.stop()
        self._thread.shutdown(wait=True, cancel_futures=True)


def encoded(asked: Asked) -> list[Any]:
    """As JSON knows it."""
    return [*asked._replace(found=asked.found.tolist())]


def decoded(found: list[Any] | dict[str, Any]) -> Asked:
    """Raises UserError where process 0 has."""
    if isinstance(found, dict):
        raise Interrupted(found["code"]) if found.get("stops") else UserError(found["error"], code=found["code"])
    samples, of_each, version, seconds, facts = found
    return Asked([[Sample(*s) for s in answers] for answers in samples], np.array(of_each), version, seconds, facts)
