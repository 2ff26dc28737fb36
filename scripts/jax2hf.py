"""Converts weights of ours into a Hugging Face folder, for transformers, vLLM and sglang:

    python scripts/jax2hf.py --load_checkpoint=params::runs/<run> --output_dir=/path/hf_folder

PREFIX::PATH as in ringbpt.train: a run, one of its steps, what scripts/hf2jax.py wrote, or a GGUF file. The model's
flags are read from the run's config.json; tokenizer and chat template come from --huggingface_dir, or from what the run
started from.
"""

import sys

from ringbpt.config import DTYPES, Flag, check_writable, choices, printed_help, read_flags, run_main, user_path

FLAGS = {
    "load_checkpoint": Flag(str, "", "PREFIX::PATH", prefixes=choices("load_checkpoint"), required=True),
    "output_dir": Flag(str, "", "the folder to write", required=True),
    "huggingface_dir": Flag(str, "", "whose config.json and tokenizer go along"),
    "adapter": Flag(str, "", "a run's adapter folder, or any of PEFT's layout: added to the weights"),
    "dtype": Flag(str, "", "empty: as stored", choices=("", *dict.fromkeys(DTYPES.values()))),
    "max_shard_gb": Flag(float, 5.0, "of an output file", above=0, at_most=1 << 20),
    "verify": Flag(bool, False, "compare logits with transformers (needs torch)"),
}


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    flags = read_flags(argv, FLAGS)
    output = user_path(flags["output_dir"])
    check_writable("--output_dir", output)
    tokenizer = user_path(flags["huggingface_dir"]) if flags["huggingface_dir"] else None
    adapter = user_path(flags["adapter"]) if flags["adapter"] else None
    from ringbpt.checkpoint.export import report_merged, report_parity, to_huggingface
    from ringbpt.mesh import choose_platform

    choose_platform()
    limit = int(flags["max_shard_gb"] * (1 << 30))
    to_huggingface(flags["load_checkpoint"], output, tokenizer, flags["dtype"], limit, adapter)
    print(f"wrote {output}")
    if adapter:
        print(report_merged(flags["load_checkpoint"], adapter, output))
    if flags["verify"]:
        print(report_parity(flags["load_checkpoint"], output, adapter))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
