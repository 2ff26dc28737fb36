"""Sums over devices, in hops as on TPUs and by one collective: the same sums, and each part where it belongs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ringbpt import reduction
from ringbpt.bench.reduce import costs
from ringbpt.config import parse as parsed
from ringbpt.config import parse_args
from ringbpt.mesh import make_mesh
from ringbpt.planning.collectives import collective_bytes
from ringbpt.planning.hlo import parse
from ringbpt.planning.topologies import uncached
from ringbpt.reduction import Reduction
from tests.planning.test_overlap import compiler

pytestmark = pytest.mark.usefixtures("_compiled_here")
FSDP = ("fsdp", "sp")
TOKENS = PartitionSpec(("dp", "fsdp", "sp"))
PART = PartitionSpec(FSDP)


@pytest.fixture
def _compiled_here():
    """A CPU's program of hops that comes from jax's cache was seen to crash."""
    with uncached():
        yield


def summed(own: Reduction, shape, x, y):
    """x^T y over all tokens: as a product in parts, as a whole, and of the product's transpose, along its last dim."""

    def local(x, y):
        product = lambda part: jnp.einsum("td,tf->df", part, y)
        sums = (
            own.scatter_product(product, x, FSDP, 1, 0),
            own.scatter(product(x), FSDP, 0),
            own.scatter_product(lambda part: product(part).T, x, FSDP, 1, 1).T,
        )
        return tuple(own.everywhere(each, "dp") for each in sums)

    mapped = jax.shard_map(
        local, mesh=make_mesh(shape), in_specs=(TOKENS, TOKENS), out_specs=(PART,) * 3, check_vma=False
    )
    return jax.jit(mapped)(x, y)


@pytest.mark.parametrize(
    ("shape", "columns", "least"),
    [
        ((1, 1, 1, 8), 32, 1),  # one ring
        ((1, 1, 1, 8), 32, 8),  # four neighbours, then two groups
        ((1, 2, 1, 4), 32, 16),  # two neighbours, then four groups, of both axes
        ((2, 2, 1, 2), 32, 256),  # whole products, and another axis besides
        ((1, 1, 1, 8), 24, 1),  # parts that cannot be halved go one way
    ],
)
def test_hops_sum_as_one_collective_does(monkeypatch, shape, columns, least):
    monkeypatch.setattr(reduction, "LEAST_COLUMNS", least)
    x, y = (np.random.default_rng(n).integers(-8, 8, (64, n)).astype(np.float32) for n in (columns, 20))
    for own in (Reduction(in_hops=True), Reduction()):
        for found in summed(own, shape, x, y):
            np.testing.assert_array_equal(found, x.T @ y)


def test_bf16_is_what_travels_and_not_what_is_added():
    """Each of seven sendings rounds the sum so far once; each device's own term is added to it in float32."""
    x, y = (np.random.default_rng(n).uniform(0.5, 1, (64, n)).astype(np.float32) for n in (32, 20))
    exact = x.T @ y
    for found in summed(Reduction(jnp.bfloat16, in_hops=True), (1, 1, 1, 8), x, y):
        off = np.abs(found - exact) / exact
        assert 1e-4 < off.max() < 7 * 2**-9, off.max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_tpu_sends_what_it_must(dtype):
    """Of a product of n devices (n - 1) / n; a reduce-scatter would be compiled to an all-reduce, twice of it."""
    machine = compiler("v5p-16")
    mesh = make_mesh((1, 1, 1, 8), devices=machine.devices)
    own = Reduction.on(mesh, dtype)

    def local(x, y):
        product = lambda part: jnp.einsum("td,tf->df", part, y, preferred_element_type=jnp.float32)
        return own.scatter_product(product, x, FSDP, 1, 0)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(TOKENS, TOKENS), out_specs=PART, check_vma=False)
    x = jax.ShapeDtypeStruct((8192, 2048), jnp.bfloat16, sharding=NamedSharding(mesh, TOKENS))
    sent = collective_bytes(parse(machine.compile(jax.jit(mapped), x, x).as_text()), (1, 1, 1, 8))
    assert sent == {"sp": {"collective-permute": 2048 * 2048 * jnp.dtype(dtype).itemsize * 7 // 8}}


@pytest.mark.slow
def test_what_bf16_costs_is_measured_of_two_runs():
    """Both begin with the same weights; sums in bf16 turn the gradient a little, and the other run parts from this."""
    flags = ["--config=tests/recipe.py", "--mesh_dim=1,1,1,4", "--total_steps=12"]
    first, last = costs(parsed(parse_args(flags), 4), every=6)
    assert (first.step, last.step) == (6, 12)
    for cost in (first, last):
        assert 0 < 1 - cost.cosine < 1e-4 and 0 < abs(cost.norm - 1) < 1e-2
        assert cost.loss_in_bf16 == pytest.approx(cost.loss, rel=1e-2)
    assert last.loss != last.loss_in_bf16
