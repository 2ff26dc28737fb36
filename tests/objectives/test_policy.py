"""Policy gradients: what TRL makes of fixed rollouts, advantages by their definitions, and a correction that is exact.

The values of golden/policies.json are TRL's own, by tests/golden/make_policies.py.
"""

import itertools
import json
import statistics
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import stop_gradient

from ringbpt.config import Config, PolicyConfig, RolloutConfig
from ringbpt.data.documents import Piece, make_batch
from ringbpt.mesh import make_mesh
from ringbpt.model.llama import Model
from ringbpt.objectives import OBJECTIVES
from ringbpt.objectives.advantages import (
    OF_GROUPS,
    by_critic,
    gae,
    group,
    group_normalised,
    leave_one_out,
    reinforced,
    returns,
    whitened,
)
from ringbpt.objectives.policy import ALGORITHMS, correction, log_ratios, surrogate, value_loss
from ringbpt.types import ALWAYS, Batch, TokenStats
from tests.flags import llama_flags
from tests.golden import make_policies as trl
from tests.golden.make_preferences import reference_weights
from tests.model.test_oracle import llama_flags as oracle_flags
from tests.model.test_oracle import our_params

GOLDEN = json.loads(trl.FILE.read_text())
REWARD_PR = np.array(trl.REWARDS, float)  # None is NaN
COLUMNS = (*ALWAYS, "last", "advantage", "reward", "rollout_logp", "old_logp", "ref_logp")
# The file's names -> our objective, and its flags.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {}),
    "dr_grpo": ("dr_grpo", {}),
    "dapo": ("dapo", {}),
    "bnpo": ("grpo", {"average": "token"}),
    "cispo": ("cispo", {"clip_high": trl.CISPO_HIGH}),
    "gspo": ("gspo", {}),
    "rloo": ("rloo", {}),
    "dual_clip": ("grpo", {"dual_clip": trl.DUAL_CLIP}),
    "kl": ("grpo", {"kl_coefficient": trl.BETA}),
    "kl_dr_grpo": ("dr_grpo", {"kl_coefficient": trl.BETA}),
    "entropy": ("grpo", {"entropy_coefficient": trl.ENTROPY}),
    "token_truncate": ("grpo", {"correction": "token_truncate"}),
    "token_mask": ("grpo", {"correction": "token_mask"}),
    "answer_truncate": ("grpo", {"correction": "answer_truncate", "average": "token"}),
    "answer_mask": ("grpo", {"correction": "answer_mask", "average": "token", "kl_coefficient": trl.BETA}),
}


def config_of(objective: str, **policy: Any) -> Config:
    plain = {"attention_type": "standard", "sequence_layout": "contiguous", "scan_layers": False}
    return Config(
        objective=objective,
        dtype="fp32",
        policy=PolicyConfig(**policy),
        rollout=RolloutConfig(max_new_tokens=trl.LONGEST),
        **llama_flags(**(oracle_flags(trl.CASE) | plain)),
    )


# --- the same as TRL ---


def pieces(advantage_PR: np.ndarray) -> list[list[Piece]]:
    """The rollouts as a run lays them out: each prompt once, with all its answers."""
    logps = {name: iter(GOLDEN["logp"][name]) for name in ("old", "sampler", "ref")}
    found: list[list[Piece]] = []
    for number, (prompt, answers) in enumerate(trl.rollouts()):
        found.append([])
        for at, answer in enumerate(answers):
            shared, before = (len(prompt) - 1 if at else 0), [0.0] * len(prompt)
            token = np.array(prompt + answer, np.int32)
            values = {
                "token": token,
                "mask": (np.arange(len(token)) >= len(prompt)).astype(np.float32),
                "advantage": np.full(len(token), advantage_PR[number, at], np.float32),
                "reward": np.full(len(token), np.nan_to_num(REWARD_PR[number, at]), np.float32),
                "old_logp": np.array(before + next(logps["old"]), np.float32),
                "rollout_logp": np.array(before + next(logps["sampler"]), np.float32),
                "ref_logp": np.array(before + next(logps["ref"]), np.float32),
            }
            own = {name: array[shared:] for name, array in values.items()}
            found[-1].append(Piece(len(token) - shared - 1, own, number, shared))
    return found


