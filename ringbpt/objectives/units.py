"""Sums over the documents of packing units: from [B, T], a number a token, to [B, U], a number a unit.

A unit is a pair, or an answer with its counterpart: COLUMNS' `unit` numbers them in each row, `label` says which of a
unit's documents a token belongs to, and weights which of the tokens are the answer. U is T + 1, the most there can be;
number 0 is padding.
"""

from typing import NamedTuple

import jax.numpy as jnp

from ringbpt.objectives.objective import REFERENCE
from ringbpt.types import Array, Batch


def unit_sums(x_BT: Array, batch: Batch) -> Array:
    """The sum of x over each unit's tokens, float32 [B, U]."""
    unit_BT = batch.columns["unit"]
    B, T = unit_BT.shape
    return jnp.zeros((B, T + 1), jnp.float32).at[jnp.arange(B)[:, None], unit_BT].add(x_BT)


def ends(batch: Batch) -> Array:
    """bool [B, T]: each document's last token, in whatever order a row's tokens stand."""
    segment_BT = batch.segment_BT
    B, T = segment_BT.shape
    rows = jnp.arange(B)[:, None]
    last = jnp.zeros((B, T + 1), jnp.int32).at[rows, segment_BT].max(batch.position_BT)
    return (segment_BT > 0) & (batch.position_BT == last[rows, segment_BT])


def labels_at_ends(batch: Batch) -> Array:
    """float32 [B, T]: at each document's last token 1 or -1, the sign of its label; 0 elsewhere. (The column itself
    ends one token earlier, where the last target is predicted.)
    """
    label_BT = jnp.sign(per_document(batch.columns["label"].astype(jnp.float32), batch))
    return jnp.where(ends(batch), label_BT, 0.0)


class Answers(NamedTuple):
    """One answer of each unit, float32 [B, U]: those whose label is a given one.

    is_there: 1 where the unit has such an answer. tokens: of it, that are learnt. logp: their log-probabilities' sum.
    ratio: the sum of how much more probable each is than by the reference; that of nothing, where there is none.
    """

    is_there: Array
    tokens: Array
    logp: Array
    ratio: Array

    @property
    def mean_logp(self) -> Array:
        return self.logp / jnp.maximum(self.tokens, 1.0)

    @property
    def mean_ratio(self) -> Array:
        return self.ratio / jnp.maximum(self.tokens, 1.0)


def answers(logp_BT: Array, batch: Batch, label: int) -> Answers:
    """The answers with this label, by the policy's log-probabilities and, where the batch has it, its `ref_logp`.

    Both are subtracted token by token: of long answers each sum alone is far larger than what tells them apart.
    """
    is_label_BT = (batch.columns["label"] == label).astype(jnp.float32)
    learnt_BT = is_label_BT * (batch.weight_BT > 0)
    reference_BT = batch.columns.get(REFERENCE, 0.0)
    own = jnp.where(learnt_BT > 0, logp_BT, 0.0)
    ratio = jnp.where(learnt_BT > 0, logp_BT - reference_BT, 0.0)
    return Answers(
        is_there=(unit_sums(is_label_BT, batch) > 0).astype(jnp.float32),
        tokens=unit_sums(learnt_BT, batch),
        logp=unit_sums(own, batch),
        ratio=unit_sums(ratio, batch),
    )


def by_document(x_BT: Array, batch: Batch) -> Array:
    """The sum of x over each document's tokens, float32 [B, T + 1]; number 0 is padding."""
    B, T = batch.segment_BT.shape
    return jnp.zeros((B, T + 1), jnp.float32).at[jnp.arange(B)[:, None], batch.segment_BT].add(x_BT)


def per_document(x_BT: Array, batch: Batch) -> Array:
    """The same at each of its tokens, [B, T]."""
    return jnp.take_along_axis(by_document(x_BT, batch), batch.segment_BT, axis=1)
