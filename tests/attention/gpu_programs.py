"""Attention compiled for a GPU that isn't here, and what its compiler says of each kernel."""

import importlib.util
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ringbpt.attention.core import Local, MaskSpec, Partial
from ringbpt.planning.topologies import Topology
from ringbpt.types import TokenMeta


@dataclass(frozen=True)
class Kernel:
    """What ptxas and XLA say of it. registers: a thread's; shared_bytes: a block's, dynamic."""

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int


def train_like(
    machine: Topology, local: Local, head_dim: int, dtype: str, dump: Path, length: int = 2048, trees: bool = False
):  # fmt: skip
    """A forward with a carry, and a backward, of 8 query and 2 kv heads; XLA's files go to `dump`.

    trees: documents may share their beginning.
    """
    array = arrays_on(machine)
    q, k = (array((1, length, heads, head_dim), dtype) for heads in (8, 2))
    meta = TokenMeta(*[array((1, length), jnp.int32)] * (3 if trees else 2))
    carry = Partial(array(q.shape, jnp.float32), array(q.shape[:-1], jnp.float32))

    def both(q, k, v, d_out, meta, carry):
        part = local.attend(q, k, v, meta, meta, MaskSpec(), carry)
        return part, local.attend_bwd(q, k, v, part.out_BTNH, part.lse_BTN, d_out, meta, meta, MaskSpec())

    return compiled(machine, both, (q, k, k, q, meta, carry), dump)


def arrays_on(machine: Topology) -> Callable:
    """array(shape, dtype) on the machine's first device."""
    return partial(jax.ShapeDtypeStruct, sharding=NamedSharding(_one(machine), PartitionSpec()))


def compiled(machine: Topology, function: Callable, arguments: tuple, dump: Path):
    """Of arrays_on's; XLA's files go to `dump`."""
    # PTX is written by itself on jax 0.10, when asked for on 0.12. The tests' own environment asks for the least
    # optimised code.
    options = {"xla_dump_to": str(dump), "xla_dump_emitter_re": "ptx", "xla_backend_optimization_level": 3}
    # As make_attention has it: from its mesh a kernel learns, on jax 0.12, which GPU it is lowered for.
    specs = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec(), "check_vma": False}
    return machine.compile(jax.jit(jax.shard_map(function, mesh=_one(machine), **specs)), *arguments, options=options)


def _one(machine: Topology) -> Mesh:
    return Mesh(machine.devices[:1], ("one",))


def _ptxas() -> str:
    found = importlib.util.find_spec("nvidia")
    assert found and found.submodule_search_locations, "ptxas comes with nvidia-cuda-nvcc: make aot-cuda"
    paths = [path for folder in found.submodule_search_locations for path in Path(folder).glob("*/bin/ptxas")]
    assert paths, "ptxas comes with nvidia-cuda-nvcc: make aot-cuda"
    return str(paths[0])


def kernels(dump: Path, machine: Topology) -> list[Kernel]:
    """Every kernel of the program that was dumped there, XLA's own among them."""
    shared = {}
    for file in dump.glob("*.thunk_sequence.txt"):
        for name, size in re.findall(r"(\w+) grid: .*?shared_memory: (\d+) bytes", file.read_text()):
            shared[name] = int(size)
    arch = "sm_" + str(machine.devices[0].compute_capability).replace(".", "")
    found = []
    for file in sorted(dump.glob("*.ptx")):
        if ".entry" not in file.read_text():
            continue
        command = [_ptxas(), "-v", f"-arch={arch}{'a' if arch >= 'sm_90' else ''}", str(file), "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stderr
        for name, text in re.findall(r"Compiling entry function '(\w+)'(.*?registers)", said, re.DOTALL):
            spilled = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
            registers = int(re.findall(r"Used (\d+) registers", text)[0])
            found.append(Kernel(name, registers, spilled, shared.get(name, 0)))
    return found
