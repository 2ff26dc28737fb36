"""One token a step: queries on every device of sp, keys and values where prefill's ring left them.

A row of the cache holds the prompts of a row of the batch, packed as in training: which key belongs to which text is
said by positions and segments, so prompts of unequal length waste neither prefill nor memory. Behind its share of the
prompts every device has room for its share of the new tokens; step t of all texts of a row goes to device t mod sp.
Each device attends to what it holds, and the partial results are merged by their log-sum-exp over sp.
The step is one shard_map: what it sends is one token's activations. Ref: Flash-Decoding, and arXiv:2310.01889.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from ringbpt.attention.core import MaskSpec, Partial, merge, visible
from ringbpt.dims import ACTIVATION_AXES, spec
from ringbpt.model.adapters import IN_OUT
from ringbpt.model.experts import mixture
from ringbpt.model.feedforward import matmul_in, swiglu
from ringbpt.model.layer import Parts, apply_layer, rms_norm, rope_of
from ringbpt.model.llama import Model, layer_of
from ringbpt.model.quantised import Quantised, dequantised
from ringbpt.model.weights import dot, embed
from ringbpt.types import Batch, Params, TokenMeta

CACHE = "B K S H"  # S last but one: a device's keys of one head stand together, and a product reads them in a row


class Cache(NamedTuple):
    """Per layer k and v, [B, K, S, H] in the compute dtype; meta says what each place holds (segment 0: nothing)."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    meta: TokenMeta


def weight_specs(model: Model) -> Any:
    """The PartitionSpecs of weights for decoding: without fsdp and sp, or every token would gather every weight."""
    axis = model.architecture.param_scan_axis

    def gathered(stored: PartitionSpec, without: int = -1) -> PartitionSpec:
        return PartitionSpec(*("tp" if entry == "tp" else None for i, entry in enumerate(stored) if i != without))

    layer = {name: gathered(stored, min(axis, len(stored) - 1)) for name, stored in model.specs["layers"].items()}
    specs = {name: gathered(stored) for name, stored in model.specs.items() if name != "layers"}
    specs.setdefault("unembed", PartitionSpec(None, "tp"))
    return specs | {"layers": [layer] * model.architecture.num_hidden_layers}


def make_split(model: Model) -> Callable[[Params], Params]:
    """split(params) -> weights for decoding, in the compute dtype, as weight_specs says; compiled once, a weight each.

    `layers` is a list of one dict a layer. A tied table has a copy of its own as the unembedding: it would be
    transposed again at every token.
    """
    axis, L = model.architecture.param_scan_axis, model.architecture.num_hidden_layers
    placed = jax.tree.map(lambda spec: NamedSharding(model.mesh, spec), weight_specs(model))

    def cut(name, w):
        if isinstance(w, Quantised):
            return [dequantised(layer_of(w, i, axis), " ".join(IN_OUT[name]), model.dtype) for i in range(L)]
        if w.ndim == 1:  # a number a layer, which is not rounded
            return list(w)
        return [lax.index_in_dim(w, i, axis, keepdims=False).astype(model.dtype) for i in range(L)]

    def cast(w):
        return w.astype(model.dtype)

    cuts = {
        name: jax.jit(partial(cut, name), out_shardings=[sharding] * L)
        for name, sharding in placed["layers"][0].items()
    }
    casts = {name: jax.jit(cast, out_shardings=sharding) for name, sharding in placed.items() if name != "layers"}
    transpose = jax.jit(lambda w: cast(w).T, out_shardings=placed["unembed"])

    def split(params: Params) -> Params:
        layers = {name: cuts[name](w) for name, w in params["layers"].items()}
        rest = {name: casts[name](w) for name, w in params.items() if name != "layers"}
        if model.architecture.tie_word_embeddings:
            rest["unembed"] = transpose(params["embed"])
        return rest | {"layers": [{name: ws[i] for name, ws in layers.items()} for i in range(L)]}

    return split


