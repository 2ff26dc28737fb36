"""The contract of an objective: a pure function that says what it needs, and of which parts its loss is made."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from ringbpt.config import Config
from ringbpt.types import Array, Batch, Means, TokenStats

REFERENCE = "ref_logp"  # the column of what the reference model says
Function = Callable[[TokenStats, Batch, Config], Means]


@dataclass(frozen=True)
class Objective:
    """The loss is the sum over parts of coefficient * total / weight, weights counted over a whole optimizer step.

    function(stats, batch, config) -> the means of some rows: the parts of the loss, and what else is worth a line in
    the log. A part's weight depends on the batch alone and adds over rows: it is counted before there are statistics.
    parts(config) -> {name of a mean: its coefficient in the loss}; all but zero.
    whole(stats, batch, config) -> means that stand inside something that is not linear in them, and so are needed of
    the whole step before the first gradient: `function` finds their values, without a gradient, in stats.whole.
    pictured(stats, batch, config) -> means of vectors, of held-out data alone, for a picture and for no log.
    head: what reads the hidden states: "unembed", which gives the statistics of the vocabulary, "score", the value of
    each token, or "", nothing.
    needs: the fields of TokenStats that are read. columns: those of the batch, beyond what every batch has; optional:
    those that it reads where the data have them. reference: whether it reads `ref_logp`, what the reference model says
    of each target. shapes: the shapes of examples that it learns from, as data/ names them. whole_documents: whether
    no document may be cut. mismatched: whether each prompt comes with another example's completion too.
    rollouts: whether its batches are what the policy itself has sampled.
    """

    function: Function
    parts: Callable[[Config], dict[str, float]]
    shapes: tuple[str, ...]
    whole: Function | None = None
    pictured: Function | None = None
    head: str = "unembed"
    needs: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    reference: bool = False
    whole_documents: bool = False
    mismatched: bool = False
    rollouts: bool = False

    def in_step(self, config: Config) -> bool:
        """Whether the reference model is in memory, and asked beside the policy."""
        if self.rollouts:  # whose column is filled where they are made
            return config.policy.kl_coefficient > 0
        return self.reference and config.reference == "step"

    def is_in_nats(self, config: Config) -> bool:
        """Whether its own loss is in nats a token, so that it says how many bits a byte of text takes."""
        return "loss" in self.parts(config)

    def weights(self, batch: Batch, config: Config) -> dict[str, Array]:
        """Each part's weight in these rows, float32 [].

        The statistics are NaN meanwhile: a weight that looked at them would be NaN, and not quietly wrong.
        """
        shape_BT, E = batch.token_BT.shape, config.architecture.num_experts
        shapes = (*(shape_BT,) * 3, *((*shape_BT, E),) * 2, shape_BT)
        stats = TokenStats(*(jnp.full(shape, jnp.nan) for shape in shapes))
        means = self.function(self.knowing_whole(stats, batch, config), batch, config)
        return {name: means[name].weight for name in self.parts(config)}

    def knowing_whole(self, stats: TokenStats, batch: Batch, config: Config) -> TokenStats:
        """The statistics with what is measured of a whole step, where these rows are one."""
        return replace(stats, whole=stopped(self.whole(stats, batch, config))) if self.whole else stats

    def scales(self, weights: dict[str, Array], config: Config) -> tuple[dict[str, Array], Array]:
        """({part: scale}, divisor): the loss is the sum over parts of scale * total, divided by the divisor.

        The divisor is the first part's weight: what goes backward through a model computed in float16 is then of one
        token's size, and not a token's share of millions. A part that weighs nothing counts for nothing.
        """
        divisor = _or_one(next(iter(weights.values())))
        return {
            name: jnp.where(weights[name] == 0, 0.0, coefficient * (divisor / _or_one(weights[name])))
            for name, coefficient in self.parts(config).items()
        }, divisor

    def values(self, means: Means, config: Config) -> dict[str, float]:
        """The values of means that are on the host, and "loss", the sum of its parts, where no single one is called so.

        What nothing was weighed for has no value and no name here; nor has a loss none of whose parts was weighed.
        """
        numbers = {name: mean.number() for name, mean in means.items()}
        values = {name: number for name, number in numbers.items() if number is not None}
        weighed = [scale * values[name] for name, scale in self.parts(config).items() if name in values]
        return ({"loss": sum(weighed)} if weighed else {}) | values


def _or_one(weight: Array) -> Array:
    return jnp.where(weight == 0, 1.0, weight)


def stopped(means: Means) -> dict[str, Array]:
    """The means' values without a gradient, for stats.whole."""
    return {name: jax.lax.stop_gradient(mean.value()) for name, mean in means.items()}
