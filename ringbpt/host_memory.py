"""Arrays in the host's memory, inside a jitted program: brought to the device where they are used, and put back.

An array's type says where it lives, so nobody needs to be told: what is on the device already stays as it is. The
gradient of what was fetched is put back, so it lives where its weight does.
"""

import jax

from ringbpt.types import PyTree

Space = jax.memory.Space


def on_host(x: jax.Array) -> bool:
    return jax.typeof(x).memory_space == Space.Host


def fetch(tree: PyTree) -> PyTree:
    """Every array of it on the device."""
    return jax.tree.map(lambda x: jax.device_put(x, Space.Device) if on_host(x) else x, tree)


def stow(x: jax.Array) -> jax.Array:
    """In the host's memory (pinned_host)."""
    return x if on_host(x) else jax.device_put(x, Space.Host)


def beside(x: jax.Array, other: jax.Array) -> jax.Array:
    """In the host's memory where `other` is there."""
    return stow(x) if on_host(other) else x
