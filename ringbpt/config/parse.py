"""The command line: flags, recipes and presets become one tree, and the tree becomes a checked, frozen Config.

The flags themselves and their defaults are the dataclasses of `ringbpt.config.fields`; what goes together is judged
in `ringbpt.config.checks`. Text from the command line is parsed as literals and never evaluated. Nothing here imports
jax, so that --help and a mistyped flag answer at once.
"""

import ast
import importlib.util
import logging
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from ml_collections import ConfigDict

from ringbpt.config.checks import (
    DTYPES,
    check,
    check_same_mesh,
    check_values,
    complete,
    mesh_sizes,
    nearest_name,
    parse_mesh_dim,
)
from ringbpt.config.data_checks import check_datasets
from ringbpt.config.families import llama_fields, read_json
from ringbpt.config.fields import (
    FLAG_TYPES,
    PRESETS,
    Architecture,
    Config,
    DatasetConfig,
    TextProcessorConfig,
    UserError,
    flag_values,
    group_name,
    to_dict,
)

ROOT = Path(__file__).resolve().parents[2]  # where configs/ is, in a clone

# --- the tree ---


def default_config(load_llama_config: str = "") -> ConfigDict:
    """Every flag with its default, as a locked ConfigDict; `load_llama_config` names a preset for the model's sizes.

    A recipe starts from it, as in `tree = default_config("7b")`. Raises UserError for a preset that isn't there.
    """
    defaults = to_dict(Config())
    del defaults["mesh_shape"]
    tree = ConfigDict(defaults).lock()
    if load_llama_config:
        _apply_preset(tree, load_llama_config)
    return tree


def _apply_preset(tree: ConfigDict, name: str) -> None:
    if name not in PRESETS:
        raise UserError(
            f"--load_llama_config='{name}' is none of {', '.join(PRESETS)}: did you mean "
            f"--load_llama_config={nearest_name(name, PRESETS)}?"
        )
    tree.load_llama_config = name
    # Another recipe's or preset's shape must not shine through where this one has nothing to say.
    unsaid = {"rms_norm_eps": Architecture.rms_norm_eps, "num_key_value_heads": None, "head_dim": None}
    for key, value in (unsaid | PRESETS[name]).items():
        _set(tree, f"llama.{key}", value)


def _apply_huggingface(tree: ConfigDict, checkpoint: str) -> None:
    """The model that a Hugging Face folder holds, and its tokenizer, where no other is asked for."""
    folder = Path(checkpoint.removeprefix(HUGGINGFACE)).expanduser()
    if not folder.is_dir():
        raise UserError(f"--load_checkpoint={checkpoint}: no such folder")
    longest = tree.llama.max_sequence_length
    for key, value in llama_fields(read_json(folder / "config.json"), str(folder / "config.json")).items():
        _set(tree, f"llama.{key}", value)
    tree.llama.max_sequence_length = max(longest, tree.llama.max_sequence_length)
    if not tree.tokenizer.vocab_file:
        tree.tokenizer.vocab_file = str(folder)


def _set(tree: ConfigDict, name: str, value: Any) -> None:
    *groups, leaf = name.split(".")
    for group in groups:
        tree = tree[group]
    with tree.ignore_type():  # read_value has seen to the type, and knows that some flags may be None
        tree[leaf] = value


def _get(tree: ConfigDict, name: str) -> Any:
    for part in name.split("."):
        tree = tree[part]
    return tree


# --- values ---

BOOLS = {
    "true": True, "1": True, "yes": True, "on": True, "t": True, "y": True,
    "false": False, "0": False, "no": False, "off": False, "f": False, "n": False,
}  # fmt: skip
KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
LARGEST_INT = 2**53


def read_value(label: str, value: Any, declared: Any, example: Any) -> Any:
    """`value`, text or a Python literal, as the declared type of a flag: bool, int, float, str, or one `| None`.

    "", "None" and None mean None where the type allows it; integers are good for floats, and 0 and 1 for bools.
    Raises UserError, with `label` as the culprit and `example` as what would work.
    """
    kind = declared
    if NoneType in get_args(declared):
        (kind,) = (member for member in get_args(declared) if member is not NoneType)
        if value is None or value in ("", "None", "none"):
            return None
    if kind is str and isinstance(value, str):
        if "\0" in value:
            raise UserError(f"{label} contains a NUL character: leave it out")
        return value
    try:
        if kind is bool and (isinstance(value, bool | str) or value in (0, 1)):
            return BOOLS[str(value).strip().lower()]
        if kind is int and type(value) in (int, str) and abs(int(value)) <= LARGEST_INT:
            return int(value)
        if kind is float and type(value) in (int, float, str):
            return float(value)
    except (ValueError, KeyError, OverflowError):
        pass
    shown = repr(value) if len(repr(value)) < 60 else repr(value)[:57] + "..."
    raise UserError(f"{label}={shown} is not {KINDS[kind]}{_as(kind, value, example)}")


