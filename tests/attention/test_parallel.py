"""The global attention by every strategy against the dense reference in float64; and what it compiles to."""

import re
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ringbpt.attention import MaskSpec, make_attention, permutation
from ringbpt.attention.local import reference
from ringbpt.attention.parallel.ring import needed_hops
from ringbpt.attention.work import count
from ringbpt.config import Config
from ringbpt.layouts import LAYOUTS, inverse, order_of
from ringbpt.mesh import make_mesh
from ringbpt.model.llama import Model
from ringbpt.objectives import OBJECTIVES
from ringbpt.training.step import make_gradients
from ringbpt.types import Batch, TokenMeta
from tests.attention.suite import arrays, packed_meta
from tests.flags import llama_flags

LENGTH, HEAD_DIM = 96, 16
BLOCKS = {"query_chunk_size": 6, "key_chunk_size": 4}
CAUSAL, FULL, WINDOW, BOTH = MaskSpec(), MaskSpec(False), MaskSpec(window=20), MaskSpec(False, window=7)


@dataclass(frozen=True)
class Program:
    """What is compiled once: layouts, packings and padding are data to it."""

    strategy: str = "ring"
    options: tuple[tuple[str, Any], ...] = field(default=())
    local: str = "blockwise"
    mask: MaskSpec = CAUSAL
    heads: tuple[int, int] = (4, 2)
    dtype: str = "float32"
    mesh: tuple[int, int, int, int] = (1, 1, 1, 4)

    def __str__(self) -> str:
        options = " ".join(f"{name}={value}" for name, value in self.options)
        return f"{self.strategy} {options} {self.local} {self.mask} {self.heads} {self.dtype} {self.mesh}"

    @property
    def sp(self) -> int:
        return self.mesh[3]


def options(**chosen: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(chosen.items())


TWO_WAYS, SKIP, BY_2 = options(bidirectional=True), options(skip_hops=True), options(ulysses_degree=2)
SLOW = pytest.mark.slow
# Each value of each dimension stands beside several of every other; `make test-all` runs the whole product.
COVERING = [
    Program(mesh=(1, 1, 1, 8), heads=(4, 4)),
    Program(mesh=(1, 1, 1, 3), mask=FULL, heads=(3, 1), local="reference"),
    Program(options=TWO_WAYS, mask=BOTH, heads=(4, 1), dtype="bfloat16", mesh=(2, 1, 1, 4)),
    Program(options=TWO_WAYS + SKIP, mask=WINDOW, heads=(4, 4), mesh=(1, 1, 1, 8)),
    Program("all_gather", local="reference", dtype="bfloat16"),
    Program("all_gather", options(heads_k_stride=1), mask=FULL),
    Program("ulysses", mask=WINDOW, mesh=(1, 1, 2, 4), heads=(8, 2)),
    Program("ulysses_ring", BY_2, heads=(4, 1), dtype="bfloat16", mesh=(1, 1, 1, 8)),
]
# Meshes and options of which each is above, in other company.
MORE = [
    Program(options=SKIP, mask=WINDOW, dtype="bfloat16", mesh=(2, 1, 1, 4)),
    Program("ulysses", mask=BOTH, local="reference", heads=(4, 4)),
    Program(mesh=(2, 1, 2, 2), mask=WINDOW),
    Program("ulysses_ring", BY_2 + TWO_WAYS + SKIP, mask=FULL),
]
WAYS = [
    ("ring", ()), ("ring", TWO_WAYS), ("ring", SKIP), ("ring", TWO_WAYS + SKIP), ("all_gather", ()),
    ("all_gather", options(heads_k_stride=1)), ("ulysses", ()), ("ulysses_ring", BY_2), ("auto", ()),
]  # fmt: skip
PRODUCT = [
    Program(*way, local=local, mask=mask, heads=heads, dtype=dtype)
    for way, local, mask, heads, dtype in product(
        WAYS, ("blockwise", "reference"), (CAUSAL, FULL, WINDOW, BOTH), ((4, 4), (4, 2), (4, 1)),
        ("float32", "bfloat16"),
    )
]  # fmt: skip


@lru_cache(maxsize=32)  # more programs than the product's would not fit a process
def gradient(program: Program):
    """jitted: (q, k, v, d_out, meta), in layout order, -> (out, dq, dk, dv)."""
    mesh = make_mesh(program.mesh, devices=jax.devices()[: int(np.prod(program.mesh))])
    how = {"strategy": program.strategy, "local": program.local, "mask": program.mask, **dict(program.options)}
    attend = make_attention(mesh, **how, **BLOCKS)

    def run(q, k, v, d_out, meta):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, meta), q, k, v)
        return out, *pull(d_out)

    return jax.jit(run)


