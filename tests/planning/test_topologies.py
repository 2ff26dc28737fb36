"""The names people use for machines, and what is said about those that are none."""

import subprocess
import sys

import numpy as np
import pytest

from ringbpt.config import UserError
from ringbpt.dims import AXES
from ringbpt.mesh import make_mesh
from ringbpt.planning import topologies
from ringbpt.planning.between_slices import bytes_between
from ringbpt.planning.hlo import parse
from ringbpt.planning.report import make_plan
from ringbpt.planning.topologies import need, topology
from tests.planning.test_plan import config_of


@pytest.mark.parametrize(
    ("name", "kind", "count", "per_host"),
    [
        ("v4-8", "v4", 4, 4),
        ("v4-512", "v4", 256, 4),
        ("v5p-16", "v5p", 8, 4),
        ("v5litepod-1", "v5e", 1, 1),
        ("v5e-256", "v5e", 256, 4),
        ("V6e-8", "v6e", 8, 4),
        ("v3-512", "v3", 512, 8),
        ("tpu7x-4x4x4", "v7x", 128, 8),
        ("v7x-16", "v7x", 16, 8),
        ("v5p-4x4x4", "v5p", 64, 4),
        ("h200", "H200", 1, 1),
        ("8xa100-80g", "A100", 8, 8),
        ("4x8xh100", "H100", 32, 8),
        ("2xrtx4090-24g", "RTX4090", 2, 2),
        ("rtx-4090", "RTX4090", 1, 1),
        ("8xa100-sxm4-40gb", "A100-40", 8, 8),
        ("2xh100-nvl", "H100-NVL", 2, 2),
        ("4x8xb200", "B200", 32, 8),
        ("72xgb200", "GB200", 72, 72),
        ("2xv5e-16", "v5e", 32, 4),
    ],
)
def test_names_people_use(name, kind, count, per_host):
    try:
        need("tpu" if name.lower().startswith(("v", "tpu", "2xv5e")) else "cuda")
    except UserError as error:
        pytest.skip(str(error))
    machine = topology(name)
    assert machine.hardware and machine.hardware.name == kind
    assert (len(machine.devices), machine.devices_per_host) == (count, per_host)
    assert machine.memory and 0.9 < machine.memory / 2**30 / machine.hardware.hbm_gib <= 1


def test_cpus_are_the_ones_of_this_process():
    machine = topology("cpu-8")
    assert len(machine.devices) == 8 and machine.memory is None


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("v4-500", "v4 machines come as powers of two: v4-256 or v4-512"),
        ("v5e-3", "v5e-4"),
        ("v7-8", "v2-8 to v2-512"),
        ("8xh200-80g", "did you mean --topology=8xh200?"),
        ("rtx4090-80g", "did you mean --topology=rtx4090?"),
        ("4x8xb300", "did you mean --topology=4x8xb200?"),
        ("8xb200-80g", "did you mean --topology=8xb200?"),
        ("v5p-4x4x5", "v5p-"),
        ("0xv5p-8", "0 slices: 1 to 64"),
        ("2xcpu-8", "did you mean"),
        ("v4", "did you mean"),
        ("cpu-99", "8 CPU devices"),
        ("0xh100", "did you mean"),
    ],
)
def test_what_is_no_machine_is_answered_in_one_line(name, answer):
    with pytest.raises(UserError, match="--topology=") as error:
        topology(name)
    assert answer in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "answer"), [("v4-8", "make aot,"), ("8xh100", "make aot-cuda")])
def test_a_missing_compiler_is_one_line_that_says_what_to_install(name, answer, monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=answer):
        topology(name)


