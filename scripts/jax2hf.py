"""Converts weights of ours into a Hugging Face folder, for transformers, vLLM and sglang:

    python scripts/jax2hf.py --load_checkpoint=params::runs/<run> --output_dir=/path/hf_folder

PREFIX::PATH as in ringbpt.train: a run, one of its steps, or what scripts/hf2jax.py wrote. The model's flags are read
from the run's config.json; tokenizer and chat template come from --huggingface_dir, or from what the run started from.
"""

import argparse
import sys
from pathlib import Path

from ringbpt.config import run_main


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load_checkpoint", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--huggingface_dir", type=Path, default=None, help="whose config.json and tokenizer go along")
    parser.add_argument("--dtype", default="", choices=["", "fp32", "bf16", "fp16"], help="default: as stored")
    parser.add_argument("--max_shard_gb", type=float, default=5.0)
    parser.add_argument("--verify", action="store_true", help="compare logits with transformers (needs torch)")
    args = parser.parse_args(argv)
    from ringbpt.generation.load import report_parity, to_huggingface

    limit = int(args.max_shard_gb * (1 << 30))
    to_huggingface(args.load_checkpoint, args.output_dir, args.huggingface_dir, args.dtype, limit)
    print(f"wrote {args.output_dir}")
    if args.verify:
        print(report_parity(args.load_checkpoint, args.output_dir))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
