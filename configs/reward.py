"""A reward model on pairs of answers: one score of each text, under ring attention, many pairs a row.

Data:      python scripts/make_preferences.py --output=runs/preferences
Command:   python -m ringbpt.train --config=configs/reward.py
Hardware:  two CPU cores; nothing is downloaded
Expected:  the chosen answer has the larger score in 99 % of the held-out pairs after 300 steps, two minutes;
           rewards.png shows how sure the model is of them, and how rightly
"""

from ml_collections import ConfigDict

from ringbpt.config import default_config


def get_config() -> ConfigDict:
    config = default_config("debug")
    config.objective = "reward"
    config.mesh_dim = "1,1,1,-1"
    config.num_cpu_devices = 4
    config.dtype = "fp32"
    config.total_steps = 300
    config.log_freq = 10
    config.eval_steps = 25
    config.tokenizer.vocab_file = "bytes"
    config.llama.vocab_size = 288

    for dataset, file in ((config.train_dataset, "pairs"), (config.eval_dataset, "pairs_held_out")):
        dataset.json_dataset.path = f"runs/preferences/{file}.jsonl"
        dataset.json_dataset.seq_length = 512
        dataset.json_dataset.batch_size = 4
    config.train_dataset.shuffle = True
    config.optimizer.adamw_optimizer.lr = 1e-3
    return config
