"""Reward models: TRL's losses, transformers' scores, any mesh and packing, and a head that follows from the objective.

The values of golden/rewards.json are TRL's and transformers' own, by tests/golden/make_rewards.py.
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

from ringbpt.config import Config, LoraConfig, OptimizerConfig, PreferenceConfig, UserError, parse, parse_args
from ringbpt.config.fields import SCORING
from ringbpt.data.documents import Piece, make_batch
from ringbpt.evaluation.pairs import draw_probabilities, reliability
from ringbpt.mesh import make_mesh, put_batch
from ringbpt.model.llama import Model
from ringbpt.objectives import OBJECTIVES, objective_of
from ringbpt.training.state import StateLayout
from ringbpt.training.step import make_eval_step, make_gradients
from ringbpt.types import ALWAYS, Batch, TokenStats
from ringbpt.verify import GROUPS, repacked, step_numbers
from tests.flags import llama_flags
from tests.golden import make_preferences as pairs_of
from tests.golden import make_rewards as trl
from tests.model.test_oracle import llama_flags as oracle_flags
from tests.model.test_oracle import our_params
from tests.objectives.test_preferences import close

GOLDEN = json.loads(trl.FILE.read_text())
REWARD = OBJECTIVES["reward"]
COLUMNS = (*ALWAYS, "unit", "label", "margin", "last")
OPTIONS: dict[str, dict[str, Any]] = {"reward_center": {"center_coefficient": trl.CENTER}}


def config_of(mesh_shape=(1, 1, 1, 1), preference: PreferenceConfig | None = None, accumulate=1, **execution) -> Config:
    plain = {"attention_type": "ring_standard" if mesh_shape[3] > 1 else "standard", "sequence_layout": "contiguous"}
    return Config(
        objective="reward",
        dtype="fp32",
        mesh_shape=mesh_shape,
        preference=preference or PreferenceConfig(),
        optimizer=OptimizerConfig(accumulate_gradient_steps=accumulate),
        **llama_flags(**(oracle_flags(pairs_of.CASE) | {"head": "score"} | plain | execution)),
    )


def params_of() -> dict:
    params = our_params(pairs_of.CASE, trl.score_weights() | {"lm_head.weight": np.zeros((1, 1), np.float32)})
    del params["unembed"]
    return params | {"score": trl.score_weights()["score.weight"][0]}


def unit(number: int, shared: bool) -> list[Piece]:
    """A pair of the golden file; shared: the second answer stands without the beginning that both have."""
    pair, margin = pairs_of.pairs()[number], trl.MARGINS[number]
    found = []
    for which, label in (("chosen", 1), ("rejected", -1)):
        token = np.array(pair["prompt_ids"] + pair[f"{which}_ids"], np.int32)
        before = len(pair["prompt_ids"]) - 1 if shared and label < 0 else 0
        values = {
            "token": token,
            "mask": (np.arange(len(token)) >= len(pair["prompt_ids"])).astype(np.float32),
            "label": np.full(len(token), label, np.int8),
            "margin": np.full(len(token), margin, np.float32),
        }
        found.append(Piece(len(token) - before, {name: x[before:] for name, x in values.items()}, number, before))
    return found


def host_batch(shared: bool = True, margins: bool = True) -> Batch:
    rows = [[unit(0, shared), unit(1, shared)], [unit(2, shared)], [], [unit(3, shared)]]
    columns = [name for name in COLUMNS if margins or name != "margin"]
    return make_batch([[piece for each in row for piece in each] for row in rows], (4, 64), columns)


def step_of(config: Config, host: Batch, params: Any = None) -> tuple[dict[str, float], Any]:
    """(values, gradients) of one step, by the train step's own program."""
    model, objective = Model.of(config, make_mesh(config.mesh_shape)), objective_of(config)
    batch = put_batch(host.rows, host.token_BT.shape, model.mesh, config.execution.sequence_layout)
    params = jax.device_put(params_of() if params is None else params, model.shardings)
    grads, means = jax.jit(make_gradients(config, model, objective))(params, batch)
    return objective.values(jax.device_get(means), config), jax.tree.map(np.asarray, grads)


