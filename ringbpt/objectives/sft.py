"""Next-token cross-entropy over the places that take loss: pretraining and supervised fine-tuning alike."""

import jax.numpy as jnp

from ringbpt.config import Config
from ringbpt.objectives.objective import Objective
from ringbpt.types import Batch, Mean, Means, TokenStats


def cross_entropy(stats: TokenStats, batch: Batch, config: Config) -> Means:
    """loss: -log p(target) in nats; accuracy: the share of targets that are the most likely token.

    Means over tokens or, with loss_average "row" (the original's), over rows of each row's mean.
    """
    weight_BT = batch.weight_BT
    if config.loss_average == "row":
        total_B1 = jnp.sum(weight_BT, axis=1, keepdims=True)
        weight_BT = weight_BT / jnp.where(total_B1 == 0, 1.0, total_B1)
    weight = jnp.sum(weight_BT) if config.loss_average == "token" else jnp.sum(jnp.any(weight_BT > 0, axis=1) * 1.0)
    return {
        "loss": Mean(-jnp.sum(stats.logp_BT * weight_BT), weight),
        "accuracy": Mean(jnp.sum(stats.correct_BT * weight_BT), weight),
    }


def objective(*shapes: str) -> Objective:
    """Cross-entropy of examples of these shapes."""
    return Objective(
        function=cross_entropy,
        parts=lambda config: {"loss": 1.0},
        shapes=shapes,
        needs=("logp_BT", "correct_BT"),
    )
