"""The flags: one tree of frozen dataclasses, whose fields are the command line's flags and their defaults.

Everybody imports these names from `ringbpt.config`, which reads them, and `ringbpt.config.checks`, which judges them.
"""

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any

from ringbpt.dims import MeshShape


class UserError(Exception):
    """A mistake of the user's: one line, naming the flag or file:line, what is wrong, and what would work.

    The entry points print it on stderr and exit with `code`: 2 bad input, 4 storage.
    """

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class TokenizerConfig:
    vocab_file: str = ""  # "bytes", a SentencePiece .model file, or a Hugging Face directory or tokenizer.json


@dataclass(frozen=True)
class TextProcessorConfig:
    fields_from_example: str = ""  # the key of the example whose value is the `fields` string
    fields: str = ""  # "a+b,[prompt],<|bos|>": joined by +, a segment per comma, [..] takes no loss
    subfield_separator: str = " "
    add_bos_token: bool = True
    add_eos_token: bool = True
    prepend_text: str = ""
    # Without `fields`, the shape of an example decides, and it is told by the example's keys (data/shapes.py).
    shape: str = ""  # "": told | text | messages | sharegpt | alpaca | prompt_completion | preference | kto | rl
    input_key: str = ""  # the keys of the example, where they aren't the usual ones
    output_key: str = ""
    prompt_key: str = ""
    chosen_key: str = ""
    rejected_key: str = ""
    label_key: str = ""
    input_template: str = ""  # "User: {}\nAssistant: " around a prompt that is text
    apply_chat_template: bool = False  # also to prompts and completions that are text
    chat_template: str = ""  # a .jinja file, chatml, or the template itself; empty: the tokenizer's own
    roles_to_train: str = "assistant"  # whose turns take loss, a,b
    train_on_eos: str = "turn"  # the end of a turn takes loss: turn (of a trained one) | all | last | none


@dataclass(frozen=True)
class JsonDatasetConfig:
    path: str = ""  # .jsonl or .json, also .gz and .zst; a glob; a list a,b or with weights a:0.7,b:0.3
    seq_length: int = 1024
    batch_size: int = 8  # the global batch, in sequences
    always_start_with_bos: bool = False
    start_seek_loc: int = 0
    example_index_at_start: int = 0
    tokens_count_at_start: int = 0
    tokenizer_processes: int = 1  # worker processes; 0 and 1: this one
    tokenizer_parallel_chunk_size: int = 32  # this and the next: as in the original's commands, without effect
    tokenizer_parallel_batch_size: int = 1024
    throughput_average_window_size: int = 200


@dataclass(frozen=True)
class HuggingfaceDatasetConfig:
    path: str = "c4"
    name: str = "en"
    split: str = "train"
    streaming: bool = False  # with max_samples: that many rows are read once and kept
    seq_length: int = 1024
    batch_size: int = 8
    always_start_with_bos: bool = False
    tokenizer_processes: int = 1


@dataclass(frozen=True)
class FilesDatasetConfig:
    path: str = ""  # files of any format, by their endings; a glob, a folder, a list a,b or with weights a:0.7,b:0.3
    split: str = "train"  # of a folder that save_to_disk wrote with several
    seq_length: int = 1024
    batch_size: int = 8
    always_start_with_bos: bool = False
    tokenizer_processes: int = 1


@dataclass(frozen=True)
class TfdsDatasetConfig:
    name: str = ""  # name, or name/config:version
    split: str = "train"
    data_dir: str = ""  # empty: TFDS's own
    seq_length: int = 1024
    batch_size: int = 8
    always_start_with_bos: bool = False
    tokenizer_processes: int = 1


@dataclass(frozen=True)
class PythonDatasetConfig:
    """The source files of the running Python's standard library: real text that is on every machine."""

    path: str = ""  # a folder of .py files; empty: the standard library
    split: str = "train"  # train | heldout (one file in 20, by its name) | all
    seq_length: int = 1024
    batch_size: int = 8


