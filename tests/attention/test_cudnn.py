"""Which hops go to cuDNN and what is made of its results, with a stand-in for it; and its calls compiled for GPUs."""

import logging
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from ringbpt.attention import api
from ringbpt.attention.core import Local, MaskSpec, Partial
from ringbpt.attention.local import cudnn, reference
from ringbpt.types import TokenMeta
from tests.attention import suite
from tests.attention.gpu_programs import train_like
from tests.attention.suite import REFERENCE, Case
from tests.planning.test_overlap import check as check_overlap
from tests.planning.test_overlap import compiler, program


def in_order(x) -> TokenMeta:
    position_BT = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
    return TokenMeta(position_BT, jnp.ones_like(position_BT))


def dense_forward(q, k, v, causal):
    part = reference.attend(q, k, v, in_order(q), in_order(k), MaskSpec(causal))
    return part.out_BTNH.astype(q.dtype), jnp.swapaxes(part.lse_BTN, 1, 2)


def dense_backward(q, k, v, out, lse_BNT, d_out, causal):
    lse = jnp.swapaxes(lse_BNT, 1, 2)
    grads = reference.attend_bwd(q, k, v, out, lse, d_out, in_order(q), in_order(k), MaskSpec(causal))
    return tuple(grad.astype(q.dtype) for grad in grads)


STAND_IN = cudnn.Binding(dense_forward, dense_backward)


def never(*args, **kwargs):
    """Not a number: whoever is handed this has come the wrong way."""
    if isinstance(args[-1], bool):  # a binding
        q, k, v, *rest = args
        grads = tuple(x * jnp.nan for x in (q, k, v))
        return grads if len(rest) > 1 else (q * jnp.nan, jnp.full((q.shape[0], q.shape[2], q.shape[1]), jnp.nan))
    q, k, v, *rest = args
    if rest:
        return tuple(x.astype(jnp.float32) * jnp.nan for x in (q, k, v))
    return Partial(q.astype(jnp.float32) * jnp.nan, q[..., 0].astype(jnp.float32) * jnp.nan)


NEVER = Local(never, never)
SMALL = Case("small", T=32, S=32, head_dim=16, heads=(2, 1), dtype="bfloat16")
DENSE = [
    *[replace(SMALL, hop=(layout, 2, q, k)) for layout in ("zigzag", "contiguous") for q in range(2) for k in range(2)],
    SMALL,
]
OTHER = [replace(SMALL, documents=3), replace(SMALL, padding=5), replace(SMALL, hop=("striped", 2, 0, 1))]


def check(local: Local, cases: list[Case], part: slice = slice(None)):
    """One program for all cases, of which `part` of the queries is taken; the keys of the carry are of no hop."""

    def results(local: Local, q, k, v, d_out, q_meta, kv_meta, carry, mask):
        part = local.attend(q, k, v, q_meta, kv_meta, mask, carry)
        whole = reference.attend(q, k, v, q_meta, kv_meta, mask, carry)
        grads = local.attend_bwd(q, k, v, whole.out_BTNH, whole.lse_BTN, d_out, q_meta, kv_meta, mask)
        return (part.out_BTNH, part.lse_BTN, *grads)

    compiled = jax.jit(partial(results, local, mask=cases[0].mask))
    for case in cases:
        q, k, v, d_out, q_meta, kv_meta = suite.inputs(case)
        q, d_out, q_meta = jax.tree.map(lambda x: x[:, part], (q, d_out, q_meta))
        carry = reference.attend(q, k[:, ::-1], v, in_order(q), in_order(k), MaskSpec(False))
        inputs = (q, k, v, d_out, q_meta, kv_meta, carry)
        suite.assert_close(compiled(*inputs), results(REFERENCE, *inputs, mask=case.mask), tolerance=2e-2)


def test_dense_hops_go_to_cudnn():
    check(cudnn.with_binding(STAND_IN, NEVER), DENSE)


@pytest.mark.slow
def test_without_a_mask_all_is_dense():
    check(cudnn.with_binding(STAND_IN, NEVER), [replace(SMALL, mask=MaskSpec(causal=False))])


