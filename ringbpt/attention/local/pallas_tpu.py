"""Attention on TPUs, as Pallas kernels: one for the forward pass, one for all three gradients.

Everything inside stands transposed, tokens along the lanes: q, k, v, out and the gradients as [H, tokens], scores as
[S, T]. So a row's maximum, sum and lse are one number a lane (reduced over sublanes, stored without the 128-fold
copies that a column of lanes costs), and a head of 64 or 96 is not padded to 128.

The grid walks visits.visits, whose length is read at run time: blocks that nobody sees are no step of it. The
forward takes a carry (out, lse) in and hands it on in the same memory, so a ring merges nothing outside. The backward
walks the keys; dk and dv stay in VMEM over all queries and query heads of their block, dq is read, added to and
written by asynchronous copies that hide behind the four products in between: five products a visit.

Ref: FlashAttention-2 (arXiv:2307.08691), FlashAttention (arXiv:2205.14135, the merged carry).
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ringbpt.attention.core import Local, MaskSpec, Partial, join, row_delta, row_visibility, split
from ringbpt.attention.local import block_sizes
from ringbpt.attention.local.visits import FIRST, FLAG_BITS, LAST, MASKED, VISIBLE, visits
from ringbpt.types import TokenMeta

KERNEL = "pallas_tpu"  # its name in LOCALS and in block_sizes.json
LANES = 128
DEFAULT_BLOCK = (512, 512)  # of a TPU that the table doesn't know
# What a kernel may use of a core's vector memory, where the compiler's own limit (16 or 32 MiB) is far below it.
VMEM_MIB = {"v5e": 64, "v5p": 48, "v6e": 64}
# Over heads, then visits, then the query heads of a kv head: heads may go to both cores of a chip, dq may not.
FORWARD_SEMANTICS = ("parallel", "arbitrary")
BACKWARD_SEMANTICS = ("parallel", "arbitrary", "arbitrary")
PART = 256  # keys whose scores the forward computes at a time
LOG2_E = math.log2(math.e)
# What the list of visits may fill of a core's scalar memory (1 MiB on v4 and later).
MOST_VISITS = 96 * 1024

# "the first dims of both contracted", ...: a[i, m] b[i, n] -> [m, n].
TN, NN, NT = (((0,), (0,)), ((), ())), (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))


def _dot(a, b, dims):
    """Accumulated in float32; float32 operands are not rounded to fewer bits."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _column(row_1S, lanes: int):
    """[1, S] along the lanes -> [S, lanes], each number along its sublane."""
    block = jnp.broadcast_to(row_1S, (LANES, row_1S.shape[1])).T
    return jnp.tile(block, (1, lanes // LANES))


def _scores_ST(q_HT, k_HS, q_meta_2T, kv_meta_xS, mask: MaskSpec, masked: bool):
    """log2(e) * the scores, transposed; -inf where invisible, if `masked`.

    Metas are position and segment and, of keys, last, where there is one; keys have -1 for padding.
    """
    scores = _dot(k_HS, q_HT, TN) * (q_HT.shape[0] ** -0.5 * LOG2_E)
    if not masked:
        return scores
    shape_T = q_HT.shape[1]
    if kv_meta_xS.shape[0] == 2:
        seen = q_meta_2T[1:2] == _column(kv_meta_xS[1:2], shape_T)
    else:
        seen = _column(kv_meta_xS[1:2], shape_T) <= q_meta_2T[1:2]
        seen &= q_meta_2T[1:2] <= _column(kv_meta_xS[2:3], shape_T)
    distance = q_meta_2T[0:1] - _column(kv_meta_xS[0:1], shape_T)
    if mask.causal:
        seen &= distance >= 0
    if mask.window is not None:
        seen &= jnp.abs(distance) < mask.window
    return jnp.where(seen, scores, -jnp.inf)


def _on_visible(flags, body) -> None:
    """Runs body(masked) if the visit sees something, without the mask's arithmetic where all is seen."""
    for masked in (False, True):
        wanted = VISIBLE | (MASKED if masked else 0)
        pl.when((flags & (VISIBLE | MASKED)) == wanted)(partial(body, masked))


def _forward_kernel(row_ref, step_ref, q, k, v, q_meta, kv_meta, *refs, mask: MaskSpec):
    """refs: the carry's out and lse, if there is one; out, lse; the block's sum of p v, maximum and sum of p."""
    carry, (out, lse, acc_HT, max_1T, sum_1T) = refs[:-5], refs[-5:]
    flags = step_ref[pl.program_id(1)]

    @pl.when((flags & FIRST) != 0)
    def _():
        out_in, lse_in = (ref[...] for ref in carry) if carry else (jnp.zeros(out.shape), jnp.full(lse.shape, -jnp.inf))
        acc_HT[...] = out_in
        max_1T[...] = lse_in * LOG2_E
        sum_1T[...] = jnp.where(lse_in == -jnp.inf, 0.0, 1.0)

    def visit(masked: bool) -> None:
        # Part by part of the keys; the next part's scores stand before this one's softmax, so that the compiler keeps
        # the matrix units busy meanwhile.
        size = k.shape[1]
        part = PART if size % PART == 0 else LANES
        maximum, total, acc = max_1T[...], sum_1T[...], acc_HT[...]

        def scores_of(keys: slice):
            return _scores_ST(q[...], k[:, keys], q_meta[...], kv_meta[:, keys], mask, masked)

        parts = [slice(start, start + part) for start in range(0, size, part)]
        coming = scores_of(parts[0])
        for i, keys in enumerate(parts):
            scores = coming
            if i + 1 < len(parts):
                coming = scores_of(parts[i + 1])
            new_max = jnp.maximum(maximum, jnp.max(scores, axis=0, keepdims=True))
            finite = jnp.where(new_max == -jnp.inf, 0.0, new_max)
            p_ST, decay = jnp.exp2(scores - finite), jnp.exp2(maximum - finite)
            total = total * decay + jnp.sum(p_ST, axis=0, keepdims=True)
            acc = acc * decay + _dot(v[:, keys], p_ST.astype(v.dtype), NN)
            maximum = new_max
        max_1T[...], sum_1T[...], acc_HT[...] = maximum, total, acc

    _on_visible(flags, visit)

    @pl.when((flags & LAST) != 0)
    def _():
        empty_1T = sum_1T[...] == 0
        total_1T = jnp.where(empty_1T, 1.0, sum_1T[...])
        out[...] = acc_HT[...] / total_1T
        lse[...] = jnp.where(empty_1T, -jnp.inf, (max_1T[...] + jnp.log2(total_1T)) / LOG2_E)


def _was(writing, slot, at):
    """Is this the block of dq that was last written from this buffer?"""
    return (writing[slot, 1] == at[0]) & (writing[slot, 2] == at[1]) & (writing[slot, 3] == at[2])


def _backward_kernel(
    row_ref, step_ref, q, k, v, d_out, rows, q_meta, kv_meta, dq_zeros, dk, dv, dq, dq_2HT, reads, writes, writing,
    *, mask: MaskSpec, key_blocks: int,
):  # fmt: skip
    """rows: [2, T], log2(e) * lse (+inf: a row without keys) and delta. dq: whole, in HBM, added to block by block."""
    head, place, g = (pl.program_id(i) for i in range(3))
    groups = pl.num_programs(2)
    flags, i = step_ref[place] & (2**FLAG_BITS - 1), step_ref[place] >> FLAG_BITS
    scale = q.shape[0] ** -0.5
    at = (lax.div(row_ref[place], key_blocks), head * groups + g, i)  # the block of dq: row, head, block of queries
    turn = place * groups + g
    slot, other = turn & 1, 1 - (turn & 1)

    def copy(slot, at, write: bool):
        size = dq_2HT.shape[2]
        there, here = dq.at[at[0], at[1], :, pl.ds(pl.multiple_of(at[2] * size, LANES), size)], dq_2HT.at[slot]
        args = (here, there, writes.at[slot]) if write else (there, here, reads.at[slot])
        return pltpu.make_async_copy(*args)

    def wait_for_write(slot) -> None:
        @pl.when(writing[slot, 0] != 0)
        def _():
            copy(slot, at, write=True).wait()
            writing[slot, 0] = 0

    @pl.when(turn == 0)
    def _():
        writing[0, 0] = 0
        writing[1, 0] = 0

    @pl.when(((flags & FIRST) != 0) & (g == 0))
    def _():
        dk[...] = jnp.zeros(dk.shape, dk.dtype)
        dv[...] = jnp.zeros(dv.shape, dv.dtype)

    @pl.when((flags & VISIBLE) != 0)
    def _():
        wait_for_write(slot)  # the buffer is free, and all blocks but the other buffer's are where they belong
        pl.when(_was(writing, other, at))(partial(wait_for_write, other))
        copy(slot, at, write=False).start()

    def visit(masked: bool) -> None:
        scores = _scores_ST(q[...], k[...], q_meta[...], kv_meta[...], mask, masked)
        dp_ST = _dot(v[...], d_out[...], TN)  # before p, so that the matrix units have it to do meanwhile
        p_ST = jnp.exp2(scores - rows[0:1])
        dv[...] += _dot(d_out[...], p_ST.astype(d_out.dtype), NT)
        ds_ST = (p_ST * (dp_ST - rows[1:2])).astype(q.dtype)
        dk[...] += _dot(q[...], ds_ST, NT) * scale
        dq_HT = _dot(k[...], ds_ST, NN) * scale
        copy(slot, at, write=False).wait()
        dq_2HT[slot] += dq_HT

    _on_visible(flags, visit)

    @pl.when((flags & VISIBLE) != 0)
    def _():
        copy(slot, at, write=True).start()
        for n, value in enumerate((1, *at)):
            writing[slot, n] = value

    @pl.when(turn == pl.num_programs(1) * groups - 1)
    def _():
        wait_for_write(slot)
        wait_for_write(other)


def _to_lanes(x_BTNH: jax.Array, length: int) -> jax.Array:
    """[B, T, N, H] -> [B, N, H, T padded with zeros to `length`]."""
    return _pad(x_BTNH.transpose(0, 2, 3, 1), length)


def _from_lanes(x_BNHT: jax.Array, length: int) -> jax.Array:
    return x_BNHT[..., :length].transpose(0, 3, 1, 2)


def _pad(x: jax.Array, length: int) -> jax.Array:
    rest = length - x.shape[-1]
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, rest),)) if rest else x


