"""From a command line to a frozen Config: flags, recipes and presets become one tree, which is then checked.

The flags are declared in `ringbpt.config.fields`; what goes together is judged in `ringbpt.config.checks`. Nothing here
imports jax, so that --help and a mistyped flag answer at once.
"""

import importlib.util
import math
import os
import shlex
import traceback
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ringbpt.config.aliases import ALIASES, MEANINGS, OF_DATA, SPLITS
from ringbpt.config.checks import (
    check,
    check_datasets,
    check_same_mesh,
    check_values,
    complete,
    either,
    nearest_multiples,
    with_head,
)
from ringbpt.config.entry import ENTRY_FLAGS, scan
from ringbpt.config.families import llama_fields
from ringbpt.config.fields import (
    DTYPES,
    PRESETS,
    RUN_FLAGS,
    SAVE_MINUTES,
    Architecture,
    Config,
    OptimizerConfig,
    flag_values,
    group_name,
)
from ringbpt.config.fields_of_data import DatasetConfig
from ringbpt.config.gguf import find_foreign, model_settings
from ringbpt.config.openrlhf import as_theirs, one_word_each
from ringbpt.config.places import check_start
from ringbpt.config.rates import complete_rates
from ringbpt.config.shown import without_secrets
from ringbpt.config.values import UserError, mesh_sizes, nearest_name, parse_mesh_dim, read_literals, read_value
from ringbpt.dims import MeshShape

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent
# Where configs/ is: a wheel has it in the package, a clone beside it.
HOME = PACKAGE if (PACKAGE / "configs").is_dir() else ROOT
DEFAULT_RECIPE = "configs/debug.py"
UPDATE = "update_llama_config"
ARCHITECTURE_FLAGS = {f"llama.{item.name}" for item in fields(Architecture)}
ADAMW = "optimizer.adamw_optimizer"
APPLIED = "_applied_preset"  # a tree's attribute, no key: the preset whose sizes it was given


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
    object.__setattr__(tree, APPLIED, name)
    # Another recipe's or preset's shape must not shine through where this one has nothing to say.
    unsaid = {"rms_norm_eps": Architecture.rms_norm_eps, "num_key_value_heads": None, "head_dim": None}
    for key, value in (unsaid | PRESETS[name]).items():
        _set(tree, f"llama.{key}", value)


def _apply_foreign(tree: ConfigDict, path: Path) -> None:
    """The model of a Hugging Face folder or a GGUF file, and its tokenizer, where no other is asked for."""
    longest = tree.llama.max_sequence_length
    for key, value in llama_fields(*model_settings(path)).items():
        _set(tree, f"llama.{key}", value)
    tree.llama.max_sequence_length = max(longest, tree.llama.max_sequence_length)
    if not tree.tokenizer.vocab_file:
        tree.tokenizer.vocab_file = str(path)


def _set(tree: ConfigDict, name: str, value: Any) -> None:
    *groups, leaf = name.split(".")
    for group in groups:
        tree = tree[group]
    with tree.ignore_type():  # read_value has seen to the type, and knows that some flags may be None
        tree[leaf] = value


def _update_llama(tree: ConfigDict, text: str) -> None:
    """Applies update_llama_config to the model's flags, and keeps the text for the record."""
    label = f"--{UPDATE}"
    names = [name.removeprefix("llama.") for name in RUN_FLAGS if name.startswith("llama.")]
    for key, value in read_literals(label, text).items():
        if key not in names:
            raise UserError(f"{label}: the model has no '{key}': did you mean '{nearest_name(key, names)}'?")
        flag = RUN_FLAGS[f"llama.{key}"]
        _set(tree, f"llama.{key}", read_value(f"{label}: {key}", value, flag.kind, flag.default))
    tree.update_llama_config = text


# --- the command line ---


