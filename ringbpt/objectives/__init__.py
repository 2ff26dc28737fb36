"""What a model is trained for, by name; the table is all that the rest of the house knows of objectives.

An objective never calls the model, sees a mesh, or divides by a batch size; whatever it reads beyond the token
statistics is a column of the batch.
"""

from ringbpt.config import Config
from ringbpt.objectives import balance, kto, policy, preference, reward, sft
from ringbpt.objectives.objective import Objective

OBJECTIVES: dict[str, Objective] = {
    "pretrain": sft.objective("text"),
    "sft": sft.objective("text", "messages", "sharegpt", "alpaca", "prompt_completion"),
    "dpo": preference.objective(preference.dpo),
    "ipo": preference.objective(preference.ipo),
    "cdpo": preference.objective(preference.cdpo),
    "robust": preference.objective(preference.robust),
    "hinge": preference.objective(preference.hinge),
    "exo": preference.objective(preference.exo),
    "nca": preference.objective(preference.nca),
    "bco": preference.objective(preference.bco),
    "sppo": preference.objective(preference.sppo),
    "apo_zero": preference.objective(preference.apo_zero),
    "apo_down": preference.objective(preference.apo_down),
    "discopop": preference.objective(preference.discopop),
    "sigmoid_norm": preference.objective(preference.sigmoid_norm),
    "simpo": preference.objective(preference.simpo, reference=False),
    "orpo": preference.objective(preference.orpo, reference=False, whole_chosen=True),
    "kto": kto.objective(kto.kto, has_kl=True),
    "apo_zero_unpaired": kto.objective(kto.apo_zero, has_kl=False),
    "reward": reward.objective(),
    **{name: policy.objective(name) for name in policy.ALGORITHMS},
}


def objective_of(config: Config) -> Objective:
    """The objective that the flags name; where the model has experts, with the balance of their loads as a part."""
    objective = OBJECTIVES[config.objective]
    return balance.added_to(objective, config) if config.architecture.num_experts else objective
