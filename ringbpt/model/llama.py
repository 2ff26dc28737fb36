"""LLaMA in Flax NNX: token ids and their places in, hidden states out; its layers stacked and scanned."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ringbpt.attention import MaskSpec, make_attention
from ringbpt.attention.api import SAVED_NAMES
from ringbpt.config import Config, LlamaConfig
from ringbpt.dims import Dims, weight_spec
from ringbpt.model.feedforward import make_feedforward
from ringbpt.model.rope import apply_rope, frequencies, rotation
from ringbpt.model.token_stats import make_token_stats
from ringbpt.model.weights import constrain_activation, embed, ones, project, weight
from ringbpt.types import Batch, Params, TokenMeta, TokenStats

COMPUTE_DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}

_policies = jax.checkpoint_policies
REMAT_POLICIES = {
    "everything_saveable": _policies.everything_saveable,
    "nothing_saveable": _policies.nothing_saveable,
    "dots_saveable": _policies.dots_saveable,
    "checkpoint_dots": _policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": _policies.dots_with_no_batch_dims_saveable,
    "checkpoint_dots_with_no_batch_dims": _policies.dots_with_no_batch_dims_saveable,
    # Keeps the ring's result (one more activation a layer), so that the backward never runs the ring again.
    "save_attention": _policies.save_only_these_names(*SAVED_NAMES),
}

# attention_type -> local implementation; those called ring_* let shares meet over sp, as sequence_parallel says.
ATTENTION_TYPES = {
    "standard": "reference",
    "blockwise": "blockwise",
    "ring_standard": "reference",
    "ring_blockwise": "blockwise",
}


def make_dims(config: LlamaConfig) -> Dims:
    assert config.num_key_value_heads is not None and config.head_dim is not None
    return Dims(
        L=config.num_hidden_layers,
        D=config.hidden_size,
        N=config.num_attention_heads,
        K=config.num_key_value_heads,
        H=config.head_dim,
        F=config.intermediate_size,
        V=config.vocab_size,
    )


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale, in float32; returns x's dtype. Ref: arXiv:1910.07467."""
    x = x_BTD.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return (x * scale_D[None, None]).astype(x_BTD.dtype)


class Block(nnx.Module):
    """The weights of one layer: attention, then feedforward."""

    def __init__(self, rngs: nnx.Rngs, dims: Dims, std: float):
        self.attention_norm = ones(dims, "D")
        self.w_q = weight(rngs, dims, "D N H", std)
        self.w_k = weight(rngs, dims, "D K H", std)
        self.w_v = weight(rngs, dims, "D K H", std)
        self.w_o = weight(rngs, dims, "N H D", std)
        self.feedforward_norm = ones(dims, "D")
        self.w_gate = weight(rngs, dims, "D F", std)
        self.w_up = weight(rngs, dims, "D F", std)
        self.w_down = weight(rngs, dims, "F D", std)


class Llama(nnx.Module):
    """All weights; `layers` is one Block whose arrays carry L at `param_scan_axis`, scanned over or not."""

    def __init__(self, rngs: nnx.Rngs, config: LlamaConfig):
        dims, std = make_dims(config), config.initializer_range
        self.embed = weight(rngs, dims, "V D", std)
        stack = nnx.vmap(Block, in_axes=(0, None, None), out_axes=config.param_scan_axis)
        self.layers = stack(rngs.split(dims.L), dims, std)
        self.norm = ones(dims, "D")
        if not config.tie_word_embeddings:
            self.unembed = weight(rngs, dims, "D V", std)


