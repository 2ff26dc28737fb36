"""What a model says of given texts: log-probability and exactness of a part of each, and loss by position.

Nothing is generated: a greedy continuation is the expected one exactly when each of its tokens is the most likely
after those before it, which one forward pass tells for all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ringbpt.config import UserError
from ringbpt.data.documents import Piece, make_batch
from ringbpt.data.packing import first_fit
from ringbpt.layouts import by_length, row_length
from ringbpt.mesh import put_batch
from ringbpt.model.llama import Model
from ringbpt.types import Batch, Params

Encode = Callable[[str], np.ndarray]  # text -> ids, with bos where the model is used to one


class Item(NamedTuple):
    """A text as tokens; those from `start` on are judged."""

    tokens: np.ndarray
    start: int

    @property
    def piece(self) -> Piece:
        return Piece(len(self.tokens), {"token": self.tokens, "mask": np.arange(len(self.tokens)) >= self.start})


class Scores(NamedTuple):
    """One number for each item: sum of log p of the judged tokens (nats), how many they are, whether all are greedy."""

    logp: np.ndarray
    count: np.ndarray
    exact: np.ndarray


class Scorer:
    """Scores items on the model's mesh, packed into rows of one length; a length and a number of texts compile once."""

    def __init__(self, model: Model, rows: int = 8):
        mesh = model.mesh.shape
        parts = mesh["dp"] * mesh["fsdp"]
        self.model, self.rows = model, -(-rows // parts) * parts
        # On every device, so that every process of a run can look at them.
        self._step = jax.jit(self._sums, static_argnums=2, out_shardings=NamedSharding(model.mesh, PartitionSpec()))

    def row_length(self, longest: int) -> int:
        """The shortest row that the mesh and the chunks of feedforward and loss can split."""
        execution = self.model.execution
        chunks = [execution.loss_chunk_size] + [execution.scan_mlp_chunk_size] * execution.scan_mlp
        return row_length(longest, self.model.mesh.shape["sp"], *chunks)

    def score(self, params: Params, items: Sequence[Item], length: int | None = None) -> Scores:
        """`length`: of a row, for those who score items of several lengths by one program; default: the longest's."""
        longest = max(len(item.tokens) for item in items)
        limit = self.model.architecture.max_sequence_length
        if longest > limit:
            raise UserError(f"a text of {longest} tokens is above --llama.max_sequence_length={limit}")
        length = length or self.row_length(longest)
        groups = list(self.batches(items, length))
        texts = max(len(row) for _, group in groups for row in group)
        found = np.zeros((3, len(items)))
        for batch, group in groups:
            sums = np.asarray(self._step(params, batch, texts))
            for b, row in enumerate(group):
                found[:, row] = sums[:, b, 1 : 1 + len(row)]
        return Scores(found[0], found[1], found[1] == found[2])

    def batches(self, items: Sequence[Item], length: int) -> Iterator[tuple[Batch, list[list[int]]]]:
        """(batch, the numbers of the items in each of its rows), until every item was in one."""
        bins, count = first_fit(np.array([len(item.tokens) for item in items]), length)
        places = [np.flatnonzero(bins == row).tolist() for row in range(count)]
        shape = (self.rows, length)
        for first in range(0, count, self.rows):
            group = places[first : first + self.rows]
            host = make_batch([[items[number].piece for number in row] for row in group], shape)
            # Texts are known by their numbers in the row.
            layout = by_length(self.model.execution.sequence_layout)
            yield put_batch(host.rows, shape, self.model.mesh, layout), group

    def _sums(self, params: Params, batch: Batch, texts: int) -> jax.Array:
        """[3, B, texts + 1]: log p, weight and greedy hits of each text; place 0 is padding's."""
        stats = self.model.token_stats(params, batch)
        rows = jnp.arange(batch.token_BT.shape[0])[:, None]
        columns = (stats.logp_BT, jnp.ones_like(stats.logp_BT), stats.correct_BT)
        zeros = jnp.zeros((batch.token_BT.shape[0], texts + 1), jnp.float32)
        return jnp.stack([zeros.at[rows, batch.segment_BT].add(x * batch.weight_BT) for x in columns])
