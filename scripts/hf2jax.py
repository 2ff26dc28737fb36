"""Converts a Hugging Face folder, or a GGUF file, into weights for training, a tensor at a time:

    python scripts/hf2jax.py --checkpoint_dir=/path/hf_folder --output_file=/path/output
    python -m ringbpt.train --load_checkpoint=params::/path/output ...

The output is a folder; config, tokenizer and chat template go along, for scripts/jax2hf.py and ringbpt.generate.
Without this step, --load_checkpoint=huggingface::/path/hf_folder loads straight onto the mesh.
"""

import sys

from ringbpt.config import (
    DTYPES,
    PRESETS,
    Flag,
    UserError,
    check_writable,
    printed_help,
    read_flags,
    run_main,
    user_path,
)

FLAGS = {
    "checkpoint_dir": Flag(str, "", "a Hugging Face folder with safetensors, or a .gguf file", required=True),
    "output_file": Flag(str, "", "the folder to write", required=True),
    "model_size": Flag(str, "", "7b, 13b, ...: if given, checked against config.json"),
    "streaming": Flag(bool, True, "always: accepted for old commands"),
    "dtype": Flag(str, "", "empty: each tensor's own", choices=("", *dict.fromkeys(DTYPES.values()))),
    "max_shard_gb": Flag(float, 5.0, "of an output file", above=0, at_most=1 << 20),
    "verify": Flag(bool, False, "compare logits with transformers (needs torch)"),
}


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    flags = read_flags(argv, FLAGS)
    source, output, size = user_path(flags["checkpoint_dir"]), user_path(flags["output_file"]), flags["model_size"]
    if size and size not in PRESETS:
        raise UserError(f"--model_size={size} is none of {', '.join(PRESETS)}: leave it out")
    check_writable("--output_file", output)
    from ringbpt.checkpoint.huggingface import open_folder, to_ours
    from ringbpt.mesh import choose_platform

    choose_platform()
    llama = open_folder(source).architecture
    for name, value in PRESETS.get(size, {}).items():
        if name != "rms_norm_eps" and getattr(llama, name) != value:
            raise UserError(f"--model_size={size} has {name}={value}, the folder {getattr(llama, name)}: leave it out")
    to_ours(source, output, flags["dtype"], int(flags["max_shard_gb"] * (1 << 30)))
    print(f"wrote {output}: --load_checkpoint=params::{output}")
    if flags["verify"]:
        from ringbpt.checkpoint.export import report_parity

        print(report_parity(f"params::{output}", source))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