def _as(kind: Any, value: Any, example: Any) -> str:
    """What to write instead: 1e4 means a whole number; otherwise the default, if the flag has one."""
    if kind is int:
        try:
            return f": write {int(float(value))}"
        except (TypeError, ValueError, OverflowError):
            pass
    return "" if example in (None, "") else f", as {example}"


LITERAL_LENGTH, LITERAL_DEPTH = 8192, 4


def read_literals(label: str, text: str) -> dict[str, Any]:
    """`"dict(a=1, b='x')"` or `"{'a': 1}"` -> the dict; "" is empty. Only literals, whatever else is refused.

    Values are strings, numbers, True, False, None, and dicts, lists and tuples of them. Raises UserError.
    """
    if not text.strip():
        return {}
    if len(text) > LITERAL_LENGTH:
        raise UserError(f"{label} is {len(text)} characters long: {LITERAL_LENGTH} at most")
    text = text.strip()
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(f"{label}={text[:60]!r} cannot be read: write dict(key=value, ...)") from None
    if not isinstance(tree.body, ast.Call | ast.Dict):
        raise UserError(f"{label}={text[:60]!r} is no dict: write dict(key=value, ...)")
    return _literal(label, text, tree.body, LITERAL_DEPTH)


def _literal(label: str, text: str, node: ast.expr, depth: int) -> Any:
    match node:
        case ast.Constant(value=str() | int() | float() | None):
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case _ if depth == 0:
            raise UserError(f"{label} is nested more than {LITERAL_DEPTH} deep: write dict(key=value, ...)")
        case ast.Tuple() | ast.List():
            return [_literal(label, text, item, depth - 1) for item in node.elts]
        case ast.Call(func=ast.Name(id="dict"), args=[]):
            pairs = [(keyword.arg, keyword.value) for keyword in node.keywords]
        case ast.Dict():
            pairs = [(getattr(key, "value", None), value) for key, value in zip(node.keys, node.values, strict=True)]
        case _:
            shown = ast.get_source_segment(text, node) or text
            raise UserError(
                f"{label}: {shown[:60]!r} is no literal: only text, numbers, True, False, None and dict(...)"
            )
    found: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise UserError(f"{label}: a key is no plain name: write dict(key=value, ...)")
        if key in found:
            raise UserError(f"{label} gives {key} twice: leave one of them out")
        found[key] = _literal(label, text, value, depth - 1)
    return found


def _update_llama(tree: ConfigDict, text: str) -> None:
    """Applies update_llama_config to the model's flags, and keeps the text for the record."""
    label = f"--{UPDATE}"
    names = [name.removeprefix("llama.") for name in FLAG_TYPES if name.startswith("llama.")]
    for key, value in read_literals(label, text).items():
        if key not in names:
            raise UserError(f"{label}: the model has no '{key}': did you mean '{nearest_name(key, names)}'?")
        name = f"llama.{key}"
        _set(tree, name, read_value(f"{label}: {key}", value, FLAG_TYPES[name], _get(tree, name)))
    tree.update_llama_config = text


# --- the command line ---

UPDATE = "update_llama_config"
HUGGINGFACE = "huggingface::"  # before a --load_checkpoint
ENTRY_FLAGS = ("help", "print_config")  # the entries' own: they ask about the flags and are none
# What other trainers call the sp axis.
SP_ALIASES = ("ring_attn_size", "sequence_parallel_degree", "sequence_parallel_size", "context_parallel_size")
SEQ_LENGTH_ALIASES = ("cutoff_len", "max_len", "sequence_len")
PACKING_ALIASES = ("packing_samples", "sample_packing")
TEXT_ALIASES = {
    item.name: item.type
    for item in fields(TextProcessorConfig)
    if item.name.endswith("_key") or item.name in ("input_template", "apply_chat_template", "roles_to_train")
}
STRIDE_ALIASES = ("ring_head_stride", "heads_k_stride")
RING_FUNCTIONS = {
    "batch_ring": {"llama.sequence_parallel": "ring", "llama.sequence_layout": "zigzag"},
    "zigzag_ring": {"llama.sequence_parallel": "ring", "llama.sequence_layout": "zigzag"},
    "varlen_llama3": {"llama.sequence_parallel": "all_gather"},
}
ALIAS_TYPES: dict[str, Any] = (
    {"config": str, "ring_attn_func": str, "dataset": str, "dataset_probs": str, "max_samples": int}
    | TEXT_ALIASES
    | dict.fromkeys((*SP_ALIASES, *SEQ_LENGTH_ALIASES, *STRIDE_ALIASES), int)
    | dict.fromkeys(PACKING_ALIASES, bool)
)


