"""GRPO: a model answers, a program says what the answers are worth; ring attention over four virtual CPU devices.

Data:      python scripts/make_prompts.py --output=runs/prompts
Command:   python -m ringbpt.train --config=configs/grpo.py
Hardware:  two CPU cores; nothing is downloaded
Expected:  the mean reward, the share of an answer's characters that are of the kind asked for, from 0.1 to 0.99
           in 150 steps, two to three minutes. runs/<run>/rollouts has what was sampled
"""

from ml_collections import ConfigDict

from ringbpt.config import default_config


def get_config() -> ConfigDict:
    config = default_config("debug")
    config.objective = "grpo"
    config.mesh_dim = "1,1,1,-1"
    config.num_cpu_devices = 4
    config.dtype = "fp32"
    config.total_steps = 150
    config.log_freq = 10
    config.tokenizer.vocab_file = "bytes"
    config.llama.vocab_size = 288

    config.rollout.prompts = "runs/prompts/prompts.jsonl"
    config.rollout.reward = "scripts/make_prompts.py:reward"
    config.rollout.prompts_per_step = 12
    config.rollout.samples_per_prompt = 8
    config.rollout.max_new_tokens = 12
    config.train_dataset.json_dataset.seq_length = 512
    config.optimizer.adamw_optimizer.lr = 1.5e-3
    return config
