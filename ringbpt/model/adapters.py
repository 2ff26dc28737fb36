"""Low-rank pairs beside weights that stay as they are: where a layer's weights come into use, and what they do there.

A layer with adapters has, beside a matrix `w_q` of x -> y, `w_q_a` of x -> rank, `w_q_b` of rank -> y and the number
`w_q_scale`: y = x w_q + scale (x a) b, computed in the compute dtype. The pair is never added to a weight while it is
trained: in bfloat16 a change below 2^-8 of a weight would be nothing. Where any weight of a layer has a pair, no
matrix of the layer learns by itself, and no product is computed or kept for a gradient of one.
Ref: LoRA, arXiv:2106.09685.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ringbpt.dims import Dims
from ringbpt.types import Params

# Weights that may have a pair, and their dims: of x, and of y. `A` is the rank.
IN_OUT = {
    "w_q": ("D", "N H"), "w_k": ("D", "K H"), "w_v": ("D", "K H"), "w_o": ("N H", "D"),
    "w_gate": ("D", "F"), "w_up": ("D", "F"), "w_down": ("F", "D"),
}  # fmt: skip
A, B, SCALE = "_a", "_b", "_scale"


class Pair(NamedTuple):
    """The adapter of a weight: its rank and its scale, which alpha and the rank give."""

    weight: str
    rank: int
    scale: float

    def weights(self, rngs: nnx.Rngs, dims: Dims) -> dict[str, nnx.Param]:
        """Fresh ones: a uniform in +-1 / sqrt(the size of x), as PEFT draws it, and b zero: nothing changes yet."""
        dims, x = replace(dims, A=self.rank), IN_OUT[self.weight][0]
        a, b = (dims.shape(letters_of(self.weight + part)) for part in (A, B))
        bound = math.prod(dims.shape(x)) ** -0.5
        values = {
            A: jax.random.uniform(rngs.params(), a, jnp.float32, -bound, bound),
            B: jnp.zeros(b, jnp.float32),
            SCALE: jnp.float32(self.scale),
        }
        return {
            self.weight + part: nnx.Param(value, dims=letters_of(self.weight + part)) for part, value in values.items()
        }


class Low(NamedTuple):
    """A pair and its scale, float32 []; in place of a gradient, those of the pair alone."""

    a: Any
    b: Any
    scale: Any


class Fixed(NamedTuple):
    """A weight that does not learn, and its pair, if it has one; in place of a gradient, `base` is None."""

    base: Any
    low: Low | None


def letters_of(name: str) -> str:
    """The dims of a pair's weight or scale, by its name: "w_q_a" -> "D A"."""
    weight, _, part = name.rpartition("_")
    x, y = IN_OUT[weight]
    return {"a": f"{x} A", "b": f"A {y}", "scale": ""}[part]


def is_of_a_pair(name: str) -> bool:
    """Whether a weight, by its dotted name, is an adapter's, and learns where there are any."""
    return name.endswith((A, B))


def learning_names(w: Params) -> list[str]:
    """Which of a layer's weights learn: its pairs, or all where it has none."""
    return [name for name in w if is_of_a_pair(name)] or list(w)


def use(w: Params, name: str) -> Any:
    """The weight of a layer as the products below take it: an array, or Fixed where the layer has adapters."""
    if not any(map(is_of_a_pair, w)):
        return w[name]
    return Fixed(w[name], Low(w[name + A], w[name + B], w[name + SCALE]) if name + A in w else None)


def flat(name: str, grad: Any) -> Params:
    """The gradient of what `use` gave, by the names of a layer's weights; of what does not learn there is none."""
    if not isinstance(grad, Fixed):
        return {name: grad}
    return {name + A: grad.low.a, name + B: grad.low.b} if grad.low else {}


def dims_of(dims: str, w: Any) -> Any:
    """The dims of what `use` gave, in its place: of a weight "D F", "D F" or Fixed("D F", Low("D A", "A F", ""))."""
    if not isinstance(w, Fixed):
        return dims
    name = next((name for name, (x, y) in IN_OUT.items() if f"{x} {y}" == dims), "")
    return Fixed(dims, Low(*(letters_of(name + part) for part in (A, B, SCALE))) if w.low else None)


def learning(w: Any) -> Any:
    """What learns of what `use` gave, or of what belongs to it; the rest is None."""
    return Fixed(None, w.low and Low(w.low.a, w.low.b, None)) if isinstance(w, Fixed) else w


# --- products ---

Dot = Callable[[str, Any, Any], jax.Array]  # (equation, x, w) -> y


def split(equation: str) -> tuple[str, str]:
    """The two equations of a pair: "BTD,DNH->BTNH" -> ("BTD,DA->BTA", "BTA,ANH->BTNH")."""
    operands, y = equation.split("->")
    x, w = operands.split(",")
    inner = "".join(letter for letter in w if letter in x)
    outer = "".join(letter for letter in w if letter not in x)
    low = "".join(letter for letter in x if letter not in inner) + "A"
    return f"{x},{inner}A->{low}", f"{low},A{outer}->{y}"


def apply(equation: str, x: jax.Array, w: Any, dot: Dot, fixed: Dot | None = None) -> jax.Array:
    """y of what `use` gave, by products of arrays: dot, and fixed where the weight gets no gradient."""
    if not isinstance(w, Fixed):
        return dot(equation, x, w)
    y = (fixed or dot)(equation, x, w.base)
    if w.low is None:
        return y
    to_low, from_low = split(equation)
    more = dot(from_low, dot(to_low, x, w.low.a), w.low.b)
    return (y.astype(jnp.float32) + w.low.scale * more.astype(jnp.float32)).astype(y.dtype)


def back(
    equation: str, x: jax.Array, dy: jax.Array, w: Any, dot: Callable[..., jax.Array], gradient: Callable | None = None
) -> tuple[jax.Array, Any]:
    """(dx in x's dtype, the gradient of what `use` gave in float32) of one product, by dot(equation, a, b, dtype).

    By hand, so that a weight's gradient is summed in float32 while every product takes the compute dtype. gradient: a
    weight's by gradient(equation, x, dy), where that is not the product alone.
    """
    gradient = gradient or partial(dot, out_dtype=jnp.float32)
    operands, y_letters = equation.split("->")
    x_letters, w_letters = operands.split(",")
    towards_x, towards_w = f"{y_letters},{w_letters}->{x_letters}", f"{x_letters},{y_letters}->{w_letters}"
    if not isinstance(w, Fixed):
        return dot(towards_x, dy, w, x.dtype), gradient(towards_w, x, dy)
    dx = dot(towards_x, dy, w.base, x.dtype)
    if w.low is None:
        return dx, Fixed(None, None)
    to_low, from_low = split(equation)
    dz, d_b = back(from_low, dot(to_low, x, w.low.a, x.dtype), _scaled(w.low.scale, dy), w.low.b, dot, gradient)
    more, d_a = back(to_low, x, dz, w.low.a, dot, gradient)
    return dx + more, Fixed(None, Low(d_a, d_b, None))


def _scaled(scale: jax.Array, x: jax.Array) -> jax.Array:
    return (scale * x.astype(jnp.float32)).astype(x.dtype)
