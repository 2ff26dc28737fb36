"""One optimizer step: gradients of totals over micro-batches, each part of the loss weighed over all of them."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ringbpt.config import Config
from ringbpt.host_memory import placed_like, to_host
from ringbpt.model.llama import Model
from ringbpt.model.weights import merge
from ringbpt.objectives import Objective
from ringbpt.objectives.objective import REFERENCE, stopped
from ringbpt.training import offload
from ringbpt.training.guards import Verdict, chosen, if_good, judge
from ringbpt.training.late_sums import LateSums
from ringbpt.training.optimizer import clip_factor
from ringbpt.training.state import StateLayout, TrainState
from ringbpt.types import Batch, Mean, Means, Params, PyTree, TokenStats

# Of a GPU's memory: what XLA's scheduler takes a program to be given, whatever it is given, and what jax gives it where
# the environment says nothing.
XLA_FRACTION, JAX_FRACTION = 0.8, 0.75
# What the scheduler counts of a program, over what the program then takes: up to a quarter more was seen.
OVERCOUNT = 1.25
LIMIT = "xla_gpu_memory_limit_slop_factor"
# Transfers under way at once: a ring's keys and values, their gradients, and two of weights. With fewer, sums of a
# layer's gradients that stretch over its attention keep the ring's last hop waiting (7b on 8 A100, by 2 and by 3). Over
# dp those are summed once more, and may be under way besides (7b on two times 8 H100, by 4).
AT_ONCE, OVER_DP = 4, 2


def gpu_options(given: float | None = None, dp: int = 1) -> dict[str, Any]:
    """So that a GPU's compiler sends the ring's K and V, and the gradients of others and of weights, at once, and
    nothing waits for them. given: the part of the GPU's memory that the program may use; None: as the environment says.
    dp: the mesh's.

    A program of which the scheduler counts more than its limit hides few transfers, or none: the limit is said, in
    percent of its own. What XLA_FLAGS says is left out.
    """
    if given is None:
        said = (os.environ.get(f"XLA_{name}CLIENT_MEM_FRACTION") for name in ("", "PYTHON_"))
        given = float(next(filter(None, said), JAX_FRACTION))
    own = {
        LIMIT: round(100 * OVERCOUNT * given / XLA_FRACTION),
        "xla_gpu_enable_latency_hiding_scheduler": True,  # of itself for Hopper only
        "xla_gpu_collective_permute_combine_threshold_bytes": 2**36,
        "xla_gpu_experimental_parallel_collective_overlap_limit": AT_ONCE + OVER_DP * (dp > 1),
    }
    return {name: value for name, value in own.items() if name not in os.environ.get("XLA_FLAGS", "")}


Whole = dict[str, jax.Array]  # values over a whole optimizer step, by name


class Metrics(NamedTuple):
    """What a step says of itself. means: the objective's, not divided yet, so that those of several steps add up.

    own: what is of this step alone, float32 []: FACTS, the learning rate, and the norms of gradients and weights.
    guard: what the guard found, where there is one; the means of a step that it skipped are of nothing.
    """

    means: Means
    own: dict[str, jax.Array]
    guard: Verdict | None = None


FACTS = ("tokens", "pairs")


def batch_facts(batch: Batch, window: int | None = None) -> Means:
    """FACTS, counts that the log needs: real tokens, and the (query, key) pairs that the mask lets through."""
    real_BT = batch.segment_BT != 0
    seen_BT = batch.position_BT + 1 if window is None else jnp.minimum(batch.position_BT + 1, window)
    pairs = jnp.sum(jnp.where(real_BT, seen_BT, 0).astype(jnp.float32))
    return {"tokens": Mean(jnp.sum(real_BT.astype(jnp.float32)), jnp.float32(1)), "pairs": Mean(pairs, jnp.float32(1))}


def micro_batches(batch: Batch, count: int) -> Batch:
    """[B, ...] -> [count, B/count, ...]; rows are dealt out in turn, so that no row leaves its device."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1), batch)


Totals = tuple[Params, jax.Array, Means, jax.Array]


