"""What a dataset's flags must be: by themselves, and against the mesh and the model.

As in `ringbpt.config.checks`, each mistake raises UserError with one line that gives the nearest values that work.
"""

import re

from ringbpt.config.checks import at_least, either, nearest_divisors, nearest_multiples
from ringbpt.config.fields import Config, DatasetConfig, UserError, flag_values

SOURCE_AT_LEAST: dict[str, float] = {
    "seq_length": 1,
    "batch_size": 1,
    "start_seek_loc": 0,
    "example_index_at_start": 0,
    "tokens_count_at_start": 0,
    "tokenizer_processes": 0,
    "tokenizer_parallel_chunk_size": 1,
    "tokenizer_parallel_batch_size": 1,
    "throughput_average_window_size": 1,
}


def check_datasets(config: Config) -> None:
    """Raises UserError for the first value of a dataset that cannot work; expects what config_checks.check expects."""
    check_dataset("train_dataset", config.train_dataset, config, config.optimizer.accumulate_gradient_steps)
    if config.eval_steps > 0:
        check_dataset("eval_dataset", config.eval_dataset, config, accumulate=1)


def check_dataset(split: str, dataset: DatasetConfig, config: Config, accumulate: int) -> None:
    """The chosen source's sizes against the mesh and the model. `accumulate` is 1 where batches are not split."""
    prefix = f"--{split}.{dataset.group}."
    values = flag_values(config)
    for name, least in SOURCE_AT_LEAST.items():
        at_least((prefix + name)[2:], values.get((prefix + name)[2:]), least)
    if split == "eval_dataset" and dataset.type != "python" and not getattr(dataset.source, "path", "no path"):
        raise UserError(
            f"--eval_steps={config.eval_steps} evaluates, but {prefix}path is empty: give it a .jsonl file, or use "
            "--eval_steps=0"
        )
    check_examples(split, dataset)
    dp, fsdp, _, sp = config.mesh_shape
    rows = dp * fsdp * accumulate
    if dataset.batch_size % rows:
        parts = f"dp*fsdp={dp}*{fsdp} of --mesh_dim"
        if accumulate > 1:
            parts += f" times --optimizer.accumulate_gradient_steps={accumulate}"
        raise UserError(
            f"{prefix}batch_size={dataset.batch_size} is not divisible by {parts} = {rows}: "
            f"{either(prefix + 'batch_size', nearest_multiples(dataset.batch_size, rows))}"
        )
    check_sequence(f"{prefix}seq_length", dataset.seq_length, config, sp)


def check_examples(split: str, dataset: DatasetConfig) -> None:
    """How examples are read: what is bad, how many, and what goes around a prompt."""
    at_least(f"{split}.max_samples", dataset.max_samples, 0)
    bad_lines_allowed(dataset.on_bad_line, f"--{split}.on_bad_line")
    processor, group = dataset.text_processor, f"--{split}.text_processor"
    if processor.input_template and "{}" not in processor.input_template:
        raise UserError(
            f"{group}.input_template={processor.input_template!r} has no {{}} where the prompt goes: "
            f"try {group}.input_template='User: {{}}\\nAssistant: '"
        )
    if not all(role.strip() for role in processor.roles_to_train.split(",")):
        raise UserError(f"{group}.roles_to_train={processor.roles_to_train!r} has an empty name: try assistant")
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
    pieces = sp * 2 if execution.sequence_layout == "zigzag" else sp
    if seq_length % pieces:
        why = f"2*sp={pieces} (zigzag, sp={sp} of --mesh_dim)" if pieces > sp else f"sp={sp} of --mesh_dim"
        raise UserError(
            f"{flag}={seq_length} is not divisible by {why}: {either(flag, nearest_multiples(seq_length, pieces))}"
        )
    tp = config.mesh_shape[2]
    if execution.residual_over_tp and seq_length % (sp * tp):
        raise UserError(
            f"{flag}={seq_length} is not divisible by sp*tp={sp}*{tp} of --mesh_dim, over which "
            f"--llama.residual_over_tp splits tokens: {either(flag, nearest_multiples(seq_length, sp * tp))}"
        )
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
        if chunk < local and local % chunk:
            raise UserError(
                f"--llama.{name}={chunk} does not divide the {local} tokens of a device ({flag}={seq_length} over "
                f"sp={sp}): {either(f'--llama.{name}', nearest_divisors(local, chunk))}"
            )
