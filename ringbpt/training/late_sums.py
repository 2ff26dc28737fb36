"""Gradients of several micro-batches, summed over dp once a step and not once for each of them.

Every device of dp has the same part of a weight, so its part of the gradient takes no more memory unsummed than summed,
and may wait for the step's end: over a network between slices that is what a step takes longest for. Over fsdp and sp
it can't: unsummed, a device's part would be the whole gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
from jax.sharding import NamedSharding, PartitionSpec

from ringbpt.config import Config
from ringbpt.model.llama import Model
from ringbpt.model.weights import is_matrix, part_of
from ringbpt.types import Params

# The name under which these sums stand in a compiled program; planning.traffic looks for it.
SCOPE = "late_sums"


def are_late(config: Config, dp: int) -> bool:
    """Whether a step's sums over so many devices of dp wait for its end; those in the host's memory don't."""
    return dp > 1 and config.optimizer.accumulate_gradient_steps > 1 and not config.optimizer.offload_params


@dataclass(frozen=True)
class LateSums:
    """model: what to take the gradients of, which leaves those of matrices unsummed over its `later` axes."""

    model: Model

    @staticmethod
    def of(config: Config, model: Model) -> "LateSums":
        return LateSums(replace(model, later=("dp",)) if are_late(config, model.mesh.shape["dp"]) else model)

    def apart(self, grads: Params) -> Params:
        """Gradients straight from the model, as arrays that say what they are: of a matrix [dp, ...], each device's own
        part of the sum.
        """
        return self._on_shards(lambda g: g[None], grads, *self._specs(grads))

    def together(self, grads: Params) -> Params:
        """The gradients, of what `apart` gave or of sums of such."""
        with jax.named_scope(SCOPE):
            return self._on_shards(lambda g: self._sum(g[0]), grads, *reversed(self._specs(grads)))

    def shardings(self, trained: Params) -> Params:
        """Of what `apart` gives."""
        return jax.tree.map(lambda _, spec: NamedSharding(self.model.mesh, spec), trained, self._specs(trained)[1])

    def _sum(self, g: jax.Array) -> jax.Array:
        return replace(self.model.reduction, later=()).everywhere(g, self.model.later)

    def _specs(self, grads: Params) -> tuple[Params, Params]:
        """Of gradients, and of what `apart` gives."""

        def apart(path: tuple, _: jax.Array, spec: PartitionSpec) -> PartitionSpec:
            return PartitionSpec(self.model.later, *spec) if self._waits(path) else spec

        whole = part_of(self.model.specs, grads)
        return whole, jax.tree.map_with_path(apart, grads, whole)

    def _waits(self, path: tuple) -> bool:
        return bool(self.model.later) and is_matrix(path[-1].key)

    def _on_shards(self, function: Callable, grads: Params, before: Params, after: Params) -> Params:
        def leaf(path: tuple, g: jax.Array, before: PartitionSpec, after: PartitionSpec) -> jax.Array:
            if not self._waits(path):
                return g
            # Unchecked: of what the model gave, devices of dp have values of their own where their specs say one.
            return jax.shard_map(function, mesh=self.model.mesh, in_specs=before, out_specs=after, check_vma=False)(g)

        return jax.tree.map_with_path(leaf, grads, before, after)
