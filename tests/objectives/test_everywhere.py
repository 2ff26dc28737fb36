"""Every objective on meshes, layouts, strategies and packings: values and gradients of one step, as on one device.

An objective sees the model through its log-probabilities alone: so each way of computing has three programs (those, the
objectives and their gradients towards them, and the model's backward), whatever the number of objectives.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringbpt.config import Config, PolicyConfig, PreferenceConfig
from ringbpt.data.documents import Piece, make_batch
from ringbpt.mesh import make_mesh, put_batch
from ringbpt.model.llama import Model
from ringbpt.objectives import OBJECTIVES
from ringbpt.types import ALWAYS, Batch, TokenStats
from ringbpt.verify import repacked
from tests.flags import llama_flags
from tests.model.helpers import LLAMA

NAMES = tuple(name for name, objective in OBJECTIVES.items() if objective.head == "unembed")
T = 64
# mesh, layout, strategy, packing: each value of each at least once.
WAYS = [
    ((1, 1, 1, 8), "zigzag", "ring", "as given"),
    ((1, 2, 2, 2), "striped", "all_gather", "apart"),
    ((2, 2, 1, 2), "contiguous", "ulysses", "alone"),
]
MORE = [
    ((1, 1, 1, 8), "striped", "ring", "alone"),
    ((1, 1, 1, 8), "contiguous", "all_gather", "as given"),
    ((1, 2, 2, 2), "zigzag", "ulysses", "as given"),
    ((2, 1, 1, 4), "balanced", "ring", "as given"),
    ((1, 2, 2, 2), "contiguous", "ring", "alone"),
    ((2, 2, 1, 2), "zigzag", "ring", "apart"),
    ((2, 2, 1, 2), "striped", "all_gather", "as given"),
]


def unit(number: int, prompt: int, answers: tuple[tuple[int, int], ...], rng: Any) -> list[Piece]:
    """Answers (label, length) to one prompt, sharing all of it but its last token."""
    start, pieces = rng.integers(0, 64, prompt), []
    for at, (label, length) in enumerate(answers):
        token = np.concatenate([start, rng.integers(0, 64, length)])
        values = {
            "token": token,
            "mask": (np.arange(len(token)) >= prompt).astype(np.float32),
            "label": np.full(len(token), label, np.int8),
            "margin": np.full(len(token), 0.5 * number, np.float32),
            "ref_logp": -rng.random(len(token)).astype(np.float32) * 8,
            "advantage": rng.standard_normal(len(token)).astype(np.float32),
            "old_logp": -rng.random(len(token)).astype(np.float32) - 4,
            "rollout_logp": -rng.random(len(token)).astype(np.float32) - 4,
            "reward": np.full(len(token), rng.random(), np.float32),
        }
        shared = prompt - 1 if at else 0
        if at:  # what is shared, both answers have
            for name in ("ref_logp", "advantage", "old_logp", "rollout_logp"):
                values[name][:prompt] = pieces[0].values[name][:prompt]
        pieces.append(
            Piece(len(token) - shared, {name: array[shared:] for name, array in values.items()}, number, shared)
        )
    return pieces


def host_batch() -> Batch:
    """Pairs, and answers with their mismatched ones, in rows of which one is empty; no shard or row is like another."""
    rng = np.random.default_rng(3)
    pair = ((1, 5), (-1, 9))
    rows = [
        [unit(0, 20, pair, rng), unit(1, 3, ((-1, 6), (2, 4)), rng)],
        [unit(2, 7, ((1, 2), (2, 11)), rng), unit(3, 5, pair, rng)],
        [unit(4, 40, ((1, 9), (-1, 3)), rng)],
        [],
    ]
    more = ("unit", "last", "label", "margin", "ref_logp", "advantage", "old_logp", "rollout_logp", "reward")
    columns = (*ALWAYS, *more)
    return make_batch([[piece for each in row for piece in each] for row in rows], (len(rows), T), columns)


def config_of(name: str, mesh: tuple[int, ...], layout: str, strategy: str) -> Config:
    kind = "ring_blockwise" if mesh[3] > 1 else "standard"
    flags = LLAMA | {
        "attention_type": kind, "sequence_layout": layout, "sequence_parallel": strategy, "scan_mlp": False,
        "loss_chunk_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4,
    }  # fmt: skip
    preference = PreferenceConfig(nll_coefficient=0.3, margin_coefficient=0.7)
    policy = PolicyConfig(kl_coefficient=0.1, dual_clip=3.0, correction="answer_truncate")
    groups = {"preference": preference, "policy": policy}
    return Config(objective=name, dtype="fp32", mesh_shape=mesh, **groups, **llama_flags(**flags))


def step_of(mesh, layout, strategy, host: Batch):  # type: ignore[no-untyped-def]
    """{objective: (values, gradients as one vector)} of one step."""
    configs = {name: config_of(name, mesh, layout, strategy) for name in NAMES}
    model = Model.of(configs["sft"], make_mesh(mesh))
    batch = put_batch(host.rows, host.token_BT.shape, model.mesh, layout)
    seen = replace(batch, columns={name: x for name, x in batch.columns.items() if name == "last"})
    params = model.init(jax.random.key(0))
    stats = jax.jit(model.token_stats)(params, seen)

    def all_of_them(stats: TokenStats, batch: Batch) -> Any:
        found = {}
        for name, config in configs.items():
            objective = OBJECTIVES[name]

            def loss(logp_BT, objective=objective, config=config):  # type: ignore[no-untyped-def]
                scales, divisor = objective.scales(objective.weights(batch, config), config)
                known = objective.knowing_whole(replace(stats, logp_BT=logp_BT), batch, config)
                means = objective.function(known, batch, config)
                return sum(scale * means[part].total for part, scale in scales.items()) / divisor, means

            d_logp_BT, means = jax.grad(loss, has_aux=True)(stats.logp_BT)
            found[name] = means, d_logp_BT
        return found

    found = jax.jit(all_of_them)(stats, batch)

    @jax.jit
    def backward(params: Any, batch: Batch, d_logp_BT: Any) -> Any:
        return jax.vjp(lambda p: model.token_stats(p, batch).logp_BT, params)[1](d_logp_BT)[0]

    results = {}
    for name, (means, d_logp_BT) in found.items():
        grads = backward(params, seen, d_logp_BT)
        values = OBJECTIVES[name].values(jax.device_get(means), configs[name])
        results[name] = values, np.concatenate([np.float64(x).ravel() for x in jax.tree.leaves(grads)])
    return results


@cache
def plain() -> Any:
    return step_of((1, 1, 1, 1), "contiguous", "ring", host_batch())


@pytest.mark.parametrize(
    ("mesh", "layout", "strategy", "packing"), [*WAYS, *(pytest.param(*way, marks=pytest.mark.slow) for way in MORE)]
)
def test_the_same_step(mesh, layout, strategy, packing):
    host = host_batch()
    if packing != "as given":
        host = repacked(host, packing, mesh[0] * mesh[1])
    for name, (values, grads) in step_of(mesh, layout, strategy, host).items():
        want_values, want_grads = plain()[name]
        assert values.keys() == want_values.keys(), name
        for key, want in want_values.items():
            assert abs(values[key] - want) <= 1e-5 * max(abs(want), 1.0), (name, key)
        assert np.linalg.norm(grads - want_grads) <= 1e-5 * np.linalg.norm(want_grads), name
        assert np.isfinite(grads).all()


def test_every_part_of_the_losses_is_there():
    """Without it two ways of computing nothing would agree."""
    for name, (values, grads) in plain().items():
        assert np.linalg.norm(grads) > 0 and values["loss"] != 0, name
    assert plain()["dpo"][0]["nll"] > 0 and "kl" in plain()["kto"][0]
    assert float(jnp.float32(plain()["dpo"][0]["rewards/margins"])) != 0
