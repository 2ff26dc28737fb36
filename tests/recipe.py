"""The debug recipe with sizes of its own, so that the configuration's tests don't move with its tuning."""

from ml_collections import ConfigDict

from ringbpt.config import load_recipe


def get_config() -> ConfigDict:
    config = load_recipe("configs/debug.py")
    config.total_steps = 500
    config.eval_steps = 100
    config.llama.remat_block = "nothing_saveable"
    for name in ("scan_query_chunk_size", "scan_key_chunk_size", "scan_mlp_chunk_size", "loss_chunk_size"):
        config.llama[name] = 64
    for dataset in (config.train_dataset, config.eval_dataset):
        dataset.python_dataset.seq_length = 512
        dataset.python_dataset.batch_size = 32
    adamw = config.optimizer.adamw_optimizer
    adamw.lr, adamw.end_lr = 2e-3, 2e-4
    adamw.lr_warmup_steps, adamw.lr_decay_steps = 50, 500
    return config
