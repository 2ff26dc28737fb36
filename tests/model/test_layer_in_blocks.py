"""Layers in blocks, a few kv heads at a time, against the same layers in pieces: losses and every gradient."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import pytest

from ringbpt.reduction import Reduction
from tests.model.helpers import assert_same, loss_and_grads, make_batch, make_model

# Everything that a layer of some family has, and two kv heads for each of tp=2.
FAMILY = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4, "qkv_bias": True, "qk_norm": True}


@cache
def in_pieces():
    model = make_model(**FAMILY)
    params = model.init(jax.random.key(0))
    moved = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(1), x.shape), params)
    return moved, loss_and_grads(model, moved, make_batch(model))


def check(mesh, at_a_time, **llama):
    params, want = in_pieces()
    model = make_model(mesh, kv_heads_at_a_time=at_a_time, **FAMILY | llama)
    params = jax.device_put(params, model.shardings)
    assert_same(loss_and_grads(model, params, make_batch(model)), want)


@pytest.mark.slow  # training/test_frontier.py trains with it in every test run
@pytest.mark.parametrize(
    ("mesh", "at_a_time", "llama"),
    [
        ((1, 2, 2, 2), 1, {"sequence_layout": "zigzag", "remat_block": "nothing_saveable", "residual_over_tp": True}),
        ((1, 1, 1, 1), 2, {"attention_type": "blockwise", "remat_block": "save_attention"}),
        ((2, 1, 1, 4), 4, {"sequence_layout": "striped", "scan_layers": False}),
        ((1, 1, 2, 4), 2, {"sequence_parallel": "all_gather", "heads_k_stride": 1}),
        ((1, 1, 1, 8), 1, {"ring_skip_hops": True, "ring_bidirectional": True, "remat_block": "nothing_saveable"}),
        ((1, 1, 4, 2), 1, {"scan_mlp": False, "residual_over_tp": True, "gathered_weights": "keep"}),
        ((1, 2, 1, 4), 2, {"gathered_weights": "keep", "remat_block": "nothing_saveable"}),
    ],
    ids=str,
)
def test_the_same_on_every_axis_and_with_every_strategy(mesh, at_a_time, llama):
    check(mesh, at_a_time, **llama)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "chunk", "weights"),
    [
        ((1, 2, 2, 2), None, "again"),
        ((1, 2, 1, 4), None, "again"),
        ((1, 2, 1, 4), None, "keep"),
        ((1, 2, 2, 2), 2, "again"),
    ],
    ids=str,
)
def test_the_same_where_sums_go_in_hops(mesh, chunk, weights, monkeypatch):
    """As on TPUs: of one chunk each gradient is summed behind its own product, of several the sum is. F of a device is
    wider than D without tp, and goes in parts, one of them wider than the other.
    """
    monkeypatch.setattr(Reduction, "on", lambda mesh, dtype=jnp.float32: Reduction(dtype, in_hops=True))
    check(mesh, 1, scan_mlp_chunk_size=chunk, remat_block="nothing_saveable", gathered_weights=weights)


@pytest.mark.slow
def test_what_documents_share_is_seen_by_each():
    whole, blocks = (
        make_model((1, 1, 1, 4), kv_heads_at_a_time=n, sequence_layout="zigzag", **FAMILY) for n in (None, 2)
    )
    params = whole.init(jax.random.key(0))
    want = loss_and_grads(whole, params, make_batch(whole, shared=True))
    assert_same(loss_and_grads(blocks, params, make_batch(blocks, shared=True)), want)
    assert abs(want[0] - loss_and_grads(whole, params, make_batch(whole))[0]) > 1e-3


def test_nothing_that_groups_of_heads_share_is_stored_ahead_of_them():
    """jax moves what is the same in every turn of a scan ahead of it, for all turns of the loops within: of 8 chunks
    the norm, as large as the layer's input, and of 3 hops what sees what, a square of blocks.
    """
    model = make_model((1, 1, 1, 4), kv_heads_at_a_time=2, scan_mlp_chunk_size=1, remat_block="save_attention")
    batch = make_batch(model)
    loss = jax.grad(lambda params: jnp.sum(model.token_stats(params, batch).logp_BT))
    text = jax.jit(loss).lower(model.abstract_params).as_text()
    written = re.findall(r"dynamic_update_slice.* -> tensor<(\d+)x(\d\S*)>", text)
    assert written and not [shape for shape in written if shape[0] in ("8", "3")]


def test_chunks_that_leave_tokens_over_are_refused():
    model = make_model(kv_heads_at_a_time=1, scan_mlp_chunk_size=5, **FAMILY)
    with pytest.raises(ValueError, match="chunks of 5 do not divide"):
        jax.eval_shape(model.token_stats, model.abstract_params, make_batch(model))
