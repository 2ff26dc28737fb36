"""DPO of low-rank pairs beside weights that stay: ring attention over four virtual CPU devices.

Data:      python scripts/make_preferences.py --output=runs/preferences
Command:   python -m ringbpt.train --config=configs/lora.py
Hardware:  two CPU cores; nothing is downloaded
Expected:  the chosen answer has the greater reward in 99 % of the held-out pairs after 150 steps, one minute; the loss
           begins at 0.6931. runs/<run>/adapter is what it leaves
"""

from ml_collections import ConfigDict

from ringbpt.config import load_recipe


def get_config() -> ConfigDict:
    config = load_recipe("configs/dpo.py")
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.optimizer.adamw_optimizer.lr = 5e-3
    return config
