"""GRPO with a tool: a model learns to search a text that it doesn't see for the word that it is asked about, and to say
the key that it finds there; ring attention over four virtual CPU devices.

Data:      python scripts/environments.py --output=runs/search
Command:   python -m ringbpt.train --config=configs/agent.py
Hardware:  two CPU cores; nothing is downloaded
Expected:  the mean reward, half of which is for the word and half for the key, from 0.01 to 0.9 and
           more in 300 steps, three to six minutes
"""

from ml_collections import ConfigDict

from ringbpt.config import load_recipe


def get_config() -> ConfigDict:
    config = load_recipe("configs/grpo.py")
    config.total_steps = 300
    config.tokenizer.vocab_file = "runs/search"
    config.llama.vocab_size = 29
    config.llama.hidden_size = 64
    config.llama.intermediate_size = 128
    config.llama.initializer_range = 0.1  # what is near is looked at from the first step on, and not after hundreds

    config.rollout.prompts = "runs/search/prompts.jsonl"
    config.rollout.reward = ""
    config.rollout.environment = "scripts/environments.py:Search"
    config.rollout.max_turns = 2
    config.rollout.max_new_tokens = 3
    config.rollout.prompts_per_step = 16
    config.rollout.samples_per_prompt = 16
    config.policy.entropy_coefficient = 0.1  # or a word is settled on before the one that was asked for is looked at
    config.train_dataset.json_dataset.seq_length = 320
    config.optimizer.adamw_optimizer.lr = 2e-3
    config.optimizer.adamw_optimizer.lr_decay_steps = config.total_steps
    return config
