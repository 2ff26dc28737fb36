"""What every objective promises, and that a step cut into micro-batches is the step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringbpt.config import Architecture, Config, OptimizerConfig
from ringbpt.mesh import make_mesh, put_batch
from ringbpt.model.llama import Model
from ringbpt.objectives import OBJECTIVES, Objective, balance, objective_of
from ringbpt.training.step import make_gradients
from ringbpt.types import Batch, Mean, TokenStats
from tests.flags import llama_flags
from tests.model.helpers import LLAMA

FROM_ROLLOUTS = ("advantage", "reward", "rollout_logp", "old_value", "return")
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.3}


def stats_of(shape_BT, experts=0, seed=0) -> TokenStats:
    rng = np.random.default_rng(seed)
    logp, entropy = -rng.random((2, *shape_BT)).astype(np.float32)
    chosen, router = rng.random((2, *shape_BT, experts)).astype(np.float32)
    return TokenStats(logp, -entropy, (logp > -0.5).astype(np.float32), chosen, router, value_BT=logp)


def batch_of(real, weighted, length=32, **columns) -> Batch:
    """Rows of one document each, of which the first places take loss."""
    place = np.arange(length, dtype=np.int32)[None]
    segment = (place < np.array(real)[:, None]).astype(np.int32)
    weight = (place < np.array(weighted)[:, None]).astype(np.float32)
    token = np.random.default_rng(1).integers(1, 64, segment.shape).astype(np.int32) * segment
    return Batch(token, np.roll(token, -1, 1), weight, np.where(segment, place, 0), segment, columns)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("experts", [0, 4])
def test_weights_depend_on_the_batch_alone_and_parts_are_means(name, experts):
    config = Config(objective=name, architecture=Architecture(num_experts=experts, router_aux_loss_coef=0.1))
    # Two units a row, and in each an answer of every label.
    label = np.array([1, 1, -1, -1, 2, 2, 1, -1] * 4, np.int8)
    columns = {"label": np.stack([label, label[::-1]]), "unit": np.repeat([[1] * 12 + [2] * 20], 2, 0)}
    rng = np.random.default_rng(2)
    columns |= {name: rng.random((2, 32)).astype(np.float32) for name in FROM_ROLLOUTS}
    objective, batch = objective_of(config), batch_of([32, 9], [20, 3], **columns)
    weights = {name: float(weight) for name, weight in objective.weights(batch, config).items()}
    assert all(np.isfinite(weight) for weight in weights.values()), weights
    stats = stats_of((2, 32), experts)
    means = objective.function(stats, batch, config)
    assert weights == pytest.approx({name: float(means[name].weight) for name in objective.parts(config)})
    assert set(objective.needs) <= {name for name in vars(stats) if getattr(stats, name) is not None}


# --- a loss of three parts, each with a denominator of its own, one of them not linear in a mean of the step ---


def toy(stats, batch, config):
    marked = batch.columns["marked"]
    bent = jax.nn.sigmoid(stats.whole["logp"]) * jnp.sum(stats.entropy_BT * batch.weight_BT)
    return {
        "nll": Mean(-jnp.sum(stats.logp_BT * batch.weight_BT), jnp.sum(batch.weight_BT)),
        "marks": Mean(jnp.sum(jnp.tanh(stats.logp_BT) * marked), jnp.sum(marked)),
        "bent": Mean(bent, jnp.sum(batch.weight_BT)),
    }


def mean_logp(stats, batch, config):
    return {"logp": Mean(jnp.sum(stats.logp_BT * batch.weight_BT), jnp.sum(batch.weight_BT))}


TOY = Objective(toy, lambda config: {"nll": 1.0, "marks": -0.5, "bent": 0.2}, (), whole=mean_logp, columns=("marked",))


def step_of(count: int, host: Batch):
    """({name: value}, gradients) of the toy's loss and the routers' balance, in so many micro-batches."""
    config = Config(
        dtype="fp32", optimizer=OptimizerConfig(accumulate_gradient_steps=count), **llama_flags(**LLAMA | EXPERTS)
    )
    model = Model.of(config, make_mesh((1, 1, 1, 1)))
    rows = lambda a, b: jax.tree.map(lambda x: x[a:b], host)
    batch = put_batch(rows, host.token_BT.shape, model.mesh, "contiguous")
    objective = balance.added_to(TOY, config)
    grads, means = jax.jit(make_gradients(config, model, objective))(model.init(jax.random.key(0)), batch)
    return objective.values(jax.device_get(means), config), jax.tree.map(np.asarray, grads)


def test_micro_batches_change_nothing():
    """0, 1, 3 and 7 marks a micro-batch; 32, 3, 30 and 4 tokens, of which 30, 0, 3 and 2 take loss."""
    place = np.arange(32)[None]
    marked = ((place % 4 == 0) & (place < 4 * np.array([0, 1, 3, 7])[:, None])).astype(np.float32)
    host = batch_of([32, 3, 30, 4], [30, 0, 3, 2], marked=marked)
    (whole, want), (cut, got) = step_of(1, host), step_of(4, host)
    parts = {"nll": 1.0, "marks": -0.5, "bent": 0.2, "router_balance": EXPERTS["router_aux_loss_coef"]}
    assert whole["loss"] == pytest.approx(sum(scale * whole[name] for name, scale in parts.items()), rel=1e-6)
    rounding = 4e-6  # of float32: a micro-batch's products are summed in another order
    assert cut == pytest.approx(whole, rel=rounding)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(a - b) <= rounding * np.linalg.norm(b), jax.tree_util.keystr(path)
    assert np.abs(want["layers"]["w_router"]).max() > 0


def test_scales_are_the_coefficients_over_the_weights_and_nothing_is_divided_by_zero():
    weights = {"nll": jnp.float32(40), "marks": jnp.float32(8), "bent": jnp.float32(0)}
    scales, divisor = TOY.scales(weights, Config())
    assert (float(divisor), {name: float(scale) for name, scale in scales.items()}) == (
        40, {"nll": 1.0, "marks": -2.5, "bent": 0.0},
    )  # fmt: skip
    scales, divisor = TOY.scales({**weights, "nll": jnp.float32(0)}, Config())
    assert (float(divisor), float(scales["nll"]), float(scales["marks"])) == (1.0, 0.0, -0.0625)


# --- the balance of the experts' loads ---


def test_balance_is_its_formula_over_real_tokens():
    """E sum_e f_e P_e; the experts a token where probabilities and loads are even."""
    config = Config(architecture=Architecture(num_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.1))
    batch, stats = batch_of([5, 3], [0, 0], length=5), stats_of((2, 5), 4)
    real = batch.segment_BT != 0
    want = 4 * np.sum(stats.chosen_BTE[real].mean(0) * stats.router_BTE[real].mean(0))
    got = balance.router_balance(stats, batch, config)
    assert (float(got.value()), float(got.weight)) == (pytest.approx(want, rel=1e-6), 8)
    even = TokenStats(chosen_BTE=jnp.full((2, 5, 4), 0.5), router_BTE=jnp.full((2, 5, 4), 0.25))
    assert float(balance.router_balance(even, batch, config).value()) == pytest.approx(2.0)


def test_a_balance_without_a_coefficient_is_no_part_and_costs_no_pass():
    config = Config(architecture=Architecture(num_experts=4))
    objective = objective_of(config)
    assert objective.parts(config) == {"loss": 1.0} and objective.whole is None
    assert "router_balance" in objective.function(stats_of((2, 32), 4), batch_of([32, 9], [20, 3]), config)
