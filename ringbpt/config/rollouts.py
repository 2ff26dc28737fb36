"""What learning from rollouts needs of a run's flags, and what nothing else reads."""

import os
import re

from ringbpt.config.fields import CRITICS, POLICIES, Config, RolloutConfig
from ringbpt.config.values import UserError

KEY = "RINGBPT_API_KEY"


def check_rollouts(config: Config) -> None:
    """What learning from rollouts needs, and what nothing else reads."""
    rollout, name = config.rollout, f"--objective={config.objective}"
    if config.objective not in POLICIES:
        for flag in ("prompts", "reward", "environment"):
            if getattr(rollout, flag):
                raise UserError(f"--rollout.{flag} is of learning from rollouts, and {name} has none: --objective=grpo")
        return
    if not rollout.prompts:
        raise UserError(f"{name} learns from its own answers to prompts: --rollout.prompts=FILE.jsonl")
    if rollout.reward and rollout.environment:
        raise UserError("--rollout.environment says itself what an answer is worth: leave --rollout.reward out")
    if config.objective == "distill":
        _check_teacher(config)
    elif not rollout.reward and not rollout.environment:
        raise UserError(f"{name} learns from what answers are worth: --rollout.reward=FILE.py:NAME, or a reward model")
    if rollout.samples_per_prompt < 2 and config.objective not in ("reinforce_pp", "distill", *CRITICS):
        raise UserError(
            f"--rollout.samples_per_prompt={rollout.samples_per_prompt}: {name} compares a prompt's answers with each "
            "other: --rollout.samples_per_prompt=8"
        )
    for flag, whole in (("top_p", 1.0), ("top_k", 0)):
        if (given := getattr(rollout, flag)) != whole:
            raise UserError(
                f"--rollout.{flag}={given} would draw from a part of the tokens, and the policy is learnt on all: its "
                f"probabilities would not be those that answers were drawn with: --rollout.{flag}={whole:g}, and "
                "--rollout.temperature for narrower ones"
            )
    if rollout.updates > rollout.prompts_per_step:
        raise UserError(
            f"--rollout.updates={rollout.updates} steps learn from --rollout.prompts_per_step="
            f"{rollout.prompts_per_step} prompts, and some from none: --rollout.updates={rollout.prompts_per_step}"
        )
    if config.policy.kl_in_reward and not config.objective.startswith(("reinforce_pp", "ppo")):
        raise UserError(f"--policy.kl_in_reward is of rewards a token, and {name} has one an answer: leave it out")
    if config.policy.kl_in_reward and not config.policy.kl_coefficient:
        raise UserError("--policy.kl_in_reward takes --policy.kl_coefficient=0 of it: --policy.kl_coefficient=0.01")
    if rollout.servers:
        _check_servers(rollout)
    elif rollout.max_staleness:
        raise UserError(
            f"--rollout.max_staleness={rollout.max_staleness}: the run's own devices sample or learn, one at a time: "
            "--rollout.servers=http://HOST:PORT"
        )
    if rollout.max_staleness and not config.policy.correction:
        raise UserError(
            f"--rollout.max_staleness={rollout.max_staleness}: answers are of an older policy, and would be learnt as "
            "if they were not: --policy.correction=token_truncate"
        )
    if config.eval_steps:
        raise UserError(f"--eval_steps={config.eval_steps}: {name} has no held-out data: --eval_steps=0")


def api_key(given: str = "") -> str:
    """Of servers: what was given, else the variable RINGBPT_API_KEY. Raises UserError for what no request can carry,
    without showing it.
    """
    key = given or os.environ.get(KEY, "")
    if not key.isascii() or not key.isprintable() or key != key.strip():
        raise UserError(f"the API key of --api_key or {KEY} must be plain characters, without a space at its ends")
    return key


def _check_teacher(config: Config) -> None:
    if not config.reference_checkpoint:
        raise UserError("--objective=distill learns from a teacher: --reference_checkpoint=PREFIX::PATH")
    if config.policy.kl_coefficient:
        raise UserError(
            f"--policy.kl_coefficient={config.policy.kl_coefficient}: the distance from --reference_checkpoint is all "
            "that --objective=distill learns: leave it out"
        )


def _check_servers(rollout: RolloutConfig) -> None:
    urls = [url.strip().rstrip("/") for url in rollout.servers.split(",")]
    for url in urls:
        if not re.fullmatch(r"https?://[^\s/?#]+", url):
            raise UserError(f"--rollout.servers={url} is no address of a server: http://127.0.0.1:8000")
        if urls.count(url) > 1:
            raise UserError(f"--rollout.servers names {url} twice: leave one out")
