"""Text out: prompts packed into rows, one prefill, then one token a step until every text has ended."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ringbpt.attention import permutation
from ringbpt.config import UserError
from ringbpt.data.documents import Piece, make_batch
from ringbpt.data.packing import best_fit
from ringbpt.dims import ACTIVATION_AXES, spec
from ringbpt.generation.decode import CACHE, Cache, make_decode, make_last_logits, make_prefill, make_split
from ringbpt.generation.sampling import Options, Sampling, draw, filtered, options_of, penalise, token_logp
from ringbpt.layouts import inverse, row_length
from ringbpt.mesh import put_batch
from ringbpt.model.llama import Model
from ringbpt.types import Batch, Params, TokenMeta

Rows = list[list[int]]  # the prompts that are generated together, by number: those of each row of a batch


class BatchShape(NamedTuple):
    """The sizes that a program is compiled for: rows, tokens of a row, texts of a row, new tokens of a text."""

    rows: int
    length: int
    texts: int
    new_tokens: int


class Draw(NamedTuple):
    """How a text is drawn: by which options and seed, and as which number of its seed's texts.

    These alone decide its tokens, and not what is generated beside it.
    """

    sampling: Sampling
    number: int


class NewToken(NamedTuple):
    """A token of a text, and its log-probability in nats under the distribution that it was drawn from.

    That has the repetition penalty, the temperature and what top-k, top-p and min-p leave in. A greedy token's is that
    of the softmax of the (penalised) logits, as at temperature 1.
    """

    id: int
    logp: float


def plan_batches(
    lengths: Sequence[int], model: Model, batch_size: int, new_tokens: int
) -> tuple[BatchShape, list[Rows]]:
    """One shape for all prompts, so that a file of them compiles once, and the batches, the longest prompts first.

    The first `batch_size` prompts decide how many rows and texts a row there are: those of a later batch are shorter
    one by one, and stand where theirs stand. Raises UserError where prompt and new tokens are above the model's length.
    """
    mesh, chunk = model.mesh.shape, model.execution.scan_mlp_chunk_size
    longest = max(lengths)
    check_lengths(longest, new_tokens, model.architecture.max_sequence_length)
    length = row_length(longest, mesh["sp"], chunk)
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    row_of, count = best_fit(np.array([lengths[number] for number in order[:batch_size]]), length)
    batches: list[Rows] = []
    for first in range(0, len(order), batch_size):
        batches.append([[] for _ in range(count)])
        for number, row in zip(order[first : first + batch_size], row_of.tolist(), strict=False):
            batches[-1][row].append(number)
    parts = mesh["dp"] * mesh["fsdp"]
    return BatchShape(-(-count // parts) * parts, length, max(map(len, batches[0])), new_tokens), batches


def rounded_length(longest: int, model: Model) -> int:
    """Tokens of a row, a power of two where the mesh and the chunks allow: few programs serve prompts of any length."""
    power = 1 << max(longest - 1, 63).bit_length()
    return row_length(power, model.mesh.shape["sp"], model.execution.scan_mlp_chunk_size)


def check_lengths(longest: int, new_tokens: int, limit: int) -> None:
    """Raises UserError where the longest prompt and what follows it are more than a model's `limit` of tokens."""
    if longest + new_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens and --max_new_tokens={new_tokens} are above the model's {limit}: "
            f"--max_new_tokens={max(limit - longest, 1)} at most, or --max_sequence_length={longest + new_tokens}"
        )


def check_vocabulary(prompts: Sequence[np.ndarray], vocab_size: int) -> None:
    """Raises UserError where a prompt's tokens cannot be the model's."""
    largest = max((int(prompt.max()) for prompt in prompts if len(prompt)), default=0)
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer gives token {largest}, and the model has a vocabulary of {vocab_size}: give the tokenizer "
            "that belongs to it"
        )


