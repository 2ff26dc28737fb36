"""Policy gradients over rollouts: what a sampled token's advantage asks of its log-probability.

Everything but the policy's own log-probability is a column of the batch, written by a rollout (ringbpt/rollout). The
losses differ in where the ratio to the old policy is taken and clipped, over what is averaged, and in how advantages
were made (advantages.py); the table ALGORITHMS is all of that.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax.lax import stop_gradient

from ringbpt.config import Config, PolicyConfig
from ringbpt.objectives.objective import REFERENCE, Objective
from ringbpt.objectives.units import by_document, per_document
from ringbpt.types import Array, Batch, Mean, Means, TokenStats


@dataclass(frozen=True)
class Algorithm:
    """ratio: of each "token", of a whole answer by the "mean" of its tokens' logarithms, or by their "sum". surrogate:
    "clip", PPO's; "weight", the clipped ratio as a weight of the log-probability, without a gradient (CISPO). average:
    over "token", over answers of each one's mean ("answer"), or over answers of a sum ("constant"), which is divided
    by how long an answer may be. advantage: a name of advantages.ADVANTAGES. clip: what is below and above 1.
    """

    advantage: str
    ratio: str = "token"
    surrogate: str = "clip"
    average: str = "token"
    clip: tuple[float, float] = (0.2, 0.2)

    @property
    def has_critic(self) -> bool:
        """Whether advantages are of what the model itself expected."""
        return self.advantage == "gae"

    def bounds(self, c: PolicyConfig) -> tuple[float, float]:
        """How far below and above 1 a ratio still learns."""
        low, high = self.clip
        return low if c.clip_low is None else c.clip_low, high if c.clip_high is None else c.clip_high


ALGORITHMS = {
    "grpo": Algorithm("group_normalised", average="answer"),  # arXiv:2402.03300
    "dr_grpo": Algorithm("group", average="constant"),  # arXiv:2503.20783
    "dapo": Algorithm("group_normalised", clip=(0.2, 0.28)),  # arXiv:2503.14476
    "gspo": Algorithm("group_normalised", ratio="mean", average="answer", clip=(3e-4, 4e-4)),  # arXiv:2507.18071
    "cispo": Algorithm("group_normalised", surrogate="weight", clip=(1.0, 4.0)),  # arXiv:2506.13585
    "rloo": Algorithm("leave_one_out", ratio="sum", average="answer"),  # arXiv:2402.14740
    "reinforce_pp": Algorithm("whitened"),  # arXiv:2501.03262
    "reinforce_pp_baseline": Algorithm("group_whitened"),
    "ppo": Algorithm("gae"),  # arXiv:1707.06347
    "distill": Algorithm("teacher"),  # the reverse KL at what the student samples: arXiv:2306.13649
}


FARTHEST = 20.0  # nats, as in verl: the ratio of a long answer may be beyond float32, and inf * 0 is NaN


def log_ratios(logp_BT: Array, old_BT: Array, mask_BT: Array, batch: Batch, level: str) -> Array:
    """log of the ratio of two policies, [B, T]: of each token, or of its answer, by the mean or the sum of them."""
    difference = jnp.where(mask_BT > 0, logp_BT - old_BT, 0.0)
    if level == "token":
        return difference
    return per_document(difference, batch) if level == "sum" else _mean_of_answer(difference, mask_BT, batch)


def surrogate(algorithm: Algorithm, c: PolicyConfig, logp_BT: Array, log_ratio_BT: Array, advantage_BT: Array) -> Array:
    """The loss of each token."""
    below, above = algorithm.bounds(c)
    ratio = jnp.exp(jnp.clip(log_ratio_BT, -FARTHEST, FARTHEST))
    clipped = jnp.clip(ratio, 1 - below, 1 + above)
    if algorithm.surrogate == "weight":
        return -stop_gradient(clipped) * advantage_BT * logp_BT
    if c.dual_clip:  # of a bad token the loss is bounded too. Ref: arXiv:1912.09729
        ratio = jnp.minimum(ratio, c.dual_clip)
    return -jnp.minimum(ratio * advantage_BT, clipped * advantage_BT)


# Estimates of the KL to the reference at a sampled token, in nats, of log(reference / policy) there. Ref: J. Schulman,
# Approximating KL Divergence, 2020.
DIVERGENCES: dict[str, Callable[[Array], Array]] = {
    "k1": lambda delta: -delta,
    "k2": lambda delta: delta**2 / 2,
    "k3": lambda delta: jnp.exp(delta) - delta - 1,
}


def correction(c: PolicyConfig, old_BT: Array, rollout_BT: Array, mask_BT: Array, batch: Batch) -> Array:
    """By what each token's loss is multiplied, because its sampler was not quite the old policy: the ratio of the two,
    of tokens or of answers, cut at the cap, or 0 where it is above the cap or below the floor.
    """
    if not c.correction:
        return jnp.ones_like(old_BT)
    level, _, how = c.correction.partition("_")
    ratio = jnp.exp(log_ratios(old_BT, rollout_BT, mask_BT, batch, "token" if level == "token" else "sum"))
    if how == "truncate":
        return jnp.clip(ratio, c.correction_floor, c.correction_cap)
    return jnp.where((ratio >= c.correction_floor) & (ratio <= c.correction_cap), ratio, 0.0)


def value_loss(c: PolicyConfig, value_BT: Array, old_BT: Array, return_BT: Array) -> Array:
    """Half the squared error of each token's value; of that and the one of the value kept near the old, the larger."""
    loss = (value_BT - return_BT) ** 2
    if c.value_clip:
        near_BT = old_BT + jnp.clip(value_BT - old_BT, -c.value_clip, c.value_clip)
        loss = jnp.maximum(loss, (near_BT - return_BT) ** 2)
    return loss / 2


