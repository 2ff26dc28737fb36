"""Trains a SentencePiece or a Hugging Face BPE tokenizer on any source that training reads.

python scripts/train_tokenizer.py --output=tok.model --vocab_size=32000 <flags of ringbpt.train for train_dataset>
python scripts/train_tokenizer.py --output=DIR --kind=bpe --vocab_size=32000 <the same>
"""

import os
import sys

from ringbpt.config import (
    Flag,
    UserError,
    check_writable,
    parse,
    parse_args,
    printed_help,
    run_main,
    split_flags,
    user_path,
)
from ringbpt.config.fields import LARGEST_VOCABULARY

FLAGS = {
    "output": Flag(str, "", "a .model file (sentencepiece), or a new folder (bpe)"),
    "kind": Flag(str, "sentencepiece", "sentencepiece or bpe", choices=("sentencepiece", "bpe")),
    "vocab_size": Flag(int, 32000, "how many tokens", at_least=1, at_most=LARGEST_VOCABULARY),
    "max_examples": Flag(int, 1_000_000, "how many examples are read at most", at_least=1),
}


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    own, rest = split_flags(argv, FLAGS)
    output = user_path(own["output"])
    if not own["output"] or os.path.lexists(output):
        raise UserError(f"--output={own['output']!r} is empty or there already: give a new name")
    check_writable("--output", output)
    if not output.parent.is_dir():
        raise UserError(f"--output={own['output']!r}: there is no folder {output.parent}: make it first")
    dataset = parse(parse_args([*rest, "--mesh_dim=1,1,1,1"]), 1).train_dataset
    from ringbpt.data.text.train_tokenizer import train

    train(dataset, output, own["kind"], own["vocab_size"], own["max_examples"])
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
