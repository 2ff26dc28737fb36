"""The flags of OpenRLHF's train_sft, train_dpo and train_kto, in both spellings, and what each means here.

A meaning is a function (name, value, the tree so far, the flags given) -> the flags of ours that it means. What cannot
be meant exactly is refused in one line. Those that other trainers share stand in `ringbpt.config.aliases`.
"""

import os
import re
from collections.abc import Callable
from math import ceil
from typing import Any

from ml_collections import ConfigDict

from ringbpt.config.fields_of_data import DatasetConfig
from ringbpt.config.hub import NAME
from ringbpt.config.values import UserError

Meaning = Callable[..., dict[str, Any]]
Given = dict[str, Any]

# The spelling since April 2026 -> the one before.
DOTTED = {
    "adam.betas": "adam_betas",
    "adam.weight_decay": "l2",
    "ckpt.disable_ds": "disable_ds_ckpt",
    "ckpt.max_mem": "max_ckpt_mem",
    "ckpt.max_num": "max_ckpt_num",
    "ckpt.output_dir": "save_path",
    "ckpt.path": "ckpt_path",
    "ckpt.save_hf": "save_hf_ckpt",
    "ckpt.save_steps": "save_steps",
    "data.apply_chat_template": "apply_chat_template",
    "data.chosen_key": "chosen_key",
    "data.dataloader_num_workers": "dataloader_num_workers",
    "data.dataset": "dataset",
    "data.dataset_probs": "dataset_probs",
    "data.dataset_split": "dataset_split",
    "data.disable_fast_tokenizer": "disable_fast_tokenizer",
    "data.input_key": "input_key",
    "data.input_template": "input_template",
    "data.max_len": "max_len",
    "data.max_samples": "max_samples",
    "data.multiturn": "multiturn",
    "data.output_key": "output_key",
    "data.prompt_key": "prompt_key",
    "data.rejected_key": "rejected_key",
    "data.tokenizer_chat_template": "tokenizer_chat_template",
    "ds.adam_offload": "adam_offload",
    "ds.attn_implementation": "attn_implementation",
    "ds.deepcompile": "deepcompile",
    "ds.experts_implementation": "experts_implementation",
    "ds.grad_accum_dtype": "grad_accum_dtype",
    "ds.load_in_4bit": "load_in_4bit",
    "ds.lora.alpha": "lora_alpha",
    "ds.lora.dropout": "lora_dropout",
    "ds.lora.rank": "lora_rank",
    "ds.lora.target_modules": "target_modules",
    "ds.overlap_comm": "overlap_comm",
    "ds.packing_samples": "packing_samples",
    "ds.param_dtype": "param_dtype",
    "ds.ring_attn_head_stride": "ring_head_stride",
    "ds.ring_attn_size": "ring_attn_size",
    "ds.tensor_parallel_size": "ds_tensor_parallel_size",
    "ds.use_liger_kernel": "use_liger_kernel",
    "ds.use_universal_ckpt": "use_ds_universal_ckpt",
    "ds.zero_stage": "zero_stage",
    "ds.zpg": "zpg",
    "eval.dataset": "eval_dataset",
    "eval.split": "eval_split",
    "logger.logging_steps": "logging_steps",
    "logger.tensorboard_dir": "use_tensorboard",
    "logger.wandb.group": "wandb_group",
    "logger.wandb.key": "use_wandb",
    "logger.wandb.org": "wandb_org",
    "logger.wandb.project": "wandb_project",
    "logger.wandb.run_name": "wandb_run_name",
    "model.aux_loss_coef": "aux_loss_coef",
    "model.beta": "beta",
    "model.gradient_checkpointing_enable": "gradient_checkpointing",
    "model.gradient_checkpointing_reentrant": "gradient_checkpointing_use_reentrant",
    "model.ipo_enable": "ipo",
    "model.label_smoothing": "label_smoothing",
    "model.model_name_or_path": "pretrain",
    "model.nll_loss_coef": "nll_loss_coef",
    "model.pretrain_mode_enable": "pretrain_mode",
    "ref.model_name_or_path": "ref_pretrain",
    "ref.offload": "ref_offload",
    "train.batch_size": "train_batch_size",
    "train.full_determinism_enable": "full_determinism",
    "train.max_epochs": "max_epochs",
    "train.micro_batch_size": "micro_train_batch_size",
}  # `learning_rate` is not among them: adam.lr is another rate where muon has one too