def parse_args(argv: list[str]) -> ConfigDict:
    """The tree that a command line (without the program's name) asks for; `parse` checks and freezes it.

    In this order: the defaults, the recipe of --config, the preset of --load_llama_config, what a
    `huggingface::` or `gguf::` checkpoint says about itself, the other flags, other trainers' names for them,
    --update_llama_config. Flags that name no recipe, and nothing of a model, its data or its tokenizer, start from
    DEFAULT_RECIPE. A recipe's virtual devices are as many as a mesh that is given in its place needs. --print_config is
    left to the caller. Raises UserError for what is no flag, is given twice, or is of another type.
    """
    given, others = scan(one_word_each(argv), ENTRY_FLAGS | ALIASES | RUN_FLAGS)
    given.pop("print_config", None)
    if others:
        raise UserError(_unknown(others[0]))
    given = as_theirs(given)
    path = given.pop("config", "" if any(_says_what(*one) for one in given.items()) else DEFAULT_RECIPE)
    tree = load_recipe(path) if path else default_config()
    if given.get("load_llama_config"):
        _apply_preset(tree, given["load_llama_config"])
    if foreign := find_foreign(given.get("load_checkpoint", tree.load_checkpoint)):
        _apply_foreign(tree, foreign)
    for name, value in given.items():
        if name in RUN_FLAGS and name != UPDATE:
            _set(tree, name, value)
    for name in [name for name in MEANINGS if name in given]:
        _apply_alias(tree, name, given)
    if UPDATE in given:
        _update_llama(tree, given[UPDATE])
    if "mesh_dim" in given and "num_cpu_devices" not in given and tree.num_cpu_devices:
        sizes = mesh_sizes(tree.mesh_dim, "--mesh_dim")
        tree.num_cpu_devices = tree.num_cpu_devices if -1 in sizes else math.prod(sizes)
    _check_stretched(tree, given)
    check_start(tree)
    return tree


def _says_what(name: str, value: Any) -> bool:
    """Whether a flag says something of what is trained: of a model, its data or its tokenizer; not of how."""
    group = name.partition(".")[0]
    model = name in ("load_llama_config", "load_checkpoint", UPDATE) or name in ARCHITECTURE_FLAGS
    return value != "" and (model or name in OF_DATA or group in (*SPLITS, "tokenizer"))


def _check_stretched(tree: ConfigDict, given: dict[str, Any]) -> None:
    """Raises UserError where flags stretch a checkpoint and nothing says from which length; a config.json does."""
    said = {name.removeprefix("llama.") for name in given} | read_literals(f"--{UPDATE}", given.get(UPDATE, "")).keys()
    if "rope_scaling_type" not in said or "rope_scaling_original_length" in said:
        return
    kind, checkpoint = tree.llama.rope_scaling_type, tree.load_checkpoint
    if checkpoint and not find_foreign(checkpoint) and kind in ("yarn", "llama3"):
        raise UserError(
            f"--llama.rope_scaling_type={kind} with --load_checkpoint={checkpoint} needs the length that the "
            "checkpoint was trained for: --llama.rope_scaling_original_length=4096, or whatever it was"
        )


def _apply_alias(tree: ConfigDict, name: str, given: dict[str, Any]) -> None:
    """Sets what another trainer's name means here, and notes it in `given`: what contradicts it raises UserError."""
    _, meaning = MEANINGS[name]
    for flag, wanted in meaning(name, given[name], tree, given).items():
        if flag in given and given[flag] != wanted:
            raise UserError(
                f"--{name}={given[name]} means --{flag}={wanted}, but --{flag}={given[flag]}: leave one of them out"
            )
        if flag in RUN_FLAGS:  # a dataset type that isn't there is for parse() to report
            _set(tree, flag, wanted)
            given[flag] = wanted


def _unknown(word: str) -> str:
    """The message for a word that is no flag: the flag below that group, of that last name, or of the nearest name."""
    if not word.startswith("--") or word == "--":
        return f"'{word}' is no flag: flags are written --name=value"
    name = word[2:].partition("=")[0]
    names = [*RUN_FLAGS, *ALIASES, *ENTRY_FLAGS]
    below = [known for known in RUN_FLAGS if known.startswith(f"{name}.")]
    if below:
        return f"--{name} is a group of flags: did you mean --{below[0]}?"
    group, _, leaf = name.rpartition(".")
    if leaf == "learning_rate":  # of optax and others
        return f"--{name} is no flag: did you mean --{group if f'{group}.lr' in RUN_FLAGS else ADAMW}.lr?"
    same_leaf = [known for known in RUN_FLAGS if known.rpartition(".")[2] == leaf]
    return f"--{name} is no flag: did you mean --{nearest_name(name, same_leaf or names)}?"


def load_recipe(path: str) -> ConfigDict:
    """The tree that the recipe's get_config() returns. The file is the user's own Python and is run as such.

    A path that isn't there is tried from the clone's root, and `configs/...` among the recipes of a wheel. Raises
    UserError, with file and line where the recipe itself fails.
    """
    file = next((file for file in (Path(path), ROOT / path, HOME / path) if os.path.isfile(file)), None)
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
        applied = getattr(tree, APPLIED, "") == tree.load_llama_config
        if preset and not applied and all(tree.llama[key] != value for key, value in preset.items()):
            raise ValueError(
                f"load_llama_config is set too late: start from default_config('{tree.load_llama_config}')"
            )
        if tree.update_llama_config:
            _update_llama(tree, tree.update_llama_config)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file.resolve())]
        line = (isinstance(error, SyntaxError) and error.lineno) or (lines or [1])[-1]
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        # ml_collections lists every field there is between what is wrong and the nearest name.
        what, listed, rest = str(error).partition(" Other fields present")
        raise UserError(f"{file}:{line}: {kind}{what}{' ' + rest.rpartition(chr(10))[2] if listed else ''}") from error
    return tree


