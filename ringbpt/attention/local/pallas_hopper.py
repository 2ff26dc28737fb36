"""Attention kernels for Hopper GPUs (H100, H200) in Mosaic GPU, bf16: wgmma, TMA and a warp-specialised pipeline.

In a block of threads one warpgroup fetches, block by block as its list names them, and two compute: each on half
of the block's queries going forward, on half of its keys going back. Forward, the two take turns: while one
exponentiates, the other has the tensor cores. Backward there is one kernel with five products a pair of blocks; dk and
dv stay in registers over all queries and query heads of a kv head, and dq is summed in device memory by the copy
engine, in an order, and so with roundings of float32, that can differ from run to run. dk and dv of heads of 256 are
too wide for the registers of a warpgroup: there each takes half of the head dim and all of the block's keys, and both
compute the scores.
Ref: FlashAttention-3, arXiv:2407.08608.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ringbpt.attention.core import Local, MaskSpec, Partial, row_delta, row_visibility
from ringbpt.attention.local.pallas_triton import or_blockwise
from ringbpt.attention.local.visits import block_lists
from ringbpt.hardware import cuda_capability
from ringbpt.types import TokenMeta

_LOG2E = math.log2(math.e)
_ROWS, _COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)  # one number a row, a column
_COMPUTE, _FETCH = (0, 1), 2  # warpgroups
_WARPGROUP = 64  # rows of a product
_NO_INDEX: Any = ((),) if "idx" in signature(plgpu.load).parameters else ()  # until jax 0.11 a load wants an index


@dataclass(frozen=True)
class Tile:
    """query, key: tokens of a block. stages: blocks fetched ahead; backward: of q, and of d_out where that is 0."""

    query: int
    key: int
    stages: int
    d_out_stages: int = 0


@dataclass(frozen=True)
class _Unit:
    """What jax 0.10's interpreter has no word for: register layouts, transposed operands, operands in registers.

    So there the products are jnp.dot; the copies, the barriers and everything else are the kernel's own.
    """

    interpret: bool

    def load(self, ref, layout) -> jax.Array:
        """From device or shared memory into registers."""
        return ref[...] if self.interpret else plgpu.load(ref, *_NO_INDEX, layout=layout, optimized=False)

    def later(self, along, ref, layout, shape):
        """A function that loads `ref` and broadcasts it."""
        return lambda: along(self.load(ref, layout), shape)

    def full(self, shape: tuple[int, ...], value: float, layout) -> jax.Array:
        array = jnp.full(shape, value, jnp.float32)
        return array if self.interpret else plgpu.layout_cast(array, layout)

    def products(self, *pairs, meanwhile=lambda: None) -> list[jax.Array]:
        """a b of each pair in shared memory; `meanwhile` is called when they are under way."""
        if self.interpret:
            meanwhile()
            return [_wide(a) @ _wide(b) for a, b in pairs]

        def multiply(*acc_refs):
            for acc_ref, (a, b) in zip(acc_refs, pairs, strict=True):
                plgpu.wgmma(acc_ref, _operand(a), _operand(b))
            meanwhile()
            return [acc_ref[...] for acc_ref in acc_refs]

        return pl.run_scoped(multiply, *[plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32) for a, b in pairs])

    def add_products(self, *triples) -> list[jax.Array]:
        """acc + a b of each: acc in registers, b in shared memory, a in either."""
        if self.interpret:
            return [acc + _wide(a) @ _wide(b) for acc, a, b in triples]

        def multiply(acc_refs):
            for acc_ref, (_, a, b) in zip(acc_refs, triples, strict=True):
                plgpu.wgmma(acc_ref, _operand(a), _operand(b))

        return pl.run_state(multiply)([plgpu.ACC.init(acc) for acc, _, _ in triples])

    def add_to(self, device_ref, shared_ref) -> None:
        """device += shared, by the copy engine; to be awaited."""
        if self.interpret:
            device_ref[...] = device_ref[...] + shared_ref[...]
        else:
            plgpu.copy_smem_to_gmem(shared_ref, device_ref, reduction_op="add")


@dataclass(frozen=True)
class _Turned:
    """A matrix in shared memory, to be read as its transpose."""

    ref: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.ref.shape[::-1]


def _operand(x):
    return x.ref.transpose((1, 0)) if isinstance(x, _Turned) else x


def _wide(x) -> jax.Array:
    """The values of an operand, for the interpreter."""
    return (x.ref[...].T if isinstance(x, _Turned) else x[...]).astype(jnp.float32)


def _along_rows(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [0])


def _along_columns(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [1])


def _masked(scores, of_queries, of_keys, mask: MaskSpec) -> jax.Array:
    """-inf where core.visible is false; of_queries and of_keys are TokenMetas of functions.

    They are called one after the other: all at once they would be fetched into too many registers.
    """
    segment = of_queries.segment_BT()
    if of_keys.last_BT is None:
        scores = jnp.where((segment == of_keys.segment_BT()) & (segment != 0), scores, -jnp.inf)
    else:
        scores = jnp.where((of_keys.segment_BT() <= segment) & (segment != 0), scores, -jnp.inf)
        scores = jnp.where(segment <= of_keys.last_BT(), scores, -jnp.inf)
    if not mask.causal and mask.window is None:
        return scores
    scores = lax.optimization_barrier(scores)
    ahead = of_queries.position_BT() - of_keys.position_BT()
    if mask.causal:
        scores = jnp.where(ahead >= 0, scores, -jnp.inf)
    if mask.window is not None:
        scores = jnp.where(ahead < mask.window, scores, -jnp.inf)
        if not mask.causal:
            scores = jnp.where(ahead > -mask.window, scores, -jnp.inf)
    return lax.optimization_barrier(scores)


def _drain(visits, stages, *barriers) -> None:
    """Waits until the last `stages` visits are done with what was fetched for them: no barrier ends half observed."""

    @pl.loop(jnp.maximum(visits - stages, 0), visits)
    def _(n):
        for barrier in barriers:
            plgpu.barrier_wait(barrier.at[lax.rem(n, stages)])


def _visit(counts_ref, row, step, state):
    """step(i, state, masked) for the visits of a row: those that need the mask come first."""
    partly, total = counts_ref[(*row, 0)], counts_ref[(*row, 1)]
    state = lax.fori_loop(0, partly, partial(step, masked=True), state)
    return lax.fori_loop(partly, total, partial(step, masked=False), state)


def _forward(
    q, k, v, q_meta, kv_meta, lists, *rest,
    mask: MaskSpec, scale: float, tile: Tile, unit: _Unit, kv_heads: int, has_carry: bool,
):  # fmt: skip
    carry, (out, lse), scratch = rest[: 2 * has_carry], rest[2 * has_carry :][:2], rest[2 * has_carry + 2 :]
    q_smem, k_smem, v_smem, q_ready, k_ready, v_ready, k_free, v_free, turn = scratch
    wg, i, bk, g = (lax.axis_index(name) for name in ("wg", "i", "bk", "g"))
    blocks, counts = lists.blocks, lists.counts
    i = blocks.shape[1] - 1 - i  # the long rows of a causal mask first
    b, kv_head = lax.div(bk, jnp.int32(kv_heads)), lax.rem(bk, jnp.int32(kv_heads))
    head = kv_head * (q.shape[2] // kv_heads) + g
    H = q.shape[3]
    stages = jnp.int32(tile.stages)

    def take_turns():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    @pl.when(wg == _FETCH)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, counts[b, i, 1])
        def _(step):
            slot = lax.rem(step, stages)
            keys = (b, pl.ds(blocks[b, i, step] * tile.key, tile.key), kv_head)
            for ref, smem, ready, free in ((k, k_smem, k_ready, k_free), (v, v_smem, v_ready, v_free)):
                pl.when(step >= stages)(partial(plgpu.barrier_wait, free.at[slot]))
                plgpu.copy_gmem_to_smem(ref.at[keys], smem.at[slot], ready.at[slot])

        _drain(counts[b, i, 1], stages, k_free, v_free)

    @pl.when(wg != _FETCH)
    def _():
        plgpu.set_max_registers(232, action="increase")
        rows = pl.ds(i * (2 * _WARPGROUP) + wg * _WARPGROUP, _WARPGROUP)
        plgpu.copy_gmem_to_smem(q.at[b, rows, head], q_smem.at[wg], q_ready.at[wg])
        plgpu.barrier_wait(q_ready.at[wg])
        shape = (_WARPGROUP, tile.key)

        def step(n, state, masked):
            acc, top, total = state
            slot = lax.rem(n, stages)
            plgpu.barrier_wait(k_ready.at[slot])

            (scores,) = unit.products((q_smem.at[wg], _Turned(k_smem.at[slot])), meanwhile=take_turns)
            plgpu.barrier_arrive(k_free.at[slot])
            if masked:
                keys = pl.ds(blocks[b, i, n] * tile.key, tile.key)
                of_queries = jax.tree.map(lambda x: unit.later(_along_rows, x.at[b, rows], _ROWS, shape), q_meta)
                of_keys = jax.tree.map(lambda x: unit.later(_along_columns, x.at[b, keys], _COLUMNS, shape), kv_meta)
                scores = _masked(scores, of_queries, of_keys, mask)
            new_top = jnp.maximum(top, jnp.max(scores, axis=1) * (scale * _LOG2E))
            finite = jnp.where(new_top == -jnp.inf, 0.0, new_top) if masked else new_top
            decay = jnp.exp2(top - finite)
            p = jnp.exp2(scores * (scale * _LOG2E) - _along_rows(finite, shape))
            total = total * decay + jnp.sum(p, axis=1)
            acc *= _along_rows(decay, acc.shape)
            p = p.astype(q.dtype)
            if not unit.interpret:  # or the compiler would move work across the turn
                acc, total, new_top, p = lax.optimization_barrier((acc, total, new_top, p))
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_ready.at[slot])
            plgpu.barrier_wait(turn)
            (acc,) = unit.add_products((acc, p, v_smem.at[slot]))
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, new_top, total

        if has_carry:
            top = unit.load(carry[1].at[b, head, rows], _ROWS) * _LOG2E
            acc = unit.load(carry[0].at[b, rows, head], plgpu.Layout.WGMMA)
            total = jnp.where(top == -jnp.inf, 0.0, 1.0)
        else:
            top = unit.full((_WARPGROUP,), -jnp.inf, _ROWS)
            acc, total = unit.full((_WARPGROUP, H), 0.0, plgpu.Layout.WGMMA), unit.full((_WARPGROUP,), 0.0, _ROWS)
        pl.when(wg == 1)(take_turns)  # it starts half a step later
        acc, top, total = _visit(counts, (b, i), step, (acc, top, total))
        pl.when(wg == 0)(take_turns)
        some = jnp.where(total == 0.0, 1.0, total)
        out[b, rows, head] = acc * _along_rows(1.0 / some, acc.shape)
        lse[b, head, rows] = jnp.where(total == 0.0, -jnp.inf, top / _LOG2E + jnp.log(some))


def _backward(
    q, k, v, d_out, lse, delta, q_meta, kv_meta, lists, dq, dk, dv,
    q_smem, k_smem, v_smem, d_out_smem, lse_smem, delta_smem, ds_smem, dq_smem,
    kv_ready, q_ready, d_out_ready, q_free, d_out_free, both,
    *, mask: MaskSpec, scale: float, tile: Tile, unit: _Unit,
):  # fmt: skip
    wg, b, kv_head, j = (lax.axis_index(name) for name in ("wg", "b", "h", "j"))
    G, H = q.shape[2] // k.shape[2], q.shape[3]
    stages, d_out_stages = jnp.int32(tile.stages), jnp.int32(tile.d_out_stages or tile.stages)
    blocks, counts = lists.blocks, lists.counts
    partly, total = counts[b, j, 0], counts[b, j, 1]

    def place(n):
        """The n-th visit: its query head, its number among the head's, and its first row."""
        g = lax.div(n, total)
        n -= g * total
        return kv_head * G + g, n, blocks[b, j, n] * tile.query

    @pl.when(wg == _FETCH)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        keys = (b, pl.ds(j * tile.key, tile.key), kv_head)
        plgpu.copy_gmem_to_smem(k.at[keys], k_smem, kv_ready)
        plgpu.copy_gmem_to_smem(v.at[keys], v_smem, kv_ready)

        @pl.loop(0, G * total)
        def _(n):
            head, _, start = place(n)
            rows = pl.ds(start, tile.query)
            for of_rows, matrix, of_row, number, ready, free, ahead in (
                (q, q_smem, lse, lse_smem, q_ready, q_free, stages),
                (d_out, d_out_smem, delta, delta_smem, d_out_ready, d_out_free, d_out_stages),
            ):
                slot = lax.rem(n, ahead)
                pl.when(n >= ahead)(partial(plgpu.barrier_wait, free.at[slot]))
                plgpu.copy_gmem_to_smem(of_rows.at[b, rows, head], matrix.at[slot], ready.at[slot])
                plgpu.copy_gmem_to_smem(of_row.at[b, head, rows], number.at[slot], ready.at[slot])

        _drain(G * total, stages, q_free)
        _drain(G * total, d_out_stages, d_out_free)

    @pl.when(wg != _FETCH)
    def _():
        plgpu.set_max_registers(240, action="increase")
        wide, halved = H > 2 * _WARPGROUP, H >= 2 * _WARPGROUP
        part = jnp.int32(0) if wide else wg  # of the block's keys, this warpgroup's
        keys = pl.ds(j * tile.key + part * _WARPGROUP, _WARPGROUP)
        shape = (_WARPGROUP, tile.query)  # scores stand with keys in the rows, so that no operand need be turned
        width = H // 2 if halved else H
        own = pl.ds(wg * width, width) if wide else slice(None)  # of dk and dv
        plgpu.barrier_wait(kv_ready)

        def add_dq(ds_ref, head, start):
            for column in range(0, width, _WARPGROUP):
                columns = pl.ds(wg * width + column, _WARPGROUP) if halved else slice(None)
                (dq_TH,) = unit.products((_Turned(ds_ref), k_smem.at[:, columns]))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the copy engine has read the last one
                dq_smem[wg] = dq_TH * scale
                plgpu.commit_smem()
                unit.add_to(dq.at[b, pl.ds(start, tile.query), head, columns], dq_smem.at[wg])

        def step(n, state):
            dk_SH, dv_SH = state
            slot, d_out_slot = lax.rem(n, stages), lax.rem(n, d_out_stages)
            head, visit, start = place(n)
            # Of the block's scores' gradients: both warpgroups' together, or each its own.
            ds_ref = ds_smem.at[wg if wide else slot]
            # Half of the block's keys, by a sum that holds a zero of this visit: were it the same in every visit, the
            # addresses of all products' operands would be computed ahead of the loop and not fit the registers.
            mine = pl.ds((part + lax.shift_right_logical(start, 31)) * _WARPGROUP, _WARPGROUP)
            plgpu.barrier_wait(q_ready.at[slot])
            (scores,) = unit.products((k_smem.at[mine], _Turned(q_smem.at[slot])))

            def with_mask(scores):
                rows = pl.ds(start, tile.query)
                of_queries = jax.tree.map(lambda x: unit.later(_along_columns, x.at[b, rows], _COLUMNS, shape), q_meta)
                # Nor would the addresses of three arrays of the keys fit, were they the same in every visit.
                places = keys if kv_meta.last_BT is None else pl.ds(j * tile.key + mine.start, _WARPGROUP)
                of_keys = jax.tree.map(lambda x: unit.later(_along_rows, x.at[b, places], _ROWS, shape), kv_meta)
                return _masked(scores, of_queries, of_keys, mask)

            # One loop and a branch: two loops would not fit the registers.
            scores = lax.cond(visit < partly, with_mask, lambda scores: scores, scores)
            p = jnp.exp2(scores * (scale * _LOG2E) - _along_columns(unit.load(lse_smem.at[slot], _COLUMNS), shape))
            plgpu.barrier_wait(d_out_ready.at[d_out_slot])
            less_delta = _along_columns(unit.load(delta_smem.at[d_out_slot], _COLUMNS), shape)
            (dp,) = unit.add_products((less_delta, v_smem.at[mine], _Turned(d_out_smem.at[d_out_slot])))
            ds_ref[mine] = (p * dp).astype(q.dtype)
            plgpu.commit_smem()
            if not wide:  # of two buffers or more for ds: who writes one again has met the other here once in between
                plgpu.barrier_arrive(both)
            dv_SH, dk_SH = unit.add_products(
                (dv_SH, p.astype(q.dtype), d_out_smem.at[d_out_slot, :, own]),
                (dk_SH, ds_ref.at[mine], q_smem.at[slot, :, own]),
            )
            plgpu.barrier_arrive(d_out_free.at[d_out_slot])
            plgpu.barrier_arrive(q_free.at[slot])
            if not wide:
                plgpu.barrier_wait(both)
            # Each takes half of the head dim; where that is too narrow for a product, every other visit.
            if halved:
                add_dq(ds_ref, head, start)
            else:
                pl.when(lax.rem(n, jnp.int32(2)) == wg)(partial(add_dq, ds_ref, head, start))
            return dk_SH, dv_SH

        zeros = unit.full((_WARPGROUP, width if wide else H), 0.0, plgpu.Layout.WGMMA)
        dk_SH, dv_SH = lax.fori_loop(0, G * total, step, (zeros, zeros))
        dk[b, keys, kv_head, own] = dk_SH * scale
        dv[b, keys, kv_head, own] = dv_SH
        plgpu.wait_smem_to_gmem(0)


