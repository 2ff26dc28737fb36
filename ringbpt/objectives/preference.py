"""Learning from pairs of answers, of which one was chosen: DPO and its family, SimPO and ORPO.

Each loss is a function of a pair's two answers. Where it compares with a reference model, `ratio` is
log pi(y|x) - log ref(y|x), summed over the answer's tokens; beta times it is the answer's reward.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid

from ringbpt.config import Config, PreferenceConfig
from ringbpt.objectives.objective import Objective
from ringbpt.objectives.units import Answers, answers, unit_sums
from ringbpt.types import Array, Batch, Mean, Means, TokenStats

CHOSEN, REJECTED = 1, -1  # labels


class Pair(NamedTuple):
    """The two answers of each unit, and by how much better the data say that the chosen one is; all [B, U]."""

    chosen: Answers
    rejected: Answers
    margin: Array

    @property
    def delta(self) -> Array:
        return self.chosen.ratio - self.rejected.ratio

    @property
    def mean_delta(self) -> Array:
        return self.chosen.mean_ratio - self.rejected.mean_ratio


Loss = Callable[[Pair, PreferenceConfig], Array]


def dpo(pair: Pair, c: PreferenceConfig) -> Array:
    """-log sigma(beta delta - margin). Ref: arXiv:2305.18290, eq. 7; the margin as an offset, arXiv:2402.10571."""
    return -log_sigmoid(c.beta * pair.delta - (c.margin_coefficient or 0.0) * pair.margin)


def ipo(pair: Pair, c: PreferenceConfig) -> Array:
    """(delta - 1 / (2 beta))^2, of means over tokens or, by ipo_sum, of sums. Ref: arXiv:2310.12036, eq. 17."""
    return ((pair.delta if c.ipo_sum else pair.mean_delta) - 1 / (2 * c.beta)) ** 2


def cdpo(pair: Pair, c: PreferenceConfig) -> Array:
    """DPO where a share label_smoothing of the labels is taken to be wrong. Ref: ericmitchell.ai/cdpo.pdf, eq. 3."""
    logits, e = c.beta * pair.delta, c.smoothing
    return -(1 - e) * log_sigmoid(logits) - e * log_sigmoid(-logits)


def robust(pair: Pair, c: PreferenceConfig) -> Array:
    """DPO's loss as it would be without the wrong labels, on average. Ref: arXiv:2403.00409, eq. 12."""
    logits, e = c.beta * pair.delta, c.smoothing
    return (-(1 - e) * log_sigmoid(logits) + e * log_sigmoid(-logits)) / (1 - 2 * e)


def hinge(pair: Pair, c: PreferenceConfig) -> Array:
    """Ref: SLiC, arXiv:2305.10425, on DPO's rewards."""
    return jax.nn.relu(1 - c.beta * pair.delta)


def exo(pair: Pair, c: PreferenceConfig) -> Array:
    """The reverse KL from the softened label to the policy's preference. Ref: arXiv:2402.00856, eq. 16."""
    logits, e = c.beta * pair.delta, c.smoothing
    return sigmoid(logits) * (log_sigmoid(logits) - math.log1p(-e)) + sigmoid(-logits) * (
        log_sigmoid(-logits) - math.log(e)
    )


def nca(pair: Pair, c: PreferenceConfig) -> Array:
    """Ref: noise contrastive alignment, arXiv:2402.05369, of a pair."""
    chosen, rejected = c.beta * pair.chosen.ratio, c.beta * pair.rejected.ratio
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


def bco(pair: Pair, c: PreferenceConfig) -> Array:
    """A binary classifier's loss on each answer. Ref: arXiv:2404.04656, without its shift."""
    return -log_sigmoid(c.beta * pair.chosen.ratio) - log_sigmoid(-c.beta * pair.rejected.ratio)


def sppo(pair: Pair, c: PreferenceConfig) -> Array:
    """Ref: arXiv:2405.00675, eq. 4.7, where the chosen wins for certain."""
    return (pair.chosen.ratio - 0.5 / c.beta) ** 2 + (pair.rejected.ratio + 0.5 / c.beta) ** 2


def apo_zero(pair: Pair, c: PreferenceConfig) -> Array:
    """Chosen answers up, rejected ones down: for answers better than the model's. Ref: arXiv:2408.06266, eq. 7."""
    return 1 - sigmoid(c.beta * pair.chosen.ratio) + sigmoid(c.beta * pair.rejected.ratio)


def apo_down(pair: Pair, c: PreferenceConfig) -> Array:
    """Both down, the rejected further: for answers worse than the model's. Ref: arXiv:2408.06266, eq. 8."""
    return sigmoid(c.beta * pair.chosen.ratio) + 1 - sigmoid(c.beta * pair.delta)


def discopop(pair: Pair, c: PreferenceConfig) -> Array:
    """A logistic and an exponential loss, mixed by the margin itself. Ref: arXiv:2406.08414, eq. 5."""
    logits = c.beta * pair.delta
    share = sigmoid(logits / c.discopop_tau)
    return -log_sigmoid(logits) * (1 - share) + jnp.exp(-logits) * share


