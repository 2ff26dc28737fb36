"""Weights: made from their dims, and used so that the partitioner gathers weights and never activations."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ringbpt.dims import ACTIVATION_AXES, GATHERED_AXES, Dims, spec, weight_spec


def weight(rngs: nnx.Rngs, dims: Dims, letters: str, std: float) -> nnx.Param:
    """A float32 matrix, normal with `std`: `weight(rngs, dims, "D N H", 0.02)`; its sharding is read off the dims."""
    return nnx.Param(std * jax.random.normal(rngs.params(), dims.shape(letters), jnp.float32), dims=letters)


def ones(dims: Dims, letters: str) -> nnx.Param:
    return nnx.Param(jnp.ones(dims.shape(letters), jnp.float32), dims=letters)


def constrain(x: jax.Array, mesh: Mesh, sharding: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, sharding))


def constrain_activation(x: jax.Array, mesh: Mesh, letters: str) -> jax.Array:
    return constrain(x, mesh, spec(letters, ACTIVATION_AXES))


def gather(w: jax.Array, mesh: Mesh, letters: str, dtype: jnp.dtype) -> jax.Array:
    """The weight as a matmul needs it: in the compute dtype, whole but for tp. Cast first: half the bytes travel."""
    return constrain(w.astype(dtype), mesh, spec(letters, GATHERED_AXES))


def dot(equation: str, a: jax.Array, b: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    """einsum accumulated in float32; float32 operands are not rounded to fewer bits on any device."""
    precision = "highest" if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32).astype(out_dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def project(mesh: Mesh, equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`project(mesh, "BTD,DNH->BTNH", x, w)`: an einsum of an activation with a stored weight, in x's dtype.

    The letters say the shardings: w is gathered over fsdp and sp just before use, the product is an activation,
    and w's gradient is summed and scattered to w's own sharding in float32, whatever dtype x has.
    """
    return _project_fwd(mesh, equation, x, w)[0]


def _letters(equation: str) -> tuple[str, str, str]:
    """ "BTD,DNH->BTNH" -> ("B T D", "D N H", "B T N H")."""
    operands, result = equation.split("->")
    x, w = operands.split(",")
    return " ".join(x), " ".join(w), " ".join(result)


def _project_fwd(mesh, equation, x, w):
    _, w_letters, y_letters = _letters(equation)
    y = dot(equation, x, gather(w, mesh, w_letters, x.dtype), x.dtype)
    return constrain_activation(y, mesh, y_letters), (x, w)


def _project_bwd(mesh, equation, residuals, dy):
    x, w = residuals
    x_letters, w_letters, y_letters = _letters(equation)
    x_term, w_term, y_term = (letters.replace(" ", "") for letters in (x_letters, w_letters, y_letters))
    dy = constrain_activation(dy, mesh, y_letters)
    dx = dot(f"{y_term},{w_term}->{x_term}", dy, gather(w, mesh, w_letters, x.dtype), x.dtype)
    dw = dot(f"{x_term},{y_term}->{w_term}", x, dy, jnp.float32)
    return constrain_activation(dx, mesh, x_letters), constrain(dw, mesh, weight_spec(w_letters)).astype(w.dtype)


project.defvjp(_project_fwd, _project_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def embed(mesh: Mesh, dtype: jnp.dtype, table_VD: jax.Array, token_BT: jax.Array) -> jax.Array:
    """The rows of the table that the tokens name, [B, T, D] in `dtype`; the gradient is summed in float32."""
    return _embed_fwd(mesh, dtype, table_VD, token_BT)[0]


def _embed_fwd(mesh, dtype, table_VD, token_BT):
    x_BTD = jnp.take(gather(table_VD, mesh, "V D", dtype), token_BT, axis=0)
    return constrain_activation(x_BTD, mesh, "B T D"), (table_VD, token_BT)


def _embed_bwd(mesh, dtype, residuals, dx_BTD):
    table_VD, token_BT = residuals
    dx_BTD = constrain_activation(dx_BTD, mesh, "B T D").astype(table_VD.dtype)
    # Said in two steps, or the partitioner would scatter the activations' D dim to where the table's is.
    d_table = constrain(jnp.zeros_like(table_VD).at[token_BT].add(dx_BTD), mesh, spec("V D", GATHERED_AXES))
    return constrain(d_table, mesh, weight_spec("V D")), None


embed.defvjp(_embed_fwd, _embed_bwd)
