"""The SwiGLU feedforward, whole or blockwise: in chunks of each device's share of the sequence (BPT).

Blockwise it has a backward pass of its own that recomputes chunk by chunk, so neither pass holds more than one
chunk of the [T, F] activations, and the weights' gradients are summed over chunks in float32 and meet the other
devices once. That needs the loop inside shard_map: under the partitioner each chunk would bring its own reduction.
Ref: Blockwise Parallel Transformer, arXiv:2305.19370.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from ringbpt.attention.core import join, split
from ringbpt.dims import ACTIVATION_AXES, GATHERED_AXES, spec, weight_spec
from ringbpt.model import adapters
from ringbpt.model.quantised import IS_QUANTISED
from ringbpt.model.weights import dot, gather, project, scatter_grad
from ringbpt.reduction import Reduction


def swiglu(x_BTD, w_gate_DF, w_up_DF, w_down_FD, matmul: Callable) -> jax.Array:
    """down(silu(gate x) * up x). Ref: arXiv:2002.05202."""
    gate_BTF, up_BTF = matmul("BTD,DF->BTF", x_BTD, w_gate_DF), matmul("BTD,DF->BTF", x_BTD, w_up_DF)
    return matmul("BTF,FD->BTD", activated(gate_BTF, up_BTF), w_down_FD)


def activated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, of any shape, in their dtype."""
    return jax.nn.silu(gate) * up


def swiglu_backward(
    x: jax.Array, dy: jax.Array, w_gate: Any, w_up: Any, w_down: Any, gradient: Callable | None = None
) -> tuple[jax.Array, tuple[Any, Any, Any]]:
    """(dx in x's dtype, this part's share of the weights' gradients in float32), the activations computed again.

    By hand, so that weights' gradients are summed in float32 while every product has the compute dtype. gradient: as of
    adapters.back.
    """
    matmul = matmul_in(x.dtype)
    gate, up = matmul("BTD,DF->BTF", x, w_gate), matmul("BTD,DF->BTF", x, w_up)
    d_hidden, dw_down = adapters.back("BTF,FD->BTD", activated(gate, up), dy, w_down, dot, gradient)
    # What was activated is gone before its gradient is there, and so on: few arrays of [T, F] at any time.
    dw_down, d_hidden, gate, up = lax.optimization_barrier((dw_down, d_hidden, gate, up))
    d_gate, d_up = jax.vjp(activated, gate, up)[1](d_hidden)
    dx, dw_gate = adapters.back("BTD,DF->BTF", x, d_gate, w_gate, dot, gradient)
    more, dw_up = adapters.back("BTD,DF->BTF", x, d_up, w_up, dot, gradient)
    return dx + more, (dw_gate, dw_up, dw_down)


def matmul_in(dtype: jnp.dtype) -> Callable[..., jax.Array]:
    """matmul(equation, x, w) of what one device has, w being what `adapters.use` gave."""
    return partial(adapters.apply, dot=partial(dot, out_dtype=dtype))


