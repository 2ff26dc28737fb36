"""The TPU kernels in their interpreter, where races are detected; and compiled for TPUs that aren't here."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from ringbpt.attention.core import MaskSpec, Partial
from ringbpt.attention.local import pallas_tpu
from ringbpt.attention.local.pallas_tpu import make_pallas_tpu
from ringbpt.planning.overlap import ring_hops
from ringbpt.types import TokenMeta
from tests.attention import suite
from tests.attention.suite import Case
from tests.planning.test_overlap import check as check_overlap
from tests.planning.test_overlap import compiler, program

MACHINES = ("v4-8", "v5e-4", "v5p-8", "v6e-4")


@pytest.fixture(autouse=True)
def fresh_interpreter():
    """Its memory has as many cores as its first use had."""
    pltpu.reset_tpu_interpret_mode_state()
    yield
    pltpu.reset_tpu_interpret_mode_state()


def interpreted(blocks=(128, 128), **params):
    interpret = pltpu.InterpretParams(detect_races=True, **params)
    return make_pallas_tpu(jax.devices()[0], *blocks, interpret=interpret)


@pytest.mark.parametrize("case", suite.cases(), ids=str)
def test_the_kernels_pass_the_suite(case, capfd):
    suite.check(interpreted(), case)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize("keys", [512, pytest.param(384, marks=pytest.mark.slow)])  # two parts of 256, three of 128
def test_a_block_of_keys_in_parts(keys):
    case = Case("parts", T=128, S=keys, heads=(1, 1), head_dim=16, documents=3, mask=MaskSpec(causal=False))
    suite.check(interpreted((128, keys)), case)


@pytest.mark.slow
def test_two_cores_of_a_chip_share_the_heads(capfd):
    case = Case("two cores", heads=(2, 2), head_dim=16, mask=MaskSpec(causal=False))
    suite.check(interpreted(num_cores_or_threads=2), case)
    assert "RACE" not in capfd.readouterr().out


def test_a_race_is_detected(capfd, monkeypatch):
    """A block of dq that the visit before has added to is read again only when it has been written."""
    monkeypatch.setattr(pallas_tpu, "_was", lambda writing, slot, at: False)
    twice = Case("a block of dq twice", T=128, S=256, heads=(1, 1), head_dim=16, mask=MaskSpec(causal=False))
    # jax 0.10 says so and goes on, to wrong numbers; 0.12 raises.
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)) as error:
        suite.check(interpreted(), twice)
    assert "RACE" in capfd.readouterr().out + str(error.value)


def test_what_nobody_sees_is_no_step_of_the_grid():
    """Four documents of two blocks: three visits each, and the same going back."""
    points = []

    def record(*args):  # ([a token,] grid point, core); a token is handed back
        points.append(tuple(map(int, args[-2])))
        return args[0] if len(args) == 3 else None

    local = interpreted(grid_point_recorder=record)
    meta = TokenMeta(np.arange(1024, dtype=np.int32)[None] % 256, np.arange(1024, dtype=np.int32)[None] // 256 + 1)
    x = jnp.ones((1, 1024, 1, 8))
    part = local.attend(x, x, x, meta, meta, MaskSpec())
    assert len(set(points)) == len(points) == 4 * 3
    points.clear()
    local.attend_bwd(x, x, x, part.out_BTNH, part.lse_BTN, x, meta, meta, MaskSpec())
    assert len(set(points)) == len(points) == 4 * 3


def test_a_ring_over_the_kernels_is_dense_attention():
    suite.check_ring("pallas_tpu_interpreted", 512, 128, heads=(1, 1))


def test_what_it_cannot_do_it_refuses_by_name(monkeypatch):
    meta = TokenMeta(np.zeros((1, 256), np.int32), np.ones((1, 256), np.int32))

    def attend(head_dim=8, dtype=jnp.float32):
        x = jnp.ones((1, 256, 1, head_dim), dtype)
        return interpreted().attend(x, x, x, meta, meta, MaskSpec())

    with pytest.raises(NotImplementedError, match="float16: use blockwise"):
        attend(dtype=jnp.float16)
    with pytest.raises(NotImplementedError, match=r"multiple of 8 .* not of 12: use blockwise"):
        attend(head_dim=12)
    with pytest.raises(NotImplementedError, match="this is cpu: use blockwise"):
        make_pallas_tpu(jax.devices()[0], None, None)
    monkeypatch.setattr(pallas_tpu, "MOST_VISITS", 1)
    with pytest.raises(NotImplementedError, match=r"list of 4 possible visits .* no equal pieces"):
        attend()


def test_a_list_of_visits_too_long_is_walked_in_pieces(monkeypatch):
    """Of 4 x 2 blocks; of the queries forward, with what each is handed, and of the keys backward."""
    numbers = np.random.default_rng(0)
    q, d_out = (jnp.asarray(numbers.normal(size=(1, 512, 4, 8)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(numbers.normal(size=(1, 256, 2, 8)), jnp.float32) for _ in range(2))
    place = np.arange(512)[None].astype(np.int32)
    q_meta, kv_meta = (TokenMeta(place[:, -n:] % 320, 1 + place[:, -n:] // 320) for n in (512, 256))
    carry = Partial(d_out, jnp.ones(q.shape[:3], jnp.float32))

    def run():
        local = interpreted()
        part = local.attend(q, k, v, q_meta, kv_meta, MaskSpec(), carry)
        return part, local.attend_bwd(q, k, v, part.out_BTNH, part.lse_BTN, d_out, q_meta, kv_meta, MaskSpec())

    whole = run()
    monkeypatch.setattr(pallas_tpu, "MOST_VISITS", 4)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), run(), whole)


@pytest.mark.slow
def test_half_a_million_tokens_compile_for_one_tpu():
    """Its list of possible visits, 262,144 of them, would not fit the scalar memory."""
    compiled("v5p-8", 128, jnp.bfloat16, length=2**19)


# --- for TPUs that aren't here ---


def compiled(name: str, head_dim: int, dtype, length: int = 4096, columns: int = 2):
    """(forward with a carry, backward), compiled for one device of the machine, with the table's blocks.

    columns: of a TokenMeta; 3 where documents may share their beginning.
    """
    machine = compiler(name)
    array = partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(machine.devices[0]))
    q, k = (array((1, length, n, head_dim), dtype) for n in (8, 2))
    meta = TokenMeta(*(array((1, length), jnp.int32) for _ in range(columns)))
    out, lse = array(q.shape, jnp.float32), array(q.shape[:3], jnp.float32)
    local, mask = make_pallas_tpu(machine.devices[0], None, None), MaskSpec()
    forward = jax.jit(lambda q, k, v, meta, carry: local.attend(q, k, v, meta, meta, mask, carry))
    backward = jax.jit(lambda q, k, v, out, lse, d_out, m: local.attend_bwd(q, k, v, out, lse, d_out, m, m, mask))
    return machine.compile(forward, q, k, k, meta, Partial(out, lse)), machine.compile(
        backward, q, k, k, out, lse, q, meta
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("name", MACHINES)
def test_every_size_compiles_for_every_tpu(name, head_dim, dtype):
    compiled(name, head_dim, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", MACHINES)
def test_trees_compile_for_every_tpu(name):
    compiled(name, 128, jnp.bfloat16, columns=3)


@pytest.mark.slow
def test_lse_is_one_number_a_lane():
    """Its 8 heads of 4096 tokens are 128 KiB in memory, not 128 times that."""
    forward, _ = compiled("v5e-4", 64, jnp.bfloat16)
    call = next(line for line in forward.as_text().splitlines() if "custom-call(" in line and "ringbpt_attend" in line)
    assert re.search(r"f32\[1,8,1,4096\]\{3,2,1,0:T\(1,128\)", call), call[:300]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) for name in MACHINES],  # planning/test_overlap.py has one
)
def test_a_ring_over_the_kernels_hides_every_hop(name):
    """Behind a kernel each, at a length where a hop's computation is longer than its transfer."""
    text = program(name, length=4096, local="pallas_tpu", query_chunk_size=256, key_chunk_size=256)
    check_overlap(text, 4)
    assert all(any(work.startswith("ringbpt_attend") for work in hop.hidden_by) for hop in ring_hops(text))
