"""What an accelerator does with the training step itself: one table for the first minutes with a machine.

Kernels, the loop's own step of a few layers of a large model at long sequences (time, MFU and peak memory beside what
the plan says of that very program), the way to the host's memory and back, decoding, and the debug recipe. Each is
measured in a process of its own: a device's peak of memory is never reset within one, and what hangs or breaks the
device ends alone. What was measured is handed on at once, and what there is no time for is listed.
"""

import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from ringbpt import hardware
from ringbpt.bench import NO_DEVICE, SECTIONS, kernels
from ringbpt.bench.isolated import Ended, Tell, host_memory, in_a_process
from ringbpt.bench.kernels import Problem
from ringbpt.config import ROOT, Config, UserError, parse, parse_args
from ringbpt.data.documents import Piece, make_batch
from ringbpt.generation.generator import Generator, plan_rows
from ringbpt.generation.sampling import Sampling
from ringbpt.mesh import mesh_of
from ringbpt.model.flops import training_flops
from ringbpt.model.llama import Model
from ringbpt.objectives import objective_of
from ringbpt.planning.attention_runs import kernel_of
from ringbpt.planning.estimate import Flops, step_flops, visible_pairs
from ringbpt.planning.hlo import parse as parse_hlo
from ringbpt.planning.program import Program, read_program, shard_bytes, step_and_arguments
from ringbpt.planning.report import Plan
from ringbpt.planning.topologies import Topology, uncached
from ringbpt.training.loop import train
from ringbpt.training.memory import closed_form, host_traffic
from ringbpt.training.metrics import read_rows
from ringbpt.training.state import StateLayout

TIMED = 3  # steps, after one that warms up
GIB = 2**30


@dataclass(frozen=True)
class Asked:
    """What is measured. model: its flags, but for its layers and lengths. steps: (tokens, layers), what matters most
    first. offload_from: tokens from which layers' inputs and the optimizer's state wait in the host's memory. host:
    bytes that go there and back. decodes: (texts, tokens of each one's prompt). parts: which of SECTIONS. cpu: whether
    the device may be one.
    """

    model: tuple[str, ...]
    steps: tuple[tuple[int, int], ...]
    offload_from: int
    kernels: tuple[str, ...]
    problems: tuple[Problem, ...]
    check_length: int
    host: tuple[int, ...]
    debug_steps: int
    decodes: tuple[tuple[int, int], ...]
    new_tokens: int
    parts: tuple[str, ...] = SECTIONS
    cpu: bool = False


K = 1024
LLAMA_8B = (
    *("--llama.hidden_size=4096", "--llama.intermediate_size=14336", "--llama.vocab_size=128256", "--dtype=bf16"),
    *("--llama.num_attention_heads=32", "--llama.num_key_value_heads=8", "--llama.theta=500000"),
)
DEFAULT = Asked(
    model=LLAMA_8B,
    steps=((128 * K, 2), (1024 * K, 2), (512 * K, 2), (128 * K, 4), (512 * K, 4), (1024 * K, 4)),
    offload_from=256 * K,
    kernels=("auto", "cudnn"),
    problems=tuple(Problem(length * K, 128, 32, 8) for length in (32, 16, 8)),
    check_length=2 * K,
    host=(64 << 20, 4 << 30),
    debug_steps=5,
    decodes=((1, 32 * K), (8, 4 * K)),
    new_tokens=64,
)
TINY = Asked(
    model=("--load_llama_config=debug", "--llama.vocab_size=256", "--llama.num_key_value_heads=2", "--dtype=fp32"),
    steps=((64, 2), (128, 2)),
    offload_from=128,
    kernels=("blockwise", "pallas_triton_interpreted"),
    problems=(Problem(64, 16, 2, 1),),
    check_length=64,
    host=(1 << 20,),
    debug_steps=2,
    decodes=((2, 64),),
    new_tokens=4,
    cpu=True,
)


def config_of(asked: Asked, tokens: int, layers: int) -> Config:
    """The run whose step is measured: one row, one device."""
    away = ("--llama.remat_block=offload_inputs", "--llama.kv_heads_at_a_time=1", "--optimizer.offload_state")
    flags = [
        *asked.model,
        *(f"--llama.num_hidden_layers={layers}", f"--llama.max_sequence_length={tokens}", "--llama.scan_mlp"),
        *(away if tokens >= asked.offload_from else ("--llama.remat_block=save_attention",)),
        *(f"--train_dataset.json_dataset.seq_length={tokens}", "--train_dataset.json_dataset.batch_size=1"),
        "--mesh_dim=1,1,1,1",
    ]
    return parse(parse_args(flags), 1)