def test_others_do_not():
    check(cudnn.with_binding(cudnn.Binding(never, never), REFERENCE), OTHER)


def test_a_case_that_goes_the_wrong_way_is_seen():
    with pytest.raises(AssertionError):
        check(cudnn.with_binding(STAND_IN, NEVER), OTHER[:1])


@pytest.mark.parametrize("part", [slice(0, 16), slice(16, 32)], ids=["first", "second"])
def test_half_of_the_queries(part):
    """As the ring's backward has them."""
    check(cudnn.with_binding(STAND_IN, NEVER), DENSE[:4], part)


def test_what_it_cannot_do_it_refuses_by_name(monkeypatch):
    meta = TokenMeta(np.zeros((1, 16), np.int32), np.ones((1, 16), np.int32))

    def attend(head_dim=16, dtype=jnp.bfloat16, mask=MaskSpec(), keys=16, meta=meta):
        x = jnp.ones((1, 16, 1, head_dim), dtype)
        cudnn.with_binding(STAND_IN, REFERENCE).attend(x, x[:, :keys], x[:, :keys], meta, meta, mask)

    with pytest.raises(NotImplementedError, match="not float32: use pallas_triton"):
        attend(dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match="not 256: use pallas_triton"):
        attend(head_dim=256)
    with pytest.raises(NotImplementedError, match="window by positions: use pallas_hopper"):
        attend(mask=MaskSpec(window=4))
    with pytest.raises(NotImplementedError, match="share their beginning: use pallas_hopper or pallas_triton"):
        attend(meta=replace(meta, last_BT=meta.segment_BT))
    with pytest.raises(NotImplementedError, match="not 16 x 12: use pallas_triton"):
        attend(keys=12)
    with pytest.raises(NotImplementedError, match="this is cpu: use blockwise"):
        cudnn.make_cudnn(jax.devices()[0], None, None)
    monkeypatch.setattr(fused_attention_stablehlo, "_dot_product_attention_bwd_impl", lambda query: query)
    with pytest.raises(NotImplementedError, match="binds cuDNN's attention otherwise: use pallas_hopper"):
        cudnn.jax_binding()


def test_auto_leaves_it_out_where_documents_share(monkeypatch, caplog):
    """And only there: one Local serves rows of either kind."""
    monkeypatch.setitem(api.LOCALS, "cudnn", lambda *args: cudnn.with_binding(STAND_IN, NEVER))
    monkeypatch.setitem(api.FASTEST, "cpu", ("cudnn", "blockwise"))
    api._log_once.cache_clear()
    auto = api.LOCALS["auto"](jax.devices()[0], None, None)
    x, place = jax.ShapeDtypeStruct((1, 16, 1, 16), jnp.bfloat16), jax.ShapeDtypeStruct((1, 16), jnp.int32)
    with caplog.at_level(logging.INFO, logger="ringbpt"):
        for last in (None, place, None):
            jax.eval_shape(lambda x, m: auto.attend(x, x, x, m, m, MaskSpec()), x, TokenMeta(place, place, last))
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "attend on cpu: cudnn" and len(said) == 2
    assert said[1].startswith("attend on cpu: blockwise; cudnn knows no documents that share their beginning")


def test_an_old_cudnn_is_refused(monkeypatch):
    monkeypatch.setattr("jax._src.lib.cuda_versions", SimpleNamespace(cudnn_get_version=lambda: 90001))
    with pytest.raises(NotImplementedError, match="cuDNN 90100 or later, not 90001: use pallas_triton"):
        cudnn._check_version()


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [("h200", 128), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("a100", 128), ("h200", 256)))],
)
def test_its_calls_compile(name, head_dim, tmp_path):
    machine = compiler(name)
    text = train_like(machine, cudnn.make_cudnn(machine.devices[0], None, None), head_dim, "bfloat16", dump=tmp_path)
    called = set(re.findall(r'custom_call_target="(__cudnn\$\w+)"', text.as_text()))
    assert called == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}


@pytest.mark.slow
def test_every_hop_hides_behind_its_calls():
    check_overlap(program("4xh200", local="cudnn"), 4)