def parse_args(argv: list[str], default_recipe: str = "configs/debug.py") -> ConfigDict:
    """The tree that a command line (without the program's name) asks for; `parse` checks and freezes it.

    In this order: the defaults, the recipe of --config, the preset of --load_llama_config, the config.json of a
    `huggingface::` checkpoint, the other flags, other trainers' names for them, --update_llama_config. Without any
    flag the run starts from `default_recipe`. --help and --print_config are left to the caller. Raises UserError for
    what is no flag, is given twice, or is of another type.
    """
    given = _read_flags(argv)
    if not given:
        given["config"] = str(ROOT / default_recipe)
    path = given.pop("config", "")
    tree = load_recipe(path) if path else default_config()
    if given.get("load_llama_config"):
        _apply_preset(tree, given["load_llama_config"])
    if given.get("load_checkpoint", tree.load_checkpoint).startswith(HUGGINGFACE):
        _apply_huggingface(tree, given.get("load_checkpoint", tree.load_checkpoint))
    for name, value in given.items():
        if name in FLAG_TYPES and name != UPDATE:
            _set(tree, name, value)
    for name in [name for name in given if name not in FLAG_TYPES]:
        _apply_alias(tree, name, given[name], given)
    if UPDATE in given:
        _update_llama(tree, given[UPDATE])
    return tree


def _read_flags(argv: list[str]) -> dict[str, Any]:
    """`--name=value`, `--name value`, `--flag` and `--noflag` -> {name: value of the declared type}, in order."""
    types = FLAG_TYPES | ALIAS_TYPES
    defaults = flag_values(Config())
    given: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("-h", *(f"--{name}" for name in ENTRY_FLAGS)):
            continue
        if not word.startswith("--") or word == "--":
            raise UserError(f"'{word}' is no flag: flags are written --name=value")
        name, equals, text = word[2:].partition("=")
        negated = _without_no(name)
        if name not in types and types.get(negated) is bool and not equals:
            name, text = negated, "False"
        elif name not in types:
            raise UserError(_unknown(name))
        elif not equals and types[name] is bool:
            text = rest.pop(0) if rest and rest[0].lower() in BOOLS else "True"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{name} needs a value: --{name}={defaults.get(name, '...')}")
            text = rest.pop(0)
        if name in given:
            raise UserError(f"--{name} is given twice, the second time as '{text}': leave one of them out")
        given[name] = read_value(f"--{name}", text, types[name], defaults.get(name))
    return given


def _without_no(name: str) -> str:
    """`noautoresume` -> `autoresume`, `llama.noscan_layers` -> `llama.scan_layers`."""
    group, dot, leaf = name.rpartition(".")
    return f"{group}{dot}{leaf.removeprefix('no')}"


def _unknown(name: str) -> str:
    """The message for a flag that isn't there: the flag below that group, of that last name, or of the nearest name."""
    names = [*FLAG_TYPES, *ALIAS_TYPES, *ENTRY_FLAGS]
    below = [known for known in FLAG_TYPES if known.startswith(f"{name}.")]
    if below:
        return f"--{name} is a group of flags: did you mean --{below[0]}?"
    leaf = name.rpartition(".")[2]
    same_leaf = [known for known in FLAG_TYPES if known.rpartition(".")[2] == leaf]
    return f"--{name} is no flag: did you mean --{nearest_name(name, same_leaf or names)}?"


