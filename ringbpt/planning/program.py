"""The very train step of the loop, for a machine that need not be here: abstract arrays in, nothing allocated."""

import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

from ringbpt.config import Config
from ringbpt.dims import ACTIVATION_AXES, spec
from ringbpt.mesh import mesh_of
from ringbpt.model.llama import Model
from ringbpt.objectives import objective_of
from ringbpt.objectives.objective import REFERENCE
from ringbpt.planning.hlo import Module, parse
from ringbpt.planning.topologies import GPU_FRACTION, Topology
from ringbpt.training.state import StateLayout, TrainState
from ringbpt.training.step import gpu_options, make_train_step
from ringbpt.types import ALWAYS, COLUMNS, Batch


@dataclass(frozen=True)
class Buffer:
    """One of the program's arrays on one device, as the compiler placed it; made_by: where in the model it is from."""

    name: str
    bytes: int
    shape: str
    made_by: str


@dataclass(frozen=True)
class Program:
    """What the compiler says of one device. Bytes; arguments: {"parameters", "optimizer state", "batch"}.

    temporaries: all that is neither argument nor a result written over one, as the compiler allocates it (on TPUs
    `memory_analysis().temp_size_in_bytes` is larger: it counts some buffers twice, and is not what has to fit).
    host: in the host's memory. largest: the largest temporaries, those that share a place counted once.
    text: the program; "" where it did not fit, and then only arguments and total are known.
    """

    arguments: dict[str, int]
    temporaries: int
    total: int
    host: int
    largest: list[Buffer]
    text: str

    @cached_property
    def module(self) -> Module | None:
        """The text's instructions, read once however many ask; None where it did not fit."""
        return parse(self.text) if self.text else None


def step_and_arguments(
    config: Config, devices: tuple[jax.Device, ...]
) -> tuple[Any, tuple[TrainState, Batch], TrainState]:
    """(the jitted train step of the loop, its abstract arguments, which of the state is in the host's memory)."""
    mesh = mesh_of(config, devices)
    model = Model.of(config, mesh)
    objective, names = objective_of(config), batch_columns(config)
    model.check_kernel(config.train_dataset.seq_length, "last" in names)
    layout = StateLayout(config, model, has_reference=objective.in_step(config))
    step = make_train_step(layout, objective)
    shape_BT = (config.train_dataset.batch_size, config.train_dataset.seq_length)
    sharding = NamedSharding(mesh, spec("B T", ACTIVATION_AXES))  # as put_batch gives it
    columns = {name: jax.ShapeDtypeStruct(shape_BT, COLUMNS[name].dtype, sharding=sharding) for name in names}
    return step, (layout.abstract, Batch.of(columns)), layout.on_host


def batch_columns(config: Config) -> tuple[str, ...]:
    """The columns of a batch of the run: as of data whose answers share their prompts, where the objective has such."""
    objective = objective_of(config)
    shared = ("last",) * (objective.whole_documents and config.train_dataset.share_prompts)
    if objective.rollouts:  # its columns of what is optional too: rewards, what the old policy said, and the reference
        asked = {"reward": config.rollout.reward, "old_logp": config.rollout.updates > 1}
        asked |= {REFERENCE: config.policy.kl_coefficient or config.objective == "distill"}
        return (*ALWAYS, *objective.columns, *shared, *(name for name, has in asked.items() if has))
    reference = (REFERENCE,) * (objective.reference and not objective.in_step(config))
    return (*ALWAYS, *objective.columns, *shared, *reference)


def compile_program(config: Config, machine: Topology) -> Program:
    """Compiles the step for the machine. What does not fit its memory is a Program too, with the bytes it would need.

    Raises what the compiler raises for any other reason.
    """
    step, (state, batch), away = step_and_arguments(config, machine.devices)
    arguments = {
        "parameters": sum(
            _shard_bytes(getattr(state, name), getattr(away, name)) for name in ("trained", "frozen", "reference")
        ),
        "optimizer state": sum(
            _shard_bytes(getattr(state, name), getattr(away, name)) for name in ("opt_state", "step", "guard")
        ),
        "batch": shard_bytes(batch),
    }
    own = gpu_options(GPU_FRACTION, config.mesh_shape.dp) if machine.platform == "cuda" else {}

    def compiled(options: dict[str, Any]) -> Any:
        return machine.compile(step, state, batch, on_host=jax.tree.leaves(away), options=own | options)

    return read_program(compiled, arguments, "jit_step")


