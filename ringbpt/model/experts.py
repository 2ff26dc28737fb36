"""A mixture of experts in the feedforward's place: each token goes to the few that its router chooses, none dropped.

Blockwise like the dense one: in chunks of each device's share of the sequence, every expert split over tp in F. The
rows of a chunk are sorted by expert and multiplied in groups (`jax.lax.ragged_dot`), so the work is that of the chosen
experts whatever their loads are. Ref: Mixtral, arXiv:2401.04088; dropless: MegaBlocks, arXiv:2211.15841.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from ringbpt.config import Architecture
from ringbpt.model.feedforward import activated, in_chunks
from ringbpt.reduction import Reduction

WEIGHTS = ("E D F", "E D F", "E F D")


class RouterOutput(NamedTuple):
    """What one router says of each token; X counts the experts that a token goes to."""

    weight_BTX: jax.Array  # float32, sums to 1
    expert_BTX: jax.Array  # int32
    probability_BTE: jax.Array  # float32, of all experts


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Sums over layers: how often a token went to each expert, and how probable each was; [B, T, E] float32."""

    chosen_BTE: jax.Array
    probability_BTE: jax.Array

    @staticmethod
    def zeros(architecture: Architecture, shape_BT: tuple[int, ...]) -> "Routing":
        nothing = jnp.zeros((*shape_BT, architecture.num_experts), jnp.float32)
        return Routing(nothing, nothing)

    def add(self, choice: RouterOutput) -> "Routing":
        chosen_BTE = jnp.sum(jax.nn.one_hot(choice.expert_BTX, self.chosen_BTE.shape[-1]), axis=2)
        return Routing(self.chosen_BTE + chosen_BTE, self.probability_BTE + choice.probability_BTE)


def route(architecture: Architecture, logits_BTE: jax.Array) -> RouterOutput:
    """The most probable experts of each token, their probabilities made to sum to 1."""
    probability_BTE = jax.nn.softmax(logits_BTE.astype(jnp.float32), axis=-1)
    weight_BTX, expert_BTX = lax.top_k(probability_BTE, architecture.num_experts_per_tok)
    return RouterOutput(weight_BTX / jnp.sum(weight_BTX, axis=-1, keepdims=True), expert_BTX, probability_BTE)


def mixture(num_experts: int, x_BTD, weight_BTX, expert_BTX, w_gate_EDF, w_up_EDF, w_down_EFD) -> jax.Array:
    """sum_x weight_x * swiglu(x; expert x), on one device: rows sorted by expert, multiplied in groups."""
    rows, X = x_BTD.reshape(-1, x_BTD.shape[-1]), expert_BTX.shape[-1]
    expert = expert_BTX.reshape(-1)
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.bincount(expert, length=num_experts).astype(jnp.int32)
    precision = "highest" if x_BTD.dtype == jnp.float32 else None

    def grouped(a, w):
        dot = partial(lax.ragged_dot, precision=precision, preferred_element_type=jnp.float32)
        return dot(a, w, sizes).astype(x_BTD.dtype)

    grouped_rows = rows[order // X]
    hidden = activated(grouped(grouped_rows, w_gate_EDF), grouped(grouped_rows, w_up_EDF))
    out = grouped(hidden, w_down_EFD)[jnp.argsort(order)].reshape(-1, X, x_BTD.shape[-1])
    weight = weight_BTX.reshape(-1, X, 1)
    return jnp.sum(out.astype(jnp.float32) * weight, axis=1).astype(x_BTD.dtype).reshape(x_BTD.shape)


def make_experts(
    mesh: Mesh, num_experts: int, chunk_size: int | None, reduction: Reduction, keeps: bool = False
) -> Callable[..., jax.Array]:
    """experts(x_BTD, weight_BTX, expert_BTX, w_gate_EDF, w_up_EDF, w_down_EFD) -> [B, T, D] in x's dtype.

    In chunks of the local length as the dense feedforward (None: one chunk), the backward recomputing each chunk.
    Differentiable in all but expert_BTX; weights' gradients are summed over chunks in float32. keeps: gathered weights,
    as of weights.project.
    """
    forward = partial(mixture, num_experts)

    def backward(x, weight, expert, dy, *whole):
        _, vjp = jax.vjp(lambda x, weight, *whole: forward(x, weight, expert, *whole), x, weight, *whole)
        dx, d_weight, *dws = vjp(dy)
        return (dx, d_weight), dws

    inputs = ("B T D", "B T _", "B T _")
    return in_chunks(mesh, forward, backward, WEIGHTS, chunk_size, inputs, reduction, keeps, learned=2)