def load_recipe(path: str) -> ConfigDict:
    """The tree that the recipe's get_config() returns. The file is the user's own Python and is run as such.

    A path that isn't there is tried from the clone's root. Raises UserError, with file and line where the recipe
    itself fails.
    """
    file = next((file for file in (Path(path), ROOT / path) if file.is_file()), None)
    if file is None or file.suffix != ".py":
        raise UserError(f"--config={path} is no recipe (a .py file with get_config()): {_recipes()}")
    spec = importlib.util.spec_from_file_location("recipe", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        tree = module.get_config()
        if not isinstance(tree, ConfigDict):
            raise TypeError(f"get_config() gave a {type(tree).__name__}: return default_config() with changes")
        preset = PRESETS.get(tree.load_llama_config, {})
        if preset and all(tree.llama[key] != value for key, value in preset.items()):
            raise ValueError(
                f"load_llama_config is set too late: start from default_config('{tree.load_llama_config}')"
            )
        if tree.update_llama_config:
            _update_llama(tree, tree.update_llama_config)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file.resolve())]
        line = error.lineno if isinstance(error, SyntaxError) else (lines or [1])[-1]
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        # ml_collections lists every field there is between what is wrong and the nearest name.
        what, listed, rest = str(error).partition(" Other fields present")
        raise UserError(f"{file}:{line}: {kind}{what}{' ' + rest.rpartition(chr(10))[2] if listed else ''}") from error
    return tree


def _recipes() -> str:
    found = sorted(file.name for file in (ROOT / "configs").glob("*.py"))
    return f"try --config=configs/{found[0]}" if found else "give flags instead, see --help"


def _apply_alias(tree: ConfigDict, name: str, value: Any, given: dict[str, Any]) -> None:
    """Sets what another trainer's name means here, and notes it in `given`: what contradicts it raises UserError."""
    if name in SP_ALIASES:
        tree.mesh_dim = given["mesh_dim"] = _with_sp(tree.mesh_dim, name, value, "mesh_dim" in given)
        return
    if name == "ring_attn_func":
        function = value.replace("-", "_")
        if function not in RING_FUNCTIONS:
            raise UserError(f"--{name}={value} is none of {', '.join(RING_FUNCTIONS)}: use --{name}=batch_ring")
        ours = {"llama.attention_type": "ring_blockwise"} | RING_FUNCTIONS[function]
    elif name in STRIDE_ALIASES:
        ours = {"llama.sequence_parallel": "all_gather", "llama.heads_k_stride": value}
    elif name in TEXT_ALIASES:
        ours = {f"{split}.text_processor.{name}": value for split in ("train_dataset", "eval_dataset")}
    elif name == "max_samples":
        ours = {"train_dataset.max_samples": value}
    elif name in ("dataset", "dataset_probs"):
        ours = {"train_dataset.type": "files", "train_dataset.files_dataset.path": _weighted(name, given)}
    elif name in PACKING_ALIASES:
        ours = {"train_dataset.packing": "first_fit" if value else "concat"}
    else:
        groups = {split: DatasetConfig(type=tree[split].type).group for split in ("train_dataset", "eval_dataset")}
        ours = {f"{split}.{group}.seq_length": value for split, group in groups.items()}
    for flag, wanted in ours.items():
        if flag in given and given[flag] != wanted:
            raise UserError(
                f"--{name}={value} means --{flag}={wanted}, but --{flag}={given[flag]}: leave one of them out"
            )
        if flag in FLAG_TYPES:  # a dataset type that isn't there is for parse() to report
            _set(tree, flag, wanted)
            given[flag] = wanted


def _weighted(name: str, given: dict[str, Any]) -> str:
    """--dataset a,b --dataset_probs .7,.3 -> `"a:0.7,b:0.3"`."""
    if "dataset" not in given:
        raise UserError(f"--{name}={given[name]} goes with --dataset=a,b, which is not given: add it")
    names, shares = given["dataset"].split(","), given.get("dataset_probs", "").split(",")
    if "dataset_probs" not in given:
        return given["dataset"]
    if len(names) != len(shares):
        raise UserError(
            f"--dataset_probs={given['dataset_probs']} has {len(shares)} numbers and --dataset={given['dataset']} has "
            f"{len(names)} names: give one for each"
        )
    return ",".join(f"{one}:{share.strip()}" for one, share in zip(names, shares, strict=True))


