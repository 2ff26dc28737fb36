r"""Finding a number again that was read up to a thousand tokens ago: a small byte model, RoPE, full attention.

Command:   python scripts/make_passkey.py --output=data/passkey.jsonl
           python -m ringbpt.train --config=configs/passkey.py
           python -m ringbpt.evaluate --load_checkpoint=params::runs/passkey --passkey=256,512,1024 --samples=20 \
               --num_cpu_devices=8 --output=runs/passkey
Hardware:  two CPU cores; nothing is downloaded
Expected:  with the sequence over eight devices, 100 % of the keys found at 256, 512 and 1,024 tokens, 20 at each of
           five depths, in files that were held out; training took 18 minutes on one core that was shared with other
           work (13 minutes of processor time), and it is made for two

Training wants no ring here: documents are packed, two rows on each of two devices. What makes it quick is that only
what can be known takes loss, which is the key where it is said again, once nearby and once at the end; and that the
first texts are short, so that there are many of them in a row.
"""

from ml_collections import ConfigDict

from ringbpt.config import default_config


def get_config() -> ConfigDict:
    config = default_config("debug")
    config.mesh_dim = "2,1,1,1"
    config.num_cpu_devices = 2
    config.dtype = "fp32"
    config.total_steps = 1800
    config.logger.experiment_id = "passkey"
    config.log_freq = 20
    config.checkpointer.float_dtype = "fp32"
    config.tokenizer.vocab_file = "bytes"

    config.llama.vocab_size = 264
    config.llama.hidden_size = 96
    config.llama.intermediate_size = 192
    config.llama.num_hidden_layers = 3
    config.llama.num_attention_heads = 4
    config.llama.head_dim = 32
    config.llama.theta = 1e6  # turns so slow that half of a head tells what a token is, at any distance here
    config.llama.max_sequence_length = 1024
    config.llama.scan_query_chunk_size = 128
    config.llama.scan_key_chunk_size = 128
    config.llama.loss_chunk_size = 1024

    config.train_dataset.type = "json"
    config.train_dataset.packing = "first_fit"
    config.train_dataset.text_processor.fields = "[given],again,[between],answer"
    config.train_dataset.json_dataset.path = "data/passkey.jsonl"
    config.train_dataset.json_dataset.seq_length = 1024
    config.train_dataset.json_dataset.batch_size = 4

    adamw = config.optimizer.adamw_optimizer
    adamw.lr = 3e-3
    adamw.end_lr = 1e-4
    adamw.lr_warmup_steps = 50
    adamw.lr_decay_steps = config.total_steps
    adamw.b2 = 0.98
    adamw.weight_decay = 0.0
    return config
