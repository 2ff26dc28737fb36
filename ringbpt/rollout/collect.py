"""One rollout after the other: prompts by number, samples, rewards, advantages, and the rows that steps learn from.

A rollout is one file in the run's folder, written whole or not at all; a run that goes on reads it and samples nothing
again. Which prompts it has, and by which keys they are answered, depends on its number and the seed alone.
"""

import json
import math
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from ringbpt.checkpoint.export import settings_beside
from ringbpt.checkpoint.load import describe_predicting, load_model
from ringbpt.config import Config, UserError, printable
from ringbpt.config.foreign import user_path
from ringbpt.config.rollouts import api_key
from ringbpt.data.documents import Piece, make_batch
from ringbpt.data.packing import best_fit
from ringbpt.data.prompts import read_prompts
from ringbpt.data.reading.files import digest_of, replacing, write_whole
from ringbpt.data.text.tokenizers import Tokenizer
from ringbpt.generation.generator import check_lengths
from ringbpt.generation.text import encode_prompts
from ringbpt.model.llama import Model
from ringbpt.objectives.advantages import OF_GROUPS, by_critic, reinforced
from ringbpt.objectives.objective import REFERENCE
from ringbpt.objectives.policy import ALGORITHMS
from ringbpt.rollout.ahead import Ahead, Asked, InTurns
from ringbpt.rollout.engine import LocalEngine, Sample
from ringbpt.rollout.episodes import Episodes
from ringbpt.rollout.handover import Shelf
from ringbpt.rollout.http_engine import HttpEngine
from ringbpt.rollout.page import page
from ringbpt.rollout.rewards import Answer, Rewards
from ringbpt.types import ALWAYS, Batch, Params

FORMAT = 1
# The mean of exp |difference of log-probabilities|, where sampler and policy are one: 1.01 in bfloat16.
WARNED, STOPPED = 1.05, 2.0
FOLDER, PAGE = "rollouts", "samples.html"
Arrays = dict[str, np.ndarray]  # columns, [updates, B, T]


class Place(NamedTuple):
    """Where a sample stands: in which update of its rollout, which row, and as which segment of it."""

    update: int
    row: int
    segment: int