@cache
def programs() -> Any:
    """Scores of a batch, and the model backward from a gradient towards them: one program for all cases."""
    model = Model.of(config_of(), make_mesh((1, 1, 1, 1)))

    def value(params: Any, batch: Batch) -> Any:
        return model.token_stats(params, batch, "score").value_BT

    backward = jax.jit(lambda params, batch, d_value: jax.vjp(lambda p: value(p, batch), params)[1](d_value)[0])
    return jax.jit(value), backward


@pytest.mark.parametrize("name", trl.NAMES)
def test_the_same_as_trl(name):
    """The log-exp form, log(1 + exp(rejected - chosen)), is the same loss: nothing needs to ask for it."""
    golden, config = GOLDEN[name], config_of(preference=PreferenceConfig(**OPTIONS.get(name, {})))
    host = host_batch(margins=name == "reward_margin")
    batch = jax.tree.map(jnp.asarray, host)
    seen = replace(batch, columns={"last": batch.columns["last"]})
    value, backward = programs()
    optimizer = optax.adamw(pairs_of.RATE, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    params, losses = params_of(), []
    state, update = optimizer.init(params), jax.jit(optimizer.update)

    def loss(value_BT: Any) -> Any:
        scales, divisor = REWARD.scales(REWARD.weights(batch, config), config)
        means = REWARD.function(TokenStats(value_BT=value_BT), batch, config)
        return sum(scale * means[part].total for part, scale in scales.items()) / divisor, means

    for step in range(pairs_of.STEPS + 1):
        d_value_BT, means = jax.grad(loss, has_aux=True)(value(params, seen))
        values = REWARD.values(jax.device_get(means), config)
        grads = backward(params, seen, d_value_BT)
        losses.append(values["loss"])
        if step == 0:
            norm = float(np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in jax.tree.leaves(grads))))
            assert norm == pytest.approx(golden["gradient_norm"], rel=1e-4)
            for theirs, ours in (("accuracy", "rewards/accuracies"), ("margin", "rewards/margins")):
                if golden["metrics"]:
                    assert values[ours] == pytest.approx(golden["metrics"][theirs], rel=1e-4, abs=1e-6)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert losses[0] == pytest.approx(golden["losses"][0], rel=1e-5)
    assert losses == pytest.approx(golden["losses"], rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_the_file_is_what_trl_makes():
    pytest.importorskip("trl.trainer", reason="the extra `oracle` has TRL")
    pytest.importorskip("torch", reason="the extra `oracle` has torch")
    for name in trl.NAMES:
        assert trl.golden(name)["losses"] == pytest.approx(GOLDEN[name]["losses"], rel=1e-5), name
    for how, scores in trl.scores().items():
        assert scores == pytest.approx(GOLDEN["scores"][how], rel=1e-5), how


def test_scores_are_those_of_transformers():
    """Alone, and padded on either side: ours are read at the last token, wherever a text stands in a row."""
    value_BT = np.asarray(
        programs()[0](params_of(), replace(host_batch(), columns={"last": host_batch().columns["last"]}))
    )
    found = {}
    host = host_batch()
    for row, number in {(b, s) for b in range(4) for s in host.segment_BT[b] if s}:
        own = host.segment_BT[row] == number
        found[row, number] = value_BT[row][own][-1]
    ours = [found[key] for key in sorted(found)]
    chosen, rejected = ours[0::2], ours[1::2]
    for how in ("alone", "right", "left"):
        assert [*chosen, *rejected] == pytest.approx(GOLDEN["scores"][how], abs=1e-5), how


WAYS = [
    ((1, 1, 1, 8), {"sequence_layout": "zigzag", "attention_type": "ring_blockwise"}, "as given", 1),
    ((1, 2, 2, 2), {"sequence_layout": "striped", "sequence_parallel": "all_gather"}, "apart", 1),
    ((2, 2, 1, 2), {"sequence_parallel": "ulysses"}, "alone", 1),
    ((1, 1, 1, 1), {}, "as given", 4),
]


@pytest.mark.parametrize(("mesh", "execution", "packing", "accumulate"), WAYS)
def test_the_same_step_everywhere(mesh, execution, packing, accumulate):
    """Also where a shard or a micro-batch has no pair: the third row is empty."""
    host = host_batch()
    packed = host if packing == "as given" else repacked(host, packing, mesh[0] * mesh[1])
    preference = PreferenceConfig(center_coefficient=0.3)
    values, grads = step_of(config_of(mesh, preference, accumulate, **execution), packed)
    want_values, want_grads = plain()
    assert values.keys() == want_values.keys()
    for key, value in want_values.items():
        assert values[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    close(grads, want_grads, 1e-5)


@cache
def plain() -> Any:
    return step_of(config_of(preference=PreferenceConfig(center_coefficient=0.3)), host_batch())


def test_verify_compares_the_head_and_pairs():
    """A weight that stood in no group of ringbpt.verify's ended it in a traceback."""
    config = replace(config_of(), lora=LoraConfig(rank=2, target_modules="q_proj,down_proj"))
    numbers = step_numbers(config, host_batch(), seed=0)
    sizes = {group: len(array) for group, array in numbers.items() if group in GROUPS}
    plain = {
        group: len(array) for group, array in step_numbers(config_of(), host_batch(), seed=0).items() if group in GROUPS
    }
    assert plain["embedding"] == trl.SIZES["hidden_size"] * (trl.SIZES["vocab_size"] + 1)
    # Of what stays there is none: the head alone, and the pairs.
    assert sizes.keys() == {"embedding", "attention", "feedforward"}
    assert sizes["embedding"] == trl.SIZES["hidden_size"] and 0 < sizes["attention"] < plain["attention"]


def test_what_is_pictured(tmp_path):
    config = config_of()
    model = Model.of(config, make_mesh((1, 1, 1, 1)))
    layout = StateLayout(config, model)
    state = layout.start(jax.device_put(params_of(), model.shardings))
    means = jax.device_get(make_eval_step(layout, REWARD)(state, jax.tree.map(jnp.asarray, host_batch())))
    counts = means["probabilities"].total
    assert counts.sum() == 4
    half = len(counts) // 2
    assert (
        counts[half:].sum() / 4
        == REWARD.values({"rewards/accuracies": means["rewards/accuracies"]}, config)["rewards/accuracies"]
    )
    draw_probabilities(tmp_path / "rewards.png", counts, "four pairs")
    assert (tmp_path / "rewards.png").read_bytes()[:4] == b"\x89PNG"


def test_calibration():
    """Of 10 pairs said to be so with 0.85, 8 are: the other two stand at 0.15."""
    counts = np.zeros(20)
    counts[16], counts[3] = 8, 2
    said, seen, error = reliability(counts)
    assert seen[np.isclose(said, 0.825)] == pytest.approx(0.8)
    assert error == pytest.approx(0.025)
    assert np.isnan(seen[0])


def test_its_head_follows_from_the_objective():
    assert {name for name, objective in OBJECTIVES.items() if objective.head == "score"} == set(SCORING)
    config = parse(parse_args(["--config=configs/reward.py"]), 4)
    assert config.architecture.head == "score"
    with pytest.raises(UserError, match="says no more than a number a token"):
        parse(parse_args(["--config=configs/dpo.py", "--llama.head=score"]), 4)
    with pytest.raises(UserError, match="--eval_passkey looks at predicted tokens"):
        parse(parse_args(["--config=configs/reward.py", "--eval_passkey=64"]), 4)


def test_it_has_no_vocabulary_to_predict():
    model = Model.of(config_of(), make_mesh((1, 1, 1, 1)))
    assert "unembed" not in model.specs and model.abstract_params["score"].shape == (trl.SIZES["hidden_size"],)
