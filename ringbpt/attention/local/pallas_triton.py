"""Attention kernels in Pallas, compiled by Triton: any NVIDIA GPU from Ampere on, in bf16, f16 or f32.

A program computes one block of queries of one head (forward, dq) or one block of keys of one kv head with all its
query heads (dk and dv), and visits only the blocks that its list names; the mask is computed in those that are
visible in part. Softmax is taken in base 2. Seven products a pair of blocks in the backward: dq has a kernel of its
own, since sums across programs would differ from run to run.
Ref: FlashAttention-2, arXiv:2307.08691.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from ringbpt.attention.core import Local, MaskSpec, Partial, row_delta, row_visibility, visible
from ringbpt.attention.local import block_sizes
from ringbpt.attention.local.visits import block_lists
from ringbpt.hardware import cuda_capability
from ringbpt.types import TokenMeta

_LOG2E = math.log2(math.e)
_LEAST = 16  # the smallest side of a matrix product


@dataclass(frozen=True)
class Tile:
    """query and key: tokens a block has on each side. warps: that compute it. stages: blocks fetched ahead."""

    query: int
    key: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """One Tile a kernel, chosen by (bytes of a number, head dim up to)."""

    forward: Tile
    dq: Tile
    dkv: Tile


# Chosen so that no kernel spills registers on sm_80 or sm_90: tests/attention/test_pallas_triton.py compiles them.
# Not measured on a GPU yet.
_TILES = {
    (2, 64): Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
    (2, 128): Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
    (2, 256): Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
    (4, 64): Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)),
    (4, 128): Tiles(Tile(16, 16, 4, 2), Tile(16, 16, 4, 2), Tile(32, 32, 8, 2)),
}


@dataclass(frozen=True)
class _Options:
    """device_kind: whose block sizes. limits: the most tokens a block may have, queries and keys."""

    device_kind: str
    limits: tuple[int | None, int | None]
    interpret: bool


def make_pallas_triton(
    device: jax.Device, query_chunk_size: int | None, key_chunk_size: int | None, interpret: bool = False
) -> Local:
    """Blocks as block_sizes.json or else _TILES has them, of at most these sizes, in powers of two.

    interpret: on any device, slowly.

    Raises NotImplementedError for a device that is no NVIDIA GPU of compute capability 8.0 or later.
    """
    if not interpret and cuda_capability(device) < 8:
        raise NotImplementedError(
            f"pallas_triton runs on NVIDIA GPUs from compute capability 8.0 (Ampere) on, and this is "
            f"{device.device_kind}: use blockwise, or auto"
        )
    options = _Options(device.device_kind, (query_chunk_size, key_chunk_size), interpret)
    return Local(attend=partial(attend, options=options), attend_bwd=partial(attend_bwd, options=options))


def make_interpreted(device: jax.Device, query_chunk_size: int | None, key_chunk_size: int | None) -> Local:
    """pallas_triton on any device, in Pallas's interpreter: to check the kernels, not to train with."""
    return make_pallas_triton(device, query_chunk_size, key_chunk_size, interpret=True)


def _widest(dtype: jnp.dtype) -> int:
    """The most numbers that a head may have; 0 where the kernels do not take the dtype."""
    known = dtype in (jnp.bfloat16, jnp.float16, jnp.float32)
    return max(width for size, width in _TILES if size == dtype.itemsize) if known else 0


def or_blockwise(q: jax.Array, k: jax.Array) -> str:
    """What to use instead of a kernel for GPUs that cannot serve these: pallas_triton where it can, else blockwise."""
    return "pallas_triton" if q.dtype == k.dtype and q.shape[-1] <= _widest(q.dtype) else "blockwise"


def _tiles(q: jax.Array, k: jax.Array, options: _Options) -> Tiles:
    """The tiles for arrays of this kind: of half precision those of the table, where it has them.

    The table's backward sizes are dkv's; dq's are the other way round. Raises NotImplementedError where no kernel can
    serve them.
    """
    dtype, head_dim = q.dtype, q.shape[-1]
    if not _widest(dtype) or k.dtype != dtype:
        raise NotImplementedError(f"pallas_triton takes bf16, f16 or f32, all alike, not {dtype}: use blockwise")
    if head_dim > _widest(dtype):
        raise NotImplementedError(
            f"pallas_triton takes heads of at most {_widest(dtype)} in {dtype}, not {head_dim}: use blockwise"
        )
    found = _TILES[dtype.itemsize, min(width for size, width in _TILES if size == dtype.itemsize and head_dim <= width)]
    entry = block_sizes.entry("pallas_triton", options.device_kind, head_dim) if dtype.itemsize == 2 else None
    if entry:
        forward, backward = entry["forward"], entry["backward"]
        sizes = {"forward": forward, "dq": backward[::-1], "dkv": backward}
        found = Tiles(**{name: replace(getattr(found, name), query=t, key=s) for name, (t, s) in sizes.items()})

    def cut(size: int, limit: int | None, length: int) -> int:
        return max(_LEAST, min(size, 1 << (length - 1).bit_length(), 1 << ((limit or size).bit_length() - 1)))

    def cut_tile(tile: Tile) -> Tile:
        query = cut(tile.query, options.limits[0], q.shape[1])
        return Tile(query, cut(tile.key, options.limits[1], k.shape[1]), tile.warps, tile.stages)

    return Tiles(*map(cut_tile, (found.forward, found.dq, found.dkv)))