def computed(program: Program, layout: str, inputs, meta: TokenMeta) -> list[np.ndarray]:
    """(out, dq, dk, dv) in text order."""
    meta = jax.tree.map(np.asarray, meta)
    order = order_of(layout, meta, program.sp, program.mask.window)
    results = gradient(program)(*jax.tree.map(lambda x: order.lay_out(np.asarray(x)), (*inputs, order.meta(meta))))
    assert all(x.dtype == program.dtype for x in results)  # gradients in the primals' dtype
    return [order.in_text_order(np.asarray(x, np.float64)) for x in results]


def truth(inputs, meta: TokenMeta, mask: MaskSpec) -> list[np.ndarray]:
    """(out, dq, dk, dv) of the dense reference in float64."""
    with jax.enable_x64(True):
        q, k, v, d_out = (jnp.asarray(np.asarray(x, np.float64)) for x in inputs)
        part = reference.attend(q, k, v, meta, meta, mask)
        grads = reference.attend_bwd(q, k, v, part.out_BTNH, part.lse_BTN, d_out, meta, meta, mask)
        assert grads[0].dtype == np.float64
        return [np.asarray(x) for x in (part.out_BTNH, *grads)]


def check(program: Program, layout: str, documents: int, padding: int = 7, seed: int = 0):
    rng = np.random.default_rng(seed)
    inputs = arrays(rng, 2, LENGTH, LENGTH, *program.heads, HEAD_DIM, program.dtype)
    meta = packed_meta(rng, 2, LENGTH, documents, padding)
    got, want = computed(program, layout, inputs, meta), truth(inputs, meta, program.mask)
    alone = Program("none", (), program.local, program.mask, program.heads, program.dtype, (1, 1, 1, 1))
    one_device = computed(alone, "contiguous", inputs, meta) if program.dtype == "bfloat16" else want
    for name, a, b, one in zip(("out", "dq", "dk", "dv"), got, want, one_device, strict=True):
        assert np.isfinite(a).all(), name
        if program.dtype == "float32":
            assert np.abs(a - b).max() <= 2e-5 * np.abs(b).max(), name
        else:  # sharing costs no accuracy
            assert np.abs(a - b).mean() <= 1.1 * np.abs(one - b).mean(), name
    assert (got[0][meta.segment_BT == 0] == 0).all()  # rows without any key


@pytest.mark.parametrize(
    "program",
    [*COVERING, *(pytest.param(program, marks=SLOW) for program in MORE)],
    ids=str,
)
def test_one_truth(program):
    for layout, documents in zip(LAYOUTS, (1, 3, 8, 5), strict=True):
        check(program, layout, documents)


@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    program=st.sampled_from([COVERING[i] for i in (0, 3, 6)]),  # compiled already
    layout=st.sampled_from(LAYOUTS),
    documents=st.integers(1, 30),
    padding=st.integers(0, 60),
    seed=st.integers(0, 2**16),
)
def test_any_packing(program, layout, documents, padding, seed):
    check(program, layout, documents, padding, seed)


