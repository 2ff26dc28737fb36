"""What values go together: the mesh's sizes, and every check across flags.

Each mistake raises UserError with one line that names the flags, says what is wrong, and gives the nearest values
that work. Nothing here knows how a flag was written; `ringbpt.config` reads them.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from ringbpt.config.fields import DATASET_TYPES, FILE_FORMATS, Architecture, Config, UserError, flag_values
from ringbpt.dims import AXES, MeshShape

DTYPES = {"fp32": "fp32", "float32": "fp32", "bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16"}
REMAT_POLICIES = (
    "",
    "everything_saveable",
    "nothing_saveable",
    "dots_saveable",
    "checkpoint_dots",
    "dots_with_no_batch_dims_saveable",
    "checkpoint_dots_with_no_batch_dims",
    "save_attention",
)
# What only a whole layer can do: its input goes to the host's memory.
BLOCK_POLICIES = (*REMAT_POLICIES, "offload_inputs")
CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": tuple(DTYPES),
    "objective": ("sft",),
    "checkpointer.float_dtype": tuple(DTYPES),
    "llama.attention_type": ("standard", "blockwise", "ring_standard", "ring_blockwise"),
    "llama.attention_kernel": (
        "auto",
        "reference",
        "blockwise",
        "pallas_tpu",
        "pallas_tpu_interpreted",
        "pallas_triton",
        "pallas_triton_interpreted",
        "pallas_hopper",
        "pallas_hopper_interpreted",
        "cudnn",
    ),
    "llama.sequence_parallel": ("auto", "ring", "all_gather", "ulysses", "ulysses_ring"),
    "llama.sequence_layout": ("auto", "contiguous", "zigzag", "striped"),
    "llama.rope_scaling_type": ("", "linear", "llama3", "yarn"),
    "llama.remat_block": BLOCK_POLICIES,
    "llama.remat_attention": REMAT_POLICIES,
    "llama.remat_mlp": REMAT_POLICIES,
    "optimizer.type": ("adamw", "palm", "lion", "muon"),
    "optimizer.schedule": ("warmup_cosine", "warmup_linear", "wsd"),
} | {
    f"{split}.{name}": choices
    for split in ("train_dataset", "eval_dataset")
    for name, choices in (
        ("type", (*DATASET_TYPES, *FILE_FORMATS)),
        ("packing", ("concat", "first_fit", "best_fit")),
        ("long_documents", ("split", "drop", "refuse")),
        ("text_processor.train_on_eos", ("turn", "all", "last", "none")),
        (
            "text_processor.shape",
            ("", "text", "messages", "sharegpt", "alpaca", "prompt_completion", "preference", "kto", "rl"),
        ),
        ("python_dataset.split", ("train", "heldout", "all")),
    )
}
AT_LEAST: dict[str, float] = {
    "seed": 0,
    "total_steps": 1,
    "log_freq": 1,
    "save_model_freq": 0,
    "save_milestone_freq": 0,
    "eval_steps": 0,
    "eval_batches": 1,
    "num_cpu_devices": 0,
    "optimizer.accumulate_gradient_steps": 1,
    "llama.vocab_size": 1,
    "llama.hidden_size": 1,
    "llama.intermediate_size": 1,
    "llama.num_hidden_layers": 1,
    "llama.num_attention_heads": 1,
    "llama.num_key_value_heads": 1,
    "llama.head_dim": 2,
    "llama.max_sequence_length": 1,
    "llama.initializer_range": 0,
    "llama.rope_scaling_original_length": 1,
    "llama.sliding_window": 1,
    "llama.num_experts": 0,
    "llama.num_experts_per_tok": 1,
    "llama.router_aux_loss_coef": 0,
    "llama.heads_k_stride": 1,
    "llama.kv_heads_at_a_time": 1,
    "llama.ulysses_degree": 1,
    "llama.scan_query_chunk_size": 1,
    "llama.scan_key_chunk_size": 1,
    "llama.scan_mlp_chunk_size": 1,
    "llama.loss_chunk_size": 1,
    "llama.param_scan_axis": 0,
}
ABOVE_ZERO = (
    "llama.rms_norm_eps",
    "llama.theta",
    "llama.rope_scaling_factor",
    "llama.rope_scaling_low_freq_factor",
    "llama.rope_scaling_high_freq_factor",
    "llama.rope_scaling_beta_fast",
    "llama.rope_scaling_beta_slow",
    "optimizer.wsd_decay_fraction",
)
AT_MOST: dict[str, float] = {"seed": 2**32 - 1, "llama.param_scan_axis": 1, "optimizer.wsd_decay_fraction": 1}
# The same, of the group that optimizer.type chooses; the other groups have no effect.
OPTIMIZER_AT_LEAST: dict[str, float] = {
    "lr": 0,
    "adam_lr": 0,
    "init_lr": 0,
    "end_lr": 0,
    "weight_decay": 0,
    "lr_warmup_steps": 0,
    "lr_decay_steps": 1,
    "clip_gradient": 0,  # 0: no clipping
}
CHECKPOINT_KINDS = ("params", "trainstate", "trainstate_params", "flax_params", "huggingface")


def nearest_name(name: str, names: Iterable[str]) -> str:
    """The closest of `names`, or the first one if nothing is close."""
    names = list(names)
    return (get_close_matches(name, names, n=1, cutoff=0.3) or names)[0]


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


def parse_mesh_dim(text: str, device_count: int, flag: str = "--mesh_dim") -> tuple[MeshShape, bool]:
    """`"1,-1,1,4"` or `"dp:1,fsdp:-1,tp:1,sp:4"` on `device_count` devices -> (sizes of AXES, plain device order).

    One -1 takes the devices that the others leave; in the named form an axis that is left out is 1; a leading `!`
    asks for the devices in plain order. Raises UserError, with `flag` as the name of the culprit, where the text is
    no mesh or its product is not the number of devices.
    """
    plain_order = text.strip().startswith("!")
    sizes = mesh_sizes(text, flag)
    fixed = math.prod(size for size in sizes if size != -1)
    resolved = [device_count // fixed if size == -1 else size for size in sizes]
    if math.prod(resolved) != device_count or 0 in resolved:
        multiple = "a multiple of " if -1 in sizes else ""
        fits = ",".join(map(str, _nearest_mesh(sizes, device_count)))
        raise UserError(
            f"{flag}='{text}' needs {multiple}{fixed} devices, but there are {device_count}: "
            f"{flag}='{fits}' fits (on a CPU, --num_cpu_devices={fixed} gives that many)"
        )
    return MeshShape(*resolved), plain_order


def mesh_sizes(text: str, flag: str) -> list[int]:
    """The four sizes as written, -1 included."""
    body, shown = text.strip().removeprefix("!"), f"{flag}='{text}'"
    form = "four sizes dp,fsdp,tp,sp, one of which may be -1, as '1,-1,1,1' or 'dp:1,fsdp:-1,tp:1,sp:1'"
    parts = [part.strip() for part in body.split(",")]
    if ":" in body:
        named = [part.partition(":")[::2] for part in parts]
        names = [name.strip() for name, _ in named]
        for name in names:
            if name not in AXES or names.count(name) > 1:
                what = "twice" if name in AXES else f"which is no axis (did you mean {nearest_name(name, AXES)}?)"
                raise UserError(f"{shown} names the axis '{name}' {what}: write {form}")
        parts = [dict(zip(names, (size for _, size in named), strict=True)).get(axis, "1").strip() for axis in AXES]
    if len(parts) != len(AXES):
        raise UserError(f"{shown} has {len(parts)} sizes: write {form}")
    for part in parts:
        if not re.fullmatch(r"-1|[0-9]{1,9}", part) or int(part) == 0:
            raise UserError(f"{shown}: '{part}' is no size of an axis (1 or more, or -1): write {form}")
    if parts.count("-1") > 1:
        raise UserError(f"{shown} has more than one -1: write {form}")
    return [int(part) for part in parts]


def _nearest_mesh(sizes: list[int], device_count: int) -> list[int]:
    """`sizes` with one axis replaced by what makes the product right, the least change first; else all on fsdp."""
    candidates = []
    for place in range(len(AXES)):
        others = math.prod(abs(size) for at, size in enumerate(sizes) if at != place)
        if others <= device_count and device_count % others == 0:
            replaced = [device_count // others if at == place else abs(size) for at, size in enumerate(sizes)]
            change = abs(math.log(replaced[place] / abs(sizes[place])))
            candidates.append((change, -abs(sizes[place]), replaced))
    return min(candidates)[2] if candidates else [1, device_count, 1, 1]


def check(config: Config) -> None:
    """Raises UserError for the first pair of values that cannot work.

    Expects that check_values() found nothing, and a resolved `config`: mesh_shape, llama.num_key_value_heads,
    llama.head_dim and llama.sequence_layout filled in.
    """
    check_run(config)
    check_optimizer(config)
    check_model(config)
    check_mesh(config)


def check_values(config: Config) -> None:
    """Each flag by itself, from the tables above."""
    values = flag_values(config)
    for name, choices in CHOICES.items():
        value = values[name]
        if value not in choices:
            listed = ", ".join(choice or "''" for choice in choices)
            nearest = nearest_name(value, choices)
            raise UserError(f"--{name}='{value}' is none of {listed}: did you mean --{name}='{nearest}'?")
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name}={value} is not a finite number: try --{name}={_default(name)}")
    for name, least in AT_LEAST.items():
        at_least(name, values[name], least)
    for name in ABOVE_ZERO:
        if values[name] <= 0:
            raise UserError(f"--{name}={values[name]} must be above 0: try --{name}={_default(name)}")
    for name, most in AT_MOST.items():
        if values[name] > most:
            raise UserError(f"--{name}={values[name]} is above {most}: use --{name}={most} at most")


def _default(name: str) -> Any:
    return flag_values(Config())[name]


def at_least(name: str, value: float | None, least: float) -> None:
    if value is not None and not value >= least:
        raise UserError(f"--{name}={value} is below {least}: use --{name}={least} or more")


def check_run(config: Config) -> None:
    """The run's name, what it starts from, what it evaluates, and its processes."""
    if config.eval_passkey and not re.fullmatch(r"[1-9][0-9]*(,[1-9][0-9]*)*", config.eval_passkey):
        raise UserError(f"--eval_passkey={config.eval_passkey!r} is no list of lengths: as --eval_passkey=512,1024")
    for name in ("eval_passkey", "eval_by_position"):
        if getattr(config, name) and not config.eval_steps:
            raise UserError(
                f"--{name} is looked at in evaluations, and --eval_steps=0 means none: try --eval_steps=100"
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
    if config.load_checkpoint:
        check_load_checkpoint(config.load_checkpoint)
    processes = config.jax_distributed
    if processes.num_processes is not None:
        at_least("jax_distributed.num_processes", processes.num_processes, 1)
    if processes.process_id is not None:
        at_least("jax_distributed.process_id", processes.process_id, 0)
        if processes.num_processes is not None and processes.process_id >= processes.num_processes:
            raise UserError(
                f"--jax_distributed.process_id={processes.process_id} does not go with "
                f"--jax_distributed.num_processes={processes.num_processes}: ids run from 0 to "
                f"{processes.num_processes - 1}"
            )


def check_load_checkpoint(text: str) -> None:
    """`kind::path`; whether the path holds such a checkpoint is for the reader of checkpoints to say."""
    kind, separator, path = text.partition("::")
    if not separator:
        raise UserError(
            f"--load_checkpoint={text!r} does not say what it holds: --load_checkpoint='params::{text}', or one of "
            f"{', '.join(f'{other}::' for other in CHECKPOINT_KINDS[1:])} before the path"
        )
    if kind not in CHECKPOINT_KINDS:
        raise UserError(
            f"--load_checkpoint={text!r}: '{kind}::' is none of {', '.join(f'{k}::' for k in CHECKPOINT_KINDS)}: "
            f"did you mean '{nearest_name(kind, CHECKPOINT_KINDS)}::{path}'?"
        )
    if not path:
        raise UserError(f"--load_checkpoint={text!r} has no path: write '{kind}::/path/of/the/checkpoint'")


def check_optimizer(config: Config) -> None:
    """The chosen optimizer's rates, betas and steps."""
    chosen = config.optimizer.type
    prefix = f"optimizer.{chosen}_optimizer."
    group = {name[len(prefix) :]: value for name, value in flag_values(config).items() if name.startswith(prefix)}
    for name, least in OPTIMIZER_AT_LEAST.items():
        at_least(prefix + name, group.get(name), least)
    if chosen == "palm":  # its rate is 1/sqrt(step) after the warmup, and step 0 has none
        at_least(prefix + "lr_warmup_steps", group["lr_warmup_steps"], 1)
    for name in ("b1", "b2", "beta"):
        if name in group and not 0 <= group[name] < 1:
            raise UserError(f"--{prefix}{name}={group[name]} is not in [0, 1): try {_default(prefix + name)}")
    if chosen == "muon" and group["lr"] == 0:  # adam's rate is a share of muon's
        raise UserError(f"--{prefix}lr=0 must be above 0: try --{prefix}lr={_default(prefix + 'lr')}")
    decay = group.get("lr_decay_steps")
    if decay is not None:
        # The cosine needs one step at least between the two.
        most = decay - 1 if config.optimizer.schedule == "warmup_cosine" else decay
        if group["lr_warmup_steps"] > most:
            enough = group["lr_warmup_steps"] + decay - most
            raise UserError(
                f"--{prefix}lr_warmup_steps={group['lr_warmup_steps']} leaves no step to decay before "
                f"--{prefix}lr_decay_steps={decay}, which counts the warmup too: "
                f"--{prefix}lr_warmup_steps={most} or --{prefix}lr_decay_steps={enough}"
            )
    if chosen == "palm" and config.optimizer.schedule != _default("optimizer.schedule"):
        raise UserError(
            f"--optimizer.schedule={config.optimizer.schedule} does not go with --optimizer.type=palm, which has its "
            "own schedule: leave it out, or use --optimizer.type=adamw"
        )


def check_model(config: Config) -> None:
    """The model's own sizes, and what it cannot do."""
    architecture = config.architecture
    heads, kv_heads = (
        architecture.num_attention_heads,
        architecture.num_key_value_heads or architecture.num_attention_heads,
    )
    if heads % kv_heads:
        values = nearest_divisors(heads, kv_heads)
        raise UserError(
            f"--llama.num_key_value_heads={kv_heads} does not divide --llama.num_attention_heads={heads}: "
            f"{either('--llama.num_key_value_heads', values)}"
        )
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
    if (
        architecture.rope_scaling_type == "llama3"
        and architecture.rope_scaling_low_freq_factor >= architecture.rope_scaling_high_freq_factor
    ):
        raise UserError(
            f"--llama.rope_scaling_low_freq_factor={architecture.rope_scaling_low_freq_factor} must be below "
            f"--llama.rope_scaling_high_freq_factor={architecture.rope_scaling_high_freq_factor}: the usual "
            "ones are 1 and 4"
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
    """What the mesh splits: heads, feedforward and vocabulary over tp, the weights' model dim over fsdp and sp."""
    architecture, execution = config.architecture, config.execution
    _, fsdp, tp, sp = config.mesh_shape
    kv_heads = architecture.num_key_value_heads or architecture.num_attention_heads
    for name, size in (
        ("num_attention_heads", architecture.num_attention_heads),
        ("num_key_value_heads", kv_heads),
        ("intermediate_size", architecture.intermediate_size),
        ("vocab_size", architecture.vocab_size),
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
    if not optimizer.is_layerwise:
        what = "type=palm" if optimizer.type == "palm" else "adamw_optimizer.multiply_by_parameter_scale"
        raise UserError(
            f"{bad} --optimizer.{what}: its steps are in units of a whole weight, not of a layer: "
            "--optimizer.type=adamw, lion or muon"
        )


def check_sequence_parallel(config: Config) -> None:
    """How shares meet over sp: what heads the gathering and the dealing out of heads leave to a device."""
    architecture, execution, (_, _, tp, sp) = config.architecture, config.execution, config.mesh_shape
    heads = architecture.num_attention_heads // tp
    kv_heads = (architecture.num_key_value_heads or architecture.num_attention_heads) // tp
    stride, degree = execution.heads_k_stride, execution.ulysses_degree
    if stride is not None and execution.sequence_parallel != "all_gather":
        raise UserError(
            f"--llama.heads_k_stride={stride} goes with gathered keys, not with --llama.sequence_parallel="
            f"{execution.sequence_parallel}: add --llama.sequence_parallel=all_gather, or leave it out"
        )
    if stride is not None and kv_heads % stride:
        raise UserError(
            f"--llama.heads_k_stride={stride} does not divide the {kv_heads} key/value heads of a device "
            f"(--llama.num_key_value_heads={architecture.num_key_value_heads} over tp={tp}): "
            f"{either('--llama.heads_k_stride', nearest_divisors(kv_heads, stride))}"
        )
    at_a_time = execution.kv_heads_at_a_time
    if at_a_time is not None and kv_heads % at_a_time:
        raise UserError(
            f"--llama.kv_heads_at_a_time={at_a_time} does not divide the {kv_heads} key/value heads of a device "
            f"(--llama.num_key_value_heads={architecture.num_key_value_heads} over tp={tp}): "
            f"{either('--llama.kv_heads_at_a_time', nearest_divisors(kv_heads, at_a_time))}"
        )
    if at_a_time is not None and execution.sequence_parallel not in ("ring", "all_gather"):
        raise UserError(
            f"--llama.kv_heads_at_a_time={at_a_time} does not go with --llama.sequence_parallel="
            f"{execution.sequence_parallel}: use --llama.sequence_parallel=ring, or leave it out"
        )
    if at_a_time is not None and architecture.num_experts:
        raise UserError(
            f"--llama.kv_heads_at_a_time={at_a_time} does not go with experts (--llama.num_experts="
            f"{architecture.num_experts}): leave it out"
        )
    if (degree is not None) != (execution.sequence_parallel == "ulysses_ring") or (degree and sp % degree):
        raise UserError(
            f"--llama.ulysses_degree={degree} with --llama.sequence_parallel={execution.sequence_parallel}: "
            f"ulysses_ring, and only that, needs a divisor of sp={sp}: --llama.sequence_parallel=ulysses_ring and "
            f"{either('--llama.ulysses_degree', nearest_divisors(sp, degree or sp))}"
        )
    if execution.ring_bidirectional and execution.sequence_parallel in ("all_gather", "ulysses"):
        raise UserError(
            f"--llama.ring_bidirectional is for a ring, not for --llama.sequence_parallel="
            f"{execution.sequence_parallel}: use --llama.sequence_parallel=ring, or leave it out"
        )
    dealt = {"ulysses": sp, "ulysses_ring": degree or 1}.get(execution.sequence_parallel, 1)
    if heads % dealt or (kv_heads % dealt and dealt % kv_heads):
        raise UserError(
            f"--llama.sequence_parallel={execution.sequence_parallel} deals {heads} query and {kv_heads} key/value "
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
