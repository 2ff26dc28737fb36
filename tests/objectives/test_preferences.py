"""Losses of preferences: what TRL makes of them, the values they begin with, micro-batches, and shared prompts.

The values of golden/preferences.json are TRL's own, by tests/golden/make_preferences.py.
"""

import json
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ringbpt.config import Config, OptimizerConfig, PreferenceConfig
from ringbpt.data.documents import Piece, make_batch
from ringbpt.mesh import make_mesh, put_batch
from ringbpt.model.llama import Model
from ringbpt.objectives import OBJECTIVES, objective_of
from ringbpt.objectives.policy import ALGORITHMS
from ringbpt.training.step import make_gradients, with_reference
from ringbpt.types import ALWAYS, Batch, TokenStats
from tests.flags import llama_flags
from tests.golden import make_preferences as trl
from tests.model.test_oracle import llama_flags as oracle_flags
from tests.model.test_oracle import our_params

GOLDEN = json.loads(trl.FILE.read_text())
COLUMNS = (*ALWAYS, "unit", "label")
# Names of the file that are an objective of ours with further flags.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo_nll": ("dpo", {"nll_coefficient": 0.5}),
    "ipo_sum": ("ipo", {"ipo_sum": True}),
}


def config_of(name: str, mesh_shape=(1, 1, 1, 1), accumulate=1, **execution) -> Config:
    objective, more = OTHERS.get(name, (name, {}))
    if name in ("kto", "apo_zero_unpaired"):
        more = {"desirable_weight": 1.5}
    plain = {"attention_type": "standard", "sequence_layout": "contiguous", "scan_layers": False}
    if mesh_shape[3] > 1:
        plain |= {"attention_type": "ring_standard"}
    return Config(
        objective=objective,
        dtype="fp32",
        mesh_shape=mesh_shape,
        preference=PreferenceConfig(beta=trl.BETA, simpo_gamma=trl.GAMMA, **more),
        optimizer=OptimizerConfig(accumulate_gradient_steps=accumulate),
        **llama_flags(**(oracle_flags(trl.CASE) | plain | execution)),
    )


def piece(prompt: list[int], answer: list[int], label: int, unit: int) -> Piece:
    token = np.array(prompt + answer, np.int32)
    mask = np.array([0] * len(prompt) + [1] * len(answer), np.float32)
    return Piece(len(token), {"token": token, "mask": mask, "label": np.full(len(token), label, np.int8)}, unit)


def units_of(name: str) -> list[list[Piece]]:
    """What TRL was given, as packing units."""
    if name in ("kto", "apo_zero_unpaired"):
        rows = [(number, row, 1 if row["label"] else -1) for number, row in enumerate(trl.answers())]
        own = [piece(row["prompt_ids"], row["completion_ids"], label, number) for number, row, label in rows]
        other = [piece(row["prompt_ids"], row["KL_completion_ids"], 2, number) for number, row, _ in rows]
        return [list(two) for two in zip(own, other, strict=True)] if name == "kto" else [[one] for one in own]
    pairs = [
        [piece(p["prompt_ids"], p[f"{which}_ids"], label, number) for which, label in (("chosen", 1), ("rejected", -1))]
        for number, p in enumerate(trl.pairs())
    ]
    return [pair[:1] for pair in pairs] if name == "sft" else pairs


def host_batch(units: list[list[Piece]], rows: list[list[int]], length: int) -> Batch:
    return make_batch([[p for unit in row for p in units[unit]] for row in rows], (len(rows), length), COLUMNS)


def weights_of(name: str) -> tuple[dict, dict]:
    """The policy's and the reference's."""
    params = [our_params(trl.CASE), our_params(trl.CASE, trl.reference_weights())]
    if name in ("kto", "apo_zero_unpaired"):
        params = params[::-1]
    return params[0], params[1]


def numbers(name: str, host: Batch, mesh_shape=(1, 1, 1, 1), accumulate=1):
    """(values, gradients) of one step on the mesh, with the reference's column, by the train step's own program."""
    config = config_of(name, mesh_shape, accumulate)
    model, objective = Model.of(config, make_mesh(mesh_shape)), objective_of(config)
    batch = put_batch(host.rows, host.token_BT.shape, model.mesh, config.execution.sequence_layout)
    policy, other = (jax.device_put(params, model.shardings) for params in weights_of(name))
    gradients = make_gradients(config, model, objective)
    other = other if objective.reference else None
    step = jax.jit(lambda policy, other, b: gradients(policy, with_reference(model, objective, other, b)))
    grads, means = step(policy, other, batch)
    return objective.values(jax.device_get(means), config), jax.tree.map(np.asarray, grads)


def four_rows(name: str) -> Batch:
    """The units dealt out to four rows, unlike as they can be."""
    units = units_of(name)
    rows = [[0, 1], [2], [], [3]] if len(units) == 4 else [[0, 1, 2], [3, 4], [], [5, 6, 7]]
    return host_batch(units, rows, 128)


@cache
def shared_programs() -> Any:
    """The model forward, and backward from a gradient towards its log-probabilities: one program for all objectives."""
    model = Model.of(config_of("dpo"), make_mesh((1, 1, 1, 1)))
    forward = jax.jit(model.token_stats)

    def logp(params: Any, batch: Batch) -> Any:
        return model.token_stats(params, batch).logp_BT

    backward = jax.jit(lambda params, batch, d_logp: jax.vjp(lambda p: logp(p, batch), params)[1](d_logp)[0])
    return forward, backward


