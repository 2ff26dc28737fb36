"""What it costs to send gradients in bf16 on their way to being summed: measured, on a run that learns."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ringbpt.config import Config
from ringbpt.data.text.tokenizers import make_tokenizer
from ringbpt.mesh import mesh_of
from ringbpt.model.llama import Model
from ringbpt.objectives import objective_of
from ringbpt.planning.topologies import uncached
from ringbpt.reduction import Reduction
from ringbpt.training.loop import loader_of
from ringbpt.training.state import StateLayout
from ringbpt.training.step import make_gradients, make_train_step


class Cost(NamedTuple):
    """At the weights of a float32 run after `step` steps: the cosine of both gradients, the norm of bf16's over the
    other, and the loss of each run, its own weights', in that step.
    """

    step: int
    cosine: float
    norm: float
    loss: float
    loss_in_bf16: float


class _InHops(Model):
    """A model whose gradients are summed in hops, as on a TPU, whatever its devices are."""

    @property
    def reduction(self) -> Reduction:  # type: ignore[override]
        return replace(super().reduction, in_hops=True)


def costs(config: Config, every: int) -> Iterator[Cost]:
    """Two runs of config.total_steps from the same weights on the same batches, compared every so many steps."""
    with uncached():  # a CPU's program of hops that comes from jax's cache was seen to crash (0.10.2)
        yield from _costs(config, every)


def _costs(config: Config, every: int) -> Iterator[Cost]:
    objective, mesh = objective_of(config), mesh_of(config)
    loader = loader_of(config, make_tokenizer(config.tokenizer))
    layouts = []
    for dtype in ("fp32", "bf16"):
        own = replace(config, execution=replace(config.execution, reduce_dtype=dtype))
        layouts.append(StateLayout(own, _InHops.of(own, mesh)))
    steps = [make_train_step(layout, objective) for layout in layouts]
    gradients = [jax.jit(make_gradients(layout.config, layout.model, objective)) for layout in layouts]
    states = [layout.start(layout.model.init(jax.random.key(config.seed))) for layout in layouts]
    for step in range(config.total_steps):
        host = loader.rows(step, 0, loader.batch_size)
        batch = layouts[0].model.put_batch(host.rows, host.token_BT.shape)
        measured = (step + 1) % every == 0
        if measured:
            one, other = (jax.block_until_ready(make(states[0].trained, batch)[0]) for make in gradients)
            cosine, norm = _compared(one, other)
        found = []
        for i, train in enumerate(steps):
            # One program at a time: of two, virtual devices may each wait in another one's collective.
            states[i], metrics = jax.block_until_ready(train(states[i], batch))
            found.append(metrics.means)
        if measured:
            loss, loss_in_bf16 = (objective.values(means, config)["loss"] for means in found)
            yield Cost(step + 1, cosine, norm, loss, loss_in_bf16)


@jax.jit
def _dots(one, other):
    both = jax.tree.map(lambda a, b: jnp.vdot(a, b, precision="highest"), one, other)
    return sum(jax.tree.leaves(both)), optax.tree.norm(one), optax.tree.norm(other)


def _compared(one, other) -> tuple[float, float]:
    dot, norm, norm_other = (float(x) for x in _dots(one, other))
    return dot / (norm * norm_other), norm_other / norm