def make_prefill(model: Model, room: int) -> Callable[[Params, Batch], tuple[Cache, jax.Array]]:
    """prefill(weights, batch) -> (cache, the last layer's x_BTD), in layout order.

    The cache has `room` empty places behind each device's share. One program computes all layers: a deep model compiles
    no longer than a shallow one.
    """
    kv_spec, cache_spec, meta_spec = (spec(dims, ACTIVATION_AXES) for dims in ("B T K H", CACHE, "B S"))
    on_shards = partial(jax.shard_map, mesh=model.mesh, check_vma=False)

    def to_cache(k_BTKH):
        return jnp.pad(jnp.swapaxes(k_BTKH, 1, 2), ((0, 0), (0, 0), (0, room), (0, 0)))

    def with_room(meta):
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, room))), meta)

    def one_layer(w, x_BTD, meta):
        (x_BTD, _), (k_BTKH, v_BTKH) = model.layer(w, (x_BTD, None), meta, rope_of(model.architecture, meta))
        move = on_shards(to_cache, in_specs=kv_spec, out_specs=cache_spec)
        return x_BTD, move(k_BTKH), move(v_BTKH)

    placed = [NamedSharding(model.mesh, s) for s in (spec("B T D", ACTIVATION_AXES), cache_spec, cache_spec)]
    start = jax.jit(partial(embed, model.mesh, model.dtype))
    layer = jax.jit(one_layer, donate_argnums=1, out_shardings=tuple(placed))
    pad_meta = jax.jit(
        on_shards(with_room, in_specs=meta_spec, out_specs=meta_spec),
        out_shardings=NamedSharding(model.mesh, meta_spec),
    )

    def prefill(weights: Params, batch: Batch) -> tuple[Cache, jax.Array]:
        x_BTD, ks, vs = start(weights["embed"], batch.token_BT), [], []
        for w in weights["layers"]:
            x_BTD, k, v = layer(w, x_BTD, batch.meta)
            ks.append(k)
            vs.append(v)
        return Cache(tuple(ks), tuple(vs), pad_meta(batch.meta)), x_BTD

    return prefill