def make_totals(config: Config, model: Model, objective: Objective) -> Callable[..., Totals]:
    """totals(trained, frozen, batch, reference=None) -> (gradients, divisor, means, loss), to be jitted by the caller.

    Divided by the divisor, loss and gradients are the loss and its gradients towards the trained weights; they and the
    means are sums over micro-batches and shards. Parts of the loss are weighed over the whole batch first, so that
    accumulation, packing and the mesh don't change the numbers. Gradients live where their weights do, on the device or
    in the host's memory.
    """
    count, late = config.optimizer.accumulate_gradient_steps, LateSums.of(config, model)
    model = late.model

    def statistics(trained: Params, frozen: Params, batch: Batch) -> TokenStats:
        return model.token_stats(merge(trained, frozen), batch, objective.head)

    def total_loss(
        trained: Params, frozen: Params, batch: Batch, scales: Whole, whole: Whole | None, reference: Params | None
    ) -> tuple:
        batch = with_reference(model, objective, reference, batch)
        stats = statistics(trained, frozen, batch)
        stats = objective.knowing_whole(stats, batch, config) if whole is None else replace(stats, whole=whole)
        means = objective.function(stats, batch, config)
        loss = sum(scale * means[name].total for name, scale in scales.items())
        return loss, means | batch_facts(batch, config.architecture.sliding_window)

    gradient = jax.grad(total_loss, has_aux=True)

    def totals(trained: Params, frozen: Params, batch: Batch, reference: Params | None = None) -> Totals:
        scales, divisor = objective.scales(objective.weights(batch, config), config)
        loss_of = lambda means: sum((scale * means[name].total for name, scale in scales.items()), jnp.float32(0))  # noqa: E731
        if count == 1:
            grads, means = gradient(trained, frozen, batch, scales, None, reference)
            return grads, divisor, means, loss_of(means)
        micros = micro_batches(batch, count)
        one = jax.tree.map(lambda x: x[0], micros)
        whole: Whole = {}
        if measure := objective.whole:

            def part(micro: Batch) -> Means:
                micro = with_reference(model, objective, reference, micro)
                return measure(statistics(trained, frozen, micro), micro, config)

            nothing = _zeros(jax.eval_shape(part, one))
            sums, _ = jax.lax.scan(lambda sums, x: (jax.tree.map(jnp.add, sums, part(x)), None), nothing, micros)
            whole = stopped(sums)

        def add(sums: tuple[Params, Means], micro: Batch) -> tuple[tuple[Params, Means], None]:
            grads, means = gradient(trained, frozen, micro, scales, whole, reference)
            return (offload.add(sums[0], late.apart(grads)), jax.tree.map(jnp.add, sums[1], means)), None

        shapes, of_means = jax.eval_shape(gradient, trained, frozen, one, scales, whole, reference)
        zeros = _zeros(jax.eval_shape(late.apart, shapes))
        zeros = jax.lax.with_sharding_constraint(zeros, late.shardings(trained))
        zeros = jax.tree.map(placed_like, zeros, trained)
        grads, means = jax.lax.scan(add, (zeros, _zeros(of_means)), micros)[0]
        return late.together(grads), divisor, means, loss_of(means)

    return totals


def with_reference(model: Model, objective: Objective, reference: Params | None, batch: Batch) -> Batch:
    """The batch with what the reference model says of it, where one is computed beside the policy."""
    if reference is None or REFERENCE in batch.columns:
        return batch
    logp_BT = jax.lax.stop_gradient(model.token_stats(reference, batch, objective.head).logp_BT)
    return replace(batch, columns=batch.columns | {REFERENCE: logp_BT})


def _zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def make_gradients(config: Config, model: Model, objective: Objective) -> Callable[..., tuple[Params, Means]]:
    """gradients(trained, batch, frozen={}) -> (gradients of the loss towards the trained, the objective's means); to be
    jitted by the caller.

    Without any weight the gradients are zero. All weights are on the device.
    """
    totals = make_totals(config, model, objective)

    def gradients(trained: Params, batch: Batch, frozen: Params | None = None) -> tuple[Params, Means]:
        grads, divisor, means, _ = totals(trained, frozen or {}, batch)
        own = {name: mean for name, mean in means.items() if name not in FACTS}
        return jax.tree.map(lambda g: g / divisor, grads), own

    return gradients