# ── the training step ────────────────────────────────────────────────────────────────────────────────────────────────


def compiled_and_planned(config: Config, device: jax.Device) -> tuple[Any, Plan, float]:
    """(the compiled step, the plan's reading of it, seconds that its compiler took); nothing is allocated.

    Raises NotImplementedError with the bytes where it does not fit.
    """
    step, (state, batch), away = step_and_arguments(config, (device,))
    kept = [x for x, host in zip(jax.tree.leaves(state), jax.tree.leaves(away), strict=True) if not host]
    made: list[Any] = []
    seconds = 0.0

    def compile(options: dict[str, Any]) -> Any:
        nonlocal seconds
        start = time.monotonic()
        made.append(step.lower(state, batch).compile(options))
        seconds = time.monotonic() - start
        return made[0]

    arguments = {"state": shard_bytes(kept), "batch": shard_bytes(batch)}
    try:
        with uncached():
            program = read_program(compile, arguments, "jit_step")
    except ValueError:  # a compiler that dumps other files than are known says less, and its program runs all the same
        memory, held = made[0].memory_analysis(), sum(arguments.values())
        temporaries, host = memory.temp_size_in_bytes, memory.host_temp_size_in_bytes
        host += memory.host_argument_size_in_bytes
        program = Program(arguments, temporaries, held + temporaries, host, [], made[0].as_text())
    if not made:
        raise NotImplementedError(f"does not fit: {program.total / GIB:.1f} GiB, says the compiler")
    platform = "cuda" if device.platform == "gpu" else device.platform
    if not program.host:  # a CPU's compiler does not say
        waiting = shard_bytes([x for x, host in zip(*map(jax.tree.leaves, (state, away)), strict=True) if host])
        program = replace(program, host=waiting + host_traffic(config, 1, config.train_dataset.seq_length)[0] // 2)
    machine = Topology(device.device_kind, platform, (device,), 1, hardware.find(device.device_kind))
    return made[0], Plan(config, machine, program), seconds


def said_by(plan: Plan) -> dict[str, Any]:
    """What the plan has of the step's time, and of its memory and traffic without a compiler."""
    config, program = plan.config, plan.program
    parts, flops = closed_form(config, plan.machine.platform), step_flops(config)
    row = {
        "kernel": kernel_of(parse_hlo(program.text)), "closed_form_bytes": sum(parts.values()) if parts else None,
        "host_traffic": host_traffic(config, 1, config.train_dataset.seq_length),
        "executed_flops": flops.model + flops.recompute, "planned_seconds": None, "planned_mfu": None,
    }  # fmt: skip
    try:
        said = plan.as_dict()
    except Exception as failure:  # of reading a program that no plan has read before: it runs all the same
        return row | {"plan_failed": kernels.line(failure)}
    flops = Flops(**said["flops"])
    return row | {
        "executed_flops": flops.model + flops.recompute, "planned_seconds": said["step_seconds"],
        "planned_mfu": said["mfu"],
    }  # fmt: skip


def tokens_of(config: Config, seed: int = 0) -> Any:
    """A host batch of one row: one document of seeded tokens, all of which take loss."""
    length = config.train_dataset.seq_length
    token = np.random.default_rng(seed).integers(1, config.architecture.vocab_size, length + 1)
    return make_batch([[Piece(length, {"token": token, "mask": np.ones(length + 1, np.float32)})]], (1, length))


def measure_step(asked: Asked, tokens: int, layers: int, left_s: float, tell: Tell) -> None:
    """Compiles the step, asks whether it fits, and only then makes the weights; each step's time is told at once."""
    begin, config, device = time.monotonic(), config_of(asked, tokens, layers), jax.devices()[0]
    program, plan, compile_s = compiled_and_planned(config, device)
    host_bytes, free = plan.program.host, host_memory()
    row: dict[str, Any] = {"tokens": tokens, "layers": layers, "compile_s": compile_s}
    row |= {"offload": tokens >= asked.offload_from, "planned_bytes": plan.program.total, "host_bytes": host_bytes}
    row |= said_by(plan)
    tell(row)
    if host_bytes > 0.9 * free:
        raise NotImplementedError(f"{host_bytes / GIB:.3g} GiB in the host's memory, where {free / GIB:.3g} are free")
    model, objective = Model.of(config, mesh_of(config, [device])), objective_of(config)
    state = jax.block_until_ready(StateLayout(config, model).start(model.init(jax.random.key(config.seed))))
    host = tokens_of(config)
    batch = jax.block_until_ready(model.put_batch(host.rows, host.token_BT.shape))
    row |= {"start_s": time.monotonic() - begin - compile_s, "bytes_before": _peak(device)}
    times: list[float] = []
    while len(times) <= TIMED and time.monotonic() - begin + 1.1 * max(times, default=0) < left_s:
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(program(state, batch))
        times.append(time.perf_counter() - start)
        row |= _speeds(config, device, times) | {"device_memory_bytes": _peak(device)}
        row["loss"] = float(objective.values(metrics.means, config)["loss"])
        tell(row)
    if not times:
        raise NotImplementedError("it was compiled, and no time was left for a step")


def _speeds(config: Config, device: jax.Device, times: list[float]) -> dict[str, Any]:
    """Of the steps after the first, or of the first where there was no time for another."""
    seconds, tokens = median(times[1:] or times), config.train_dataset.seq_length
    known = hardware.find(device.device_kind)
    flops = training_flops(config, tokens, visible_pairs(config))
    return {
        "seconds": times, "step_seconds": seconds, "tokens_per_second": tokens / seconds,
        "mfu": flops / seconds / (known.bf16_tflops * 1e12) if known else None,
    }  # fmt: skip


def _peak(device: jax.Device) -> int | None:
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


# ── the host's memory, decoding, the debug recipe, kernels ───────────────────────────────────────────────────────────


def measure_host(asked: Asked, left_s: float, tell: Tell) -> None:
    """GB/s (1e9 bytes) from the device's memory to the host's pinned one, and back, by bytes of one array."""
    device, row = jax.devices()[0], dict[str, Any]()
    to_host, to_device = (SingleDeviceSharding(device, memory_kind=kind) for kind in ("pinned_host", "device"))
    for size in asked.host:
        array = jax.block_until_ready(jax.device_put(jnp.zeros(size, jnp.uint8), to_device))
        times: dict[str, list[float]] = {"to_host": [], "to_device": []}
        for _ in range(1 + TIMED):
            for name, place in (("to_host", to_host), ("to_device", to_device)):
                start = time.perf_counter()
                array = jax.block_until_ready(jax.device_put(array, place))
                times[name].append(time.perf_counter() - start)
        row[str(size)] = {name: size / median(seconds[1:]) / 1e9 for name, seconds in times.items()}
        tell(row)


def measure_decode(asked: Asked, texts: int, context: int, left_s: float, tell: Tell) -> None:
    """Time to the first token, and tokens/s of all texts together behind prompts of `context` tokens each."""
    config = config_of(asked, 2 * (context + asked.new_tokens), asked.steps[0][1])
    model = Model.of(config, mesh_of(config, jax.devices()[:1]))
    generator = Generator(model, model.init(jax.random.key(config.seed)))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, config.architecture.vocab_size, context).astype(np.int32) for _ in range(texts)]
    shape, rows = plan_rows([context] * texts, model, texts, asked.new_tokens)
    row: dict[str, Any] = {"texts": texts, "context": context, "layers": asked.steps[0][1]}
    start = time.perf_counter()
    for name in ("compile_s", "first_token_s"):  # the second time nothing is compiled
        for _ in islice(generator.tokens(prompts, shape, rows, Sampling()), 2):
            pass
        row[name], start = time.perf_counter() - start, time.perf_counter()
        tell(row)
    times = []
    for _ in generator.tokens(prompts, shape, rows, Sampling()):
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
    row |= {"first_token_s": times[0], "token_s": median(times[1:]), "tokens_per_second": texts / median(times[1:])}
    tell(row)


