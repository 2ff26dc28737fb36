"""GRPO finds a key in prompts of 1,024 tokens: short prompts first, from random weights, and then the long ones.

Data:      python scripts/make_prompts.py --task=passkey --length=64 --output=runs/passkeys_short
           python scripts/make_prompts.py --task=passkey --output=runs/passkeys
Command:   python -m ringbpt.train --config=configs/grpo_passkey.py --logger.experiment_id=passkeys_short \
               --rollout.prompts=runs/passkeys_short/prompts.jsonl --train_dataset.json_dataset.seq_length=128 \
               --rollout.prompts_per_step=16 --total_steps=800 --policy.entropy_coefficient=0.05 \
               --optimizer.adamw_optimizer.lr_decay_steps=800
           python -m ringbpt.train --config=configs/grpo_passkey.py --load_checkpoint=params::runs/passkeys_short
Hardware:  two CPU cores; nothing is downloaded
Expected:  the mean reward of the short ones, a share of the key's two characters, from 0.01 to 0.99 in 500 steps, and
           of the long ones from 0.74 to 0.99 in 30; eight minutes in all
"""

from ml_collections import ConfigDict

from ringbpt.config import load_recipe


def get_config() -> ConfigDict:
    config = load_recipe("configs/grpo.py")
    config.total_steps = 60
    config.policy.entropy_coefficient = 0.02  # or the key's second half is guessed before it is looked for

    config.rollout.prompts = "runs/passkeys/prompts.jsonl"
    config.rollout.reward = "scripts/make_prompts.py:found_key"
    config.rollout.prompts_per_step = 8
    config.rollout.samples_per_prompt = 32
    config.rollout.max_new_tokens = 2
    config.train_dataset.json_dataset.seq_length = 1088

    config.llama.hidden_size = 64
    config.llama.intermediate_size = 128
    config.llama.theta = 1e6  # turns so slow that half of a head tells what a token is, at any distance here
    config.llama.max_sequence_length = 1088
    config.llama.scan_query_chunk_size = 272
    config.llama.scan_key_chunk_size = 272
    config.llama.scan_mlp_chunk_size = 272
    config.llama.loss_chunk_size = 272

    adamw = config.optimizer.adamw_optimizer
    adamw.lr = 2e-3
    adamw.lr_decay_steps = 1200
    return config
