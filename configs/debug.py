"""The main job in small: ring attention over eight virtual CPU devices, on the source of Python's standard library.

Command:   python -m ringbpt.train          (the same as: python -m ringbpt.train --config=configs/debug.py)
Hardware:  two CPU cores; nothing is downloaded
Expected:  held-out bits per byte falls from 8.15 to 2.59 in 250 steps, 5 to 8 minutes
"""

from ml_collections import ConfigDict

from ringbpt.config import default_config


def get_config() -> ConfigDict:
    config = default_config("debug")
    config.mesh_dim = "1,1,1,-1"
    config.num_cpu_devices = 8
    config.dtype = "fp32"
    config.total_steps = 250
    config.log_freq = 10
    config.eval_steps = 50
    config.eval_batches = 4
    config.tokenizer.vocab_file = "bytes"

    config.llama.vocab_size = 288
    config.llama.max_sequence_length = 1024
    config.llama.scan_query_chunk_size = 32
    config.llama.scan_key_chunk_size = 32
    config.llama.scan_mlp = True
    config.llama.scan_mlp_chunk_size = 32
    config.llama.loss_chunk_size = 32
    config.llama.remat_block = "save_attention"

    for dataset in (config.train_dataset, config.eval_dataset):
        dataset.type = "python"
        dataset.packing = "first_fit"
        dataset.python_dataset.seq_length = 256
        dataset.python_dataset.batch_size = 32
    config.train_dataset.shuffle = True
    config.eval_dataset.python_dataset.split = "heldout"

    adamw = config.optimizer.adamw_optimizer
    adamw.lr = 4e-3
    adamw.end_lr = 4e-4
    adamw.lr_warmup_steps = 30
    adamw.lr_decay_steps = config.total_steps
    adamw.weight_decay = 0.1
    return config
