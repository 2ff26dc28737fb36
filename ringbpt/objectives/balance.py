"""The balance of the experts' loads, as a part of any objective's loss.

E sum_e (share of tokens that go to e) (mean probability of e), over the real tokens of a whole optimizer step and over
all layers as one. The shares take no gradient, and are measured over the step before its first gradient, so that
micro-batches change nothing. Ref: Switch Transformer, arXiv:2101.03961, eq. 4-6.
"""

from dataclasses import replace

import jax.numpy as jnp

from ringbpt.config import Config
from ringbpt.objectives.objective import Objective, stopped
from ringbpt.types import Array, Batch, Mean, Means, TokenStats


def added_to(objective: Objective, config: Config) -> Objective:
    """The objective with `router_balance` among its means and, with a coefficient, among the parts of its loss."""
    coefficient = config.architecture.router_aux_loss_coef

    def function(stats: TokenStats, batch: Batch, config: Config) -> Means:
        return objective.function(stats, batch, config) | {"router_balance": router_balance(stats, batch, config)}

    if not coefficient:  # a line in the log is not worth a forward pass more: its shares are those of the rows at hand
        return replace(objective, function=function)

    def whole(stats: TokenStats, batch: Batch, config: Config) -> Means:
        own = objective.whole(stats, batch, config) if objective.whole else {}
        return own | router_share(stats, batch, config)

    def parts(config: Config) -> dict[str, float]:
        return objective.parts(config) | {"router_balance": coefficient}

    return replace(objective, function=function, whole=whole, parts=parts)


def of_the_rows_at_hand(config: Config) -> set[str]:
    """The names of what is measured of one micro-batch at a time: it depends on how many a step has."""
    architecture = config.architecture
    return {"router_balance"} if architecture.num_experts and not architecture.router_aux_loss_coef else set()


def router_share(stats: TokenStats, batch: Batch, config: Config) -> Means:
    """Of each expert the tokens that go to it, float32 [E], over the real tokens: their sum is the experts a token."""
    real_BT1 = _real(batch)[..., None]
    return {"router_share": Mean(jnp.sum(stats.chosen_BTE * real_BT1, axis=(0, 1)), jnp.sum(real_BT1))}


def router_balance(stats: TokenStats, batch: Batch, config: Config) -> Mean:
    """1 a choice where probabilities and loads are even, more where they are not."""
    share_E = stats.whole.get("router_share")
    if share_E is None:
        share_E = stopped(router_share(stats, batch, config))["router_share"]
    real_BT = _real(batch)
    each_BT = jnp.sum(stats.router_BTE * share_E[None, None], axis=-1) * config.architecture.num_experts
    return Mean(jnp.sum(each_BT * real_BT), jnp.sum(real_BT))


def _real(batch: Batch) -> Array:
    return (batch.segment_BT != 0).astype(jnp.float32)
