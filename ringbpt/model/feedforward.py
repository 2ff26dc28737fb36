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

    def forward(x, w_gate, w_up, w_down):
        return swiglu(x, w_gate, w_up, w_down, partial(dot, out_dtype=x.dtype))

    def backward(*args):
        dx, dws = swiglu_backward(*args)
        return (dx,), dws

    return in_chunks(mesh, forward, backward, ("D F", "D F", "F D"), chunk_size, ("B T D",))


def in_chunks(
    mesh: Mesh,
    forward: Callable,
    backward: Callable,
    weights: tuple[str, ...],
    chunk_size: int | None,
    inputs: tuple[str, ...],
    learned: int = 1,
) -> Callable[..., jax.Array]:
    """function(*inputs, *weights) -> [B, T, D] in the first input's dtype, in chunks of each device's share of tokens.

    inputs, weights: their dims. chunk_size: divides the local length or exceeds it; None: one chunk. For a chunk, and
    weights whole in D: forward(*chunk, *whole) -> [b, t, D], this device's part over tp; backward(*chunk, dy, *whole)
    -> (the gradients of the first `learned` inputs, those of the weights, which are summed over chunks in float32).
    """
    x_specs, w_specs = tuple(spec(dims, ACTIVATION_AXES) for dims in inputs), tuple(map(weight_spec, weights))
    d_dims, count = [dims.split().index("D") for dims in weights], len(inputs)

    def gathered(x, stored):
        return [gather_shards(w, dim, x.dtype) for w, dim in zip(stored, d_dims, strict=True)]

    def chunks_of(arrays):
        size = min(chunk_size or arrays[0].shape[1], arrays[0].shape[1])
        return tuple(split_chunks(a, size) for a in arrays)

    # Each device has its part of F: a chunk's output, and the gradients of its inputs, are summed over tp.
    def forward_local(*args):
        whole = gathered(args[0], args[count:])
        return join_chunks(lax.map(lambda chunk: lax.psum(forward(*chunk, *whole), "tp"), chunks_of(args[:count])))

    def backward_local(*args):
        whole = gathered(args[0], args[count + 1 :])

        def chunk_backward(sums, chunk):
            grads, dws = backward(*chunk, *whole)
            return [s + dw.astype(jnp.float32) for s, dw in zip(sums, dws, strict=True)], lax.psum(grads, "tp")

        zeros = [jnp.zeros(w.shape, jnp.float32) for w in whole]
        sums, grads = lax.scan(chunk_backward, zeros, chunks_of(args[: count + 1]))
        return *map(join_chunks, grads), *(scatter_grad(s, dim) for s, dim in zip(sums, d_dims, strict=True))

    on_shards = partial(jax.shard_map, mesh=mesh, check_vma=False)
    ahead = on_shards(forward_local, in_specs=x_specs + w_specs, out_specs=x_specs[0])
    back = on_shards(backward_local, in_specs=(*x_specs, x_specs[0], *w_specs), out_specs=x_specs[:learned] + w_specs)

    @jax.custom_vjp
    def function(*args):
        return ahead(*args)

    def function_bwd(args, dy):
        grads = back(*args[:count], dy, *args[count:])
        return *grads[:learned], *(None,) * (count - learned), *grads[learned:]

    function.defvjp(lambda *args: (function(*args), args), function_bwd)
    return function
