"""The one way into attention, for our model and for anybody's: global arrays in, global arrays out."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, PartitionSpec

from ringbpt.attention.choose import Load, choose, machine
from ringbpt.attention.core import Local, MaskSpec
from ringbpt.attention.local import block_sizes, blockwise, cudnn, pallas_hopper, pallas_tpu, pallas_triton, reference
from ringbpt.attention.parallel import all_gather, ring, ulysses
from ringbpt.dims import ACTIVATION_AXES, AXES, Axes
from ringbpt.dims import spec as partition
from ringbpt.reduction import Reduction
from ringbpt.types import TokenMeta

# Names under which a remat policy can keep the forward's result, so that the backward never runs the ring again.
SAVED_NAMES = ("attention_out", "attention_lse")
# The name under which attention's own operations stand in a compiled program; planning.overlap looks for it.
SCOPE = "attention"


# What `auto` tries, the fastest first; elsewhere blockwise. Of GPUs by what others have measured: docs/benchmarks.md.
FASTEST = {"tpu": ("pallas_tpu", "blockwise"), "gpu": ("cudnn", "pallas_hopper", "pallas_triton", "blockwise")}


@cache
def _log_once(text: str) -> None:
    if jax.process_index() == 0:
        logging.getLogger(__name__).info(text)


def _make_auto(device: jax.Device, query_chunk_size: int | None, key_chunk_size: int | None) -> Local:
    """The fastest that doesn't refuse what it is asked, chosen once for each direction and shapes.

    Each choice is said once in the log, with the reasons of those that refused.
    """
    names = FASTEST.get(device.platform, ("blockwise",))
    chosen: dict[tuple, Local] = {}

    def run(direction: str, *args):
        request = (direction, *jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args))
        if request in chosen:
            return getattr(chosen[request], direction)(*args)
        refusals = []
        for name in names:
            try:
                local = LOCALS[name](device, query_chunk_size, key_chunk_size)
                result = getattr(local, direction)(*args)
            except NotImplementedError as refusal:
                refusals.append(str(refusal))
                continue
            _log_once(f"{direction} on {device.device_kind}: {'; '.join([name, *refusals])}")
            chosen[request] = local
            return result
        raise NotImplementedError("; ".join(refusals))

    return Local(attend=partial(run, "attend"), attend_bwd=partial(run, "attend_bwd"))


def _make_blockwise(device: jax.Device, query_chunk_size: int | None, key_chunk_size: int | None) -> Local:
    """Blocks of the given sizes, else of the table's for the head dim, else of 1024."""

    @cache
    def sized(way: str, head_dim: int) -> Local:
        t, s = block_sizes.sizes("blockwise", device.device_kind, head_dim, way, (1024, 1024))
        return blockwise.make_blockwise(query_chunk_size or t, key_chunk_size or s, cpu=device.platform == "cpu")

    return Local(
        attend=lambda q, *args: sized("forward", q.shape[3]).attend(q, *args),
        attend_bwd=lambda q, *args: sized("backward", q.shape[3]).attend_bwd(q, *args),
    )


# Each: (a device that it will run on, query_chunk_size, key_chunk_size) -> Local. A size is the most tokens that a
# block may have; None leaves it to the implementation. What a device or a request cannot have is refused with
# NotImplementedError: by these functions, or when the Local is traced.
LOCALS: dict[str, Callable[[jax.Device, int | None, int | None], Local]] = {
    "reference": lambda device, *sizes: Local(reference.attend, reference.attend_bwd),
    "blockwise": _make_blockwise,
    "pallas_tpu": pallas_tpu.make_pallas_tpu,
    "pallas_tpu_interpreted": pallas_tpu.make_interpreted,
    "pallas_triton": pallas_triton.make_pallas_triton,
    "pallas_triton_interpreted": pallas_triton.make_interpreted,
    "pallas_hopper": pallas_hopper.make_pallas_hopper,
    "pallas_hopper_interpreted": pallas_hopper.make_interpreted,
    "cudnn": cudnn.make_cudnn,
    "auto": _make_auto,
}


