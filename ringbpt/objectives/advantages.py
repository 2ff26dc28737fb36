"""Advantages: how much better a sample was than expected. Pure functions of rewards, in float64, on the host.

A sample whose reward is NaN (its reward function failed) belongs to no group: its advantage is 0, and it takes no part
in any mean. A group of one, or without spread, tells nothing, and has advantage 0.
"""

from collections.abc import Callable

import numpy as np

EPSILON = 1e-4  # beside a standard deviation, as TRL has it


def _counts(reward_PR: np.ndarray) -> np.ndarray:
    return np.sum(~np.isnan(reward_PR), axis=1, keepdims=True)


def _nothing(x: np.ndarray) -> np.ndarray:
    """0 where nothing is known."""
    return np.where(np.isfinite(x), x, 0.0)


def _centered(reward_PR: np.ndarray) -> np.ndarray:
    """Less the mean of the prompt's samples."""
    sums = np.nansum(reward_PR, axis=1, keepdims=True)
    return reward_PR - sums / np.maximum(_counts(reward_PR), 1)


def group(reward_PR: np.ndarray) -> np.ndarray:
    """Less the group's mean alone. Ref: Dr. GRPO, arXiv:2503.20783."""
    return _nothing(_centered(reward_PR))


def group_normalised(reward_PR: np.ndarray) -> np.ndarray:
    """In units of the group's standard deviation (of a sample, n - 1). Ref: GRPO, arXiv:2402.03300, as in TRL."""
    centered = _centered(reward_PR)
    variance = np.nansum(centered**2, axis=1, keepdims=True) / np.maximum(_counts(reward_PR) - 1, 1)
    return _nothing(centered / (np.sqrt(variance) + EPSILON))


def leave_one_out(reward_PR: np.ndarray) -> np.ndarray:
    """Less the mean of the prompt's other samples. Ref: RLOO, arXiv:2402.14740."""
    n = _counts(reward_PR)
    return _nothing(np.where(n > 1, _centered(reward_PR) * n / np.maximum(n - 1, 1), 0.0))


Rewards = list[np.ndarray]  # of each sample a number a token: its own reward at its last one, and what KL costs at each


def returns(reward: np.ndarray, discount: float) -> np.ndarray:
    """The discounted sum of what comes from each token on, float64."""
    found, total = np.zeros(len(reward)), 0.0
    for place in range(len(reward))[::-1]:
        total = reward[place] + discount * total
        found[place] = total
    return found


def whitened(values: Rewards, masks: Rewards) -> Rewards:
    """Less the mean over all sampled tokens of the rollout, in units of their standard deviation.

    Ref: REINFORCE++, arXiv:2501.03262; OpenRLHF's, whose variance is that of the population.
    """
    weight = np.concatenate(masks) if masks else np.zeros(0)
    x = np.concatenate(values) if values else np.zeros(0)
    count = max(weight.sum(), 1.0)
    mean = (x * weight).sum() / count
    std = np.sqrt(max(((x - mean) ** 2 * weight).sum() / count, 1e-8))
    return [(value - mean) / std * mask for value, mask in zip(values, masks, strict=True)]


def token_rewards(reward_PR: np.ndarray, costs: Rewards, baseline: bool = False) -> tuple[Rewards, Rewards]:
    """(the reward of each sample's tokens, prompt after prompt; 1 at each, 0 where the sample's own has failed).

    costs: what is taken from each token's; the sample's comes at its last token, less the mean of the prompt's samples
    with a baseline.
    """
    own_PR = group(reward_PR) if baseline else _nothing(reward_PR)
    rewards, masks = [], []
    for cost, own, worth in zip(costs, own_PR.ravel(), reward_PR.ravel(), strict=True):
        reward = -cost
        reward[-1] += own
        rewards.append(reward)
        masks.append(np.full(len(cost), float(not np.isnan(worth))))
    return rewards, masks


def reinforced(reward_PR: np.ndarray, costs: Rewards, discount: float, baseline: bool) -> Rewards:
    """REINFORCE++'s of each sample's tokens: its returns, whitened. See token_rewards."""
    rewards, masks = token_rewards(reward_PR, costs, baseline)
    return whitened([returns(reward, discount) for reward in rewards], masks)


def by_critic(
    reward_PR: np.ndarray, costs: Rewards, values: Rewards, discount: float, decay: float
) -> tuple[Rewards, Rewards]:
    """PPO's (advantages, whitened; returns) of each sample's tokens, by what a critic expected at each.

    Of a sample whose reward has failed nothing is learnt: what came is what was expected. See token_rewards and gae.
    """
    rewards, masks = token_rewards(reward_PR, costs)
    both = [gae(*each, discount, decay) for each in zip(rewards, values, masks, strict=True)]
    came = [np.where(mask > 0, x, value) for (_, x), mask, value in zip(both, masks, values, strict=True)]
    return whitened([advantage for advantage, _ in both], masks), came


def gae(
    reward: np.ndarray, value: np.ndarray, mask: np.ndarray, discount: float, decay: float
) -> tuple[np.ndarray, np.ndarray]:
    """(advantages, returns) of one sample's tokens, float64. Ref: arXiv:1506.02438.

    mask: 1 where the token was sampled. What was not (a tool's output) is no action: the next action's value and
    advantage are carried across it, undiscounted, and it has neither itself.
    """
    advantages, found = np.zeros(len(reward)), np.zeros(len(reward))
    next_value, next_advantage, owed = 0.0, 0.0, 0.0
    for place in range(len(reward))[::-1]:
        if not mask[place]:
            owed += reward[place]  # what was earned there belongs to the action before it
            continue
        delta = reward[place] + owed + discount * next_value - value[place]
        next_advantage = delta + discount * decay * next_advantage
        next_value, owed = value[place], 0.0
        advantages[place], found[place] = next_advantage, next_advantage + value[place]
    return advantages, found


# Of groups, [prompts, samples], a number a sample; the rest, "whitened", "group_whitened", "gae", go by tokens.
OF_GROUPS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "group": group,
    "group_normalised": group_normalised,
    "leave_one_out": leave_one_out,
}