def _pad(x: jax.Array, size: int) -> jax.Array:
    """Zeros up to a multiple of size along dim 1 and, of heads, up to a power of two: zeros add nothing to a product.

    For metas zeros are padding, seen by nobody.
    """
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, -x.shape[1] % size)
    if x.ndim == 4:
        widths[3] = (0, max(_LEAST, 1 << (x.shape[3] - 1).bit_length()) - x.shape[3])
    return jnp.pad(x, widths) if any(right for _, right in widths) else x


def _dot(a: jax.Array, b: jax.Array, transpose: str = "") -> jax.Array:
    """a b, or a bᵀ; accumulated in float32, and float32 operands are not rounded to tf32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return pltriton.dot(a, b, trans_b=transpose == "b", precision=precision)


def _pallas_call(kernel, grid, inputs, outputs, tile: Tile, interpret: bool, aliases: dict[int, int]):
    """inputs: (array, spec) or trees of both, outputs: (shape, spec); all outputs are float32."""
    arrays, in_specs = zip(*inputs, strict=True)
    shapes, out_specs = zip(*outputs, strict=True)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        input_output_aliases=aliases,
        compiler_params=pltriton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="triton" + kernel.func.__name__,
    )(*arrays)


def _visit(list_refs, body, state, repeat: int = 1):
    """body(block, state, turn, masked) over the blocks of this program's row, those that need the mask first.

    All of them `repeat` times; turn tells which time it is.
    """
    blocks_ref, counts_ref = list_refs
    partly, total = counts_ref[0], counts_ref[1]

    def loop(first, count, masked, state):
        def step(i, state):
            turn = i // count if repeat > 1 else 0
            return body(blocks_ref[first + i - turn * count], state, turn, masked)

        return lax.fori_loop(0, repeat * count, step, state)

    return loop(partly, total - partly, False, loop(0, partly, True, state))


def _scores(a, b, scale: float, seen) -> jax.Array:
    """In base 2: exp2 of them, less the row's lse, are probabilities. seen: a mask, or None for all."""
    scores = _dot(a, b, "b") * (scale * _LOG2E)
    return scores if seen is None else jnp.where(seen, scores, -jnp.inf)


def _read(meta: TokenMeta, tokens=...) -> TokenMeta:
    """The places of these tokens, all if none are named."""
    return jax.tree.map(lambda ref: ref[tokens], meta)


def _seen(q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec) -> jax.Array:
    """core.visible for one block of queries and one of keys, without a batch."""
    q_meta, kv_meta = jax.tree.map(lambda x: x[None], (q_meta, kv_meta))
    return visible(q_meta, kv_meta, mask)[0]


def _forward(blocks, counts, q_meta, kv_meta, q, k, v, *rest, mask, scale, size_S):
    *carry, out, lse = rest
    q_TH, q_place = q[...], _read(q_meta)

    def body(j, state, _, masked):
        out_TH, max_T, sum_T = state
        keys = pl.ds(j * size_S, size_S)
        seen = _seen(q_place, _read(kv_meta, keys), mask) if masked else None
        scores = _scores(q_TH, k[keys, :], scale, seen)
        new_max_T = jnp.maximum(max_T, jnp.max(scores, axis=1))
        finite_T = jnp.where(new_max_T == -jnp.inf, 0.0, new_max_T) if masked else new_max_T
        p_TS, decay_T = jnp.exp2(scores - finite_T[:, None]), jnp.exp2(max_T - finite_T)
        out_TH = out_TH * decay_T[:, None] + _dot(p_TS.astype(q_TH.dtype), v[keys, :])
        return out_TH, new_max_T, sum_T * decay_T + jnp.sum(p_TS, axis=1)

    if carry:
        max_T = carry[1][...] * _LOG2E
        state = (carry[0][...], max_T, jnp.where(max_T == -jnp.inf, 0.0, 1.0))
    else:
        rows = q_TH.shape[:1]
        state = (jnp.zeros(q_TH.shape, jnp.float32), jnp.full(rows, -jnp.inf), jnp.zeros(rows, jnp.float32))
    out_TH, max_T, sum_T = _visit((blocks, counts), body, state)
    some_T = jnp.where(sum_T == 0, 1.0, sum_T)
    out[...] = out_TH / some_T[:, None]
    lse[...] = jnp.where(sum_T == 0, -jnp.inf, (max_T + jnp.log2(some_T)) / _LOG2E)


