"""Text out: prompts packed into rows, one prefill, then one token a step until every text has ended."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ringbpt.attention import permutation
from ringbpt.config import UserError
from ringbpt.data.documents import Piece, make_batch
from ringbpt.dims import ACTIVATION_AXES, spec
from ringbpt.generation.decode import CACHE, Cache, make_decode, make_last_logits, make_prefill, split_params
from ringbpt.generation.sampling import Options, Sampling, penalise, sample
from ringbpt.layouts import inverse
from ringbpt.mesh import put_batch
from ringbpt.model.llama import Model
from ringbpt.types import Batch, Params, TokenMeta


@dataclass(frozen=True)
class Shape:
    """The sizes that a program is compiled for: rows, tokens of a row, texts of a row, new tokens of a text."""

    rows: int
    length: int
    texts: int
    new_tokens: int


@dataclass(frozen=True)
class Group:
    """What is generated together: for each row the numbers of its prompts."""

    rows: list[list[int]] = field(default_factory=list)


def round_length(longest: int, sp: int, chunk: int) -> int:
    """The shortest row length for a prompt: divisible over sp (twice, for zigzag) and by the feedforward's chunk."""
    step = 2 * sp if longest <= sp * chunk else sp * chunk
    return -(-longest // step) * step


def first_fit(lengths: dict[int, int], rows: int, length: int, texts: int) -> list[list[int]]:
    """Longest first into the first row with room; what fits nowhere is left out."""
    packed: list[list[int]] = [[] for _ in range(rows)]
    room = [length] * rows
    for number in sorted(lengths, key=lambda n: -lengths[n]):
        row = next((r for r in range(rows) if lengths[number] <= room[r] and len(packed[r]) < texts), None)
        if row is not None:
            packed[row].append(number)
            room[row] -= lengths[number]
    return packed


def plan(lengths: Sequence[int], model: Model, batch_size: int, new_tokens: int) -> tuple[Shape, list[Group]]:
    """One Shape for all prompts, and the groups that fill it, so that a file of prompts compiles once.

    The longest `batch_size` prompts decide how many rows and how many texts a row there are.
    """
    mesh, chunk = model.mesh.shape, model.execution.scan_mlp_chunk_size
    longest, limit = max(lengths), model.architecture.max_sequence_length
    if longest + new_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens and --max_new_tokens={new_tokens} are above the model's {limit}: "
            f"--max_new_tokens={max(limit - longest, 1)} at most, or --max_sequence_length={longest + new_tokens}"
        )
    length = round_length(longest, mesh["sp"], chunk)
    parts = mesh["dp"] * mesh["fsdp"]
    rest = dict(enumerate(lengths))
    first = dict(sorted(rest.items(), key=lambda item: -item[1])[:batch_size])
    fitted = [row for row in first_fit(first, len(first), length, batch_size) if row]
    rows = -(-len(fitted) // parts) * parts
    shape = Shape(rows, length, max(map(len, fitted)), new_tokens)
    groups = []
    while rest:
        groups.append(Group(first_fit(rest, rows, length, shape.texts)))
        for number in (number for row in groups[-1].rows for number in row):
            del rest[number]
    return shape, groups


def check_vocabulary(prompts: Sequence[np.ndarray], vocab_size: int) -> None:
    """Raises UserError where a prompt's tokens cannot be the model's."""
    largest = max((int(prompt.max()) for prompt in prompts if len(prompt)), default=0)
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer gives token {largest}, and the model has a vocabulary of {vocab_size}: give the tokenizer "
            "that belongs to it"
        )


class Generator:
    """A model ready to generate, on its mesh; what is compiled for a Shape is kept."""

    def __init__(self, model: Model, params: Params):
        self.model = model
        self.weights = split_params(model, params)
        self._programs: dict[Any, Any] = {}

    def tokens(
        self, prompts: Sequence[np.ndarray], shape: Shape, group: Group, sampling: Sampling
    ) -> Iterator[dict[int, int]]:
        """{number of the prompt: its next token} at each step; the caller stops taking when all texts have ended."""
        mesh, layout = self.model.mesh, self.model.execution.sequence_layout
        batch, place_BQ, ends = pack(prompts, shape, group, permutation(layout, shape.length, mesh.shape["sp"]))
        texts = {(b, q): number for b, row in enumerate(group.rows) for q, number in enumerate(row)}
        drawn, penalised = sampling.temperature > 0, sampling.repetition_penalty != 1.0
        prefill, first, step = self._compiled(shape, drawn, penalised)
        global_batch = put_batch(batch.rows, batch.token_BT.shape, mesh, layout)
        row = NamedSharding(mesh, spec("B _", ACTIVATION_AXES))
        root = jax.random.key(sampling.seed)
        numbers_BQ = np.zeros((shape.rows, shape.texts), np.uint32)
        for (b, q), number in texts.items():
            numbers_BQ[b, q] = number
        key_P = jax.vmap(lambda n: jax.random.fold_in(root, n))(jnp.asarray(numbers_BQ.reshape(-1)))
        seen_PV = seen_tokens(prompts, texts, shape, self.model.architecture.vocab_size) if penalised else None
        options = sampling.options()
        cache, x_BTD = prefill(self.weights, global_batch)
        token_BQ, seen_PV = first(self.weights, x_BTD, jax.device_put(place_BQ, row), options, key_P, seen_PV)
        meta = jax.device_put(ends, row)
        for i in range(shape.new_tokens):
            current = token_BQ
            if i + 1 < shape.new_tokens:  # sent before this token is looked at, so that the device never waits
                token_BQ, cache, meta, seen_PV = step(
                    self.weights, cache, token_BQ, meta, jnp.int32(i), options, key_P, seen_PV
                )
            host_BQ = np.asarray(current)
            yield {number: int(host_BQ[place]) for place, number in texts.items()}

    def _compiled(self, shape: Shape, drawn: bool, penalised: bool) -> tuple[Callable, Callable, Callable]:
        key = (shape, drawn, penalised)
        if key not in self._programs:
            self._programs[key] = (
                make_cache_prefill(self.model, shape),
                *make_steps(self.model, shape, drawn, penalised),
            )
        return self._programs[key]


