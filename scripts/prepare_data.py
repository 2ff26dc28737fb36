"""Any data, tokenised and packed ahead of training: rows with a manifest, by many processes, restartable.

python scripts/prepare_data.py --output=DIR <flags of ringbpt.train for the tokenizer and train_dataset>
python scripts/prepare_data.py --output=owt.jsonl --openwebtext          # the text itself, from the Hugging Face hub

Training then reads it by --train_dataset.type=tokens --train_dataset.files_dataset.path=DIR.
"""

import sys

from ringbpt.config import (
    DatasetConfig,
    Flag,
    HuggingfaceDatasetConfig,
    UserError,
    check_writable,
    parse,
    parse_args,
    printed_help,
    run_main,
    split_flags,
    user_path,
)

FLAGS = {
    "output": Flag(str, "", "a new folder for packed rows; or a .jsonl file, for the examples as they are"),
    "processes": Flag(int, 1, "worker processes that write rows", at_least=1, at_most=1024),
    "openwebtext": Flag(bool, False, "OpenWebText of the hub, whatever train_dataset says"),
}


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    own, rest = split_flags(argv, FLAGS)
    if not own["output"]:
        raise UserError("--output is empty: give a new folder, or a .jsonl file")
    output = user_path(own["output"])
    check_writable("--output", output, folder=output.suffix != ".jsonl")
    from ringbpt.data.loader import cache_folder
    from ringbpt.data.reading.catalogue import make_source, parts_of
    from ringbpt.data.stored.prepare import prepare, write_jsonl

    hub = HuggingfaceDatasetConfig(path="Skylion007/openwebtext")
    if own["openwebtext"]:
        rest += ["--train_dataset.type=huggingface", f"--train_dataset.huggingface_dataset.path={hub.path}"]
    if output.suffix == ".jsonl":
        tree = parse_args(rest)
        dataset = DatasetConfig(type="huggingface", huggingface_dataset=hub)
        if not own["openwebtext"]:
            dataset = parse(tree, 1).train_dataset
        parts, cache = parts_of(dataset, "train_dataset"), cache_folder(dataset)
        write_jsonl([make_source(dataset, part, cache, "train_dataset") for part in parts], output)
        return 0
    config = parse(parse_args(rest), 1)
    settings = {"seed": config.seed, "vocab_size": config.architecture.vocab_size, "processes": own["processes"]}
    prepare(config.train_dataset, config.tokenizer, output, **settings)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
