"""Weights: made from their dims, and used so that the partitioner gathers weights and never activations."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ringbpt.dims import ACTIVATION_AXES, GATHERED_AXES, WEIGHT_AXES, Dims, spec, weight_spec
from ringbpt.model import adapters
from ringbpt.model.quantised import Quantised, dequantised
from ringbpt.reduction import Reduction
from ringbpt.types import Params, PyTree

FSDP = WEIGHT_AXES["D"]  # the axes over which a weight's D dim is split
# The name of gathered weights, for policies that keep them from the forward to the backward.
GATHERED = "gathered_weight"


def weight(rngs: nnx.Rngs, dims: Dims, letters: str, std: float) -> nnx.Param:
    """A float32 matrix, normal with `std`: `weight(rngs, dims, "D N H", 0.02)`; its sharding is read off the dims."""
    return nnx.Param(std * jax.random.normal(rngs.params(), dims.shape(letters), jnp.float32), dims=letters)


def ones(dims: Dims, letters: str) -> nnx.Param:
    return nnx.Param(jnp.ones(dims.shape(letters), jnp.float32), dims=letters)


def zeros(dims: Dims, letters: str) -> nnx.Param:
    return nnx.Param(jnp.zeros(dims.shape(letters), jnp.float32), dims=letters)


def is_matrix(name: str) -> bool:
    """Whether a Reduction sums the gradient of the weight of this name, and not the partitioner, as it does those of
    norms, biases and a score head.
    """
    return name.startswith("w_") or name in ("embed", "unembed")


def constrain(x: jax.Array, mesh: Mesh, sharding: PartitionSpec) -> jax.Array:
    return lax.with_sharding_constraint(x, NamedSharding(mesh, sharding))


def constrain_activation(x: jax.Array, mesh: Mesh, letters: str) -> jax.Array:
    return constrain(x, mesh, spec(letters, ACTIVATION_AXES))


def cast(w: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A stored weight in the compute dtype, without a second stack of all layers' weights beside the first.

    A TPU's compiler makes one ahead of the scan over layers: cast, where a layer's weights are cast by a conversion
    alone, so they are rounded by an operation of its own; and transposed, where products like them better so, and the
    layout is said.
    """
    w = with_layout_constraint(w, Layout(major_to_minor=tuple(range(w.ndim))))
    return (lax.reduce_precision(w, 8, 7) if dtype == jnp.bfloat16 else w).astype(dtype)


def gather_shards(w: Any, letters: str, dtype: jnp.dtype) -> jax.Array:
    """Inside shard_map: a matrix whole in D, where it has one, in the compute dtype; a number as it is.

    Cast first: half the bytes travel; of a quantised one its codes do.
    """
    if not letters:
        return w
    dims = letters.split()
    if isinstance(w, Quantised):
        whole = jax.tree.map(lambda x: lax.all_gather(x, FSDP, axis=dims.index("D"), tiled=True), w)
        return dequantised(whole, letters, dtype)
    return lax.all_gather(cast(w, dtype), FSDP, axis=dims.index("D"), tiled=True) if "D" in dims else cast(w, dtype)


def scatter_grad(dw: jax.Array, letters: str, reduction: Reduction) -> jax.Array:
    """Inside shard_map: the sum of every device's float32 gradient, each keeping its own part of D, where there is one.

    Of a weight that all devices of tp have, each has made the part that its heads or its part of F have a share in.
    """
    dims, others = letters.split(), _others(letters)
    if "D" not in dims:
        return reduction.everywhere(dw, (*others, *FSDP))
    return reduction.everywhere(reduction.scatter(dw, FSDP, dims.index("D")), others)  # the smaller of the two last


def _others(letters: str) -> tuple[str, ...]:
    """The axes other than FSDP over which each device has but a share of the gradient."""
    return ("dp",) if any(GATHERED_AXES.get(letter) for letter in letters) else ("dp", "tp")


