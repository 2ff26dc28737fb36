"""The values that travel through the house: a batch, the place of each token, statistics, and means."""

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = Any  # jax.Array on the device, numpy.ndarray on the host, a tracer or a ShapeDtypeStruct in between


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenMeta:
    """Where each token stands; a mask is a function of two of these and of nothing else.

    position_BT: int32, the position inside its document, from 0.
    segment_BT: int32, the id of its document inside the row, from 1; 0 is padding and sees nothing.
    last_BT: int32, the last document that the token is part of, where several begin alike and what they share stands in
    the row once: it is in documents segment..last. None where no document shares anything: last is the segment then.
    """

    position_BT: Array
    segment_BT: Array
    last_BT: Array = None


class Column(NamedTuple):
    """What one column of a batch is; its arrays are [B, T] (a row's [T]) and nothing else.

    dtype: numpy's name. padding: the value where no token stands. of: whose value stands at a place, that of the
    "token" there, of its "target", the document's next token, that of the whole "document", repeated wherever it has a
    target, or "row": none is given, and it follows from what stands in the row. meaning: with its unit. source: the
    name of the documents' values that it is filled from, where it has another one.
    """

    dtype: str
    padding: float
    of: str
    meaning: str
    source: str = ""


# The schema of batches, of rows on disk and of token stores. Every batch has those up to segment; another one is in a
# batch whose loader was asked for it, and then in `Batch.columns`.
COLUMNS: dict[str, Column] = {
    "token": Column("int32", 0, "token", "the input's id"),
    "target": Column("int32", 0, "target", "the id to predict", source="token"),
    "weight": Column("float32", 0, "target", "how much the target counts in the loss; 0: not at all", source="mask"),
    "position": Column("int32", 0, "row", "the position inside the document, from 0, in tokens"),
    "segment": Column("int32", 0, "row", "the id of the document inside the row, from 1; 0 is padding"),
    "last": Column("int32", 0, "row", "the id of the last document that shares this token with its own"),
    "unit": Column("int32", 0, "row", "the number of the packing unit inside the row, from 1; 0 is padding"),
    "label": Column("int8", 0, "document", "1: chosen or desirable; -1: not; 2: a prompt with another's completion"),
    "margin": Column("float32", 0, "document", "by how much the chosen is better, as the data say; no unit"),
    "advantage": Column("float32", 0, "target", "by how much it was better than expected; no unit"),
    "rollout_logp": Column("float32", 0, "target", "its log-probability where it was drawn, in nats"),
    "old_logp": Column("float32", 0, "target", "the same by the policy that the rollout was made with"),
    "old_value": Column("float32", 0, "target", "what was to be expected from there on, when the rollout was made"),
    "return": Column("float32", 0, "target", "what came from there on; no unit"),
    "reward": Column("float32", 0, "document", "what the whole answer is worth; no unit"),
    "ref_logp": Column("float32", 0, "target", "its log-probability by the reference model, in nats"),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One global batch, as the train step takes it: host arrays in text order, device arrays in layout order.

    The arrays are [B, T], of the dtypes and meanings that COLUMNS tells. columns: whatever else an objective reads, by
    name, written by a precompute pass or a rollout (reference log-probs, advantages, ...).
    """

    token_BT: Array
    target_BT: Array
    weight_BT: Array
    position_BT: Array
    segment_BT: Array
    columns: dict[str, Array] = field(default_factory=dict)

    @property
    def meta(self) -> TokenMeta:
        return TokenMeta(self.position_BT, self.segment_BT, self.columns.get("last"))

    @staticmethod
    def of(arrays: dict[str, Array]) -> "Batch":
        """A batch of [B, T] arrays by their columns' names, ALWAYS among them."""
        return Batch(
            **{f"{name}_BT": arrays[name] for name in ALWAYS},
            columns={name: array for name, array in arrays.items() if name not in ALWAYS},
        )

    def by_name(self) -> dict[str, Array]:
        """All its arrays by their columns' names, ALWAYS first."""
        return {name: getattr(self, f"{name}_BT") for name in ALWAYS} | self.columns

    def rows(self, start: int, stop: int) -> "Batch":
        """Rows start..stop: of a host batch, what put_batch asks for."""
        return jax.tree.map(lambda x: x[start:stop], self)


ALWAYS = tuple(own.name.removesuffix("_BT") for own in fields(Batch) if own.name != "columns")  # columns of any batch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenStats:
    """What an objective may know about the model's prediction at each place; all float32.

    logp_BT: log-probability of the target, in nats. entropy_BT: of the distribution, in nats.
    correct_BT: 1 where the target is the most likely token (no gradient). None, all three, where no vocabulary is read.
    chosen_BTE, router_BTE: where the model has experts, how often each was chosen for the token and how probable the
    routers thought it, each the mean over layers.
    value_BT: the score head's number of the token, of a model that has one; else None.
    whole: what the objective measured of the whole optimizer step before, by name (objectives.Objective.whole).
    """

    logp_BT: Array = None
    entropy_BT: Array = None
    correct_BT: Array = None
    chosen_BTE: Array = None
    router_BTE: Array = None
    value_BT: Array = None
    whole: dict[str, Array] = field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mean:
    """A mean that is not divided yet: totals and weights add over shards and micro-batches, then divide once."""

    total: Array
    weight: Array

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(total=self.total + other.total, weight=self.weight + other.weight)

    def value(self) -> Array:
        """total / weight, and 0 where nothing was weighed: for a program that goes on computing with it.

        What is shown or logged is a number of `number`.
        """
        empty = self.weight == 0
        return jnp.where(empty, 0.0, self.total / jnp.where(empty, 1.0, self.weight))

    def number(self) -> float | None:
        """total / weight of a mean that is on the host; None where nothing was weighed, for then there is no mean."""
        return float(self.total) / float(self.weight) if self.weight else None


Means = dict[str, Mean]
Params = Any  # a nested dict of arrays: {"embed": ..., "layers": {"w_q": ...}, "norm": ..., "unembed": ...}
PyTree = Any