def _recipes() -> str:
    first = HOME / "configs" / "debug.py"
    return f"try --config=configs/{first.name}" if first.is_file() else "give flags instead, see --help"


# --- the tree, checked and frozen ---


def parse(tree: ConfigDict, device_count: int) -> Config:
    """The frozen Config for a mesh over `device_count` devices: every value checked, everything derived filled in.

    Derived are mesh_shape, llama.num_key_value_heads, llama.head_dim, llama.attention_type and llama.sequence_layout
    (never "auto"), the optimizer's rates, accumulate_gradient_steps where rows_at_a_time says it, the short names of
    dtypes, and save_minutes and save_model_freq (0, where nothing is saved by them). `tree` is left as it is. Raises
    UserError for the first value, or pair of values, that cannot work.
    """
    config = _build(tree)
    check_values(config)
    mesh_shape, _ = parse_mesh_dim(config.mesh_dim, device_count)
    check_same_mesh(config, mesh_shape, device_count)
    sp, execution = mesh_shape.sp, config.execution
    if execution.attention_type == "auto":
        execution = replace(execution, attention_type="ring_blockwise" if sp > 1 else "blockwise")
    if execution.sequence_layout == "auto":
        datasets = [config.train_dataset, *([config.eval_dataset] if config.eval_steps > 0 else [])]
        balanced = sp > 1 and all(dataset.seq_length % (2 * sp) == 0 for dataset in datasets)
        execution = replace(execution, sequence_layout="zigzag" if balanced else "contiguous")
    minutes = SAVE_MINUTES if config.save_model_freq is None else 0.0
    config = replace(
        config,
        save_model_freq=config.save_model_freq or 0,
        save_minutes=minutes if config.save_minutes is None else config.save_minutes,
        dtype=DTYPES[config.dtype],
        checkpointer=replace(config.checkpointer, float_dtype=DTYPES[config.checkpointer.float_dtype]),
        lora=replace(config.lora, base_dtype=_base_dtype(config)),
        architecture=complete(with_head(config)),
        execution=execution,
        mesh_shape=mesh_shape,
        optimizer=_in_parts(complete_rates(config), config.train_dataset, mesh_shape),
    )
    check(config)
    check_datasets(config)
    return config


def _base_dtype(config: Config) -> str:
    said = config.lora.base_dtype or (config.dtype if config.lora.rank else "")
    return DTYPES.get(said, said)


def _in_parts(optimizer: OptimizerConfig, dataset: DatasetConfig, mesh_shape: MeshShape) -> OptimizerConfig:
    """The optimizer's flags where rows_at_a_time has become the parts that a batch is computed in."""
    if (rows := optimizer.rows_at_a_time) is None:
        return optimizer
    flag, step = f"--train_dataset.{dataset.group}.batch_size", rows * mesh_shape.row_shards
    if dataset.batch_size % step:
        raise UserError(
            f"{flag}={dataset.batch_size} is not divisible by --optimizer.rows_at_a_time={rows} on each of dp*fsdp="
            f"{mesh_shape.row_shards} of --mesh_dim: {either(flag, nearest_multiples(dataset.batch_size, step))}"
        )
    parts = dataset.batch_size // step
    if optimizer.accumulate_gradient_steps not in (1, parts):
        raise UserError(
            f"--optimizer.rows_at_a_time={rows} means --optimizer.accumulate_gradient_steps={parts}, but "
            f"--optimizer.accumulate_gradient_steps={optimizer.accumulate_gradient_steps}: leave one of them out"
        )
    return replace(optimizer, accumulate_gradient_steps=parts, rows_at_a_time=None)


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
    below = [name.removeprefix(prefix) for name in RUN_FLAGS if name.startswith(prefix)]
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
    values = flag_values(config if isinstance(config, Config) else _build(config))
    return "\n".join(f"--{name}={shlex.quote(str(values[name]))}" for name in sorted(values) if name != UPDATE)


def to_dict(config: Config) -> dict[str, Any]:
    """The flags as nested dicts, a group each, and mesh_shape: what JSON knows, for the run's config.json.

    Passwords are left out of it.
    """
    tree: dict[str, Any] = {}
    for name, value in flag_values(config).items():
        *groups, leaf = name.split(".")
        group = tree
        for part in groups:
            group = group.setdefault(part, {})
        group[leaf] = without_secrets(value) if isinstance(value, str) else value
    return tree | {"mesh_shape": list(config.mesh_shape)}
