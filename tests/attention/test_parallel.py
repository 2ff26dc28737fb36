"""The global attention on every kind of mesh, layout and mask against one dense device; and what it compiles to."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringbpt.attention import MaskSpec, make_attention, permutation
from ringbpt.attention.layouts import LAYOUTS, inverse
from ringbpt.mesh import make_mesh
from tests.attention.test_local import arrays, packed_meta


def run(mesh, layout, inputs, meta, **options):
    """(out, dq, dk, dv) in text order."""
    order = permutation(layout, inputs[0].shape[1], mesh.shape["sp"])
    attend = make_attention(mesh, **options)
    q, k, v, d_out, position, segment = (x[:, order] for x in (*inputs, meta.position_BT, meta.segment_BT))

    def total(q, k, v):
        out = attend(q, k, v, position, segment)
        return jnp.sum(out.astype(jnp.float32) * d_out), out

    grads, out = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x)[:, inverse(order)] for x in (out, *grads)]


def dense(inputs, meta, mask):
    mesh = make_mesh((1, 1, 1, 1), devices=jax.devices()[:1])
    return run(mesh, "contiguous", inputs, meta, strategy="none", local="reference", mask=mask)


# A covering set of mesh x layout x local x mask x documents x heads; `make test-all` runs the product.
CASES = [
    ((1, 1, 1, 8), "zigzag", "blockwise", MaskSpec(), 1, (4, 4)),
    ((1, 1, 1, 8), "striped", "blockwise", MaskSpec(window=20), 3, (4, 2)),
    ((2, 1, 2, 2), "contiguous", "blockwise", MaskSpec(), 4, (4, 2)),
    ((1, 2, 1, 4), "striped", "reference", MaskSpec(), 2, (4, 1)),
    ((1, 2, 1, 4), "zigzag", "reference", MaskSpec(causal=False), 2, (3, 3)),
]
# strategy, its options, and a case as above.
STRATEGY_CASES = [
    ("all_gather", {}, ((1, 1, 1, 8), "zigzag", "blockwise", MaskSpec(), 2, (4, 2))),
    ("all_gather", {"heads_k_stride": 1}, ((1, 2, 1, 4), "striped", "blockwise", MaskSpec(window=20), 3, (4, 4))),
    ("ulysses", {}, ((1, 1, 1, 4), "contiguous", "blockwise", MaskSpec(), 4, (8, 4))),
    ("ulysses", {}, ((2, 1, 1, 4), "zigzag", "reference", MaskSpec(), 2, (4, 2))),
    ("ulysses", {}, ((1, 1, 2, 4), "striped", "blockwise", MaskSpec(causal=False), 1, (8, 2))),
    ("ulysses_ring", {"ulysses_degree": 2}, ((1, 1, 1, 8), "zigzag", "blockwise", MaskSpec(), 3, (4, 2))),
    ("ulysses_ring", {"ulysses_degree": 4}, ((1, 1, 1, 8), "contiguous", "blockwise", MaskSpec(window=20), 1, (4, 2))),
]
PRODUCT = [
    (mesh, layout, local, mask, documents, heads)
    for mesh in ((1, 1, 1, 8), (2, 1, 2, 2), (1, 2, 1, 4), (1, 1, 2, 3))
    for layout in LAYOUTS
    for local in ("blockwise", "reference")
    for mask in (MaskSpec(), MaskSpec(causal=False), MaskSpec(window=20))
    for documents in (1, 4)
    for heads in ((4, 4), (4, 2))
]


def check(shape, layout, local, mask, documents, heads, **strategy):
    rng = np.random.default_rng(0)
    inputs = arrays(rng, 2, 96, 96, *heads, 16)
    meta = packed_meta(rng, 2, 96, documents, padding=7)
    mesh = make_mesh(shape, devices=jax.devices()[: int(np.prod(shape))])
    options = {"local": local, "mask": mask, "query_chunk_size": 6, "key_chunk_size": 4, **strategy}
    got, want = run(mesh, layout, inputs, meta, **options), dense(inputs, meta, mask)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert np.abs(a - b).max() <= 2e-5 * np.abs(b).max(), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ring_is_dense_attention(case):
    check(*case)


@pytest.mark.parametrize(("strategy", "options", "case"), STRATEGY_CASES, ids=str)
def test_every_strategy_is_dense_attention(strategy, options, case):
    check(*case, strategy=strategy, **options)


@pytest.mark.slow
@pytest.mark.parametrize("case", PRODUCT, ids=str)
def test_the_product(case):
    check(*case)


def test_bf16_keeps_its_dtype_and_the_one_device_error():
    """Gradients come in the primals' dtype; going round the ring costs no accuracy."""
    rng = np.random.default_rng(1)
    inputs = arrays(rng, 1, 128, 128, 2, 1, 32, jnp.bfloat16)
    meta = packed_meta(rng, 1, 128, 2)
    want = dense([x.astype(jnp.float32) for x in inputs], meta, MaskSpec())
    one = make_mesh((1, 1, 1, 1), devices=jax.devices()[:1])
    options = {"local": "blockwise", "query_chunk_size": 16, "key_chunk_size": 16}
    single = run(one, "contiguous", inputs, meta, strategy="none", **options)
    ring = run(make_mesh((1, 1, 1, 8)), "zigzag", inputs, meta, **options)
    for a, b, truth in zip(ring, single, want, strict=True):
        assert a.dtype == jnp.bfloat16
        error, one_device = (np.abs(np.asarray(x, np.float32) - truth).mean() for x in (a, b))
        assert error <= 1.1 * one_device


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
    with pytest.raises(ValueError, match="none of contiguous, zigzag, striped"):
        permutation("spiral", 16, 2)


