"""DPO of low-rank pairs beside weights in 4 bits: ring attention over four virtual CPU devices.

Data:      python scripts/make_preferences.py --output=runs/preferences
Command:   python -m ringbpt.train --config=configs/qlora.py
Hardware:  two CPU cores; nothing is downloaded
Expected:  as configs/lora.py, in two to three minutes: the model is twice as wide
"""

from ml_collections import ConfigDict

from ringbpt.config import load_recipe


def get_config() -> ConfigDict:
    config = load_recipe("configs/lora.py")
    config.llama.hidden_size = 256  # a block of 64 on each of the four devices
    config.lora.base_dtype = "nf4"
    config.lora.double_quantization = True
    return config
