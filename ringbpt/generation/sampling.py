"""From logits to a token: greedy, or drawn with temperature, top-k, top-p, min-p and a repetition penalty.

In that order as transformers has it: penalty, temperature, top-k, top-p, min-p. All options but the choice between
greedy and drawn are values and not part of the program, so changing them compiles nothing.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ringbpt.config import UserError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 leave everything in."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "temperature": (0.0, 100.0), "top_k": (0, 2**31 - 1), "top_p": (1e-9, 1.0), "min_p": (0.0, 1.0),
            "repetition_penalty": (1e-3, 1e3), "seed": (0, 2**32 - 1),
        }  # fmt: skip
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if not least <= value <= most:
                nearest = min(max(value, least), most)
                raise UserError(f"--{name}={value} is not between {least:g} and {most:g}: --{name}={nearest:g} is")

    def numbers(self) -> tuple[float | int, ...]:
        return float(self.temperature), self.top_k, float(self.top_p), float(self.min_p), float(self.repetition_penalty)


class Options(NamedTuple):
    """Sampling's numbers: those of one that holds for all texts, or arrays, for `filtered` and `penalise` [P, 1]."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array


def penalise(logits_PV: jax.Array, seen_PV: jax.Array, penalty: jax.Array) -> jax.Array:
    """Tokens of the prompt and of the text so far made less likely. Ref: CTRL, arXiv:1909.05858."""
    less_PV = jnp.where(logits_PV > 0, logits_PV / penalty, logits_PV * penalty)
    return jnp.where(seen_PV, less_PV, logits_PV)


def filtered(logits_PV: jax.Array, options: Options) -> jax.Array:
    """Logits at the temperature, -inf where a token is left out; the likeliest is always in."""
    logits_PV = logits_PV / jnp.maximum(options.temperature, 1e-6)
    order_PV = jnp.argsort(-logits_PV, axis=-1, stable=True)
    rank_PV = jnp.argsort(order_PV, axis=-1)
    sorted_PV = jnp.take_along_axis(logits_PV, order_PV, axis=-1)
    places = jnp.arange(logits_PV.shape[-1])[None]
    in_k = (options.top_k == 0) | (places < options.top_k)
    p_PV = jax.nn.softmax(jnp.where(in_k, sorted_PV, -jnp.inf), axis=-1)
    before_PV = jnp.cumsum(p_PV, axis=-1) - p_PV  # the mass of all that are likelier
    in_p = (before_PV < options.top_p) & in_k
    p_PV = jax.nn.softmax(jnp.where(in_p, sorted_PV, -jnp.inf), axis=-1)
    keep_PV = in_p & (p_PV >= options.min_p * p_PV[:, :1])
    keep_PV = jnp.take_along_axis(keep_PV | (places == 0), rank_PV, axis=-1)
    return jnp.where(keep_PV, logits_PV, -jnp.inf)


def draw(logits_PV: jax.Array, seed_P: jax.Array, number_P: jax.Array, count_P: jax.Array) -> jax.Array:
    """A token for each of P texts, int32, from `filtered` logits.

    A text's seed, its number among those of its seed, uint32 both, and the tokens that it has decide alone: not what
    stands beside it in the batch.
    """

    def one(logits_V, seed, number, count):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), count)
        return jax.random.categorical(key, logits_V)

    return jax.vmap(one)(logits_PV, seed_P, number_P, count_P).astype(jnp.int32)


def token_logp(logits_PV: jax.Array, token_P: jax.Array) -> jax.Array:
    """The log-probability of each text's token, float32, in nats."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits_PV), token_P[:, None], axis=-1)[:, 0]