# Flags that are accepted and change nothing, each with its why.
NOTHING_TO_SAY = {
    "attn_implementation": (
        str,
        "no kernel makes an array of length x length, and attention_kernel=auto is the fastest",
    ),
    "ckpt_path": (str, "a run's checkpoints lie in its own folder"),
    "dataloader_num_workers": (int, "rows are read ahead of the step"),
    "deepcompile": (bool, "every step is compiled"),
    "experts_implementation": (str, "there is one way of computing experts"),
    "gradient_checkpointing_use_reentrant": (bool, "a compiled program has no such choice"),
    "local_rank": (int, "jax knows its processes"),
    "flash_attn": (str, "no kernel makes an array of length x length, and attention_kernel=auto is the fastest"),
    "multiturn": (bool, "every turn of roles_to_train takes loss"),
    "overlap_comm": (bool, "the compiler lets transfers and work overlap"),
    "ref_offload": (bool, "--reference=columns holds no reference model while training"),
    "use_ds_universal_ckpt": (bool, "a checkpoint is read on any mesh"),
    "use_liger_kernel": (bool, "the logits of a whole sequence are never held"),
    "use_tensorboard": (str, "TensorBoard's files are in the run's folder"),
    "wandb_group": (str, "a run's processes are its group"),
    "wandb_run_name": (str, "a run is called as its folder"),
    "zero_stage": (int, "weights, gradients and optimizer are split over fsdp and sp of mesh_dim, whatever the stage"),
    "zpg": (int, "mesh_dim says what is split over what"),
}

# Flags that are refused, each with its type, what it may be all the same, and what to do instead.
REFUSED = {
    "disable_fast_tokenizer": (bool, (False,), "there are none but fast tokenizers: leave it out"),
    "eval_dataset": (
        str,
        (),
        "say it as --eval_dataset.type=files --eval_dataset.files_dataset.path={value} --eval_steps=N --eval_batches=N",
    ),
    "eval_split": (str, (), "say it as --eval_dataset.files_dataset.split={value}, or of --eval_dataset.type"),
    "full_determinism": (
        bool,
        (False,),
        "it is the compiler's: XLA_FLAGS=--xla_gpu_deterministic_ops=true, not a flag",
    ),
    "grad_accum_dtype": (str, ("fp32",), "gradients add up in float32: leave it out"),
    "lora_dropout": (float, (0.0,), "a step is the same on every mesh, without dropout: leave it out"),
    "max_ckpt_mem": (int, (), "checkpoints are counted, not weighed: --checkpointer.keep=N"),
    "nll_loss_coef": (
        float,
        (0.0,),
        "it weighs a mean of each answer's mean, and here one over all chosen tokens of the step: "
        "--preference.nll_coefficient={value}",
    ),
    "save_hf_ckpt": (bool, (False,), "a checkpoint is written for others afterwards: python scripts/jax2hf.py"),
    "tokenizer_chat_template": (
        str,
        (),
        "write the template into a file: --train_dataset.text_processor.chat_template=FILE.jinja",
    ),
    "use_ms": (bool, (False,), "models come from folders and from the Hugging Face hub: --load_checkpoint"),
    "adam.eps": (float, (1e-8,), "it is 1e-8 here: leave it out"),
    "muon.ns_steps": (int, (5,), "they are 5 here: leave it out"),
    "muon.nesterov": (bool, (True,), "muon's momentum is Nesterov's here: leave it out"),
    "muon.no_nesterov": (bool, (False,), "muon's momentum is Nesterov's here: leave it out"),
}


def plain(name: str) -> str:
    """A flag's spelling before the dots."""
    return DOTTED.get(name, name)


def said(given: Given, name: str) -> Any:
    """The value that a flag was given, in either spelling; None where it wasn't."""
    return next((value for each, value in given.items() if plain(each) == name), None)


MOST_WORDS = {"adam_betas": 2, "target_modules": 64}  # of flags that take several


