"""Texts under way in the rows of one batch: a row whose texts have ended begins others while its neighbours go on.

What decides a text's tokens is its prompt, how it is drawn, and how many it has: neither the row that it stands in, nor
when it began, nor what stands beside it.
"""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ringbpt.attention import permutation
from ringbpt.data.documents import Piece, make_batch
from ringbpt.dims import ACTIVATION_AXES, spec
from ringbpt.generation.decode import (
    CACHE,
    Cache,
    Sizes,
    empty_cache,
    make_decode,
    make_grow,
    make_last_logits,
    make_prefill,
    make_put,
)
from ringbpt.generation.sampling import Options, Sampling, draw, filtered, penalise, token_logp
from ringbpt.layouts import by_length, inverse
from ringbpt.mesh import put_batch
from ringbpt.model.llama import Model
from ringbpt.types import Batch, Params, TokenMeta


class BatchShape(NamedTuple):
    """The sizes that a program is compiled for: rows, tokens of a row, texts of a row, new tokens of a text."""

    rows: int
    length: int
    texts: int
    new_tokens: int


PLACES = 1 << 16  # of a device's share of a cache, where a single row is not more


def places(shape: BatchShape) -> int:
    """Tokens that the cache of a batch has room for, on all devices together."""
    return shape.rows * (shape.length + shape.texts * shape.new_tokens)


