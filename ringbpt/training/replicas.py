"""Copies of a weight on several devices, which only failing hardware makes different, compared now and then."""

from collections.abc import Callable, Sequence
from functools import cached_property
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from ringbpt.config import UserError
from ringbpt.training.state import IS_SPEC, StateLayout, TrainState
from ringbpt.types import Array, Params


class Replicas:
    """Compares the copies of each weight that the mesh holds, bit by bit by their sums, on the devices."""

    def __init__(self, mesh: jax.sharding.Mesh, specs: Params):
        self._mesh, self._specs = mesh, specs

    @cached_property
    def _sums(self) -> Callable[[Params], jax.Array]:
        """params -> uint32 [devices, leaves], on every device: of each device's own part of each leaf."""
        axes = self._mesh.axis_names

        def sums(params: Params) -> Array:
            own = jnp.stack([_bits(leaf) for leaf in jax.tree.leaves(params)])
            return lax.all_gather(own, axes)

        return jax.jit(
            jax.shard_map(sums, mesh=self._mesh, in_specs=(self._specs,), out_specs=PartitionSpec(), check_vma=False)
        )

    def send(self, params: Params) -> jax.Array:
        """To be handed to `check`, once the devices have come so far."""
        return self._sums(params)

    def check(self, sums: jax.Array, step: int) -> None:
        """Raises UserError, code 3, naming a weight and the devices, where copies that ought to be equal are not."""
        of_devices = np.asarray(sums).reshape(*self._mesh.devices.shape, -1)
        names = [
            jax.tree_util.keystr(path, simple=True, separator=".")
            for path, _ in jax.tree.leaves_with_path(self._specs, is_leaf=IS_SPEC)
        ]
        specs = jax.tree.leaves(self._specs, is_leaf=IS_SPEC)
        for leaf, (name, spec) in enumerate(zip(names, specs, strict=True)):
            for copies in _copies(of_devices[..., leaf], self._mesh.devices, self._mesh.axis_names, spec):
                if odd := _odd(copies):
                    others = len(copies) - len(odd)
                    raise UserError(
                        f"after step {step}: {name} on {', '.join(odd)} is not what {others} other "
                        f"{'device holds' if others == 1 else 'devices hold'}: memory or arithmetic has failed there; "
                        "nothing is saved of this; start again without it from the last checkpoint",
                        code=3,
                    )


def make_compare(layout: StateLayout) -> Callable[..., None]:
    """compare(state, step, now): the copies of the trained weights after a step, each --guard.replicas steps, or now.

    Unless now, the program is sent off behind the step and read at the next call, which waits for nothing. Does nothing
    where no weight has a copy, nor for weights in the host's memory. Raises UserError, code 3, as Replicas.check does.
    """
    every, mesh = layout.config.guard.replicas, layout.model.mesh
    if not every or mesh.size == 1 or layout.config.optimizer.offload_params:
        return lambda state, step, now: None
    specs = jax.tree.map(lambda sharding: sharding.spec, layout.shardings.trained)
    replicas, sent = Replicas(mesh, specs), list[tuple[jax.Array, int]]()

    def compare(state: TrainState, step: int, now: bool) -> None:
        if sent:
            replicas.check(*sent.pop())
        if now or step % every == 0:
            sent.append((replicas.send(state.trained), step))
        if now:
            replicas.check(*sent.pop())

    return compare


def _bits(leaf: Array) -> Array:
    """The sum of an array's words, modulo 2^32: no single bit changes without it."""
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    return jnp.sum(lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32), dtype=jnp.uint32)


def _copies(
    sums: np.ndarray, devices: np.ndarray, axes: Sequence[str], spec: PartitionSpec
) -> list[list[tuple[int, jax.Device]]]:
    """(sum, device) of the devices that hold the same part of an array, a list for each part."""
    split = {name for part in spec for name in ((part,) if isinstance(part, str) else part or ())}
    front = [axis for axis, name in enumerate(axes) if name in split]
    back = [axis for axis, name in enumerate(axes) if name not in split]
    parts = prod(sums.shape[axis] for axis in front)
    flat = [array.transpose(*front, *back).reshape(parts, -1) for array in (sums, devices)]
    return [[(int(s), d) for s, d in zip(*rows, strict=True)] for rows in zip(*flat, strict=True)]


def _odd(copies: list[tuple[int, jax.Device]]) -> list[str]:
    """The devices whose sum fewest share; of two that differ, the second."""
    counts: dict[int, int] = {}
    for value, _ in copies:
        counts[value] = counts.get(value, 0) + 1
    if len(counts) <= 1:
        return []
    right = max(counts, key=lambda value: counts[value])
    return [f"device {d.id} of process {d.process_index}" for value, d in copies if value != right]
