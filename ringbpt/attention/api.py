"""The one way into attention, for our model and for anybody's: global arrays in, global arrays out."""

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from ringbpt.attention.core import Local, MaskSpec
from ringbpt.attention.local import blockwise, reference
from ringbpt.attention.parallel import ring
from ringbpt.dims import ACTIVATION_AXES, spec
from ringbpt.types import TokenMeta

# Names under which a remat policy can keep the forward's result, so that the backward never runs the ring again.
SAVED_NAMES = ("attention_out", "attention_lse")


def _make_local(name: str, query_chunk_size: int, key_chunk_size: int) -> Local:
    if name == "reference":
        return Local(reference.attend, reference.attend_bwd)
    if name == "blockwise":
        return blockwise.make_blockwise(query_chunk_size, key_chunk_size)
    raise ValueError(f"local attention {name!r} is none of reference, blockwise")


def _local_forward(local, axis, q, k, v, q_meta, kv_meta, mask):
    return local.attend(q, k, v, q_meta, kv_meta, mask)


def _local_backward(local, axis, q, k, v, out, lse, d_out, q_meta, kv_meta, mask):
    return local.attend_bwd(q, k, v, out, lse, d_out, q_meta, kv_meta, mask)


# How the devices' shares meet over sp: (forward, backward), both inside one shard_map.
STRATEGIES = {"none": (_local_forward, _local_backward), "ring": (ring.forward, ring.backward)}


def make_attention(
    mesh: Mesh,
    *,
    strategy: str = "ring",
    local: str = "blockwise",
    mask: MaskSpec = MaskSpec(),
    query_chunk_size: int = 1024,
    key_chunk_size: int = 1024,
    heads_k_stride: int | None = None,
):
    """attend(q_BTNH, k_BTKH, v_BTKH, positions_BT, segments_BT) -> out_BTNH, in q's dtype.

    Global arrays, sharded (or to be sharded) B over dp and fsdp, T over sp, heads over tp, in layout order: the
    T dim permuted by layouts.permutation, with positions and segments permuted alike. Differentiable once in
    q, k and v, gradients in their dtypes. Scores are scaled by H ** -0.5, accumulated in float32; a row that sees
    no key gives 0.

    Raises ValueError for an unknown name, and NotImplementedError for what a strategy cannot do.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is none of {', '.join(STRATEGIES)}")
    if strategy == "none" and mesh.shape["sp"] > 1:
        raise NotImplementedError(f"strategy 'none' attends within one device; sp={mesh.shape['sp']} needs 'ring'")
    if heads_k_stride is not None:
        raise NotImplementedError(
            f"heads_k_stride belongs to gathered keys; {strategy!r} sends all heads: leave it out"
        )
    share = _make_local(local, query_chunk_size, key_chunk_size)
    strategy_forward, strategy_backward = STRATEGIES[strategy]
    q_spec, kv_spec, row_spec, meta_spec = (spec(d, ACTIVATION_AXES) for d in ("B T N H", "B T K H", "B T N", "B T"))

    def on_shards(function, in_specs, out_specs):
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def forward(q, k, v, position, segment):
        meta = TokenMeta(position, segment)
        part = strategy_forward(share, "sp", q, k, v, meta, meta, mask)
        return part.out_BTNH.astype(q.dtype), part.lse_BTN

    def backward(q, k, v, position, segment, out, lse, d_out):
        meta = TokenMeta(position, segment)
        grads = strategy_backward(share, "sp", q, k, v, out, lse, d_out, meta, meta, mask)
        return tuple(grad.astype(primal.dtype) for grad, primal in zip(grads, (q, k, v), strict=True))

    inputs = (q_spec, kv_spec, kv_spec, meta_spec, meta_spec)
    forward_shards = on_shards(forward, inputs, (q_spec, row_spec))
    backward_shards = on_shards(backward, (*inputs, q_spec, row_spec, q_spec), (q_spec, kv_spec, kv_spec))

    @jax.custom_vjp
    def attend(q_BTNH, k_BTKH, v_BTKH, positions_BT, segments_BT):
        return attend_fwd(q_BTNH, k_BTKH, v_BTKH, positions_BT, segments_BT)[0]

    def attend_fwd(q, k, v, positions, segments):
        # What depends on positions alone is the same in every layer: untied from q it would be computed ahead of
        # the scan over layers, for all hops, and stored.
        q, positions, segments = lax.optimization_barrier((q, positions, segments))
        out, lse = forward_shards(q, k, v, positions, segments)
        out, lse = (checkpoint_name(x, name) for x, name in zip((out, lse), SAVED_NAMES, strict=True))
        return out, (q, k, v, positions, segments, out, lse)

    def attend_bwd(residuals, d_out):
        q, k, v, positions, segments, out, lse = residuals
        q, positions, segments = lax.optimization_barrier((q, positions, segments))
        return (*backward_shards(q, k, v, positions, segments, out, lse, d_out), None, None)

    attend.defvjp(attend_fwd, attend_bwd)
    return attend