def attend_cache(
    q_BQNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, q_meta: TokenMeta, kv_meta: TokenMeta, mask: MaskSpec
) -> Partial:
    """A few queries over one device's part of the cache, whole: its scores are [Q, S], a few numbers a key."""
    B, Q, N, H = q_BQNH.shape
    K = k_BKSH.shape[1]
    q_BKRH = jnp.moveaxis(q_BQNH.reshape(B, Q, K, N // K, H), 1, 3).reshape(B, K, -1, H)
    scores = dot("BKRH,BKSH->BKRS", q_BKRH, k_BKSH, jnp.float32) * H**-0.5
    seen_BQS = visible(q_meta, kv_meta, mask)
    scores = jnp.where(seen_BQS[:, None, None], scores.reshape(B, K, N // K, Q, -1), -jnp.inf)
    top = jnp.max(scores, axis=-1)
    finite = jnp.where(top == -jnp.inf, 0.0, top)
    p = jnp.exp(scores - finite[..., None])
    total = jnp.sum(p, axis=-1)
    p = p.reshape(B, K, -1, p.shape[-1]).astype(v_BKSH.dtype)
    out = dot("BKRS,BKSH->BKRH", p, v_BKSH, jnp.float32).reshape(B, K, N // K, Q, H)
    out = out / jnp.where(total == 0, 1.0, total)[..., None]
    lse = jnp.where(total == 0, -jnp.inf, finite + jnp.log(jnp.where(total == 0, 1.0, total)))
    return Partial(jnp.moveaxis(out, 3, 1).reshape(B, Q, N, H), jnp.moveaxis(lse, 3, 1).reshape(B, Q, N))


def merge_over(part: Partial, axis: str) -> jax.Array:
    """Inside shard_map: the attention over the keys of every device of the axis, [B, Q, N, H] float32."""
    top = lax.pmax(part.lse_BTN, axis)
    weight = jnp.exp(part.lse_BTN - jnp.where(top == -jnp.inf, 0.0, top))
    out, total = lax.psum((part.out_BTNH * weight[..., None], weight), axis)
    return out / jnp.where(total == 0, 1.0, total)[..., None]


def write_place(step: jax.Array, prompt_share: int, whole_share: int, texts: int) -> tuple[jax.Array, jax.Array]:
    """Inside shard_map: (does this device keep the tokens of `step`, where in its share they are written).

    Those of other devices go to the share's last places, which nobody sees: a cache that is only ever written, and not
    read to keep what stood there, is updated in place.
    """
    size = lax.axis_size("sp")
    mine = lax.axis_index("sp") == step % size
    return mine, jnp.where(mine, prompt_share + (step // size) * texts, whole_share - texts)


def write(cache: jax.Array, new: jax.Array, place: jax.Array, axis: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), place, axis)


def make_decode(model: Model, prompt_share: int):
    """decode(weights, cache, token_BQ, q_meta, step) -> (logits_BQV float32, cache), to be jitted, the cache donated.

    weights: of make_split. prompt_share: the places of a device's share that prefill filled. step: int32, from 0.
    """
    architecture, mesh, mask = model.architecture, model.mesh, model.mask
    matmul = matmul_in(model.dtype)
    experts = architecture.num_experts
    feedforward = partial(mixture, experts) if experts else partial(swiglu, matmul=matmul)
    # Each device has its heads, and its part of F.
    parts = partial(Parts, matmul, feedforward=feedforward, reduce=partial(lax.psum, axis_name="tp"))
    row, cache_spec, meta_spec = (
        spec("B _", ACTIVATION_AXES),
        spec(CACHE, ACTIVATION_AXES),
        spec("B S", ACTIVATION_AXES),
    )

    def local(weights, cache, token_BQ, q_meta, step):
        mine, place = write_place(step, prompt_share, cache.k[0].shape[2], token_BQ.shape[1])
        last_BT = None if q_meta.last_BT is None else jnp.where(mine, q_meta.last_BT, 0)
        kept = replace(q_meta, segment_BT=jnp.where(mine, q_meta.segment_BT, 0), last_BT=last_BT)
        rope, x_BQD, new = rope_of(architecture, q_meta), _rows(weights["embed"], token_BQ), []
        for w, k, v in zip(weights["layers"], cache.k, cache.v, strict=True):

            def attend(q_BQNH, k_BQKH, v_BQKH, k=k, v=v):
                own = jnp.swapaxes(k_BQKH, 1, 2), jnp.swapaxes(v_BQKH, 1, 2)
                before = attend_cache(q_BQNH, k, v, q_meta, cache.meta, mask)
                part = merge(before, attend_cache(q_BQNH, *own, q_meta, kept, mask))
                return merge_over(part, "sp").astype(model.dtype)

            x_BQD, keys_values, _ = apply_layer(architecture, w, x_BQD, rope, parts(attend=attend))
            new.append([jnp.swapaxes(x_BQKH, 1, 2) for x_BQKH in keys_values])
        x_BQD = rms_norm(x_BQD, weights["norm"], architecture.rms_norm_eps)
        # All reading is done before anything is written, and the place says so by coming (for the compiler) from what
        # was read: it adds 0. A write that a read might still follow would be made in a copy of the whole cache.
        place = place + jnp.minimum(jnp.argmax(x_BQD[0, 0]).astype(jnp.int32), 0)
        ks, vs = (
            tuple(write(old, fresh, place, 2) for old, fresh in zip(whole, fresh_ones, strict=True))
            for whole, fresh_ones in zip((cache.k, cache.v), zip(*new, strict=True), strict=True)
        )
        meta = jax.tree.map(lambda old, new: write(old, new, place, 1), cache.meta, kept)
        return _logits(weights["unembed"], x_BQD)[..., : architecture.vocab_size], Cache(ks, vs, meta)

    def decode(weights, cache, token_BQ, q_meta, step):
        L = architecture.num_hidden_layers
        cache_specs = Cache((cache_spec,) * L, (cache_spec,) * L, meta_spec)
        specs = (weight_specs(model), cache_specs, row, row, PartitionSpec())
        return jax.shard_map(
            local, mesh=mesh, in_specs=specs, out_specs=(spec("B _ _", ACTIVATION_AXES), cache_specs), check_vma=False
        )(weights, cache, token_BQ, q_meta, step)

    return decode


def make_last_logits(model: Model):
    """last_logits(norm_D, unembed_DV, x_BTD, place_BQ) -> logits_BQV float32 of the prompts' last tokens."""
    head = jax.shard_map(
        _logits, mesh=model.mesh, in_specs=(PartitionSpec(None, "tp"), spec("B _ _", ACTIVATION_AXES)),
        out_specs=spec("B _ _", ACTIVATION_AXES), check_vma=False,
    )  # fmt: skip

    def last_logits(norm_D, unembed_DV, x_BTD, place_BQ):
        x_BQD = jnp.take_along_axis(x_BTD, place_BQ[..., None], axis=1)
        logits_BQV = head(unembed_DV, rms_norm(x_BQD, norm_D, model.architecture.rms_norm_eps))
        return logits_BQV[..., : model.architecture.vocab_size]

    return last_logits


def _logits(unembed_DV: jax.Array, x_BQD: jax.Array) -> jax.Array:
    return lax.all_gather(dot("BTD,DV->BTV", x_BQD, unembed_DV, jnp.float32), "tp", axis=2, tiled=True)


def _rows(table_VD: jax.Array, token_BQ: jax.Array) -> jax.Array:
    """Rows of a table whose vocabulary is split over tp."""
    local = token_BQ - lax.axis_index("tp") * table_VD.shape[0]
    inside = (local >= 0) & (local < table_VD.shape[0])
    rows = jnp.take(table_VD, jnp.where(inside, local, 0), axis=0, mode="clip")
    return lax.psum(jnp.where(inside[..., None], rows, 0), "tp")
