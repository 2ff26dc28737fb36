"""What a reference model says of every token of a data set: computed once, kept beside its tokens, read as a column.

Training then holds one model instead of two. The pass goes shard by shard of the token store, so that a killed one goes
on with the shards that are complete; what it writes lies in a folder named by the tokens, the weights and the dtype.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from ringbpt.config import Config
from ringbpt.data.documents import Piece, make_batch
from ringbpt.data.loader import Loader
from ringbpt.data.packing import Corpus, best_fit
from ringbpt.data.reading.files import digest_of, make_private
from ringbpt.data.stored.columns import add_column, missing_shards, read_column
from ringbpt.data.stored.tokens import TokenStore
from ringbpt.model.llama import Model
from ringbpt.objectives.objective import REFERENCE
from ringbpt.types import Array, Params, PyTree

SAY_EVERY = 30.0  # seconds
Row = list[int]  # numbers of the documents that stand in it


@jax.jit
def _sums(params: Params) -> PyTree:
    """Two numbers of each weight: see weights_fingerprint."""

    def of_weight(x: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
        place = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        # The rounds of a well-known mixer of 32 bits (murmur3's last).
        mixed = (bits ^ (place * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
        mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
        return jnp.stack([jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)])

    return jax.tree.map(of_weight, params)


def weights_fingerprint(params: Params) -> str:
    """Hex digits for the weights' values as float32, the same on any mesh: of each weight a sum modulo 2^32 of what
    each number's bits and its place come to, so that the order of adding does not matter.
    """

    sums = jax.device_get(_sums(params))
    words = {jax.tree_util.keystr(path): leaf.tolist() for path, leaf in jax.tree.leaves_with_path(sums)}
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()


class ReferenceColumns:
    """The log-probabilities of one reference model, for loaders of whole documents.

    fingerprint: of its weights. params() loads them, and is asked only where something is to be computed.
    """

    def __init__(
        self,
        config: Config,
        model: Model,
        fingerprint: str,
        params: Callable[[], Params],
        say: Callable[[str], None] = print,
    ):
        self._config, self._model, self._fingerprint = config, model, fingerprint
        self._params, self._say = params, say
        self._logp = jax.jit(lambda params, batch: model.token_stats(params, batch).logp_BT)

    def added_to(self, loader: Loader, cache: Path, name: str) -> Loader:
        """The loader with the column ref_logp, computed now where it is not there yet. name: of the data set.

        Raises UserError for a column that is damaged, or of other tokens or weights.
        """
        columns = []
        for store in loader.stores:
            key = self._key(store, loader)
            folder = cache / f"columns-{key[:32]}"
            self._complete(store, loader, folder, key, name)
            columns.append(read_column(store, REFERENCE, folder))
        return loader.with_column(REFERENCE, columns)

    def _key(self, store: TokenStore, loader: Loader) -> str:
        """Of all that the column depends on; of the length of a row only where documents are left out for it."""
        starts, stops, shared = store.offset[:-1], store.offset[1:], _shared_of(store, loader)
        corpus = Corpus(starts, stops, loader.seq_length, units=store.units, shared=shared)
        longest = int(corpus.unit_lengths().max(initial=0))
        left_out = f"{loader.seq_length}" if longest > loader.seq_length else ""
        architecture = json.dumps(asdict(self._config.architecture), sort_keys=True)
        return digest_of([REFERENCE, store.key, self._fingerprint, architecture, self._config.dtype, left_out])

    def _complete(self, store: TokenStore, loader: Loader, folder: Path, key: str, name: str) -> None:
        make_private(folder)
        todo = missing_shards(store, REFERENCE, folder, key)
        if jax.process_count() > 1:  # all compute what any of them lacks
            mask = np.zeros(len(store.summary["shards"]), bool)
            mask[todo] = True
            todo = np.flatnonzero(np.any(np.atleast_2d(multihost_utils.process_allgather(mask)), axis=0)).tolist()
        if not todo:
            return
        params, begin, tokens, said = self._params(), time.monotonic(), 0, time.monotonic()
        total = sum(store.summary["shards"][shard]["tokens"] for shard in todo)
        for shard in todo:
            values: dict[int, np.ndarray] = {}
            for found in self._scored(params, store, loader, shard):
                values |= found
                tokens += sum(map(len, found.values()))
                now = time.monotonic()
                if now - said > SAY_EVERY:
                    said, left = now, (now - begin) / max(1, tokens) * (total - tokens)
                    self._say(f"{name}: {REFERENCE} of {tokens:,} of {total:,} tokens, {left:.0f} s left")
            add_column(store, REFERENCE, values.__getitem__, [shard], folder, key)
        seconds = time.monotonic() - begin
        self._say(
            f"{name}: {REFERENCE} of {total:,} tokens by the reference model in {seconds:.1f} s, kept in {folder}"
        )

    def _scored(self, params: Params, store: TokenStore, loader: Loader, shard: int) -> Iterator[dict[int, np.ndarray]]:
        """{document: float32 [tokens]} of a shard, some at a time; NaN of those that no row can hold."""
        lengths = np.diff(store.offset)
        shared = _shared_of(store, loader)
        units = np.arange(len(lengths)) if store.units is None else store.units
        first = sum(about["documents"] for about in store.summary["shards"][:shard])
        documents = np.arange(first, first + store.summary["shards"][shard]["documents"])
        own = (lengths - shared)[documents]
        number = units[documents] - units[documents][:1]
        sizes = np.bincount(number, weights=own).astype(np.int64)
        fits = sizes <= loader.seq_length
        yield {int(d): np.full(lengths[d], np.nan, np.float32) for d in documents[~fits[number]]}
        kept, fitting = documents[fits[number]], np.cumsum(fits) - 1
        row_of_unit, count = best_fit(sizes[fits], loader.seq_length)
        rows: list[Row] = [[] for _ in range(count)]
        for document, row in zip(kept.tolist(), row_of_unit[fitting[number[fits[number]]]].tolist(), strict=True):
            rows[row].append(document)
        shape, columns = (loader.batch_size, loader.seq_length), loader.row_columns
        for at in range(0, count, loader.batch_size):
            group = rows[at : at + loader.batch_size]
            host = make_batch([_pieces(store, row, units, shared) for row in group], shape, columns)
            batch, order = self._model.put_batch(host.rows, shape), self._model.order_of(host.meta)
            logp = self._logp(params, batch)
            whole = multihost_utils.process_allgather(logp, tiled=True) if jax.process_count() > 1 else logp
            in_order = order.in_text_order(np.asarray(whole, np.float32))
            found: dict[int, np.ndarray] = {}
            for row, places in zip(group, in_order, strict=False):
                begin = 0
                for document in row:
                    common, length = int(shared[document]), int(lengths[document])
                    values = np.zeros(length, np.float32)  # nothing predicts the first token
                    if common:  # what it shares, the document before it has too
                        values[: common + 1] = found[document - 1][: common + 1]
                    stop = begin + length - common
                    values[common + 1 :] = places[begin : stop - 1] if length > common else []
                    found[document], begin = values, stop
            yield found


def _shared_of(store: TokenStore, loader: Loader) -> np.ndarray:
    return store.shared if store.shared is not None and loader.shares else np.zeros(len(store.offset) - 1, np.int64)


def _pieces(store: TokenStore, row: Sequence[int], units: np.ndarray, shared: np.ndarray) -> Iterator[Piece]:
    for document in row:
        start, stop = int(store.offset[document] + shared[document]), int(store.offset[document + 1])
        values: dict[str, Any] = {name: array[start:stop] for name, array in store.values.items()}
        yield Piece(stop - start, values, int(units[document]), int(shared[document]))
