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
from ringbpt.config import POLICIES, Architecture, Config, Execution, UserError
from ringbpt.config.lora import pairs_of
from ringbpt.dims import ACTIVATION_AXES, Dims, spec, weight_spec
from ringbpt.host_memory import fetch
from ringbpt.layouts import Order, order_of
from ringbpt.mesh import put_batch
from ringbpt.model.adapters import SCALE, Pair, is_of_a_pair
from ringbpt.model.experts import Routing, make_experts
from ringbpt.model.feedforward import make_feedforward
from ringbpt.model.layer import Layer, Parts, Rope, apply_layer, rms_norm, rope_of
from ringbpt.model.layer_in_blocks import LayerInBlocks
from ringbpt.model.token_stats import make_token_stats
from ringbpt.model.weights import (
    GATHERED,
    constrain,
    constrain_activation,
    dot,
    embed,
    merge,
    ones,
    part_of,
    project,
    weight,
)
from ringbpt.reduction import Reduction
from ringbpt.types import Batch, Params, TokenMeta, TokenStats

COMPUTE_DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}

LAYER_INPUT = "layer_input"
_policies = jax.checkpoint_policies


def _offload_inputs(*saved: str) -> Callable[..., Any]:
    """Each layer's input waits in the host's memory; on the device stays nothing but what has these names."""
    return _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=saved,
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    )


REMAT_POLICIES = {
    "everything_saveable": _policies.everything_saveable,
    "nothing_saveable": _policies.nothing_saveable,
    "dots_saveable": _policies.dots_saveable,
    "checkpoint_dots": _policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": _policies.dots_with_no_batch_dims_saveable,
    "checkpoint_dots_with_no_batch_dims": _policies.dots_with_no_batch_dims_saveable,
    # Keeps the ring's result (one more activation a layer), so that the backward never runs the ring again.
    "save_attention": _policies.save_only_these_names(*SAVED_NAMES),
    "offload_inputs": _offload_inputs(),
}


def _remat_policy(name: str, keeps: bool) -> Callable[..., Any]:
    """The policy; keeps: it saves the gathered weights besides."""
    if not keeps:
        return REMAT_POLICIES[name]
    if name == "offload_inputs":
        return _offload_inputs(GATHERED)
    return _policies.save_from_both_policies(REMAT_POLICIES[name], _policies.save_only_these_names(GATHERED))


# attention_type -> local implementation, where attention_kernel names none; those called ring_* let shares meet over
# sp, as sequence_parallel says.
ATTENTION_TYPES = {"standard": "reference", "blockwise": "auto", "ring_standard": "reference", "ring_blockwise": "auto"}


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


class Llama(nnx.Module):
    """All weights; `layers` is one Layer whose arrays carry L at `param_scan_axis`, scanned over or not."""

    def __init__(self, rngs: nnx.Rngs, config: Architecture, pairs: tuple[Pair, ...] = ()):
        dims, std = make_dims(config), config.initializer_range
        self.embed = weight(rngs, dims, "V D", std)
        # Numbers, one a layer, have no second axis.
        axes = nnx.StateAxes({lambda path, _: path[-1].endswith(SCALE): 0, ...: config.param_scan_axis})
        stack = nnx.vmap(Layer, in_axes=(0, None, None, None, None), out_axes=axes)
        self.layers = stack(rngs.split(dims.L), dims, std, config, pairs)
        self.norm = ones(dims, "D")
        if config.head != "score" and not config.tie_word_embeddings:
            self.unembed = weight(rngs, dims, "D V", std)
        if config.head != "unembed":
            self.score = weight(rngs, dims, "D", std)


def layer_of(layers: Params, i: int, axis: int) -> Params:
    """One layer's weights of a stack of all; numbers are stacked at 0."""
    return jax.tree.map(lambda w: jax.lax.index_in_dim(w, i, min(axis, w.ndim - 1), keepdims=False), layers)