class Way(NamedTuple):
    """What belongs to one call. hops: how far keys travel round a ring. reduction: how their gradients are summed.
    everybody: ring.everybodys of the places, where it is there already.
    """

    hops: ring.Hops
    reduction: Reduction
    everybody: TokenMeta | None


def _over(strategy: ModuleType, local: Local, axis: str, backward: dict[str, Any], **options: Any) -> Local:
    """A device's attention, and how devices meet over a mesh axis: again a Local, so that strategies nest."""
    return Local(
        attend=partial(strategy.forward, local, axis, **options),
        attend_bwd=partial(strategy.backward, local, axis, **options, **backward),
    )


def _ring(axis: str, local: Local, spec: "AttentionSpec", way: Way) -> Local:
    summed = {"reduce_dtype": way.reduction.dtype}
    return _over(ring, local, axis, summed, hops=way.hops, everybody=way.everybody, bidirectional=spec.bidirectional)


def _all_gather(local: Local, spec: "AttentionSpec", way: Way) -> Local:
    return _over(all_gather, local, "sp", {"reduction": way.reduction}, heads_k_stride=spec.heads_k_stride)


# Each: (a device's attention to the keys at hand, the spec, of this call) -> its queries' attention to the keys of all
# devices of sp, for use inside a shard_map.
OVER_SP: dict[str, Callable[[Local, "AttentionSpec", Way], Local]] = {
    "none": lambda local, spec, way: local,
    "ring": partial(_ring, "sp"),
    "all_gather": _all_gather,
    "ulysses": lambda local, spec, way: _over(ulysses, local, "sp", {}),
    "ulysses_ring": lambda local, spec, way: _over(ulysses, _ring("ring", local, spec, way), "ulysses", {}),
}
STRATEGIES = (*OVER_SP, "auto")


@dataclass(frozen=True)
class AttentionSpec:
    """What attention is asked for: which pairs of tokens count (mask), and how it is computed, which changes no result.

    strategy: how devices meet over sp: `ring`; `all_gather`, heads_k_stride kv heads at a time; `ulysses`;
    `ulysses_ring`, ulysses within groups of ulysses_degree neighbours and a ring of the groups; `none` for sp=1;
    `auto`: the quickest of them for the shapes, by the cost model of choose.py, said in a line of output.

    Of rings: bidirectional sends half of the keys each way; skip_hops ends the journey of the keys where nobody further
    on sees any of them (a window, packed documents), which depends on the batch: see ring.needed_hops.

    local: what a device computes with, one of LOCALS, in blocks of at most query_chunk_size queries and key_chunk_size
    keys; None: as the implementation thinks best. `auto`: the fastest that does what is asked on the mesh's devices.

    reduce_dtype: in which the gradients of keys and values travel to where the keys belong; they are added in float32.

    Raises ValueError for an unknown name, and NotImplementedError for an option that the strategy does not have.
    """

    strategy: str = "ring"
    local: str = "blockwise"
    mask: MaskSpec = MaskSpec()
    query_chunk_size: int | None = None
    key_chunk_size: int | None = None
    heads_k_stride: int | None = None
    ulysses_degree: int | None = None
    bidirectional: bool = False
    skip_hops: bool = False
    reduce_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy {self.strategy!r} is none of {', '.join(STRATEGIES)}")
        if self.local not in LOCALS:
            raise ValueError(f"local attention {self.local!r} is none of {', '.join(LOCALS)}")
        if self.heads_k_stride is not None and self.strategy != "all_gather":
            raise NotImplementedError(
                f"heads_k_stride belongs to gathered keys; {self.strategy!r} sends all heads: leave it out"
            )
        if self.bidirectional and "ring" not in self.strategy and self.strategy != "auto":
            raise NotImplementedError(f"bidirectional belongs to rings, not to {self.strategy!r}: use ring")


