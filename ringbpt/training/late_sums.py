"""Gradients of several micro-batches, summed over dp once a step and not once for each of them.

Every device of dp has the same part of a weight, so its part of the gradient takes no more memory unsummed than summed,
and may wait for the step's end: over a network between slices that is what a step takes longest for. Over fsdp and sp
it can't: unsummed, a device's part would be the whole gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from ringbpt.config import Config
from ringbpt.model.llama import Model
from ringbpt.model.weights import is_matrix
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
        return self._on_shards(lambda g: g[None], grads, self._whole, self._apart)

    def together(self, grads: Params) -> Params:
        """The gradients, of what `apart` gave or of sums of such."""
        with jax.named_scope(SCOPE):
            return self._on_shards(lambda g: self._sum(g[0]), grads, self._apart, self._whole)

    def shardings(self, trained: Params) -> Params:
        """Of what `apart` gives."""
        placed = lambda path, _: NamedSharding(self.model.mesh, self._apart(path))  # noqa: E731
        return jax.tree.map_with_path(placed, trained)

    def _sum(self, g: jax.Array) -> jax.Array:
        return replace(self.model.reduction, later=()).everywhere(g, self.model.later)

    def _whole(self, path: tuple) -> PartitionSpec:
        spec: Any = self.model.specs
        for key in path:
            spec = spec[key.key]
        return spec

    def _apart(self, path: tuple) -> PartitionSpec:
        return PartitionSpec(self.model.later, *self._whole(path)) if self._waits(path) else self._whole(path)

    def _waits(self, path: tuple) -> bool:
        return bool(self.model.later) and is_matrix(path[-1].key)

    def _on_shards(self, function: Callable, grads: Params, before: Callable, after: Callable) -> Params:
        def leaf(path: tuple, g: jax.Array) -> jax.Array:
            if not self._waits(path):
                return g
            specs = {"in_specs": before(path), "out_specs": after(path)}
            # Unchecked: of what the model gave, devices of dp have values of their own where their specs say one.
            return jax.shard_map(function, mesh=self.model.mesh, check_vma=False, **specs)(g)

        return jax.tree.map_with_path(leaf, grads)