def _mean_of_answer(x_BT: Array, mask_BT: Array, batch: Batch) -> Array:
    """Of each token's answer the mean over what was sampled, [B, T]."""
    return per_document(x_BT * mask_BT, batch) / jnp.maximum(per_document(mask_BT, batch), 1.0)


def averaged(x_BT: Array, mask_BT: Array, batch: Batch, average: str, longest: int) -> Mean:
    """The mean of a number a token, see Algorithm.average; its weight depends on the batch alone."""
    if average == "token":
        return Mean(jnp.sum(jnp.where(mask_BT > 0, x_BT, 0.0)), jnp.sum(mask_BT))
    tokens_BD = by_document(mask_BT, batch)
    sums_BD = by_document(jnp.where(mask_BT > 0, x_BT, 0.0), batch)
    answers = jnp.sum(tokens_BD > 0).astype(jnp.float32)
    if average == "constant":
        return Mean(jnp.sum(sums_BD), answers * longest)
    return Mean(jnp.sum(sums_BD / jnp.maximum(tokens_BD, 1.0)), answers)


def _function(algorithm: Algorithm) -> Callable[[TokenStats, Batch, Config], Means]:
    def function(stats: TokenStats, batch: Batch, config: Config) -> Means:
        c, columns, mask_BT = config.policy, batch.columns, (batch.weight_BT > 0).astype(jnp.float32)
        logp_BT = jnp.where(mask_BT > 0, stats.logp_BT, 0.0)
        # With one update a rollout the old policy is this one: the ratio is 1, and has a gradient.
        old_BT = columns.get("old_logp", stop_gradient(logp_BT))
        advantage_BT, average = columns["advantage"], c.average or algorithm.average

        def mean(x_BT: Array, over: str = "token") -> Mean:
            return averaged(x_BT, mask_BT, batch, over, config.rollout.most_drawn)

        log_ratio_BT = log_ratios(logp_BT, old_BT, mask_BT, batch, algorithm.ratio)
        loss_BT = surrogate(algorithm, c, logp_BT, log_ratio_BT, advantage_BT)
        rollout_BT = columns.get("rollout_logp", old_BT)
        loss_BT = loss_BT * correction(c, old_BT, rollout_BT, mask_BT, batch)
        found = {"policy_loss": mean(loss_BT, average), "entropy": mean(stats.entropy_BT)}
        if REFERENCE in columns:
            found["kl_loss"] = mean(DIVERGENCES[c.kl](columns[REFERENCE] - logp_BT), average)
        if algorithm.has_critic:
            found["value_loss"] = mean(value_loss(c, stats.value_BT, columns["old_value"], columns["return"]))
        below, above = algorithm.bounds(c)
        ratio_BT = jnp.exp(log_ratio_BT)
        is_clipped = ((ratio_BT < 1 - below) & (advantage_BT < 0)) | ((ratio_BT > 1 + above) & (advantage_BT > 0))
        shown = {
            "length": mean(per_document(mask_BT, batch), "answer"),
            "clipped": mean(is_clipped.astype(jnp.float32)),
            "mismatch": mean(jnp.exp(jnp.abs(old_BT - rollout_BT))),
        }
        if "reward" in columns:
            shown = {"reward": mean(columns["reward"], "answer")} | shown
        if REFERENCE in columns:
            shown["kl"] = mean(DIVERGENCES["k3"](columns[REFERENCE] - logp_BT))
        return found | stop_gradient(shown)

    return function


def _parts(algorithm: Algorithm) -> Callable[[Config], dict[str, float]]:
    def parts(config: Config) -> dict[str, float]:
        c = config.policy
        found = {"policy_loss": 1.0}
        if c.entropy_coefficient:
            found["entropy"] = -c.entropy_coefficient
        if c.kl_coefficient and not c.kl_in_reward:
            found["kl_loss"] = c.kl_coefficient
        if algorithm.has_critic:
            found["value_loss"] = c.value_coefficient
        return found

    return parts


def objective(name: str) -> Objective:
    algorithm = ALGORITHMS[name]
    return Objective(
        function=_function(algorithm),
        parts=_parts(algorithm),
        shapes=("rl",),
        head="both" if algorithm.has_critic else "unembed",
        needs=("logp_BT", "entropy_BT", *(("value_BT",) if algorithm.has_critic else ())),
        columns=("advantage", "rollout_logp", *(("old_value", "return") if algorithm.has_critic else ())),
        optional=("reward", "old_logp", REFERENCE),
        whole_documents=True,
        rollouts=True,
    )
