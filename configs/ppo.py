"""PPO: as configs/grpo.py, with a critic on the policy's own layers, and two steps a rollout.

Data:      python scripts/make_prompts.py --output=runs/prompts
Command:   python -m ringbpt.train --config=configs/ppo.py
Hardware:  two CPU cores; nothing is downloaded
Expected:  the mean reward from 0.1 to 0.92 and more in 300 steps, two to three minutes
"""

from ml_collections import ConfigDict

from ringbpt.config import load_recipe


def get_config() -> ConfigDict:
    config = load_recipe("configs/grpo.py")
    config.objective = "ppo"
    config.rollout.updates = 2
    config.total_steps = 300
    return config