def make_train_step(
    layout: StateLayout, objective: Objective
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """step(state, batch) -> (state, metrics), jitted; the old state is donated.

    A batch without any weight changes nothing but what the optimizer does on a zero gradient.
    """
    config, model, (optimizer, schedule) = layout.config, layout.model, layout.made
    totals = make_totals(config, model, objective)
    by_layer = config.architecture.param_scan_axis == 0 and config.optimizer.is_layerwise
    platform = model.mesh.devices.flat[0].platform

    def update(
        state: TrainState, grads: Params, divisor: jax.Array, norm: jax.Array, good: jax.Array | None
    ) -> tuple[Params, PyTree, jax.Array]:
        """(trained, opt_state, the norm of the trained weights); all as before where the step is not good."""
        factor = clip_factor(config.optimizer, norm)
        if config.optimizer.is_offloaded:
            factor /= divisor
            return offload.update(optimizer, grads, state.opt_state, state.trained, factor, by_layer, good)

        def updated() -> tuple[Params, PyTree]:
            scaled = jax.tree.map(lambda g: factor * g, grads)
            updates, opt_state = optimizer.update(scaled, state.opt_state, state.trained)
            return optax.apply_updates(state.trained, updates), opt_state

        trained, opt_state = if_good(good, updated, (state.trained, state.opt_state), cpu=platform == "cpu")
        return trained, opt_state, optax.tree.norm(trained)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # For the planner: arrays of a GPU that is not here cannot say themselves that they are in the host's memory.
        state = jax.tree.map(lambda x, away: to_host(x) if away else x, state, layout.on_host)
        grads, divisor, means, loss = totals(state.trained, state.frozen, batch, layout.reference_of(state))
        if config.optimizer.is_offloaded:  # divided with the rest of the update, a piece at a time
            norm = offload.norm(grads) / divisor
        else:
            grads = jax.tree.map(lambda g: g / divisor, grads)
            norm = optax.tree.norm(grads)
        own = {name: means.pop(name).total for name in FACTS}
        guard, good, verdict, updates = state.guard, None, None, state.step
        if guard is not None:
            updates -= guard.skipped  # as the optimizer counts
            good, guard = judge(config.guard, guard, loss / divisor, norm)
            verdict = Verdict(loss / divisor, norm, guard.skipped, guard.in_a_row)
            means = chosen(good, means, jax.tree.map(jnp.zeros_like, means))
        trained, opt_state, param_norm = update(state, grads, divisor, norm, good)
        rate = jnp.asarray(schedule(updates), jnp.float32)
        own |= {"learning_rate": rate, "gradient_norm": norm, "param_norm": param_norm}
        after = replace(state, step=state.step + 1, trained=trained, opt_state=opt_state, guard=guard)
        return after, Metrics(means, own, verdict)

    options = gpu_options(dp=model.mesh.shape["dp"]) if platform in ("gpu", "cuda") else None
    # Unused arguments (optimizers' placeholders) too, so that the planner knows which one is which.
    return jax.jit(
        step, donate_argnums=0, keep_unused=True, out_shardings=(layout.shardings, None), compiler_options=options
    )


def make_eval_step(layout: StateLayout, objective: Objective) -> Callable[[TrainState, Batch], Means]:
    """eval_step(state, batch) -> Means, jitted: add those of several batches, then take the objective's values once.

    With them come those that are pictured. Each batch is a whole step by itself to what stands inside a nonlinearity.
    """

    config, model = layout.config, layout.model

    def eval_step(state: TrainState, batch: Batch) -> Means:
        batch = with_reference(model, objective, layout.reference_of(state), batch)
        stats = model.token_stats(merge(state.trained, state.frozen), batch, objective.head)
        stats = objective.knowing_whole(stats, batch, config)
        pictured = objective.pictured(stats, batch, config) if objective.pictured else {}
        return objective.function(stats, batch, config) | pictured

    return jax.jit(eval_step)
