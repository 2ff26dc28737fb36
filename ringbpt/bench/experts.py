"""A mixture of experts on this device, beside jax.lax.ragged_dot and a dense feedforward of as much work."""

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
    """Of a chunk's forward and backward. tflops: of the chosen experts' products, a second; temporaries: bytes."""

    side: str
    seconds: float
    tflops: float
    temporaries: int


def measure(tokens: int, experts: int, chosen: int, hidden: int, intermediate: int, dtype: str) -> Iterator[Row]:
    """A Row a side, on the first device; tokens choose their experts at random, seeded."""
    device, rng = jax.devices()[0], np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(1, tokens, hidden)), dtype) for _ in range(2))
    choice = np.argpartition(rng.uniform(size=(1, tokens, experts)), chosen - 1)[..., :chosen]
    weight, expert = jnp.full((1, tokens, chosen), 1 / chosen, jnp.float32), jnp.asarray(choice, jnp.int32)

    def weights(*leading: int) -> list[jax.Array]:
        key, shapes = jax.random.key(0), ((hidden, intermediate), (hidden, intermediate), (intermediate, hidden))
        return [jax.random.normal(key, (*leading, *shape), dtype) * hidden**-0.5 for shape in shapes]

    # Forward 3 products; backward 2 that are computed again, and 2 each of three.
    flops = 11 * 2.0 * tokens * chosen * hidden * intermediate
    for side in SIDES:
        if side == "dense":
            rows = [jnp.repeat(a, chosen, axis=1) for a in (x, dy)]
            run, arguments = _dense, [*rows, *weights()]
        else:
            mixture = Mixture(make_grouped(device) if side == "experts" else ragged(), experts)
            run, arguments = _both(mixture), [x, weight, expert, dy, *weights(experts)]
        program = jax.jit(run).lower(*arguments).compile()
        spent, memory = seconds(program, arguments), program.memory_analysis().temp_size_in_bytes
        yield Row(side, spent, flops / spent / 1e12, memory)


def _both(mixture: Mixture) -> Callable:
    def run(x, weight, expert, dy, *ws):
        return mixture(x, weight, expert, *ws), mixture.backward(x, weight, expert, dy, *ws)

    return run


def _dense(x, dy, w_gate, w_up, w_down):
    matmul = matmul_in(x.dtype)
    return swiglu(x, w_gate, w_up, w_down, matmul), swiglu_backward(x, dy, w_gate, w_up, w_down)
