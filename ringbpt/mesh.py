"""The device mesh, and the one place where a host's arrays become global ones."""

import glob
import math
import os
import re
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from ml_collections import ConfigDict

from ringbpt import hardware, processes
from ringbpt.config import RUN_FLAGS, Config, UserError, check_value
from ringbpt.dims import ACTIVATION_AXES, AXES, spec
from ringbpt.layouts import Order, order_of
from ringbpt.types import Batch


def start_jax(tree: ConfigDict) -> int:
    """Brings jax up as the flags say, before anything has touched a device; returns the number of devices.

    num_cpu_devices splits the CPU, where there is no accelerator; initialize_jax_distributed joins the other processes.
    """
    if tree.num_cpu_devices:
        jax.config.update("jax_num_cpu_devices", tree.num_cpu_devices)
        be_patient()
    choose_platform()
    distributed = tree.jax_distributed
    if distributed.initialize_jax_distributed:
        ids = distributed.local_device_ids or ""
        if not re.fullmatch(r"([0-9]+(,[0-9]+)*)?", ids):
            raise UserError(f"--jax_distributed.local_device_ids={ids!r} is no list of numbers, as 0,1")
        for name, value in distributed.items():
            check_value(f"jax_distributed.{name}", RUN_FLAGS[f"jax_distributed.{name}"], value)
        processes.join(distributed)
    return jax.device_count()


# A flag of XLA's that jax 0.10, 0.11 and 0.12 know; one that it doesn't know would end the process.
COLLECTIVE_TIMEOUT, PATIENCE_SECONDS = "xla_cpu_collective_call_terminate_timeout_seconds", 600


def be_patient() -> None:
    """Before anything touches a device: virtual devices wait for each other for minutes where others have the cores.

    XLA's own 40 seconds, after which it aborts the process with a stack of C++, were seen to pass in runs that nothing
    was wrong with. What hangs for good is the watchdog's to end (--jax_distributed.step_timeout): where hundreds of
    programs were sent off and none waited for, as an evaluation once did that added its means on the devices, three of
    four devices were seen in an all-gather, and the fourth behind its 32 programs under way.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if COLLECTIVE_TIMEOUT not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{COLLECTIVE_TIMEOUT}={PATIENCE_SECONDS}".strip()


def choose_platform() -> None:
    """Before anything touches a device: the CPU, where jax would find a TPU's or an NVIDIA GPU's compiler (the aot
    extra) but this machine has neither.

    Asked for devices, they complain at length; told to leave it, jax takes the CPU as it would in the end.
    """
    plugins = {entry.name for entry in entry_points(group="jax_plugins")}
    devices = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia*", "/dev/dxg")
    known = plugins <= {"xla_cuda12", "xla_cuda13"}
    if jax.config.jax_platforms is None and known and not any(map(glob.glob, devices)):
        jax.config.update("jax_platforms", "cpu")


def make_mesh(
    shape: Sequence[int],
    *,
    plain_order: bool = False,
    devices: Sequence[jax.Device] | None = None,
    over_slices: str = "dp",
    ring: bool = False,
) -> Mesh:
    """A `dp, fsdp, tp, sp` mesh of `shape`, over the first devices that fill it (a run's config fills them all).

    Neighbours on sp are neighbours on the interconnect where jax knows the topology; `plain_order` takes the
    devices as they are numbered. over_slices: the axis along which a TPU's slices follow each other; all others stay
    inside of a slice. ring: what is sent goes round sp. Raises UserError where the slices do not divide it.
    """
    devices = (jax.devices() if devices is None else devices)[: math.prod(shape)]
    auto = (AxisType.Auto,) * len(AXES)
    slices = slices_of(devices)
    place = AXES.index(over_slices)
    if shape[place] % len(slices):
        raise UserError(_not_over_slices(list(shape), place, len(slices)))
    inner = [size // len(slices) if at == place else size for at, size in enumerate(shape)]

    def inside(part: Sequence[jax.Device]) -> np.ndarray:
        if plain_order:
            return np.asarray(part).reshape(inner)
        found = jax.make_mesh(tuple(inner), AXES, axis_types=auto, devices=part).devices
        return _as_a_ring(found) if ring and _is_v5e(part[0]) else found

    return Mesh(np.concatenate([inside(part) for part in slices], axis=place), AXES, axis_types=auto)


def mesh_of(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a run's flags, over the devices that there are, or over these."""
    plain = config.mesh_dim.startswith("!")
    ring = config.execution.sequence_parallel == "ring"
    return make_mesh(config.mesh_shape, plain_order=plain, devices=devices, over_slices=config.mesh_slices, ring=ring)


def _is_v5e(device: jax.Device) -> bool:
    known = hardware.find(device.device_kind)
    return known is not None and known.name == "v5e"


def _as_a_ring(devices: np.ndarray) -> np.ndarray:
    """The same devices, sp in an order in which each is a neighbour of the next, and the first of the last; as they are
    where there is none.

    Row by row, as jax orders them, the end of a row is far from the beginning of the next one, and of transfers that
    are not all to neighbours v5e's compiler makes synchronous ones (seen from 32 chips on).
    """
    coords = np.array([device.coords for device in devices.flat]).reshape(*devices.shape, -1)
    coords = coords - coords.min(axis=3, keepdims=True)
    line, sizes = coords[0, 0, 0], coords.max(axis=(0, 1, 2, 3)) + 1
    cycle = _cycle(sizes.tolist())
    if (coords != line).any() or len(cycle) != len(line):
        return devices
    place = {tuple(at): i for i, at in enumerate(line.tolist())}
    return devices[..., [place[at] for at in cycle]]


def _cycle(sizes: list[int]) -> list[tuple[int, ...]]:
    """All places of a box of chips, each beside the one before it and the last beside the first; [] where none is."""
    along = next((axis for axis, size in enumerate(sizes) if size % 2 == 0), 0)
    path = _path(sizes[:along] + sizes[along + 1 :])
    rows, columns = sizes[along], len(path)
    if rows % 2 or columns < 2:
        return []
    out = [(row, 0) for row in range(rows)]
    home = [(row, at if row % 2 else columns - at) for row in reversed(range(rows)) for at in range(1, columns)]
    return [(*path[column][:along], row, *path[column][along:]) for row, column in out + home]


def _path(sizes: list[int]) -> list[tuple[int, ...]]:
    """All places of a box, each beside the one before it."""
    if not sizes:
        return [()]
    rest = _path(sizes[1:])
    return [(i, *at) for i in range(sizes[0]) for at in (reversed(rest) if i % 2 else rest)]


def slices_of(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """The devices by their slice, which only TPUs have, in the order of their numbers."""
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0) if device.platform == "tpu" else 0, []).append(device)
    return [slices[number] for number in sorted(slices)]


