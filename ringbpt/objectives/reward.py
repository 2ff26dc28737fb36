"""A reward model: one number of each document, so that of two answers to a prompt the chosen one gets the larger.

The number is the score head's at the document's last token, which has seen all of it; no vocabulary is touched.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid

from ringbpt.config import Config, PreferenceConfig
from ringbpt.objectives.objective import Objective
from ringbpt.objectives.preference import CHOSEN, REJECTED, margins
from ringbpt.objectives.units import labels_at_ends, unit_sums
from ringbpt.types import Array, Batch, Mean, Means, TokenStats

BINS = 20


class Scores(NamedTuple):
    """Of each unit, float32 [B, U]. there: 1 where it is a pair. margin: by how much the data have the chosen ahead."""

    there: Array
    chosen: Array
    rejected: Array
    margin: Array


def scores_of(stats: TokenStats, batch: Batch) -> Scores:
    label_BT = labels_at_ends(batch)
    of_chosen, of_rejected = ((label_BT == label).astype(jnp.float32) for label in (CHOSEN, REJECTED))
    return Scores(
        there=unit_sums(of_chosen, batch) * unit_sums(of_rejected, batch),
        chosen=unit_sums(jnp.where(of_chosen > 0, stats.value_BT, 0.0), batch),
        rejected=unit_sums(jnp.where(of_rejected > 0, stats.value_BT, 0.0), batch),
        margin=margins(batch),
    )


def bradley_terry(scores: Scores, c: PreferenceConfig) -> Array:
    """-log sigma(chosen - rejected - margin), which is log(1 + exp(rejected - chosen + margin)) without its overflow.

    Ref: arXiv:2203.02155, eq. 1; the margin, arXiv:2307.09288, eq. 2.
    """
    coefficient = 1.0 if c.margin_coefficient is None else c.margin_coefficient
    return -log_sigmoid(scores.chosen - scores.rejected - coefficient * scores.margin)


def function(stats: TokenStats, batch: Batch, config: Config) -> Means:
    """The loss, the square that centering brings to nothing, and what is worth looking at.

    rewards/brier: the mean of (1 - sigma(chosen - rejected))^2, the calibration of the probabilities that the scores
    mean: 0 is perfect, 0.25 what a model says that knows nothing.
    """
    scores = scores_of(stats, batch)
    count, delta = jnp.sum(scores.there), scores.chosen - scores.rejected

    def mean(x: Array) -> Mean:
        return Mean(jnp.sum(jnp.where(scores.there > 0, x, 0.0)), count)

    shown = {
        "rewards/chosen": mean(scores.chosen),
        "rewards/rejected": mean(scores.rejected),
        "rewards/margins": mean(delta),
        "rewards/accuracies": mean(0.5 + 0.5 * jnp.sign(delta)),
        "rewards/brier": mean((1 - sigmoid(delta)) ** 2),
    }
    return {
        "reward_loss": mean(bradley_terry(scores, config.preference)),
        "center": mean((scores.chosen + scores.rejected) ** 2),
    } | jax.lax.stop_gradient(shown)


def probabilities(stats: TokenStats, batch: Batch, config: Config) -> Means:
    """How many pairs have a probability that the chosen is better, sigma of their scores' difference, in each of BINS
    equal parts of 0..1.
    """
    scores = scores_of(stats, batch)
    p_BU = sigmoid(scores.chosen - scores.rejected)
    bin_BU = jnp.clip((p_BU * BINS).astype(jnp.int32), 0, BINS - 1)
    return {"probabilities": Mean(jnp.zeros(BINS).at[bin_BU].add(scores.there), jnp.sum(scores.there))}


def parts(config: Config) -> dict[str, float]:
    coefficient = config.preference.center_coefficient
    return {"reward_loss": 1.0} | ({"center": coefficient} if coefficient else {})


def objective() -> Objective:
    return Objective(
        function=function,
        parts=parts,
        pictured=probabilities,
        shapes=("preference",),
        head="score",
        needs=("value_BT",),
        columns=("unit", "label"),
        optional=("margin",),
        whole_documents=True,
    )