class Prompts:
    """A file's prompts as tokens, in an order of the seed, epoch after epoch."""

    def __init__(self, config: Config, tokenizer: Tokenizer, episodes: Episodes | None = None):
        """episodes: what begins with the file's rows, where they are no prompts themselves."""
        name, self._seed = config.rollout.prompts, config.seed
        self.rows = read_prompts(user_path(name), "rollout.prompts", of_environment=episodes is not None)
        self.tokens = episodes.begin(self.rows) if episodes else encode_prompts(self.rows, tokenizer, name)
        self.longest = max(map(len, self.tokens))
        self.fingerprint = digest_of([json.dumps(self.rows), *(str(tokens.tolist()) for tokens in self.tokens)])

    def numbers(self, start: int, stop: int) -> list[int]:
        """Which prompts stand at these places of the endless order."""
        count = len(self.rows)

        @cache
        def order(epoch: int) -> np.ndarray:
            return np.random.Generator(np.random.Philox([self._seed, epoch])).permutation(count)

        return [int(order(place // count)[place % count]) for place in range(start, stop)]


class Rollouts:
    """batch(step, state): what the step learns from; every `updates` steps a new rollout, by the state's weights.

    rows, seq_length: of each batch, which holds its prompts with all their answers however long these become.
    """

    bytes_per_token = math.inf

    def __init__(
        self,
        config: Config,
        model: Model,
        tokenizer: Tokenizer,
        folder: Path,
        weights: Callable[[Any], tuple[Params, Params | None]],
        say: Callable[[str], None] = print,
        signalled: Callable[[], int] = lambda: 0,
    ):
        """folder: the run's. signalled: see Ahead. weights(state) -> (the policy's params, the reference's or None).

        Raises UserError for prompts that cannot be read, rewards that cannot be had, and rows that are too short.
        """
        rollout = config.rollout
        self._config, self._model, self._tokenizer, self._say, self._weights = config, model, tokenizer, say, weights
        self._folder, self._algorithm = folder / FOLDER, ALGORITHMS[config.objective]
        self._episodes = Episodes(rollout, tokenizer, say) if rollout.environment else None
        self._prompts = Prompts(config, tokenizer, self._episodes)
        self.seq_length = config.train_dataset.seq_length
        longest, per_row, self._most = self._room()
        per_update = math.ceil(rollout.prompts_per_step / rollout.updates)
        parts = config.mesh_shape.row_shards * config.optimizer.accumulate_gradient_steps
        self.rows = math.ceil(math.ceil(per_update / per_row) / parts) * parts
        self._sampler = self._samples_from(folder, longest, signalled)
        self._rewards = Rewards(rollout, model, longest, say) if rollout.reward else None
        self._teacher = teacher_of(config, model) if self._algorithm.advantage == "teacher" else None
        # Where and how patiently others are asked changes no answer.
        same = replace(rollout, servers="", server_timeout=1, reward_timeout=1, reward_failures=1)
        flags = (config.objective, config.seed, same, config.policy, self.rows)
        self.fingerprint = digest_of([self._prompts.fingerprint, *map(str, flags)])
        self._stats = jax.jit(_stats, static_argnums=(0, 3))
        self._number, self._waited, self._arrays = -1, 0.0, Arrays()
        self._facts: dict[int, dict[str, float]] = {}  # of the last two

    def _room(self) -> tuple[int, int, int]:
        """(tokens of a prompt and an answer, at most; how many prompts, with all their answers, a row surely holds;
        tokens of an answer, at most: with an environment's in it, as many as a row has room for).
        """
        rollout, flag = self._config.rollout, self._config.train_dataset.group
        prompt, each, most = self._prompts.longest, rollout.samples_per_prompt, rollout.most_drawn
        whole = prompt - 1 + each * most
        if whole > self.seq_length:
            turns = f" in --rollout.max_turns={rollout.max_turns}" if self._episodes else ""
            raise UserError(
                f"--train_dataset.{flag}.seq_length={self.seq_length} does not hold a prompt of {prompt} tokens with "
                f"--rollout.samples_per_prompt={each} of --rollout.max_new_tokens={rollout.max_new_tokens}{turns}: "
                f"--train_dataset.{flag}.seq_length={whole}"
            )
        if not self._episodes:
            return prompt + most, self.seq_length // whole, most
        limit = self._model.architecture.max_sequence_length
        check_lengths(prompt, most, limit)
        most = min((self.seq_length - prompt + 1) // each, limit - prompt)
        return prompt + most, 1, most

    def _samples_from(self, folder: Path, longest: int, signalled: Callable[[], int]) -> InTurns | Ahead:
        """Raises UserError where the run's servers cannot be had."""
        config, rollout, tokenizer = self._config, self._config.rollout, self._tokenizer
        most, ends = rollout.max_new_tokens, frozenset(tokenizer.ends.stop)
        if not rollout.servers:
            return InTurns(LocalEngine(self._model, longest - most, most, ends), self._ask)
        engine = None
        if jax.process_index() == 0:
            urls = [url.strip() for url in rollout.servers.split(",")]
            seconds = rollout.server_timeout
            engine = HttpEngine(urls, most, ends, rollout.temperature, api_key(), seconds, self._say)
            engine.find(longest)
        settings = settings_beside(config.load_checkpoint) if config.load_checkpoint else {}
        shelf = Shelf(folder, self._model, config.dtype, settings, self._prompts.tokens[0])
        count = math.ceil(config.total_steps / rollout.updates)
        return Ahead(engine, self._ask, shelf, rollout.max_staleness, count, self._say, signalled)

    def describe(self) -> str:
        rollout = self._config.rollout
        return (
            f"{len(self._prompts.rows):,} prompts of {self._prompts.longest} tokens at most; a rollout has "
            f"{rollout.prompts_per_step} x {rollout.samples_per_prompt} answers of {self._most} tokens at "
            f"most, learnt in {rollout.updates} step(s) of {self.rows} x {self.seq_length:,}"
        )

    def batch(self, step: int, state: Any) -> Batch:
        """What is learnt in a step, from 0; where a new rollout begins with it, it is made with the state's weights."""
        number, update = divmod(step, self._config.rollout.updates)
        if number != self._number:
            jax.block_until_ready(state)  # of the step before, which is no time of a rollout's
            begin = time.perf_counter()
            policy, reference = self._weights(state)
            found = self._read(number)
            self._sampler.hand_over(number, policy, found is not None, lambda n: self._stored(n) is not None)
            self._arrays, facts = found or self._make(number, policy, reference)
            self._number, self._facts = number, {number - 1: self._facts.get(number - 1, {}), number: facts}
            self._waited += time.perf_counter() - begin
        arrays = {name: array[update] for name, array in self._arrays.items()}
        host, shape = Batch.of(arrays), (self.rows, self.seq_length)
        return self._model.put_batch(host.rows, shape)

    def facts(self, step: int, row: dict[str, float]) -> dict[str, float]:
        """What is known of the rollout that the step, from 1, has learnt from: for its row of metrics.

        Says where the row tells that answers were not drawn by the policy that learns from them, though they should be.
        Raises UserError, code 3, where that is beyond what a correction could mend.
        """
        found, mismatch = self._facts.get((step - 1) // self._config.rollout.updates, {}), row.get("mismatch", 1.0)
        if mismatch > WARNED and not found.get("rollout/staleness"):
            what = (
                f"step {step}: mismatch {mismatch:.3g}: answers were not drawn with the probabilities that the policy "
                "has: another dtype, other weights, or log-probabilities of another temperature"
            )
            if mismatch > STOPPED:
                raise UserError(f"{what}; {STOPPED:g} is the most that is learnt from", code=3)
            self._say(f"warning: {what}")
        return found

    def take_waited(self) -> float:
        """Seconds that rollouts have taken since this was last asked."""
        seconds, self._waited = self._waited, 0.0
        return seconds

    def close(self) -> None:
        self._sampler.stop()
        for part in (self._rewards, self._episodes):
            if part:
                part.close()
        self._sampler.close()

    # --- one rollout ---

    def _prompts_of(self, number: int) -> tuple[list[int], list[np.ndarray]]:
        """The numbers of a rollout's prompts, and their tokens."""
        each = self._config.rollout.prompts_per_step
        numbers = self._prompts.numbers(number * each, (number + 1) * each)
        return numbers, [self._prompts.tokens[n] for n in numbers]

    def _ask(self, engine: LocalEngine | HttpEngine, number: int, version: int) -> Asked:
        """A rollout's answers; it needs nothing that another thread changes."""
        begin, rollout, seed = time.perf_counter(), self._config.rollout, partial(_seed, self._config, number)
        numbers, prompts = self._prompts_of(number)
        if self._episodes:
            rows = [self._prompts.rows[n] for n in numbers]
            samples, reward_PR, known = self._episodes.play(engine, numbers, rows, prompts, self._most, seed)
            return Asked(samples, reward_PR.reshape(1, -1), version, time.perf_counter() - begin, known)
        samples = engine.generate(prompts, rollout.samples_per_prompt, rollout.temperature, seed())
        sampled = time.perf_counter() - begin
        found = self._rewards.asked(self._answers(number, samples)) if self._rewards else np.zeros((0, 0))
        return Asked(samples, found, version, sampled, {})

    def _answers(self, number: int, samples: list[list[Sample]]) -> list[Answer]:
        return [
            Answer.of(self._tokenizer, prompt, sample, self._prompts.rows[n])
            for n, prompt, answered in zip(*self._prompts_of(number), samples, strict=True)
            for sample in answered
        ]

    def _make(self, number: int, params: Params, reference: Params | None) -> tuple[Arrays, dict]:
        rollout, begin = self._config.rollout, time.perf_counter()
        _, prompts = self._prompts_of(number)
        samples, found, version, seconds, known = self._sampler.take(number, params)
        waited = time.perf_counter() - begin
        shape = len(prompts), rollout.samples_per_prompt
        if self._rewards:
            found = self._rewards.summed(self._answers(number, samples), found)
        reward_PR = found.reshape(shape) if found.size else np.zeros(shape)
        arrays, places = self._laid_out(prompts, samples, reward_PR)
        own = {"old_logp": "logp_BT"} if rollout.updates > 1 else {}
        own |= {"old_value": "value_BT"} if self._algorithm.has_critic else {}
        arrays |= self._said(self._model, params, arrays, own)
        if reference is not None:
            arrays |= self._said(self._model, reference, arrays, {REFERENCE: "logp_BT"})
        if self._teacher:
            arrays |= self._said(*self._teacher, arrays, {REFERENCE: "logp_BT"})
        arrays |= self._advantages(reward_PR, arrays, places)
        lengths = [int(sample.mask.sum()) for answers in samples for sample in answers]
        cut = [sample.finish == "length" for answers in samples for sample in answers]
        valued = [row[~np.isnan(row)] for row in reward_PR]  # of a prompt whose rewards have all failed there are none
        spread = np.array([float(np.std(row)) if row.size else 0.0 for row in valued])
        facts = known | {
            "rollout/reward_spread": float(np.mean(spread)),
            "rollout/without_spread": float(np.mean(spread == 0)),
            "rollout/failed": float(np.isnan(reward_PR).sum()),
            "rollout/longest": float(max(lengths)),
            "rollout/cut_short": float(np.mean(cut)),
            "rollout/tokens_per_second": sum(lengths) / seconds,
            "rollout/seconds": time.perf_counter() - begin,
            "rollout/waited": waited,
            "rollout/staleness": float(number - version),
        }
        self._show(number, prompts, samples, reward_PR)
        if jax.process_index() == 0:
            self._write(number, arrays, facts, reward_PR)
        return arrays, facts

    def _laid_out(
        self, prompts: Sequence[np.ndarray], samples: list, reward_PR: np.ndarray
    ) -> tuple[Arrays, list[list[Place]]]:
        """({column: [updates, B, T]}, the place of each sample): each prompt once, with all its answers, in a row."""
        updates = self._config.rollout.updates
        columns = ("advantage", "rollout_logp", "last", *(("reward",) if self._rewards else ()))
        places: list[list[Place]] = [[] for _ in prompts]
        batches = []
        for update in range(updates):
            own = range(update, len(prompts), updates)
            sizes = [len(prompts[p]) - 1 + sum(len(sample.tokens) for sample in samples[p]) for p in own]
            row_of, _ = best_fit(np.array(sizes, np.int64), self.seq_length)
            rows: list[list[Piece]] = [[] for _ in range(self.rows)]
            for p, row in zip(own, row_of.tolist(), strict=True):
                for r, sample in enumerate(samples[p]):
                    reward = float(np.nan_to_num(reward_PR[p, r]))
                    places[p].append(Place(update, row, len(rows[row]) + 1))
                    rows[row].append(_piece(prompts[p], sample, reward, unit=p, first=r == 0))
            batches.append(make_batch(rows, (self.rows, self.seq_length), [*ALWAYS, *columns]).by_name())
        return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}, places

    def _said(self, model: Model, params: Params, arrays: Arrays, wanted: dict[str, str]) -> Arrays:
        """{column: what a model says at each place with a target, [updates, B, T]}, by one pass; wanted: the columns,
        and the fields of TokenStats that they are.
        """
        found = {name: np.zeros(arrays["token"].shape, np.float32) for name in wanted}
        for update in range(len(arrays["token"])) if wanted else ():
            host = Batch.of({name: array[update] for name, array in arrays.items()})
            shape = (self.rows, self.seq_length)
            batch, order = model.put_batch(host.rows, shape), model.order_of(host.meta)
            stats = self._stats(model, params, batch, tuple(wanted.values()))
            if jax.process_count() > 1:
                stats = multihost_utils.process_allgather(stats, tiled=True)
            for array, said in zip(found.values(), stats, strict=True):
                array[update] = order.in_text_order(np.asarray(said))
        return {name: np.where(arrays["weight"] > 0, array, 0.0) for name, array in found.items()}

    def _advantages(self, reward_PR: np.ndarray, arrays: Arrays, places: list[list[Place]]) -> Arrays:
        """The columns that follow from rewards: "advantage", and with a critic "return"."""
        kind = self._algorithm.advantage
        at = [(place, self._sampled(arrays, place)) for answered in places for place in answered]
        if kind in OF_GROUPS:
            of_answers = OF_GROUPS[kind](reward_PR).ravel()
            found = [np.full(len(targets), value) for (_, targets), value in zip(at, of_answers, strict=True)]
            return {"advantage": _filled(arrays, at, found)}
        if kind == "teacher":
            own = arrays.get("old_logp", arrays["rollout_logp"])
            nearer = np.float64(arrays[REFERENCE]) - own
            found = [nearer[place.update, place.row, targets] for place, targets in at]
            return {"advantage": _filled(arrays, at, found)}
        policy, costs = self._config.policy, [np.zeros(len(targets)) for _, targets in at]
        if policy.kl_in_reward:
            ratio = np.float64(arrays.get("old_logp", arrays["rollout_logp"])) - arrays[REFERENCE]
            costs = [policy.kl_coefficient * ratio[place.update, place.row, targets] for place, targets in at]
        if not self._algorithm.has_critic:
            found = reinforced(reward_PR, costs, policy.discount, kind == "group_whitened")
            return {"advantage": _filled(arrays, at, found)}
        values = [np.float64(arrays["old_value"][place.update, place.row, targets]) for place, targets in at]
        found, came = by_critic(reward_PR, costs, values, policy.discount, policy.decay)
        return {"advantage": _filled(arrays, at, found), "return": _filled(arrays, at, came)}

    def _sampled(self, arrays: Arrays, place: Place) -> np.ndarray:
        """The places of a row at which a sample's tokens are the targets."""
        segment, weight = (arrays[name][place.update, place.row] for name in ("segment", "weight"))
        return np.flatnonzero((segment == place.segment) & (weight > 0))

    def _show(self, number: int, prompts: Sequence[np.ndarray], samples: list, reward_PR: np.ndarray) -> None:
        """An answer in the terminal, and all of some prompts as a page, as often as there is a line of metrics."""
        if number * self._config.rollout.updates % self._config.log_freq == 0 and jax.process_index() == 0:
            text = self._tokenizer.decode(prompts[0], True), self._tokenizer.decode(samples[0][0].said)
            shown = (printable(json.dumps(part[-60:] if n == 0 else part[:60])) for n, part in enumerate(text))
            self._say(f"rollout {number}: {' -> '.join(shown)}: reward {reward_PR[0, 0]:.3f}")
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._folder.parent / PAGE, page(number, self._tokenizer, prompts, samples, reward_PR))

    # --- its file ---

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:08d}.npz"

    def _write(self, number: int, arrays: Arrays, facts: dict[str, float], reward_PR: np.ndarray) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        about = json.dumps({"format": FORMAT, "fingerprint": self.fingerprint, "facts": facts})
        with replacing(self._file(number)) as file:
            np.savez(file, about=np.array(about), rewards=reward_PR, **arrays)

    def _stored(self, number: int) -> tuple[Arrays, dict[str, float]] | None:
        """A rollout that was made before, whole and by the same flags; None where there is none."""
        file = self._file(number)
        with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
            with np.load(BytesIO(file.read_bytes())) as stored:  # whose arrays are checked as they are read
                arrays = {name: stored[name] for name in stored.files}
            about = json.loads(str(arrays.pop("about")))
            arrays.pop("rewards")
            if (about["format"], about["fingerprint"]) == (FORMAT, self.fingerprint):
                return arrays, about["facts"]
        return None

    def _read(self, number: int) -> tuple[Arrays, dict[str, float]] | None:
        """What is stored, where all processes can read it."""
        found = self._stored(number)
        if jax.process_count() > 1 and not np.all(multihost_utils.process_allgather(np.array(found is not None))):
            return None
        return found


def teacher_of(config: Config, student: Model) -> tuple[Model, Params]:
    """The model of --reference_checkpoint, of any size, on the student's mesh, at the temperature that it samples at.

    Raises UserError for one with another vocabulary, or which predicts no tokens.
    """
    spec = config.reference_checkpoint
    own = student.architecture
    try:
        found = describe_predicting(spec).architecture
    except UserError as error:  # where it is found is said as of a policy
        raise UserError(f"--reference_checkpoint={spec}: {error}", code=error.code) from None
    if found.vocab_size != own.vocab_size:
        raise UserError(
            f"--reference_checkpoint={spec}: its vocabulary has {found.vocab_size} tokens and the student's "
            f"{own.vocab_size}: a teacher reads the student's tokens, so give one with the same tokenizer"
        )
    shape, length = tuple(student.mesh.shape.values()), own.max_sequence_length
    try:
        model, params = load_model(spec, shape, config.dtype, student.execution, max_sequence_length=length)
    except UserError as error:  # what is given as a checkpoint elsewhere
        raise UserError(f"--reference_checkpoint={spec}: {error}", code=error.code) from None
    return replace(model, temperature=student.temperature), params


def _seed(config: Config, number: int, turn: int = 0) -> int:
    """By which a rollout's answers are drawn, and the later turns of trajectories."""
    return zlib.crc32(f"{config.seed} {number}{f' {turn}' if turn else ''}".encode())


def _stats(model: Model, params: Params, batch: Batch, fields: tuple[str, ...]) -> tuple[jax.Array, ...]:
    """What a model says of each place, [B, T], by these fields of TokenStats: "logp_BT", "value_BT"."""
    head = "both" if len(fields) > 1 else "score" if fields == ("value_BT",) else "unembed"
    stats = model.token_stats(params, batch, head)
    return tuple(getattr(stats, field) for field in fields)


def _filled(arrays: Arrays, at: list[tuple[Place, np.ndarray]], values: Sequence[np.ndarray]) -> np.ndarray:
    """A column with each sample's values at its own places."""
    found = np.zeros(arrays["token"].shape, np.float32)
    for (place, targets), value in zip(at, values, strict=True):
        found[place.update, place.row, targets] = value
    return found


def _piece(prompt: np.ndarray, sample: Sample, reward: float, unit: int, first: bool) -> Piece:
    """A prompt and one of its answers; behind the first, all but the prompt's last token is shared with it."""
    shared = 0 if first else len(prompt) - 1
    tokens = np.concatenate([prompt, sample.tokens]).astype(np.int32)[shared:]
    before = len(tokens) - len(sample.tokens)
    logp = np.concatenate([np.zeros(before), sample.logps]).astype(np.float32)
    values = {
        "token": tokens,
        "mask": np.concatenate([np.zeros(before), sample.mask]).astype(np.float32),
        "rollout_logp": logp,
        "advantage": np.zeros(len(tokens), np.float32),
        "reward": np.full(len(tokens), reward, np.float32),
    }
    return Piece(len(tokens) - 1, values, unit, shared)