def one_word_each(argv: list[str]) -> list[str]:
    """The words of a command line, where a flag of several values has become one, and `--load_checkpoint` without a
    value beside --pretrain, which here would lack one, what it is called since: --ckpt.load_enable.
    """
    words: list[str] = []
    there = {word.removeprefix("--").partition("=")[0] for word in argv}
    several, taken = "", 0  # the last flag, and how many words without dashes have come after it
    for at, word in enumerate(argv):
        after = argv[at + 1 : at + 2]
        several, taken = (plain(word[2:]), 0) if word.startswith("--") else (several, taken + 1)
        if 1 < taken <= MOST_WORDS.get(several, 1):
            words[-1] += f",{word}"
        elif word == "--load_checkpoint" and "pretrain" in map(plain, there) and (not after or after[0][:2] == "--"):
            words.append("--ckpt.load_enable")
        else:
            words.append(word)
    return words


def as_theirs(given: Given) -> Given:
    """The flags given, where --pretrain says that a command is theirs: as ours, and what -1 means there."""
    names = [name for name in given if plain(name) == "pretrain"]
    if names and given.get("eval_steps") == -1:
        given = given | _eval_steps("eval_steps", -1, None, given)
    for name in names:
        wanted, old = f"huggingface::{given[name]}", given.get("load_checkpoint")
        if old not in (None, wanted):
            raise UserError(f"--{name}={given[name]} and --load_checkpoint={old} contradict: leave one of them out")
        given = given | {"load_checkpoint": wanted}
    return given


def as_set(*flags: str) -> Meaning:
    """The meaning of a name whose value is that of ours. `{split}`, `{optimizer}` stand for the groups chosen."""

    def meaning(_: str, value: Any, tree: ConfigDict, given: Given) -> Given:
        data = f"train_dataset.{DatasetConfig(type=tree.train_dataset.type).group}"
        names = {"data": data, "optimizer": f"optimizer.{tree.optimizer.type}_optimizer"}
        return {flag.format(**names): value for flag in flags}

    return meaning


def where_on(on: Given, off: Given | None = None) -> Meaning:
    """The meaning of a switch: these flags where it is on, those where it is said to be off."""
    return lambda _, value, *__: dict(on if value else off or {})


def refused(harmless: tuple, instead: str) -> Meaning:
    """The meaning of what isn't there: a UserError, unless the value asks for nothing."""

    def meaning(name: str, value: Any, *_: Any) -> Given:
        if value not in harmless:
            raise UserError(f"--{name}={value}: {instead.format(value=value)}")
        return {}

    return meaning


def huggingface(flag: str) -> Meaning:
    """The meaning of a model's name, or its folder."""
    return lambda _, value, *__: {flag: f"huggingface::{value}"}


# --- what is learnt ---


def _another_dpo(given: Given) -> None:
    """The program train_dpo has become --objective=dpo, and a switch of it another objective."""
    if given.get("objective") == "dpo":
        del given["objective"]


def _ipo(name: str, value: bool, tree: ConfigDict, given: Given) -> Given:
    if not value:
        return {}
    if said(given, "label_smoothing"):
        raise UserError(f"--{name} takes no label_smoothing: leave one of them out")
    _another_dpo(given)
    return {"objective": "ipo", "preference.ipo_sum": True}


def _label_smoothing(_: str, value: float, tree: ConfigDict, given: Given) -> Given:
    if not value:
        return {}
    _another_dpo(given)
    return {"objective": "cdpo", "preference.label_smoothing": value}


def _lora_rank(_: str, value: int, tree: ConfigDict, given: Given) -> Given:
    alpha = {"lora.alpha": 16.0} if value and said(given, "lora_alpha") is None and "lora.alpha" not in given else {}
    return {"lora.rank": value} | alpha


# --- how long, how fast ---


def _max_epochs(name: str, value: int, tree: ConfigDict, given: Given) -> Given:
    if "total_steps" not in given:
        raise UserError(
            f"--{name}={value}: how many steps that is, is known once the data is packed into rows: add "
            "--total_steps=N (the `data` line of a run's start says how many an epoch has)"
        )
    return {}


