"""What values go together: every check across flags, of the model, the mesh, the optimizer and the data sets.

Each mistake raises UserError with one line that names the flags, says what is wrong, and gives the nearest values
that work. Nothing here knows how a flag was written; what one flag may be by itself says its declaration.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from ringbpt.config.fields import (
    BLOCK,
    CRITICS,
    DOUBLE_BLOCK,
    QUANTISED,
    RUN_FLAGS,
    SCORING,
    Architecture,
    Config,
    DatasetConfig,
    OptimizerConfig,
    PalmConfig,
    flag_values,
)
from ringbpt.config.lora import pairs_of
from ringbpt.config.rollouts import check_rollouts
from ringbpt.config.values import UserError, check_value, parse_mesh_dim, parse_profile, read_literals
from ringbpt.dims import MeshShape


def nearest_multiples(value: int, step: int) -> list[int]:
    """The positive multiples of `step` on either side of `value`."""
    below = value // step * step
    return [multiple for multiple in (below, below + step) if multiple > 0]


def nearest_divisors(number: int, value: int) -> list[int]:
    """The divisors of `number` on either side of `value`; one where value is itself a divisor or outside."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = sorted({*small, *(number // d for d in small)})
    below = [d for d in divisors if d <= value][-1:]
    above = [d for d in divisors if d >= value][:1]
    return sorted({*below, *above})


def either(name: str, values: Iterable[Any]) -> str:
    """`either("--seed", [1, 2]) == "--seed=1 or --seed=2"`, for the end of a message."""
    return " or ".join(f"{name}={value}" for value in values)


def _divides(name: str, value: int, number: int, what: str) -> None:
    if number % value:
        nearest = either(f"--llama.{name}", nearest_divisors(number, value))
        raise UserError(f"--llama.{name}={value} does not divide {what}: {nearest}")


def _is_multiple(flag: str, value: int, step: int, why: str) -> None:
    if value % step:
        raise UserError(f"{flag}={value} is not divisible by {why}: {either(flag, nearest_multiples(value, step))}")


def check(config: Config) -> None:
    """Raises UserError for the first pair of values that cannot work.

    Expects that check_values() found nothing, and what parse() derives: mesh_shape, llama.num_key_value_heads,
    llama.head_dim, llama.attention_type, llama.sequence_layout and the optimizer's rates.
    """
    check_run(config)
    check_optimizer(config)
    check_model(config)
    check_mesh(config)
    if config.lora.base_dtype in QUANTISED:
        check_blocks(config)


def check_values(config: Config) -> None:
    """Each flag by itself; of a group that is not chosen, or an evaluation that is not made, without its bounds."""
    datasets = {"train_dataset": config.train_dataset, "eval_dataset": config.eval_dataset}
    chosen = {f"optimizer.{config.optimizer.group}", *(f"{split}.{data.group}" for split, data in datasets.items())}
    for name, value in flag_values(config).items():
        used = name.count(".") < 2 or name.rpartition(".")[0] in chosen
        bounds = used and (config.eval_steps > 0 or not name.startswith("eval_dataset."))
        check_value(name, RUN_FLAGS[name], value, bounds)


