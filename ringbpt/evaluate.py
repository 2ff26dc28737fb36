"""`python -m ringbpt.evaluate`: what a checkpoint knows, on any mesh: numbers as JSON, pictures as PNG.

--load_checkpoint=huggingface::DIR --perplexity=texts.jsonl    loss and perplexity by position
--load_checkpoint=params::runs/<run> --passkey=512,1024        keys found, over length and depth
--load_checkpoint=... --choices=questions.jsonl                log-likelihood of {"prompt", "choices", "answer"}
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ringbpt.checkpoint.given import MODEL_FLAGS, start_model
from ringbpt.config import (
    JSON,
    Flag,
    UserError,
    check_folders,
    check_writable,
    json_to,
    printed_help,
    read_flags,
    run_main,
    user_path,
)
from ringbpt.config.fields import LARGEST_POSITION
from ringbpt.config.foreign import shown

FLAGS = MODEL_FLAGS | {
    "perplexity": Flag(str, "", 'a .jsonl file of {"text"}, or "python": source files held out from training'),
    "seq_length": Flag(int, 1024, "of perplexity: longer texts are cut", at_least=1, at_most=LARGEST_POSITION),
    "batches": Flag(int, 8, "of perplexity, at most", at_least=1),
    "buckets": Flag(int, 32, "of positions", at_least=1, at_most=1 << 20),
    "passkey": Flag(str, "", "lengths in tokens, as 512,1024"),
    "depths": Flag(int, 5, "how many depths, from the start of the text to its end", at_least=1, at_most=1000),
    "samples": Flag(int, 8, "texts for each length and depth", at_least=1, at_most=10000),
    "choices": Flag(str, "", "a .jsonl file of questions"),
    "batch_size": Flag(int, 8, "rows at a time", at_least=1, at_most=1 << 20),
    "seed": Flag(int, 0, "of the passkeys", at_least=0),
    "output": Flag(str, "evaluation", "the folder for results.json, passkey.png, perplexity.png, choices.jsonl"),
    "json": JSON,
}


def read_lengths(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[1-9][0-9]{0,9}", part) for part in parts):
        raise UserError(f"--passkey={shown(text)} is no list of lengths: as --passkey=512,1024")
    return [int(part) for part in parts]


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    flags = read_flags(argv, FLAGS)
    if not any(flags[name] for name in ("perplexity", "passkey", "choices")):
        raise UserError("give at least one of --perplexity=FILE, --passkey=LENGTHS and --choices=FILE")
    check_folders(flags, "json")
    check_writable("--output", user_path(flags["output"]))
    lengths = read_lengths(flags["passkey"]) if flags["passkey"] else []
    from ringbpt.checkpoint.load import describe_predicting
    from ringbpt.evaluation.choices import read_choices, report_choices
    from ringbpt.evaluation.passkey import report_passkeys
    from ringbpt.evaluation.perplexity import read_texts, report_perplexity
    from ringbpt.evaluation.score import Scorer
    from ringbpt.evaluation.texts import LONGEST, room_of
    from ringbpt.generation.generator import check_vocabulary
    from ringbpt.generation.text import find_tokenizer

    rows = read_choices(Path(flags["choices"])) if flags["choices"] else []
    found = describe_predicting(flags["load_checkpoint"])
    longest = flags["max_sequence_length"] or found.architecture.max_sequence_length
    if lengths and max(lengths) > min(longest, LONGEST):
        works = min(longest, LONGEST)
        raise UserError(
            f"--passkey={flags['passkey']} is more than the {works} tokens that there may be: --passkey={works}"
        )
    tokenizer = find_tokenizer(found, flags["tokenizer"], flags["chat_template"])

    def encode(text: str) -> np.ndarray:
        tokens = tokenizer.encode_prompt(text)
        check_vocabulary([tokens], found.architecture.vocab_size)  # a device does not notice an id that is none
        return tokens

    for length in lengths:
        room_of(length - 1, lambda text: len(tokenizer.encode_prompt(text)))
    texts = read_texts(flags["perplexity"]) if flags["perplexity"] else []
    for text in (*texts[:1], *(row["prompt"] for row in rows[:1])):
        encode(text)
    with json_to(flags["json"]) as write:
        model, params = start_model(flags)
        scorer = Scorer(model, flags["batch_size"])
        output, name = user_path(flags["output"]), flags["load_checkpoint"].rpartition("::")[2]
        output.mkdir(parents=True, exist_ok=True)
        results: dict[str, Any] = {"load_checkpoint": flags["load_checkpoint"], "mesh": list(model.mesh.shape.values())}
        if flags["perplexity"]:
            file, limit, batches, buckets = (flags[x] for x in ("perplexity", "seq_length", "batches", "buckets"))
            results["perplexity"] = report_perplexity(
                scorer, params, encode, texts, file, limit, batches, buckets, output, name
            )
        if lengths:
            depths, samples, seed = (flags[name] for name in ("depths", "samples", "seed"))
            results["passkey"] = report_passkeys(scorer, params, encode, lengths, depths, samples, seed, output, name)
        if rows:
            results["choices"] = report_choices(scorer, params, encode, rows, output)
        report = json.dumps(results, indent=1) + "\n"
        (output / "results.json").write_text(report)
        print(f"wrote {output}/results.json")
        write(report)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