def _dq(blocks, counts, q_meta, kv_meta, q, k, v, d_out, lse, delta, dq, *, mask, scale, size_S):
    q_TH, d_out_TH, lse_T, delta_T = q[...], d_out[...], lse[...], delta[...]
    q_place = _read(q_meta)

    def body(j, dq_TH, _, masked):
        keys = pl.ds(j * size_S, size_S)
        k_SH = k[keys, :]
        seen = _seen(q_place, _read(kv_meta, keys), mask) if masked else None
        p_TS = jnp.exp2(_scores(q_TH, k_SH, scale, seen) - lse_T[:, None])
        ds_TS = p_TS * (_dot(d_out_TH, v[keys, :], "b") - delta_T[:, None])
        return dq_TH + _dot(ds_TS.astype(k_SH.dtype), k_SH)

    dq[...] = _visit((blocks, counts), body, jnp.zeros(q_TH.shape, jnp.float32)) * scale


def _dkv(blocks, counts, q_meta, kv_meta, q, k, v, d_out, lse, delta, dk, dv, *, mask, scale, size_T):
    k_SH, v_SH, kv_place = k[...], v[...], _read(kv_meta)

    def body(i, state, g, masked):
        dk_SH, dv_SH = state
        rows = pl.ds(i * size_T, size_T)
        q_TH, d_out_TH = q[rows, g, :], d_out[rows, g, :]
        # With keys in the rows, no product needs its left operand turned.
        seen = _seen(_read(q_meta, rows), kv_place, mask).T if masked else None
        p_ST = jnp.exp2(_scores(k_SH, q_TH, scale, seen) - lse[g, rows][None])
        dv_SH += _dot(p_ST.astype(q_TH.dtype), d_out_TH)
        ds_ST = p_ST * (_dot(v_SH, d_out_TH, "b") - delta[g, rows][None])
        return dk_SH + _dot(ds_ST.astype(q_TH.dtype), q_TH), dv_SH

    zeros = jnp.zeros(k_SH.shape, jnp.float32)
    dk_SH, dv_SH = _visit((blocks, counts), body, (zeros, zeros), repeat=q.shape[1])
    dk[...], dv[...] = dk_SH * scale, dv_SH


def _with_spec(meta: TokenMeta, spec: pl.BlockSpec) -> list[tuple]:
    """As an input of _pallas_call."""
    return [(meta, jax.tree.map(lambda _: spec, meta))]


