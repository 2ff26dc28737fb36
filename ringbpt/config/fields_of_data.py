"""The flags of a data set: what it is read from, how its examples become text, and how documents become rows."""

from dataclasses import dataclass, field
from typing import Any

from ringbpt.config.values import flag

LARGEST_POSITION = 2**31 - 1  # a count that the devices keep in 32 bits


@dataclass(frozen=True)
class TokenizerConfig:
    vocab_file: str = flag("", "bytes, a .model of SentencePiece, a folder of Hugging Face's, or a .gguf", shown="data")


@dataclass(frozen=True)
class TextProcessorConfig:
    """How an example becomes text. Without `fields`, its shape decides, told by its keys (data/text/shapes.py)."""

    fields_from_example: str = flag("", "the key of the example whose value is the `fields` string")
    fields: str = flag("", "'text', or '[prompt],answer': [..] takes no loss; empty: by the shape", shown="data")
    subfield_separator: str = flag(" ", "between the keys joined by + in `fields`")
    add_bos_token: bool = flag(True, "before each text, where the tokenizer itself puts one")
    add_eos_token: bool = flag(True, "after each example")
    prepend_text: str = flag("", "before the text of each example")
    shape: str = flag(
        "",
        "of the examples; empty: told by their keys",
        choices=("", "text", "messages", "sharegpt", "alpaca", "prompt_completion", "preference", "kto", "rl"),
    )
    input_key: str = flag("", "the key of the prompt, or of the messages, where it isn't the usual one")
    output_key: str = flag("", "the key of the completion")
    prompt_key: str = flag("", "the key of the prompt")
    chosen_key: str = ""
    rejected_key: str = ""
    label_key: str = ""
    input_template: str = flag("", "around a prompt that is text: 'User: {}\\nAssistant: '; {key}: a field")
    apply_chat_template: bool = flag(False, "also to prompts and completions that are text")
    chat_template: str = flag("", "of conversations: a .jinja file, chatml; empty: the tokenizer's", shown="data")
    chat_template_kwargs: str = flag("", "for the chat template: 'dict(enable_thinking=False)'; a row's own go before")
    roles_to_train: str = flag("assistant", "whose turns take loss, a,b")
    train_on_eos: str = flag(
        "turn", "which ends of turns take loss: turn (of a trained one)", choices=("turn", "all", "last", "none")
    )


@dataclass(frozen=True)
class SequencesConfig:
    """What every data set says of the sequences that are made of it."""

    seq_length: int = flag(1024, "tokens of a sequence", at_least=1, at_most=LARGEST_POSITION)
    batch_size: int = flag(8, "sequences of the global batch", at_least=1, at_most=LARGEST_POSITION)


@dataclass(frozen=True)
class TextsConfig(SequencesConfig):
    always_start_with_bos: bool = flag(False, "the first token of each row becomes bos")
    tokenizer_processes: int = flag(1, "worker processes; 0 and 1: this one", at_least=0)


@dataclass(frozen=True)
class JsonDatasetConfig(TextsConfig):
    seq_length: int = flag(1024, "tokens of a sequence", at_least=1, at_most=LARGEST_POSITION, shown="data")
    batch_size: int = flag(8, "sequences of the global batch", at_least=1, at_most=LARGEST_POSITION, shown="data")
    path: str = flag("", ".jsonl or .json, also .gz and .zst; a glob; a list a:0.7,b:0.3", shown="data")
    start_seek_loc: int = flag(0, "the byte of the file to start from", at_least=0)
    example_index_at_start: int = flag(0, at_least=0)
    tokens_count_at_start: int = flag(0, at_least=0)
    tokenizer_parallel_chunk_size: int = flag(32, at_least=1)
    tokenizer_parallel_batch_size: int = flag(1024, at_least=1)
    throughput_average_window_size: int = flag(200, at_least=1)


@dataclass(frozen=True)
class HuggingfaceDatasetConfig(TextsConfig):
    path: str = flag("c4", "a data set of the hub")
    name: str = flag("", "its configuration, as en of allenai/c4; empty: it has only one")
    split: str = "train"
    streaming: bool = flag(False, "with max_samples: that many rows are read once and kept")


@dataclass(frozen=True)
class FilesDatasetConfig(TextsConfig):
    path: str = flag("", "files of any format, by their endings; a glob, a folder, a list a,b or a:0.7,b:0.3")
    split: str = flag("train", "of a folder that save_to_disk wrote with several")


@dataclass(frozen=True)
class TfdsDatasetConfig(TextsConfig):
    name: str = flag("", "name, or name/config:version")
    split: str = "train"
    data_dir: str = flag("", "empty: TFDS's own")


@dataclass(frozen=True)
class PythonDatasetConfig(SequencesConfig):
    """The source files of the running Python's standard library: real text that is on every machine."""

    path: str = flag("", "a folder of .py files; empty: the standard library")
    split: str = flag("train", "heldout: one file in 20, by its name", choices=("train", "heldout", "all"))


# What a dataset's type reads; those of the second line go by the group files_dataset.
DATASET_TYPES = ("json", "huggingface", "tfds", "python", "files")
FILE_FORMATS = ("csv", "parquet", "arrow", "text", "array_record", "tokens", "megatron")


@dataclass(frozen=True)
class DatasetConfig:
    type: str = flag("json", "files goes by their endings", choices=(*DATASET_TYPES, *FILE_FORMATS), shown="data")
    packing: str = flag(
        "auto",
        "into rows: documents cut, or whole; balanced: of equal work; auto: concat, best_fit where they must be whole",
        choices=("auto", "concat", "first_fit", "best_fit", "balanced"),
        shown="data",
    )
    share_prompts: bool = flag(True, "what the answers of one prompt begin with stands in a row once")
    weights_by: str = flag("documents", "what a path's shares a:0.7,b:0.3 are of", choices=("documents", "tokens"))
    long_documents: str = flag("split", "longer than seq_length", choices=("split", "drop", "refuse"))
    on_bad_line: str = flag("stop", "stop, or skip:N, which leaves out N bad examples at most", shown="data")
    max_samples: int = flag(0, "only the first so many examples; 0: all", at_least=0)
    shuffle: bool = flag(False, "documents in seeded random order, another one each epoch")
    cache_dir: str = flag("", "where tokenised data is kept; empty: $RINGBPT_CACHE or ~/.cache/ringbpt")
    text_processor: TextProcessorConfig = field(default_factory=TextProcessorConfig)
    json_dataset: JsonDatasetConfig = field(default_factory=JsonDatasetConfig)
    huggingface_dataset: HuggingfaceDatasetConfig = field(default_factory=HuggingfaceDatasetConfig)
    files_dataset: FilesDatasetConfig = field(default_factory=FilesDatasetConfig)
    tfds_dataset: TfdsDatasetConfig = field(default_factory=TfdsDatasetConfig)
    python_dataset: PythonDatasetConfig = field(default_factory=PythonDatasetConfig)

    @property
    def group(self) -> str:
        """The name of the group that `type` reads."""
        return "files_dataset" if self.type in FILE_FORMATS else f"{self.type}_dataset"

    @property
    def source(self) -> Any:
        """The group that `type` names, a SequencesConfig."""
        return getattr(self, self.group)

    @property
    def seq_length(self) -> int:
        return self.source.seq_length

    @property
    def batch_size(self) -> int:
        return self.source.batch_size
