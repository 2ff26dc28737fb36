"""Machines that are not here: the names people use -> abstract devices that a program can be compiled for.

A kernel's or a ring's test compiles so, on a laptop:

    machine = topology("v5e-8")                                     # or v4-16, tpu7x-4x4x4, 8xh200, 4x8xh100, cpu-8
    mesh = make_mesh((1, 1, 1, 8), devices=machine.devices)
    attend = make_attention(mesh, ...)
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(None, "sp")))
    compiled = machine.compile(jax.jit(attend), x, x, x, meta, meta)
    compiled.memory_analysis(); ring_hops(compiled.as_text())        # planning.overlap
"""

import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from ringbpt import hardware
from ringbpt.config import UserError, nearest_name
from ringbpt.config.foreign import quiet
from ringbpt.hardware import Hardware
from ringbpt.rates import Links

_CUBES = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
    1024: "8x8x16", 2048: "8x16x16",
}  # fmt: skip
_SQUARES = {4: "2x2", 16: "4x4", 64: "8x8", 128: "8x16", 256: "16x16"}
_LITE = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}

# Generation -> what its names count (2: TensorCores, two a chip; 1: chips), the shape of so many chips, and options.
_TPUS: dict[str, tuple[int, dict[int, str], dict[str, Any]]] = {
    "v2": (2, _SQUARES, {}),
    "v3": (2, _SQUARES | {512: "16x32", 1024: "32x32"}, {}),
    "v4": (2, _CUBES, {"chip_config_name": "megacore"}),  # both cores of a chip are one device
    "v5p": (2, _CUBES | {4096: "16x16x16"}, {}),
    "v5e": (1, _LITE, {}),
    "v6e": (1, _LITE, {}),
    "v7x": (2, _CUBES, {}),
}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v6": "v6e", "tpu7x": "v7x"}
_TWO_DEVICES_A_CHIP = ("v2", "v3", "v7x")
_TPU_NAME = re.compile(r"(?:([0-9]{1,3})x)?([a-z]+[0-9]*[a-z]*)-([0-9x]+)")
MOST_SLICES = 64

# cores, floating-point units a core, shared memory a core, L2 in MiB, GHz, bytes, compute capability.
_GPUS = {
    "A100": (108, 64, 167936, 40, 1.41, 85100068864, "major: 8"),
    "A100-40": (108, 64, 167936, 40, 1.41, 42331013120, "major: 8"),
    "H100": (132, 128, 233472, 50, 1.98, 84942979072, "major: 9 feature_extension: ACCELERATED_FEATURES"),
    "H100-NVL": (132, 128, 233472, 50, 1.785, 99949740032, "major: 9 feature_extension: ACCELERATED_FEATURES"),
    "H200": (132, 128, 233472, 50, 1.98, 151397597184, "major: 9 feature_extension: ACCELERATED_FEATURES"),
    "B200": (148, 128, 233472, 126, 1.965, 191456346112, "major: 10 feature_extension: ACCELERATED_FEATURES"),
    "GB200": (152, 128, 233472, 126, 2.062, 198105366528, "major: 10 feature_extension: ACCELERATED_FEATURES"),
    "RTX4090": (128, 128, 102400, 72, 2.52, 25393692672, "major: 8 minor: 9"),
}
_GPU_NAME = re.compile(
    r"(?:([0-9]{1,6})x)?(?:([0-9]{1,6})x)?(a100-(?:sxm4?-?)?40(?:gb?)?|h100-nvl|a100|h100|h200|gb200|b200|rtx-?4090)"
    r"(?:-(?:sxm[45]?-?)?(24|80|94|141|180|186)gb?)?"
)
_NOMINAL_GB = {"H200": "141", "RTX4090": "24", "H100-NVL": "94", "A100-40": "40", "B200": "180", "GB200": "186"}

# The part of a GPU's memory that a run can be given: XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 (jax's own default is 0.75).
GPU_FRACTION = 0.95
MOST_GPUS = 1 << 14  # each is described apart, which takes time and memory


