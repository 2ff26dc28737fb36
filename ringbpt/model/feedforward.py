"""The SwiGLU feedforward, whole or blockwise: in chunks of each device's share of the sequence (BPT).

Blockwise it has a backward pass of its own that recomputes chunk by chunk, so neither pass holds more than one
chunk of the [T, F] activations, and the weights' gradients are summed over chunks in float32 and meet the other
devices once. That needs the loop inside shard_map: under the partitioner each chunk would bring its own reduction.
Ref: Blockwise Parallel Transformer, arXiv:2305.19370.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from ringbpt.dims import ACTIVATION_AXES, spec, weight_spec
from ringbpt.model.weights import dot, gather_shards, project, scatter_grad


def swiglu(x_BTD, w_gate_DF, w_up_DF, w_down_FD, matmul: Callable) -> jax.Array:
    """down(silu(gate x) * up x). Ref: arXiv:2002.05202."""
    gate_BTF, up_BTF = matmul("BTD,DF->BTF", x_BTD, w_gate_DF), matmul("BTD,DF->BTF", x_BTD, w_up_DF)
    return matmul("BTF,FD->BTD", jax.nn.silu(gate_BTF) * up_BTF, w_down_FD)


def swiglu_backward(
    x: jax.Array, dy: jax.Array, w_gate: jax.Array, w_up: jax.Array, w_down: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """(dx in x's dtype, this part's share of the weights' gradients in float32), the activations computed again.

    By hand, so that weights' gradients are summed in float32 while every product has the compute dtype.
    """
    matmul, weigh = partial(dot, out_dtype=x.dtype), partial(dot, out_dtype=jnp.float32)
    gate, up = matmul("BTD,DF->BTF", x, w_gate), matmul("BTD,DF->BTF", x, w_up)
    hidden, hidden_vjp = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
    d_gate, d_up = hidden_vjp(matmul("BTD,FD->BTF", dy, w_down))
    dx = matmul("BTF,DF->BTD", d_gate, w_gate) + matmul("BTF,DF->BTD", d_up, w_up)
    dws = weigh("BTD,BTF->DF", x, d_gate), weigh("BTD,BTF->DF", x, d_up), weigh("BTF,BTD->FD", hidden, dy)
    return dx, dws


def split_chunks(x: jax.Array, size: int) -> jax.Array:
    """[B, T, ...] -> [chunks, B, size, ...], inside shard_map."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def join_chunks(chunks: jax.Array) -> jax.Array:
    """The inverse of split_chunks."""
    x = jnp.moveaxis(chunks, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def make_feedforward(mesh: Mesh, chunk_size: int | None) -> Callable[..., jax.Array]:
    """feedforward(x_BTD, w_gate_DF, w_up_DF, w_down_FD) -> [B, T, D] in x's dtype.

    chunk_size None: in one piece, its activations saved for the backward unless rematerialised from outside.
    Otherwise in chunks of the local length, which chunk_size divides or exceeds.
    """
    if chunk_size is None:
        return partial(swiglu, matmul=partial(project, mesh))

    d_dims = (0, 0, 1)  # where D stands in w_gate, w_up, w_down
    x_spec = spec("B T D", ACTIVATION_AXES)
    w_specs = (weight_spec("D F"), weight_spec("D F"), weight_spec("F D"))

    def gathered(x, weights):
        return [gather_shards(w, dim, x.dtype) for w, dim in zip(weights, d_dims, strict=True)]

    def chunks_of(x):
        return split_chunks(x, min(chunk_size, x.shape[1]))

    # Each device has its part of F: a chunk's output, and the gradient of its input, are summed over tp.
    def forward_local(x, *weights):
        w_gate, w_up, w_down = gathered(x, weights)
        matmul = partial(dot, out_dtype=x.dtype)
        chunks = lax.map(lambda chunk: lax.psum(swiglu(chunk, w_gate, w_up, w_down, matmul), "tp"), chunks_of(x))
        return join_chunks(chunks)

    def backward_local(x, dy, *weights):
        whole = gathered(x, weights)

        def chunk_backward(sums, chunk):
            dx, dws = swiglu_backward(*chunk, *whole)
            return [s + dw for s, dw in zip(sums, dws, strict=True)], lax.psum(dx, "tp")

        zeros = [jnp.zeros(w.shape, jnp.float32) for w in whole]
        sums, dx = lax.scan(chunk_backward, zeros, (chunks_of(x), chunks_of(dy)))
        return join_chunks(dx), *(scatter_grad(s, dim) for s, dim in zip(sums, d_dims, strict=True))

    forward = jax.shard_map(forward_local, mesh=mesh, in_specs=(x_spec, *w_specs), out_specs=x_spec, check_vma=False)
    backward = jax.shard_map(
        backward_local, mesh=mesh, in_specs=(x_spec, x_spec, *w_specs), out_specs=(x_spec, *w_specs), check_vma=False
    )

    @jax.custom_vjp
    def feedforward(x, w_gate, w_up, w_down):
        return forward(x, w_gate, w_up, w_down)

    feedforward.defvjp(lambda *args: (feedforward(*args), args), lambda args, dy: backward(args[0], dy, *args[1:]))
    return feedforward
