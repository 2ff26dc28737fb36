"""A mixture of experts in the feedforward's place: each token goes to the few that its router chooses, none dropped.

Blockwise like the dense one: in chunks of each device's share of the sequence, every expert split over tp in F. The
rows of a chunk are dealt out by expert (model/grouped.py), so the work is that of the chosen experts whatever their
loads are, but for a block of rows each, in part empty.
Ref: Mixtral, arXiv:2401.04088; dropless: MegaBlocks, arXiv:2211.15841.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from ringbpt.config import Architecture
from ringbpt.model.feedforward import activated, in_chunks
from ringbpt.model.grouped import Deal, Grouped, deal, make_grouped
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


@dataclass(frozen=True)
class Mixture:
    """The sum over a token's X experts of weight * swiglu(token; expert), on one device, which may have a part of F.

    weight_BTX: float32. expert_BTX: int32.
    """

    grouped: Grouped
    num_experts: int

    def __call__(self, x_BTD, weight_BTX, expert_BTX, w_gate_EDF, w_up_EDF, w_down_EFD) -> jax.Array:
        """[B, T, D] in x's dtype."""
        groups, rows = self._dealt(x_BTD, expert_BTX)
        hidden = activated(*(self.grouped.product(rows, w, groups) for w in (w_gate_EDF, w_up_EDF)))
        out = self.grouped.product(hidden, w_down_EFD, groups)[groups.place].astype(jnp.float32)
        out_BTXD = out.reshape(*weight_BTX.shape, -1)
        return jnp.sum(out_BTXD * weight_BTX[..., None], axis=2).astype(x_BTD.dtype)

    def backward(self, x_BTD, weight_BTX, expert_BTX, dy_BTD, *whole) -> tuple[tuple, list[jax.Array]]:
        """((dx in x's dtype, d_weight), the gradients of the three weights in float32), activations computed again.

        By hand: every gather's transpose is a gather too, where a sum of scattered rows would differ from run to run.
        """
        product, outer = self.grouped.product, self.grouped.outer
        (groups, rows), (w_gate, w_up, w_down), X = self._dealt(x_BTD, expert_BTX), whole, weight_BTX.shape[-1]
        dy, weight = groups.spread(dy_BTD.reshape(-1, dy_BTD.shape[-1]), X), groups.spread(weight_BTX.reshape(-1, 1))
        (hidden, back) = jax.vjp(activated, product(rows, w_gate, groups), product(rows, w_up, groups))
        # Of a row, before its weight: what the weight itself learns from, without the product that made its output.
        d_hidden = product(dy, w_down, groups, turned=True).astype(jnp.float32)
        d_weight = jnp.sum(hidden.astype(jnp.float32) * d_hidden, axis=1)[groups.place].reshape(weight_BTX.shape)
        dw_down = outer((hidden * weight).astype(hidden.dtype), dy, groups, self.num_experts)
        d_gate, d_up = back((d_hidden * weight).astype(hidden.dtype))
        dws = [outer(rows, d, groups, self.num_experts) for d in (d_gate, d_up)]
        dx = product(d_gate, w_gate, groups, turned=True) + product(d_up, w_up, groups, turned=True)
        dx_BTXD = dx[groups.place].reshape(*weight_BTX.shape, -1).astype(jnp.float32)
        return (jnp.sum(dx_BTXD, axis=2).astype(x_BTD.dtype), d_weight), [*dws, dw_down]

    def _dealt(self, x_BTD: jax.Array, expert_BTX: jax.Array) -> tuple[Deal, jax.Array]:
        block = self.grouped.block(expert_BTX.size, self.num_experts, x_BTD.dtype)
        groups = deal(expert_BTX.reshape(-1), self.num_experts, block)
        return groups, groups.spread(x_BTD.reshape(-1, x_BTD.shape[-1]), expert_BTX.shape[-1])


def make_mixture(mesh: Mesh, num_experts: int) -> Mixture:
    return Mixture(make_grouped(mesh.devices.flat[0]), num_experts)


def make_experts(
    mesh: Mesh, num_experts: int, chunk_size: int | None, reduction: Reduction, keeps: bool = False
) -> Callable[..., jax.Array]:
    """experts(x_BTD, weight_BTX, expert_BTX, w_gate_EDF, w_up_EDF, w_down_EFD) -> [B, T, D] in x's dtype.

    In chunks of the local length as the dense feedforward (None: one chunk), the backward recomputing each chunk.
    Differentiable in all but expert_BTX; weights' gradients are summed over chunks in float32. keeps: gathered weights,
    as of weights.project.
    """
    mixture = make_mixture(mesh, num_experts)
    inputs = ("B T D", "B T _", "B T _")
    return in_chunks(mesh, mixture, mixture.backward, WEIGHTS, chunk_size, inputs, reduction, keeps, learned=2)
