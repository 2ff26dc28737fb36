"""Next-token cross-entropy over the places that take loss: pretraining and supervised fine-tuning alike."""

import jax.numpy as jnp

from ringbpt.config import Config
from ringbpt.objectives.objective import Objective
from ringbpt.types import Batch, Mean, Means, TokenStats


def cross_entropy(stats: TokenStats, batch: Batch, config: Config) -> Means:
    """loss: -log p(target) in nats a token; accuracy: the share of targets that are the most likely token."""
    weight = jnp.sum(batch.weight_BT)
    return {
        "loss": Mean(-jnp.sum(stats.logp_BT * batch.weight_BT), weight),
        "accuracy": Mean(jnp.sum(stats.correct_BT * batch.weight_BT), weight),
    }


OBJECTIVE = Objective(
    function=cross_entropy,
    parts=lambda config: {"loss": 1.0},
    shapes=("text", "messages", "sharegpt", "alpaca", "prompt_completion"),
    needs=("logp_BT", "correct_BT"),
)
