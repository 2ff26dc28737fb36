"""Each optimizer against its formula, the schedules at their corners, and the state's place on the mesh."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ringbpt.config import AdamWConfig, Config, LionConfig, MuonConfig, OptimizerConfig, PalmConfig, complete_rates
from ringbpt.training.optimizer import clip_factor, make_optimizer, state_specs

L, D, N, H, F, V = 2, 8, 2, 4, 16, 32
SHAPES = {
    "embed": (V, D),
    "layers": {
        "attention_norm": (L, D),
        "feedforward_norm": (L, D),
        "w_down": (L, F, D),
        "w_gate": (L, D, F),
        "w_o": (L, N, H, D),
        "w_q": (L, D, N, H),
    },
    "norm": (D,),
}
# A constant rate of 0.01.
FLAT = {"init_lr": 0.01, "lr": 0.01, "end_lr": 0.01, "lr_warmup_steps": 1, "lr_decay_steps": 10}


def tree(seed: int):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def first_step(config: OptimizerConfig, params, grads, **kwargs):
    """(updates, state after) of the first step, clipped as the train step does it."""
    optimizer, _ = make_optimizer(config, **kwargs)
    factor = clip_factor(config, optax.tree.norm(grads))
    grads = jax.tree.map(lambda g: factor * g, grads)
    return jax.jit(optimizer.update)(grads, optimizer.init(params), params)


def usual(kind: str) -> OptimizerConfig:
    return complete_rates(Config(optimizer=OptimizerConfig(type=kind)))


def adamw(**fields) -> OptimizerConfig:
    return OptimizerConfig(type="adamw", adamw_optimizer=AdamWConfig(**{**FLAT, **fields}))


def norm_of(grads) -> float:
    return float(jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))))


def test_adamw_first_step_is_the_sign_and_decays_all_but_the_norms():
    params, grads = tree(0), tree(1)
    updates, _ = first_step(adamw(weight_decay=0.5), params, grads)
    w, g, u = (t["layers"]["w_q"] for t in (params, grads, updates))
    np.testing.assert_allclose(u, -0.01 * (jnp.sign(g) + 0.5 * w), atol=1e-6)
    np.testing.assert_allclose(updates["norm"], -0.01 * jnp.sign(grads["norm"]), atol=1e-6)
    u, g = updates["layers"]["attention_norm"], grads["layers"]["attention_norm"]
    np.testing.assert_allclose(u, -0.01 * jnp.sign(g), atol=1e-6)


def test_multiply_by_parameter_scale_steps_in_units_of_each_weights_rms():
    params, grads = tree(0), tree(1)
    updates, _ = first_step(adamw(weight_decay=0.5, multiply_by_parameter_scale=True, b1=0.9), params, grads)
    w, g = params["embed"], grads["embed"]
    rms = jnp.sqrt(jnp.mean(w**2))
    np.testing.assert_allclose(updates["embed"], -(0.1 * 0.01 * rms * jnp.sign(g) + 0.01 * 0.5 * w), atol=1e-6)


def test_palm_first_step_and_its_weight_decay():
    params, grads = tree(0), tree(1)
    config = OptimizerConfig(type="palm", palm_optimizer=PalmConfig(lr=0.02, lr_warmup_steps=400, weight_decay=3e-4))
    rate = 2 / 20  # (lr / 0.01) / sqrt(400)
    _, schedule = make_optimizer(config)
    assert float(schedule(0)) == pytest.approx(rate)
    assert float(schedule(40_000)) == pytest.approx(2 / 200)
    updates, _ = first_step(config, params, grads)
    w, g = params["embed"], grads["embed"]
    expected = -(0.1 * rate * jnp.sqrt(jnp.mean(w**2)) * jnp.sign(g) + 3 * rate**2 * w)
    np.testing.assert_allclose(updates["embed"], expected, rtol=1e-5, atol=1e-6)
    w, g = params["norm"], grads["norm"]
    np.testing.assert_allclose(
        updates["norm"], -0.1 * rate * jnp.sqrt(jnp.mean(w**2)) * jnp.sign(g), rtol=1e-5, atol=1e-6
    )


def test_lion_first_step_is_the_sign():
    params, grads = tree(0), tree(1)
    lion = LionConfig(**{**FLAT, "weight_decay": 0.5})
    updates, _ = first_step(OptimizerConfig(type="lion", lion_optimizer=lion), params, grads)
    np.testing.assert_allclose(updates["embed"], -0.01 * (jnp.sign(grads["embed"]) + 0.5 * params["embed"]), atol=1e-6)
    np.testing.assert_allclose(updates["norm"], -0.01 * jnp.sign(grads["norm"]), atol=1e-6)


MUON = OptimizerConfig(type="muon", muon_optimizer=MuonConfig(**FLAT, adam_lr=0.002))


def test_muon_orthogonalises_each_layers_matrix_and_leaves_the_rest_to_adam():
    params, grads = tree(0), tree(1)
    updates, _ = first_step(MUON, params, grads)
    layers = updates["layers"]
    matrices = {"w_q": (D, N * H), "w_o": (N * H, D), "w_gate": (D, F), "w_down": (F, D)}
    for name, (fan_in, fan_out) in matrices.items():
        scale = 0.01 * max(1, fan_out / fan_in) ** 0.5
        for layer in range(L):
            update, grad = (
                np.asarray(t[layer]).reshape(fan_in, fan_out) for t in (layers[name], grads["layers"][name])
            )
            singular = np.linalg.svd(update / scale, compute_uv=False)
            assert singular.min() > 0.4 and singular.max() < 1.4, (name, singular)
            u, _, v = np.linalg.svd(grad, full_matrices=False)  # the nearest orthogonal matrix to the gradient
            assert np.vdot(update / scale, u @ v) < -0.6 * min(fan_in, fan_out), name
    rate = 0.002 * (1 + 0.9 * 0.1 / (1 - 0.9**2))  # optax gives muon's adam Nesterov momentum too
    np.testing.assert_allclose(updates["embed"], -rate * jnp.sign(grads["embed"]), atol=1e-5)
    np.testing.assert_allclose(layers["attention_norm"], -rate * jnp.sign(grads["layers"]["attention_norm"]), atol=1e-5)


def test_muon_does_not_care_which_axis_the_layers_are_stacked_on():
    params, grads = ({"layers": {name: t["layers"][name] for name in ("w_q", "w_o")}} for t in (tree(0), tree(1)))
    moved = [t | {"layers": jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), t["layers"])} for t in (params, grads)]
    expected, _ = first_step(MUON, params, grads)
    got, _ = first_step(MUON, *moved, layer_axis=1)
    for name, update in expected["layers"].items():
        np.testing.assert_allclose(jnp.moveaxis(got["layers"][name], 1, 0), update, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("clip, kept", [(0.5, 0.5), (0.0, None), (1e9, None)])
def test_gradients_are_clipped_by_their_global_norm(clip, kept):
    params, grads = tree(0), tree(1)
    _, state = first_step(adamw(clip_gradient=clip, b1=0.75), params, grads)
    [momentum] = [leaf for leaf in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(leaf, "mu")]
    assert norm_of(momentum.mu) == pytest.approx(0.25 * (kept or norm_of(grads)), rel=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        adamw(bf16_momentum=True),
        adamw(bf16_momentum=True, multiply_by_parameter_scale=True),
        OptimizerConfig(type="palm", palm_optimizer=PalmConfig(lr=0.01, bf16_momentum=True)),
        OptimizerConfig(type="lion", lion_optimizer=LionConfig(**FLAT, bf16_momentum=True)),
    ],
    ids=lambda c: c.type,
)
def test_bf16_momentum_is_kept_in_bf16_and_nothing_else_is(config):
    params = jax.eval_shape(lambda: tree(0))
    state = jax.eval_shape(make_optimizer(config)[0].init, params)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.shape == (V, D)]
    assert dtypes.count(jnp.bfloat16) == 1
    assert len(dtypes) == (1 if config.type == "lion" else 2)


@pytest.mark.parametrize(
    "schedule, corners",
    [
        ("warmup_cosine", {0: 0.1, 5: 0.55, 10: 1.0, 60: 0.6, 110: 0.2, 500: 0.2}),
        ("warmup_linear", {0: 0.1, 5: 0.55, 10: 1.0, 60: 0.6, 110: 0.2, 500: 0.2}),
        ("wsd", {0: 0.1, 5: 0.55, 10: 1.0, 88: 1.0, 99: 0.6, 110: 0.2, 500: 0.2}),  # 20 % of 110 steps: from 88
    ],
)
def test_schedules_at_their_corners(schedule, corners):
    group = AdamWConfig(init_lr=0.1, lr=1.0, end_lr=0.2, lr_warmup_steps=10, lr_decay_steps=110)
    config = OptimizerConfig(schedule=schedule, wsd_decay_fraction=0.2, adamw_optimizer=group)
    _, rate = make_optimizer(config)
    assert {step: float(rate(step)) for step in corners} == pytest.approx(corners, abs=1e-6)


def test_wsd_never_decays_before_the_warmup_has_ended():
    group = AdamWConfig(init_lr=0.0, lr=1.0, end_lr=0.0, lr_warmup_steps=50, lr_decay_steps=100)
    _, rate = make_optimizer(OptimizerConfig(schedule="wsd", wsd_decay_fraction=0.9, adamw_optimizer=group))
    assert [float(rate(step)) for step in (25, 50, 75, 100)] == pytest.approx([0.5, 1.0, 0.5, 0.0], abs=1e-6)


@pytest.mark.parametrize("kind, copies", [("adamw", 2), ("adafactor", 2), ("palm", 2), ("lion", 1), ("muon", None)])
def test_state_that_mirrors_a_parameter_is_sharded_like_it(kind, copies):
    config = adamw(multiply_by_parameter_scale=True) if kind == "adafactor" else usual(kind)
    optimizer, _ = make_optimizer(replace(config, accumulate_gradient_steps=1))
    mesh = jax.make_mesh((2, 4), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    params = tree(0)
    abstract = jax.eval_shape(lambda: params)
    param_specs = jax.tree.map(lambda x: P() if x.ndim == 1 else P(*[None] * (x.ndim - 1), "tp"), abstract)
    specs = state_specs(optimizer, abstract, param_specs)
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
    state = jax.jit(optimizer.init, out_shardings=shardings)(params)  # fails where the structures differ
    for leaf in jax.tree.leaves(state):
        mirrors = leaf.ndim > 1
        assert leaf.sharding.is_fully_replicated != mirrors, leaf.shape
    matrices = sum(x.ndim > 1 for x in jax.tree.leaves(abstract))
    expected = 4 * 1 + 3 * 2 if kind == "muon" else copies * matrices  # muon: 4 matrices, adam on embed and 2 norms
    assert sum(spec != P() for spec in jax.tree.leaves(specs)) == expected


def test_adamw_and_palm_go_downhill():
    target = tree(2)

    def loss(params):
        return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), params, target)))

    for config in (adamw(), OptimizerConfig(type="palm", palm_optimizer=PalmConfig(lr=0.1, lr_warmup_steps=100))):
        optimizer, _ = make_optimizer(config)
        step = jax.jit(lambda params, state, update=optimizer.update: update(jax.grad(loss)(params), state, params))
        params = tree(0)
        state, before = optimizer.init(params), loss(params)
        for _ in range(30):
            updates, state = step(params, state)
            params = jax.tree.map(jnp.add, params, updates)
        assert loss(params) < 0.9 * before, config.type
