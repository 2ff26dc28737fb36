"""Trains a SentencePiece or a Hugging Face BPE tokenizer on any source that training reads.

python scripts/train_tokenizer.py --output=tok.model --vocab_size=32000 <flags of ringbpt.train for train_dataset>
python scripts/train_tokenizer.py --output=DIR --kind=bpe --vocab_size=32000 <the same>
"""

import sys
from pathlib import Path

from ringbpt.config import Flag, UserError, parse, parse_args, printed_help, run_main, split_flags

FLAGS = {
    "output": Flag(str, "", "a .model file (sentencepiece), or a new folder (bpe)"),
    "kind": Flag(str, "sentencepiece", "sentencepiece or bpe"),
    "vocab_size": Flag(int, 32000, "how many tokens"),
    "max_examples": Flag(int, 1_000_000, "how many examples are read at most"),
}


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    own, rest = split_flags(argv, FLAGS)
    if not own["output"] or Path(own["output"]).exists():
        raise UserError(f"--output={own['output']!r} is empty or there already: give a new name")
    dataset = parse(parse_args([*rest, "--mesh_dim=1,1,1,1"]), 1).train_dataset
    from ringbpt.data.text.train_tokenizer import KINDS, train

    if own["kind"] not in KINDS:
        raise UserError(f"--kind={own['kind']} is none of {', '.join(KINDS)}: try --kind=sentencepiece")
    train(dataset, Path(own["output"]), own["kind"], own["vocab_size"], own["max_examples"])
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