def gather(w: Any, mesh: Mesh, letters: str, dtype: jnp.dtype) -> jax.Array:
    """A global weight, whole in its D dim and in the compute dtype: else the partitioner may gather the activations."""
    local = partial(gather_shards, letters=letters, dtype=dtype)
    specs = {"in_specs": weight_spec(letters), "out_specs": spec(letters, GATHERED_AXES)}
    return checkpoint_name(jax.shard_map(local, mesh=mesh, check_vma=False, **specs)(w), GATHERED)


def dot(equation: str, a: jax.Array, b: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    """einsum accumulated in float32; float32 operands are not rounded to fewer bits on any device."""
    precision = "highest" if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32).astype(out_dtype)


def project(mesh: Mesh, reduction: Reduction, keeps: bool, equation: str, x: jax.Array, w: Any) -> jax.Array:
    """`project(mesh, reduction, False, "BTD,DNH->BTNH", x, w)`: an activation times a stored weight, in x's dtype.

    The letters say the shardings: w is gathered over fsdp and sp just before use, the product is an activation,
    and w's gradient is summed in float32, whatever dtype x has, and scattered to w's own sharding by `reduction`.
    keeps: the backward takes the w that the forward gathered, and does not gather it again. w: what `adapters.use`
    gave.
    """
    learns, stays = (partial(_project, mesh, reduction, keeps, learns) for learns in (True, False))
    return adapters.apply(equation, x, w, learns, stays)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _project(
    mesh: Mesh, reduction: Reduction, keeps: bool, learns: bool, equation: str, x: jax.Array, w: jax.Array
) -> jax.Array:
    return _project_fwd(mesh, reduction, keeps, learns, equation, x, w)[0]


def _letters(equation: str) -> tuple[str, str, str]:
    """ "BTD,DNH->BTNH" -> ("B T D", "D N H", "B T N H")."""
    operands, result = equation.split("->")
    x, w = operands.split(",")
    return " ".join(x), " ".join(w), " ".join(result)


def _project_fwd(mesh, reduction, keeps, learns, equation, x, w):
    _, w_letters, y_letters = _letters(equation)
    whole = gather(w, mesh, w_letters, x.dtype)
    return constrain_activation(dot(equation, x, whole, x.dtype), mesh, y_letters), (x, whole if keeps else w)


def _project_bwd(mesh, reduction, keeps, learns, equation, residuals, dy):
    x, w = residuals
    every = x_letters, w_letters, y_letters = _letters(equation)
    x_term, w_term, y_term = (letters.replace(" ", "") for letters in every)
    dy = constrain_activation(dy, mesh, y_letters)
    whole = w if keeps else gather(w, mesh, w_letters, x.dtype)
    dx = dot(f"{y_term},{w_term}->{x_term}", dy, whole, x.dtype)
    dx = constrain_activation(dx, mesh, x_letters)
    if not learns:
        return dx, None
    in_specs = tuple(spec(letters, ACTIVATION_AXES) for letters in (x_letters, y_letters))
    gradient = jax.shard_map(
        partial(gradient_by_product, reduction, f"{x_term},{y_term}->{w_term}", others=("dp",)),
        mesh=mesh, in_specs=in_specs, out_specs=weight_spec(w_letters), check_vma=False,
    )  # fmt: skip
    dw, dx = reduction.first(gradient(x, dy), dx)
    return dx, dw


def gradient_by_product(
    reduction: Reduction, equation: str, x: jax.Array, dy: jax.Array, others: tuple[str, ...] | None = None
) -> jax.Array:
    """Inside shard_map: a weight's gradient by "BTD,BTF->DF", float32, summed over all tokens; this device's part of D.

    As scatter_grad of the product, of which there never is more than what one hop of the sum adds. others: the axes
    beside FSDP to sum over, as scatter_grad has them if not given.
    """
    operands, w_term = equation.split("->")
    x_term, y_term = operands.split(",")
    others = _others(w_term) if others is None else others

    def product(x: jax.Array, dy: jax.Array) -> jax.Array:
        return dot(equation, x, dy, jnp.float32)

    if "D" not in w_term:
        return reduction.everywhere(product(x, dy), (*others, *FSDP))
    operand, of_operand, term = (
        (x, lambda part: product(part, dy), x_term) if "D" in x_term else (dy, lambda part: product(x, part), y_term)
    )
    dw = reduction.scatter_product(of_operand, operand, FSDP, term.index("D"), w_term.index("D"))
    return reduction.everywhere(dw, others)