# What a dataset's type reads; those of the second line go by the group files_dataset.
DATASET_TYPES = ("json", "huggingface", "tfds", "python", "files")
FILE_FORMATS = ("csv", "parquet", "arrow", "text", "array_record", "tokens", "megatron")


@dataclass(frozen=True)
class DatasetConfig:
    type: str = "json"  # json | huggingface | tfds | python | files, or a format of files: csv | parquet | ...
    packing: str = "concat"  # concat: joined and cut; first_fit, best_fit: whole documents with segment ids
    long_documents: str = "split"  # documents longer than seq_length: split | drop | refuse
    on_bad_line: str = "stop"  # stop | skip:N, which leaves out N bad examples at most, and counts them
    max_samples: int = 0  # only the first so many examples; 0: all
    shuffle: bool = False  # documents in seeded random order, another one each epoch
    cache_dir: str = ""  # where tokenised data is kept; empty: $RINGBPT_CACHE or ~/.cache/ringbpt
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
    def source(
        self,
    ) -> JsonDatasetConfig | HuggingfaceDatasetConfig | FilesDatasetConfig | TfdsDatasetConfig | PythonDatasetConfig:
        """The group that `type` names."""
        return getattr(self, self.group)

    @property
    def seq_length(self) -> int:
        return self.source.seq_length

    @property
    def batch_size(self) -> int:
        return self.source.batch_size


@dataclass(frozen=True)
class AdamWConfig:
    init_lr: float = 0.0
    end_lr: float = 0.001
    lr: float = 0.01
    lr_warmup_steps: int = 2000
    lr_decay_steps: int = 500000
    b1: float = 0.9
    b2: float = 0.95
    clip_gradient: float = 1.0
    weight_decay: float = 1e-4
    bf16_momentum: bool = False
    multiply_by_parameter_scale: bool = False


@dataclass(frozen=True)
class PalmConfig:
    lr: float = 0.01
    lr_warmup_steps: int = 10000
    b1: float = 0.9
    b2: float = 0.99
    clip_gradient: float = 1.0
    weight_decay: float = 1e-4
    bf16_momentum: bool = False


@dataclass(frozen=True)
class LionConfig:
    init_lr: float = 0.0
    end_lr: float = 0.0
    lr: float = 1e-4
    lr_warmup_steps: int = 2000
    lr_decay_steps: int = 500000
    b1: float = 0.9
    b2: float = 0.99
    clip_gradient: float = 1.0
    weight_decay: float = 1e-3
    bf16_momentum: bool = False


@dataclass(frozen=True)
class MuonConfig:
    init_lr: float = 0.0
    end_lr: float = 0.0
    lr: float = 0.02  # of the matrices; vectors, embedding and unembedding take adam_lr
    adam_lr: float = 3e-4
    lr_warmup_steps: int = 2000
    lr_decay_steps: int = 500000
    beta: float = 0.95
    clip_gradient: float = 1.0
    weight_decay: float = 0.0


@dataclass(frozen=True)
class OptimizerConfig:
    type: str = "adamw"  # adamw | palm | lion | muon
    schedule: str = "warmup_cosine"  # warmup_cosine | warmup_linear | wsd (not palm, which has its own)
    wsd_decay_fraction: float = 0.1  # wsd: the last share of lr_decay_steps, in which the rate falls to end_lr
    offload_state: bool = False  # the optimizer's state in the host's memory, updated a layer at a time
    offload_params: bool = False  # weights and gradients there too, a layer's at a time on the device
    accumulate_gradient_steps: int = 1  # the batch is split into this many parts, one after the other
    adamw_optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    palm_optimizer: PalmConfig = field(default_factory=PalmConfig)
    lion_optimizer: LionConfig = field(default_factory=LionConfig)
    muon_optimizer: MuonConfig = field(default_factory=MuonConfig)

    @property
    def is_layerwise(self) -> bool:
        """Whether the update of one layer of a stacked weight depends on that layer alone: not where steps are in units
        of the whole weight's RMS.
        """
        scaled = self.type == "adamw" and self.adamw_optimizer.multiply_by_parameter_scale
        return self.type != "palm" and not scaled