def rows_at_once(shape: BatchShape, wanted: int, mesh: Mesh) -> int:
    """Rows of a batch of this shape (its own rows are not read), a multiple of dp x fsdp: as many as are wanted, or as
    stand in PLACES for each device.
    """
    parts = mesh.shape["dp"] * mesh.shape["fsdp"]
    room = PLACES * mesh.size // (places(shape._replace(rows=1)) * parts)
    return max(min(-(-wanted // parts), room), 1) * parts


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


class Unit(NamedTuple):
    """What begins together in a row.

    prompts: int32 [tokens] each. draws: one for each text, those of a prompt together, of which each has as many. most:
    tokens of each text.
    """

    prompts: Sequence[np.ndarray]
    draws: Sequence[Draw]
    most: int

    @property
    def samples(self) -> int:
        return len(self.draws) // len(self.prompts)

    @property
    def drawn(self) -> bool:
        return any(each.sampling.temperature > 0 for each in self.draws)

    @property
    def penalised(self) -> bool:
        return any(each.sampling.repetition_penalty != 1.0 for each in self.draws)


class Texts(NamedTuple):
    """The texts in the places of a batch, [B, Q]: what does not change from one token to the next.

    length: of the prompt. begun: the step that its first token goes into. segment: 0 where there is no text. seed and
    number, uint32, and options: as it is drawn.
    """

    length: Any
    begun: Any
    segment: Any
    seed: Any
    number: Any
    options: Options


def no_texts(shape: tuple[int, int]) -> Texts:
    """Places without texts, on the host."""
    numbers = Sampling().numbers()
    options = Options(*(np.full(shape, x, np.int32 if isinstance(x, int) else np.float32) for x in numbers))
    length, begun, segment = (np.zeros(shape, np.int32) for _ in range(3))
    return Texts(length, begun, segment, np.zeros(shape, np.uint32), np.zeros(shape, np.uint32), options)


class Programs:
    """What is compiled for a model, kept: shapes of one kind share all that does not depend on what differs."""

    def __init__(self, model: Model):
        self.model = model
        self.prefill, self.first, self.grow = make_prefill(model), make_first(model), make_grow(model)
        self.put = make_put(model.mesh, "B _")
        self._kept: dict[Any, Any] = {}

    def step(self, prompt_share: int, drawn: bool) -> Callable:
        return self._once(("step", prompt_share, drawn), lambda: make_step(self.model, prompt_share, drawn))

    def cache(self, rows: int, places: int, shared: bool) -> Cache:
        made = self._once(("cache", rows, places, shared), lambda: empty_cache(self.model, rows, places, shared))
        return made()

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


class Stream:
    """The rows of a batch, each free or under way with the texts of a Unit, on the device."""

    def __init__(self, programs: Programs, weights: Params, shape: BatchShape, shared: bool):
        """weights: of make_split. shared: whether a prompt may have several texts, which share its prefill."""
        model = programs.model
        mesh, (B, T, Q, _) = model.mesh, shape
        self.shape, self.shared, self.steps = shape, shared, 0
        self._programs, self._weights, self._model = programs, weights, model
        self._parts = mesh.shape["dp"] * mesh.shape["fsdp"]
        self._order = self._order_of(shape)
        self._row = NamedSharding(mesh, spec("B _", ACTIVATION_AXES))
        self._cache = programs.cache(B, T + new_share(shape, mesh.shape["sp"]) * mesh.shape["sp"], shared)
        self._host = no_texts((B, Q))
        self._texts = jax.device_put(self._host, self._row)
        self._told = self._on_rows((np.zeros((B, Q), np.int32), np.zeros((B, Q), np.float32)))  # the newest tokens
        self._seen: jax.Array | None = None  # bool [B, Q, V], once a text is penalised
        self._units: dict[int, Unit] = {}  # by row
        self._counts: dict[int, int] = {}  # tokens that a row's texts have

    def _on_rows(self, tree: Any) -> Any:
        return jax.device_put(tree, self._row)

    @property
    def may_grow(self) -> bool:
        """Whether every device has written as many of its slots: once in as many steps as sp has devices."""
        return self.steps % self._model.mesh.shape["sp"] == 0

    def grow(self, shape: BatchShape) -> dict[int, int]:
        """Room for more rows, longer prompts and longer texts; the texts of a row stay as many. {row before: now}."""
        assert self.may_grow and shape.texts == self.shape.texts
        sp, old, new = self._model.mesh.shape["sp"], *(self._sizes(each) for each in (self.shape, shape))
        slots, rest = old.slots // shape.texts, (self._told, self._seen)
        turn = jnp.int32(self.steps // sp % slots * shape.texts)
        self._cache, (self._told, self._seen) = self._programs.grow(self._cache, rest, turn, old, new)
        moved = {row: row // old.rows * new.rows + row % old.rows for row in range(self.shape.rows)}
        rows, every = np.array([*moved.values()]), np.ones(len(moved), bool)
        host = jax.tree.map(partial(_with_rows, rows, every), no_texts((shape.rows, shape.texts)), self._host)
        # The next step is the one that writes behind the old slots, or the first of them where there are as many.
        self._host = host._replace(begun=host.begun + np.int32(slots * sp - self.steps))
        self.steps, self._order = slots * sp, self._order_of(shape)
        self._texts, self.shape = self._on_rows(self._host), shape
        self._units = {moved[row]: unit for row, unit in self._units.items()}
        self._counts = {moved[row]: count for row, count in self._counts.items()}
        return moved

    def _sizes(self, shape: BatchShape) -> Sizes:
        sp = self._model.mesh.shape["sp"]
        return Sizes(shape.rows // self._parts, shape.length // sp, new_share(shape, sp) - shape.texts)

    def _order_of(self, shape: BatchShape) -> np.ndarray:
        return permutation(self._model.execution.sequence_layout, shape.length, self._model.mesh.shape["sp"])

    @property
    def free(self) -> list[int]:
        """The rows that may begin something, in the order that deals them out to the devices."""
        own = self.shape.rows // self._parts
        return [p * own + r for r in range(own) for p in range(self._parts) if p * own + r not in self._units]

    def fill(self, units: dict[int, Unit]) -> None:
        """Begins units in free rows: their prompts' prefill, and the first token of each text."""
        own = self.shape.rows // self._parts
        waves: dict[int, dict[int, Unit]] = {}
        for row, unit in units.items():
            assert row not in self._units
            wave = sum(other // own == row // own for each in waves.values() for other in each)
            waves.setdefault(wave, {})[row] = unit
        if 2 * len(waves) > own:  # most of the rows: all in one go
            self._begin(units, list(range(self.shape.rows)))
            return
        for each in waves.values():
            held = {row // own: row for row in each}
            self._begin(each, [held.get(p, p * own) for p in range(self._parts)])

    def _begin(self, units: dict[int, Unit], rows: list[int]) -> None:
        """Units in these rows, one of each group of devices that shares rows, or all; those without a unit stay."""
        model, (_, T, Q, _), own = self._model, self.shape, self.shape.rows // self._parts
        host, place_BQ, texts = pack([units.get(row) for row in rows], T, Q, self._order, self.shared)
        texts = texts._replace(begun=np.full_like(texts.begun, self.steps))
        begun = np.array([row in units for row in rows])
        self._host = jax.tree.map(partial(_with_rows, np.array(rows)[begun], begun), self._host, texts)
        seen_BQV = None
        if any(unit.penalised for unit in units.values()):
            seen_BQV = self._on_rows(seen_tokens(host, texts, self.shared, model.architecture.vocab_size))
        row_B = np.array([row % own if row in units else -1 for row in rows], np.int32)
        row_B = jax.device_put(row_B, NamedSharding(model.mesh, spec("B", ACTIVATION_AXES)))
        batch = put_batch(host.rows, host.token_BT.shape, model.mesh, by_length(model.execution.sequence_layout))
        self._cache, x_BTD = self._programs.prefill(self._weights, batch, self._cache, row_B)
        drawn, head = any(unit.drawn for unit in units.values()), (self._weights["norm"], self._weights["unembed"])
        *told, seen_BQV = self._programs.first(*head, x_BTD, *self._on_rows((place_BQ, texts)), seen_BQV, drawn)
        self._told = self._programs.put(self._told, tuple(told), row_B)
        if seen_BQV is not None:
            if self._seen is None:
                shape = self.shape.rows, Q, model.architecture.vocab_size
                self._seen = self._on_rows(np.zeros(shape, bool))
            self._seen = self._programs.put(self._seen, seen_BQV, row_B)
        self._texts = self._on_rows(self._host)
        self._units |= units
        self._counts |= dict.fromkeys(units, 0)

    def step(self) -> dict[int, list[NewToken]]:
        """{row: the next token of each of its texts}; a row whose texts have all that they may have is free then."""
        told, units = self._told, dict(self._units)
        for row in units:
            self._counts[row] += 1
            if self._counts[row] == units[row].most:
                self.stop(row)
        if self._units:  # sent before these tokens are looked at, so that the device never waits
            drawn = any(unit.drawn for unit in self._units.values())
            prompt_share = self.shape.length // self._model.mesh.shape["sp"]
            *newest, self._cache, self._seen = self._programs.step(prompt_share, drawn)(
                self._weights, self._cache, told[0], self._seen, self._texts, jnp.int32(self.steps)
            )
            self._told, self.steps = tuple(newest), self.steps + 1
        ids_BQ, logps_BQ = jax.device_get(told)
        return {
            row: [NewToken(int(ids_BQ[row, q]), float(logps_BQ[row, q])) for q in range(len(unit.draws))]
            for row, unit in units.items()
        }

    def stop(self, row: int) -> None:
        """The row is free, whatever its texts still had to say."""
        del self._units[row]

    def settle(self) -> None:
        """Returns once the device has done what was sent ahead."""
        jax.block_until_ready(self._told)

    @property
    def under_way(self) -> AbstractSet[int]:
        """The rows whose texts go on."""
        return self._units.keys()


def _with_rows(rows: np.ndarray, which: np.ndarray, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """old with its `rows` from those of new that are marked: a copy, for a device may still read what was put there."""
    old = old.copy()
    old[rows] = new[which]
    return old


def new_share(shape: BatchShape, sp: int) -> int:
    """Places of a device's share for new tokens, and for those that other devices keep; the last is never a key."""
    return (max(-(-(shape.new_tokens - 1) // sp), 1) + 1) * shape.texts


def _pick(
    logits_BQV: jax.Array, texts: Texts, count_BQ: jax.Array, seen_BQV: jax.Array | None, drawn: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(the next token of each text, its log-probability, seen with it). count_BQ: the tokens that a text has.

    drawn: whether there may be texts that are; those of temperature 0 are greedy among them too.
    """
    flat = partial(jax.tree.map, lambda x: x.reshape(-1, *x.shape[2:]))
    logits_PV, count_P, (_, _, _, seed_P, number_P, options) = flat((logits_BQV, count_BQ, texts))
    options = jax.tree.map(lambda x: x[:, None], options)
    seen_PV = flat(seen_BQV)
    if seen_PV is not None:
        logits_PV = penalise(logits_PV, seen_PV, options.repetition_penalty)
    token_P = jnp.argmax(logits_PV, axis=-1).astype(jnp.int32)
    if drawn:
        hot_P = options.temperature[:, 0] > 0
        left_PV = filtered(logits_PV, options)
        token_P = jnp.where(hot_P, draw(left_PV, seed_P, number_P, count_P), token_P)
        logits_PV = jnp.where(hot_P[:, None], left_PV, logits_PV)
    logp_P = token_logp(logits_PV, token_P)
    if seen_PV is not None:
        seen_PV = seen_PV.at[jnp.arange(len(token_P)), token_P].set(True)
        seen_BQV = seen_PV.reshape(logits_BQV.shape)
    return token_P.reshape(count_BQ.shape), logp_P.reshape(count_BQ.shape), seen_BQV


def make_first(model: Model) -> Callable:
    """first(norm_D, unembed_DV, x_BTD, place_BQ, texts, seen_BQV, drawn) -> (token_BQ, logp_BQ, seen_BQV), jitted.

    The token after each prompt; place_BQ: where in layout order its last one stands.
    """
    last_logits = make_last_logits(model)

    def first(norm_D, unembed_DV, x_BTD, place_BQ, texts, seen_BQV, drawn):
        logits_BQV = last_logits(norm_D, unembed_DV, x_BTD, place_BQ)
        return _pick(logits_BQV, texts, jnp.zeros_like(place_BQ), seen_BQV, drawn)

    return jax.jit(first, static_argnums=6, out_shardings=NamedSharding(model.mesh, spec("B _", ACTIVATION_AXES)))


def make_step(model: Model, prompt_share: int, drawn: bool) -> Callable:
    """step(weights, cache, token_BQ, seen_BQV, texts, step) -> (token_BQ, logp_BQ, cache, seen_BQV), jitted.

    One token later, the cache donated. step: int32, from 0. prompt_share: the places of a device for prompts.
    """
    decode = make_decode(model, prompt_share)

    def step(weights, cache, token_BQ, seen_BQV, texts, step):
        past_BQ = step - texts.begun
        last_BQ = None if cache.meta.last_BT is None else texts.segment
        meta = TokenMeta(texts.length + past_BQ, texts.segment, last_BQ)
        logits_BQV, cache = decode(weights, cache, token_BQ, meta, step)
        token_BQ, logp_BQ, seen_BQV = _pick(logits_BQV, texts, past_BQ + 1, seen_BQV, drawn)
        return token_BQ, logp_BQ, cache, seen_BQV

    # Said, so that what a step gives is placed as what it takes, and the second one is no other program.
    row, cache, meta = (NamedSharding(model.mesh, spec(dims, ACTIVATION_AXES)) for dims in ("B _", CACHE, "B S"))
    layers = (cache,) * model.architecture.num_hidden_layers
    return jax.jit(step, donate_argnums=(1, 3), out_shardings=(row, row, Cache(layers, layers, meta), row))


def pack(
    units: Sequence[Unit | None], length: int, texts: int, order: np.ndarray, shared: bool
) -> tuple[Batch, np.ndarray, Texts]:
    """(host batch, the place in layout order of the last token before each text, the texts), of a Unit or None a row.

    A place of [rows, texts] without a text has segment 0, sees nothing and is seen by nobody. Several texts of a prompt
    begin alike: its tokens are part of all of them, which shared says the batch's metas can tell.
    """
    prompts = [unit.prompts if unit else () for unit in units]
    pieces = [[Piece(len(each), {"token": each, "mask": np.zeros(len(each))}) for each in row] for row in prompts]
    host = make_batch(pieces, (len(units), length))
    place_BQ, found, to_layout = np.zeros((len(units), texts), np.int32), no_texts((len(units), texts)), inverse(order)
    samples_B1 = np.ones((len(units), 1), np.int32)
    for b, unit in enumerate(units):
        if unit is None:
            continue
        sizes, count, samples = [len(prompt) for prompt in unit.prompts], len(unit.draws), unit.samples
        samples_B1[b] = samples
        place_BQ[b, :count] = np.repeat(to_layout[np.cumsum(sizes, dtype=np.int32) - 1], samples)
        found.length[b, :count] = np.repeat(sizes, samples)
        found.segment[b, :count] = np.arange(count) + 1
        found.seed[b, :count] = [each.sampling.seed for each in unit.draws]
        found.number[b, :count] = [each.number for each in unit.draws]
        for whole, *own in zip(found.options, *(each.sampling.numbers() for each in unit.draws), strict=True):
            whole[b, :count] = own
    if shared:
        last_BT = host.segment_BT * samples_B1
        first_BT = np.where(last_BT > 0, last_BT - samples_B1 + 1, 0)
        host = replace(host, segment_BT=first_BT, columns={"last": last_BT})
    assert shared or samples_B1.max() == 1
    return host, place_BQ, found


def seen_tokens(host: Batch, texts: Texts, shared: bool, vocab_size: int) -> np.ndarray:
    """bool [B, Q, V]: which tokens the prompt of each text holds; host: as pack gives it."""
    first_BT = host.segment_BT
    last_BT = host.columns["last"] if shared else first_BT
    seen_BQV = np.zeros((*texts.segment.shape, vocab_size), bool)
    for (b, q), segment in np.ndenumerate(texts.segment):
        if segment:
            seen_BQV[b, q, host.token_BT[b][(first_BT[b] <= segment) & (segment <= last_BT[b])]] = True
    return seen_BQV