def sigmoid_norm(pair: Pair, c: PreferenceConfig) -> Array:
    """DPO of means over tokens. Ref: arXiv:2411.15124, 5.1 (length-normalised DPO)."""
    return -log_sigmoid(c.beta * pair.mean_delta)


def simpo(pair: Pair, c: PreferenceConfig) -> Array:
    """Without a reference: mean log-probabilities, and a margin to keep. Ref: arXiv:2405.14734, eq. 6."""
    logits, e = c.beta * (pair.chosen.mean_logp - pair.rejected.mean_logp) - c.simpo_gamma, c.label_smoothing or 0.0
    return -(1 - e) * log_sigmoid(logits) - e * log_sigmoid(-logits)


def orpo(pair: Pair, c: PreferenceConfig) -> Array:
    """Without a reference: the odds of the chosen over those of the rejected. Ref: arXiv:2403.07691, eq. 4 and 7."""

    def log_odds(answers: Answers) -> Array:
        # Where there is no answer, a number whose logarithms are finite.
        logp = jnp.where(answers.tokens > 0, answers.mean_logp, -1.0)
        return logp - log1mexp(jnp.minimum(logp, -1e-7))

    return -c.beta * log_sigmoid(log_odds(pair.chosen) - log_odds(pair.rejected))


def log1mexp(x: Array) -> Array:
    """log(1 - exp(x)) for x < 0, exact near 0 and far from it. Ref: the note of R's package Rmpfr on log1mexp."""
    near = x > -math.log(2)
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


def objective(loss: Loss, reference: bool = True, whole_chosen: bool = False) -> Objective:
    """The objective of a loss of pairs. reference: whether a reference model is asked; else a reward is beta times the
    mean log-probability. whole_chosen: the cross-entropy of the chosen text, its prompt too, is always a part of it.
    """

    def function(stats: TokenStats, batch: Batch, config: Config) -> Means:
        pair = pair_of(stats, batch)
        rewards = [a.ratio if reference else a.mean_logp for a in (pair.chosen, pair.rejected)]
        return pair_means(pair, loss, rewards, config) | nll(stats, batch, whole_chosen)

    def parts(config: Config) -> dict[str, float]:
        coefficient = 1.0 if whole_chosen else config.preference.nll_coefficient
        return {"preference_loss": 1.0} | ({"nll": coefficient} if coefficient else {})

    return Objective(
        function=function,
        parts=parts,
        shapes=("preference",),
        needs=("logp_BT",),
        columns=("unit", "label"),
        optional=("margin",),
        reference=reference,
        whole_documents=True,
    )


def pair_of(stats: TokenStats, batch: Batch) -> Pair:
    chosen, rejected = (answers(stats.logp_BT, batch, label) for label in (CHOSEN, REJECTED))
    return Pair(chosen, rejected, margins(batch))


def margins(batch: Batch) -> Array:
    """By how much each pair's chosen answer is better, as the data say, [B, U]; 0 where they don't."""
    is_chosen_BT = (batch.columns["label"] == CHOSEN).astype(jnp.float32)
    if "margin" not in batch.columns:
        return jnp.zeros_like(unit_sums(is_chosen_BT, batch))
    # At each token of both answers: read at the chosen's.
    count = unit_sums(is_chosen_BT, batch)
    return unit_sums(is_chosen_BT * batch.columns["margin"], batch) / jnp.maximum(count, 1.0)


def pair_means(pair: Pair, loss: Loss, rewards: list[Array], config: Config) -> Means:
    """The mean loss of a pair; and, to be looked at, the means of its rewards, of which the chosen is to have more.

    accuracies: the share of pairs where it does; two rewards that are the same count half, as at the first step.
    """
    c, there = config.preference, pair.chosen.is_there * pair.rejected.is_there
    count = jnp.sum(there)
    chosen, rejected = (c.beta * reward for reward in rewards)

    def mean(x: Array) -> Mean:
        return Mean(jnp.sum(jnp.where(there > 0, x, 0.0)), count)

    shown = {
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        "rewards/margins": mean(chosen - rejected),
        "rewards/accuracies": mean(0.5 + 0.5 * jnp.sign(chosen - rejected)),
        "logps/chosen": mean(pair.chosen.logp),
        "logps/rejected": mean(pair.rejected.logp),
    }
    return {"preference_loss": mean(loss(pair, c))} | jax.lax.stop_gradient(shown)


def nll(stats: TokenStats, batch: Batch, whole: bool) -> Means:
    """Cross-entropy of the chosen answers, in nats a token; whole: of their prompts too (ORPO's, as its authors' code
    and TRL have it)."""
    weight_BT = (batch.columns["label"] == CHOSEN).astype(jnp.float32)
    if not whole:
        weight_BT *= batch.weight_BT > 0
    return {"nll": Mean(-jnp.sum(jnp.where(weight_BT > 0, stats.logp_BT, 0.0)), jnp.sum(weight_BT))}