class Generator:
    """A model ready to generate, on its mesh; what is compiled for a BatchShape is kept."""

    def __init__(self, model: Model, params: Params):
        self.model = model
        self._split = make_split(model)
        self.weights = self._split(params)
        self._programs: dict[Any, Any] = {}

    def update(self, params: Params) -> None:
        """Takes other weights, of the shapes, dtypes and shardings that the first had: nothing is compiled again."""
        self.weights = {}  # let go of before the new are made
        self.weights = self._split(params)

    def tokens(
        self,
        prompts: Sequence[np.ndarray],
        shape: BatchShape,
        batch: Rows,
        sampling: Sampling,
        samples: int = 1,
        draws: Sequence[Draw] = (),
    ) -> Iterator[dict[int, NewToken]]:
        """{number of a text: its next token} at each step; the caller stops taking when all texts have ended.

        Each prompt has so many samples, which share its one prefill: text number i is of prompt i // samples, and drawn
        by a key of its own. draws: of each text, where not all are drawn as `sampling` says and by their own numbers;
        one program has all or none of them greedy, and all or none penalised, as `sampling` is.
        """
        mesh, layout = self.model.mesh, self.model.execution.sequence_layout
        host, place_BQ, ends = pack(prompts, shape, batch, permutation(layout, shape.length, mesh.shape["sp"]), samples)
        numbers = [[number * samples + i for number in row for i in range(samples)] for row in batch]
        texts = {(b, q): number for b, row in enumerate(numbers) for q, number in enumerate(row)}
        drawn, penalised = sampling.temperature > 0, sampling.repetition_penalty != 1.0
        prefill, first, step = self._compiled(shape, drawn, penalised)
        global_batch = put_batch(host.rows, host.token_BT.shape, mesh, layout)
        row = NamedSharding(mesh, spec("B _", ACTIVATION_AXES))
        options, key_P = _options_and_keys(texts, shape, sampling, draws)
        of_prompts = {place: number // samples for place, number in texts.items()}
        seen_PV = seen_tokens(prompts, of_prompts, shape, self.model.architecture.vocab_size) if penalised else None
        cache, x_BTD = prefill(self.weights, global_batch)
        token_BQ, logp_BQ, seen_PV = first(self.weights, x_BTD, jax.device_put(place_BQ, row), options, key_P, seen_PV)
        meta = jax.device_put(ends, row)
        for i in range(shape.new_tokens):
            current = token_BQ, logp_BQ
            if i + 1 < shape.new_tokens:  # sent before this token is looked at, so that the device never waits
                token_BQ, logp_BQ, cache, meta, seen_PV = step(
                    self.weights, cache, token_BQ, meta, jnp.int32(i), options, key_P, seen_PV
                )
            ids_BQ, logps_BQ = jax.device_get(current)
            yield {number: NewToken(int(ids_BQ[at]), float(logps_BQ[at])) for at, number in texts.items()}

    def _compiled(self, shape: BatchShape, drawn: bool, penalised: bool) -> tuple[Callable, Callable, Callable]:
        key = (shape, drawn, penalised)
        if key not in self._programs:
            prefill = make_prefill(self.model, new_share(shape, self.model.mesh.shape["sp"]))
            self._programs[key] = (prefill, *make_steps(self.model, shape, drawn, penalised))
        return self._programs[key]


def _options_and_keys(
    texts: dict[tuple[int, int], int], shape: BatchShape, sampling: Sampling, draws: Sequence[Draw]
) -> tuple[Options, jax.Array]:
    """Of each place of [rows, texts]: the options, numbers or (of `draws`) [P, 1], and the key of its text."""
    numbers_BQ, seeds_BQ = (np.zeros((shape.rows, shape.texts), np.uint32) for _ in range(2))
    placed = np.full((shape.rows, shape.texts), sampling, object)
    for place, number in texts.items():
        drawn = draws[number] if draws else Draw(sampling, number)
        placed[place], seeds_BQ[place], numbers_BQ[place] = drawn.sampling, drawn.sampling.seed, drawn.number
    key_P = _keys(jnp.asarray(seeds_BQ.reshape(-1)), jnp.asarray(numbers_BQ.reshape(-1)))
    return options_of(placed.reshape(-1)) if draws else sampling.options(), key_P


@jax.jit
def _keys(seed_P: jax.Array, number_P: jax.Array) -> jax.Array:
    return jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(seed_P, number_P)


def new_share(shape: BatchShape, sp: int) -> int:
    """Places of a device's share for new tokens, and for those that other devices keep; the last is never a key."""
    return (-(-(shape.new_tokens - 1) // sp) + 1) * shape.texts


def make_steps(model: Model, shape: BatchShape, drawn: bool, penalised: bool) -> tuple[Callable, Callable]:
    """(first, step), jitted. first: the token after each prompt; step: one token later, the cache donated."""
    decode = make_decode(model, shape.length // model.mesh.shape["sp"])
    last_logits = make_last_logits(model)

    def pick(logits_BQV, options: Options, key_P, step, seen_PV):
        logits_PV = logits_BQV.reshape(-1, logits_BQV.shape[-1])
        if penalised:
            logits_PV = penalise(logits_PV, seen_PV, options.repetition_penalty)
        drawn_from_PV = filtered(logits_PV, options) if drawn else logits_PV
        token_P = draw(drawn_from_PV, key_P, step) if drawn else jnp.argmax(logits_PV, axis=-1).astype(jnp.int32)
        logp_P = token_logp(drawn_from_PV, token_P)
        if penalised:
            seen_PV = seen_PV.at[jnp.arange(len(token_P)), token_P].set(True)
        return token_P.reshape(logits_BQV.shape[:2]), logp_P.reshape(logits_BQV.shape[:2]), seen_PV

    def first(weights, x_BTD, place_BQ, options, key_P, seen_PV):
        logits_BQV = last_logits(weights["norm"], weights["unembed"], x_BTD, place_BQ)
        return pick(logits_BQV, options, key_P, jnp.int32(0), seen_PV)

    def step(weights, cache, token_BQ, meta, i, options, key_P, seen_PV):
        logits_BQV, cache = decode(weights, cache, token_BQ, meta, i)
        token_BQ, logp_BQ, seen_PV = pick(logits_BQV, options, key_P, i + 1, seen_PV)
        return token_BQ, logp_BQ, cache, replace(meta, position_BT=meta.position_BT + 1), seen_PV

    # Said, so that what a step gives is placed as what it takes, and the second one is no other program.
    row, cache, meta = (NamedSharding(model.mesh, spec(dims, ACTIVATION_AXES)) for dims in ("B _", CACHE, "B S"))
    whole = NamedSharding(model.mesh, PartitionSpec())
    layers = (cache,) * model.architecture.num_hidden_layers
    caches = Cache(layers, layers, meta)
    return jax.jit(first, out_shardings=(row, row, whole)), jax.jit(
        step, donate_argnums=(1, 3, 7), out_shardings=(row, row, caches, row, whole)
    )


def pack(
    prompts: Sequence[np.ndarray], shape: BatchShape, batch: Rows, order: np.ndarray, samples: int = 1
) -> tuple[Batch, np.ndarray, TokenMeta]:
    """(host batch, the place in layout order of each text's last token, the meta of its next token, both [B, texts]).

    A place of [rows, texts] without a text has segment 0, sees nothing and is seen by nobody. Several samples of a
    prompt are texts that begin alike: its tokens are part of all of them.
    """
    pieces = [Piece(len(prompt), {"token": prompt, "mask": np.zeros(len(prompt))}) for prompt in prompts]
    host = make_batch([[pieces[number] for number in row] for row in batch], (shape.rows, shape.length))
    place_BQ, next_BQ, segment_BQ = (np.zeros((shape.rows, shape.texts), np.int32) for _ in range(3))
    to_layout = inverse(order)
    for b, row in enumerate(batch):
        sizes, count = [len(prompts[number]) for number in row], len(row) * samples
        place_BQ[b, :count] = np.repeat(to_layout[np.cumsum(sizes, dtype=np.int32) - 1], samples)
        next_BQ[b, :count] = np.repeat(sizes, samples)
        segment_BQ[b, :count] = np.arange(count) + 1
    if samples == 1:
        return host, place_BQ, TokenMeta(next_BQ, segment_BQ)
    last_BT = host.segment_BT * samples
    first_BT = np.where(last_BT > 0, last_BT - samples + 1, 0)
    return (
        replace(host, segment_BT=first_BT, columns={"last": last_BT}),
        place_BQ,
        TokenMeta(next_BQ, segment_BQ, segment_BQ),
    )


def seen_tokens(prompts: Sequence[np.ndarray], texts: dict, shape: BatchShape, vocab_size: int) -> jax.Array:
    """bool [P, V]: which tokens a text's prompt holds."""
    seen_BQV = np.zeros((shape.rows, shape.texts, vocab_size), bool)
    for place, number in texts.items():
        seen_BQV[place][prompts[number]] = True
    return jnp.asarray(seen_BQV.reshape(-1, vocab_size))