def _warmup_ratio(_: str, value: float, tree: ConfigDict, given: Given) -> Given:
    steps = ceil(tree.total_steps * value)
    return {f"optimizer.{tree.optimizer.type}_optimizer.lr_warmup_steps": steps}


def _min_lr_ratio(name: str, value: float, tree: ConfigDict, given: Given) -> Given:
    group = f"optimizer.{tree.optimizer.type}_optimizer"
    lr = said(given, "learning_rate") or given.get(f"{group}.lr")
    if lr is None:
        raise UserError(f"--{name}={value} is of a rate that isn't given: add --learning_rate, or say --{group}.end_lr")
    return {f"{group}.end_lr": float(f"{lr * value:.12g}")}


def _lr_scheduler(name: str, value: str, *_: Any) -> Given:
    if value != "cosine_with_min_lr":
        raise UserError(
            f"--{name}={value} is none that is known here: --optimizer.schedule=warmup_cosine, warmup_linear or wsd, "
            "and the optimizer's end_lr=0 for one that falls to nothing"
        )
    return {"optimizer.schedule": "warmup_cosine"}


def _betas(name: str, value: str, tree: ConfigDict, given: Given) -> Given:
    try:
        b1, b2 = map(float, value.split(","))
    except ValueError:
        raise UserError(f"--{name}={value} is not two numbers: --{name}=0.9,0.95") from None
    if tree.optimizer.type != "adamw":
        raise UserError(f"--{name} is adamw's, and --optimizer.type={tree.optimizer.type}: leave it out")
    return {"optimizer.adamw_optimizer.b1": b1, "optimizer.adamw_optimizer.b2": b2}


def _optim(name: str, value: str, *_: Any) -> Given:
    kinds = {"adam": "adamw", "muon": "muon"}
    if value not in kinds:
        raise UserError(f"--{name}={value} is none of adam, muon: or say --optimizer.type")
    return {"optimizer.type": kinds[value]}


def _bf16(name: str, value: bool, *_: Any) -> Given:
    if not value:
        raise UserError(f"--{name}=False does not say what else: --dtype=fp32, or fp16")
    return {"dtype": "bf16"}


def _adam_lr(_: str, value: float, tree: ConfigDict, given: Given) -> Given:
    muon = tree.optimizer.type == "muon"
    return {"optimizer.muon_optimizer.adam_lr" if muon else "optimizer.adamw_optimizer.lr": value}


# --- where it goes ---


def _save_path(_: str, value: str, *__: Any) -> Given:
    folder, name = os.path.split(os.path.normpath(value))
    return {"logger.output_dir": folder or ".", "logger.experiment_id": name}


def _save_steps(_: str, value: int, tree: ConfigDict, given: Given) -> Given:
    if value == -1:
        return {"save_model_freq": 0}
    whole = {} if said(given, "disable_ds_ckpt") else {"checkpointer.save_optimizer_state": True}
    return {"save_model_freq": value} | whole


def _eval_steps(name: str, value: int, tree: ConfigDict | None, given: Given) -> Given:
    if value == -1 and any(each.startswith("eval_dataset.") for each in given):
        raise UserError(f"--{name}=-1 would be once an epoch: say after how many steps, --eval_steps=N")
    return {"eval_steps": 0 if value == -1 else value}


def _wandb(name: str, value: str, *_: Any) -> Given:
    if value.lower() != "true":
        raise UserError(f"--{name} is a key, which no command line should show: `wandb login`, then --logger.online")
    return {"logger.online": True}


# --- data ---


def _dataset(name: str, value: str, tree: ConfigDict, given: Given) -> Given:
    """--dataset a,b --dataset_probs .7,.3 -> the path `"a:0.7,b:0.3"`; org/name -> a data set of the hub."""
    path = said(given, "dataset")
    if path is None:
        raise UserError(f"--{name}={value} goes with --dataset=a,b, which is not given: add it")
    names = [each.strip() for each in path.split(",")]
    if hub := [each for each in names if _is_of_the_hub(each)]:
        if len(names) > 1:
            raise UserError(
                f"--dataset={path}: {hub[0]} is of the hub, and only files are mixed: give files, or it alone"
            )
        return {"train_dataset.type": "huggingface", "train_dataset.huggingface_dataset.path": path}
    if shares := said(given, "dataset_probs"):
        if len(names) != len(shares.split(",")):
            raise UserError(
                f"--dataset_probs={shares} has {len(shares.split(','))} numbers and --dataset={path} has "
                f"{len(names)} names: give one for each"
            )
        path = ",".join(f"{each}:{share.strip()}" for each, share in zip(names, shares.split(","), strict=True))
    return {"train_dataset.type": "files", "train_dataset.files_dataset.path": path}