def _not_over_slices(shape: list[int], place: int, slices: int) -> str:
    """Which axis could stretch over so many slices, or how the mesh would have to be."""
    fits = [axis for axis, size in zip(AXES, shape, strict=True) if size % slices == 0]
    if fits:
        advice = f"--mesh_slices={fits[0]} would"
    else:
        advice = f"a mesh in which one axis is a multiple of {slices} would, as --mesh_dim={slices},-1,1,1"
    return f"--mesh_slices={AXES[place]}: {slices} slices do not share {AXES[place]}={shape[place]}: {advice}"


def put_batch(
    rows: Callable[[int, int], Batch],
    shape_BT: tuple[int, int],
    mesh: Mesh,
    layout: str,
    window: int | None = None,
) -> Batch:
    """The global batch on the mesh, in layout order: B over dp and fsdp, T over sp. window: see layouts.order_of.

    `rows(start, stop)` gives rows of the global batch as host arrays in text order (of a host batch, `batch.rows`);
    each process asks only for the rows that its own devices hold a part of, once each. All columns go the same way.
    """
    sharding = NamedSharding(mesh, spec("B T", ACTIVATION_AXES))
    fetched: dict[tuple[int, int], tuple[Batch, Order]] = {}

    def fetch(index_B: slice) -> tuple[Batch, Order]:
        start, stop, _ = index_B.indices(shape_BT[0])
        if (start, stop) not in fetched:
            batch = rows(start, stop)
            order = order_of(layout, batch.meta, mesh.shape["sp"], window)
            fetched[start, stop] = order.batch(batch), order
        return fetched[start, stop]

    def place(leaf: int) -> jax.Array:
        def shard(index: tuple[slice, slice]) -> np.ndarray:
            batch, order = fetch(index[0])
            return order.lay_out(jax.tree.leaves(batch)[leaf], index[1])

        return jax.make_array_from_callback(shape_BT, sharding, shard)

    mine = next(iter(sharding.addressable_devices_indices_map(shape_BT).values()))
    structure = jax.tree.structure(fetch(mine[0])[0])
    return jax.tree.unflatten(structure, [place(leaf) for leaf in range(structure.num_leaves)])
