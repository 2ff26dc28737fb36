"""The model: what its flags promise not to change, what it may see, and where its parts live."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ringbpt.config import UserError, choices
from ringbpt.dims import WEIGHT_AXES, spec
from ringbpt.model.llama import REMAT_POLICIES
from tests.model.helpers import CHEAP, assert_same, loss_and_grads, make_batch, make_model

PLAIN = {"attention_type": "standard", "scan_layers": False, "scan_mlp": False, "loss_chunk_size": 1000}


@pytest.fixture(scope="module")
def plain():
    model = make_model(**PLAIN)
    params = model.init(jax.random.key(0))
    return jax.tree.map(np.asarray, params), loss_and_grads(model, params, make_batch(model))


# Each of these changes how the numbers are computed and none of them what they are.
SAME = {
    "scanned": {},
    "blockwise": {"attention_type": "blockwise", "scan_layers": False},
    "remat block": {"remat_block": "nothing_saveable"},
    "remat parts": {"remat_attention": "dots_saveable", "remat_mlp": "nothing_saveable", "scan_mlp": False},
    "save_attention": {"remat_block": "save_attention", "scan_layers": False},
    "kept weights": {"gathered_weights": "keep", "remat_block": "nothing_saveable"},
    "one chunk": {"scan_mlp_chunk_size": 1000, "scan_query_chunk_size": 1000},
}


@pytest.mark.parametrize(
    "llama", [pytest.param(SAME[n], id=n, marks=[pytest.mark.slow] * (n in ("remat parts", "blockwise"))) for n in SAME]
)
def test_these_flags_change_nothing(plain, llama):
    params, want = plain
    model = make_model(**llama)
    assert_same(loss_and_grads(model, params, make_batch(model)), want)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["pallas_tpu_interpreted", "pallas_triton_interpreted"])
def test_no_kernel_changes_anything(plain, kernel):
    params, want = plain
    model = make_model((1, 1, 1, 2), attention_kernel=kernel)
    assert_same(loss_and_grads(model, params, make_batch(model)), want)


def test_a_kernel_that_cannot_is_refused_before_anything_compiles():
    with pytest.raises(UserError, match=r"^--llama.attention_kernel=pallas_tpu: .* this is cpu: use blockwise"):
        make_model(attention_kernel="pallas_tpu").check_kernel(32)
    with pytest.raises(UserError, match=r"^--llama.attention_kernel=pallas_tpu_interpreted: .* float16: use blockwise"):
        make_model(attention_kernel="pallas_tpu_interpreted", dtype="fp16").check_kernel(32)


@pytest.mark.parametrize(
    ("mesh", "layout"),
    [
        ((1, 1, 1, 8), "zigzag"),
        ((2, 1, 2, 2), "striped"),
        pytest.param((1, 2, 2, 1), "contiguous", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_no_mesh_changes_anything(plain, mesh, layout):
    params, want = plain
    model = make_model(mesh, sequence_layout=layout)
    params = jax.device_put(params, model.shardings)
    assert_same(loss_and_grads(model, params, make_batch(model)), want)


def test_init_is_sharded_and_the_same_on_every_mesh(plain):
    model = make_model((1, 2, 2, 2))
    params = model.init(jax.random.key(0))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(plain[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    w_q = params["layers"]["w_q"]
    assert w_q.sharding.spec == P(None, ("fsdp", "sp"), "tp", None)
    assert w_q.addressable_shards[0].data.shape == (2, 8, 2, 8)


def test_param_scan_axis_moves_the_layers():
    moved, first = make_model(param_scan_axis=1, **CHEAP), make_model(**CHEAP)
    params = first.init(jax.random.key(0))
    other = {**params, "layers": jax.tree.map(lambda w: jnp.moveaxis(w, 0, 1), params["layers"])}
    shapes = jax.tree.map(lambda x: x.shape, moved.abstract_params)
    assert shapes == jax.tree.map(lambda x: x.shape, other)
    a, b = (loss_and_grads(m, p, make_batch(m))[0] for m, p in ((moved, other), (first, params)))
    assert a == pytest.approx(b, rel=1e-6)


def test_tied_embeddings_share_one_table():
    model = make_model(tie_word_embeddings=True, **CHEAP)
    params = model.init(jax.random.key(0))
    assert "unembed" not in params
    untied = make_model(**CHEAP)
    batch = make_batch(model)
    loss, grads = loss_and_grads(model, params, batch)
    want, want_grads = loss_and_grads(untied, {**params, "unembed": params["embed"].T}, batch)
    assert loss == pytest.approx(want, rel=1e-6)
    np.testing.assert_allclose(grads["embed"], want_grads["embed"] + want_grads["unembed"].T, atol=1e-5)


def test_nothing_is_seen_ahead_or_across_documents():
    """Causality and packing through gradients: which inputs the hidden state of one place depends on."""
    model = make_model((1, 1, 1, 2), sequence_layout="contiguous")
    params = model.init(jax.random.key(0))
    batch = make_batch(model, rows=1)

    def hidden_at(delta_TD, place):
        # A disturbance of the embeddings, place by place, added through the table of a token per place.
        table = params["embed"].at[jnp.arange(32)].add(delta_TD)
        own = jnp.arange(32, dtype=jnp.int32)[None]
        return jnp.sum(model.hidden({**params, "embed": table}, own, batch.meta)[0, place])

    grad_at = jax.jit(jax.grad(hidden_at))
    for place, seen in ((10, range(11)), (19, range(20)), (20, [20]), (25, range(20, 26))):
        grads = grad_at(jnp.zeros((32, 32)), place)
        assert np.flatnonzero(np.abs(np.asarray(grads)).max(axis=1)).tolist() == list(seen)


def test_bf16_is_the_compute_dtype_and_gradients_stay_float32():
    model = make_model(dtype="bf16", **CHEAP)
    params = model.init(jax.random.key(0))
    batch = make_batch(model)
    assert jax.eval_shape(model.hidden, params, batch.token_BT, batch.meta).dtype == jnp.bfloat16
    loss, grads = loss_and_grads(model, params, batch)
    exact, _ = loss_and_grads(make_model(**CHEAP), params, batch)
    assert loss == pytest.approx(exact, rel=2e-2)
    assert all(g.dtype == np.float32 for g in jax.tree.leaves(grads))


def test_policies_are_those_the_flags_allow():
    assert set(REMAT_POLICIES) == set(choices("llama.remat_block")) - {""}


def test_spec_refuses_an_axis_twice():
    assert spec("D N H", WEIGHT_AXES) == P(("fsdp", "sp"), "tp", None)
    with pytest.raises(ValueError, match="used twice"):
        spec("N F", WEIGHT_AXES)


def test_a_ring_of_one_sends_in_no_direction():
    """--llama.ring_bidirectional on one device was a traceback when the step compiled."""
    model = make_model(attention_type="blockwise", ring_bidirectional=True)
    assert not model.attention.bidirectional and model.attention.strategy == "none"
    assert make_model((1, 1, 1, 2), ring_bidirectional=True).attention.bidirectional
