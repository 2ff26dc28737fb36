"""Names that users of other trainers know, and what each means here; and names that are accepted without effect."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from ml_collections import ConfigDict

from ringbpt.config.fields import OptimizerConfig
from ringbpt.config.fields_of_data import DatasetConfig, TextProcessorConfig
from ringbpt.config.values import Flag, UserError, mesh_sizes

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


def _sequence_parallel(alias: str, sp: int, tree: ConfigDict, given: dict[str, Any]) -> dict[str, Any]:
    """mesh_dim with `sp` as its last size; where that size was -1, fsdp takes the rest of the devices instead."""
    mesh_dim = tree.mesh_dim
    if sp < 1:
        raise UserError(f"--{alias}={sp} is below 1: --{alias}=1 keeps a sequence on one device")
    dp, fsdp, tp, old = mesh_sizes(mesh_dim, "--mesh_dim")
    # What was given goes with it unless it says another sp, and is then replaced.
    if given.pop("mesh_dim", None) and old not in (1, -1, sp):
        raise UserError(f"--{alias}={sp} and --mesh_dim='{mesh_dim}' with sp={old} contradict: leave one of them out")
    if old == -1 and fsdp == 1:
        fsdp = -1
    return {"mesh_dim": f"{'!' if mesh_dim.strip().startswith('!') else ''}{dp},{fsdp},{tp},{sp}"}


RING_FUNCTIONS = {
    "batch_ring": {"llama.sequence_parallel": "ring", "llama.sequence_layout": "zigzag"},
    "zigzag_ring": {"llama.sequence_parallel": "ring", "llama.sequence_layout": "zigzag"},
    "varlen_llama3": {"llama.sequence_parallel": "all_gather"},
}


def _ring_function(alias: str, value: str, *_: Any) -> dict[str, Any]:
    function = value.replace("-", "_")
    if function not in RING_FUNCTIONS:
        raise UserError(f"--{alias}={value} is none of {', '.join(RING_FUNCTIONS)}: use --{alias}=batch_ring")
    return {"llama.attention_type": "ring_blockwise"} | RING_FUNCTIONS[function]


def _heads_k_stride(_: str, value: int, *__: Any) -> dict[str, Any]:
    return {"llama.sequence_parallel": "all_gather", "llama.heads_k_stride": value}


def _seq_length(_: str, value: int, tree: ConfigDict, given: dict[str, Any]) -> dict[str, Any]:
    return {f"{split}.{DatasetConfig(type=tree[split].type).group}.seq_length": value for split in SPLITS}


def _packing(_: str, value: bool, *__: Any) -> dict[str, Any]:
    return {"train_dataset.packing": "first_fit" if value else "concat"}


def _max_samples(_: str, value: int, *__: Any) -> dict[str, Any]:
    return {"train_dataset.max_samples": value}


def _text(alias: str, value: Any, *_: Any) -> dict[str, Any]:
    return {f"{split}.text_processor.{alias}": value for split in SPLITS}


def _learning_rate(_: str, value: float, tree: ConfigDict, given: dict[str, Any]) -> dict[str, Any]:
    return {f"optimizer.{OptimizerConfig(type=tree.optimizer.type).group}.lr": value}


def _dataset(alias: str, value: str, tree: ConfigDict, given: dict[str, Any]) -> dict[str, Any]:
    """--dataset a,b --dataset_probs .7,.3 -> the path `"a:0.7,b:0.3"`."""
    if "dataset" not in given:
        raise UserError(f"--{alias}={value} goes with --dataset=a,b, which is not given: add it")
    path = given["dataset"]
    if "dataset_probs" in given:
        names, shares = path.split(","), given["dataset_probs"].split(",")
        if len(names) != len(shares):
            raise UserError(
                f"--dataset_probs={given['dataset_probs']} has {len(shares)} numbers and --dataset={path} has "
                f"{len(names)} names: give one for each"
            )
        path = ",".join(f"{name}:{share.strip()}" for name, share in zip(names, shares, strict=True))
    return {"train_dataset.type": "files", "train_dataset.files_dataset.path": path}


# name -> its type, and (name, value, the tree so far, the flags given) -> the flags of ours that it means.
MEANINGS: dict[str, tuple[Any, Callable[..., dict[str, Any]]]] = {
    "ring_attn_size": (int, _sequence_parallel),
    "sequence_parallel_degree": (int, _sequence_parallel),
    "sequence_parallel_size": (int, _sequence_parallel),
    "context_parallel_size": (int, _sequence_parallel),
    "ring_attn_func": (str, _ring_function),
    "ring_head_stride": (int, _heads_k_stride),
    "heads_k_stride": (int, _heads_k_stride),
    "cutoff_len": (int, _seq_length),
    "max_len": (int, _seq_length),
    "sequence_len": (int, _seq_length),
    "packing_samples": (bool, _packing),
    "sample_packing": (bool, _packing),
    "max_samples": (int, _max_samples),
    "learning_rate": (float, _learning_rate),
    "dataset": (str, _dataset),
    "dataset_probs": (str, _dataset),
    **{
        item.name: (item.type, _text)
        for item in fields(TextProcessorConfig)
        if item.name.endswith("_key") or item.name in ("input_template", "apply_chat_template", "roles_to_train")
    },
}
# Those that say something of the data.
OF_DATA = {
    name for name, (_, meaning) in MEANINGS.items() if meaning in (_seq_length, _packing, _max_samples, _text, _dataset)
}
ALIASES: dict[str, Flag] = {name: Flag(kind, None) for name, (kind, _) in MEANINGS.items()}