def new_share(shape: Shape, sp: int) -> int:
    """Places of a device's share for new tokens, and for those that other devices keep; the last is never a key."""
    return (-(-(shape.new_tokens - 1) // sp) + 1) * shape.texts


def make_cache_prefill(model: Model, shape: Shape) -> Callable[[Params, Batch], tuple[Cache, jax.Array]]:
    """prefill(weights, batch) -> (cache, the last layer's x_BTD), in layout order, layer by layer."""
    room = new_share(shape, model.mesh.shape["sp"])
    start, layer = make_prefill(model, room)
    meta_spec = spec("B S", ACTIVATION_AXES)

    def with_room(meta: TokenMeta) -> TokenMeta:
        def pad(x):
            return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, room))), x)

        return jax.shard_map(pad, mesh=model.mesh, in_specs=meta_spec, out_specs=meta_spec, check_vma=False)(meta)

    pad_meta = jax.jit(with_room, out_shardings=NamedSharding(model.mesh, meta_spec))

    def prefill(weights: Params, batch: Batch) -> tuple[Cache, jax.Array]:
        x_BTD, ks, vs = start(weights["embed"], batch.token_BT), [], []
        for w in weights["layers"]:
            x_BTD, k, v = layer(w, x_BTD, batch.meta)
            ks.append(k)
            vs.append(v)
        return Cache(tuple(ks), tuple(vs), pad_meta(batch.meta)), x_BTD

    return prefill


def make_steps(model: Model, shape: Shape, drawn: bool, penalised: bool) -> tuple[Callable, Callable]:
    """(first, step), jitted. first: the token after each prompt; step: one token later, the cache donated."""
    decode = make_decode(model, shape.length // model.mesh.shape["sp"])
    last_logits = make_last_logits(model)

    def pick(logits_BQV, options: Options, key_P, step, seen_PV):
        logits_PV = logits_BQV.reshape(-1, logits_BQV.shape[-1])
        if penalised:
            logits_PV = penalise(logits_PV, seen_PV, options.repetition_penalty)
        if drawn:
            token_P = sample(logits_PV, options, key_P, step)
        else:
            token_P = jnp.argmax(logits_PV, axis=-1).astype(jnp.int32)
        if penalised:
            seen_PV = seen_PV.at[jnp.arange(len(token_P)), token_P].set(True)
        return token_P.reshape(logits_BQV.shape[:2]), seen_PV

    def first(weights, x_BTD, place_BQ, options, key_P, seen_PV):
        logits_BQV = last_logits(weights["norm"], weights["unembed"], x_BTD, place_BQ)
        return pick(logits_BQV, options, key_P, jnp.int32(0), seen_PV)

    def step(weights, cache, token_BQ, meta, i, options, key_P, seen_PV):
        logits_BQV, cache = decode(weights, cache, token_BQ, meta, i)
        token_BQ, seen_PV = pick(logits_BQV, options, key_P, i + 1, seen_PV)
        return token_BQ, cache, replace(meta, position_BT=meta.position_BT + 1), seen_PV

    # Said, so that what a step gives is placed as what it takes, and the second one is no other program.
    row, cache, meta = (NamedSharding(model.mesh, spec(dims, ACTIVATION_AXES)) for dims in ("B _", CACHE, "B S"))
    whole = NamedSharding(model.mesh, PartitionSpec())
    layers = (cache,) * model.architecture.num_hidden_layers
    caches = Cache(layers, layers, meta)
    return jax.jit(first, out_shardings=(row, whole)), jax.jit(
        step, donate_argnums=(1, 3, 7), out_shardings=(row, caches, row, whole)
    )


def pack(
    prompts: Sequence[np.ndarray], shape: Shape, group: Group, order: np.ndarray
) -> tuple[Batch, np.ndarray, TokenMeta]:
    """(batch in text order, the place in layout order of each prompt's last token, the meta of its next, [B, texts]).

    A place of [rows, texts] without a text has segment 0, sees nothing and is seen by nobody.
    """
    pieces = [Piece(len(prompt), {"token": prompt, "mask": np.zeros(len(prompt))}) for prompt in prompts]
    batch = make_batch([[pieces[number] for number in row] for row in group.rows], (shape.rows, shape.length))
    place_BQ, next_BQ, segment_BQ = (np.zeros((shape.rows, shape.texts), np.int32) for _ in range(3))
    to_layout = inverse(order)
    for b, row in enumerate(group.rows):
        sizes = [len(prompts[number]) for number in row]
        place_BQ[b, : len(row)] = to_layout[np.cumsum(sizes, dtype=np.int32) - 1]
        next_BQ[b, : len(row)] = sizes
        segment_BQ[b, : len(row)] = np.arange(len(row)) + 1
    return batch, place_BQ, TokenMeta(next_BQ, segment_BQ)


def seen_tokens(prompts: Sequence[np.ndarray], texts: dict, shape: Shape, vocab_size: int) -> jax.Array:
    """bool [P, V]: which tokens a text's prompt holds."""
    seen_BQV = np.zeros((shape.rows, shape.texts, vocab_size), bool)
    for place, number in texts.items():
        seen_BQV[place][prompts[number]] = True
    return jnp.asarray(seen_BQV.reshape(-1, vocab_size))
