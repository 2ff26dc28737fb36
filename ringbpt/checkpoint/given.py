"""The model that a command is given: its flags, and the checkpoint brought up on the mesh that they name."""

from typing import Any

from ringbpt.config import DTYPES, RUN_FLAGS, Flag, UserError, default_config, parse_mesh_dim, user_path
from ringbpt.config.fields import LARGEST_POSITION

MODEL_FLAGS = {
    "load_checkpoint": Flag(
        str,
        "",
        "huggingface::DIR (or a name on the hub), gguf::FILE, or params::PATH of a run, a step, or hf2jax.py's output",
        prefixes=RUN_FLAGS["load_checkpoint"].prefixes,
        required=True,
    ),
    "adapter": Flag(str, "", "a folder in PEFT's layout, as runs/<run>/adapter, beside the checkpoint's weights"),
    "chat_template": Flag(str, "", "of conversations: chatml, a .jinja file; empty: the tokenizer's own"),
    "tokenizer": Flag(
        str, "", "bytes, a .model or .gguf file, a Hugging Face folder; empty: what the checkpoint came with"
    ),
    "mesh_dim": Flag(str, "1,1,1,-1", "dp,fsdp,tp,sp: sp splits prompts and cache, tp the heads, dp the batch"),
    "num_cpu_devices": Flag(int, 0, "virtual CPU devices, where there is no accelerator", at_least=0, at_most=4096),
    "dtype": Flag(str, "fp32", "of weights, computation and cache", choices=tuple(DTYPES)),
    "max_sequence_length": Flag(
        int, 0, "prompt and completion together; 0: what the model was made for", at_least=0, at_most=LARGEST_POSITION
    ),
}


def start_model(flags: dict[str, Any]) -> tuple[Any, Any]:
    """(the model, its params) for MODEL_FLAGS."""
    from ringbpt.checkpoint.load import load_model
    from ringbpt.mesh import start_jax

    tree = default_config()
    tree.num_cpu_devices = flags["num_cpu_devices"]
    mesh_shape, _ = parse_mesh_dim(flags["mesh_dim"], start_jax(tree))
    longest = {"max_sequence_length": flags["max_sequence_length"]} if flags["max_sequence_length"] else {}
    adapter = user_path(flags["adapter"]) if flags["adapter"] else None
    model, params = load_model(flags["load_checkpoint"], mesh_shape, DTYPES[flags["dtype"]], adapter=adapter, **longest)
    if model.architecture.head == "score":
        raise UserError(f"--adapter={flags['adapter']} has a score head: a reward model's, which predicts no tokens")
    return model, params
