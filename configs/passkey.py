"""Finding a number again that was read up to a thousand tokens ago: a small byte model, RoPE, full attention.

Command:   python scripts/make_passkey.py --output=data/passkey.jsonl
           python -m ringbpt.train --config=configs/passkey.py
           python -m ringbpt.evaluate --load_checkpoint=params::runs/passkey --passkey=256,512,1024 --num_cpu_devices=8
Hardware:  two CPU cores; nothing is downloaded
Expected:  no figure yet: a run of this course to its end has not been seen
"""

from ml_collections import ConfigDict

from ringbpt.config import default_config


def get_config() -> ConfigDict:
    config = default_config("debug")
    config.mesh_dim = "1,1,1,-1"
    config.num_cpu_devices = 8
    config.dtype = "fp32"
    config.total_steps = 830
    config.logger.experiment_id = "passkey"
    config.log_freq = 20
    config.tokenizer.vocab_file = "bytes"

    config.llama.vocab_size = 264
    config.llama.hidden_size = 96
    config.llama.intermediate_size = 192
    config.llama.num_hidden_layers = 3
    config.llama.num_attention_heads = 4
    config.llama.max_sequence_length = 1024
    config.llama.attention_type = "ring_blockwise"
    config.llama.scan_query_chunk_size = 256
    config.llama.scan_key_chunk_size = 256
    config.llama.loss_chunk_size = 1024

    config.train_dataset.type = "json"
    config.train_dataset.packing = "first_fit"
    config.train_dataset.text_processor.fields = "[before],needle,[after],question,answer"
    config.train_dataset.json_dataset.path = "data/passkey.jsonl"
    config.train_dataset.json_dataset.seq_length = 1024
    config.train_dataset.json_dataset.batch_size = 8

    adamw = config.optimizer.adamw_optimizer
    adamw.lr = 4e-3
    adamw.end_lr = 3e-4
    adamw.lr_warmup_steps = 40
    adamw.lr_decay_steps = config.total_steps
    adamw.weight_decay = 0.01
    return config