def batch_of(advantage_PR: np.ndarray) -> Batch:
    """In three rows, one of which is empty."""
    units = pieces(advantage_PR)
    return jax.tree.map(jnp.asarray, make_batch([units[0] + units[1], [], units[2]], (3, 64), COLUMNS))


@cache
def programs() -> Any:
    """Log-probabilities and entropies, and the model backward from gradients towards them: one program for all."""
    model = Model.of(config_of("grpo"), make_mesh((1, 1, 1, 1)))

    def forward(params: Any, batch: Batch) -> tuple[Any, Any]:
        stats = model.token_stats(params, batch)
        return stats.logp_BT, stats.entropy_BT

    backward = jax.jit(lambda params, batch, d: jax.vjp(lambda p: forward(p, batch), params)[1](d)[0])
    return jax.jit(forward), backward


def seen(batch: Batch) -> Batch:
    """What of it the model reads."""
    return replace(batch, columns={"last": batch.columns["last"]})


def learnt(config: Config, stats: tuple[Any, Any], batch: Batch) -> tuple[dict[str, float], float, Any]:
    """(values, the loss, its gradients towards log-probabilities and entropies), as the train step has them."""
    objective = OBJECTIVES[config.objective]
    scales, divisor = objective.scales(objective.weights(batch, config), config)

    def loss(known: tuple[Any, Any]) -> Any:
        logp_BT, entropy_BT = known
        known = TokenStats(logp_BT=logp_BT, entropy_BT=entropy_BT, value_BT=jnp.zeros_like(logp_BT))
        means = objective.function(known, batch, config)
        return sum(scale * means[part].total for part, scale in scales.items()) / divisor, means

    (value, means), gradients = jax.value_and_grad(loss, has_aux=True)(stats)
    return objective.values(jax.device_get(means), config), float(value), gradients


def without_reference(config: Config, batch: Batch) -> Batch:
    """As a run has it: no column that nobody needs."""
    if config.policy.kl_coefficient:
        return batch
    return replace(batch, columns={name: x for name, x in batch.columns.items() if name != "ref_logp"})


