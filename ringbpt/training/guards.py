"""What a training step watches over: no update by what is no number, or by a spike.

It stands in the compiled step, whose state carries what it remembers; the host reads what it did when it reads the
step's metrics, and waits for nothing more.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ringbpt.config import GuardConfig, UserError
from ringbpt.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Guard:
    """What a run remembers. skipped, in_a_row: int32, updates left out in all, and since the last that was not.
    losses: float32 [window], of the last good steps, the oldest overwritten; count: int32, good steps.
    """

    skipped: Array
    in_a_row: Array
    losses: Array
    count: Array

    @classmethod
    def new(cls, config: GuardConfig) -> "Guard":
        """Host arrays, each of its own: a step takes their buffers one by one."""
        skipped, in_a_row, count = np.zeros((3, 1), np.int32)
        return cls(skipped[0], in_a_row[0], np.zeros(config.window, np.float32), count[0])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Verdict:
    """What a step's guard has to say, fetched with the step's metrics. loss, norm (of the gradients): float32 [], of
    the step; skipped, in_a_row: as Guard's, after it.
    """

    loss: Array
    norm: Array
    skipped: Array
    in_a_row: Array


def judge(config: GuardConfig, guard: Guard, loss: Array, norm: Array) -> tuple[Array, Guard]:
    """(whether the step may change anything, what is remembered after it). loss, norm: float32 [], of this step.

    A loss is a spike where the window is full and it is more than `spike` standard deviations above its mean; what was
    skipped isn't in the window, so that a spike makes the next one no likelier to pass.
    """
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    if config.spike:
        limit = jnp.mean(guard.losses) + config.spike * jnp.std(guard.losses)
        good &= (guard.count < config.window) | (loss <= limit)
    bad = (~good).astype(jnp.int32)
    losses = jnp.asarray(guard.losses).at[guard.count % config.window].set(loss)
    return good, Guard(
        guard.skipped + bad,
        (guard.in_a_row + 1) * bad,
        jnp.where(good, losses, guard.losses),
        guard.count + 1 - bad,
    )


def chosen(good: Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` of a good step, `old` of another."""
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)


def if_good(good: Array | None, update: Callable[[], PyTree], old: PyTree, cpu: bool) -> PyTree:
    """update() of a good step, `old`, which it overwrites, of another; good None: in any case.

    cpu: as a branch. XLA for CPUs writes a result at a time, so choosing each would keep a copy of all that another is
    still to be computed from: the optimizer's whole state. XLA for GPUs writes them together, and would copy into a
    branch.
    """
    if good is None:
        return update()
    return jax.lax.cond(good, update, lambda: old) if cpu else chosen(good, update(), old)


@dataclass
class Watch:
    """What the host makes of it. say: prints a line."""

    config: GuardConfig
    say: Callable[[str], None]
    _skipped: int = 0

    def look(self, step: int, verdict: Verdict) -> None:
        """Says that a step was skipped. Raises UserError, code 3, after too many in a row."""
        if not verdict.in_a_row:
            return
        seen = f"loss {verdict.loss:.6g}, gradient norm {verdict.norm:.6g}"
        if verdict.in_a_row >= self.config.stop_after:
            raise UserError(
                f"step {step}: {seen}: {verdict.in_a_row} updates in a row were skipped (--guard.stop_after); the "
                "weights are as before them: look at the data of these steps, or lower the learning rate",
                code=3,
            )
        self.say(f"step {step}  {seen}: this update is skipped, {verdict.skipped} so far")
