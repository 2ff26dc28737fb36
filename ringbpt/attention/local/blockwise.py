"""Attention block by block in plain XLA: any device, memory of one block, and no work for blocks nobody sees.

For each block of queries only the key blocks that hold something visible are visited; which ones is read off
the least and greatest position and segment of every block, so a causal mask, a window, packed documents,
padding and every layout are skipped by one mechanism. Ref: FlashAttention-2 (arXiv:2307.08691), BPT
(arXiv:2305.19370).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ringbpt.attention.core import Local, MaskSpec, Partial, block_visibility, merge, row_delta, visible
from ringbpt.attention.local.visits import block_lists
from ringbpt.types import TokenMeta


def make_blockwise(query_chunk_size: int, key_chunk_size: int, cpu: bool = True) -> Local:
    """Blocks of at most these sizes; any size works with any length, equal or dividing ones waste nothing.

    cpu: one key/value head after another and in less memory, by XLA for CPUs; other devices would stand idle, and
    what it takes would keep hops from hiding.
    """
    sizes: dict[str, Any] = {"query_chunk_size": query_chunk_size, "key_chunk_size": key_chunk_size}
    return Local(attend=partial(attend, **sizes, cpu=cpu), attend_bwd=partial(attend_bwd, **sizes, cpu=cpu))


def _pad(array: jax.Array, size: int) -> jax.Array:
    """Zeros up to a multiple of size along dim 1: for metas that is padding, seen by nobody."""
    rest = -array.shape[1] % size
    return jnp.pad(array, ((0, 0), (0, rest)) + ((0, 0),) * (array.ndim - 2)) if rest else array


def _slice(array: jax.Array, block: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(array, block * size, size, axis=1)


def _take(x_BTNx: jax.Array, block: jax.Array, size: int, group: jax.Array, heads: int) -> jax.Array:
    """Of this block of tokens, these heads."""
    starts = [jnp.int32(start) for start in (0, block * size, group * heads, 0)][: x_BTNx.ndim]
    return lax.dynamic_slice(x_BTNx, starts, (x_BTNx.shape[0], size, heads, *x_BTNx.shape[3:]))


def _put(x_BTNx: jax.Array, part: jax.Array, block: jax.Array, group: jax.Array) -> jax.Array:
    """Where _take took it."""
    starts = [jnp.int32(start) for start in (0, block * part.shape[1], group * part.shape[2], 0)][: x_BTNx.ndim]
    return lax.dynamic_update_slice(x_BTNx, part.astype(x_BTNx.dtype), starts)


def _group(x_BTNx: jax.Array, heads: int) -> jax.Array:
    """[B, T, N, ...] -> [B, K, G, T, ...]."""
    x_BTKGx = x_BTNx.reshape(*x_BTNx.shape[:2], heads, -1, *x_BTNx.shape[3:])
    return jnp.moveaxis(x_BTKGx, 1, 3)


def _ungroup(x_BKGTx: jax.Array) -> jax.Array:
    """The inverse of _group."""
    x_BTKGx = jnp.moveaxis(x_BKGTx, 3, 1)
    return x_BTKGx.reshape(*x_BTKGx.shape[:2], -1, *x_BTKGx.shape[4:])


def _zero(*given: jax.Array) -> jax.Array:
    """A float32 0 that is not there before what is given is.

    XLA for CPUs makes constants, and copies of what it is given, first of all: those of all hops, and keeps them.
    """
    number = sum(x[0, 0, 0, 0].astype(jnp.float32) for x in given)
    return jnp.where(jnp.isnan(number), number, 0)


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """In the operands' dtype, accumulated in float32; float32 operands are not rounded to fewer bits."""
    precision = "highest" if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def _scores_BKGTS(q_BKGTH, k_BKHS, q_meta, kv_meta, mask: MaskSpec | None) -> jax.Array:
    """Of a block, in float32; mask None: all of it is visible."""
    scale = q_BKGTH.shape[-1] ** -0.5
    if q_BKGTH.dtype == jnp.float32:  # a pass over the block less
        scores = _dot("BKGTH,BKHS->BKGTS", q_BKGTH * scale, k_BKHS)
    else:
        scores = _dot("BKGTH,BKHS->BKGTS", q_BKGTH, k_BKHS) * scale
    return scores if mask is None else jnp.where(visible(q_meta, kv_meta, mask)[:, None, None], scores, -jnp.inf)