@dataclass(frozen=True)
class CheckpointerConfig:
    float_dtype: str = "bf16"  # of weights saved without optimizer state; a full train state is saved exactly
    save_optimizer_state: bool = False


@dataclass(frozen=True)
class Architecture:
    """What a model is, and a checkpoint of it: sizes, positions, norms, experts, and where its stacks have L.

    Its flags are `llama.*`, as are those of Execution.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as num_attention_heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_sequence_length: int = 2048
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int = 0
    eos_token_id: int = 1
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    tie_word_embeddings: bool = False
    theta: float = 10000.0
    rope_scaling_type: str = ""  # "" | linear | llama3 | yarn
    rope_scaling_factor: float = 1.0
    rope_scaling_low_freq_factor: float = 1.0
    rope_scaling_high_freq_factor: float = 4.0
    rope_scaling_original_length: int = 8192
    rope_scaling_beta_fast: float = 32.0  # yarn: turns within the original length above which a pair stays as it is
    rope_scaling_beta_slow: float = 1.0  # yarn: turns below which it is divided by the factor
    rope_scaling_truncate: bool = True  # yarn: those bounds in whole pairs
    rope_scaling_attention_factor: float | None = None  # yarn: of cos and sin; None: 0.1 ln(factor) + 1
    sliding_window: int | None = None  # a token sees this many tokens, itself included; None: all before it
    qkv_bias: bool = False
    qk_norm: bool = False  # RMS norm of each head's queries and keys, before they are rotated
    num_experts: int = 0  # 0: one feedforward; else a mixture of so many, each of intermediate_size
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.0  # of the load balancing loss, where there are experts
    param_scan_axis: int = 0


@dataclass(frozen=True)
class Execution:
    """How a model is computed, which changes no number: one architecture trains, generates and is planned in several.

    Its flags are `llama.*`, as are those of Architecture.
    """

    attention_type: str = "standard"  # standard | blockwise | ring_standard | ring_blockwise
    attention_kernel: str = "auto"  # what computes a device's share; auto: the fastest (of standard: reference)
    sequence_layout: str = "auto"  # auto | contiguous | zigzag | striped
    sequence_parallel: str = "ring"  # how shares meet over sp: auto | ring | all_gather | ulysses | ulysses_ring
    heads_k_stride: int | None = None  # all_gather: kv heads gathered at a time; None: all
    ulysses_degree: int | None = None  # ulysses_ring: devices that trade heads; sp / ulysses_degree form the ring
    ring_bidirectional: bool = False  # half of the keys travel each way round
    ring_skip_hops: bool = False  # keys travel only as far as somebody sees any (short documents, contiguous layout)
    scan_attention: bool = False
    scan_query_chunk_size: int | None = None  # the most tokens of a block; None: as the kernel's table says
    scan_key_chunk_size: int | None = None
    scan_mlp: bool = False  # feedforward in chunks of the local sequence
    scan_mlp_chunk_size: int = 1024
    loss_chunk_size: int = 1024
    kv_heads_at_a_time: int | None = None  # of a device: attention for so many at a time, and whole layers in blocks
    scan_layers: bool = True
    residual_over_tp: bool = False  # between layers, tokens split over tp too: what remat saves shrinks by tp
    remat_block: str = ""
    remat_attention: str = ""
    remat_mlp: str = ""
    mesh_dim: str | None = None  # as in the original's commands; must equal the top-level mesh_dim


@dataclass(frozen=True)
class LoggerConfig:
    project_id: str = "ringbpt"
    experiment_id: str = ""  # the run's folder inside output_dir; empty: <time>-<name>
    experiment_note: str = ""
    output_dir: str = "runs"
    online: bool = False  # also to Weights & Biases
    entity: str = ""
    prefix: str = ""


@dataclass(frozen=True)
class JaxDistributedConfig:
    initialize_jax_distributed: bool = False
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: str | None = None


@dataclass(frozen=True)
class Config:
    seed: int = 42
    mesh_dim: str = "1,-1,1,1"  # dp,fsdp,tp,sp; at most one -1; or "dp:1,fsdp:-1,..."; "!" first: plain device order
    dtype: str = "bf16"  # of the computation: fp32 | bf16 | fp16; weights and optimizer state are float32
    objective: str = "sft"
    total_steps: int = 10000
    load_llama_config: str = ""
    update_llama_config: str = ""
    load_checkpoint: str = ""
    load_dataset_state: str = ""
    log_freq: int = 50
    save_model_freq: int = 0
    save_milestone_freq: int = 0
    save_final: bool = True
    eval_steps: int = 0  # evaluate every so many steps; 0: never
    eval_batches: int = 8
    eval_by_position: bool = False  # with each evaluation, perplexity by position: perplexity.png in the run's folder
    eval_passkey: str = ""  # lengths, as "512,1024": with each evaluation, keys found at them; passkey.png
    log_all_worker: bool = False
    autoresume: bool = False
    num_cpu_devices: int = 0  # virtual CPU devices, where there is no accelerator; 0: as jax finds them
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    train_dataset: DatasetConfig = field(default_factory=DatasetConfig)
    eval_dataset: DatasetConfig = field(default_factory=DatasetConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpointer: CheckpointerConfig = field(default_factory=CheckpointerConfig)
    architecture: Architecture = field(default_factory=Architecture, metadata={"group": "llama"})
    execution: Execution = field(default_factory=Execution, metadata={"group": "llama"})
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    jax_distributed: JaxDistributedConfig = field(default_factory=JaxDistributedConfig)
    mesh_shape: MeshShape = field(default_factory=MeshShape)  # mesh_dim resolved by parse(); not a flag


# The sizes of the original's models.
PRESETS: dict[str, dict[str, Any]] = {
    "debug": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    "200m": {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 14, "num_attention_heads": 8},
    "1b": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 22, "num_attention_heads": 16},
    "3b": {"hidden_size": 3200, "intermediate_size": 8640, "num_hidden_layers": 26, "num_attention_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "30b": {"hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60, "num_attention_heads": 52},
    "65b": {
        "hidden_size": 8192,
        "intermediate_size": 22016,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "rms_norm_eps": 1e-5,
    },
}


def group_name(item: Field) -> str:
    """What a field of the tree is called on the command line: architecture and execution share the group `llama`."""
    return item.metadata.get("group", item.name)


def _flags(group: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields every flag's dotted name, declared type and value, in the order of the fields; `mesh_shape` is none."""
    for item in fields(group):
        if is_dataclass(item.type):
            yield from _flags(getattr(group, item.name), f"{prefix}{group_name(item)}.")
        elif item.name != "mesh_shape":
            yield prefix + item.name, item.type, getattr(group, item.name)


FLAG_TYPES: dict[str, Any] = {name: kind for name, kind, _ in _flags(Config())}


def flag_values(config: Config) -> dict[str, Any]:
    """Every flag's dotted name and its value in `config`."""
    return {name: value for name, _, value in _flags(config)}


def to_dict(config: Config) -> dict[str, Any]:
    """The flags as nested dicts, a group each, and mesh_shape: what JSON knows, for the run's config.json."""
    tree: dict[str, Any] = {}
    for name, value in flag_values(config).items():
        *groups, leaf = name.split(".")
        group = tree
        for part in groups:
            group = group.setdefault(part, {})
        group[leaf] = value
    return tree | {"mesh_shape": list(config.mesh_shape)}