def _by_query(q, k, q_meta, kv_meta, mask: MaskSpec, tile: Tile):
    """For kernels with one program a query head and block: the grid, what each reads first, and specs for the rest.

    Query heads of one kv head run side by side and share its keys; late blocks, long under a causal mask, start first.
    """
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    G, blocks = N // K, T // tile.query

    def spec(shape, place):
        """place: (b, i, query head, kv head) -> the block's indices."""
        return pl.BlockSpec(shape, lambda g, i, bk: place(bk // K, blocks - 1 - i, bk % K * G + g, bk % K))

    specs = {
        "BTNH": spec((None, tile.query, None, H), lambda b, i, n, h: (b, i, n, 0)),
        "BTN": spec((None, tile.query, None), lambda b, i, n, h: (b, i, n)),
        "BSKH": spec((None, S, None, H), lambda b, i, n, h: (b, 0, h, 0)),
    }
    lists = block_lists(*row_visibility(q_meta, kv_meta, mask, tile.query, tile.key))
    rows, keys = (spec((None, tile.query), lambda b, i, n, h: (b, i)), spec((None, S), lambda b, i, n, h: (b, 0)))
    inputs = [(x, spec((None, None, x.shape[2]), lambda b, i, n, h: (b, i, 0))) for x in (lists.blocks, lists.counts)]
    inputs += _with_spec(replace(q_meta, last_BT=None), rows) + _with_spec(kv_meta, keys)
    return (G, blocks, B * K), inputs, specs


def _by_key(q, k, q_meta, kv_meta, mask: MaskSpec, tile: Tile):
    """For kernels with one program a kv head and block of keys: the grid, what each reads first, specs for the rest."""
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    specs = {
        "BTNH": pl.BlockSpec((None, T, N // K, H), lambda j, h, b: (b, 0, h, 0)),
        "BNT": pl.BlockSpec((None, N // K, T), lambda j, h, b: (b, h, 0)),
        "BSKH": pl.BlockSpec((None, tile.key, None, H), lambda j, h, b: (b, j, h, 0)),
    }
    lists = block_lists(*row_visibility(q_meta, kv_meta, mask, tile.query, tile.key), by_key=True)
    rows, keys = (
        pl.BlockSpec((None, T), lambda j, h, b: (b, 0)),
        pl.BlockSpec((None, tile.key), lambda j, h, b: (b, j)),
    )
    inputs = [
        (x, pl.BlockSpec((None, None, x.shape[2]), lambda j, h, b: (b, j, 0))) for x in (lists.blocks, lists.counts)
    ]
    inputs += _with_spec(replace(q_meta, last_BT=None), rows) + _with_spec(kv_meta, keys)
    return (S // tile.key, K, B), inputs, specs


def attend(
    q, k, v, q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec, carry: Partial | None = None,
    *, options: _Options,
) -> Partial:  # fmt: skip
    """See core.Local; the carry is read by the kernel and nothing is merged outside it."""
    tile, (_, T, _, H) = _tiles(q, k, options).forward, q.shape
    scale = H**-0.5
    q, q_meta, carry = jax.tree.map(lambda x: _pad(x, tile.query), (q, q_meta, carry))
    k, v, kv_meta = jax.tree.map(lambda x: _pad(x, tile.key), (k, v, kv_meta))
    grid, inputs, specs = _by_query(q, k, q_meta, kv_meta, mask, tile)
    inputs += [(q, specs["BTNH"]), (k, specs["BSKH"]), (v, specs["BSKH"])]
    aliases = {}
    if carry is not None:
        before = len(jax.tree.leaves([array for array, _ in inputs]))
        aliases = {before: 0, before + 1: 1}  # the carry's memory takes the result
        inputs += [(carry.out_BTNH, specs["BTNH"]), (carry.lse_BTN, specs["BTN"])]
    outputs = [(q.shape, specs["BTNH"]), (q.shape[:-1], specs["BTN"])]
    kernel = partial(_forward, mask=mask, scale=scale, size_S=tile.key)
    out, lse = _pallas_call(kernel, grid, inputs, outputs, tile, options.interpret, aliases)
    return Partial(out[:, :T, :, :H], lse[:, :T])


def attend_bwd(
    q, k, v, out, lse, d_out, q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec,
    *, options: _Options,
):  # fmt: skip
    """See core.Local."""
    tiles, T, (_, S, _, H) = _tiles(q, k, options), q.shape[1], k.shape
    scale = H**-0.5
    delta = row_delta(out, d_out)
    # A row without keys must get p = exp2(score - lse) = 0, not exp2(+inf).
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * _LOG2E)
    size_T, size_S = max(tiles.dq.query, tiles.dkv.query), max(tiles.dq.key, tiles.dkv.key)
    q, d_out, lse, delta, q_meta = jax.tree.map(
        lambda x: _pad(x, size_T), (q, d_out.astype(q.dtype), lse, delta, q_meta)
    )
    k, v, kv_meta = jax.tree.map(lambda x: _pad(x, size_S), (k, v, kv_meta))

    grid, inputs, specs = _by_query(q, k, q_meta, kv_meta, mask, tiles.dq)
    inputs += [(q, specs["BTNH"]), (k, specs["BSKH"]), (v, specs["BSKH"]), (d_out, specs["BTNH"])]
    inputs += [(lse, specs["BTN"]), (delta, specs["BTN"])]
    kernel = partial(_dq, mask=mask, scale=scale, size_S=tiles.dq.key)
    (dq,) = _pallas_call(kernel, grid, inputs, [(q.shape, specs["BTNH"])], tiles.dq, options.interpret, {})

    grid, inputs, specs = _by_key(q, k, q_meta, kv_meta, mask, tiles.dkv)
    inputs += [(q, specs["BTNH"]), (k, specs["BSKH"]), (v, specs["BSKH"]), (d_out, specs["BTNH"])]
    # Read in every block here: heads first, so that a block's rows lie side by side.
    inputs += [(jnp.swapaxes(x, 1, 2), specs["BNT"]) for x in (lse, delta)]
    kernel = partial(_dkv, mask=mask, scale=scale, size_T=tiles.dkv.query)
    dk, dv = _pallas_call(kernel, grid, inputs, [(k.shape, specs["BSKH"])] * 2, tiles.dkv, options.interpret, {})
    return dq[:, :T, :, :H], dk[:, :S, :, :H], dv[:, :S, :, :H]
