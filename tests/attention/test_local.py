"""Every local implementation against the dense reference: forward, lse, carry, gradients, under every mask."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ringbpt.attention.core import Local, MaskSpec, Partial, block_visibility, merge, visible
from ringbpt.attention.local import blockwise, reference
from ringbpt.types import TokenMeta
from tests.attention import suite
from tests.attention.suite import REFERENCE, arrays, assert_close, packed_meta


@partial(jax.jit, static_argnums=(0, 7))
def results(local: Local, q, k, v, d_out, q_meta, kv_meta, mask):
    """Forward over these keys, and gradients with the global out and lse, which the reference supplies."""
    whole = reference.attend(q, k, v, q_meta, kv_meta, mask)
    return suite.results(local, 0, q, k, v, d_out, q_meta, kv_meta, mask, whole)


@pytest.mark.parametrize("case", suite.cases(), ids=str)
def test_blockwise_passes_the_suite(case):
    suite.check(blockwise.make_blockwise(128, 64), case)


@pytest.mark.parametrize(
    "mask",
    [pytest.param(MaskSpec(), marks=pytest.mark.slow), MaskSpec(causal=False, window=9)],
    ids=["causal", "window"],
)
def test_any_block_sizes_are_the_reference(mask):
    rng = np.random.default_rng(0)
    q, k, v, d_out = arrays(rng, 2, 48, 40, 4, 2, 16)
    q_meta, kv_meta = packed_meta(rng, 2, 48, 3, padding=5), packed_meta(rng, 2, 40, 3, padding=3)
    want = results(REFERENCE, q, k, v, d_out, q_meta, kv_meta, mask)
    # Query blocks larger than key blocks and the reverse, sizes that divide and sizes that don't, one block.
    for query_chunk, key_chunk in ((16, 8), (8, 16), (13, 7), (64, 64)):
        local = blockwise.make_blockwise(query_chunk, key_chunk)
        assert_close(results(local, q, k, v, d_out, q_meta, kv_meta, mask), want)


def test_a_carry_is_as_good_as_one_pass():
    rng = np.random.default_rng(1)
    q, k, v, _ = arrays(rng, 1, 24, 24, 2, 2, 8)
    meta = packed_meta(rng, 1, 24, 2)
    whole = reference.attend(q, k, v, meta, meta, MaskSpec())
    part = None
    for keys in (slice(0, 8), slice(8, 24)):
        kv_meta = TokenMeta(meta.position_BT[:, keys], meta.segment_BT[:, keys])
        part = reference.attend(q, k[:, keys], v[:, keys], meta, kv_meta, MaskSpec(), part)
    np.testing.assert_allclose(part.out_BTNH, whole.out_BTNH, atol=1e-5)
    np.testing.assert_allclose(part.lse_BTN, whole.lse_BTN, atol=1e-5)


def test_rows_without_keys_are_zero_and_never_nan():
    rng = np.random.default_rng(2)
    q, k, v, d_out = arrays(rng, 1, 16, 16, 2, 1, 8)
    meta, elsewhere = packed_meta(rng, 1, 16, 1), packed_meta(rng, 1, 16, 1)
    elsewhere = TokenMeta(elsewhere.position_BT, elsewhere.segment_BT + 1)
    out, lse, *grads = results(REFERENCE, q, k, v, d_out, meta, elsewhere, MaskSpec())
    assert (np.asarray(out) == 0).all()
    assert (np.asarray(lse) == -np.inf).all()
    assert all((np.asarray(grad) == 0).all() for grad in grads)


def test_merge_does_not_overflow_and_knows_nothing_as_nothing():
    huge = Partial(jnp.full((1, 1, 1, 2), 3.0), jnp.full((1, 1, 1), 1000.0))
    tiny = Partial(jnp.full((1, 1, 1, 2), 7.0), jnp.full((1, 1, 1), -1000.0))
    nothing = Partial.empty((1, 1, 1, 2))
    assert np.asarray(merge(huge, tiny).out_BTNH).tolist() == [[[[3.0, 3.0]]]]
    assert np.asarray(merge(nothing, tiny).lse_BTN).tolist() == [[[-1000.0]]]
    both = merge(nothing, nothing)
    assert (np.asarray(both.out_BTNH) == 0).all() and (np.asarray(both.lse_BTN) == -np.inf).all()


def test_reference_gradients_are_those_of_autodiff():
    rng = np.random.default_rng(3)
    q, k, v, d_out = arrays(rng, 1, 12, 12, 4, 2, 8)
    meta = packed_meta(rng, 1, 12, 2)

    def total(q, k, v):
        return jnp.sum(reference.attend(q, k, v, meta, meta, MaskSpec()).out_BTNH * d_out)

    whole = reference.attend(q, k, v, meta, meta, MaskSpec())
    grads = reference.attend_bwd(q, k, v, whole.out_BTNH, whole.lse_BTN, d_out, meta, meta, MaskSpec())
    for got, want in zip(grads, jax.grad(total, (0, 1, 2))(q, k, v), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_blocks_nobody_sees_are_not_visited():
    length, chunk = 64, 8
    position = np.arange(length, dtype=np.int32)[None]
    one, four = np.ones((1, length), np.int32), np.repeat(np.arange(1, 5, dtype=np.int32), 16)[None]

    def visited(segment, mask):
        meta = TokenMeta(position, segment)
        return int(np.asarray(block_visibility(meta, meta, mask, chunk, chunk)[0]).sum())

    blocks = length // chunk
    assert visited(one, MaskSpec(causal=False)) == blocks**2
    assert visited(one, MaskSpec()) == blocks * (blocks + 1) // 2
    assert visited(one, MaskSpec(window=8)) == 2 * blocks - 1
    assert visited(four, MaskSpec()) == 4 * 3  # four documents of two blocks: three each
    assert visited(np.zeros_like(one), MaskSpec()) == 0


@pytest.mark.parametrize("mask", [MaskSpec(), MaskSpec(False), MaskSpec(window=7), MaskSpec(False, 9)], ids=str)
def test_in_one_text_no_block_is_visited_in_vain(mask):
    """Documents that end inside blocks: a block is visited if, and only if, it holds a visible pair."""
    for seed in range(20):
        meta = packed_meta(np.random.default_rng(seed), 1, 128, 1 + seed % 7, padding=seed)
        some, every = block_visibility(meta, meta, mask, 8, 16)
        seen = np.asarray(visible(meta, meta, mask)).reshape(16, 8, 8, 16)
        assert (some == seen.any((1, 3))).all()
        assert (every <= seen.all((1, 3))).all()


def examples(count: int) -> settings:
    """Without shrinking, which would compile for minutes."""
    return settings(max_examples=count, deadline=None, phases=[Phase.explicit, Phase.generate])


ANY_SHAPE = given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    documents=st.integers(1, 5),
    kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3]),
    chunks=st.tuples(st.integers(1, 48), st.integers(1, 48)),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 40),
)


def check_shape(seed, batch, length, documents, kv_heads, group, chunks, causal, window):
    rng = np.random.default_rng(seed)
    q, k, v, d_out = arrays(rng, batch, length, length, kv_heads * group, kv_heads, 4)
    meta = packed_meta(rng, batch, length, documents, padding=int(rng.integers(0, length)))
    args = (q, k, v, d_out, meta, meta, MaskSpec(causal, window))
    assert_close(results(blockwise.make_blockwise(*chunks), *args), results(REFERENCE, *args))


@examples(4)
@ANY_SHAPE
def test_any_shape(**drawn):
    check_shape(**drawn)


@pytest.mark.slow
@examples(16)
@ANY_SHAPE
def test_many_shapes(**drawn):
    check_shape(**drawn)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_accumulated_in_float32(dtype):
    """Blockwise rounds its probabilities to the inputs' dtype and nothing else; out, lse and gradients are float32."""
    rng = np.random.default_rng(4)
    q, k, v, d_out = arrays(rng, 1, 64, 64, 2, 2, 32, dtype)
    meta = packed_meta(rng, 1, 64, 2)
    got = results(blockwise.make_blockwise(16, 16), q, k, v, d_out, meta, meta, MaskSpec())
    assert all(array.dtype == jnp.float32 for array in got)
    assert_close(got, results(REFERENCE, q, k, v, d_out, meta, meta, MaskSpec()), tolerance=2e-2)
