"""Every hop of the ring hides behind computation, on machines that are not here; a ring that waits is caught."""

from itertools import product

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from ringbpt.attention import make_attention
from ringbpt.attention.core import Partial
from ringbpt.attention.parallel import ring
from ringbpt.config import UserError
from ringbpt.mesh import make_mesh
from ringbpt.planning.overlap import Hop, ring_hops
from ringbpt.planning.topologies import need, topology
from ringbpt.training.step import LIMIT, gpu_options
from ringbpt.types import TokenMeta
from tests.planning.test_account import AWAY, BF16, BLOCKS, KEPT, LLAMA8, PARAMS, STATE, planned

SLOW = pytest.mark.slow
# The quick tests are of a kernel and of a ring that waits, below, and of a plan for GPUs in test_plan.py.
MACHINES = [*(pytest.param(name, marks=SLOW) for name in ("v4-8", "v5p-8", "v5e-4", "v6e-4", "4xh200"))]
EIGHT = [
    *product(["v4-16", "v5p-16", "v5e-8", "v6e-8"], ["blockwise", "pallas_tpu"]),
    *product(["8xh200"], ["blockwise", "cudnn", "pallas_hopper", "pallas_triton"]),
    *product(["8xa100"], ["blockwise", "pallas_triton"]),
]


def exposed(hops: list[Hop]) -> list[str]:
    """A line for each hop that nothing hides."""
    return [str(hop) for hop in hops if not hop.hidden]


def compiler(name: str):
    """The machine; the test is skipped where its compiler is not installed."""
    try:
        need("tpu" if name.startswith("v") else "cuda")
    except UserError as error:
        pytest.skip(str(error))
    return topology(name)