@pytest.mark.parametrize("name", trl.NAMES)
def test_the_same_as_trl(name):
    golden, (objective, flags) = GOLDEN[name], CASES[name]
    config, params = config_of(objective, **flags), our_params(trl.CASE)
    advantage_PR = OF_GROUPS[ALGORITHMS[objective].advantage](REWARD_PR)
    np.testing.assert_allclose(advantage_PR, golden["advantages"], rtol=1e-6, atol=1e-6)
    batch = without_reference(config, batch_of(advantage_PR))
    forward, backward = programs()
    values, loss, towards = learnt(config, forward(params, seen(batch)), batch)
    grads = backward(params, seen(batch), towards)
    norm = float(np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in jax.tree.leaves(grads))))
    assert loss == pytest.approx(golden["loss"], rel=1e-5, abs=1e-6)
    assert values["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert norm == pytest.approx(golden["gradient_norm"], rel=1e-4)
    for key, value in golden["metrics"].items():
        if key != "clipped" or ALGORITHMS[objective].ratio == "token":  # of answers, TRL counts answers and not tokens
            assert values[key] == pytest.approx(value, rel=1e-5), key


def test_log_probabilities_are_those_of_transformers():
    """What the columns hold, computed by ours: of answers that share their prompt in a row."""
    batch = batch_of(REWARD_PR)
    for column, weights in (("old_logp", trl.old_weights()), ("ref_logp", reference_weights())):
        logp_BT = programs()[0](our_params(trl.CASE, weights), seen(batch))[0]
        found, want = (np.asarray(jnp.where(batch.weight_BT > 0, x, 0.0)) for x in (logp_BT, batch.columns[column]))
        np.testing.assert_allclose(found, want, atol=2e-5)


@pytest.mark.slow
def test_the_file_is_what_trl_makes():
    pytest.importorskip("trl.trainer", reason="the extra `oracle` has TRL")
    pytest.importorskip("torch", reason="the extra `oracle` has torch")
    for name in trl.NAMES:
        found = trl.golden(name)
        assert found["loss"] == pytest.approx(GOLDEN[name]["loss"], rel=1e-5, abs=1e-6), name
        assert found["gradient_norm"] == pytest.approx(GOLDEN[name]["gradient_norm"], rel=1e-5), name


def test_every_algorithm_is_compared_with_somebody():
    """REINFORCE++ and PPO are one token loss, which `bnpo` compares; advantages and values are compared with their
    definitions.
    """
    assert set(CASES) == set(trl.NAMES)
    alike = {"reinforce_pp": "whitened", "reinforce_pp_baseline": "group_whitened", "ppo": "gae", "distill": "teacher"}
    for name, advantage in alike.items():
        assert ALGORITHMS[name] == replace(ALGORITHMS["grpo"], average="token", advantage=advantage)
    assert {objective for objective, _ in CASES.values()} | set(alike) == set(ALGORITHMS)


# --- nothing is NaN ---


def edge(advantage: float, off: float, weight: float = 1.0) -> tuple[tuple[Any, Any], Batch]:
    """Two rows of an answer of 100 tokens each, by the policy `off` nats a token likelier than by the old one."""
    shape = (2, 100)
    ones, old = jnp.ones(shape, jnp.int32), jnp.full(shape, -3.0)
    columns = {"advantage": jnp.full(shape, advantage), "reward": jnp.ones(shape)}
    columns |= {"old_logp": old, "rollout_logp": old - off, "ref_logp": old + off / 50}
    columns |= {"old_value": jnp.zeros(shape), "return": jnp.zeros(shape)}
    batch = Batch(ones, ones, jnp.full(shape, weight), ones, ones, columns)
    return (old + off, jnp.full(shape, 2.0)), batch


FLAGS = {"kl_coefficient": 0.1, "entropy_coefficient": 0.1, "dual_clip": 3.0, "correction": "answer_mask"}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_everything_left_out_is_no_loss(name):
    """Say that all answers were truncated and count nothing."""
    stats, batch = edge(1.0, 0.1, weight=0.0)
    values, loss, grads = learnt(config_of(name, **FLAGS), stats, batch)
    assert loss == 0.0 and "loss" not in values
    assert not any(np.asarray(g).any() for g in grads)


@pytest.mark.parametrize("name", sorted({*ALGORITHMS} - {"distill"}))  # which learns of no reward
def test_a_group_that_tells_nothing_teaches_nothing(name):
    for rewards in ([[0.1]], [[0.1, 0.1, 0.1]], [[np.nan, np.nan]], [[np.nan, 0.1]]):
        reward_PR, kind = np.array(rewards), ALGORITHMS[name].advantage
        if kind in OF_GROUPS:
            found = OF_GROUPS[kind](reward_PR)
        else:
            found = np.stack(reinforced(reward_PR, [np.zeros(1)] * reward_PR.size, 1.0, kind == "group_whitened"))
        np.testing.assert_allclose(found, 0, atol=1e-11)
    stats, batch = edge(0.0, 0.1)
    _, loss, grads = learnt(config_of(name), stats, without_reference(config_of(name), batch))
    assert loss == 0.0 and not any(np.asarray(g).any() for g in grads)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_ratio_beyond_float32_is_no_nan(name):
    """Of a long answer the ratio is e to the sum of all its tokens' drift."""
    for advantage, off in itertools.product((0.0, 1.0, -1.0), (1.0, -1.0)):
        stats, batch = edge(advantage, off)
        for flags in ({}, FLAGS, FLAGS | {"correction": "answer_truncate"}):
            _, loss, grads = learnt(config_of(name, **flags), stats, batch)
            assert np.isfinite(loss) and all(np.isfinite(g).all() for g in grads), (advantage, off, flags)


# --- advantages by their definitions ---


def by_definition(how: str, reward_PR: np.ndarray) -> list[list[float]]:
    found = []
    for rewards in reward_PR.tolist():
        known = [(n, x) for n, x in enumerate(rewards) if x == x]
        values = [x for _, x in known]
        row = [0.0] * len(rewards)
        for n, x in known:
            if how == "leave_one_out":
                others = [y for m, y in known if m != n]
                row[n] = x - statistics.mean(others) if others else 0.0
            else:
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                row[n] = (x - statistics.mean(values)) / (spread + 1e-4 if how == "group_normalised" else 1)
        found.append(row)
    return found


SOME_PR = np.array(
    [[1.0, 0.25, np.nan, -0.5], [0.5] * 4, [0.0, 2.0, 0.75, 0.1], [np.nan, np.nan, 3.0, np.nan], [np.nan] * 4]
)


@pytest.mark.parametrize("function", [group, group_normalised, leave_one_out])
def test_advantages_of_groups(function):
    found = function(SOME_PR)
    np.testing.assert_allclose(found, by_definition(function.__name__, SOME_PR), atol=1e-12)
    assert found[~np.isfinite(SOME_PR)].tolist() == [0.0] * 8 and found.dtype == np.float64


def test_returns():
    reward = np.random.default_rng(0).standard_normal(9)
    want = [sum(0.9**later * x for later, x in enumerate(reward[place:])) for place in range(9)]
    np.testing.assert_allclose(returns(reward, 0.9), want, atol=1e-12)


def test_whitened():
    rng = np.random.default_rng(1)
    values = [rng.standard_normal(n) * 3 + 1 for n in (4, 1, 7)]
    masks = [rng.integers(0, 2, len(value)).astype(float) for value in values]
    masks[1][:] = 1
    sampled = np.concatenate(values)[np.concatenate(masks) > 0]
    for found, value, mask in zip(whitened(values, masks), values, masks, strict=True):
        np.testing.assert_allclose(found, (value - sampled.mean()) / sampled.std() * mask, atol=1e-12)
    assert whitened([], []) == []


@pytest.mark.parametrize("baseline", [False, True])
def test_reinforce_pp(baseline):
    """With KL taken from each token's reward, a discount, and rewards that have failed, which count nowhere."""
    rng, discount = np.random.default_rng(2), 0.95
    costs = [rng.standard_normal(n) * 0.1 for n in rng.integers(1, 9, SOME_PR.size)]
    values: list[list[float]] = []
    for at, cost in enumerate(costs):
        p, r = divmod(at, SOME_PR.shape[1])
        rewards = [-x for x in cost]
        own = SOME_PR[p, r] - (np.nanmean(SOME_PR[p]) if baseline and np.isfinite(SOME_PR[p]).any() else 0.0)
        rewards[-1] += own
        values.append([sum(discount**k * x for k, x in enumerate(rewards[place:])) for place in range(len(rewards))])
    known = [x for value in values if value[-1] == value[-1] for x in value]
    mean, std = statistics.mean(known), statistics.pstdev(known)
    for value, found in zip(values, reinforced(SOME_PR, costs, discount, baseline), strict=True):
        want = (np.array(value) - mean) / std if value[-1] == value[-1] else np.zeros(len(value))
        np.testing.assert_allclose(found, want, atol=1e-10)


def verls(reward: Any, value: Any, mask: Any, discount: float, decay: float) -> list[float]:
    """verl's loop, core_algos.compute_gae_advantage_return, of one sample."""
    next_value = last = 0.0
    found = []
    for t in reversed(range(len(reward))):
        delta = reward[t] + discount * next_value - value[t]
        this = delta + discount * decay * last
        next_value = value[t] * mask[t] + (1 - mask[t]) * next_value
        last = this * mask[t] + (1 - mask[t]) * last
        found.append(last)
    return found[::-1]


@pytest.mark.parametrize(("discount", "decay"), [(1.0, 1.0), (0.97, 0.9), (1.0, 0.0)])
def test_gae_with_a_tools_output_in_the_middle(discount, decay):
    """Value and advantage are carried across it, as in verl; it is as if it were not there."""
    rng = np.random.default_rng(3)
    mask = np.array([1, 1, 0, 0, 0, 1, 1, 0, 1, 1, 0])
    value, reward = rng.standard_normal((2, len(mask)))
    reward = reward * mask
    advantages, found = gae(reward, value, mask, discount, decay)
    own = np.flatnonzero(mask)
    r, v = reward[own], np.append(value[own], 0.0)
    delta = r + discount * v[1:] - v[:-1]
    want = [sum((discount * decay) ** k * x for k, x in enumerate(delta[place:])) for place in range(len(own))]
    np.testing.assert_allclose(advantages[own], want, atol=1e-12)
    np.testing.assert_allclose(found[own], np.array(want) + value[own], atol=1e-12)
    np.testing.assert_allclose(advantages[own], np.array(verls(reward, value, mask, discount, decay))[own], atol=1e-12)
    assert not advantages[mask == 0].any() and not found[mask == 0].any()


def test_what_is_earned_in_a_tools_output_is_the_action_befores():
    """verl forgets it, and with it the reward of a sample that ends there."""
    mask, value = np.array([1, 0, 1, 0]), np.zeros(4)
    advantages, _ = gae(np.array([0.0, 1.0, 0.0, 5.0]), value, mask, 1.0, 1.0)
    assert advantages.tolist() == [6.0, 0.0, 5.0, 0.0]


# --- the correction is exact, and a cap costs what it must ---

TOKENS, PLACES = 4, 3
ANSWERS_ST = np.array(list(itertools.product(range(TOKENS), repeat=PLACES)))  # all 64 there are
BEFORE_ST = np.concatenate([np.full((len(ANSWERS_ST), 1), TOKENS), ANSWERS_ST[:, :-1]], 1)
PLACE_ST = np.broadcast_to(np.arange(PLACES), ANSWERS_ST.shape)
WORTH_S = np.random.default_rng(4).standard_normal(len(ANSWERS_ST))


def exactly(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(log-probabilities [S, T], their gradients towards the logits [S, T, *logits.shape]), in float64.

    logits: [place, token before, token].
    """
    logp = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
    score = np.zeros((*ANSWERS_ST.shape, *logits.shape))
    for s, t in np.ndindex(ANSWERS_ST.shape):
        score[s, t, t, BEFORE_ST[s, t]] = -np.exp(logp[t, BEFORE_ST[s, t]])
        score[s, t, t, BEFORE_ST[s, t], ANSWERS_ST[s, t]] += 1
    return logp[PLACE_ST, BEFORE_ST, ANSWERS_ST], score


def expected(logits: np.ndarray, sampler: np.ndarray, weight_ST: np.ndarray) -> np.ndarray:
    """The mean over what the sampler draws of worth x weight x the tokens' gradients."""
    drawn_S = np.exp(exactly(sampler)[0].sum(1))
    return np.einsum("s,st,st...->...", drawn_S * WORTH_S, weight_ST, exactly(logits)[1])


@cache
def policies() -> tuple[np.ndarray, np.ndarray]:
    """(a policy, and it five steps before)."""
    start = np.random.default_rng(5).standard_normal((PLACES, TOKENS + 1, TOKENS))
    now = start
    for _ in range(5):
        now = now + 2 * expected(now, now, np.ones(ANSWERS_ST.shape))
    return now, start


def corrected(objective: str, old: str = "", **flags: Any) -> np.ndarray:
    """The expected gradient that ours has of the old policy's answers. old: where the ratio's denominator is from."""
    now, start = policies()
    ones = jnp.ones(ANSWERS_ST.shape, jnp.int32)
    batch, mask = Batch(ones, ones, ones, ones, ones), jnp.ones(ANSWERS_ST.shape)
    rollout_ST = jnp.asarray(exactly(start)[0], jnp.float32)
    algorithm, c = ALGORITHMS[objective], PolicyConfig(clip_low=1.0, clip_high=1e9, **flags)

    def loss(logits: Any) -> Any:
        logp_ST = jax.nn.log_softmax(logits)[PLACE_ST, BEFORE_ST, ANSWERS_ST]
        old_ST = rollout_ST if old == "sampler" else stop_gradient(logp_ST)
        ratio_ST = log_ratios(logp_ST, old_ST, mask, batch, algorithm.ratio)
        advantage_ST = jnp.asarray(WORTH_S, jnp.float32)[:, None] * mask
        loss_ST = surrogate(algorithm, c, logp_ST, ratio_ST, advantage_ST)
        loss_ST = loss_ST * correction(c, old_ST, rollout_ST, mask, batch)
        tokens = PLACES if algorithm.ratio == "sum" else 1  # each of which has the whole answer's loss
        return jnp.sum(jnp.exp(rollout_ST.sum(1, keepdims=True)) * loss_ST) / tokens

    return -np.asarray(jax.grad(loss)(jnp.asarray(now, jnp.float32)))


def ratios() -> np.ndarray:
    now, start = policies()
    return np.exp(exactly(now)[0] - exactly(start)[0])


def on_policy() -> np.ndarray:
    now, _ = policies()
    return expected(now, now, np.ones(ANSWERS_ST.shape))


@pytest.mark.parametrize(
    ("objective", "flags"),
    [
        ("rloo", {"correction": "answer_truncate", "correction_cap": 1e6}),
        ("rloo", {"correction": "answer_mask", "correction_cap": 1e6}),
        ("dr_grpo", {"correction": "answer_truncate", "correction_cap": 1e6}),
        ("cispo", {"correction": "answer_mask", "correction_cap": 1e6}),
        ("rloo", {"old": "sampler"}),  # whose own ratio corrects
    ],
)
def test_from_a_policy_five_steps_old_the_gradient_is_the_same(objective, flags):
    np.testing.assert_allclose(corrected(objective, **flags), on_policy(), atol=1e-6)
    uncorrected = corrected(objective)
    assert np.abs(uncorrected - on_policy()).max() > 0.01  # which proves that there was something to correct


@pytest.mark.parametrize("objective", ["rloo", "dr_grpo"])
@pytest.mark.parametrize("level", ["token", "answer"])
@pytest.mark.parametrize(("cap", "floor"), [(1.2, 0.0), (3.0, 0.0), (3.0, 0.7), (1e6, 0.0)])
def test_the_bias_of_each_cap(objective, level, cap, floor):
    """By hand: of each answer, what the cap takes from its weight. A token's own ratio is biased without any."""
    ratio_ST = ratios() if level == "token" else np.broadcast_to(ratios().prod(1, keepdims=True), ANSWERS_ST.shape)
    for how, weight_ST in (
        ("truncate", np.clip(ratio_ST, floor, cap)),
        ("mask", np.where((ratio_ST < floor) | (ratio_ST > cap), 0, ratio_ST)),
    ):
        if objective == "rloo" and level == "token":  # its loss is an answer's: each token's weight is the mean of them
            weight_ST = np.broadcast_to(weight_ST.mean(1, keepdims=True), weight_ST.shape)
        now, start = policies()
        whole_ST = np.broadcast_to(ratios().prod(1, keepdims=True), ANSWERS_ST.shape)
        bias = expected(now, start, weight_ST - whole_ST)
        flags = {"correction": f"{level}_{how}", "correction_cap": cap, "correction_floor": floor}
        np.testing.assert_allclose(corrected(objective, **flags) - on_policy(), bias, atol=1e-6)
        assert (np.abs(bias).max() > 1e-3) == (level == "token" or cap < 1e6)


# --- a critic ---


def test_ppos_advantages_and_returns_by_their_definitions():
    """Two samples with costs, and one whose reward has failed: of that nothing is learnt."""
    reward_PR = np.array([[1.0, np.nan], [0.5, -2.0]])
    costs = [np.array(c) for c in ([0.1, 0.2, 0.0], [0.3, 0.1], [0.0], [0.2, 0.0])]
    values = [np.array(v) for v in ([0.5, 0.4, 0.9], [0.7, 0.1], [0.2], [-1.0, 0.3])]
    found, came = by_critic(reward_PR, costs, values, 0.9, 0.8)
    wanted = []
    for cost, value, reward in zip(costs, values, reward_PR.ravel(), strict=True):
        if np.isnan(reward):
            wanted.append(None)
            continue
        own = -cost
        own[-1] += reward
        delta = own + 0.9 * np.append(value[1:], 0.0) - value
        wanted.append(np.array([sum(0.72**k * delta[t + k] for k in range(len(own) - t)) for t in range(len(own))]))
    together = np.concatenate([x for x in wanted if x is not None])
    for got, back, value, want in zip(found, came, values, wanted, strict=True):
        if want is None:
            np.testing.assert_array_equal(got, 0.0)
            np.testing.assert_array_equal(back, value)
            continue
        np.testing.assert_allclose(got, (want - together.mean()) / together.std(), rtol=1e-12)
        np.testing.assert_allclose(back, want + value, rtol=1e-12)


def test_the_values_loss_is_the_larger_of_two():
    """Half the squared error of the value, and of the one that is kept within 0.2 of the old."""
    c = PolicyConfig(value_clip=0.2)
    value, old, came = (jnp.array([x]) for x in ([1.0, 0.1, 0.5], [0.0, 0.0, 0.4], [1.0, 1.0, 2.0]))
    np.testing.assert_allclose(value_loss(c, value, old, came), [[0.32, 0.405, 1.125]], rtol=1e-6)
    plain = value_loss(PolicyConfig(value_clip=0.0), value, old, came)
    np.testing.assert_allclose(plain, [[0.0, 0.405, 1.125]], rtol=1e-6)
