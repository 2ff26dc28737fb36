"""Arrays offloaded to the host's memory, inside a jitted program: fetched to the device for use, and put back.

An array's type says which memory it is in, so nobody needs to be told: what is on the device already stays as it is.
The gradient of a fetched array is put back into the host's memory.
"""

import jax

from ringbpt.types import PyTree

Space = jax.memory.Space


def on_host(x: jax.Array) -> bool:
    return jax.typeof(x).memory_space == Space.Host


def fetch(tree: PyTree) -> PyTree:
    """The tree with every array in the device's memory."""
    return jax.tree.map(lambda x: jax.device_put(x, Space.Device) if on_host(x) else x, tree)


def to_host(x: jax.Array) -> jax.Array:
    """The array in the host's memory (pinned_host)."""
    return x if on_host(x) else jax.device_put(x, Space.Host)


def placed_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """The array in the host's memory if `other` is there, else as it is."""
    return to_host(x) if on_host(other) else x