_project.defvjp(_project_fwd, _project_bwd)


def embed(mesh: Mesh, reduction: Reduction, dtype: jnp.dtype, table_VD: jax.Array, token_BT: jax.Array) -> jax.Array:
    """The rows of the table that the tokens name, [B, T, D] in `dtype`; the gradient is summed in float32, over dp by
    `reduction`.

    The table is never gathered: each device looks every token of its fsdp x sp group up in its own part of D, and an
    all-to-all trades D for tokens. So a device holds no more than its own activations and its own part of the table.
    """
    table_spec, token_spec, x_spec = weight_spec("V D"), spec("B T", ACTIVATION_AXES), spec("B T D", ACTIVATION_AXES)

    def lookup(table_vd, token_bt):
        """(rows of this device's part of V, tokens outside it at -1) for all tokens of the group, [fsdp*sp, b, t]."""
        token_Gbt = lax.all_gather(token_bt, FSDP)
        local = token_Gbt - lax.axis_index("tp") * table_vd.shape[0]
        return jnp.where((local >= 0) & (local < table_vd.shape[0]), local, -1)

    def forward(table_vd, token_bt):
        row_Gbt = lookup(table_vd, token_bt)
        x_Gbtd = jnp.where(row_Gbt[..., None] >= 0, jnp.take(table_vd.astype(dtype), row_Gbt, axis=0, mode="clip"), 0)
        x_Gbtd = lax.all_to_all(lax.psum(x_Gbtd, "tp"), FSDP, split_axis=0, concat_axis=0)
        return jnp.moveaxis(x_Gbtd, 0, 2).reshape(*token_bt.shape, -1)

    def backward(table_vd, token_bt, dx_btD):
        row_Gbt = lookup(table_vd, token_bt)
        dx_Gbtd = jnp.moveaxis(dx_btD.reshape(*token_bt.shape, row_Gbt.shape[0], -1), 2, 0)
        dx_Gbtd = lax.all_to_all(dx_Gbtd, FSDP, split_axis=0, concat_axis=0).astype(table_vd.dtype)
        # A row of -1 would count from the end: one past it is dropped instead.
        row_Gbt = jnp.where(row_Gbt < 0, table_vd.shape[0], row_Gbt)
        return reduction.everywhere(jnp.zeros_like(table_vd).at[row_Gbt].add(dx_Gbtd, mode="drop"), "dp")

    @jax.custom_vjp
    def rows(table_VD, token_BT):
        specs = {"in_specs": (table_spec, token_spec), "out_specs": x_spec}
        return jax.shard_map(forward, mesh=mesh, check_vma=False, **specs)(table_VD, token_BT)

    def rows_bwd(residuals, dx_BTD):
        specs = {"in_specs": (table_spec, token_spec, x_spec), "out_specs": table_spec}
        return jax.shard_map(backward, mesh=mesh, check_vma=False, **specs)(*residuals, dx_BTD), None

    rows.defvjp(lambda *args: (rows(*args), args), rows_bwd)
    return rows(table_VD, token_BT)


def merge(trained: Params, frozen: Params) -> Params:
    """One tree of weights out of two nested dicts, of which each holds leaves that the other doesn't."""
    both = {name: merge(trained[name], frozen[name]) for name in trained.keys() & frozen.keys()}
    return {**trained, **frozen, **both}


def part_of(tree: PyTree, part: Params) -> PyTree:
    """What of a nested dict, of weights or of what belongs to them, stands where `part` has leaves."""
    if not isinstance(part, dict):
        return tree
    return {name: part_of(tree[name], inner) for name, inner in part.items()}