@pytest.mark.slow
@pytest.mark.parametrize("program", PRODUCT, ids=str)
def test_the_product(program):
    for layout, documents in product(LAYOUTS, (1, 4)):
        check(program, layout, documents)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", [CAUSAL, WINDOW, MaskSpec(window=4), BOTH], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_no_hop_too_many(layout, mask, bidirectional):
    """The ring stops where the work counter says that nothing is left to see, one way round and both ways."""
    sp = 8
    for documents in (1, 3, 8, 12):
        place = np.arange(LENGTH, dtype=np.int32)[None]
        length = LENGTH // documents
        meta = TokenMeta(place % length, 1 + place // length)
        order = order_of(layout, meta, sp, mask.window)
        laid_out = jax.tree.map(lambda x, order=order: jnp.asarray(order.lay_out(x)), order.meta(meta))
        hops = int(needed_hops(laid_out, mask, sp, bidirectional))
        if not bidirectional and layout != "striped":
            assert hops == count(meta, layout, sp, mask, 3, 3).hops
        elif not bidirectional:  # a block of a stripe reaches far
            assert hops >= count(meta, layout, sp, mask, 3, 3).hops
        elif layout == "zigzag" and documents == 1 and mask.causal and mask.window == 4:
            assert hops == 1  # each half's neighbours stand on another side
        else:
            assert hops <= sp - 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sp", [1, 2, 3, 8])
def test_a_layout_is_a_permutation(layout, sp):
    order = permutation(layout, 48, sp)
    assert sorted(order) == list(range(48))
    assert (order[inverse(order)] == np.arange(48)).all()


def test_layouts_say_what_length_would_do():
    assert permutation("zigzag", 16, 2).tolist() == [0, 1, 2, 3, 12, 13, 14, 15, 4, 5, 6, 7, 8, 9, 10, 11]
    assert permutation("striped", 6, 2).tolist() == [0, 2, 4, 1, 3, 5]
    with pytest.raises(ValueError, match="divisible by 16: 1000 is not; nearest: 992 or 1008"):
        permutation("zigzag", 1000, 8)
    with pytest.raises(ValueError, match="none of contiguous, zigzag, striped, balanced"):
        permutation("spiral", 16, 2)


def test_what_it_cannot_do_it_refuses_by_name():
    with pytest.raises(NotImplementedError, match="sp=8 needs 'ring'"):
        make_attention(make_mesh((1, 1, 1, 8)), strategy="none")
    with pytest.raises(NotImplementedError, match="heads_k_stride"):
        make_attention(make_mesh((1, 1, 1, 8)), heads_k_stride=2)
    with pytest.raises(ValueError, match="one of 1, 2, 4, 8"):
        make_attention(make_mesh((1, 1, 1, 8)), strategy="ulysses_ring", ulysses_degree=3)
    with pytest.raises(NotImplementedError, match="use ring"):
        check(Program("ulysses", mesh=(1, 1, 1, 8)), "zigzag", 1)
    with pytest.raises(NotImplementedError, match="use ring"):
        make_attention(make_mesh((1, 1, 1, 8)), strategy="ulysses", bidirectional=True)
    with pytest.raises(ValueError, match="3 keys: 2 or 4 would do"):
        jax.eval_shape(gradient(Program(options=TWO_WAYS, mesh=(1, 1, 1, 8))), *abstract(24))
    with pytest.raises(ValueError, match="reference, blockwise"):
        make_attention(make_mesh((1, 1, 1, 8)), local="pallas")


def abstract(length: int, heads: int = 4, head_dim: int = 8):
    x = jax.ShapeDtypeStruct((1, length, heads, head_dim), jnp.float32)
    return x, x, x, x, abstract_meta(length)


def abstract_meta(length: int) -> TokenMeta:
    return TokenMeta(*[jax.ShapeDtypeStruct((1, length), jnp.int32)] * 2)


def compiled(sp: int, local_length: int, layers: int = 1):
    """The gradient of `layers` scanned, rematerialised attentions, compiled, with abstract inputs."""
    mesh = make_mesh((1, 1, 1, sp), devices=jax.devices()[:sp])
    attend = make_attention(mesh, query_chunk_size=32, key_chunk_size=32)
    x = jax.ShapeDtypeStruct((1, sp * local_length, 2, 16), jnp.float32)

    def total(x, meta):
        @jax.checkpoint
        def layer(x, _):
            return x + attend(x, x * 2, x * 3, meta), None

        return jnp.sum(jax.lax.scan(layer, x, length=layers)[0])

    return jax.jit(jax.value_and_grad(total)).lower(x, abstract_meta(sp * local_length)).compile()


@pytest.mark.slow
def test_masks_are_not_hoisted_out_of_the_scan_over_layers():
    """Positions are the same in every layer: untied, the masks of all hops would be computed ahead and kept."""
    short, long = (compiled(4, length, layers=2).memory_analysis().temp_size_in_bytes for length in (256, 512))
    # Activations double; a mask of all pairs would quadruple, and hold 4 * 512 * 512 bytes a device at least.
    assert long < 2.4 * short
    hidden = 512 * 2 * 16 * 4
    assert long < 40 * hidden


def test_the_ring_makes_the_fewest_hops():
    """n - 1 transfers of K/V forward; backward n - 1 of K/V and n - 1 of dK/dV."""
    text = compiled(8, 32).as_text()
    rings = [line for line in text.splitlines() if re.search(r" collective-permute(-start)?\(", line)]
    sent = [line for line in rings if "f32[2,1,32,2,16]" in line.split("=", 1)[1].split("(")[0]]
    # Loops hold one body each: forward (1 in the scan), its rematerialisation (1), backward: the own keys 1, during the
    # first hop's work K/V alone 1, body 2 (n - 3 times), the last hop's arrival 1, homecoming 1.
    assert len(sent) == 1 + 1 + 6, [line.strip()[:200] for line in sent]


def temporaries(sp: int, kv_heads: int, dtype, **options) -> int:
    """Bytes a device of attention's gradient, 512 tokens a device."""
    mesh = make_mesh((1, 1, 1, sp), devices=jax.devices()[:sp])
    attend = make_attention(mesh, query_chunk_size=64, key_chunk_size=64, **options)

    def run(q, k, v, d_out, meta):
        return jax.vjp(lambda q, k, v: attend(q, k, v, meta), q, k, v)[1](d_out)

    q, k = (jax.ShapeDtypeStruct((1, sp * 512, heads, 64), dtype) for heads in (8, kv_heads))
    return jax.jit(run).lower(q, k, k, q, abstract_meta(sp * 512)).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("sizes", "kv_heads", "dtype", "options"),
    [
        pytest.param((5, 8), 2, jnp.bfloat16, {}, marks=SLOW),
        # Two devices need less: no hop follows another, so no other keys are on their way beside those at hand.
        pytest.param((4, 8), 2, jnp.bfloat16, {"skip_hops": True}, marks=SLOW),
        pytest.param((4, 8), 8, jnp.float32, {"skip_hops": True}, marks=SLOW),
        # With up to four devices the backward's loop is one hop or none, and the compiler, which sees that, makes
        # another program of it.
        ((5, 8), 8, jnp.float32, {}),
    ],
    ids=["grouped", "grouped, hops as data", "hops as data", "a hop after another"],
)
def test_a_longer_ring_takes_no_more_memory(sizes, kv_heads, dtype, options):
    temps = [temporaries(sp, kv_heads, dtype, **options) for sp in sizes]
    assert max(temps) < 1.02 * min(temps), temps


