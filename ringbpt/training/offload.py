"""The end of a step where weights, gradients or the optimizer's state live in the host's memory: piece by piece.

A piece is one layer of a stacked weight, or a weight that is not stacked; one after the other they come to the device,
with all that belongs to them, and go back, so that the device holds no more than one at a time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import keystr, tree_flatten_with_path

from ringbpt.host_memory import fetch, on_host, placed_like
from ringbpt.types import Params, PyTree

Pieces = dict[str, jax.Array]


def in_pieces(
    function: Callable[[Pieces, Any], tuple[Pieces, Any]], arrays: Pieces, carry: Any, stacked: bool
) -> tuple[Pieces, Any]:
    """function(pieces, carry) -> (some of the pieces anew, carry), of each piece in turn: (the arrays, the last carry).

    stacked: the arrays are [L, ...], and a piece is [1, ...] of each; else they are a single piece. What was in the
    host's memory is there again.
    """
    if not stacked:
        new, carry = function(fetch(arrays), carry)
        return arrays | {name: placed_like(x, arrays[name]) for name, x in new.items()}, carry

    def layer(i: jax.Array, state: tuple[Pieces, Any]) -> tuple[Pieces, Any]:
        arrays, carry = state
        new, carry = function({name: fetch(lax.dynamic_slice_in_dim(x, i, 1)) for name, x in arrays.items()}, carry)
        put = {
            name: lax.dynamic_update_slice_in_dim(arrays[name], placed_like(x, arrays[name]), i, 0)
            for name, x in new.items()
        }
        return arrays | put, carry

    layers = next(iter(arrays.values())).shape[0]
    return lax.fori_loop(0, layers, layer, (arrays, carry))


def _is_stacked(path: tuple) -> bool:
    return path[0].key == "layers"


def add(a: Params, b: Params) -> Params:
    """a + b, of gradients."""

    def leaf(path: tuple, a: jax.Array, b: jax.Array) -> jax.Array:
        if not on_host(a):
            return a + b
        both, _ = in_pieces(lambda x, none: ({"a": x["a"] + x["b"]}, none), {"a": a, "b": b}, (), _is_stacked(path))
        return both["a"]

    return jax.tree_util.tree_map_with_path(leaf, a, b)


def _add_square(pieces: Pieces, total: jax.Array) -> tuple[Pieces, jax.Array]:
    return {}, total + jnp.sum(jnp.square(pieces["x"]))


def norm(tree: Params) -> jax.Array:
    """The global norm, float32."""
    total = jnp.float32(0)
    for path, x in tree_flatten_with_path(tree)[0]:
        _, total = in_pieces(_add_square, {"x": x}, total, on_host(x) and _is_stacked(path))
    return jnp.sqrt(total)


def update(
    optimizer: optax.GradientTransformation,
    grads: Params,
    opt_state: PyTree,
    params: Params,
    factor: jax.Array,
    by_layer: bool,
    good: jax.Array | None = None,
) -> tuple[Params, PyTree, jax.Array]:
    """(params, opt_state, the norm of the params) after an update with factor * grads.

    The optimizer is called for one weight after the other: it must not look from one at another (clipping does, and is
    in the factor). by_layer: nor from one layer at another, and layers are stacked in front. good: whether anything is
    to change, bool []; None: it is.
    """
    state_leaves, state_def = tree_flatten_with_path(opt_state)
    state = {keystr(path): leaf for path, leaf in state_leaves}
    param_leaves, param_def = tree_flatten_with_path(params)
    new_params, state_after, square = [], dict(state), jnp.float32(0)
    for (path, param), grad in zip(param_leaves, jax.tree.leaves(grads), strict=True):
        one = _alone(path)
        own, own_def = _own_state(optimizer, path, param)
        mirrors = [name for name in own if name.endswith(keystr(path)) and state[name].shape == param.shape]
        shared = {name: state[name] for name in own if name not in mirrors}  # counters

        def piece(x: Pieces, carry: Any, one=one, own=own, own_def=own_def, shared=shared) -> tuple[Pieces, Any]:
            before = own_def.unflatten([x[name] if name in x else shared[name] for name in own])
            updates, after = optimizer.update(one(factor * x["grad"]), before, one(x["param"]))
            [param] = jax.tree.leaves(optax.apply_updates(one(x["param"]), updates))
            new = dict(zip(own, jax.tree.leaves(after), strict=True))
            pieces = {"param": param, **{name: leaf for name, leaf in new.items() if name not in shared}}
            if good is not None:
                before = dict(zip(own, jax.tree.leaves(before), strict=True))
                pieces = {name: jnp.where(good, leaf, x[name]) for name, leaf in pieces.items()}
                new |= {name: jnp.where(good, new[name], before[name]) for name in shared}
                param = pieces["param"]
            return pieces, (carry[0] + jnp.sum(jnp.square(param)), {name: new[name] for name in shared})

        arrays = {"param": param, "grad": grad, **{name: state[name] for name in mirrors}}
        done, (square, after) = in_pieces(piece, arrays, (square, shared), by_layer and _is_stacked(path))
        new_params.append(done["param"])
        state_after |= {name: done[name] for name in mirrors} | after
    leaves = [state_after[keystr(path)] for path, _ in state_leaves]
    return param_def.unflatten(new_params), state_def.unflatten(leaves), jnp.sqrt(square)


def init(optimizer: optax.GradientTransformation, params: Params, shardings: PyTree) -> PyTree:
    """optimizer.init(params), placed as `shardings` say: for one weight after the other, not to be jitted."""
    placed, state_def = tree_flatten_with_path(shardings)
    wanted = {keystr(path): sharding for path, sharding in placed}
    state: dict[str, jax.Array] = {}
    for path, param in tree_flatten_with_path(params)[0]:
        own, own_def = _own_state(optimizer, path, param)
        places = own_def.unflatten([wanted[name] for name in own])
        first = jax.jit(lambda one: optimizer.init(fetch(one)), out_shardings=places)(_alone(path)(param))
        state |= dict(zip(own, jax.tree.leaves(first), strict=True))
    return state_def.unflatten([state[keystr(path)] for path, _ in placed])


def _own_state(optimizer: optax.GradientTransformation, path: tuple, param: jax.Array) -> tuple[list[str], Any]:
    """What the optimizer keeps for the weight at that path, and for all: names as in the whole state, and the tree."""
    alone = _alone(path)(jax.ShapeDtypeStruct(param.shape, param.dtype))
    own, own_def = tree_flatten_with_path(jax.eval_shape(optimizer.init, alone))
    return [keystr(path) for path, _ in own], own_def


def _alone(path: tuple) -> Callable[[Any], Params]:
    """x -> the params tree that holds nothing but x, at that path."""

    def tree(x: Any) -> Params:
        for key in reversed(path):
            x = {key.key: x}
        return x

    return tree
