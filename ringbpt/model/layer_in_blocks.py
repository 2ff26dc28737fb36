"""A whole layer block by block, for the longest sequences: attention a few kv heads at a time, the rest in chunks.

Of arrays as long as a device's share of the sequence the backward holds three as wide as the model: the layer's input,
attention's output, and the gradient, which is overwritten chunk by chunk on its way down; the queries' gradient takes
the place of attention's output, group by group. Queries, and all that attention itself needs, are alive for one group
of heads only. Where a device's tokens are one chunk, the feedforward's backward goes through F in parts no wider than
the model. Every sum and every rounding is that of the layer in pieces (layer.apply_layer), but that what each part of F
adds to the gradient of the feedforward's input is rounded by itself.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, PartitionSpec

from ringbpt.attention.api import SAVED_NAMES, ShardedAttention
from ringbpt.config import Architecture
from ringbpt.dims import ACTIVATION_AXES, GATHERED_AXES, spec, weight_spec
from ringbpt.model.adapters import IN_OUT, Fixed, back, flat, learning_names, use
from ringbpt.model.feedforward import matmul_in, swiglu, swiglu_backward
from ringbpt.model.layer import attention_operands, rms_norm, rope_of
from ringbpt.model.weights import dot, gather, gather_shards, gradient_by_product, is_matrix, scatter_grad
from ringbpt.reduction import Reduction
from ringbpt.types import Params, TokenMeta

PROJECTIONS = ("w_q", "w_k", "w_v")
HEADS = ("b_q", "b_k", "b_v", "q_norm", "k_norm")
FEEDFORWARD = ("w_gate", "w_up", "w_down")
AFTER_ATTENTION = ("w_o", "feedforward_norm", *FEEDFORWARD)
OUTWARD = "GBTN,GND->BTD"  # attention's output, by group, all columns of its heads, through w_o
TILE = 128  # of a TPU's arrays, along their last dim
TOKENS = ("dp", "fsdp", "sp")  # the axes over which devices hold different tokens


@dataclass(frozen=True)
class LayerInBlocks:
    """layer(w, x_BTD, meta) -> [B, T, D] in x's dtype; w: the weights of one dense Layer.

    letters: the dims of each weight, "D N H". kv_heads divides a device's kv heads; chunk_size divides its tokens or
    exceeds them, None is all of them. keeps: gathered weights, as of weights.project.
    """

    mesh: Mesh
    architecture: Architecture
    attention: ShardedAttention
    letters: dict[str, str]
    kv_heads: int
    chunk_size: int | None
    reduction: Reduction
    keeps: bool = False

    def __call__(self, w: Params, x_BTD: jax.Array, meta: TokenMeta) -> jax.Array:
        return self._layer(w, x_BTD, meta, self.attention.needed_hops(meta))

    @cached_property
    def _layer(self) -> Callable[..., jax.Array]:
        @jax.custom_vjp
        def layer(*args):
            return self._forward(*args)[0]

        layer.defvjp(self._forward, self._backward)
        return layer

    def _forward(self, w, x, meta, hops):
        if self.keeps:
            w |= {name: gather(w[name], self.mesh, self.letters[name], x.dtype) for name in filter(is_matrix, w)}
        before, after = _halves(w)
        attend = self._on_shards(self._attend, before, self._token_specs, (self._out_spec, self._out_spec))
        out, lse = attend(before, x, meta, hops)
        out, lse = (checkpoint_name(a, name) for a, name in zip((out, lse), SAVED_NAMES, strict=True))
        finish = self._on_shards(self._after_attention, after, (self._x_spec, self._out_spec), self._x_spec)
        return finish(after, x, out), (w, x, meta, hops, out, lse)

    def _backward(self, residuals, dy):
        w, *rest = residuals
        in_specs = (*self._token_specs, self._out_spec, self._out_spec, self._x_spec)
        out_specs = self._stored_specs(dict.fromkeys(learning_names(w))), self._x_spec
        grads, dx = self._on_shards(self._backward_local, w, in_specs, out_specs)(w, *rest, dy)
        return dict.fromkeys(w) | grads, dx, None, None

    _x_spec = spec("B T D", ACTIVATION_AXES)
    _token_specs = (_x_spec, spec("B T", ACTIVATION_AXES), PartitionSpec())
    # [groups, B, T, heads * H] and [groups, B, T, heads]: short last dims would be padded to whole tiles.
    _out_spec = PartitionSpec(None, *_x_spec[:2], "tp")

    def _on_shards(self, function: Callable, w: Params, in_specs: tuple, out_specs: Any) -> Callable:
        whole = {name: spec(self.letters[name], GATHERED_AXES) for name in filter(is_matrix, w) if self.keeps}
        in_specs = (self._stored_specs(w) | whole, *in_specs)
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def _stored_specs(self, w: Params) -> dict[str, PartitionSpec]:
        return {name: weight_spec(self.letters[name]) for name in w}

    # From here on: inside shard_map, of one device's share.

    def norm(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        return rms_norm(x, scale, self.architecture.rms_norm_eps)

    def operands(self, meta: TokenMeta, w: Params, q, k, v) -> tuple[jax.Array, ...]:
        return attention_operands(self.architecture, w, q, k, v, rope_of(self.architecture, meta))

    def _gathered(self, w: Params, dtype: jnp.dtype) -> Params:
        """Every matrix whole in D and in the compute dtype; vectors and biases as they are."""
        if self.keeps:
            return w
        return w | {name: gather_shards(w[name], self.letters[name], dtype) for name in filter(is_matrix, w)}

    def _scattered(self, name: str, dw: jax.Array) -> jax.Array:
        """The sum of all devices' gradients, as the weight itself is stored."""
        if is_matrix(name):
            return scatter_grad(dw, self.letters[name], self.reduction)
        # Of what all heads share, each device of tp has its own heads' part of the gradient.
        return lax.psum(dw, (*TOKENS, "tp") if name in ("q_norm", "k_norm") else TOKENS)

    def _chunk(self, x: jax.Array) -> int:
        size = min(self.chunk_size or x.shape[1], x.shape[1])
        if x.shape[1] % size:
            raise ValueError(f"chunks of {size} do not divide the {x.shape[1]} tokens of a device")
        return size

    def _part(self, w: Params, letters: str, start: jax.Array | int, size: int, of: int) -> Params:
        """w, but of what has a dim of these letters, in `of` equal blocks, `size` of them from `start`. In slices: all
        parts, one behind the other, would be a second copy.
        """
        dims = {name: i for name in w for i, letter in enumerate(self.letters[name].split()) if letter in letters}

        def cut(dim: int, x: jax.Array) -> jax.Array:
            block = x.shape[dim] // of
            return lax.dynamic_slice_in_dim(x, start * block, size * block, dim)

        return w | {name: jax.tree.map(partial(cut, dim), w[name]) for name, dim in dims.items()}

    def _group(self, w: Params, g: jax.Array) -> Params:
        """w, but of what belongs to heads a group's part."""
        return self._part(w, "NK", g, 1, w["w_k"].shape[1] // self.kv_heads)

    def _parts_of_f(self, w: Params, D: int) -> list[Params]:
        """w in parts of F no wider than D, in whole tiles where F is."""
        F = jax.tree.leaves(w["w_down"])[0].shape[0]
        blocks = F // math.gcd(F, TILE)
        count = min(-(-F // D), blocks)
        edges = [blocks * i // count for i in range(count + 1)]
        return [self._part(w, "F", start, end - start, blocks) for start, end in pairwise(edges)]

    def _queries_keys_values(self, w: Params, x: jax.Array, meta: TokenMeta) -> tuple[jax.Array, ...]:
        size = self._chunk(x)

        def chunk(i):
            h = self.norm(_slice(x, i, size), w["attention_norm"])
            products = (matmul_in(x.dtype)("BTD,DNH->BTNH", h, use(w, name)) for name in PROJECTIONS)
            return self.operands(jax.tree.map(lambda a: _slice(a, i, size), meta), w, *products)

        return _in_chunks(chunk, x.shape[1], size)

    def _attend(self, w: Params, x, meta: TokenMeta, hops) -> tuple[jax.Array, jax.Array]:
        """Attention's output and lse, by group."""
        # What depends on the meta alone would be computed ahead of the scan over layers, and stored.
        x, meta = lax.optimization_barrier((x, meta))
        whole, everybody = self._gathered(w, x.dtype), self.attention.everybody(meta)

        def group(g):
            # Nor ahead of the loop over groups: what sees what at a hop is a square, for all hops.
            g, places, of_all = lax.optimization_barrier((g, meta, everybody))
            # Nor all chunks of the norm, which are as large as x; of one chunk a group has no less.
            tokens = x if self._chunk(x) == x.shape[1] else lax.optimization_barrier((g, x))[1]
            q, k, v = self._queries_keys_values(self._group(whole, g), tokens, places)
            out, lse = self.attention.forward(q, k, v, places, hops, of_all)
            return out.reshape(*x.shape[:2], -1), lse

        return lax.map(group, jnp.arange(whole["w_k"].shape[1] // self.kv_heads))

    def _after_attention(self, w: Params, x, out) -> jax.Array:
        size, whole = self._chunk(x), self._gathered(w, x.dtype)
        w_o, (w_gate, w_up, w_down) = _by_group(use(whole, "w_o"), out), (use(whole, name) for name in FEEDFORWARD)
        matmul = matmul_in(x.dtype)

        def chunk(i, y):
            x_i = _add_attended(_slice(y, i, size), _slice(out, i, size, dim=2), w_o)
            h = self.norm(x_i, whole["feedforward_norm"])
            return _update(y, x_i + lax.psum(swiglu(h, w_gate, w_up, w_down, matmul), "tp"), i)

        return lax.fori_loop(0, x.shape[1] // size, chunk, x)

    def _backward_local(self, w: Params, x, meta: TokenMeta, hops, out, lse, dy) -> tuple[Params, jax.Array]:
        x, meta = lax.optimization_barrier((x, meta))
        # Attention wants them so, and would keep copies beside those that the scan over layers and the products like.
        x, dy = (with_layout_constraint(a, Layout(major_to_minor=(0, 1, 2))) for a in (x, dy))
        before, after = _halves(w)
        whole = w | self._gathered(after, x.dtype)  # all of them: whether any has a pair says what learns
        parts = [whole]
        if self._chunk(x) == x.shape[1]:  # each is used once: gathered for that, no whole matrix is there
            parts = [self._gathered(part, x.dtype) for part in self._parts_of_f(w, x.shape[2])]

        dy, grads = self._after_attention_back(whole, parts, x, out, dy)
        grads, (dy, before) = self.reduction.first(grads, (dy, before))
        whole |= self._gathered(before, x.dtype)
        d_operands = self._attend_back(whole, x, meta, hops, out, lse, dy)
        dx, more = self._projections_back(whole, x, meta, d_operands, dy)
        return grads | more, dx

    def _over_chunks(self, chunk: Callable, w: Params, dy: jax.Array) -> tuple[jax.Array, Params]:
        """(dy, overwritten chunk by chunk; the gradients of weights, summed over chunks and devices, as stored).

        chunk(i, dy, gradient): its part of the new dy, and of the gradients by gradient(equation, x, dy).
        """
        size, names = self._chunk(dy), learning_names(w)
        if size == dy.shape[1]:  # nothing to sum up first
            dy, grads = chunk(0, dy, partial(gradient_by_product, self.reduction))
            grads = {name: grads[name] for name in names if name in grads}
            for name, grad in grads.items():
                grads[name] = self._as_stored(name, w, grad) if is_matrix(name) else self._scattered(name, grad)
            return dy, grads

        def add(i, state):
            dy, sums = state
            dy_i, grads = chunk(i, dy, None)
            return _update(dy, dy_i, i), {name: total + grads[name] for name, total in sums.items()}

        shapes = jax.eval_shape(lambda: chunk(0, dy, None)[1])
        sums = {name: jnp.zeros(shapes[name].shape, jnp.float32) for name in names if name in shapes}
        dy, sums = lax.fori_loop(0, dy.shape[1] // size, add, (dy, sums))
        return dy, {name: self._scattered(name, total.reshape(w[name].shape)) for name, total in sums.items()}

    def _as_stored(self, name: str, w: Params, grad: jax.Array) -> jax.Array:
        """A device's part of a matrix's gradient, in the dims of the matrix."""
        sizes = zip(self.letters[name].split(), w[name].shape, strict=True)
        return grad.reshape([-1 if letter == "D" else size for letter, size in sizes])

    def _after_attention_back(self, w: Params, parts: list[Params], x, out, dy) -> tuple[jax.Array, Params]:
        """(the gradient of the layer's input plus attention, those of the weights)."""
        size, w_o = self._chunk(x), _by_group(use(w, "w_o"), out)

        def chunk(i, dy, gradient):
            out_i, dy_i = _slice(out, i, size, dim=2), _slice(dy, i, size)
            h, norm_vjp = jax.vjp(self.norm, _add_attended(_slice(x, i, size), out_i, w_o), w["feedforward_norm"])
            dh, new = self._feedforward_back(parts, h, dy_i, gradient)
            dx, d_norm = norm_vjp(lax.psum(dh, "tp"))
            dy_i += dx
            new |= {"feedforward_norm": d_norm} | flat("w_o", back(OUTWARD, out_i, dy_i, w_o, dot, gradient)[1])
            return dy_i, new

        return self._over_chunks(chunk, w, dy)

    def _feedforward_back(self, parts: list[Params], h, dy, gradient) -> tuple[jax.Array, Params]:
        """(the gradient of h, this device's part over tp; those of the weights), one part of F after the other."""
        dh, grads = jnp.zeros_like(h), list[Params]()
        for part in parts:
            if grads:
                grads, (h, dy, dh) = self.reduction.first(grads, (h, dy, dh))
            gate, up, down = (use(part, name) for name in FEEDFORWARD)
            more, dws = swiglu_backward(h, dy, gate, up, down, gradient)
            dh += more
            grads.append({})
            for name, dw in zip(FEEDFORWARD, dws, strict=True):
                grads[-1] |= flat(name, dw)

        def whole(name: str) -> jax.Array:
            dws, dims = [grad[name] for grad in grads], self.letters[name].split()
            return jnp.concatenate(dws, dims.index("F")) if "F" in dims else sum(dws)

        return dh, {name: whole(name) for name in grads[0]}

    def _attend_back(self, w: Params, x, meta: TokenMeta, hops, out, lse, dy) -> tuple[jax.Array, ...]:
        """The gradients of attention's operands, by group, [groups, b, t, heads * H]."""
        size, everybody = self._chunk(x), self.attention.everybody(meta)

        def group(g, state):
            part = self._group(w, g)
            out_g, lse_g = (lax.dynamic_index_in_dim(a, g, keepdims=False) for a in (state[0], lse))
            q, k, v = self._queries_keys_values(part, x, meta)
            w_o = use(part, "w_o")
            empty = jnp.zeros((x.shape[0], size, *q.shape[2:]), x.dtype)  # of which the gradient makes no use
            d_out = _in_chunks(
                lambda i: back("BTNH,NHD->BTD", empty, _slice(dy, i, size), w_o, dot)[0], x.shape[1], size
            )
            grads = self.attention.backward(q, k, v, meta, hops, out_g.reshape(q.shape), lse_g, d_out, everybody)
            return tuple(
                lax.dynamic_update_index_in_dim(whole, grad.reshape(*grad.shape[:2], -1), g, 0)
                for whole, grad in zip(state, grads, strict=True)
            )

        keys = jnp.zeros((*out.shape[:3], self.kv_heads * w["w_k"].shape[2]), x.dtype)
        return lax.fori_loop(0, out.shape[0], group, (out, keys, keys))

    def _projections_back(self, w: Params, x, meta: TokenMeta, d_operands, dy) -> tuple[jax.Array, Params]:
        """(the gradient of the layer's input, those of the weights before attention)."""
        size = self._chunk(x)
        heads = {name: w[name] for name in HEADS if name in w}

        def chunk(i, dy, gradient):
            h, norm_vjp = jax.vjp(self.norm, _slice(x, i, size), w["attention_norm"])
            products = [matmul_in(x.dtype)("BTD,DNH->BTNH", h, use(w, name)) for name in PROJECTIONS]
            meta_i = jax.tree.map(lambda a: _slice(a, i, size), meta)
            _, operands_vjp = jax.vjp(partial(self.operands, meta_i), heads, *products)
            d_heads, *grads = operands_vjp(
                tuple(
                    jnp.moveaxis(_slice(d, i, size, dim=2), 0, 2).reshape(product.shape)
                    for d, product in zip(d_operands, products, strict=True)
                )
            )
            new = dict(d_heads)
            dh = jnp.zeros_like(h)
            for name, grad in zip(PROJECTIONS, grads, strict=True):
                more, dw = back("BTD,DNH->BTNH", h, grad, use(w, name), dot, gradient)
                new |= flat(name, dw)
                dh += more
            dx, new["attention_norm"] = norm_vjp(lax.psum(dh, "tp"))
            return _slice(dy, i, size) + dx, new

        return self._over_chunks(chunk, w, dy)


def _halves(w: Params) -> tuple[Params, Params]:
    """The weights that stand before attention's output, and those behind it."""
    after = {name: x for name, x in w.items() if _weight(name) in AFTER_ATTENTION}
    return {name: x for name, x in w.items() if name not in after}, after


def _slice(x: jax.Array, i: jax.Array, size: int, dim: int = 1) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, i * size, size, dim)


def _update(x: jax.Array, part: jax.Array, i: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, part, i * part.shape[1], 1)


def _in_chunks(function: Callable, length: int, size: int) -> Any:
    """Arrays [b, length, ...] of function(i), [b, size, ...], each written where it belongs."""
    shapes = jax.eval_shape(function, jnp.int32(0))
    empty = jax.tree.map(lambda x: jnp.zeros((x.shape[0], length, *x.shape[2:]), x.dtype), shapes)
    update = lambda i, whole: jax.tree.map(lambda x, part: _update(x, part, i), whole, function(i))  # noqa: E731
    return lax.fori_loop(0, length // size, update, empty)


def _weight(name: str) -> str:
    """The weight that a name belongs to: its own, or an adapter's."""
    return next((weight for weight in IN_OUT if name.startswith(weight)), name)


def _by_group(w_o: Any, out: jax.Array) -> Any:
    """w_o, with its pair, as attention's output is laid out: [groups, heads * H, D]."""

    def grouped(w: jax.Array) -> jax.Array:
        return w.reshape(out.shape[0], out.shape[3], -1)

    if not isinstance(w_o, Fixed):
        return grouped(w_o)
    return Fixed(grouped(w_o.base), w_o.low and w_o.low._replace(a=grouped(w_o.low.a)))


def _add_attended(x: jax.Array, out: jax.Array, w_o: Any) -> jax.Array:
    return x + lax.psum(matmul_in(x.dtype)(OUTWARD, out, w_o), "tp")