@dataclass(frozen=True)
class ShardedAttention:
    """Attention for use inside a shard_map over `mesh`, on one device's part of each array, placed as `axes` say."""

    spec: AttentionSpec
    local: Local
    mesh: Mesh
    axes: dict[str, Axes]

    def needed_hops(self, meta: TokenMeta) -> ring.Hops:
        """How far keys must travel round the ring: outside the shard_map, of the whole batch. None: all the way."""
        axis = {"ring": "sp", "ulysses_ring": "ring"}.get(self.spec.strategy)
        if axis is None or not self.spec.skip_hops or self.mesh.shape[axis] == 1:
            return None
        return ring.needed_hops(meta, self.spec.mask, self.mesh.shape[axis], self.spec.bidirectional)

    def everybody(self, meta: TokenMeta) -> TokenMeta | None:
        """What several calls of one meta share, such as those of groups of heads: gathered once for all of them."""
        with jax.named_scope(SCOPE):
            return ring.everybodys(meta, "sp") if self.spec.strategy == "ring" else None

    def forward(
        self, q, k, v, meta: TokenMeta, hops: ring.Hops, everybody: TokenMeta | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """(out_BTNH in q's dtype, lse_BTN float32)."""
        with jax.named_scope(SCOPE):
            part = self._over_sp(hops, everybody).attend(q, k, v, meta, meta, self.spec.mask)
        return part.out_BTNH.astype(q.dtype), part.lse_BTN

    def backward(
        self, q, k, v, meta: TokenMeta, hops: ring.Hops, out, lse, d_out, everybody: TokenMeta | None = None
    ) -> tuple[jax.Array, ...]:
        """The gradients of q, k and v in their dtypes, from forward's out and lse and the gradient of out."""
        with jax.named_scope(SCOPE):
            grads = self._over_sp(hops, everybody).attend_bwd(q, k, v, out, lse, d_out, meta, meta, self.spec.mask)
        return tuple(grad.astype(primal.dtype) for grad, primal in zip(grads, (q, k, v), strict=True))

    def _over_sp(self, hops: ring.Hops, everybody: TokenMeta | None) -> Local:
        way = Way(hops, Reduction.on(self.mesh, self.spec.reduce_dtype), everybody)
        return OVER_SP[self.spec.strategy](self.local, self.spec, way)


def make_sharded_attention(mesh: Mesh, spec: AttentionSpec) -> ShardedAttention:
    """For callers that have a shard_map of their own; of any strategy but `auto`, which waits for global shapes.

    Raises NotImplementedError for `none` over several devices, ValueError for a ulysses_degree that does not divide sp.
    """
    sp, axes = mesh.shape["sp"], ACTIVATION_AXES
    local = LOCALS[spec.local](mesh.devices.flat[0], spec.query_chunk_size, spec.key_chunk_size)
    if spec.strategy == "none" and sp > 1:
        raise NotImplementedError(f"strategy 'none' attends within one device; sp={sp} needs 'ring'")
    if spec.strategy == "ulysses_ring":
        if spec.ulysses_degree is None or sp % spec.ulysses_degree:
            divisors = ", ".join(str(d) for d in range(1, sp + 1) if sp % d == 0)
            raise ValueError(f"ulysses_ring needs a ulysses_degree that divides sp={sp}: one of {divisors}")
        names = ("dp", "fsdp", "tp", "ring", "ulysses")
        shape = (*(mesh.shape[axis] for axis in names[:3]), sp // spec.ulysses_degree, spec.ulysses_degree)
        # The same devices in the same order: arrays sharded over sp are sharded over both of its halves as they are.
        mesh = Mesh(mesh.devices.reshape(shape), names, axis_types=(AxisType.Auto,) * len(names))
        axes = {**axes, "T": ("ring", "ulysses")}
    return ShardedAttention(spec, local, mesh, axes)


def _make_chooser(mesh: Mesh, spec: AttentionSpec) -> Callable[..., jax.Array]:
    """strategy="auto": chooses when it sees the shapes, once for each, and says so."""

    @cache
    def chosen(shape_BTNH: tuple[int, ...], kv_heads: int, itemsize: int) -> Callable[..., jax.Array]:
        B, T, N, H = shape_BTNH
        dp, fsdp, tp, sp = (mesh.shape[axis] for axis in AXES)
        load = Load(sp, max(1, B // (dp * fsdp)), T // sp, N // tp, kv_heads // tp, H, itemsize)
        choice = choose(load, machine(mesh))
        _log_once(f"attention over sp: {choice.strategy}; {choice.why}")
        two_ways = choice.bidirectional or (spec.bidirectional and "ring" in choice.strategy)
        return make_attention(
            mesh, spec, strategy=choice.strategy, ulysses_degree=choice.ulysses_degree, bidirectional=two_ways
        )

    def attend(q_BTNH, k_BTKH, v_BTKH, meta: TokenMeta):
        return chosen(q_BTNH.shape, k_BTKH.shape[2], q_BTNH.dtype.itemsize)(q_BTNH, k_BTKH, v_BTKH, meta)

    return attend


def make_attention(mesh: Mesh, spec: AttentionSpec = AttentionSpec(), **changes: Any) -> Callable[..., jax.Array]:
    """attend(q_BTNH, k_BTKH, v_BTKH, meta: TokenMeta) -> out_BTNH, in q's dtype; `changes` are fields of the spec.

    Global arrays, sharded (or to be sharded) B over dp and fsdp, T over sp, heads over tp, in layout order: the
    T dim permuted by layouts.permutation, that of the meta's arrays alike. Differentiable once in q, k and v, gradients
    in their dtypes. Scores are scaled by H ** -0.5, accumulated in float32; a row that sees no key gives 0.

    Raises ValueError for an unknown name, and NotImplementedError for what a strategy or a kernel cannot do.
    """
    spec = replace(spec, **changes)
    if spec.strategy == "auto":
        return _make_chooser(mesh, spec)
    attention = make_sharded_attention(mesh, spec)
    q_spec, kv_spec, row_spec, meta_spec = (
        partition(dims, attention.axes) for dims in ("B T N H", "B T K H", "B T N", "B T")
    )

    def on_shards(function, in_specs, out_specs):
        return jax.shard_map(function, mesh=attention.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    inputs = (q_spec, kv_spec, kv_spec, meta_spec, PartitionSpec())  # a TokenMeta's arrays are all placed alike
    forward_shards = on_shards(attention.forward, inputs, (q_spec, row_spec))
    backward_shards = on_shards(attention.backward, (*inputs, q_spec, row_spec, q_spec), (q_spec, kv_spec, kv_spec))

    @jax.custom_vjp
    def attend(q_BTNH, k_BTKH, v_BTKH, meta: TokenMeta):
        return attend_fwd(q_BTNH, k_BTKH, v_BTKH, meta)[0]

    def attend_fwd(q, k, v, meta: TokenMeta):
        # What depends on the meta alone is the same in every layer: untied from q it would be computed ahead of
        # the scan over layers, for all hops, and stored.
        # The number of hops may well be: it is one number.
        hops = attention.needed_hops(meta)
        q, meta = lax.optimization_barrier((q, meta))
        out, lse = forward_shards(q, k, v, meta, hops)
        out, lse = (checkpoint_name(x, name) for x, name in zip((out, lse), SAVED_NAMES, strict=True))
        return out, (q, k, v, meta, hops, out, lse)

    def attend_bwd(residuals, d_out):
        q, k, v, meta, hops, out, lse = residuals
        q, meta = lax.optimization_barrier((q, meta))
        return (*backward_shards(q, k, v, meta, hops, out, lse, d_out), None)

    attend.defvjp(attend_fwd, attend_bwd)
    return attend
