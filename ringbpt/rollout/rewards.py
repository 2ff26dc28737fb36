"""What a sample is worth: python functions, our own reward models, and HTTP servers that speak OpenRLHF's JSON.

A reward that fails (raises, takes too long, is no number) is NaN, counted, and its sample leaves its group.
"""

import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple
from urllib.error import URLError
from urllib.request import Request, urlopen

import jax
import jax.numpy as jnp
import numpy as np

from ringbpt.checkpoint.load import describe_checkpoint, load_model
from ringbpt.config import CHECKPOINT_PREFIXES, RolloutConfig, UserError, printable
from ringbpt.data.documents import Piece, make_batch
from ringbpt.data.packing import best_fit
from ringbpt.data.text.tokenizers import Tokenizer
from ringbpt.layouts import by_length, row_length
from ringbpt.mesh import put_batch
from ringbpt.model.llama import Model
from ringbpt.objectives.units import by_document, ends
from ringbpt.rollout.engine import Sample
from ringbpt.rollout.process import Process

RETRY_SECONDS = 1.0


class Answer(NamedTuple):
    """What a reward looks at. prompt, completion: as text. tokens: ids of both. row: the prompt's line of its file."""

    prompt: str
    completion: str
    tokens: np.ndarray
    row: dict[str, Any]

    @staticmethod
    def of(tokenizer: Tokenizer, prompt: np.ndarray, sample: Sample, row: dict[str, Any]) -> "Answer":
        tokens = np.concatenate([prompt, sample.tokens]).astype(np.int32)
        return Answer(tokenizer.decode(prompt, True), tokenizer.decode(sample.said), tokens, row)


Reward = Callable[[Sequence[Answer]], list[float]]  # a number an answer; NaN: it failed
Say = Callable[[str], None]


@dataclass
class Function:
    """A python file's function, FILE.py:NAME, called as NAME(prompt=, completion=, row=), in a process of its own."""

    process: Process
    say: Say
    on_mesh: ClassVar[bool] = False

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        asked = [{"prompt": a.prompt, "completion": a.completion, "row": a.row} for a in answers]
        found = self.process.ask(asked)
        for each in found:
            if "error" in each:
                self.say(f"{self.process.where}: {printable(each['error'])}")
        return [each.get("reward", math.nan) for each in found]

    def close(self) -> None:
        self.process.close()


@dataclass
class Server:
    """An address that answers OpenRLHF's JSON: {"query", "prompts", "labels"}, lists, with {"rewards": [numbers]}.

    Asked again until the time is over; then all are NaN.
    """

    url: str
    seconds: float
    say: Say
    on_mesh: ClassVar[bool] = False

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        asked = {
            "query": [answer.prompt + answer.completion for answer in answers],
            "prompts": [answer.prompt for answer in answers],
            "labels": [answer.row.get("label") for answer in answers],
        }
        request = Request(self.url, json.dumps(asked).encode(), {"Content-Type": "application/json"})
        end, why = time.monotonic() + self.seconds, ""
        while (left := end - time.monotonic()) > 0:
            try:
                with urlopen(request, timeout=left) as response:
                    return _numbers(json.loads(response.read()), len(answers))
            except (URLError, OSError, ValueError, KeyError, TypeError) as error:
                why = printable(str(error))
            time.sleep(min(RETRY_SECONDS, max(0.0, end - time.monotonic())))
        self.say(f"--rollout.reward={self.url}: {why or 'no answer'}, for {self.seconds:g} s")
        return [math.nan] * len(answers)

    def close(self) -> None:
        pass


def _numbers(found: dict[str, Any], count: int) -> list[float]:
    rewards = found["rewards"]
    if not isinstance(rewards, list) or len(rewards) != count:
        raise ValueError(f"no list of {count} rewards")
    return [float(x) if isinstance(x, int | float) and math.isfinite(x) else math.nan for x in rewards]


