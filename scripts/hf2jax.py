"""Converts a Hugging Face folder into weights for training, a tensor at a time:

    python scripts/hf2jax.py --checkpoint_dir=/path/hf_folder --output_file=/path/output
    python -m ringbpt.train --load_checkpoint=params::/path/output ...

The output is a folder; config, tokenizer and chat template go along, for scripts/jax2hf.py and ringbpt.generate.
Without this step, --load_checkpoint=huggingface::/path/hf_folder loads straight onto the mesh.
"""

import argparse
import sys
from pathlib import Path

from ringbpt.config import PRESETS, UserError, run_main


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="a Hugging Face folder with safetensors")
    parser.add_argument("--output_file", type=Path, required=True, help="the folder to write")
    parser.add_argument("--model_size", default="", help="7b, 13b, ...: if given, checked against config.json")
    parser.add_argument(
        "--streaming", nargs="?", const="True", default="True", help="always: accepted for old commands"
    )
    parser.add_argument("--dtype", default="", choices=["", "fp32", "bf16", "fp16"], help="default: each tensor's own")
    parser.add_argument("--max_shard_gb", type=float, default=5.0)
    parser.add_argument("--verify", action="store_true", help="compare logits with transformers (needs torch)")
    args = parser.parse_args(argv)
    from ringbpt.convert.hf import open_huggingface, to_ours

    _, _, llama = open_huggingface(args.checkpoint_dir)
    sizes = PRESETS.get(args.model_size, {})
    if args.model_size and not sizes:
        raise UserError(f"--model_size={args.model_size} is none of {', '.join(PRESETS)}: leave it out")
    for name, value in sizes.items():
        if name != "rms_norm_eps" and getattr(llama, name) != value:
            raise UserError(
                f"--model_size={args.model_size} has {name}={value}, the folder {getattr(llama, name)}: leave it out"
            )
    to_ours(args.checkpoint_dir, args.output_file, args.dtype, int(args.max_shard_gb * (1 << 30)))
    print(f"wrote {args.output_file}: --load_checkpoint=params::{args.output_file}")
    if args.verify:
        from ringbpt.generation.load import report_parity

        print(report_parity(f"params::{args.output_file}", args.checkpoint_dir))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