def _is_of_the_hub(name: str) -> bool:
    """Whether it reads org/name, has no ending like a file's, and isn't there."""
    return bool(NAME.fullmatch(name)) and not re.search(r"\.[A-Za-z_]+$", name) and not os.path.exists(name)


OPENRLHF: dict[str, tuple[Any, Meaning]] = {
    # These first: what others mean depends on them.
    "pretrain": (str, huggingface("load_checkpoint")),
    "ipo": (bool, _ipo),
    "label_smoothing": (float, _label_smoothing),
    "pretrain_mode": (bool, where_on({"objective": "pretrain"})),
    "optim": (str, _optim),
    "dataset": (str, _dataset),
    "dataset_probs": (str, _dataset),
    # What is learnt, from what.
    "ref_pretrain": (str, huggingface("reference_checkpoint")),
    "beta": (float, as_set("preference.beta")),
    "desirable_loss_weight": (float, as_set("preference.desirable_weight")),
    "undesirable_loss_weight": (float, as_set("preference.undesirable_weight")),
    "aux_loss_coef": (float, as_set("llama.router_aux_loss_coef")),
    "dataset_split": (str, as_set("{data}.split")),
    "train_split": (str, as_set("{data}.split")),
    "lora_rank": (int, _lora_rank),
    "lora_alpha": (float, as_set("lora.alpha")),
    "target_modules": (str, as_set("lora.target_modules")),
    "load_in_4bit": (bool, where_on({"lora.base_dtype": "nf4", "lora.double_quantization": True})),
    # How.
    "train_batch_size": (int, as_set("{data}.batch_size")),
    "micro_train_batch_size": (int, as_set("optimizer.rows_at_a_time")),
    "max_epochs": (int, _max_epochs),
    "adam.lr": (float, _adam_lr),
    "muon.lr": (float, as_set("optimizer.muon_optimizer.lr")),
    "muon.momentum": (float, as_set("optimizer.muon_optimizer.beta")),
    "adam_betas": (str, _betas),
    "l2": (float, as_set("{optimizer}.weight_decay")),
    "max_norm": (float, as_set("{optimizer}.clip_gradient")),
    "lr_scheduler": (str, _lr_scheduler),
    "lr_warmup_ratio": (float, _warmup_ratio),
    "min_lr_ratio": (float, _min_lr_ratio),
    "train.seed": (int, as_set("seed")),
    "param_dtype": (str, as_set("dtype")),
    "bf16": (bool, _bf16),
    "gradient_checkpointing": (bool, where_on({"llama.remat_block": "nothing_saveable"}, {"llama.remat_block": ""})),
    "adam_offload": (bool, as_set("optimizer.offload_state")),
    # Where it goes.
    "save_path": (str, _save_path),
    "save_steps": (int, _save_steps),
    "disable_ds_ckpt": (bool, where_on({"checkpointer.save_optimizer_state": False})),
    "max_ckpt_num": (int, as_set("checkpointer.keep")),
    "ckpt.load_enable": (bool, where_on({"autoresume": True}, {"autoresume": False})),
    "logging_steps": (int, as_set("log_freq")),
    "eval.steps": (int, _eval_steps),
    "use_wandb": (str, _wandb),
    "wandb_org": (str, as_set("logger.entity")),
    "wandb_project": (str, as_set("logger.project_id")),
    **{name: (kind, lambda *_: {}) for name, (kind, _) in NOTHING_TO_SAY.items()},
    **{name: (kind, refused(harmless, instead)) for name, (kind, harmless, instead) in REFUSED.items()},
}
