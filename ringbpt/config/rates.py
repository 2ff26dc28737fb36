"""The learning rates that nobody gave: usual ones for a model from nothing, lower ones for weights that were loaded.

Ref: LLaMA (arXiv:2302.13971) has 3e-4 for AdamW, 2,000 steps of warm-up and a cosine down to a tenth; 2e-5 with 3 % of
warm-up is Alpaca's and Vicuna's for weights like LLaMA's. The other optimizers' rates are their papers' or optax's, and
on loaded weights lower by about as much.
"""

from dataclasses import fields, is_dataclass, replace
from typing import Any

from ringbpt.config.fields import Config, OptimizerConfig, ScheduledConfig

WARMUP_STEPS = 2000  # from nothing
END_SHARE = 0.1  # of lr


def is_fine_tuning(config: Config) -> bool:
    """Whether the run starts from weights alone: a train state goes on as what it was."""
    return bool(config.load_checkpoint) and not config.load_checkpoint.startswith("trainstate::")


def complete_rates(config: Config) -> OptimizerConfig:
    """The optimizer's flags with every None filled in, in the groups that are not chosen too.

    A value that was given stays, and those that were not make room for it: a warm-up that was given ends before the
    decay does, and a decay that was given begins after the warm-up.
    """
    groups = {item.name: getattr(config.optimizer, item.name) for item in fields(OptimizerConfig)}
    return replace(
        config.optimizer, **{name: _complete(group, config) for name, group in groups.items() if is_dataclass(group)}
    )


def describe_rates(config: Config) -> str:
    """The rates of a run, in one phrase for its start."""
    group, name = config.optimizer.chosen, config.optimizer.type
    if not isinstance(group, ScheduledConfig):
        return f"{name}, lr {group.lr:g}"
    return (
        f"{name}, lr {group.lr:g} after {group.lr_warmup_steps:,} steps, {group.end_lr:g} at step "
        f"{group.lr_decay_steps:,}" + (", for weights that were loaded" if is_fine_tuning(config) else "")
    )


def _complete(group: Any, config: Config) -> Any:
    tuning = is_fine_tuning(config)
    usual = {item.name: item.metadata["usual"][tuning] for item in fields(group) if item.metadata.get("usual")}
    group = _filled(group, **usual)
    if not isinstance(group, ScheduledConfig):
        return group
    assert group.lr is not None
    group = _filled(group, end_lr=float(f"{group.lr * END_SHARE:.12g}"))  # 2e-06, not 2.0000000000000003e-06
    group = _filled(group, lr_decay_steps=max(config.total_steps, (group.lr_warmup_steps or 0) + 1))
    assert group.lr_decay_steps is not None
    warmup = config.total_steps * 3 // 100 if tuning else min(WARMUP_STEPS, config.total_steps // 10)
    return _filled(group, lr_warmup_steps=min(warmup, group.lr_decay_steps - 1))


def _filled(group: Any, **values: Any) -> Any:
    return replace(group, **{name: value for name, value in values.items() if getattr(group, name) is None})