def read_program(compile: Callable[[dict[str, Any]], Any], arguments: dict[str, int], name: str) -> Program:
    """What the compiler says of any step. compile: of its options, which make it write down where each array is.

    arguments: bytes on the device, by name. name: of the step's module, as jit_step.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_hlo_module_re": name}
        try:
            compiled = compile(options)
        except jax.errors.JaxRuntimeError as error:
            total = needed_bytes(str(error))
            if total is None:
                raise
            return Program(arguments, total - sum(arguments.values()), total, 0, [], "")
        (assignment,) = Path(folder).glob("*after_optimizations-buffer-assignment.txt")
        temporaries, buffers = read_assignment(assignment.read_text())
    text = compiled.as_text()
    memory = compiled.memory_analysis()
    return Program(
        arguments=arguments,
        temporaries=temporaries,
        total=sum(arguments.values()) + temporaries,
        host=memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes,
        largest=[_named(buffer, text) for buffer in buffers],
        text=text,
    )


def shard_bytes(tree: Any) -> int:
    """Of a tree of abstract arrays, what one device has."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _shard_bytes(tree: Any, away: Any) -> int:
    """Of what lives on the device: an argument in the host's memory is the host's."""
    return shard_bytes([x for x, host in zip(jax.tree.leaves(tree), jax.tree.leaves(away), strict=True) if not host])


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def needed_bytes(message: str) -> int | None:
    """The memory that a program would have needed, from the compiler's refusal; None where it refused for another
    reason: a kernel's own memory on the chip among them.
    """
    if "RESOURCE_EXHAUSTED" not in message or re.search(r"memory space (?!hbm)", message):
        return None
    found = re.search(r"(?:temporaries \(|Used |allocating )([0-9.]+)([KMGT]?)", message)
    return int(float(found.group(1)) * _UNITS[found.group(2)]) if found else None


_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (.*)$")
_VALUE = re.compile(r"^ value: <\d+ ([\w.\-]+)(?:\{[\d,]*\})?.* @0> \(size=(\d+),offset=(\d+)\): (\S+)")
LARGEST = 12


def read_assignment(text: str) -> tuple[int, list[Buffer]]:
    """(bytes of temporaries on the device, the largest of them) from the compiler's dumped buffer assignment.

    Arguments, results written over arguments, and constants are no temporaries; results of their own are. What has a
    color is in another memory: on the chip, or the host's.
    """
    total, inside = 0, False
    places: dict[tuple[int, int], tuple[str, str]] = {}
    for line in text.splitlines():
        if match := _ALLOCATION.match(line):
            kind = match.group(2)
            inside = not any(word in kind for word in ("parameter", "constant", "thread-local", "color"))
            total += int(match.group(1)) if inside else 0
        elif inside and (match := _VALUE.match(line)):
            name, bytes_, offset, shape = match.groups()
            if shape.startswith("("):
                continue  # the pointers of a tuple
            places.setdefault((int(offset), int(bytes_)), (name, shape))
        elif not line.startswith(" "):
            inside = False
    chosen: list[tuple[int, int]] = []
    for offset, size in sorted(places, key=lambda place: -place[1]):
        if len(chosen) < LARGEST and all(offset + size <= o or o + s <= offset for o, s in chosen):
            chosen.append((offset, size))
    return total, [Buffer(places[place][0], place[1], places[place][1], "") for place in chosen]


def _named(buffer: Buffer, text: str) -> Buffer:
    """With the place in the model that its instruction carries."""
    match = re.search(rf'%{re.escape(buffer.name)} = .*?op_name="([^"]*)"', text)
    steps = [part for part in (match.group(1) if match else "").split("/") if part not in _NOISE]
    return Buffer(buffer.name, buffer.bytes, re.sub(r"\{.*", "", buffer.shape), "/".join(steps[1:]))


_NOISE = {"while", "body", "closed_call", "checkpoint", "rematted_computation", "jvp()", "transpose(jvp())", "cond"}
