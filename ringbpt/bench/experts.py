"""A mixture of experts on this device, beside jax.lax.ragged_dot and a dense feedforward of as much work."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ringbpt.bench.kernels import seconds
from ringbpt.model.experts import Mixture
from ringbpt.model.feedforward import matmul_in, swiglu, swiglu_backward
from ringbpt.model.grouped import make_grouped, ragged

SIDES = ("experts", "ragged_dot", "dense")


@dataclass(frozen=True)
class Row:
    """Of one chunk. forward, backward: seconds; tflops: of the chosen experts' products, a second of both.

    temporaries: bytes of the backward. All NaN and 0 where the device's memory is too small.
    """

    side: str
    forward: float = math.nan
    backward: float = math.nan
    tflops: float = math.nan
    temporaries: int = 0


def measure(tokens: int, experts: int, chosen: int, hidden: int, intermediate: int, dtype: str) -> Iterator[Row]:
    """A Row a side, on the first device; tokens choose their experts at random, seeded."""
    device, rng = jax.devices()[0], np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(1, tokens, hidden)), dtype) for _ in range(2))
    choice = np.argpartition(rng.uniform(size=(1, tokens, experts)), chosen - 1)[..., :chosen]
    weight, expert = jnp.full((1, tokens, chosen), 1 / chosen, jnp.float32), jnp.asarray(choice, jnp.int32)

    def weights(*leading: int) -> list[jax.Array]:
        key, shapes = jax.random.key(0), ((hidden, intermediate), (hidden, intermediate), (intermediate, hidden))
        return [jax.random.normal(key, (*leading, *shape), dtype) * hidden**-0.5 for shape in shapes]

    # Forward 3 products; backward 2 that are computed again, and 2 for each of the three.
    flops = 11 * 2.0 * tokens * chosen * hidden * intermediate
    for side in SIDES:
        try:
            if side == "dense":
                rows, d_rows = (jnp.repeat(a, chosen, axis=1) for a in (x, dy))
                both = _timed(_dense, [rows, *weights()]), _timed(swiglu_backward, [rows, d_rows, *weights()])
            else:
                mixture = Mixture(make_grouped(device) if side == "experts" else ragged(), experts)
                chunk, ws = [x, weight, expert], weights(experts)
                both = _timed(mixture, [*chunk, *ws]), _timed(mixture.backward, [*chunk, dy, *ws])
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            yield Row(side)
        else:
            (forward, _), (backward, temporaries) = both
            yield Row(side, forward, backward, flops / (forward + backward) / 1e12, temporaries)


def _timed(function: Callable, arguments: list[jax.Array]) -> tuple[float, int]:
    """(seconds of a call, bytes of its temporaries)"""
    program = jax.jit(function).lower(*arguments).compile()
    return seconds(program, arguments), program.memory_analysis().temp_size_in_bytes


def _dense(x, w_gate, w_up, w_down):
    return swiglu(x, w_gate, w_up, w_down, matmul_in(x.dtype))