def test_what_it_cannot_do_it_refuses_by_name():
    with pytest.raises(NotImplementedError, match="sp=8 needs 'ring'"):
        make_attention(make_mesh((1, 1, 1, 8)), strategy="none")
    with pytest.raises(NotImplementedError, match="heads_k_stride"):
        make_attention(make_mesh((1, 1, 1, 8)), heads_k_stride=2)
    with pytest.raises(ValueError, match="one of 1, 2, 4, 8"):
        make_attention(make_mesh((1, 1, 1, 8)), strategy="ulysses_ring", ulysses_degree=3)
    with pytest.raises(NotImplementedError, match="use ring"):
        check((1, 1, 1, 8), "zigzag", "blockwise", MaskSpec(), 1, (4, 4), strategy="ulysses")
    with pytest.raises(ValueError, match="reference, blockwise"):
        make_attention(make_mesh((1, 1, 1, 8)), local="pallas")


def compiled(sp: int, local_length: int, layers: int = 1):
    """The gradient of `layers` scanned, rematerialised attentions, compiled, with abstract inputs."""
    mesh = make_mesh((1, 1, 1, sp), devices=jax.devices()[:sp])
    attend = make_attention(mesh, query_chunk_size=32, key_chunk_size=32)
    x = jax.ShapeDtypeStruct((1, sp * local_length, 2, 16), jnp.float32)
    meta = jax.ShapeDtypeStruct((1, sp * local_length), jnp.int32)

    def total(x, position, segment):
        @jax.checkpoint
        def layer(x, _):
            return x + attend(x, x * 2, x * 3, position, segment), None

        return jnp.sum(jax.lax.scan(layer, x, length=layers)[0])

    return jax.jit(jax.value_and_grad(total)).lower(x, meta, meta).compile()


def test_masks_are_not_hoisted_out_of_the_scan_over_layers():
    """Positions are the same in every layer: untied, the masks of all hops would be computed ahead and kept."""
    short, long = (compiled(4, length, layers=2).memory_analysis().temp_size_in_bytes for length in (256, 512))
    # Activations double; a mask of all pairs would quadruple, and hold 4 * 512 * 512 bytes a device at least.
    assert long < 2.4 * short
    hidden = 512 * 2 * 16 * 4
    assert long < 40 * hidden


def test_the_ring_makes_the_fewest_hops():
    """n - 1 transfers of K/V forward; backward n - 1 of K/V and n - 1 of dK/dV, and one of zeros to keep one body."""
    text = compiled(8, 32).as_text()
    rings = [line for line in text.splitlines() if re.search(r" collective-permute(-start)?\(", line)]
    sent = [line for line in rings if "f32[2,1,32,2,16]" in line.split("=", 1)[1].split("(")[0]]
    # Loops hold one body each: forward (1 in the scan), its rematerialisation (1), backward: first hop 1, body 2,
    # the last hop's arrival 1, homecoming 1.
    assert len(sent) == 1 + 1 + 5, [line.strip()[:200] for line in sent]
