"""Sums over devices of which each keeps a part: how the gradients of shared weights, and of gathered keys, meet.

Everything here runs inside shard_map. A TPU's compiler makes a whole all-reduce out of most reduce-scatters (seen of
v4, v5p and v6e: twice the bytes, and nothing else runs meanwhile); there the sum goes round a ring in hops, half of it
each way, and behind the very products that it is the sum of. Elsewhere it is left to the machine's own library.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from ringbpt.dims import Axes
from ringbpt.types import PyTree

# The name under which the hops of a sum stand in a compiled program; planning.overlap tells them from the ring's by it.
SCOPE = "summed"
# A product of fewer columns leaves much of a TPU's matrix units idle: no hop waits for a narrower one.
LEAST_COLUMNS = 256


@dataclass(frozen=True)
class Reduction:
    """dtype: of what travels; what arrives is added in float32. in_hops: round a ring, and not as one collective.

    later: axes over which gradients are left as they are, each device with its own, for training.late_sums.
    """

    dtype: jnp.dtype = jnp.float32
    in_hops: bool = False
    later: tuple[str, ...] = ()

    @staticmethod
    def on(mesh: Mesh, dtype: jnp.dtype = jnp.float32) -> "Reduction":
        """As the mesh's devices do it best."""
        return Reduction(dtype, mesh.devices.flat[0].platform == "tpu")

    def everywhere(self, x: jax.Array, axes: Axes) -> jax.Array:
        """The sum of x over the devices of these axes, but those left for later, float32, on each of them."""
        now = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes) if axis not in self.later)
        return lax.psum(x.astype(self.dtype), now).astype(jnp.float32) if now else x.astype(jnp.float32)

    def first(self, sums: PyTree, then: PyTree) -> tuple[PyTree, PyTree]:
        """Both, and what needs `then` waits for the sums: the hops of a loop hide behind nothing else anyway, and what
        they are the sums of need not be kept any longer.
        """
        return lax.optimization_barrier((sums, then)) if self.in_hops else (sums, then)

    def scatter(self, x: jax.Array, axes: Axes, dim: int) -> jax.Array:
        """The sum of x over the devices of these axes, float32, of which each keeps its own part of `dim`."""
        if lax.axis_size(axes) == 1:
            return x.astype(jnp.float32)
        if self.in_hops:
            return self._in_hops(lambda part: part, x, axes, dim, dim, lax.axis_size(axes))
        return lax.psum_scatter(x.astype(self.dtype), axes, scatter_dimension=dim, tiled=True).astype(jnp.float32)

    def scatter_product(
        self, product: Callable[[jax.Array], jax.Array], x: jax.Array, axes: Axes, x_dim: int, dim: int
    ) -> jax.Array:
        """scatter(product(x), axes, dim): product is linear in x, and what stands along x's x_dim is along its dim.

        In hops, each hides behind the product of a part of x.
        """
        size, columns = lax.axis_size(axes), x.shape[x_dim]
        if size == 1 or not self.in_hops:
            return self.scatter(product(x), axes, dim)
        near = max(n for n in range(1, size + 1) if size % n == 0 and (n == 1 or columns // n >= LEAST_COLUMNS))
        return self._in_hops(product, x, axes, x_dim, dim, near)

    def _in_hops(self, product: Callable, x: jax.Array, axes: Axes, x_dim: int, dim: int, near: int) -> jax.Array:
        """First among `near` neighbours, each for all devices at its place among theirs, then among those: in all
        (n - 1) / n of the product travel, however n devices are split.
        """
        far = lax.axis_size(axes) // near
        ways = 2 - x.shape[x_dim] // (near * far) % 2

        def of_neighbour(i: jax.Array, way: int) -> jax.Array:
            return product(_cut(x, x_dim, (far, near, ways, -1), {1: i, 2: way}))

        def of_group(i: jax.Array, way: int) -> jax.Array:
            return _cut(mine, dim, (ways, far, -1), {0: way, 1: i})

        mine = self._round(of_neighbour, axes, near, 1, ways, dim)
        return mine if far == 1 else self._round(of_group, axes, far, near, ways, dim)

    def _round(self, term: Callable, axes: Axes, size: int, stride: int, ways: int, dim: int) -> jax.Array:
        """The sum over a ring of `size` devices, `stride` apart, of each one's term(place, way) for the device at that
        place; what goes one way (0), and what the other (1), behind each other along `dim`.
        """
        place, count = lax.axis_index(axes) // stride % size, lax.axis_size(axes)
        steps = (1, -1)[:ways]

        def send(x: jax.Array, step: int) -> jax.Array:
            to = [i + stride * ((i // stride + step) % size - i // stride % size) for i in range(count)]
            return lax.ppermute(x.astype(self.dtype), axes, list(enumerate(to))).astype(jnp.float32)

        def terms(hop: jax.Array | int) -> list[jax.Array]:
            return [term((place - step * (hop + 1)) % size, way) for way, step in enumerate(steps)]

        def turn(hop: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
            arrived = [send(x, step) for step, x in zip(steps, sums, strict=True)]
            # The products wait for nothing that is under way: an addition fused into one would.
            arrived, own = lax.optimization_barrier((arrived, terms(hop)))
            return [x + y for x, y in zip(arrived, own, strict=True)]

        with jax.named_scope(SCOPE):
            return jnp.concatenate(lax.fori_loop(1, size, turn, terms(0)), axis=dim)


def _cut(x: jax.Array, dim: int, shape: tuple[int, ...], at: dict[int, jax.Array | int]) -> jax.Array:
    """What of x stands at these places, by axis of `shape`, where its dim is seen as an array of that shape."""
    if all(count == 1 or axis in at for axis, count in enumerate(shape[:-1])):
        # It stands in one piece: seen as the array, a TPU's compiler would first copy x to a layout of its own.
        size = x.shape[dim] // math.prod(shape[:-1])
        start = jnp.int32(0)
        for axis, count in enumerate(shape[:-1]):
            start = start * count + at.get(axis, 0)
        return lax.dynamic_slice_in_dim(x, start * size, size, dim)
    seen = x.reshape(*x.shape[:dim], *shape, *x.shape[dim + 1 :])
    # In one slice: of two after each other the first, the same for all hops, would be kept as a copy of x.
    starts = [at.get(axis - dim, 0) for axis in range(seen.ndim)]
    sizes = [1 if axis - dim in at else size for axis, size in enumerate(seen.shape)]
    cut = lax.dynamic_slice(seen, starts, sizes)
    return cut.reshape(*x.shape[:dim], -1, *x.shape[dim + 1 :])