def _block(length: int, most: int) -> tuple[int, int]:
    """(block, padded length): the fewest blocks of at most `most`, a multiple of 128, as even as that allows."""
    count = -(-length // max(most // LANES * LANES, LANES))
    block = -(-length // (count * LANES)) * LANES
    return block, block * count


def _blocks(q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec, sizes: tuple[int, int]):
    """((T block, T padded), (S block, S padded), metas as int32 [B, 2 or 3, tokens], (some, every))."""
    t, s = (_block(meta.position_BT.shape[1], size) for meta, size in zip((q_meta, kv_meta), sizes, strict=True))
    q_meta, kv_meta = (
        jax.tree.map(lambda x, length=length: _pad(x, length), meta)
        for meta, length in ((q_meta, t[1]), (kv_meta, s[1]))
    )
    documents = [x for x in (kv_meta.segment_BT, kv_meta.last_BT) if x is not None]
    metas = (
        jnp.stack([q_meta.position_BT, q_meta.segment_BT], axis=1),
        jnp.stack([kv_meta.position_BT, *(jnp.where(x == 0, -1, x) for x in documents)], axis=1),
    )
    return t, s, metas, row_visibility(q_meta, kv_meta, mask, t[0], s[0])


def _pieces(rows: int, cut: tuple[int, int], other: tuple[int, int]) -> int:
    """Into how many equal pieces one side's tokens are cut, for the list of possible visits of each to fit the scalar
    memory. cut, other: (tokens, the most of a block), of that side and of the other.

    Raises NotImplementedError where no number of pieces divides the tokens.
    """
    (tokens, most), count = cut, rows * _blocks_of(*other)
    for pieces in range(1, max(tokens // LANES, 1) + 1):
        if tokens % pieces == 0 and count * _blocks_of(tokens // pieces, most) <= MOST_VISITS:
            return pieces
    raise NotImplementedError(
        f"pallas_tpu keeps its list of {count * _blocks_of(*cut)} possible visits in scalar memory, which holds "
        f"{MOST_VISITS}, and cuts {tokens} tokens into no equal pieces of fewer: use larger blocks, or blockwise"
    )


def _blocks_of(length: int, most: int) -> int:
    block, padded = _block(length, most)
    return padded // block


@dataclass(frozen=True)
class _Options:
    """hardware: the table's name of the device. limits: the user's chunk sizes, (queries, keys)."""

    hardware: str
    limits: tuple[int | None, int | None]
    interpret: Any

    def sizes(self, q: jax.Array, direction: str) -> tuple[int, int]:
        t, s = block_sizes.sizes(KERNEL, self.hardware, q.shape[3], direction, DEFAULT_BLOCK)
        return block_sizes.at_most(t, self.limits[0]), block_sizes.at_most(s, self.limits[1])

    def call(self, semantics: tuple[str, ...], cost: pl.CostEstimate) -> dict[str, Any]:
        limit = VMEM_MIB.get(self.hardware)
        params = pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=limit * 2**20 if limit else None)
        return {"compiler_params": params, "interpret": self.interpret, "cost_estimate": cost}


def _cost(q: jax.Array, k: jax.Array, mask: MaskSpec, products: int, arrays: list[Any]) -> pl.CostEstimate:
    """For the compiler's schedule, which asks before it knows the positions: half the pairs where causal.

    arrays: all that are read or written.
    """
    pairs = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1] // (2 if mask.causal else 1)
    return pl.CostEstimate(
        flops=2 * products * pairs * q.shape[3],
        transcendentals=pairs,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
    )


def _check(q: jax.Array) -> None:
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"pallas_tpu computes in float32 or bfloat16, not {q.dtype}: use blockwise")
    least = 32 // q.dtype.itemsize
    if q.shape[3] % least:
        raise NotImplementedError(
            f"pallas_tpu takes heads of a multiple of {least} numbers in {q.dtype}, not of {q.shape[3]}: use blockwise"
        )


def attend(
    q, k, v, q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec, carry: Partial | None = None,
    *, options: _Options,
) -> Partial:  # fmt: skip
    """See core.Local. Raises NotImplementedError for other dtypes than float32 and bfloat16.

    Where the list of visits would not fit the scalar memory, a piece of the queries after the other.
    """
    _check(q)
    length, (_, _, heads, head_dim), group = q.shape[1], q.shape, q.shape[2] // k.shape[2]
    sizes = options.sizes(q, "forward")
    if (pieces := _pieces(q.shape[0], (length, sizes[0]), (k.shape[1], sizes[1]))) > 1:
        places = jax.tree.map(jnp.asarray, kv_meta)
        own = jax.tree.map(lambda x: split(jnp.asarray(x), pieces, 1), (q, q_meta, carry))
        parts = lax.map(lambda own: attend(own[0], k, v, own[1], places, mask, own[2], options=options), own)
        return jax.tree.map(partial(join, dim=1), parts)
    (block_T, length_T), (block_S, length_S), metas, (some, every) = _blocks(q_meta, kv_meta, mask, sizes)
    todo, blocks_T = visits(some, every), length_T // block_T
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    carried: list[jax.Array] = []
    if carry is not None:
        lse_BN1T = _pad(carry.lse_BTN.transpose(0, 2, 1)[:, :, None], length_T)
        carried = [_to_lanes(carry.out_BTNH, length_T), lse_BN1T]

    def q_map(n, s, row, step):
        return lax.div(row[s], blocks_T), n, 0, lax.rem(row[s], blocks_T)

    def kv_map(n, s, row, step):
        return lax.div(row[s], blocks_T), lax.div(n, group), 0, step[s] >> FLAG_BITS

    q_block, row_block = (pl.BlockSpec((None, None, size, block_T), q_map) for size in (head_dim, 1))
    kv_block = pl.BlockSpec((None, None, head_dim, block_S), kv_map)
    inputs = [*(_to_lanes(x, n) for x, n in ((q, length_T), (k, length_S), (v, length_S))), *metas, *carried]
    shapes = [jax.ShapeDtypeStruct((q.shape[0], heads, size, length_T), jnp.float32) for size in (head_dim, 1)]
    out, lse = pl.pallas_call(
        partial(_forward_kernel, mask=mask),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(heads, todo.count),
            in_specs=[
                q_block,
                kv_block,
                kv_block,
                _meta_block(metas[0], block_T, q_map),
                _meta_block(metas[1], block_S, kv_map),
                *[q_block, row_block][: len(carried)],
            ],
            out_specs=[q_block, row_block],
            scratch_shapes=[pltpu.VMEM((size, block_T), jnp.float32) for size in (head_dim, 1, 1)],
        ),
        out_shape=shapes,
        input_output_aliases={7 + i: i for i in range(len(carried))},
        name="ringbpt_attend",
        **options.call(FORWARD_SEMANTICS, _cost(q, k, mask, 2, [*inputs, *shapes])),
    )(todo.row, todo.step, *inputs)
    return Partial(_from_lanes(out, length), lse[:, :, 0, :length].transpose(0, 2, 1))


def _meta_block(meta: jax.Array, size: int, index_map) -> pl.BlockSpec:
    def without_heads(*args):
        b, _, _, i = index_map(*args)
        return b, 0, i

    return pl.BlockSpec((None, meta.shape[1], size), without_heads)


def attend_bwd(
    q, k, v, out, lse, d_out, q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec,
    *, options: _Options,
):  # fmt: skip
    """See core.Local; where the list of visits would not fit, a piece of the keys after the other."""
    _check(q)
    length, length_kv = q.shape[1], k.shape[1]
    (batch, _, heads, head_dim), kv_heads = q.shape, k.shape[2]
    group = heads // kv_heads
    sizes = options.sizes(q, "backward")
    if (pieces := _pieces(batch, (length_kv, sizes[1]), (length, sizes[0]))) > 1:
        places = jax.tree.map(jnp.asarray, q_meta)

        def piece(dq, keys):
            k, v, kv_meta = keys
            more, dk, dv = attend_bwd(q, k, v, out, lse, d_out, places, kv_meta, mask, options=options)
            return dq + more, (dk, dv)

        keys = jax.tree.map(lambda x: split(jnp.asarray(x), pieces, 1), (k, v, kv_meta))
        dq, grads = lax.scan(piece, jnp.zeros(q.shape, jnp.float32), keys)
        return dq, *(join(grad, 1) for grad in grads)
    (block_T, length_T), (block_S, length_S), metas, (some, every) = _blocks(q_meta, kv_meta, mask, sizes)
    todo, blocks_S = visits(some.swapaxes(1, 2), every.swapaxes(1, 2)), length_S // block_S
    # A row without keys must get p = exp(score - lse) = 0, not exp(+inf).
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2_E)
    rows_BN2T = _pad(jnp.stack([lse, row_delta(out, d_out)], axis=-1).transpose(0, 2, 3, 1), length_T)
    k, v, d_out = (x.astype(q.dtype) for x in (k, v, d_out))

    def q_map(h, s, g, row, step):
        return lax.div(row[s], blocks_S), h * group + g, 0, step[s] >> FLAG_BITS

    def kv_map(h, s, g, row, step):
        return lax.div(row[s], blocks_S), h, 0, lax.rem(row[s], blocks_S)

    q_block, row_block = (pl.BlockSpec((None, None, size, block_T), q_map) for size in (head_dim, 2))
    kv_block = pl.BlockSpec((None, None, head_dim, block_S), kv_map)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    dq_shape, kv_shape = (
        jax.ShapeDtypeStruct((batch, n, head_dim, size), jnp.float32)
        for n, size in ((heads, length_T), (kv_heads, length_S))
    )
    tensors = ((q, length_T), (k, length_S), (v, length_S), (d_out, length_T))
    inputs = [*(_to_lanes(x, n) for x, n in tensors), rows_BN2T, *metas, jnp.zeros(dq_shape.shape, jnp.float32)]
    dk, dv, dq = pl.pallas_call(
        partial(_backward_kernel, mask=mask, key_blocks=blocks_S),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(kv_heads, todo.count, group),
            in_specs=[
                q_block,
                kv_block,
                kv_block,
                q_block,
                row_block,
                _meta_block(metas[0], block_T, q_map),
                _meta_block(metas[1], block_S, kv_map),
                whole,
            ],
            out_specs=[kv_block, kv_block, whole],
            scratch_shapes=[
                pltpu.VMEM((2, head_dim, block_T), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((2, 4), jnp.int32),
            ],
        ),
        out_shape=[kv_shape, kv_shape, dq_shape],
        input_output_aliases={9: 2},
        name="ringbpt_attend_bwd",
        **options.call(BACKWARD_SEMANTICS, _cost(q, k, mask, 5, [*inputs, kv_shape, kv_shape, dq_shape])),
    )(todo.row, todo.step, *inputs)
    return _from_lanes(dq, length), _from_lanes(dk, length_kv), _from_lanes(dv, length_kv)


def make_pallas_tpu(
    device: jax.Device, query_chunk_size: int | None, key_chunk_size: int | None, interpret: Any = False
) -> Local:
    """Blocks as block_sizes.json has them, of at most the given sizes, in multiples of 128.

    interpret: pltpu.InterpretParams() runs the kernels on a CPU, slowly. Raises NotImplementedError for a device that
    is no TPU of v4 or later.
    """
    kind = block_sizes.row_name(device.device_kind)
    if not interpret and (device.platform != "tpu" or kind in ("v2", "v3")):
        raise NotImplementedError(
            f"pallas_tpu runs on TPUs from v4 on, and this is {device.device_kind}: use blockwise, or auto"
        )
    options = _Options(kind, (query_chunk_size, key_chunk_size), interpret)
    return Local(attend=partial(attend, options=options), attend_bwd=partial(attend_bwd, options=options))


def make_interpreted(device: jax.Device, query_chunk_size: int | None, key_chunk_size: int | None) -> Local:
    """pallas_tpu on any device, in Pallas's TPU interpreter: to check the kernels, not to train with."""
    return make_pallas_tpu(device, query_chunk_size, key_chunk_size, interpret=pltpu.InterpretParams())
