"""One token a step: queries on every device of sp, keys and values where prefill's ring left them.

A row of the cache holds the prompts of a row of the batch, packed as in training: which key belongs to which text is
said by positions and segments, so prompts of unequal length waste neither prefill nor memory. Behind its share of the
prompts every device has room for its share of the new tokens: a ring of slots, of which step t of all texts writes one,
on device t mod sp. A text that begins at any step has had its last token before the ring comes round to its first, so
a row can begin others while its neighbours go on.
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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ringbpt.attention.core import MaskSpec, Partial, merge, visible
from ringbpt.dims import ACTIVATION_AXES, spec
from ringbpt.model.adapters import IN_OUT
from ringbpt.model.experts import make_mixture
from ringbpt.model.feedforward import matmul_in, swiglu
from ringbpt.model.layer import Parts, apply_layer, rms_norm, rope_of
from ringbpt.model.llama import Model, layer_of, make_dims
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


def empty_cache(model: Model, rows: int, places: int, shared: bool) -> Callable[[], Cache]:
    """make() -> a cache in which nothing stands, `places` of a row on all devices of sp together; jitted.

    shared: whether its metas say that several texts begin alike.
    """
    dims = make_dims(model.architecture)
    sharding = NamedSharding(model.mesh, spec(CACHE, ACTIVATION_AXES))
    of_meta = NamedSharding(model.mesh, spec("B S", ACTIVATION_AXES))

    def make():
        k, v = (tuple(jnp.zeros((rows, dims.K, places, dims.H), model.dtype) for _ in range(dims.L)) for _ in range(2))
        metas = (jnp.zeros((rows, places), jnp.int32) for _ in range(3 if shared else 2))
        return Cache(k, v, TokenMeta(*metas))

    layers = (sharding,) * dims.L
    return jax.jit(make, out_shardings=Cache(layers, layers, of_meta))


def make_put(mesh: Mesh, dims: str) -> Callable[..., Any]:
    """put(old, new, row_B) -> old, a tree of arrays of these dims, with rows of new, jitted; old is donated.

    Of each of the devices that share the rows, new has one row, or as many as old; row_B, int32 as new has rows, says
    which of the device's rows each becomes (of as many: itself), or -1, none. What new is shorter in is filled with 0.
    """

    def one(row_B, old, new):
        missing = zip(old.shape[1:], new.shape[1:], strict=True)
        new = jnp.pad(new, [(0, 0), *((0, whole - size) for whole, size in missing)])
        if len(new) == len(old):
            return jnp.where((row_B >= 0).reshape(-1, *(1,) * (old.ndim - 1)), new, old)
        there = lax.dynamic_slice_in_dim(old, row_B[0], 1)
        return lax.dynamic_update_slice_in_dim(old, jnp.where(row_B[0] >= 0, new, there), row_B[0], 0)

    def put(old, new, row_B):
        return jax.tree.map(partial(one, row_B), old, new)

    place, row = (spec(letters, ACTIVATION_AXES) for letters in (dims, "B"))
    on_shards = jax.shard_map(put, mesh=mesh, in_specs=(place, place, row), out_specs=place, check_vma=False)
    return jax.jit(on_shards, donate_argnums=0)


class Sizes(NamedTuple):
    """Of one device: its rows, its places for prompts, and those of all its slots for new tokens."""

    rows: int
    prompts: int
    slots: int


def make_grow(model: Model) -> Callable[..., tuple[Cache, Any]]:
    """grow(cache, rest, turn, old, new) -> (cache, rest), jitted: of other Sizes, none of which is less than it was.

    rest: other arrays of dims "B ...". turn: int32, the place among the old slots that would be written next. The slots
    are dealt out anew from there, the oldest first: what stands in one stays as long as it did.
    """
    row, cache_spec, meta_spec = (spec(dims, ACTIVATION_AXES) for dims in ("B", CACHE, "B S"))
    specs = Cache(cache_spec, cache_spec, meta_spec)

    @partial(jax.jit, static_argnums=(3, 4))
    def grow(cache, rest, turn, old: Sizes, new: Sizes):
        def longer(x, axis, size):
            return jnp.pad(x, [(0, size * (i == axis)) for i in range(x.ndim)])

        def dealt_out(turn, axis, x):
            prompts, slots, last = jnp.split(x, (old.prompts, old.prompts + old.slots), axis)
            slots = longer(jnp.roll(slots, -turn, axis), axis, new.slots - old.slots)
            whole = jnp.concatenate([longer(prompts, axis, new.prompts - old.prompts), slots, last], axis)
            return longer(whole, 0, new.rows - old.rows)

        def local(cache, rest, turn):
            k, v = jax.tree.map(partial(dealt_out, turn, 2), (cache.k, cache.v))
            meta = jax.tree.map(partial(dealt_out, turn, 1), cache.meta)
            return Cache(k, v, meta), jax.tree.map(lambda x: longer(x, 0, new.rows - old.rows), rest)

        on_shards = jax.shard_map(
            local, mesh=model.mesh, in_specs=(specs, row, PartitionSpec()), out_specs=(specs, row), check_vma=False
        )
        return on_shards(cache, rest, turn)

    return grow


def make_prefill_layer(model: Model) -> Callable[..., tuple[jax.Array, tuple[jax.Array, jax.Array]]]:
    """layer(w, x_BTD, meta) -> (x_BTD, (k, v), each [B, K, T, H]), in layout order, jitted; x is donated."""
    kv_spec, cache_spec = (spec(dims, ACTIVATION_AXES) for dims in ("B T K H", CACHE))
    move = jax.shard_map(
        lambda k_BTKH: jnp.swapaxes(k_BTKH, 1, 2), mesh=model.mesh, in_specs=kv_spec, out_specs=cache_spec,
        check_vma=False,
    )  # fmt: skip

    def one_layer(w, x_BTD, meta):
        (x_BTD, _), (k_BTKH, v_BTKH) = model.layer(w, (x_BTD, None), meta, rope_of(model.architecture, meta))
        return x_BTD, (move(k_BTKH), move(v_BTKH))

    placed = [NamedSharding(model.mesh, s) for s in (spec("B T D", ACTIVATION_AXES), cache_spec, cache_spec)]
    return jax.jit(one_layer, donate_argnums=1, out_shardings=(placed[0], tuple(placed[1:])))


def make_prefill(model: Model) -> Callable[[Params, Batch, Cache, jax.Array], tuple[Cache, jax.Array]]:
    """prefill(weights, batch, cache, row_B) -> (cache, the last layer's x_BTD), in layout order; the cache is donated.

    What has stood in a row of the cache is gone where a row of the batch becomes it; row_B: see make_put. One program
    computes all layers: a deep model compiles no longer than a shallow one.
    """
    start = jax.jit(partial(embed, model.mesh, model.reduction, model.dtype))
    layer = make_prefill_layer(model)
    put, put_meta = make_put(model.mesh, CACHE), make_put(model.mesh, "B S")

    def prefill(weights: Params, batch: Batch, cache: Cache, row_B: jax.Array) -> tuple[Cache, jax.Array]:
        x_BTD, pairs = start(weights["embed"], batch.token_BT), []
        for w, *old in zip(weights["layers"], cache.k, cache.v, strict=True):
            x_BTD, new = layer(w, x_BTD, batch.meta)
            pairs.append(put(tuple(old), new, row_B))
        ks, vs = zip(*pairs, strict=True)
        return Cache(ks, vs, put_meta(cache.meta, batch.meta, row_B)), x_BTD

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
    """Inside shard_map: (does this device keep the tokens of `step`, where in its share they are written: a ring).

    Those of other devices go to the share's last places, which nobody sees: a cache that is only ever written, and not
    read to keep what stood there, is updated in place.
    """
    size = lax.axis_size("sp")
    slots = (whole_share - prompt_share) // texts - 1
    mine = lax.axis_index("sp") == step % size
    return mine, jnp.where(mine, prompt_share + (step // size) % slots * texts, whole_share - texts)


def write(cache: jax.Array, new: jax.Array, place: jax.Array, axis: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), place, axis)


def make_decode(model: Model, prompt_share: int):
    """decode(weights, cache, token_BQ, q_meta, step) -> (logits_BQV float32, cache), to be jitted, the cache donated.

    weights: of make_split. prompt_share: the places of a device's share that prefill filled. step: int32, from 0.
    """
    architecture, mesh, mask = model.architecture, model.mesh, model.mask
    matmul = matmul_in(model.dtype)
    experts = architecture.num_experts
    feedforward = make_mixture(mesh, experts) if experts else partial(swiglu, matmul=matmul)
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