# By head dim. What an H200 makes of 64 and 128: docs/benchmarks.md. Other tiles have not been tried there, and 256 has
# been compiled and interpreted only.
_FORWARD = {64: Tile(128, 128, 3), 128: Tile(128, 128, 2), 256: Tile(128, 64, 2)}
_BACKWARD = {64: Tile(64, 128, 2), 128: Tile(64, 128, 2), 256: Tile(64, 64, 2, d_out_stages=1)}


def _width(H: int) -> int:
    """The least of the tables' head dims that holds one of H."""
    return next(width for width in _FORWARD if width >= H)


def make_pallas_hopper(
    device: jax.Device, query_chunk_size: int | None, key_chunk_size: int | None, interpret: bool = False
) -> Local:
    """The kernels; their blocks are fixed by what the tensor cores take. interpret: on any device, very slowly.

    Raises NotImplementedError for a device that is no Hopper GPU, and for blocks that must be smaller.
    """
    if not interpret and cuda_capability(device) != 9:
        other = "pallas_triton" if device.platform == "gpu" else "blockwise"
        raise NotImplementedError(
            f"pallas_hopper runs on Hopper GPUs (H100, H200), and this is {device.device_kind}: use {other}, or auto"
        )
    if min(query_chunk_size or 128, key_chunk_size or 128) < 128:
        raise NotImplementedError(
            f"pallas_hopper computes in blocks of 128 tokens, not {query_chunk_size} x {key_chunk_size}: "
            "use pallas_triton, or auto"
        )
    unit = _Unit(interpret)
    return Local(attend=partial(attend, unit=unit), attend_bwd=partial(attend_bwd, unit=unit))


