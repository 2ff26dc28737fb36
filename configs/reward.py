"""A reward model on pairs of answers: one score of each text, under ring attention, many pairs a row.

Data:      python scripts/make_preferences.py --output=runs/preferences
Command:   python -m ringbpt.train --config=configs/reward.py
Hardware:  two CPU cores; nothing is downloaded
Expected:  the chosen answer has the larger score in 99 % of the held-out pairs after 400 steps, three minutes;
           rewards.png shows how sure the model is of them, and how rightly
"""

from ml_collections import ConfigDict

from ringbpt.config import load_recipe


def get_config() -> ConfigDict:
    config = load_recipe("configs/dpo.py")
    config.objective = "reward"
    config.total_steps = 400
    config.optimizer.adamw_optimizer.lr = 2e-3
    return config
