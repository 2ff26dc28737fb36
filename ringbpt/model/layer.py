"""One layer, its weights and its maths: attention, then a feedforward or experts, each behind a norm.

Training and decoding compute the same layer: what differs, how a weight is used and how devices meet, is handed in.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ringbpt.config import Architecture
from ringbpt.dims import Dims
from ringbpt.model.adapters import Pair, use
from ringbpt.model.experts import RouterOutput, route
from ringbpt.model.rope import apply_rope, frequencies, rope_scale, rotation
from ringbpt.model.weights import ones, weight, zeros
from ringbpt.types import Params, TokenMeta

Rope = tuple[jax.Array, jax.Array]  # cos and sin of every angle, [B, T, H/2] float32


class Layer(nnx.Module):
    """The weights of one layer: attention, then feedforward; then what only some families have, and adapters."""

    def __init__(self, rngs: nnx.Rngs, dims: Dims, std: float, config: Architecture, pairs: tuple[Pair, ...] = ()):
        expert = "E " if config.num_experts else ""
        self.attention_norm = ones(dims, "D")
        self.w_q = weight(rngs, dims, "D N H", std)
        self.w_k = weight(rngs, dims, "D K H", std)
        self.w_v = weight(rngs, dims, "D K H", std)
        self.w_o = weight(rngs, dims, "N H D", std)
        self.feedforward_norm = ones(dims, "D")
        self.w_gate = weight(rngs, dims, f"{expert}D F", std)
        self.w_up = weight(rngs, dims, f"{expert}D F", std)
        self.w_down = weight(rngs, dims, f"{expert}F D", std)
        if config.num_experts:
            self.w_router = weight(rngs, dims, "D E", std)
        if config.qkv_bias:
            self.b_q, self.b_k, self.b_v = (zeros(dims, letters) for letters in ("N H", "K H", "K H"))
        if config.qk_norm:
            self.q_norm, self.k_norm = ones(dims, "H"), ones(dims, "H")
        for pair in pairs:
            for name, param in pair.weights(rngs, dims).items():
                setattr(self, name, param)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last dim, in float32; returns x's dtype. Ref: arXiv:1910.07467."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


def rope_of(architecture: Architecture, meta: TokenMeta) -> Rope:
    """The rotation of each token's place."""
    return rotation(meta.position_BT, frequencies(architecture), rope_scale(architecture))


def attention_operands(
    architecture: Architecture, w: Params, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, rope: Rope
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What attention takes, of a layer's three products: biases added, heads normed, queries and keys rotated."""

    def biased(y_BTNH, name):
        # In float32, so that the bias's gradient is summed in it.
        return (
            (y_BTNH.astype(jnp.float32) + w[name][None, None]).astype(y_BTNH.dtype) if architecture.qkv_bias else y_BTNH
        )

    q_BTNH, k_BTKH, v_BTKH = biased(q_BTNH, "b_q"), biased(k_BTKH, "b_k"), biased(v_BTKH, "b_v")
    if architecture.qk_norm:
        q_BTNH = rms_norm(q_BTNH, w["q_norm"], architecture.rms_norm_eps)
        k_BTKH = rms_norm(k_BTKH, w["k_norm"], architecture.rms_norm_eps)
    return apply_rope(q_BTNH, *rope), apply_rope(k_BTKH, *rope), v_BTKH


class Parts(NamedTuple):
    """How the parts of a layer are computed: of global arrays, or inside shard_map of one device's share.

    matmul(equation, x, w): an activation by a stored weight, as `adapters.use` gives it, in x's dtype.
    attend(q_BTNH, k_BTKH, v_BTKH) -> [B, T, N, H]. feedforward(h_BTD, w_gate, w_up, w_down) -> [B, T, D], or of
    experts, which takes weight_BTX and expert_BTX behind h_BTD. reduce: the sum over tp of what each device has of
    [B, T, D]. remat_*: around each half.
    """

    matmul: Callable[..., jax.Array]
    attend: Callable[..., jax.Array]
    feedforward: Callable[..., jax.Array]
    reduce: Callable[[jax.Array], jax.Array] = lambda x_BTD: x_BTD
    remat_attention: Callable[[Callable], Callable] = lambda function: function
    remat_feedforward: Callable[[Callable], Callable] = lambda function: function


def apply_layer(
    architecture: Architecture, w: Params, x_BTD: jax.Array, rope: Rope, parts: Parts
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], RouterOutput | None]:
    """(x_BTD, (k_BTKH, v_BTKH) for whoever keeps them, what the router chose or None); w: the weights of a Layer."""
    matmul, eps = parts.matmul, architecture.rms_norm_eps

    def attention(x_BTD):
        h_BTD = rms_norm(x_BTD, w["attention_norm"], eps)
        q_BTNH = matmul("BTD,DNH->BTNH", h_BTD, use(w, "w_q"))
        k_BTKH, v_BTKH = (matmul("BTD,DKH->BTKH", h_BTD, use(w, name)) for name in ("w_k", "w_v"))
        q_BTNH, k_BTKH, v_BTKH = attention_operands(architecture, w, q_BTNH, k_BTKH, v_BTKH, rope)
        out_BTNH = parts.attend(q_BTNH, k_BTKH, v_BTKH)
        return parts.reduce(matmul("BTNH,NHD->BTD", out_BTNH, use(w, "w_o"))), (k_BTKH, v_BTKH)

    def feedforward(x_BTD):
        h_BTD = rms_norm(x_BTD, w["feedforward_norm"], eps)
        weights = [use(w, name) for name in ("w_gate", "w_up", "w_down")]
        if not architecture.num_experts:
            return parts.reduce(parts.feedforward(h_BTD, *weights)), None
        choice = route(architecture, matmul("BTD,DE->BTE", h_BTD, w["w_router"]))
        return parts.reduce(parts.feedforward(h_BTD, choice.weight_BTX, choice.expert_BTX, *weights)), choice

    attended_BTD, keys_values = parts.remat_attention(attention)(x_BTD)
    x_BTD = x_BTD + attended_BTD
    fed_BTD, choice = parts.remat_feedforward(feedforward)(x_BTD)
    return x_BTD + fed_BTD, keys_values, choice
