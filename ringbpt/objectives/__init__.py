"""What a model is trained for, by name; the table is all that the rest of the house knows of objectives.

An objective never calls the model, sees a mesh, or divides by a batch size; whatever it reads beyond the token
statistics is a column of the batch.
"""

from ringbpt.config import Config
from ringbpt.objectives import balance, sft
from ringbpt.objectives.objective import Objective

OBJECTIVES: dict[str, Objective] = {"sft": sft.OBJECTIVE}


def objective_of(config: Config) -> Objective:
    """The objective that the flags name; where the model has experts, with the balance of their loads as a part."""
    objective = OBJECTIVES[config.objective]
    return balance.added_to(objective, config) if config.architecture.num_experts else objective
