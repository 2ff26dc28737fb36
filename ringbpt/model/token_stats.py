"""The only place that touches the vocabulary: statistics of each token's prediction, [T, V] never whole.

In chunks of each device's share of the sequence, the vocabulary split over tp, with a backward pass that
recomputes the chunk's logits. What an objective may ask is in types.TokenStats.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from ringbpt.dims import ACTIVATION_AXES, spec, weight_spec
from ringbpt.model.feedforward import join_chunks, split_chunks
from ringbpt.model.weights import dot, gather_shards, scatter_grad
from ringbpt.reduction import Reduction
from ringbpt.types import TokenStats

# The logit of what is no token: its probability is zero, and zero times it is zero.
NO_TOKEN = -1e30


def make_token_stats(
    mesh: Mesh, chunk_size: int, vocab_size: int, reduction: Reduction, temperature: float = 1.0
) -> Callable[..., TokenStats]:
    """token_stats(hidden_BTD, unembed_DV, target_BT) -> TokenStats; logp and entropy are differentiable.

    They are of the softmax of logits / temperature, which a token that was sampled so was drawn from.
    chunk_size divides the local length or exceeds it. Columns of unembed from vocab_size on, there for tp to divide
    them, are no tokens. A target outside [0, vocab_size) has logp = -lse, and is for the loss mask to leave out.
    """
    hidden_spec, token_spec, w_spec = spec("B T D", ACTIVATION_AXES), spec("B T", ACTIVATION_AXES), weight_spec("D V")

    def logits_and_hits(hidden, whole_DV, target):
        """This device's part of the vocabulary: logits float32, and where the target stands in it."""
        logits = dot("BTD,DV->BTV", hidden, whole_DV, jnp.float32) / temperature
        token = (lax.axis_index("tp") * whole_DV.shape[1] + jnp.arange(whole_DV.shape[1]))[None, None]
        if whole_DV.shape[1] * mesh.shape["tp"] > vocab_size:
            logits = jnp.where(token < vocab_size, logits, NO_TOKEN)
        return logits, target[..., None] == token

    def chunk_stats(hidden, target, whole_DV):
        logits, hits = logits_and_hits(hidden, whole_DV, target)
        top = lax.pmax(jnp.max(logits, axis=-1), "tp")
        exps = jnp.exp(logits - top[..., None])
        total, weighted, target_logit = lax.psum(
            (jnp.sum(exps, -1), jnp.sum(exps * logits, -1), jnp.sum(jnp.where(hits, logits, 0.0), -1)), "tp"
        )
        lse = top + jnp.log(total)
        stats = TokenStats(
            logp_BT=target_logit - lse,
            entropy_BT=lse - weighted / total,
            correct_BT=(target_logit >= top).astype(jnp.float32),
        )
        return stats, lse

    def chunks_of(*arrays):
        return tuple(split_chunks(a, min(chunk_size, a.shape[1])) for a in arrays)

    def forward_local(hidden, unembed, target):
        whole = gather_shards(unembed, "D V", hidden.dtype)
        chunks = lax.map(lambda chunk: chunk_stats(chunk[0], chunk[1], whole), chunks_of(hidden, target))
        return jax.tree.map(join_chunks, chunks)

    def backward_local(hidden, unembed, target, lse, entropy, d_logp, d_entropy):
        whole = gather_shards(unembed, "D V", hidden.dtype)

        def chunk_backward(d_whole, chunk):
            hidden, target, lse, entropy, d_logp, d_entropy = chunk
            logits, hits = logits_and_hits(hidden, whole, target)
            logp = logits - lse[..., None]
            p = jnp.exp(logp)
            d_logits = d_logp[..., None] * (hits - p) - d_entropy[..., None] * p * (logp + entropy[..., None])
            d_logits = (d_logits / temperature).astype(hidden.dtype)
            d_hidden = lax.psum(dot("BTV,DV->BTD", d_logits, whole, jnp.float32), "tp").astype(hidden.dtype)
            return d_whole + dot("BTD,BTV->DV", hidden, d_logits, jnp.float32), d_hidden

        chunks = chunks_of(hidden, target, lse, entropy, d_logp, d_entropy)
        d_whole, d_hidden = lax.scan(chunk_backward, jnp.zeros(whole.shape, jnp.float32), chunks)
        return join_chunks(d_hidden), scatter_grad(d_whole, "D V", reduction)

    in_specs, w_specs = (hidden_spec, w_spec, token_spec), (hidden_spec, w_spec)
    on_shards = partial(jax.shard_map, mesh=mesh, check_vma=False)
    forward = on_shards(forward_local, in_specs=in_specs, out_specs=token_spec)
    backward = on_shards(backward_local, in_specs=(*w_specs, *(token_spec,) * 5), out_specs=w_specs)

    @jax.custom_vjp
    def token_stats(hidden_BTD, unembed_DV, target_BT):
        return forward(hidden_BTD, unembed_DV, target_BT)[0]

    def token_stats_fwd(hidden, unembed, target):
        stats, lse = forward(hidden, unembed, target)
        return stats, (hidden, unembed, target, lse, stats.entropy_BT)

    def token_stats_bwd(residuals, d_stats):
        return (*backward(*residuals, d_stats.logp_BT, d_stats.entropy_BT), None)

    token_stats.defvjp(token_stats_fwd, token_stats_bwd)
    return token_stats