def attend(
    q, k, v, q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec, carry: Partial | None = None,
    *, query_chunk_size: int, key_chunk_size: int, cpu: bool = True,
) -> Partial:  # fmt: skip
    """See core.Local; float32 accumulation, one [T block, S block] of scores alive at a time."""
    length, heads = q.shape[1], 1 if cpu else k.shape[2]
    groups, heads_q = k.shape[2] // heads, q.shape[2] // k.shape[2] * heads
    size_T, size_S = min(query_chunk_size, length), min(key_chunk_size, k.shape[1])
    carry = Partial.empty(q.shape) if carry is None else carry
    q, carry, q_meta = jax.tree.map(lambda x: _pad(x, size_T), (q, carry, q_meta))
    k, v, kv_meta = jax.tree.map(lambda x: _pad(x, size_S), (k, v, kv_meta))
    # As products want them, block by block, once and not in each block.
    blocks = (x.reshape(x.shape[0], -1, size_S, groups, heads, x.shape[3]) for x in (k, v))
    k_JgBKHS, v_JgBKSH = (jnp.moveaxis(x, (1, 3, 2), (0, 1, place)) for x, place in zip(blocks, (5, 4), strict=True))
    lists = block_lists(*block_visibility(q_meta, kv_meta, mask, size_T, size_S), full_first=True)

    def query_block(number, carry):
        i, group = number // groups, number % groups
        q_BKGTH = _group(_take(q, i, size_T, group, heads_q), heads)
        q_meta_i = jax.tree.map(lambda x: _slice(x, i, size_T), q_meta)

        def key_block(mask, step, state):
            out_BKGTH, max_BKGT, sum_BKGT = state
            j = lists.blocks[i, step]
            k_j, v_j = (x[j, group] for x in (k_JgBKHS, v_JgBKSH))
            kv_meta_j = jax.tree.map(lambda x: _slice(x, j, size_S), kv_meta)
            scores = _scores_BKGTS(q_BKGTH, k_j, q_meta_i, kv_meta_j, mask)
            new_max_BKGT = jnp.maximum(max_BKGT, jnp.max(scores, axis=-1))
            finite_BKGT = jnp.where(new_max_BKGT == -jnp.inf, 0.0, new_max_BKGT)
            p_BKGTS = jnp.exp(scores - finite_BKGT[..., None])
            decay_BKGT = jnp.exp(max_BKGT - finite_BKGT)
            out_BKGTH = out_BKGTH * decay_BKGT[..., None] + _dot("BKGTS,BKSH->BKGTH", p_BKGTS.astype(v.dtype), v_j)
            return out_BKGTH, new_max_BKGT, sum_BKGT * decay_BKGT + jnp.sum(p_BKGTS, axis=-1)

        # The carry is merged at the end: to begin with its lse as the maximum would leave no p that is exactly 1.
        none = Partial.empty(q_BKGTH.shape)
        state = (none.out_BTNH, none.lse_BTN, jnp.zeros(none.lse_BTN.shape, jnp.float32))
        full, total = lists.counts[i, 0], lists.counts[i, 1]
        state = lax.fori_loop(0, full, partial(key_block, None), state)
        out_BKGTH, max_BKGT, sum_BKGT = lax.fori_loop(full, total, partial(key_block, mask), state)
        empty_BKGT = sum_BKGT == 0
        out_BKGTH = out_BKGTH / jnp.where(empty_BKGT, 1.0, sum_BKGT)[..., None]
        lse_BKGT = jnp.where(empty_BKGT, -jnp.inf, max_BKGT + jnp.log(jnp.where(empty_BKGT, 1.0, sum_BKGT)))
        before = jax.tree.map(lambda x: _take(x, i, size_T, group, heads_q), carry)
        block = merge(before, Partial(_ungroup(out_BKGTH), _ungroup(lse_BKGT)))
        return jax.tree.map(lambda whole, part: _put(whole, part, i, group), carry, block)

    carry = lax.fori_loop(0, q.shape[1] // size_T * groups, query_block, carry)
    return jax.tree.map(lambda x: x[:, :length], carry)


def attend_bwd(
    q, k, v, out, lse, d_out, q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec,
    *, query_chunk_size: int, key_chunk_size: int, cpu: bool = True,
):  # fmt: skip
    """See core.Local; five products a block, dk and dv stay put while dq is visited."""
    length, length_S, heads = q.shape[1], k.shape[1], 1 if cpu else k.shape[2]
    groups, heads_q = k.shape[2] // heads, q.shape[2] // k.shape[2] * heads
    size_T, size_S = min(query_chunk_size, length), min(key_chunk_size, length_S)
    scale = q.shape[-1] ** -0.5
    delta = row_delta(out, d_out)
    # A row without keys must get p = exp(score - lse) = 0, not exp(+inf).
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    q, d_out, delta, lse, q_meta = jax.tree.map(
        lambda x: _pad(x, size_T), (q, d_out.astype(q.dtype), delta, lse, q_meta)
    )
    k, v, kv_meta = jax.tree.map(lambda x: _pad(x, size_S), (k, v, kv_meta))
    lists = block_lists(*block_visibility(q_meta, kv_meta, mask, size_T, size_S), by_key=True, full_first=True)
    # A division is what XLA for CPUs does once and not in each of its users, of which one turns what it reads: quick
    # from a block of one head, and slow from the whole array, where the next token is a page further.
    unit = (1 + _zero(q)).astype(q.dtype) if cpu else 1

    def key_block(number, grads):
        dq, dk, dv = grads
        j, group = number // groups, number % groups
        k_j, v_j = (_take(x, j, size_S, group, heads).astype(k.dtype) for x in ((dk, dv) if cpu else (k, v)))
        kv_meta_j = jax.tree.map(lambda x: _slice(x, j, size_S), kv_meta)
        k_BKHS, v_BKHS, k_BKSH = jnp.moveaxis(k_j, 1, 3), jnp.moveaxis(v_j, 1, 3), jnp.moveaxis(k_j, 1, 2)

        def query_block(mask, step, state):
            dq, dk_BKHS, dv_BKHS = state
            i = lists.blocks[j, step]
            rows = (_take(x, i, size_T, group, heads_q) for x in (q, d_out, delta, lse))
            q_i, d_out_i, delta_i, lse_i = (_group(x, heads) for x in rows)
            q_i, d_out_i = q_i / unit, d_out_i / unit
            q_meta_i = jax.tree.map(lambda x: _slice(x, i, size_T), q_meta)
            scores = _scores_BKGTS(q_i, k_BKHS, q_meta_i, kv_meta_j, mask)
            p_BKGTS = jnp.exp(scores - lse_i[..., None])
            dp_BKGTS = _dot("BKGTH,BKHS->BKGTS", d_out_i, v_BKHS)
            ds_BKGTS = (p_BKGTS * (dp_BKGTS - delta_i[..., None]) * scale).astype(q.dtype)
            dv_BKHS += _dot("BKGTH,BKGTS->BKHS", d_out_i, p_BKGTS.astype(q.dtype))
            dk_BKHS += _dot("BKGTH,BKGTS->BKHS", q_i, ds_BKGTS)
            dq_i = _ungroup(_dot("BKGTS,BKSH->BKGTH", ds_BKGTS, k_BKSH))
            return _put(dq, _take(dq, i, size_T, group, heads_q) + dq_i, i, group), dk_BKHS, dv_BKHS

        zeros = jnp.zeros(k_BKHS.shape, jnp.float32)
        full, total = lists.counts[j, 0], lists.counts[j, 1]
        state = lax.fori_loop(0, full, partial(query_block, None), (dq, zeros, zeros))
        dq, *turned = lax.fori_loop(full, total, partial(query_block, mask), state)
        dk_j, dv_j = (jnp.moveaxis(x, 3, 1) for x in turned)
        return dq, _put(dk, dk_j, j, group), _put(dv, dv_j, j, group)

    grads = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    if cpu:  # where the keys and values of a block stood, their gradients come to stand: two arrays less
        kept = (x.astype(jnp.float32) + _zero(d_out) for x in (k, v))
        grads = (jnp.full(q.shape, _zero(d_out, k)), *kept)
    dq, dk, dv = lax.fori_loop(0, k.shape[1] // size_S * groups, key_block, grads)
    return dq[:, :length], dk[:, :length_S], dv[:, :length_S]