def test_two_processes_compile_for_tpus_at_once():
    """libtpu takes a lock for a device that is its own; nobody holds one here."""
    try:
        need("tpu")
    except UserError as error:
        pytest.skip(str(error))
    code = (
        "import jax, sys; from ringbpt.planning.topologies import topology; machine = topology('v5e-1')\n"
        "x = jax.ShapeDtypeStruct((8, 8), 'float32', sharding=jax.sharding.SingleDeviceSharding(machine.devices[0]))\n"
        "machine.compile(jax.jit(lambda x: x @ x), x); print('ready', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]
    try:
        assert [process.stdout.readline() for process in both] == ["ready\n"] * 2  # both alive, both have compiled
    finally:
        ends = [process.communicate(timeout=60) for process in both]
    assert [err for _, err in ends] == ["", ""]  # and no complaint that there is no TPU


SENDS = """HloModule m
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %t = token[] after-all()
  %a = (f32[8]{0}, u32[], token[]) send(%x, %t), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %b = (f32[8]{0}, u32[], token[]) send(%x, %t), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_megascale_target={{0->1}},_xla_megascale_transfer_type="ONE_TO_ONE"}
  %c = (f32[8]{0}, u32[], token[]) send(%x, %t), channel_id=4, is_host_transfer=true
}
"""  # noqa: E501


def test_what_goes_between_slices_is_counted_apart():
    assert bytes_between(parse(SENDS), 4) == {"all-reduce": 32 * 2 * 3 // 4, "collective-permute": 32}


def slices(name: str) -> topologies.Topology:
    try:
        need("tpu")
    except UserError as error:
        pytest.skip(str(error))
    return topology(name)


def test_one_axis_of_a_mesh_stretches_over_slices():
    """Every other axis, and its own inner part, stays inside of a slice."""
    machine = slices("2xv5p-8")
    assert machine.slices == 2 and len(machine.devices) == 8 and machine.links and machine.links.reach == 4
    for axis, shape in (("dp", (2, 1, 1, 4)), ("sp", (1, 2, 1, 4)), ("fsdp", (1, 4, 2, 1))):
        mesh = make_mesh(shape, devices=machine.devices, over_slices=axis)
        at = AXES.index(axis)
        numbers = np.vectorize(lambda device: device.slice_index)(np.moveaxis(mesh.devices, at, 0))
        halves = numbers.reshape(2, -1)
        assert (halves[0] == halves[0, 0]).all() and (halves[1] == halves[1, 0]).all() and halves[0, 0] != halves[1, 0]
    with pytest.raises(UserError, match="2 slices do not share dp=1: --mesh_slices=fsdp would"):
        make_mesh((1, 4, 1, 2), devices=machine.devices)


@pytest.mark.slow
def test_a_plan_for_two_slices_has_its_rings_inside_and_its_gradients_between():
    flags = "--dtype=bf16", "--mesh_dim=2,1,1,4", "--llama.attention_kernel=auto", "--llama.remat_block=save_attention"
    report = make_plan(config_of(*flags), slices("2xv5p-8")).as_dict()
    assert report["ring_overlap"]["hops"] >= 2 * 3 * 3  # two layers; forward, and K, V and their gradients backward
    weights = report["arguments"]["parameters"]
    # Of each gradient half goes over, and comes back: once at least, and not with every block of a layer.
    assert weights < report["collectives"]["slices"] < 4 * weights
    assert any("slices at 3.125 GB/s" in line for line in report["assumptions"])


@pytest.mark.slow
def test_over_slices_gradients_go_once_a_step():
    flags = "--dtype=bf16", "--mesh_dim=2,1,1,4", "--llama.attention_kernel=auto", "--llama.remat_block=save_attention"
    whole = ("--llama.hidden_size=512", "--llama.num_attention_heads=4")  # tiles: narrower arrays are padded
    config = config_of(*flags, *whole, "--optimizer.accumulate_gradient_steps=2")
    report = make_plan(config, slices("2xv5p-8")).as_dict()
    weights, between = report["arguments"]["parameters"], report["collectives"]["slices"]
    assert weights <= between < 1.1 * weights
    assert report["exposed_seconds"][0] > 0.99 * weights / 6.25e9  # nothing hides them
    # The compiler drops the names of what goes round a ring; by what stands beside it each is known again.
    sent = {(flow["what"], flow["way"]): (flow["sent"], flow["least"]) for flow in report["traffic"]}
    for name in (("keys and values", way) for way in ("forward", "backward")):
        assert sent[name][0] == sent[name][1]
    for what in ("gradients of keys and values", "gradients of weights"):
        bytes_sent, least = sent[what, "backward"]
        assert least <= bytes_sent <= 1.02 * least
    assert ("the rest", "forward") not in sent


@pytest.mark.parametrize(
    ("name", "shape"), [("v5e-8", (1, 1, 1, 8)), ("v5e-32", (1, 1, 1, 32)), ("v5e-256", (1, 2, 2, 64))]
)
def test_a_ring_on_v5e_goes_from_neighbour_to_neighbour(name, shape):
    mesh = make_mesh(shape, devices=slices(name).devices, ring=True)
    coords = np.array([device.coords for device in mesh.devices.flat]).reshape(*shape, -1)
    assert (np.abs(coords - np.roll(coords, 1, axis=3)).sum(axis=-1) == 1).all()
    assert len(set(mesh.devices.flat)) == mesh.size