@dataclass(frozen=True)
class Topology:
    """name: as it was asked for. devices: abstract ones (real ones for a CPU). hosts: how many of them share a host.

    memory: bytes that a program may use on one device; None where nobody knows (a CPU). slices: of TPUs, how many
    a network joins.
    """

    name: str
    platform: str  # tpu | cuda | cpu
    devices: tuple[jax.Device, ...]
    devices_per_host: int
    hardware: Hardware | None
    slices: int = 1

    @property
    def links(self) -> Links | None:
        """What joins the devices; None where nobody knows."""
        if self.hardware is None:
            return None
        reach = len(self.devices) // self.slices if self.platform == "tpu" else self.devices_per_host
        return Links(self.hardware, reach)

    @property
    def memory(self) -> int | None:
        if self.hardware is None:
            return None
        part = GPU_FRACTION if self.platform == "cuda" else 1.0
        return int(part * self.hardware.hbm_gib * 2**30)

    def compile(
        self, jitted: Any, *args: Any, on_host: Sequence[bool] = (), options: dict[str, Any] | None = None
    ) -> Any:
        """The compiled program of a jitted function for this machine; args are ShapeDtypeStructs with shardings.

        on_host: for each array of the arguments, whether it and the result in its place live in the host's memory; a
        GPU that is not here can't be told by their shardings. options: further compiler options ({"xla_dump_to":
        folder}). What does not fit the memory is a jax.errors.JaxRuntimeError with RESOURCE_EXHAUSTED
        (planning.program reads it).
        """
        # Autotuning times kernels on a GPU, and there is none.
        own: dict[str, Any] = {"xla_gpu_autotune_level": 0} if self.platform == "cuda" else {}
        talks, dumps = self.platform != "cpu", "xla_dump_to" in (options or {})
        with quiet() if talks else nullcontext(), uncached() if dumps else nullcontext():
            lowered = jitted.trace(*args).lower(lowering_platforms=(self.platform,))
            if any(on_host) and self.platform == "cuda":
                _place_on_host(lowered.compiler_ir("stablehlo"), on_host)
            return lowered.compile(own | (options or {}))


@contextmanager
def uncached() -> Iterator[None]:
    """No program comes from jax's compilation cache meanwhile: a cached one is not compiled, and dumps no files."""

    def enable(cached: bool) -> None:
        jax.config.update("jax_enable_compilation_cache", cached)
        compilation_cache.reset_cache()  # which would not look at the flag again

    before = jax.config.jax_enable_compilation_cache
    enable(False)
    try:
        yield
    finally:
        enable(before)


def _place_on_host(module: Any, on_host: Sequence[bool]) -> None:
    """Says in the program what jax says of arrays whose sharding has a memory kind: abstract GPUs have none to name."""
    from jax.extend.mlir import ir

    with module.context:
        [main] = [op for op in module.body.operations if ir.StringAttr(op.attributes["sym_name"]).value == "main"]
        for side in ("arg_attrs", "res_attrs"):
            every = list(ir.ArrayAttr(main.attributes[side]))
            flags = [*on_host, *(False for _ in every[len(on_host) :])]
            assert len(flags) == len(every), "an argument was dropped: on_host no longer says which is which"
            main.attributes[side] = ir.ArrayAttr.get(
                [
                    ir.DictAttr.get(
                        {a.name: a.attr for a in ir.DictAttr(known)}
                        | {"mhlo.memory_kind": ir.StringAttr.get("pinned_host" if away else "device")}
                    )
                    for known, away in zip(every, flags, strict=True)
                ]
            )


def topology(name: str) -> Topology:
    """The machine of that name: v4-512, 2xv5p-128 (slices), tpu7x-4x4x4, 8xa100-80g, 4x8xh100 (nodes x GPUs), cpu-8.

    v2 to v5p and v7x count TensorCores, two a chip, as their vendor does, v5e and v6e chips; all may be named by their
    shape in chips instead. Raises UserError for a name that is none, or with what to install where the compiler is
    missing.
    """
    plain = name.strip().lower()
    if match := _GPU_NAME.fullmatch(plain):
        return _gpu(name, match)
    slices, kind, count = match.groups() if (match := _TPU_NAME.fullmatch(plain)) else (None, "", "")
    kind = _ALIASES.get(kind, kind)
    if kind in _TPUS and "x" in count:
        cores, shapes, _ = _TPUS[kind]
        count = next((str(chips * cores) for chips, shape in shapes.items() if shape == count), count)
    if not re.fullmatch("[0-9]{1,6}", count) or kind not in (*_TPUS, "cpu") or (slices and kind == "cpu"):
        raise UserError(_unknown(name))
    return _cpu(name, int(count)) if kind == "cpu" else _tpu(name, kind, int(count), int(slices or 1))