@pytest.mark.parametrize(("policy", "forwards"), [("save_attention", 1), ("nothing_saveable", 2)])
def test_attention_is_computed_no_more_often_than_asked(policy, forwards):
    """In the gradient of a scanned, rematerialised model, a layer: its bodies are one layer each."""
    llama = llama_flags(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, attention_type="ring_blockwise", sequence_layout="zigzag",
        remat_block=policy,
    )  # fmt: skip
    config = Config(dtype="fp32", mesh_shape=(1, 1, 1, 2), **llama)
    model = Model.of(config, make_mesh((1, 1, 1, 2), devices=jax.devices()[:2]))
    ints, floats = (jax.ShapeDtypeStruct((1, 64), dtype) for dtype in (jnp.int32, jnp.float32))
    batch = Batch(ints, ints, floats, ints, ints)
    program = jax.make_jaxpr(make_gradients(config, model, OBJECTIVES["sft"]))(model.abstract_params, batch)
    rings = [eqn for eqn in equations(program.jaxpr) if eqn.primitive.name == "shard_map"]
    rings = [eqn for eqn in rings if "ppermute" in {e.primitive.name for e in equations(eqn.params["jaxpr"])}]
    # A forward gives out and lse (where that is needed), a backward three gradients.
    gradients = [len(eqn.outvars) == 3 for eqn in rings]
    assert (gradients.count(False), gradients.count(True)) == (forwards, 1)


def equations(jaxpr):
    """All of a program's operations, those inside others included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def jaxprs_in_params(params):
    for value in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
        if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            yield getattr(value, "jaxpr", value)
