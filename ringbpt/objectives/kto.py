"""Learning from answers that are each desirable or not, with nothing to compare them with: KTO, and APO of that kind.

Ref: KTO, arXiv:2402.01306, eq. 8; APO-zero, arXiv:2408.06266, of answers that come alone.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn import sigmoid

from ringbpt.config import Config
from ringbpt.objectives.objective import Objective, stopped
from ringbpt.objectives.units import answers
from ringbpt.types import Array, Batch, Mean, Means, TokenStats

DESIRABLE, UNDESIRABLE, MISMATCHED = 1, -1, 2  # labels


def kl(stats: TokenStats, batch: Batch, config: Config) -> Means:
    """An estimate of the KL from the reference to the policy, in nats: prompts with the completions of others.

    It stands inside a sigmoid: it is measured over the whole step before, so that micro-batches don't move it.
    """
    others = answers(stats.logp_BT, batch, MISMATCHED)
    return {"kl": Mean(jnp.sum(others.ratio * others.is_there), jnp.sum(others.is_there))}


def kto(good: Array, bad: Array, beta: float, z: Array) -> tuple[Array, Array]:
    """The losses of desirable and undesirable answers, by their log-ratios and the KL z, 0 at least."""
    return 1 - sigmoid(beta * (good - z)), 1 - sigmoid(beta * (z - bad))


def apo_zero(good: Array, bad: Array, beta: float, z: Array) -> tuple[Array, Array]:
    """Desirable answers up, undesirable ones down, by as much as they can still move."""
    return 1 - sigmoid(beta * good), sigmoid(beta * bad)


Loss = Callable[[Array, Array, float, Array], tuple[Array, Array]]


def objective(loss: Loss, has_kl: bool) -> Objective:
    """The objective of a loss of single answers; has_kl: whether it asks for the KL."""

    def function(stats: TokenStats, batch: Batch, config: Config) -> Means:
        c = config.preference
        good, bad = (answers(stats.logp_BT, batch, label) for label in (DESIRABLE, UNDESIRABLE))
        z = jnp.float32(0)
        if has_kl:
            known = stats.whole if "kl" in stats.whole else stopped(kl(stats, batch, config))
            z = jnp.maximum(known["kl"], 0.0)
        losses = loss(good.ratio, bad.ratio, c.beta, z)
        total = c.desirable_weight * losses[0] * good.is_there + c.undesirable_weight * losses[1] * bad.is_there
        count = jnp.sum(good.is_there) + jnp.sum(bad.is_there)
        means = {"kto_loss": Mean(jnp.sum(total), count)}
        # Of an answer that is as probable as others' are by the reference, half.
        right = [0.5 + 0.5 * jnp.sign(some.ratio - z) for some in (good, bad)]
        hits = right[0] * good.is_there + (1 - right[1]) * bad.is_there
        shown = {"rewards/accuracies": Mean(jnp.sum(hits), count)}
        for name, some in (("chosen", good), ("rejected", bad)):
            count = jnp.sum(some.is_there)
            shown[f"rewards/{name}"] = Mean(jnp.sum(c.beta * some.ratio * some.is_there), count)
            shown[f"logps/{name}"] = Mean(jnp.sum(some.logp * some.is_there), count)
        if has_kl:
            shown |= kl(stats, batch, config)
        return means | jax.lax.stop_gradient(shown)

    return Objective(
        function=function,
        parts=lambda config: {"kto_loss": 1.0},
        shapes=("kto",),
        whole=kl if has_kl else None,
        needs=("logp_BT",),
        columns=("unit", "label"),
        reference=True,
        whole_documents=True,
        mismatched=has_kl,
    )