def program(name: str, length: int = 512, **options) -> str:
    """The gradient of one attention by ring over the machine's devices, compiled as the train step is."""
    machine = compiler(name)
    sp = len(machine.devices)
    mesh = make_mesh((1, 1, 1, sp), devices=machine.devices)
    options = {"query_chunk_size": length // 2, "key_chunk_size": length // 2} | options
    attend = make_attention(mesh, **options)
    sharding = NamedSharding(mesh, PartitionSpec(None, "sp"))
    x = jax.ShapeDtypeStruct((1, sp * length, 2, 128), jnp.bfloat16, sharding=sharding)
    place = jax.ShapeDtypeStruct((1, sp * length), jnp.int32, sharding=sharding)

    def total(q, k, v, meta):
        return jnp.sum(attend(q, k, v, meta).astype(jnp.float32) ** 2)

    own = gpu_options() if machine.platform == "cuda" else None
    return machine.compile(jax.jit(jax.grad(total, (0, 1, 2))), x, x, x, TokenMeta(place, place), options=own).as_text()


def check(text: str, sp: int, apart: bool = True):
    hops = ring_hops(text)
    assert not exposed(hops), exposed(hops)
    # K and V: n - 1 forward and n - 1 backward. Their gradients, as many.
    assert sum(hop.times for hop in hops if not hop.backward) == sp - 1
    assert {hop.in_loop for hop in hops if not hop.backward} == {True}
    # A GPU's compiler sends those that go at once as one.
    backward = sum(hop.times for hop in hops if hop.backward)
    assert backward == 2 * (sp - 1) if apart else backward >= sp - 1
    assert sp <= 4 or any(hop.in_loop for hop in hops if hop.backward)  # a loop of one turn is none to the compiler


@pytest.mark.parametrize("name", MACHINES)
def test_every_hop_hides_behind_attention(name):
    check(program(name), 4, apart=name.startswith("v"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "local"), EIGHT)
def test_every_hop_hides_behind_attention_on_eight(name, local):
    """A kernel's keys are long: a GPU's compiler would send them and their gradients one after the other, untold."""
    text = program(name, length=1024 if local == "blockwise" else 32768, local=local)
    check(text, 8, apart=name.startswith("v"))


def test_every_hop_hides_behind_a_kernel():
    """Additions of the gradients that travel are long enough to seem to hide K and V: they must not be asked to."""
    check(program("v4-8", length=32768, local="auto"), 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4-8", "v5e-4"])
def test_half_of_the_keys_each_way_hide_too(name):
    """On TPUs; a GPU's compiler leaves one of the two ways exposed."""
    hops = ring_hops(program(name, bidirectional=True))
    # Forward, the own keys, the first hop, what follows it, the last hop's arrival, and the way home: each both ways.
    assert len(hops) == 2 * (1 + 1 + 1 + 2 + 1 + 1) and not exposed(hops), exposed(hops)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e-4", "4xh200"])
def test_where_hops_are_skipped_only_the_way_home_is_exposed(name):
    hops = ring_hops(program(name, skip_hops=True))
    assert {hop.backward for hop in hops} == {False, True}
    assert len(exposed(hops)) == 2, exposed(hops)  # onward, or back: one of the two


def waiting_forward(local, axis, q, k, v, q_meta, kv_meta, mask, hops=None, everybody=None, bidirectional=False):
    """A ring that sends its keys only when it has computed with them."""
    size, meta_at = lax.axis_size(axis), ring._metas_of(everybody or ring.everybodys(kv_meta, axis), axis)

    def hop(state, i):
        part, kv = state
        part, kv = lax.optimization_barrier((local.attend(q, kv[0], kv[1], q_meta, meta_at(i), mask, part), kv))
        return (part, ring._send(kv, axis, size)), None

    (part, kv), _ = lax.scan(hop, (Partial.empty(q.shape), jnp.stack([k, v])), jnp.arange(size - 1))
    return local.attend(q, kv[0], kv[1], q_meta, meta_at(size - 1), mask, part)


@pytest.mark.parametrize("name", ["v5e-4", pytest.param("4xh200", marks=pytest.mark.slow)])
def test_a_ring_that_waits_is_caught(name, monkeypatch):
    monkeypatch.setattr(ring, "forward", waiting_forward)
    hops = ring_hops(program(name))
    assert exposed(hops) == [str(hop) for hop in hops if not hop.backward]


def test_the_compilers_are_here():
    """Where none is installed, every test above is skipped: `make test` installs both."""
    need("tpu")
    need("cuda")


def test_a_program_without_a_schedule_is_refused():
    text = jax.jit(jnp.sin).lower(jnp.ones(3)).compile().as_text()
    with pytest.raises(ValueError, match="compile it for a TPU or a GPU"):
        ring_hops(text.replace("is_scheduled=true", "is_scheduled=false"))


def test_a_gpus_scheduler_is_told_the_memory_that_the_run_is_given(monkeypatch):
    """XLA counts in percent of the 80 % that it takes a program to be given."""
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    percent = lambda *given: gpu_options(*given).get(LIMIT)
    assert (percent(), percent(0.8), percent(0.95)) == (117, 125, 148)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    assert percent() == 148
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.8")  # its newer name
    assert percent() == 125


@pytest.mark.parametrize("name", gpu_options())
def test_xla_flags_have_the_last_word(name, monkeypatch):
    """Whoever says it, knows why: options of a compilation would override it."""
    all_of_them = gpu_options()
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=/nowhere --{name}=95")
    assert gpu_options() == {other: value for other, value in all_of_them.items() if other != name}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machine", "mesh", "rows", "length", "flags"),
    [
        ("8xa100-80g", "1,1,1,8", 1, 262_144, (KEPT,)),
        ("8xa100-80g", "1,1,1,8", 1, 262_144, (KEPT, "--llama.scan_mlp=False")),
        ("8xa100-80g", "1,2,1,4", 2, 262_144, (KEPT,)),
        ("8xa100-80g", "1,1,1,8", 1, 65_536, (KEPT, "--llama.scan_mlp=False")),
        ("2x8xh100", "2,1,1,8", 2, 65_536, ("--llama.remat_block=save_attention", "--llama.scan_mlp=False")),
    ],
)
def test_no_sum_of_weights_keeps_a_hop_waiting(machine, mesh, rows, length, flags):
    """Gradients of a layer's weights are under way while its attention computes: with room for two transfers, or in the
    second case for three, the homecoming of dK and dV waited in 31 of 32 layers; over dp, in the last, with four.
    """
    plan = planned(machine, mesh, ("7b",), rows, length, (BF16, *flags))
    hops = ring_hops(plan.program.module)
    assert hops and not exposed(hops), exposed(hops)


@pytest.mark.slow
def test_every_hop_hides_where_a_gpus_program_fills_the_memory():
    """Llama-3-8B over 12M tokens on 8 H100-80, everything offloaded: docs/context_lengths.md."""
    plan = planned("8xh100-80g", "1,1,1,8", ("7b", *LLAMA8), 1, 12_058_624, (BF16, AWAY, BLOCKS, STATE, PARAMS))
    hops = ring_hops(plan.program.module)
    assert 0.8 * plan.machine.memory < plan.program.total < 0.9 * plan.machine.memory
    assert hops and not exposed(hops), exposed(hops)
