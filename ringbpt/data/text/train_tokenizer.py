"""Tokenizers made of a data set's own text, as LLaMA's are: BPE that falls back to bytes, digits apart."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from ringbpt.config import DatasetConfig, TextProcessorConfig, UserError, one_line, printable
from ringbpt.data.loader import cache_folder
from ringbpt.data.reading.catalogue import make_source, parts_of
from ringbpt.data.reading.files import optional
from ringbpt.data.text.shapes import SHAPES

SPECIAL = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2, as in LLaMA's own


def texts_of(
    dataset: DatasetConfig,
    most: int,
    flag: str = "train_dataset",
    say: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[str]:
    """Every text of the first `most` examples of each part: the `fields` that are named, else all there are.

    say(done, total) is told how many examples of all have been read.
    """
    wanted = _field_names(dataset.text_processor)
    sources = [make_source(dataset, part, cache_folder(dataset), flag) for part in parts_of(dataset, flag)]
    counts = [min(most, len(source)) for source in sources]
    examples = (source[index] for source, count in zip(sources, counts, strict=True) for index in range(count))
    for done, example in enumerate(examples, start=1):
        chosen = [example.get(key) for key in wanted] if wanted else [example]
        yield from _strings(chosen)
        say(done, sum(counts))


def _field_names(processor: TextProcessorConfig) -> list[str]:
    segments = (part.strip().strip("[]") for part in processor.fields.split(","))
    return [key for part in segments if part and not part.startswith("<|") for key in part.split("+")]


def _strings(value: object) -> Iterator[str]:
    """The texts inside of an example, however deep; of messages, what was said."""
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, dict):
        named = {key for keys in SHAPES.values() for key in keys} | {"content", "value", "input", "output", "system"}
        yield from (text for key, item in value.items() if key in named for text in _strings(item))
    elif isinstance(value, list):
        yield from (text for item in value for text in _strings(item))


def train_sentencepiece(texts: Iterator[str], output: Path, vocab_size: int) -> None:
    import sentencepiece

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.split("\n") if line.strip()),
            model_prefix=str(output.with_suffix("")),
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",  # what is read comes back as it was
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 16,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(f"--vocab_size={vocab_size}: {one_line(error)}") from None
    if output.suffix != ".model":
        output.with_suffix(".model").rename(output)


def train_bpe(texts: Iterator[str], output: Path, vocab_size: int) -> None:
    tokenizers = optional("tokenizers", "--kind=bpe")
    from tokenizers import decoders, models, pre_tokenizers, trainers

    fast = tokenizers.Tokenizer(models.BPE())
    digits, by_bytes = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([digits, by_bytes])
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(texts, trainer)
    output.mkdir(parents=True)
    fast.save(str(output / "tokenizer.json"))
    settings = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "unk_token": SPECIAL[0]}
    (output / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))


KINDS = {"sentencepiece": train_sentencepiece, "bpe": train_bpe}


def train(dataset: DatasetConfig, output: Path, kind: str, vocab_size: int, most: int) -> None:
    """Trains a tokenizer of a kind on a data set, and says how far it is and where. Raises UserError."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("reading examples", total=None)

        def say(done: int, total: int) -> None:
            what = "reading examples" if done < total else f"all read, making {vocab_size:,} tokens"
            progress.update(task, completed=done, total=total, description=what)

        KINDS[kind](texts_of(dataset, most, say=say), output, vocab_size)
    print(printable(f"{output}: use it as --tokenizer.vocab_file={output}"))