def check_run(config: Config) -> None:
    """The run's name, what it starts from, what it evaluates, its objective, and its processes."""
    parse_profile(config.profile, config.total_steps)
    if config.eval_passkey and not re.fullmatch(r"[1-9][0-9]{0,9}(,[1-9][0-9]{0,9})*", config.eval_passkey):
        raise UserError(f"--eval_passkey={config.eval_passkey!r} is no list of lengths: as --eval_passkey=512,1024")
    for name in ("eval_passkey", "eval_by_position"):
        if getattr(config, name) and not config.eval_steps:
            raise UserError(
                f"--{name} is looked at in evaluations, and --eval_steps=0 means none: try --eval_steps=100"
            )
    for name in ("eval_by_position", "eval_passkey"):
        if getattr(config, name) and config.architecture.head == "score":
            raise UserError(
                f"--{name} looks at predicted tokens, and --objective={config.objective} predicts none: leave it out"
            )
    longest = max([int(part) for part in config.eval_passkey.split(",")]) if config.eval_passkey else 0
    if longest > config.architecture.max_sequence_length:
        raise UserError(
            f"--eval_passkey={config.eval_passkey} is above --llama.max_sequence_length="
            f"{config.architecture.max_sequence_length}: use --llama.max_sequence_length={longest}"
        )
    name = config.logger.experiment_id
    if name and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]*", name):
        plain = re.sub(r"[^A-Za-z0-9_.=+-]+", "_", name).lstrip(".-_") or "run"
        raise UserError(
            f"--logger.experiment_id={name!r} is not a plain name (letters, digits, _ . = + -): "
            f"--logger.experiment_id={plain} would work; --logger.output_dir chooses the folder"
        )
    check_lora(config)
    check_rollouts(config)
    smoothing = config.preference.label_smoothing
    if config.objective in ("exo", "cdpo") and smoothing == 0:
        what = "the logarithm of none" if config.objective == "exo" else "--objective=dpo"
        raise UserError(
            f"--preference.label_smoothing=0 makes --objective={config.objective} {what}: "
            "--preference.label_smoothing=0.1"
        )
    count, number = config.jax_distributed.num_processes, config.jax_distributed.process_id
    if count is not None and number is not None and number >= count:
        raise UserError(
            f"--jax_distributed.process_id={number} does not go with --jax_distributed.num_processes={count}: ids run "
            f"from 0 to {count - 1}"
        )


def check_lora(config: Config) -> None:
    """What has low-rank pairs, and what does not go with them."""
    lora = config.lora
    changed = [item.name for item in fields(lora) if getattr(lora, item.name) != item.default]
    if changed and not lora.rank:
        raise UserError(f"--lora.{changed[0]} says how weights get low-rank pairs, and --lora.rank=0 gives none: 16?")
    if lora.dropout:
        raise UserError(
            f"--lora.dropout={lora.dropout}: a step is the same on every mesh, without dropout: leave it out"
        )
    pairs_of(lora, config.architecture)
    if lora.double_quantization and lora.base_dtype not in QUANTISED:
        raise UserError(
            f"--lora.double_quantization is of weights in blocks, and --lora.base_dtype={lora.base_dtype} has none: "
            "--lora.base_dtype=nf4"
        )
    if lora.rank and config.optimizer.offload_params:
        raise UserError(
            "--optimizer.offload_params does not go with --lora.rank: the optimizer's state of pairs is small, and "
            "weights that stay may be kept in --lora.base_dtype=bf16: leave one of them out"
        )


