"""Names that users of other trainers know, and what each means here; and names that are accepted without effect."""

from dataclasses import fields
from typing import Any

from ml_collections import ConfigDict

from ringbpt.config.fields_of_data import DatasetConfig, TextProcessorConfig
from ringbpt.config.openrlhf import DOTTED, OPENRLHF, Given, Meaning, as_set, plain
from ringbpt.config.values import Flag, UserError, mesh_sizes
from ringbpt.dims import AXES

SPLITS = ("train_dataset", "eval_dataset")

# Flags that old commands give and that change nothing, by the end of their dotted names, each with its why.
WITHOUT_EFFECT = {
    "llama.use_cache": "generation always keeps keys and values",
    "llama.scan_attention": "attention_type says whether attention is computed in blocks",
    "llama.resid_pdrop": "there is no dropout: 0 is all it may be",
    "llama.embd_pdrop": "there is no dropout: 0 is all it may be",
    "llama.attn_pdrop": "there is no dropout: 0 is all it may be",
    "llama.mesh_dim": "the mesh once more, which must be mesh_dim's",
    "json_dataset.tokens_count_at_start": "only example_index_at_start and start_seek_loc say where to start",
    "json_dataset.tokenizer_parallel_chunk_size": "a worker process takes a shard of the data at a time",
    "json_dataset.tokenizer_parallel_batch_size": "a worker process takes a shard of the data at a time",
    "json_dataset.throughput_average_window_size": "tokens/s are those of the steps since the last line of metrics",
}


def without_effect(name: str) -> str:
    """Why the flag of this dotted name has no effect; "" where it has one."""
    return next((why for end, why in WITHOUT_EFFECT.items() if f".{name}".endswith(f".{end}")), "")


def _axis(axis: str) -> Meaning:
    """The meaning of a name whose value is the size of one axis of mesh_dim.

    Where that size was -1, fsdp takes the rest of the devices instead.
    """
    at = AXES.index(axis)

    def meaning(alias: str, size: int, tree: ConfigDict, given: Given) -> Given:
        mesh_dim = tree.mesh_dim
        if size < 1:
            raise UserError(f"--{alias}={size} is below 1: --{alias}=1 splits nothing")
        sizes = mesh_sizes(mesh_dim, "--mesh_dim")
        old = sizes[at]
        # What was given goes with it unless it says another size, and is then replaced.
        if given.pop("mesh_dim", None) and old not in (1, -1, size):
            raise UserError(
                f"--{alias}={size} and --mesh_dim='{mesh_dim}' with {axis}={old} contradict: leave one of them out"
            )
        sizes[at] = size
        if old == -1 and sizes[1] == 1:
            sizes[1] = -1
        return {"mesh_dim": f"{'!' if mesh_dim.strip().startswith('!') else ''}{','.join(map(str, sizes))}"}

    return meaning


RING_FUNCTIONS = {
    "batch_ring": {"llama.sequence_parallel": "ring", "llama.sequence_layout": "zigzag"},
    "zigzag_ring": {"llama.sequence_parallel": "ring", "llama.sequence_layout": "zigzag"},
    "varlen_llama3": {"llama.sequence_parallel": "all_gather"},
}


def _ring_function(alias: str, value: str, *_: Any) -> Given:
    function = value.replace("-", "_")
    if function not in RING_FUNCTIONS:
        raise UserError(f"--{alias}={value} is none of {', '.join(RING_FUNCTIONS)}: use --{alias}=batch_ring")
    return {"llama.attention_type": "ring_blockwise"} | RING_FUNCTIONS[function]


def _heads_k_stride(_: str, value: int, *__: Any) -> Given:
    return {"llama.sequence_parallel": "all_gather", "llama.heads_k_stride": value}


def _seq_length(_: str, value: int, tree: ConfigDict, given: Given) -> Given:
    return {f"{split}.{DatasetConfig(type=tree[split].type).group}.seq_length": value for split in SPLITS}


def _packing(_: str, value: bool, *__: Any) -> Given:
    return {"train_dataset.packing": "first_fit" if value else "concat"}


def _text(alias: str, value: Any, *_: Any) -> Given:
    return {f"{split}.text_processor.{plain(alias)}": value for split in SPLITS}


PLAIN: dict[str, tuple[Any, Meaning]] = OPENRLHF | {
    "ring_attn_size": (int, _axis("sp")),
    "sequence_parallel_degree": (int, _axis("sp")),
    "sequence_parallel_size": (int, _axis("sp")),
    "context_parallel_size": (int, _axis("sp")),
    "ds_tensor_parallel_size": (int, _axis("tp")),
    "ring_attn_func": (str, _ring_function),
    "ring_head_stride": (int, _heads_k_stride),
    "heads_k_stride": (int, _heads_k_stride),
    "max_len": (int, _seq_length),
    "sequence_len": (int, _seq_length),
    "cutoff_len": (int, _seq_length),
    "packing_samples": (bool, _packing),
    "sample_packing": (bool, _packing),
    "max_samples": (int, as_set("train_dataset.max_samples")),
    "learning_rate": (float, as_set("{optimizer}.lr")),
    **{
        item.name: (item.type, _text)
        for item in fields(TextProcessorConfig)
        if item.name.endswith("_key") or item.name in ("input_template", "apply_chat_template", "roles_to_train")
    },
}
# name -> its type and its meaning, in the order in which they are applied, both spellings of OpenRLHF's.
MEANINGS: dict[str, tuple[Any, Meaning]] = {
    spelling: meaning
    for name, meaning in PLAIN.items()
    for spelling in (name, *(dotted for dotted, old in DOTTED.items() if old == name))
}
# Those that say something of a model or its data.
OF_DATA = {
    name
    for name in MEANINGS
    if plain(name) in ("pretrain", "dataset", "dataset_probs", "dataset_split", "max_samples", "train_batch_size")
    or MEANINGS[name][1] in (_seq_length, _packing, _text)
}
# The names that may stand without a value though they may have one.
BARE = {name: "True" for name in MEANINGS if plain(name) in ("flash_attn", "use_wandb")}
ALIASES: dict[str, Flag] = {name: Flag(kind, None, bare=BARE.get(name, "")) for name, (kind, _) in MEANINGS.items()}
