"""LLaMA in Flax NNX: token ids and their places in, hidden states out; its layers stacked and scanned."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ringbpt.attention import AttentionSpec, MaskSpec, make_attention
from ringbpt.attention.api import SAVED_NAMES, make_sharded_attention
from ringbpt.config import Architecture, Config, Execution, UserError
from ringbpt.dims import ACTIVATION_AXES, Dims, spec, weight_spec
from ringbpt.host_memory import fetch
from ringbpt.model.layer_in_blocks import LayerInBlocks
from ringbpt.model.experts import Routing, make_experts, route
from ringbpt.model.feedforward import make_feedforward
from ringbpt.model.rope import apply_rope, frequencies, rope_scale, rotation
from ringbpt.model.token_stats import make_token_stats
from ringbpt.model.weights import constrain, constrain_activation, embed, ones, project, weight, zeros
from ringbpt.types import Batch, Params, TokenMeta, TokenStats

COMPUTE_DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}

LAYER_INPUT = "layer_input"
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
    # Each layer's input waits in the host's memory: nothing of a layer stays on the device.
    "offload_inputs": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}

# attention_type -> local implementation, where attention_kernel names none; those called ring_* let shares meet over
# sp, as sequence_parallel says.
ATTENTION_TYPES = {
    "standard": "reference",
    "blockwise": "auto",
    "ring_standard": "reference",
    "ring_blockwise": "auto",
}


def make_dims(config: Architecture) -> Dims:
    assert config.num_key_value_heads is not None and config.head_dim is not None
    return Dims(
        L=config.num_hidden_layers,
        D=config.hidden_size,
        N=config.num_attention_heads,
        K=config.num_key_value_heads,
        H=config.head_dim,
        F=config.intermediate_size,
        V=config.vocab_size,
        E=config.num_experts,
    )


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last dim, in float32; returns x's dtype. Ref: arXiv:1910.07467."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


def queries_keys_values(
    architecture: Architecture, w: Params, h_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], matmul: Callable
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q_BTNH and k_BTKH, rotated, and v_BTKH of one layer; `matmul(equation, x, w)` says how weights are used."""
    q_BTNH = matmul("BTD,DNH->BTNH", h_BTD, w["w_q"])
    k_BTKH, v_BTKH = matmul("BTD,DKH->BTKH", h_BTD, w["w_k"]), matmul("BTD,DKH->BTKH", h_BTD, w["w_v"])
    return attention_operands(architecture, w, q_BTNH, k_BTKH, v_BTKH, rope)