def split_chunks(x: jax.Array, size: int) -> jax.Array:
    """[B, T, ...] -> [chunks, B, size, ...], inside shard_map."""
    return split(x, x.shape[1] // size, 1)


def join_chunks(chunks: jax.Array) -> jax.Array:
    """The inverse of split_chunks."""
    return join(chunks, 1)


def make_feedforward(
    mesh: Mesh, chunk_size: int | None, reduction: Reduction, keeps: bool = False
) -> Callable[..., jax.Array]:
    """feedforward(x_BTD, w_gate_DF, w_up_DF, w_down_FD) -> [B, T, D] in x's dtype.

    chunk_size None: in one piece, its activations saved for the backward unless rematerialised from outside.
    Otherwise in chunks of the local length, which chunk_size divides or exceeds. keeps: gathered weights, as of
    weights.project.
    """
    if chunk_size is None:
        return partial(swiglu, matmul=partial(project, mesh, reduction, keeps))

    def forward(x, w_gate, w_up, w_down):
        return swiglu(x, w_gate, w_up, w_down, matmul_in(x.dtype))

    def backward(*args):
        dx, dws = swiglu_backward(*args)
        return (dx,), dws

    return in_chunks(mesh, forward, backward, ("D F", "D F", "F D"), chunk_size, ("B T D",), reduction, keeps)


def in_chunks(
    mesh: Mesh,
    forward: Callable,
    backward: Callable,
    weights: tuple[str, ...],
    chunk_size: int | None,
    inputs: tuple[str, ...],
    reduction: Reduction,
    keeps: bool = False,
    learned: int = 1,
) -> Callable[..., jax.Array]:
    """function(*inputs, *weights) -> [B, T, D] in the first input's dtype, in chunks of each device's share of tokens.

    inputs, weights: their dims; a weight may have a pair beside it, as `adapters.use` gives it. chunk_size: divides the
    local length or exceeds it; None: one chunk. keeps: as of weights.project. For a chunk, and weights whole in D:
    forward(*chunk, *whole) -> [b, t, D], this device's part over tp; backward(*chunk, dy, *whole) -> (the gradients of
    the first `learned` inputs, those of the weights, which are summed over chunks in float32).
    """
    x_specs, count = tuple(spec(dims, ACTIVATION_AXES) for dims in inputs), len(inputs)

    def letters_of(ws):
        return [adapters.dims_of(dims, w) for dims, w in zip(weights, ws, strict=True)]

    def gathered(x, stored):
        return jax.tree.map(
            lambda w, letters: gather(w, mesh, letters, x.dtype), stored, letters_of(stored), is_leaf=IS_QUANTISED
        )

    def chunks_of(arrays):
        size = min(chunk_size or arrays[0].shape[1], arrays[0].shape[1])
        return tuple(split_chunks(a, size) for a in arrays)

    # Each device has its part of F: a chunk's output, and the gradients of its inputs, are summed over tp.
    def forward_local(whole, *args):
        return join_chunks(lax.map(lambda chunk: lax.psum(forward(*chunk, *whole), "tp"), chunks_of(args)))

    def backward_local(whole, *args):
        def chunk_backward(sums, chunk):
            grads, dws = backward(*chunk, *whole)
            return jax.tree.map(lambda s, dw: s + dw.astype(jnp.float32), sums, list(dws)), lax.psum(grads, "tp")

        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), list(map(adapters.learning, whole)))
        sums, grads = lax.scan(chunk_backward, zeros, chunks_of(args))
        letters = list(map(adapters.learning, letters_of(whole)))
        dws = jax.tree.map(partial(scatter_grad, reduction=reduction), sums, letters)
        dws, grads = reduction.first(dws, grads)
        return *map(join_chunks, grads), dws

    def on_shards(function, whole, in_specs, out_specs):
        whole_specs = jax.tree.map(lambda letters: spec(letters, GATHERED_AXES), letters_of(whole))
        specs = {"in_specs": (whole_specs, *in_specs), "out_specs": out_specs}
        return jax.shard_map(function, mesh=mesh, check_vma=False, **specs)

    @jax.custom_vjp
    def function(*args):
        return function_fwd(*args)[0]

    def function_fwd(*args):
        xs, stored = args[:count], list(args[count:])
        whole = gathered(xs[0], stored)
        return on_shards(forward_local, whole, x_specs, x_specs[0])(whole, *xs), (xs, whole if keeps else stored)

    def function_bwd(residuals, dy):
        xs, ws = residuals
        whole = ws if keeps else gathered(xs[0], ws)
        learning = jax.tree.map(weight_spec, list(map(adapters.learning, letters_of(whole))))
        specs = (*x_specs, x_specs[0]), (*x_specs[:learned], learning)
        *grads, dws = on_shards(backward_local, whole, *specs)(whole, *xs, dy)
        return *grads, *(None,) * (count - learned), *dws

    function.defvjp(function_fwd, function_bwd)
    return function