class OurModel:
    """A reward model on the trainer's mesh, which reads the tokens as they were sampled; all processes ask it."""

    on_mesh: ClassVar[bool] = True

    def __init__(self, spec: str, policy: Model, longest: int):
        """longest: tokens of prompt and answer, at most. Raises UserError for a model that scores nothing, or has
        another vocabulary.
        """
        found = describe_checkpoint(spec).architecture
        where = f"--rollout.reward={spec}"
        if found.head != "score":
            raise UserError(f"{where} says no scores: a run of --objective=reward does")
        if found.vocab_size != policy.architecture.vocab_size:
            raise UserError(
                f"{where}: its vocabulary has {found.vocab_size} tokens and the policy's "
                f"{policy.architecture.vocab_size}: it reads the policy's tokens, so give one with the same tokenizer"
            )
        mesh = policy.mesh
        self._model, self._params = load_model(spec, tuple(mesh.shape.values()), policy.compute_dtype)
        self._length = row_length(longest, mesh.shape["sp"], self._model.execution.scan_mlp_chunk_size)
        self._parts = mesh.shape["dp"] * mesh.shape["fsdp"]
        self._score = jax.jit(self._scores)

    def _scores(self, params: Any, batch: Any) -> jax.Array:
        """Of each document the value at its last token, [B, T + 1]."""
        value_BT = self._model.token_stats(params, batch, "score").value_BT
        return by_document(jnp.where(ends(batch), value_BT, 0.0), batch)

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        sizes = np.array([len(answer.tokens) for answer in answers])
        row_of, count = best_fit(sizes, self._length)
        rows: list[list[int]] = [[] for _ in range(-(-count // self._parts) * self._parts)]
        for number, row in enumerate(row_of.tolist()):
            rows[row].append(number)
        pieces = [Piece(len(a.tokens), {"token": a.tokens, "mask": np.zeros(len(a.tokens))}) for a in answers]
        shape, found = (self._parts, self._length), np.zeros(len(answers))
        for at in range(0, len(rows), self._parts):
            group = rows[at : at + self._parts]
            host = make_batch([[pieces[number] for number in row] for row in group], shape)
            layout = by_length(self._model.execution.sequence_layout)  # answers are known by their numbers in the row
            batch = put_batch(host.rows, shape, self._model.mesh, layout)
            scores = np.asarray(jax.device_get(self._score(self._params, batch)))
            for b, row in enumerate(group):
                found[row] = scores[b, 1 : 1 + len(row)]
        return found.tolist()

    def close(self) -> None:
        pass


class Rewards:
    """The sum of all that --rollout.reward names, each with its weight. failed: how many were NaN so far."""

    def __init__(self, config: RolloutConfig, policy: Model, longest: int, say: Say = print):
        """Raises UserError for what is none of the three kinds, and where one cannot be had."""
        specs = [spec.strip() for spec in config.reward.split(",")]
        self._weights = _weights(config, len(specs))
        self._normalise, self._limit, self._say, self.failed = config.reward_normalise, config.reward_failures, say, 0
        self._parts = [_reward(spec, config, policy, longest, say) for spec in specs]

    def __call__(self, answers: Sequence[Answer]) -> np.ndarray:
        """float64 [answers]; NaN where any part has failed. Raises UserError, code 3, where too many have."""
        return self.summed(answers, self.asked(answers))

    def asked(self, answers: Sequence[Answer]) -> np.ndarray:
        """float64 [parts, answers] of what needs no mesh, by process 0, of which a thread may ask; else NaN."""
        return np.array([[math.nan] * len(answers) if part.on_mesh else part(answers) for part in self._parts])

    def summed(self, answers: Sequence[Answer], found: np.ndarray) -> np.ndarray:
        """What __call__ gives, of what was asked before; all processes call it, and are given what process 0 has."""
        found = np.array([part(answers) if part.on_mesh else found[i] for i, part in enumerate(self._parts)])
        total = combined(found, self._weights, self._normalise)
        self.failed += int(np.isnan(total).sum())
        check_failures("--rollout.reward", "rewards", total, self._limit)
        return total

    def close(self) -> None:
        for part in self._parts:
            part.close()


def check_failures(flag: str, what: str, found: np.ndarray, limit: float) -> None:
    """Raises UserError, code 3, where more of a rollout's rewards than the share `limit` have failed, which are NaN."""
    failed = int(np.isnan(found).sum())
    if failed > limit * found.size:
        raise UserError(
            f"{flag}: {failed} of {found.size} {what} of a rollout have failed, and "
            f"--rollout.reward_failures={limit:g} is the share that may", code=3
        )  # fmt: skip


def combined(found: np.ndarray, weights: Sequence[float], normalise: bool) -> np.ndarray:
    """[parts, answers] -> [answers]: the weighed sum; normalise: of each part less its mean, in units of its spread."""
    if normalise:
        spread = np.nanstd(found, axis=1, keepdims=True)
        found = (found - np.nanmean(found, axis=1, keepdims=True)) / np.where(spread > 0, spread, 1.0)
    return np.tensordot(np.asarray(weights), found, 1)


def _weights(config: RolloutConfig, count: int) -> list[float]:
    if not config.reward_weights:
        return [1.0] * count
    try:
        weights = [float(part) for part in config.reward_weights.split(",")]
    except ValueError:
        raise UserError(f"--rollout.reward_weights={config.reward_weights} is no list of numbers, as 1,0.5") from None
    if len(weights) != count:
        raise UserError(f"--rollout.reward_weights has {len(weights)} numbers and --rollout.reward names {count}")
    return weights


def _reward(spec: str, config: RolloutConfig, policy: Model, longest: int, say: Say) -> Any:
    if re.match(r"https?://", spec):
        return Server(spec, config.reward_timeout, say)
    if spec.partition("::")[0] in CHECKPOINT_PREFIXES and "::" in spec:
        return OurModel(spec, policy, longest)
    choices = "none of FILE.py:NAME, PREFIX::PATH of a reward model, and http://HOST/PATH"
    return Function(Process("rollout.reward", spec, "reward", config.reward_timeout, choices), say)