def attention_operands(
    architecture: Architecture, w: Params, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, rope: tuple
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


class Block(nnx.Module):
    """The weights of one layer: attention, then feedforward; what only some families have comes last."""

    def __init__(self, rngs: nnx.Rngs, dims: Dims, std: float, config: Architecture):
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


class Llama(nnx.Module):
    """All weights; `layers` is one Block whose arrays carry L at `param_scan_axis`, scanned over or not."""

    def __init__(self, rngs: nnx.Rngs, config: Architecture):
        dims, std = make_dims(config), config.initializer_range
        self.embed = weight(rngs, dims, "V D", std)
        stack = nnx.vmap(Block, in_axes=(0, None, None, None), out_axes=config.param_scan_axis)
        self.layers = stack(rngs.split(dims.L), dims, std, config)
        self.norm = ones(dims, "D")
        if not config.tie_word_embeddings:
            self.unembed = weight(rngs, dims, "D V", std)


@dataclass(frozen=True)
class Model:
    """The functions of one model on one mesh. Params are a nested dict; nothing here holds an array."""

    architecture: Architecture
    execution: Execution
    mesh: Mesh
    compute_dtype: str = "fp32"  # fp32 | bf16 | fp16; params are stored in float32 and cast where they are used

    @staticmethod
    def of(config: Config, mesh: Mesh) -> "Model":
        """The model that a training run's flags describe."""
        return Model(config.architecture, config.execution, mesh, config.dtype)

    def check_kernel(self, seq_length: int) -> None:
        """Raises UserError where the kernel that was asked for cannot do it: now, and not when the step compiles."""
        kernel = self.execution.attention_kernel
        if kernel in ("auto", "reference", "blockwise"):
            return
        dims, rows = make_dims(self.architecture), self.mesh.shape["dp"] * self.mesh.shape["fsdp"]
        q, k = (jax.ShapeDtypeStruct((rows, seq_length, n, dims.H), self.dtype) for n in (dims.N, dims.K))
        place = jax.ShapeDtypeStruct(q.shape[:2], jnp.int32)

        def gradients(q, k, v, meta):
            return jax.vjp(lambda *qkv: self._attend(*qkv, meta), q, k, v)[1](q)

        try:
            jax.eval_shape(gradients, q, k, k, TokenMeta(place, place))
        except NotImplementedError as refusal:
            raise UserError(f"--llama.attention_kernel={kernel}: {refusal}") from None

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 params, each device making only its own shards; the same numbers on every mesh."""
        return jax.jit(self._init, out_shardings=self.shardings)(key)

    def _init(self, key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(Llama(nnx.Rngs(params=key), self.architecture), nnx.Param))

    @cached_property
    def _declared(self) -> nnx.State:
        """Every param without its numbers, as its module declares it."""
        return nnx.eval_shape(lambda: nnx.state(Llama(nnx.Rngs(params=0), self.architecture), nnx.Param))

    @cached_property
    def specs(self) -> Any:
        """A PartitionSpec for each param."""

        def leaf(path: tuple, param: nnx.Variable) -> PartitionSpec:
            entries = list(weight_spec(param.get_metadata("dims")))
            if path[0] == "layers":
                entries.insert(self.architecture.param_scan_axis, None)
            return PartitionSpec(*entries)

        return nnx.to_pure_dict(nnx.map_state(leaf, self._declared))

    @property
    def shardings(self) -> Any:
        return jax.tree.map(lambda s: NamedSharding(self.mesh, s), self.specs)

    @property
    def abstract_params(self) -> Any:
        """ShapeDtypeStructs with shardings: what a checkpoint restores into and what the planner compiles with."""
        shapes = jax.eval_shape(self._init, jax.random.key(0))
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.shardings)

    def token_stats(self, params: Params, batch: Batch, head: str = "unembed") -> TokenStats:
        """What the model predicts at each place of a batch in layout order; head "": without the vocabulary's part."""
        hidden_BTD, routing = self._hidden(params, batch.token_BT, batch.meta)
        stats = self._token_stats(hidden_BTD, self.unembed(params), batch.target_BT) if head else TokenStats()
        if routing is None:
            return stats
        layers = self.architecture.num_hidden_layers
        return replace(stats, chosen_BTE=routing.chosen_BTE / layers, router_BTE=routing.probability_BTE / layers)

    def unembed(self, params: Params) -> jax.Array:
        """The unembedding, [D, V]: the embedding's own table where they are tied."""
        return fetch(params["embed"]).T if self.architecture.tie_word_embeddings else fetch(params["unembed"])

    def hidden(self, params: Params, token_BT: jax.Array, meta: TokenMeta) -> jax.Array:
        """The last layer's normalised output, [B, T, D] in the compute dtype."""
        return self._hidden(params, token_BT, meta)[0]

    def _hidden(self, params: Params, token_BT: jax.Array, meta: TokenMeta) -> tuple[jax.Array, Routing | None]:
        """The same, and what the routers chose, summed over layers; None where there are no experts."""
        architecture, execution = self.architecture, self.execution
        x_BTD = embed(self.mesh, self.dtype, fetch(params["embed"]), token_BT)
        rope = self.rope(meta)

        def one(state, layer):
            layer = fetch(layer)  # inside what is computed again: the backward fetches it once more
            if execution.kv_heads_at_a_time:
                return self.layer(layer, state, meta)
            return self.block(layer, state, meta, rope)[0]

        block = self._remat(one, execution.remat_block)
        axis = architecture.param_scan_axis
        state = (
            self._between_layers(x_BTD),
            Routing.zeros(architecture, token_BT.shape) if architecture.num_experts else None,
        )
        if execution.scan_layers:
            layers = jax.tree.map(lambda w: jnp.moveaxis(w, axis, 0), params["layers"])
            state, _ = jax.lax.scan(lambda state, layer: (block(state, layer), None), state, layers)
        else:
            for i in range(architecture.num_hidden_layers):
                layer = jax.tree.map(lambda w, i=i: jax.lax.index_in_dim(w, i, axis, keepdims=False), params["layers"])
                state = block(state, layer)
        x_BTD, routing = state
        return rms_norm(x_BTD, fetch(params["norm"]), architecture.rms_norm_eps), routing

    def rope(self, meta: TokenMeta) -> tuple[jax.Array, jax.Array]:
        """(cos, sin) for the tokens' places."""
        architecture = self.architecture
        return rotation(meta.position_BT, frequencies(architecture), rope_scale(architecture))

    def block(self, w: Params, state: tuple[jax.Array, Routing | None], meta: TokenMeta, rope: tuple) -> tuple:
        """One layer: ((x_BTD, routing), (k_BTKH, v_BTKH)), the latter for whoever keeps them."""
        architecture, execution, mesh = self.architecture, self.execution, self.mesh

        def attention(x_BTD):
            h_BTD = rms_norm(x_BTD, w["attention_norm"], architecture.rms_norm_eps)
            q_BTNH, k_BTKH, v_BTKH = queries_keys_values(architecture, w, h_BTD, rope, partial(project, mesh))
            out_BTNH = self._attend(q_BTNH, k_BTKH, v_BTKH, meta)
            return project(mesh, "BTNH,NHD->BTD", out_BTNH, w["w_o"]), (k_BTKH, v_BTKH)

        def feedforward(x_BTD):
            h_BTD = rms_norm(x_BTD, w["feedforward_norm"], architecture.rms_norm_eps)
            if not architecture.num_experts:
                return self._feedforward(h_BTD, w["w_gate"], w["w_up"], w["w_down"]), None
            choice = route(architecture, project(mesh, "BTD,DE->BTE", h_BTD, w["w_router"]))
            out_BTD = self._experts(h_BTD, choice.weight_BTX, choice.expert_BTX, w["w_gate"], w["w_up"], w["w_down"])
            return out_BTD, choice

        if not execution.remat_block:  # inside a rematerialised block another remat would run its part a third time
            attention = self._remat(attention, execution.remat_attention)
            feedforward = self._remat(feedforward, execution.remat_mlp)
        x_BTD, routing = self._layer_input(state[0]), state[1]
        attended_BTD, keys_values = attention(x_BTD)
        x_BTD = x_BTD + attended_BTD
        fed_BTD, choice = feedforward(x_BTD)
        x_BTD = self._between_layers(x_BTD + fed_BTD)
        return (x_BTD, routing.add(choice) if routing else None), keys_values

    def layer(self, w: Params, state: tuple[jax.Array, None], meta: TokenMeta) -> tuple[jax.Array, None]:
        """A layer in blocks, attention kv_heads_at_a_time: what `block` makes of the state."""
        x_BTD = self._layer_in_blocks(w, self._layer_input(state[0]), meta)
        return self._between_layers(x_BTD), None

    def _layer_input(self, x_BTD: jax.Array) -> jax.Array:
        """What a layer computes with, of what it was handed; said of both, or all of it is saved for the backward."""
        x_BTD = checkpoint_name(self._between_layers(x_BTD), LAYER_INPUT)
        return constrain_activation(x_BTD, self.mesh, "B T D")

    def _between_layers(self, x_BTD: jax.Array) -> jax.Array:
        """The residual stream as it is handed from layer to layer, and saved for the backward."""
        axes = {**ACTIVATION_AXES, "T": ("sp", "tp")} if self.execution.residual_over_tp else ACTIVATION_AXES
        return constrain(x_BTD, self.mesh, spec("B T D", axes))

    def _remat(self, function: Callable, policy: str) -> Callable:
        if not policy:
            return function
        # The scan over layers already keeps the compiler from undoing the recomputation.
        return jax.checkpoint(function, policy=REMAT_POLICIES[policy], prevent_cse=not self.execution.scan_layers)

    @property
    def dtype(self) -> jnp.dtype:
        return COMPUTE_DTYPES[self.compute_dtype]

    @property
    def mask(self) -> MaskSpec:
        return MaskSpec(causal=True, window=self.architecture.sliding_window)

    @property
    def attention(self) -> AttentionSpec:
        """What the flags ask of attention."""
        execution = self.execution
        kernel = execution.attention_kernel
        return AttentionSpec(
            strategy=execution.sequence_parallel if execution.attention_type.startswith("ring") else "none",
            local=ATTENTION_TYPES[execution.attention_type] if kernel == "auto" else kernel,
            mask=self.mask,
            query_chunk_size=execution.scan_query_chunk_size,
            key_chunk_size=execution.scan_key_chunk_size,
            heads_k_stride=execution.heads_k_stride,
            ulysses_degree=execution.ulysses_degree,
            bidirectional=execution.ring_bidirectional,
            skip_hops=execution.ring_skip_hops,
        )

    @cached_property
    def _attend(self) -> Callable[..., jax.Array]:
        return make_attention(self.mesh, self.attention)

    @cached_property
    def _layer_in_blocks(self) -> LayerInBlocks:
        architecture, execution = self.architecture, self.execution
        assert execution.kv_heads_at_a_time is not None

        def operands(w, q_BTNH, k_BTKH, v_BTKH, meta: TokenMeta):
            return attention_operands(architecture, w, q_BTNH, k_BTKH, v_BTKH, self.rope(meta))

        return LayerInBlocks(
            mesh=self.mesh,
            attention=make_sharded_attention(self.mesh, self.attention),
            norm=partial(rms_norm, eps=architecture.rms_norm_eps),
            operands=operands,
            letters={name: param.get_metadata("dims") for name, param in self._declared["layers"].items()},
            kv_heads=execution.kv_heads_at_a_time,
            chunk_size=execution.scan_mlp_chunk_size if execution.scan_mlp else None,
        )

    @cached_property
    def _feedforward(self) -> Callable[..., jax.Array]:
        execution = self.execution
        return make_feedforward(self.mesh, execution.scan_mlp_chunk_size if execution.scan_mlp else None)

    @cached_property
    def _experts(self) -> Callable[..., jax.Array]:
        architecture, execution = self.architecture, self.execution
        return make_experts(
            self.mesh, architecture.num_experts, execution.scan_mlp_chunk_size if execution.scan_mlp else None
        )

    @cached_property
    def _token_stats(self) -> Callable[..., TokenStats]:
        return make_token_stats(self.mesh, self.execution.loss_chunk_size)