@dataclass(frozen=True)
class Model:
    """The functions of one model on one mesh. Params are a nested dict; nothing here holds an array."""

    architecture: Architecture
    execution: Execution
    mesh: Mesh
    compute_dtype: str = "fp32"  # fp32 | bf16 | fp16; params are stored in float32 and cast where they are used
    pairs: tuple[Pair, ...] = ()  # the adapters of its layers' weights
    temperature: float = 1.0  # of the distribution that token_stats are of
    later: tuple[str, ...] = ()  # axes over which its matrices' gradients are not summed yet: training.late_sums

    @classmethod
    def of(cls, config: Config, mesh: Mesh) -> "Model":
        """The model that a training run's flags describe."""
        pairs = tuple(Pair(*pair) for pair in pairs_of(config.lora, config.architecture))
        temperature = config.rollout.temperature if config.objective in POLICIES else 1.0
        return cls(config.architecture, config.execution, mesh, config.dtype, pairs, temperature)

    @property
    def base(self) -> "Model":
        """The model without its adapters."""
        return replace(self, pairs=())

    def is_frozen(self, name: str) -> bool:
        """Whether a weight, by its dotted name, stays as it is: with adapters all but these and a fresh head."""
        return bool(self.pairs) and not is_of_a_pair(name) and name != "score"

    def check_kernel(self, seq_length: int, shared: bool = False) -> None:
        """Raises UserError where the kernel that was asked for cannot do it: now, and not when the step compiles.

        shared: documents may share their beginning (TokenMeta.last_BT).
        """
        kernel = self.execution.attention_kernel
        if kernel in ("auto", "reference", "blockwise"):
            return
        dims, rows = make_dims(self.architecture), self.mesh.shape["dp"] * self.mesh.shape["fsdp"]
        q, k = (jax.ShapeDtypeStruct((rows, seq_length, n, dims.H), self.dtype) for n in (dims.N, dims.K))
        place = jax.ShapeDtypeStruct(q.shape[:2], jnp.int32)

        def gradients(q, k, v, meta):
            return jax.vjp(lambda *qkv: self._attend(*qkv, meta), q, k, v)[1](q)

        try:
            jax.eval_shape(gradients, q, k, k, TokenMeta(place, place, place if shared else None))
        except NotImplementedError as refusal:
            raise UserError(f"--llama.attention_kernel={kernel}: {refusal}") from None

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 params, each device making only its own shards; the same numbers on every mesh."""
        return jax.jit(self._init, out_shardings=self.shardings)(key)

    def _init(self, key: jax.Array) -> Params:
        params = nnx.to_pure_dict(nnx.state(Llama(nnx.Rngs(params=key), self.architecture, self.pairs), nnx.Param))
        for name, (axis, size) in self.tables.items():
            if name in params and self.table_rows > size:
                widths = [(0, self.table_rows - size if dim == axis else 0) for dim in range(params[name].ndim)]
                params[name] = jnp.pad(params[name], widths)
        return params

    def with_fresh(self, params: Params, key: jax.Array) -> Params:
        """The params with fresh ones in place of those that are None or, of adapters, missing; as `init` makes them."""

        def missing(wanted: Params, there: Params) -> Params:
            inner = {name: missing(x, there[name]) for name, x in wanted.items() if isinstance(x, dict)}
            own = {name: x for name, x in wanted.items() if not isinstance(x, dict) and there.get(name) is None}
            return own | {name: x for name, x in inner.items() if x}

        if not (wanted := missing(self.shardings, params)):
            return params
        made = jax.jit(lambda key: part_of(self._init(key), wanted), out_shardings=wanted)(key)
        return merge({name: x for name, x in params.items() if x is not None}, made)

    @property
    def fresh(self) -> frozenset[str]:
        """The params that a checkpoint of another model may lack: a reward model's or a critic's head."""
        return frozenset(() if self.architecture.head == "unembed" else {"score"})

    @property
    def left(self) -> frozenset[str]:
        """The params that such a checkpoint may have besides: the head that is not read here."""
        head = self.architecture.head
        return frozenset({"unembed"} if head == "score" else {"score"} if head == "unembed" else ())

    @property
    def tables(self) -> dict[str, tuple[int, int]]:
        """The weights with a row for each token of the vocabulary: name -> (axis, how many there are)."""
        return {"embed": (0, self.architecture.vocab_size), "unembed": (1, self.architecture.vocab_size)}

    @property
    def table_rows(self) -> int:
        """Rows of those as they are stored, which tp divides; those behind the vocabulary's are zero, and stay it."""
        tp = self.mesh.shape["tp"]
        return -(-self.architecture.vocab_size // tp) * tp

    @cached_property
    def _declared(self) -> nnx.State:
        """Every param without its numbers, as its module declares it."""
        return nnx.eval_shape(lambda: nnx.state(Llama(nnx.Rngs(params=0), self.architecture, self.pairs), nnx.Param))

    @cached_property
    def specs(self) -> Any:
        """A PartitionSpec for each param."""

        def leaf(path: tuple, param: nnx.Variable) -> PartitionSpec:
            entries = list(weight_spec(param.get_metadata("dims")))
            if path[0] == "layers":
                entries.insert(min(self.architecture.param_scan_axis, len(entries)), None)
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

    def describe_tables(self) -> str:
        """What is to be said where the tables have more rows than the vocabulary; else empty."""
        size, rows = self.architecture.vocab_size, self.table_rows
        tp = self.mesh.shape["tp"]
        return f"{size:,} tokens in tables of {rows:,} rows, which tp={tp} divides" if rows > size else ""

    def token_stats(self, params: Params, batch: Batch, head: str = "unembed") -> TokenStats:
        """What the model says at each place of a batch in layout order, by the vocabulary, its "score" head, or "both".

        head "": by its routers alone.
        """
        hidden_BTD, routing = self._hidden(params, batch.token_BT, batch.meta)
        stats = TokenStats()
        if head in ("unembed", "both"):
            stats = self._token_stats(hidden_BTD, self.unembed(params), batch.target_BT)
        if head in ("score", "both"):
            stats = replace(stats, value_BT=self.score(params, hidden_BTD))
        if routing is None:
            return stats
        layers = self.architecture.num_hidden_layers
        return replace(stats, chosen_BTE=routing.chosen_BTE / layers, router_BTE=routing.probability_BTE / layers)

    def unembed(self, params: Params) -> jax.Array:
        """The unembedding, [D, table_rows]: the embedding's own table where they are tied."""
        return fetch(params["embed"]).T if self.architecture.tie_word_embeddings else fetch(params["unembed"])

    def score(self, params: Params, hidden_BTD: jax.Array) -> jax.Array:
        """The score head's number of each token, [B, T] float32, summed in it whatever the compute dtype."""
        return dot("BTD,D->BT", hidden_BTD.astype(jnp.float32), fetch(params["score"]), jnp.float32)

    def hidden(self, params: Params, token_BT: jax.Array, meta: TokenMeta) -> jax.Array:
        """The last layer's normalised output, [B, T, D] in the compute dtype."""
        return self._hidden(params, token_BT, meta)[0]

    def _hidden(self, params: Params, token_BT: jax.Array, meta: TokenMeta) -> tuple[jax.Array, Routing | None]:
        """(the last layer's normalised output, what the routers chose, summed over layers, None without experts)."""
        architecture, execution = self.architecture, self.execution
        x_BTD = embed(self.mesh, self.reduction, self.dtype, fetch(params["embed"]), token_BT)
        rope = rope_of(architecture, meta)

        def one(state, layer):
            layer = fetch(layer)  # inside what is computed again: the backward fetches it once more
            if execution.kv_heads_at_a_time:
                return self.layer_in_blocks(layer, state, meta)
            return self.layer(layer, state, meta, rope)[0]

        block = self._remat(one, execution.remat_block)
        axis = architecture.param_scan_axis
        state = (
            self._between_layers(x_BTD),
            Routing.zeros(architecture, token_BT.shape) if architecture.num_experts else None,
        )
        if execution.scan_layers:
            layers = jax.tree.map(lambda w: jnp.moveaxis(w, min(axis, w.ndim - 1), 0), params["layers"])
            state, _ = jax.lax.scan(lambda state, layer: (block(state, layer), None), state, layers)
        else:
            for i in range(architecture.num_hidden_layers):
                layer = layer_of(params["layers"], i, axis)
                state = block(state, layer)
        x_BTD, routing = state
        return rms_norm(x_BTD, fetch(params["norm"]), architecture.rms_norm_eps), routing

    def layer(self, w: Params, state: tuple[jax.Array, Routing | None], meta: TokenMeta, rope: Rope) -> tuple:
        """One layer: ((x_BTD, routing), (k_BTKH, v_BTKH)), the latter for whoever keeps them."""
        execution = self.execution
        product = partial(project, self.mesh, self.reduction, self.keeps)
        parts = Parts(product, partial(self._attend, meta=meta), self._feedforward)
        if not execution.remat_block:  # inside a rematerialised block another remat would run its part a third time
            parts = parts._replace(
                remat_attention=partial(self._remat, policy=execution.remat_attention),
                remat_feedforward=partial(self._remat, policy=execution.remat_mlp),
            )
        x_BTD, keys_values, choice = apply_layer(self.architecture, w, self._layer_input(state[0]), rope, parts)
        routing = state[1].add(choice) if state[1] and choice else None
        return (self._between_layers(x_BTD), routing), keys_values

    def layer_in_blocks(self, w: Params, state: tuple[jax.Array, None], meta: TokenMeta) -> tuple[jax.Array, None]:
        """One dense layer in blocks, attention kv_heads_at_a_time: the state that `layer` gives."""
        x_BTD = self._in_blocks(w, self._layer_input(state[0]), meta)
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
        # The scan over layers already keeps the compiler from undoing the recomputation. But XLA for GPUs takes the
        # backward's first turn out of its loop, and would begin with it during the loss.
        loop_is_whole = self.execution.scan_layers and self.mesh.devices.flat[0].platform != "gpu"
        saved = _remat_policy(policy, self.keeps)
        return jax.checkpoint(function, policy=saved, prevent_cse=not loop_is_whole)

    @property
    def keeps(self) -> bool:
        """Whether a layer's weights stay gathered from the forward to the backward."""
        return self.execution.gathered_weights == "keep"

    @property
    def dtype(self) -> jnp.dtype:
        return COMPUTE_DTYPES[self.compute_dtype]

    @property
    def mask(self) -> MaskSpec:
        return MaskSpec(causal=True, window=self.architecture.sliding_window)

    def put_batch(self, rows: Callable[[int, int], Batch], shape_BT: tuple[int, int]) -> Batch:
        """mesh.put_batch of rows of documents, in the order that the flags say."""
        return put_batch(rows, shape_BT, self.mesh, self.execution.sequence_layout, self.architecture.sliding_window)

    def order_of(self, meta: TokenMeta) -> Order:
        """How put_batch deals out rows with these places, host arrays in text order."""
        layout, window = self.execution.sequence_layout, self.architecture.sliding_window
        return order_of(layout, meta, self.mesh.shape["sp"], window)

    @property
    def attention(self) -> AttentionSpec:
        """What the flags ask of attention."""
        execution = self.execution
        kernel, rings = execution.attention_kernel, execution.attention_type.startswith("ring")
        return AttentionSpec(
            strategy=execution.sequence_parallel if rings else "none",
            local=ATTENTION_TYPES[execution.attention_type] if kernel == "auto" else kernel,
            mask=self.mask,
            query_chunk_size=execution.scan_query_chunk_size,
            key_chunk_size=execution.scan_key_chunk_size,
            heads_k_stride=execution.heads_k_stride,
            ulysses_degree=execution.ulysses_degree,
            bidirectional=execution.ring_bidirectional and rings,  # one device sends nothing, in whatever direction
            skip_hops=execution.ring_skip_hops,
            reduce_dtype=self.reduction.dtype,
        )

    @cached_property
    def reduction(self) -> Reduction:
        """How the gradients of weights, which all devices of fsdp and sp use, are summed."""
        return replace(Reduction.on(self.mesh, COMPUTE_DTYPES[self.execution.reduce_dtype]), later=self.later)

    @cached_property
    def _attend(self) -> Callable[..., jax.Array]:
        return make_attention(self.mesh, self.attention)

    @cached_property
    def _in_blocks(self) -> LayerInBlocks:
        assert self.execution.kv_heads_at_a_time is not None
        return LayerInBlocks(
            mesh=self.mesh,
            architecture=self.architecture,
            attention=make_sharded_attention(self.mesh, self.attention),
            letters={name: param.get_metadata("dims") for name, param in self._declared["layers"].items()},
            kv_heads=self.execution.kv_heads_at_a_time,
            chunk_size=self._chunk_size,
            reduction=self.reduction,
            keeps=self.keeps,
        )

    @property
    def _chunk_size(self) -> int | None:
        return self.execution.scan_mlp_chunk_size if self.execution.scan_mlp else None

    @cached_property
    def _feedforward(self) -> Callable[..., jax.Array]:
        experts = self.architecture.num_experts
        if experts:
            return make_experts(self.mesh, experts, self._chunk_size, self.reduction, self.keeps)
        return make_feedforward(self.mesh, self._chunk_size, self.reduction, self.keeps)

    @cached_property
    def _token_stats(self) -> Callable[..., TokenStats]:
        return make_token_stats(
            self.mesh, self.execution.loss_chunk_size, self.architecture.vocab_size, self.reduction, self.temperature
        )