def _unknown(name: str) -> str:
    names = [f"{kind}-{count * cores}" for kind, (cores, shapes, _) in _TPUS.items() for count in shapes]
    names += [*(f"{n}{gpu.lower()}" for gpu in _GPUS for n in ("", "8x", "4x8x")), "cpu-8"]
    sizes = ", ".join(f"{kind}-{cores * min(s)} to {kind}-{cores * max(s)}" for kind, (cores, s, _) in _TPUS.items())
    gpus = ", ".join(f"8x{gpu.lower()}" for gpu in _GPUS)
    return (
        f"--topology='{name}' is no machine known here: {sizes}, {gpus} (4x8xh100: 4 nodes of 8), cpu-8; "
        f"did you mean --topology={nearest_name(name, names)}?"
    )


def _cpu(name: str, count: int) -> Topology:
    devices = jax.devices("cpu")
    if not 0 < count <= len(devices):
        raise UserError(f"--topology={name}: this process has {len(devices)} CPU devices: --num_cpu_devices={count}")
    return Topology(name, "cpu", tuple(devices[:count]), count, None)


def _tpu(name: str, kind: str, count: int, slices: int) -> Topology:
    cores, shapes, options = _TPUS[kind]
    if count % cores or count // cores not in shapes:
        near = sorted(shapes, key=lambda chips: abs(math.log(chips * cores / max(count, 1))))[:2]
        counts = " or ".join(f"{kind}-{chips * cores}" for chips in sorted(near))
        raise UserError(f"--topology={name}: {kind} machines come as powers of two: {counts}")
    if not 0 < slices <= MOST_SLICES:
        raise UserError(f"--topology={name}: {slices} slices: 1 to {MOST_SLICES}, as --topology=2x{kind}-{count}")
    need("tpu")
    from jax.experimental import topologies

    shape = shapes[count // cores]
    if shape == "1x1":
        options = {**options, "chips_per_host_bounds": (1, 1, 1)}
    with quiet():
        name_there = "tpu7x" if kind == "v7x" else kind
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{name_there}:{shape}", num_slices=slices, **options
        )
    devices = tuple(found.devices)
    per_chip = 2 if kind in _TWO_DEVICES_A_CHIP else 1
    known = hardware.find(devices[0].device_kind)
    return Topology(name, "tpu", devices, min(4 * per_chip, len(devices)), known, slices)


def _gpu(name: str, match: re.Match[str]) -> Topology:
    first, second, model, gb = match.groups()
    nodes, gpus = (int(first), int(second)) if second else (1, int(first or 1))
    known = hardware.find("A100-40" if "40" in model and "a100" in model else model.replace("rtx-", "rtx"))
    assert known
    if nodes < 1 or gpus < 1 or (gb and gb != _NOMINAL_GB.get(known.name, "80")):
        raise UserError(_unknown(name))
    if nodes * gpus > MOST_GPUS:
        raise UserError(f"--topology={name}: {nodes * gpus} GPUs: {MOST_GPUS} at most, as --topology=2048x8{model}")
    need("cuda")
    from jax.experimental import topologies

    with quiet():
        found = topologies.get_topology_desc(
            platform="cuda", target_config=_gpu_config(known), topology=f"{nodes}x1x{gpus}"
        )
    return Topology(name, "cuda", tuple(found.devices), gpus, known)


def _gpu_config(known: Hardware) -> str:
    """The text of XLA's GpuTargetConfigProto: everything that its compiler asks a device for."""
    cores, units, shared, l2, clock, size, capability = _GPUS[known.name]
    return f"""
      gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
        shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared - 1024}
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
        core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock}
        memory_bandwidth: {int(known.hbm_gb_per_s * 1e9)} l2_cache_size: {l2 * 2**20} device_memory_size: {size}
        cuda_compute_capability {{ {capability} }}
      }}
      platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 }}
      device_description_str: "{known.device_kinds[0]}"
    """


def need(platform: str) -> None:
    """Raises UserError with what to install where the compiler of `platform` (tpu, cuda, cpu) is missing: a test skips.

    Also says to it, before it starts, that no device is there and that others may be using it at the same time.
    """
    if platform == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            raise UserError("the compiler for TPUs is not installed: make aot, or pip install 'jax[tpu]'")
        for variable, value in {
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no lock file: several processes may compile at once
            "TPU_SKIP_MDS_QUERY": "1",  # no question to a cloud's metadata server
            "TPU_MIN_LOG_LEVEL": "3",
            "TPU_STDERR_LOG_LEVEL": "3",
        }.items():
            os.environ.setdefault(variable, value)
    elif platform == "cuda":
        plugins = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
        if importlib.util.find_spec("jax_plugins") is None or not any(map(importlib.util.find_spec, plugins)):
            raise UserError(
                "the compiler for NVIDIA GPUs is not installed: make aot-cuda, or pip install 'jax[cuda13]'"
            )
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