def check_blocks(config: Config) -> None:
    """Raises UserError where a block of a quantised weight would lie on two devices."""
    D, F, lora = config.architecture.hidden_size, config.architecture.intermediate_size, config.lora
    _, fsdp, tp, sp = config.mesh_shape
    if D % BLOCK:
        raise UserError(
            f"--lora.base_dtype={lora.base_dtype} has blocks of {BLOCK} along --llama.hidden_size={D}, which is no "
            "multiple of that: --lora.base_dtype=bf16"
        )
    if D // BLOCK % (fsdp * sp):
        raise UserError(
            f"--lora.base_dtype={lora.base_dtype} has blocks of {BLOCK} along --llama.hidden_size={D}, which fsdp*sp="
            f"{fsdp}*{sp} of --mesh_dim would cut: {_weights_fit(D // BLOCK, fsdp, sp)}"
        )
    if lora.double_quantization and F % (DOUBLE_BLOCK * tp):
        fits = [size for size in nearest_divisors(F // DOUBLE_BLOCK, tp) if F % DOUBLE_BLOCK == 0]
        raise UserError(
            f"--lora.double_quantization has blocks of {DOUBLE_BLOCK} along --llama.intermediate_size={F}, which "
            f"tp={tp} of --mesh_dim would cut: {''.join(f'tp={size}, ' for size in fits)}or without it"
        )


def check_optimizer(config: Config) -> None:
    """The chosen optimizer's steps, and its schedule."""
    optimizer, prefix = config.optimizer, f"--optimizer.{config.optimizer.group}."
    if isinstance(optimizer.chosen, PalmConfig):
        if optimizer.schedule != OptimizerConfig.schedule:
            raise UserError(
                f"--optimizer.schedule={optimizer.schedule} does not go with --optimizer.type=palm, which has its "
                "own schedule: leave it out, or use --optimizer.type=adamw"
            )
        return
    warmup, decay = optimizer.chosen.lr_warmup_steps, optimizer.chosen.lr_decay_steps
    lr, end_lr = optimizer.chosen.lr, optimizer.chosen.end_lr
    assert warmup is not None and decay is not None and lr is not None and end_lr is not None
    if end_lr > lr and not optimizer.allow_rising_lr:
        raise UserError(
            f"{prefix}end_lr={end_lr:g} is above {prefix}lr={lr:g}: the decay would raise the rate: "
            f"{prefix}end_lr={lr / 10:g}, or --optimizer.allow_rising_lr where that is meant"
        )
    # The cosine needs one step at least between the two.
    most = decay - 1 if optimizer.schedule == "warmup_cosine" else decay
    if warmup > most:
        raise UserError(
            f"{prefix}lr_warmup_steps={warmup} leaves no step to decay before {prefix}lr_decay_steps={decay}, which "
            f"counts the warmup too: {prefix}lr_warmup_steps={most} or {prefix}lr_decay_steps={warmup + decay - most}"
        )


def check_model(config: Config) -> None:
    """The model's own sizes, and what it cannot do."""
    architecture = config.architecture
    heads = architecture.num_attention_heads
    _divides("num_key_value_heads", architecture.kv_heads, heads, f"--llama.num_attention_heads={heads}")
    if architecture.head_dim and architecture.head_dim % 2:
        raise UserError(
            f"--llama.head_dim={architecture.head_dim} is odd, and rotary positions turn pairs: "
            f"{either('--llama.head_dim', nearest_multiples(architecture.head_dim, 2))} (or another "
            f"--llama.hidden_size: head_dim is hidden_size / num_attention_heads = {architecture.hidden_size} / "
            f"{heads} unless it is given)"
        )
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if getattr(architecture, name) != 0:
            raise UserError(
                f"--llama.{name}={getattr(architecture, name)}: dropout is not supported: use --llama.{name}=0"
            )
    low, high = architecture.rope_scaling_low_freq_factor, architecture.rope_scaling_high_freq_factor
    if architecture.rope_scaling_type == "llama3" and low >= high:
        raise UserError(
            f"--llama.rope_scaling_low_freq_factor={low} must be below --llama.rope_scaling_high_freq_factor={high}: "
            "the usual ones are 1 and 4"
        )
    if architecture.num_experts and architecture.num_experts_per_tok > architecture.num_experts:
        raise UserError(
            f"--llama.num_experts_per_tok={architecture.num_experts_per_tok} is above --llama.num_experts="
            f"{architecture.num_experts}: --llama.num_experts_per_tok={architecture.num_experts} at most"
        )


def complete(architecture: Architecture) -> Architecture:
    """The architecture with what it leaves out filled in: as many key/value heads as heads, and head_dim.

    Raises UserError where hidden_size / num_attention_heads, which head_dim then is, is no whole number.
    """
    hidden_size, heads = architecture.hidden_size, architecture.num_attention_heads
    if architecture.head_dim is None and hidden_size % heads:
        raise UserError(
            f"--llama.hidden_size={hidden_size} is not divisible by --llama.num_attention_heads={heads}: "
            f"{either('--llama.hidden_size', nearest_multiples(hidden_size, heads))}, or give --llama.head_dim"
        )
    kv_heads, head_dim = architecture.num_key_value_heads, architecture.head_dim
    return replace(
        architecture,
        num_key_value_heads=heads if kv_heads is None else kv_heads,
        head_dim=hidden_size // heads if head_dim is None else head_dim,
    )


def with_head(config: Config) -> Architecture:
    """The architecture with the head that the objective reads. Raises UserError where flags ask for another one."""
    architecture, name = config.architecture, config.objective
    if name in SCORING:
        return replace(architecture, head="score")
    if name in CRITICS:
        return replace(architecture, head="both")
    if architecture.head == "score":
        raise UserError(
            f"--llama.head=score says no more than a number a token, of which --objective={name} learns nothing: "
            f"--objective={SCORING[0]}, or --llama.head=unembed"
        )
    return architecture


def check_same_mesh(config: Config, mesh_shape: MeshShape, device_count: int) -> None:
    """The original's commands give the mesh twice, and the two must be one."""
    if config.execution.mesh_dim is None:
        return
    try:
        inner, _ = parse_mesh_dim(config.execution.mesh_dim, device_count)
    except UserError:
        inner = None
    if inner != mesh_shape:
        raise UserError(
            f"--mesh_dim='{config.mesh_dim}' and --llama.mesh_dim='{config.execution.mesh_dim}' (mesh_dim inside "
            f"--update_llama_config) differ: leave the second one out, or give '{config.mesh_dim}' to both"
        )


def check_mesh(config: Config) -> None:
    """What the mesh splits: heads and feedforward over tp, the weights' model dim over fsdp and sp.

    The vocabulary need not be divisible: its tables get rows that are no tokens. What looks at a whole table would see
    them, and is refused.
    """
    architecture, execution = config.architecture, config.execution
    _, fsdp, tp, sp = config.mesh_shape
    for name, size in (
        ("num_attention_heads", architecture.num_attention_heads),
        ("num_key_value_heads", architecture.kv_heads),
        ("intermediate_size", architecture.intermediate_size),
    ):
        if size % tp:
            raise UserError(
                f"--llama.{name}={size} is not divisible by tp={tp} of --mesh_dim: "
                f"{either('tp', nearest_divisors(size, tp))}, {either(f'--llama.{name}', nearest_multiples(size, tp))}"
            )
    if architecture.hidden_size % (fsdp * sp):
        raise UserError(
            f"--llama.hidden_size={architecture.hidden_size} is not divisible by fsdp*sp={fsdp}*{sp} of --mesh_dim, "
            f"which split the weights: {_weights_fit(architecture.hidden_size, fsdp, sp)}"
        )
    optimizer = config.optimizer
    if architecture.vocab_size % tp and (
        optimizer.type == "palm"
        or (optimizer.type == "adamw" and optimizer.adamw_optimizer.multiply_by_parameter_scale)
    ):
        raise UserError(
            f"--llama.vocab_size={architecture.vocab_size} is not divisible by tp={tp} of --mesh_dim, and an optimizer "
            "that looks at the scale of a whole table would see the rows that are added: --optimizer.type=adamw "
            f"without multiply_by_parameter_scale, or {either('tp', nearest_divisors(architecture.vocab_size, tp))}"
        )
    check_sequence_parallel(config)
    check_offload(config)
    if sp > 1 and not execution.attention_type.startswith("ring"):
        raise UserError(
            f"--llama.attention_type='{execution.attention_type}' keeps a sequence on one device, but --mesh_dim has "
            f"sp={sp}: use --llama.attention_type=ring_blockwise, or sp=1"
        )


def check_offload(config: Config) -> None:
    """Weights in the host's memory come a layer at a time, for the forward, for the backward and for the update."""
    architecture, execution, optimizer = config.architecture, config.execution, config.optimizer
    if not optimizer.offload_params:
        return
    bad = "--optimizer.offload_params does not go with"
    if not execution.scan_layers or architecture.param_scan_axis:
        raise UserError(
            f"{bad} --llama.scan_layers={execution.scan_layers} and --llama.param_scan_axis="
            f"{architecture.param_scan_axis}: layers are fetched out of a stack: "
            "--llama.scan_layers=True --llama.param_scan_axis=0"
        )
    if execution.remat_block in ("", "everything_saveable"):
        raise UserError(
            f"{bad} --llama.remat_block='{execution.remat_block}': the backward would keep every layer's fetched "
            "weights: --llama.remat_block=nothing_saveable"
        )
    if execution.gathered_weights == "keep":
        raise UserError(
            f"{bad} --llama.gathered_weights=keep: every layer's fetched weights would stay on the device: "
            "--llama.gathered_weights=again"
        )
    if not optimizer.is_layerwise:
        what = "type=palm" if optimizer.type == "palm" else "adamw_optimizer.multiply_by_parameter_scale"
        raise UserError(
            f"{bad} --optimizer.{what}: its steps are in units of a whole weight, not of a layer: "
            "--optimizer.type=adamw, lion or muon"
        )


def check_sequence_parallel(config: Config) -> None:
    """How shares meet over sp: what heads the gathering and the dealing out of heads leave to a device."""
    architecture, execution, (_, _, tp, sp) = config.architecture, config.execution, config.mesh_shape
    heads, kv_heads = architecture.num_attention_heads // tp, architecture.kv_heads // tp
    parallel = execution.sequence_parallel
    stride, at_a_time, degree = execution.heads_k_stride, execution.kv_heads_at_a_time, execution.ulysses_degree
    given = f"--llama.num_key_value_heads={architecture.kv_heads} over tp={tp}"
    if stride is not None and parallel != "all_gather":
        raise UserError(
            f"--llama.heads_k_stride={stride} goes with gathered keys, not with --llama.sequence_parallel="
            f"{parallel}: add --llama.sequence_parallel=all_gather, or leave it out"
        )
    for name, value in (("heads_k_stride", stride), ("kv_heads_at_a_time", at_a_time)):
        if value is not None:
            _divides(name, value, kv_heads, f"the {kv_heads} key/value heads of a device ({given})")
    if at_a_time is not None and parallel not in ("ring", "all_gather"):
        raise UserError(
            f"--llama.kv_heads_at_a_time={at_a_time} does not go with --llama.sequence_parallel="
            f"{parallel}: use --llama.sequence_parallel=ring, or leave it out"
        )
    if at_a_time is not None and architecture.num_experts:
        raise UserError(
            f"--llama.kv_heads_at_a_time={at_a_time} does not go with experts (--llama.num_experts="
            f"{architecture.num_experts}): leave it out"
        )
    if (degree is not None) != (parallel == "ulysses_ring") or (degree and sp % degree):
        raise UserError(
            f"--llama.ulysses_degree={degree} with --llama.sequence_parallel={parallel}: "
            f"ulysses_ring, and only that, needs a divisor of sp={sp}: --llama.sequence_parallel=ulysses_ring and "
            f"{either('--llama.ulysses_degree', nearest_divisors(sp, degree or sp))}"
        )
    if execution.ring_bidirectional and parallel in ("all_gather", "ulysses"):
        raise UserError(
            f"--llama.ring_bidirectional is for a ring, not for --llama.sequence_parallel="
            f"{parallel}: use --llama.sequence_parallel=ring, or leave it out"
        )
    dealt = {"ulysses": sp, "ulysses_ring": degree or 1}.get(parallel, 1)
    if heads % dealt or (kv_heads % dealt and dealt % kv_heads):
        raise UserError(
            f"--llama.sequence_parallel={parallel} deals {heads} query and {kv_heads} key/value "
            f"heads of a device out to {dealt}, which is not possible: use --llama.sequence_parallel=ring, or "
            f"{either('ulysses_ring with --llama.ulysses_degree', nearest_divisors(math.gcd(kv_heads, sp), dealt)[:1])}"
        )


def _weights_fit(hidden_size: int, fsdp: int, sp: int) -> str:
    """The nearest sp, or failing that fsdp, by which the model dim can be split."""
    if sp > 1 and hidden_size % fsdp == 0:
        return either("sp", nearest_divisors(hidden_size // fsdp, sp))
    if hidden_size % sp == 0:
        return either("fsdp", nearest_divisors(hidden_size // sp, fsdp))
    return either("a product fsdp*sp", nearest_divisors(hidden_size, fsdp * sp))


def check_datasets(config: Config) -> None:
    """Raises UserError for the first value of a dataset that cannot work; expects what check() expects."""
    check_dataset("train_dataset", config.train_dataset, config, config.optimizer.accumulate_gradient_steps)
    if config.eval_steps > 0:
        check_dataset("eval_dataset", config.eval_dataset, config, accumulate=1)


def check_dataset(split: str, dataset: DatasetConfig, config: Config, accumulate: int) -> None:
    """The chosen source's sizes against the mesh and the model. `accumulate` is 1 where batches are not split."""
    prefix = f"--{split}.{dataset.group}."
    if split == "eval_dataset" and dataset.type != "python" and not getattr(dataset.source, "path", "no path"):
        raise UserError(
            f"--eval_steps={config.eval_steps} evaluates, but {prefix}path is empty: give it a .jsonl file, or use "
            "--eval_steps=0"
        )
    check_examples(split, dataset)
    dp, fsdp, _, sp = config.mesh_shape
    rows = dp * fsdp * accumulate
    parts = f" times --optimizer.accumulate_gradient_steps={accumulate}" if accumulate > 1 else ""
    why = f"dp*fsdp={dp}*{fsdp} of --mesh_dim{parts} = {rows}"
    _is_multiple(f"{prefix}batch_size", dataset.batch_size, rows, why)
    check_sequence(f"{prefix}seq_length", dataset.seq_length, config, sp)


def check_examples(split: str, dataset: DatasetConfig) -> None:
    """How examples are read: what is bad, and what goes around a prompt."""
    bad_lines_allowed(dataset.on_bad_line, f"--{split}.on_bad_line")
    processor, group = dataset.text_processor, f"--{split}.text_processor"
    if processor.input_template and "{}" not in processor.input_template:
        raise UserError(
            f"{group}.input_template={processor.input_template!r} has no {{}} where the prompt goes: "
            f"try {group}.input_template='User: {{}}\\nAssistant: '"
        )
    if not all(role.strip() for role in processor.roles_to_train.split(",")):
        raise UserError(f"{group}.roles_to_train={processor.roles_to_train!r} has an empty name: try assistant")
    read_literals(f"{group}.chat_template_kwargs", processor.chat_template_kwargs)
    if dataset.type == "tfds" and not dataset.tfds_dataset.name:
        raise UserError(f"--{split}.tfds_dataset.name is empty: give the name of a prepared TFDS data set")


def bad_lines_allowed(text: str, flag: str) -> int:
    """`"skip:3"` -> 3, `"stop"` -> 0."""
    match = re.fullmatch(r"skip:([0-9]{1,15})", text)
    if text != "stop" and not match:
        raise UserError(f"{flag}={text!r} is none of stop, skip:N: did you mean {flag}=skip:10?")
    return int(match[1]) if match else 0


def check_sequence(flag: str, seq_length: int, config: Config, sp: int) -> None:
    """One dataset's sequence against sp, the layout, the model's length and the chunks of the local sequence."""
    execution = config.execution
    layout = execution.sequence_layout
    pieces = sp * 2 if layout in ("zigzag", "balanced") else sp
    why = f"2*sp={pieces} ({layout}, sp={sp} of --mesh_dim)" if pieces > sp else f"sp={sp} of --mesh_dim"
    _is_multiple(flag, seq_length, pieces, why)
    if execution.residual_over_tp:
        tp = config.mesh_shape.tp
        why = f"sp*tp={sp}*{tp} of --mesh_dim, over which --llama.residual_over_tp splits tokens"
        _is_multiple(flag, seq_length, sp * tp, why)
    if seq_length > config.architecture.max_sequence_length:
        shorter = config.architecture.max_sequence_length // pieces * pieces
        raise UserError(
            f"{flag}={seq_length} is above --llama.max_sequence_length={config.architecture.max_sequence_length}: "
            f"use --llama.max_sequence_length={seq_length}" + (f" or {flag}={shorter}" if shorter else "")
        )
    local = seq_length // sp
    if execution.ring_bidirectional and local % 2:
        raise UserError(
            f"--llama.ring_bidirectional halves the {local} tokens of a device ({flag}={seq_length} over sp={sp}): "
            f"{either(flag, nearest_multiples(seq_length, 2 * sp))}, or leave it out"
        )
    chunks = {"loss_chunk_size": execution.loss_chunk_size}
    if execution.scan_mlp:
        chunks["scan_mlp_chunk_size"] = execution.scan_mlp_chunk_size
    for name, chunk in chunks.items():
        if chunk < local:
            _divides(name, chunk, local, f"the {local} tokens of a device ({flag}={seq_length} over sp={sp})")