@dataclass(frozen=True)
class Model:
    """The functions of one model on one mesh. Params are a nested dict; nothing here holds an array."""

    config: Config
    mesh: Mesh

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 params, each device making only its own shards; the same numbers on every mesh."""
        return jax.jit(self._init, out_shardings=self.shardings)(key)

    def _init(self, key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(Llama(nnx.Rngs(params=key), self.config.llama), nnx.Param))

    @cached_property
    def specs(self) -> Any:
        """A PartitionSpec for each param."""
        state = nnx.eval_shape(lambda: nnx.state(Llama(nnx.Rngs(params=0), self.config.llama), nnx.Param))

        def leaf(path: tuple, param: nnx.Variable) -> PartitionSpec:
            entries = list(weight_spec(param.get_metadata("dims")))
            if path[0] == "layers":
                entries.insert(self.config.llama.param_scan_axis, None)
            return PartitionSpec(*entries)

        return nnx.to_pure_dict(nnx.map_state(leaf, state))

    @property
    def shardings(self) -> Any:
        return jax.tree.map(lambda s: NamedSharding(self.mesh, s), self.specs)

    @property
    def abstract_params(self) -> Any:
        """ShapeDtypeStructs with shardings: what a checkpoint restores into and what the planner compiles with."""
        shapes = jax.eval_shape(self._init, jax.random.key(0))
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.shardings)

    def token_stats(self, params: Params, batch: Batch) -> TokenStats:
        """What the model predicts at each place of a batch in layout order."""
        hidden_BTD = self.hidden(params, batch.token_BT, batch.meta)
        unembed_DV = params["embed"].T if self.config.llama.tie_word_embeddings else params["unembed"]
        return self._token_stats(hidden_BTD, unembed_DV, batch.target_BT)

    def hidden(self, params: Params, token_BT: jax.Array, meta: TokenMeta) -> jax.Array:
        """The last layer's normalised output, [B, T, D] in the compute dtype."""
        llama = self.config.llama
        x_BTD = embed(self.mesh, self._dtype, params["embed"], token_BT)
        rope = rotation(meta.position_BT, frequencies(llama))
        block = self._remat(lambda x, layer: self._block(layer, x, meta, rope), llama.remat_block)
        axis = llama.param_scan_axis
        if llama.scan_layers:
            layers = jax.tree.map(lambda w: jnp.moveaxis(w, axis, 0), params["layers"])
            x_BTD, _ = jax.lax.scan(lambda x, layer: (block(x, layer), None), x_BTD, layers)
        else:
            for i in range(llama.num_hidden_layers):
                layer = jax.tree.map(lambda w, i=i: jax.lax.index_in_dim(w, i, axis, keepdims=False), params["layers"])
                x_BTD = block(x_BTD, layer)
        return rms_norm(x_BTD, params["norm"], llama.rms_norm_eps)

    def _block(self, w: Params, x_BTD: jax.Array, meta: TokenMeta, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
        llama, mesh = self.config.llama, self.mesh

        def attention(x_BTD):
            h_BTD = rms_norm(x_BTD, w["attention_norm"], llama.rms_norm_eps)
            q_BTNH = apply_rope(project(mesh, "BTD,DNH->BTNH", h_BTD, w["w_q"]), *rope)
            k_BTKH = apply_rope(project(mesh, "BTD,DKH->BTKH", h_BTD, w["w_k"]), *rope)
            v_BTKH = project(mesh, "BTD,DKH->BTKH", h_BTD, w["w_v"])
            out_BTNH = self._attend(q_BTNH, k_BTKH, v_BTKH, meta.position_BT, meta.segment_BT)
            return project(mesh, "BTNH,NHD->BTD", out_BTNH, w["w_o"])

        def feedforward(x_BTD):
            h_BTD = rms_norm(x_BTD, w["feedforward_norm"], llama.rms_norm_eps)
            return self._feedforward(h_BTD, w["w_gate"], w["w_up"], w["w_down"])

        if not llama.remat_block:  # inside a rematerialised block another remat would run its part a third time
            attention = self._remat(attention, llama.remat_attention)
            feedforward = self._remat(feedforward, llama.remat_mlp)
        x_BTD = x_BTD + attention(x_BTD)
        return constrain_activation(x_BTD + feedforward(x_BTD), mesh, "B T D")

    def _remat(self, function: Callable, policy: str) -> Callable:
        if not policy:
            return function
        # The scan over layers already keeps the compiler from undoing the recomputation.
        return jax.checkpoint(function, policy=REMAT_POLICIES[policy], prevent_cse=not self.config.llama.scan_layers)

    @property
    def _dtype(self) -> jnp.dtype:
        return COMPUTE_DTYPES[self.config.dtype]

    @cached_property
    def _attend(self) -> Callable[..., jax.Array]:
        llama = self.config.llama
        return make_attention(
            self.mesh,
            strategy=llama.sequence_parallel if llama.attention_type.startswith("ring") else "none",
            local=ATTENTION_TYPES[llama.attention_type],
            mask=MaskSpec(causal=True),
            query_chunk_size=llama.scan_query_chunk_size,
            key_chunk_size=llama.scan_key_chunk_size,
            heads_k_stride=llama.heads_k_stride,
            ulysses_degree=llama.ulysses_degree,
        )

    @cached_property
    def _feedforward(self) -> Callable[..., jax.Array]:
        llama = self.config.llama
        return make_feedforward(self.mesh, llama.scan_mlp_chunk_size if llama.scan_mlp else None)

    @cached_property
    def _token_stats(self) -> Callable[..., TokenStats]:
        return make_token_stats(self.mesh, self.config.llama.loss_chunk_size)