def measure_debug(asked: Asked, left_s: float, tell: Tell) -> None:
    """The losses of the debug recipe's first steps, by the whole loop, beside those that the tests have stored."""
    file = ROOT / "tests" / "golden" / "make_losses.py"
    if not file.is_file():
        raise NotImplementedError("the stored losses are in the repository's tests/golden, which is not here")
    spec = importlib.util.spec_from_file_location("make_losses", file)
    assert spec and spec.loader
    stored = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stored)
    jax.config.update("jax_default_matmul_precision", "highest")  # float32 as a CPU has it
    with tempfile.TemporaryDirectory() as folder:
        stored.write_text(Path(folder) / "text")
        flags = [
            *("--config=configs/debug.py", "--mesh_dim=1,1,1,1", "--num_cpu_devices=0", "--log_freq=1"),
            *("--eval_steps=0", "--nosave_final", "--save_minutes=0", f"--total_steps={asked.debug_steps}"),
            *(f"--train_dataset.python_dataset.path={folder}/text", "--train_dataset.python_dataset.split=all"),
            *(f"--train_dataset.cache_dir={folder}/cache", f"--logger.output_dir={folder}"),
            "--logger.experiment_id=debug",
        ]
        rows = read_rows(train(parse(parse_args(flags), 1)) / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    wanted = json.loads(stored.FILE.read_text())[: len(losses)]
    off = max(abs(a - b) for a, b in zip(losses, wanted, strict=True))
    tell({"losses": losses, "stored": wanted, "off_by": off, "step_seconds": rows[-1].get("step_seconds")})


def measure_kernels(asked: Asked, left_s: float, tell: Tell) -> None:
    """Ours and no others, which bench_kernels compares, in a minute and a half at most."""
    names, problems = list(asked.kernels), list(asked.problems)
    kernels.run(names, problems, asked.check_length, None, min(left_s, 90.0), keep=tell, others=False)


# ── all of it, one process after the other ───────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Part:
    """section: of the report. name: within it; "" where the section has one part. seconds: about what it takes, where
    nothing is known of the machine. config: of a step.
    """

    section: str
    name: str
    measure: Callable[..., None]
    seconds: float
    config: Config | None = None

    @property
    def label(self) -> str:
        return f"{self.section} {self.name}".strip()


START_S, COMPILE_S = 15.0, 45.0  # of a process until it computes; of a step, where none has been compiled yet


def parts(asked: Asked) -> list[Part]:
    """What is measured, the most telling first: what takes long stands behind what is short and new."""

    def step(tokens: int, layers: int) -> Part:
        measure = partial(measure_step, asked, tokens, layers)
        return Part("steps", f"{tokens}x{layers}", measure, START_S + COMPILE_S, config_of(asked, tokens, layers))

    def decode(texts: int, context: int) -> Part:
        return Part("decode", f"{texts}x{context}", partial(measure_decode, asked, texts, context), 30)

    every = [
        Part("kernels", "", partial(measure_kernels, asked), 60),
        *(step(*each) for each in asked.steps[:1]),
        Part("host", "", partial(measure_host, asked), START_S),
        *(step(*each) for each in asked.steps[1:2]),
        *(decode(*each) for each in asked.decodes),
        Part("debug", "", partial(measure_debug, asked), 35),
        *(step(*each) for each in asked.steps[2:]),
    ]
    return [part for part in every if part.section in asked.parts]


def seconds_of(part: Part, report: dict) -> float:
    """About how long a part takes: of a step, by the arithmetic that the last one before it did in a second."""
    rows = [row for row in report["steps"].values() if "step_seconds" in row]
    if part.config is None or not rows:
        return part.seconds
    flops = step_flops(part.config)
    rate = rows[-1]["executed_flops"] / rows[-1]["step_seconds"]
    return START_S + 1.2 * rows[-1]["compile_s"] + (flops.model + flops.recompute) / rate


def run(
    asked: Asked,
    budget_s: float,
    say: Callable[[str], None] = print,
    keep: Callable[[dict], None] = lambda report: None,
) -> dict:
    """Everything within the budget of seconds. keep is handed the report as it grows.

    Raises UserError where jax finds a CPU alone and was not asked for that.
    """
    start = time.monotonic()
    report: dict[str, Any] = {
        "versions": {}, "kernels": {}, "steps": {}, "host": {}, "decode": {}, "debug": {}, "refused": {},
        "left_out": [],
    }  # fmt: skip
    for part in parts(asked):
        needed = seconds_of(part, report)
        left = budget_s - (time.monotonic() - start)
        if needed > left:
            report["left_out"].append(f"{part.label}: takes about {needed:.0f} s, and {max(left, 0):.0f} s were left")
            say(f"left out: {report['left_out'][-1]}")
            continue
        say(f"{part.label}: takes about {needed:.0f} s, {left:.0f} s are left")
        try:
            # A part that hangs is not to take the time of all that follow.
            for kind, found in in_a_process(part.measure, min(left, START_S + 2.5 * needed), __name__):
                if kind == "versions":
                    report["versions"] = found
                    if found["platform"] == "cpu" and not asked.cpu:
                        raise UserError(NO_DEVICE)
                elif part.name:
                    report[part.section][part.name] = found
                else:
                    report[part.section] = found
                keep(report)
        except Ended as end:
            report["refused"][part.label] = str(end)
            keep(report)
        say(f"{part.label}: {_told(report, part)}")
    report["seconds"] = time.monotonic() - start
    keep(report)
    return report


def _told(report: dict, part: Part) -> str:
    if why := report["refused"].get(part.label):
        return f"not measured: {why}"
    found = report[part.section].get(part.name) if part.name else report[part.section]
    if part.section == "kernels":
        return f"{len(found['tflops'])} timed"
    return json.dumps({name: value for name, value in found.items() if isinstance(value, float | bool | dict)})


# ── what is written ──────────────────────────────────────────────────────────────────────────────────────────────────


def _gib(count: int | None) -> str:
    return "" if count is None else f"{count / GIB:.2f}"


def _between(pair: list[float] | None, form: str) -> str:
    return "" if pair is None else f"{pair[0]:{form}} to {pair[1]:{form}}"


def table(report: dict) -> str:
    """Markdown: versions; kernels; a line for each step, with the plan's figures beside; the rest; what is missing."""
    lines = [", ".join(f"{name} {value}" for name, value in report["versions"].items())]
    if report["kernels"].get("tflops"):
        lines += ["", "TFLOP/s, forward / backward:", "", kernels.table(report["kernels"])]
    if report["steps"]:
        heads = (
            "tokens", "layers", "offload", "kernel", "compile, s", "a step, s", "steps", "plan, s", "tokens/s", "MFU",
            "plan, MFU", "peak, GiB", "plan, GiB", "closed form", "host, GiB", "loss",
        )  # fmt: skip
        lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in report["steps"].values():
        timed, mfu = "step_seconds" in row, row.get("mfu")
        cells = [
            f"{row['tokens']:,}", str(row["layers"]), "yes" if row["offload"] else "no", row["kernel"],
            f"{row['compile_s']:.1f}", f"{row['step_seconds']:.3f}" if timed else "",
            (str(len(row["seconds"]) - 1) if len(row["seconds"]) > 1 else "the first") if timed else "",
            _between(row["planned_seconds"], ".3g"), f"{row['tokens_per_second']:,.0f}" if timed else "",
            f"{mfu:.3f}" if mfu else "", _between(row["planned_mfu"], ".2f"), _gib(row.get("device_memory_bytes")),
            _gib(row["planned_bytes"]), _gib(row["closed_form_bytes"]), _gib(row["host_bytes"]),
            f"{row['loss']:.4f}" if timed else "",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += [""] * bool(report["host"])
    for size, found in report["host"].items():
        lines.append(f"- {int(size) / 2**20:.0f} MiB to the host's memory {found['to_host']:.1f} GB/s, "
                     f"back {found['to_device']:.1f} GB/s")  # fmt: skip
    for row in report["decode"].values():
        if "tokens_per_second" in row:
            lines.append(f"- decoding {row['texts']} x {row['context']:,} tokens, {row['layers']} layers: first token "
                         f"{row['first_token_s']:.3f} s, then {row['tokens_per_second']:.1f} tokens/s")  # fmt: skip
    if debug := report["debug"]:
        lines.append(f"- {len(debug['losses'])} steps of the debug recipe: off the stored losses by "
                     f"{debug['off_by']:.1e} at most")  # fmt: skip
    lines += [f"- not measured: {name}: {why}" for name, why in report["refused"].items()]
    lines += [f"- left out, for want of time: {what}" for what in report["left_out"]]
    return "\n".join(lines)