def make_interpreted(device: jax.Device, query_chunk_size: int | None, key_chunk_size: int | None) -> Local:
    """pallas_hopper on any device, in Mosaic GPU's interpreter: to check the kernels, not to train with."""
    return make_pallas_hopper(device, query_chunk_size, key_chunk_size, interpret=True)


def _smem(*shape: int):
    """bf16 in shared memory, as wgmma wants it."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def _check(q, k) -> None:
    if q.dtype != jnp.bfloat16 or k.dtype != jnp.bfloat16:
        raise NotImplementedError(f"pallas_hopper takes bfloat16, not {q.dtype}: use {or_blockwise(q, k)}, or auto")
    if q.shape[3] > max(_FORWARD):
        raise NotImplementedError(
            f"pallas_hopper takes heads of at most {max(_FORWARD)}, not {q.shape[3]}: use {or_blockwise(q, k)}, or auto"
        )


def _pad(x: jax.Array, size: int) -> jax.Array:
    """Zeros up to a multiple of size along dim 1 and, of heads, up to 64, 128 or 256: they add nothing to a product."""
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, -x.shape[1] % size)
    if x.ndim == 4:
        widths[3] = (0, _width(x.shape[3]) - x.shape[3])
    return jnp.pad(x, widths) if any(right for _, right in widths) else x


def _interpret_params(unit: _Unit) -> Any:
    if not unit.interpret:
        return None
    try:
        from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
    except ImportError:  # jax 0.10 has it, without a public name
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
    return InterpretGPUParams()


def attend(
    q, k, v, q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec, carry: Partial | None = None, *, unit: _Unit
) -> Partial:
    """See core.Local; the carry is read by the kernel and nothing is merged outside it."""
    _check(q, k)
    _, T, _, H = q.shape
    scale = H**-0.5
    tile = _FORWARD[_width(H)]
    q, q_meta, carry = jax.tree.map(lambda x: _pad(x, tile.query), (q, q_meta, carry))
    k, v, kv_meta = jax.tree.map(lambda x: _pad(x, tile.key), (k, v, kv_meta))
    (B, padded_T, N, padded_H), K = q.shape, k.shape[2]
    lists = block_lists(*row_visibility(q_meta, kv_meta, mask, tile.query, tile.key))
    inputs = [q, k, v, replace(q_meta, last_BT=None), kv_meta, lists]
    if carry is not None:
        inputs += [carry.out_BTNH, jnp.swapaxes(carry.lse_BTN, 1, 2)]
    barriers = (plgpu.Barrier(num_barriers=2), *[plgpu.Barrier(num_barriers=tile.stages)] * 2)
    free = plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages)
    kernel = partial(_forward, mask=mask, scale=scale, tile=tile, unit=unit, kv_heads=K, has_carry=carry is not None)
    scratch = [
        _smem(2, _WARPGROUP, padded_H), *[_smem(tile.stages, tile.key, padded_H)] * 2,
        *barriers, free, free, plgpu.Barrier(num_arrivals=2),
    ]  # fmt: skip
    grid = {"bk": B * K, "i": padded_T // tile.query, "g": N // K}  # heads that share keys run side by side
    out, lse = _call(kernel, "hopper_forward", grid, scratch, [q.shape, (B, N, padded_T)], inputs, unit)
    return Partial(out[:, :T, :, :H], jnp.swapaxes(lse, 1, 2)[:, :T])


def _call(body, name: str, grid: dict[str, int], scratch, outputs, inputs, unit: _Unit):
    """The kernel over a grid of blocks of three warpgroups, the grid's last dim the quickest.

    What plgpu.kernel does, but for its batching rule, which keeps it from taking a Ref that is added to.
    """
    mesh = plgpu.Mesh(
        grid=tuple(grid.values()), grid_names=tuple(grid), num_threads=3, thread_name="wg", kernel_name=name
    )

    def scoped(*refs):
        pl.run_scoped(partial(body, *refs), *scratch, collective_axes="wg")

    return pl.kernel(
        scoped,
        out_type=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in outputs],
        mesh=mesh,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=_interpret_params(unit),
        name=name,
    )(*inputs)


def attend_bwd(
    q, k, v, out, lse, d_out, q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec, *, unit: _Unit
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See core.Local."""
    _check(q, k)
    T, (_, S, _, H) = q.shape[1], k.shape
    scale = H**-0.5
    tile = _BACKWARD[_width(H)]
    delta = -row_delta(out, d_out)  # to be added
    # A row without keys must get p = exp2(score - lse) = 0, not exp2(+inf).
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * _LOG2E)
    q, d_out, lse, delta, q_meta = jax.tree.map(
        lambda x: _pad(x, tile.query), (q, d_out.astype(q.dtype), lse, delta, q_meta)
    )
    k, v, kv_meta = jax.tree.map(lambda x: _pad(x, tile.key), (k, v, kv_meta))
    (B, padded_S, K, padded_H), stages, late = k.shape, tile.stages, tile.d_out_stages or tile.stages
    lists = block_lists(*row_visibility(q_meta, kv_meta, mask, tile.query, tile.key), by_key=True)
    dq = jax.new_ref(jnp.zeros(q.shape, jnp.float32), memory_space=plgpu.GMEM)
    in_float32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
    rows = [plgpu.SMEM((ahead, tile.query), jnp.float32) for ahead in (stages, late)]
    ready = [plgpu.Barrier(num_arrivals=2, num_barriers=ahead) for ahead in (stages, late)]
    kernel = partial(_backward, mask=mask, scale=scale, tile=tile, unit=unit)
    scratch = [
        _smem(stages, tile.query, padded_H), *[_smem(tile.key, padded_H)] * 2, _smem(late, tile.query, padded_H),
        *rows, _smem(max(2, stages), tile.key, tile.query),  # a buffer a visit, or a warpgroup
        plgpu.SMEM((2, _WARPGROUP, _WARPGROUP), jnp.float32, transforms=in_float32),
        plgpu.Barrier(num_arrivals=2), *ready, *ready, plgpu.Barrier(num_arrivals=2),
    ]  # fmt: skip
    inputs = [q, k, v, d_out, *(jnp.swapaxes(x, 1, 2) for x in (lse, delta))]
    inputs += [replace(q_meta, last_BT=None), kv_meta, lists, dq]
    grid = {"b": B, "h": K, "j": padded_S // tile.key}
    dk, dv = _call(kernel, "hopper_backward", grid, scratch, [k.shape, k.shape], inputs, unit)
    return dq[...][:, :T, :, :H], dk[:, :S, :, :H], dv[:, :S, :, :H]