def _with_sp(mesh_dim: str, alias: str, sp: int, explicit: bool) -> str:
    """`mesh_dim` with `sp` as its last size; where that size was -1, fsdp takes the rest of the devices instead."""
    if sp < 1:
        raise UserError(f"--{alias}={sp} is below 1: --{alias}=1 keeps a sequence on one device")
    dp, fsdp, tp, old = mesh_sizes(mesh_dim, "--mesh_dim")
    if explicit and old not in (1, -1, sp):
        raise UserError(f"--{alias}={sp} and --mesh_dim='{mesh_dim}' with sp={old} contradict: leave one of them out")
    if old == -1 and fsdp == 1:
        fsdp = -1
    return f"{'!' if mesh_dim.strip().startswith('!') else ''}{dp},{fsdp},{tp},{sp}"


# --- the tree, checked and frozen ---


def parse(tree: ConfigDict, device_count: int) -> Config:
    """The frozen Config for a mesh over `device_count` devices: every value checked, everything derived filled in.

    Derived are mesh_shape, llama.num_key_value_heads, llama.head_dim, llama.sequence_layout (never "auto"), and the
    short names of dtypes. `tree` is left as it is. Raises UserError for the first value, or pair of values, that
    cannot work.
    """
    config = _build(tree)
    check_values(config)
    mesh_shape, _ = parse_mesh_dim(config.mesh_dim, device_count)
    check_same_mesh(config, mesh_shape, device_count)
    sp, execution = mesh_shape.sp, config.execution
    if execution.sequence_layout == "auto":
        datasets = [config.train_dataset, *([config.eval_dataset] if config.eval_steps > 0 else [])]
        balanced = sp > 1 and all(dataset.seq_length % (2 * sp) == 0 for dataset in datasets)
        execution = replace(execution, sequence_layout="zigzag" if balanced else "contiguous")
    config = replace(
        config,
        dtype=DTYPES[config.dtype],
        checkpointer=replace(config.checkpointer, float_dtype=DTYPES[config.checkpointer.float_dtype]),
        architecture=complete(config.architecture),
        execution=execution,
        mesh_shape=mesh_shape,
    )
    check(config)
    check_datasets(config)
    return config


def _build(tree: ConfigDict) -> Config:
    """The Config of a tree. A recipe may have added keys or replaced groups: no more."""
    _check_keys(tree, "")
    given = dict(_leaves(tree, ""))

    def build(group: Any, prefix: str) -> Any:
        values = {}
        for item in fields(group):
            name = f"{prefix}{group_name(item)}"
            if is_dataclass(item.type):
                values[item.name] = build(item.type, f"{name}.")
            elif name in given:
                values[item.name] = read_value(f"--{name}", given[name], item.type, getattr(group, item.name))
        return group(**values)

    return build(Config, "")


