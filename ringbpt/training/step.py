"""One optimizer step: gradients of totals over micro-batches, divided once by the global weight."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from ringbpt.config import Config
from ringbpt.host_memory import placed_like, to_host
from ringbpt.model.llama import Model
from ringbpt.training import offload
from ringbpt.training.optimizer import clip_factor
from ringbpt.training.state import TrainState, host_leaves, state_shardings
from ringbpt.types import Batch, Mean, Means, Params, PyTree, TokenStats

# So that a GPU's compiler sends the ring's K and V, and the gradients of others, at once, and nothing waits for them.
GPU_OPTIONS = {
    "xla_gpu_enable_latency_hiding_scheduler": True,  # of itself for Hopper only
    "xla_gpu_collective_permute_combine_threshold_bytes": 2**36,
    "xla_gpu_experimental_parallel_collective_overlap_limit": 2,
}

Objective = Callable[[TokenStats, Batch, Config], Means]
Metrics = dict[str, jax.Array]


def batch_facts(batch: Batch, window: int | None = None) -> Means:
    """Counts that the log needs: real tokens, and the (query, key) pairs that the mask lets through."""
    real_BT = batch.segment_BT != 0
    seen_BT = batch.position_BT + 1 if window is None else jnp.minimum(batch.position_BT + 1, window)
    pairs = jnp.sum(jnp.where(real_BT, seen_BT, 0).astype(jnp.float32))
    return {"tokens": Mean(jnp.sum(real_BT.astype(jnp.float32)), jnp.float32(1)), "pairs": Mean(pairs, jnp.float32(1))}


def micro_batches(batch: Batch, count: int) -> Batch:
    """[B, ...] -> [count, B/count, ...]; rows are dealt out in turn, so that no row leaves its device."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1), batch)


def make_totals(config: Config, model: Model, objective: Objective) -> Callable[[Params, Batch], tuple[Params, Means]]:
    """totals(params, batch) -> (gradients of the loss's total, the objective's means), summed over micro-batches and
    shards; to be jitted by the caller. Gradients live where their params do, on the device or in the host's memory.
    """
    count = config.optimizer.accumulate_gradient_steps

    def total_loss(params: Params, batch: Batch) -> tuple[jax.Array, Means]:
        stats = model.token_stats(params, batch)
        means = objective(stats, batch, config) | batch_facts(batch, config.architecture.sliding_window)
        if stats.balance_BT is None:
            return means["loss"].total, means
        # In proportion to the loss's own weight, so that both are divided by it. The shares of the experts are those
        # of a micro-batch: this part of the loss, and only this, depends on how a batch is split.
        balance = Mean(jnp.sum(stats.balance_BT), jnp.sum((batch.segment_BT != 0).astype(jnp.float32)))
        scale = config.architecture.router_aux_loss_coef * means["loss"].weight
        return means["loss"].total + scale * balance.value(), means | {"router_balance": balance}

    def totals(params: Params, batch: Batch) -> tuple[Params, Means]:
        return jax.grad(total_loss, has_aux=True)(params, batch)

    def summed(params: Params, batch: Batch) -> tuple[Params, Means]:
        if count == 1:
            return totals(params, batch)

        def add(sums, micro):
            grads, means = totals(params, micro)
            return (offload.add(sums[0], grads), jax.tree.map(jnp.add, sums[1], means)), None

        micros = micro_batches(batch, count)
        shapes = jax.eval_shape(totals, params, jax.tree.map(lambda x: x[0], micros))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        zeros = jax.lax.with_sharding_constraint(zeros[0], model.shardings), zeros[1]
        zeros = jax.tree.map(placed_like, zeros[0], params), zeros[1]
        return jax.lax.scan(add, zeros, micros)[0]

    return summed


def make_gradients(
    config: Config, model: Model, objective: Objective
) -> Callable[[Params, Batch], tuple[Params, Means]]:
    """gradients(params, batch) -> (gradients of the mean loss, the objective's means); to be jitted by the caller.

    The loss is a total over a total weight; both are summed over micro-batches and shards before the one division,
    so accumulation, packing and the mesh don't change the numbers. Without any weight the gradients are zero. Params
    are on the device.
    """
    totals = make_totals(config, model, objective)

    def gradients(params: Params, batch: Batch) -> tuple[Params, Means]:
        grads, means = totals(params, batch)
        return jax.tree.map(lambda g: g / _divisor(means), grads), means

    return gradients


def _divisor(means: Means) -> jax.Array:
    weight = means["loss"].weight
    return jnp.where(weight == 0, 1.0, weight)


def make_train_step(
    config: Config,
    model: Model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """step(state, batch) -> (state, metrics), jitted; the old state is donated.

    A batch without any weight changes nothing but what the optimizer does on a zero gradient.
    """
    totals = make_totals(config, model, objective)
    shardings, offloaded = state_shardings(config, model, optimizer), host_leaves(config, model, optimizer)
    by_layer = config.architecture.param_scan_axis == 0 and config.optimizer.is_layerwise

    def update(grads: Params, state: TrainState, divisor: jax.Array) -> tuple[Params, PyTree, dict[str, jax.Array]]:
        """(params, opt_state, {the norms of the gradients and of the params})."""
        if config.optimizer.offload_params or config.optimizer.offload_state:
            norm = offload.norm(grads) / divisor
            factor = clip_factor(config.optimizer, norm) / divisor
            params, opt_state, param_norm = offload.update(
                optimizer, grads, state.opt_state, state.params, factor, by_layer
            )
            return params, opt_state, {"gradient_norm": norm, "param_norm": param_norm}
        grads = jax.tree.map(lambda g: g / divisor, grads)
        norm = optax.tree.norm(grads)
        factor = clip_factor(config.optimizer, norm)
        updates, opt_state = optimizer.update(jax.tree.map(lambda g: factor * g, grads), state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return params, opt_state, {"gradient_norm": norm, "param_norm": optax.tree.norm(params)}

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # For the planner: arrays of a GPU that is not here cannot say themselves that they are in the host's memory.
        state = jax.tree.map(lambda x, away: to_host(x) if away else x, state, offloaded)
        grads, means = totals(state.params, batch)
        params, opt_state, norms = update(grads, state, _divisor(means))
        metrics = {name: mean.value() for name, mean in means.items() if name not in ("tokens", "pairs")}
        metrics |= {name: means[name].total for name in ("tokens", "pairs")}
        metrics |= {"learning_rate": jnp.asarray(schedule(state.step), jnp.float32), **norms}
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    options = GPU_OPTIONS if model.mesh.devices.flat[0].platform in ("gpu", "cuda") else None
    # Unused arguments (optimizers' placeholders) too, so that the planner knows which one is which.
    return jax.jit(step, donate_argnums=0, keep_unused=True, out_shardings=(shardings, None), compiler_options=options)


def make_eval_step(config: Config, model: Model, objective: Objective) -> Callable[[Params, Batch], Means]:
    """eval_step(params, batch) -> Means, jitted: add those of several batches, then take their value once."""
    return jax.jit(lambda params, batch: objective(model.token_stats(params, batch), batch, config))
