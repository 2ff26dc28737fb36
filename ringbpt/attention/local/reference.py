"""Dense attention in float32 (float64 if asked): slow, short, and the truth that everything else is held to."""

import jax
import jax.numpy as jnp

from ringbpt.attention.core import MaskSpec, Partial, merge, row_delta, visible
from ringbpt.types import TokenMeta


def _scores_BKGTS(q, k, q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec) -> jax.Array:
    q_BTKGH = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k, precision="highest") * q.shape[-1] ** -0.5
    return jnp.where(visible(q_meta, kv_meta, mask)[:, None, None], scores_BKGTS, -jnp.inf)


def _wide(*arrays: jax.Array) -> list[jax.Array]:
    return [array.astype(jnp.promote_types(array.dtype, jnp.float32)) for array in arrays]


def attend(q, k, v, q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec, carry: Partial | None = None) -> Partial:
    """softmax(q k^T / sqrt(H)) v over the visible keys; shapes as in core.Local."""
    q, k, v = _wide(q, k, v)
    scores_BKGTS = _scores_BKGTS(q, k, q_meta, kv_meta, mask)
    lse_BKGT = jax.nn.logsumexp(scores_BKGTS, axis=-1)
    p_BKGTS = jnp.exp(scores_BKGTS - jnp.where(lse_BKGT == -jnp.inf, 0.0, lse_BKGT)[..., None])
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", p_BKGTS, v, precision="highest")
    part = Partial(out_BTKGH.reshape(q.shape), jnp.moveaxis(lse_BKGT, 3, 1).reshape(q.shape[:-1]))
    return part if carry is None else merge(carry, part)


def attend_bwd(q, k, v, out, lse, d_out, q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec):
    """Gradients towards these keys and values and, as far as these keys go, towards q; all float32."""
    q, k, v, d_out = _wide(q, k, v, d_out)
    grouped = (*q.shape[:2], k.shape[2], -1)
    lse_BKGT, delta_BKGT = (jnp.moveaxis(x.reshape(grouped), 1, 3) for x in (lse, row_delta(out, d_out)))
    d_out_BTKGH, q_BTKGH = (x.reshape(*grouped, q.shape[-1]) for x in (d_out, q))
    scores_BKGTS = _scores_BKGTS(q, k, q_meta, kv_meta, mask)
    p_BKGTS = jnp.exp(scores_BKGTS - jnp.where(lse_BKGT == -jnp.inf, 0.0, lse_BKGT)[..., None])
    dp_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", d_out_BTKGH, v, precision="highest")
    ds_BKGTS = p_BKGTS * (dp_BKGTS - delta_BKGT[..., None]) * q.shape[-1] ** -0.5
    dq = jnp.einsum("BKGTS,BSKH->BTKGH", ds_BKGTS, k, precision="highest").reshape(q.shape)
    dk = jnp.einsum("BKGTS,BTKGH->BSKH", ds_BKGTS, q_BTKGH, precision="highest")
    dv = jnp.einsum("BKGTS,BTKGH->BSKH", p_BKGTS, d_out_BTKGH, precision="highest")
    return dq, dk, dv