def _leaves(tree: ConfigDict, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _check_keys(tree: ConfigDict, prefix: str) -> None:
    """Raises UserError for a key that is no flag, and for a group that something else was put in place of."""
    below = [name.removeprefix(prefix) for name in FLAG_TYPES if name.startswith(prefix)]
    groups = {name.partition(".")[0]: name for name in reversed(below) if "." in name}
    for key, value in tree.items():
        if key in groups:
            if not isinstance(value, ConfigDict):
                raise UserError(f"--{prefix}{key} is a group of flags: set --{prefix}{groups[key]}")
            _check_keys(value, f"{prefix}{key}.")
        elif key not in below:
            nearest = nearest_name(key, dict.fromkeys(name.partition(".")[0] for name in below))
            raise UserError(f"--{prefix}{key} is no flag: did you mean --{prefix}{nearest}?")


# --- showing it ---


def format_config(config: Config | ConfigDict) -> str:
    """One `--dotted.name=value` a line, sorted, quoted for a shell: the flags that give this configuration again.

    update_llama_config is left out, because what it says stands in the model's flags already.
    """
    if isinstance(config, Config):
        values = flag_values(config)
    else:
        values = {name: _get(config, name) for name in FLAG_TYPES}
    return "\n".join(f"--{name}={shlex.quote(str(values[name]))}" for name in sorted(values) if name != UPDATE)


HELP: dict[str, dict[str, str]] = {
    "start from": {
        "config": "a recipe, configs/<name>.py; the flags after it override it",
        "load_llama_config": f"sizes of the model: {', '.join(PRESETS)}",
        "update_llama_config": '"dict(scan_mlp=True,...)": any of the llama flags at once',
        "load_checkpoint": "params::<path>, trainstate::, trainstate_params::, flax_params::, huggingface::<folder>",
        "autoresume": "go on from the run's own latest checkpoint, if there is one",
    },
    "devices": {
        "mesh_dim": "sizes of dp,fsdp,tp,sp; one may be -1 (the rest); sp splits each sequence",
        "num_cpu_devices": "virtual CPU devices, where there is no accelerator",
        "dtype": "of the computation: fp32, bf16, fp16",
    },
    "model": {
        "llama.attention_type": "standard, blockwise, ring_standard, ring_blockwise (ring_* for sp > 1)",
        "llama.attention_kernel": "auto (the fastest), or one of reference, blockwise, pallas_tpu, ...",
        "llama.max_sequence_length": "the longest sequence the model takes",
        "llama.sequence_parallel": "how shares meet over sp: auto, ring, all_gather, ulysses, ulysses_ring",
        "llama.sequence_layout": "how a sequence is dealt out over sp: auto, contiguous, zigzag, striped",
        "llama.scan_query_chunk_size": "the most queries of a block; also scan_key_chunk_size",
        "llama.scan_mlp": "feedforward in chunks of llama.scan_mlp_chunk_size",
        "llama.remat_block": "what to keep of a layer for the backward pass: nothing_saveable, ...",
    },
    "data (eval_dataset has the same flags)": {
        "tokenizer.vocab_file": "bytes, a SentencePiece .model, or a Hugging Face directory or tokenizer.json",
        "train_dataset.type": "json, files (by their endings), huggingface, tfds, python, or one format of files",
        "train_dataset.packing": "concat (joined and cut), first_fit or best_fit (whole documents)",
        "train_dataset.json_dataset.path": "JSON lines, also .gz and .zst; a glob; a list a:0.7,b:0.3",
        "train_dataset.json_dataset.seq_length": "tokens of a sequence",
        "train_dataset.json_dataset.batch_size": "sequences of the global batch",
        "train_dataset.text_processor.fields": "'text', or '[prompt],answer': [..] takes no loss; empty: by the shape",
        "train_dataset.text_processor.chat_template": "of conversations: a .jinja file, chatml; empty: the tokenizer's",
        "train_dataset.on_bad_line": "stop, or skip:N",
    },
    "training": {
        "total_steps": "optimizer steps",
        "seed": "of the weights and of the data's order",
        "optimizer.type": "adamw, palm, lion, muon",
        "optimizer.schedule": "warmup_cosine, warmup_linear, wsd",
        "optimizer.accumulate_gradient_steps": "split the batch into this many parts, one after the other",
        "optimizer.adamw_optimizer.lr": "peak rate; also end_lr, lr_warmup_steps, lr_decay_steps, weight_decay",
    },
    "the run": {
        "logger.output_dir": "where the run's folder is made",
        "logger.experiment_id": "the run's folder; empty: <time>-<name>",
        "logger.online": "also to Weights & Biases",
        "log_freq": "steps between two lines of metrics",
        "eval_steps": "steps between two evaluations; 0: never",
        "save_model_freq": "steps between two checkpoints; 0: only at the end",
        "save_milestone_freq": "steps between two checkpoints that are kept; 0: none",
        "checkpointer.save_optimizer_state": "save the whole train state, not only the weights",
    },
}


def help_text(verb: str = "train") -> str:
    """The flags that people use, in groups, with their defaults; short enough for one screen and a half."""
    defaults = flag_values(Config())
    lines = [
        f"usage: python -m ringbpt.{verb} [--config=configs/<name>.py] [--name=value ...]",
        "",
        "Without any flag: configs/debug.py. A flag that is on or off may be written --name and --noname.",
    ]
    for group, flags in HELP.items():
        lines += ["", f"{group}:"]
        for name, line in flags.items():
            default = defaults.get(name, "")
            shown = f"  --{name}" if default in ("", None) else f"  --{name}={default}"
            lines.append(f"{shown:<55} {line}")
    return "\n".join([*lines, "", "All flags, as this command line resolves them: --print_config", ""])


# --- the entries ---


class _Printed(logging.Handler):
    """What the house logs, said on stdout as it comes."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


def run_main(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Runs an entry on the command line; returns its exit code: `sys.exit(run_main(main))`.

    A UserError is one line on stderr and its own code, Ctrl-C is 130; whatever else is a fault of ours and keeps its
    traceback.
    """
    log, printed = logging.getLogger("ringbpt"), _Printed(logging.INFO)
    log.addHandler(printed)
    log.setLevel(logging.INFO)
    log.propagate = False  # a handler that some library gave to all logs would say each line again, on stderr
    try:
        return main(sys.argv[1:] if argv is None else argv) or 0
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        log.removeHandler(printed)
        log.propagate = True
