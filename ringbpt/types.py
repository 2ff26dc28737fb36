"""The values that travel through the house: a batch, the place of each token, statistics, and means."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

Array = Any  # jax.Array on the device, numpy.ndarray on the host, a tracer or a ShapeDtypeStruct in between


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenMeta:
    """Where each token stands; a mask is a function of two of these and of nothing else.

    position_BT: int32, the position inside its document, from 0.
    segment_BT: int32, the id of its document inside the row, from 1; 0 is padding and sees nothing.
    """

    position_BT: Array
    segment_BT: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One global batch, as the train step takes it: host arrays in text order, device arrays in layout order.

    token_BT: int32 inputs. target_BT: int32, the token to predict at each place (shifted on the host).
    weight_BT: float32, 0 where a place takes no loss. position_BT, segment_BT: see TokenMeta.
    columns: whatever else an objective reads, by name, written by a precompute pass or a rollout
    (reference log-probs, advantages, ...): [B, T], or [B, P] per document.
    """

    token_BT: Array
    target_BT: Array
    weight_BT: Array
    position_BT: Array
    segment_BT: Array
    columns: dict[str, Array] = field(default_factory=dict)

    @property
    def meta(self) -> TokenMeta:
        return TokenMeta(position_BT=self.position_BT, segment_BT=self.segment_BT)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenStats:
    """What an objective may know about the model's prediction at each place; all float32.

    logp_BT: log-probability of the target, in nats. entropy_BT: of the distribution, in nats.
    correct_BT: 1 where the target is the most likely token (no gradient). None where no head reads the hidden states.
    chosen_BTE, router_BTE: where the model has experts, how often each was chosen for the token and how probable the
    routers thought it, each the mean over layers.
    whole: what the objective measured of the whole optimizer step before, by name (objectives.Objective.whole).
    """

    logp_BT: Array = None
    entropy_BT: Array = None
    correct_BT: Array = None
    chosen_BTE: Array = None
    router_BTE: Array = None
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
        """total / weight, and 0 where nothing was weighed."""
        empty = self.weight == 0
        return jnp.where(empty, 0.0, self.total / jnp.where(empty, 1.0, self.weight))


Means = dict[str, Mean]
Params = Any  # a nested dict of arrays: {"embed": ..., "layers": {"w_q": ...}, "norm": ..., "unembed": ...}
PyTree = Any
Key = jax.Array