def step_of(name: str, policy: Any, batch: Batch) -> tuple[dict[str, float], Any]:
    """(values, gradients) of a step by `shared_programs`, whatever the objective makes of the log-probabilities."""
    config = config_of(name)
    objective, (forward, backward) = objective_of(config), shared_programs()
    stats = forward(policy, replace(batch, columns={}))
    scales, divisor = objective.scales(objective.weights(batch, config), config)

    def loss(logp_BT: Any) -> Any:
        known = objective.knowing_whole(replace(stats, logp_BT=logp_BT), batch, config)
        means = objective.function(known, batch, config)
        return sum(scale * means[part].total for part, scale in scales.items()) / divisor, means

    d_logp_BT, means = jax.grad(loss, has_aux=True)(stats.logp_BT)
    values = objective.values(jax.device_get(means), config)
    return values, backward(policy, replace(batch, columns={}), d_logp_BT)


def with_columns(name: str) -> tuple[Any, Batch]:
    """(the policy, a batch with the reference's column)."""
    policy, other = weights_of(name)
    host = jax.tree.map(jnp.asarray, four_rows(name))
    if not OBJECTIVES[OTHERS.get(name, (name,))[0]].reference:
        return policy, host
    logp_BT = shared_programs()[0](other, replace(host, columns={})).logp_BT
    return policy, replace(host, columns=host.columns | {"ref_logp": logp_BT})


@pytest.mark.parametrize("name", trl.NAMES)
def test_the_same_as_trl(name):
    golden, (policy, batch) = GOLDEN[name], with_columns(name)
    optimizer = optax.adamw(trl.RATE, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    update = jax.jit(optimizer.update)
    state, losses = optimizer.init(policy), []
    for step in range(trl.STEPS + 1):
        values, grads = step_of(name, policy, batch)
        losses.append(values["loss"])
        if step == 0:
            norm = float(np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in jax.tree.leaves(grads))))
            assert norm == pytest.approx(golden["gradient_norm"], rel=1e-4)
            same_metrics(name, values, golden["metrics"])
        updates, state = update(grads, state, policy)
        policy = optax.apply_updates(policy, updates)
    assert losses[0] == pytest.approx(golden["losses"][0], rel=1e-5)
    assert losses == pytest.approx(golden["losses"], rel=1e-4, abs=1e-4)


def same_metrics(name: str, values: dict[str, float], golden: dict[str, float]) -> None:
    for key, value in golden.items():
        ours = {"nll_loss": "nll"}.get(key, key)
        if (ours, name) in (("nll", "simpo"), ("kl", "apo_zero_unpaired")):
            continue  # TRL says 0 where it computes none
        found = values["rewards/chosen"] - values["rewards/rejected"] if ours == "rewards/margins" else values[ours]
        assert found == pytest.approx(value, rel=1e-4, abs=1e-5), key


@pytest.mark.slow
def test_the_file_is_what_trl_makes():
    pytest.importorskip("trl.trainer", reason="the extra `oracle` has TRL")
    pytest.importorskip("torch", reason="the extra `oracle` has torch")
    for name in trl.NAMES:
        found = trl.golden(name)
        assert found["losses"] == pytest.approx(GOLDEN[name]["losses"], rel=1e-5), name


# policy = reference, beta 0.1: constants that the formulas say.
FIRST = {
    "dpo": 0.693147, "cdpo": 0.693147, "robust": 0.693147, "ipo": 25.0, "hinge": 1.0, "exo": 0.510826, "apo_zero": 1.0,
    "apo_down": 1.0, "bco": 1.386294, "nca": 1.386294, "sppo": 50.0, "discopop": 0.846574, "sigmoid_norm": 0.693147,
    "kto": 0.5, "apo_zero_unpaired": 0.5, "ipo_sum": 25.0,
}  # fmt: skip


@pytest.mark.parametrize("name", FIRST)
def test_the_loss_where_the_policy_is_the_reference(name):
    host = four_rows(name)
    rng = np.random.default_rng(0)
    logp = -rng.random(host.token_BT.shape).astype(np.float32) * 5
    config = replace(config_of(name), preference=replace(config_of(name).preference, desirable_weight=1.0))
    objective = objective_of(config)
    batch = replace(host, columns=host.columns | {"ref_logp": logp})
    stats = objective.knowing_whole(TokenStats(logp_BT=jnp.asarray(logp)), batch, config)
    loss = objective.values(jax.device_get(objective.function(stats, batch, config)), config)["loss"]
    assert loss == pytest.approx(FIRST[name], abs=1e-6)


@pytest.mark.parametrize("name", ["dpo_nll", "orpo", "kto"])
def test_micro_batches_of_0_1_3_and_many_units_are_the_step(name):
    """Rows are dealt out in turn: with four micro-batches each is a row."""
    units = units_of(name)
    units = [
        [p._replace(unit=3 * number + part) for p in unit] for part in range(3) for number, unit in enumerate(units)
    ]
    rows = [[0], [], [1, 2, 3], [4, 5, 6, 7, 8, 9, 10]]
    host = host_batch(units, rows, 256)
    want, want_grads = numbers(name, host)
    got, got_grads = numbers(name, host, accumulate=4)
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key] == pytest.approx(value, rel=1e-6, abs=1e-6), key
    close(got_grads, want_grads, 1e-6)


def close(got, want, tolerance):  # type: ignore[no-untyped-def]
    a, b = (np.concatenate([np.float64(x).ravel() for x in jax.tree.leaves(tree)]) for tree in (got, want))
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def test_every_objective_is_compared_with_somebody():
    named = {OTHERS.get(name, (name,))[0] for name in trl.NAMES} | {"pretrain"}  # which is sft of another shape
    named |= {"reward"}  # by test_reward.py
    named |= set(ALGORITHMS)  # by test_policy.py
    assert named == set(OBJECTIVES)
