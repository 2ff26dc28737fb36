"""Products of rows with their own group's matrix, of every kind of device, against one product a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringbpt.model.experts import Mixture
from ringbpt.model.grouped import deal, make_grouped, ragged
from tests.attention.gpu_programs import arrays_on, compiled, kernels
from tests.planning.test_overlap import compiler

KINDS = {
    "loop": make_grouped(jax.devices()[0]),
    "triton": make_grouped(jax.devices()[0], interpret=True),
    "ragged": ragged(),
}
E, K, N = 5, 24, 40  # no multiples of what a GPU takes
LOADS = {
    "uneven": np.repeat(np.arange(E), [1, 0, 90, 16, 33]),  # nobody chose expert 1
    "one takes all": np.full(64, 3),
    "a row": np.array([4]),
}


def arrays(rows: int, dtype):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((rows, K), (rows, N), (E, K, N)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_each_row(kind, loads, dtype):
    how, expert = KINDS[kind], np.random.default_rng(1).permutation(LOADS[loads])
    a, b, w = arrays(len(expert), dtype)
    groups = deal(jnp.asarray(expert), E, how.block(len(expert), E, a.dtype))
    assert sorted(np.asarray(groups.row)[groups.place]) == list(range(len(expert)))
    block, chosen = len(groups.row) // len(groups.expert), min(len(expert), E)
    assert len(groups.expert) == chosen + (len(expert) - chosen) // block  # no more than any loads take
    got = how.product(groups.spread(a), w, groups), how.product(groups.spread(b), w, groups, turned=True)
    sums = how.outer(groups.spread(a), groups.spread(b), groups, E)
    a, b, w = (np.asarray(x, np.float64) for x in (a, b, w))
    want = np.einsum("rk,rkn->rn", a, w[expert]), np.einsum("rn,rkn->rk", b, w[expert])
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.01, "atol": 0.03}
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours[groups.place].astype(jnp.float32), theirs, **near)
    each = [a[expert == e].T @ b[expert == e] for e in range(E)]
    assert sums.dtype == jnp.float32
    np.testing.assert_allclose(sums, each, rtol=1e-4, atol=1e-4)  # sums in float32 of what both dtypes hold exactly


@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_is_the_gradient_of_every_expert_for_every_token(kind):
    rng, (B, T, X) = np.random.default_rng(2), (2, 24, 2)
    x = jnp.asarray(rng.normal(size=(B, T, K)), jnp.float32)
    weight = jnp.asarray(rng.uniform(size=(B, T, X)), jnp.float32)
    expert = jnp.asarray(np.argsort(rng.uniform(size=(B, T, E)), -1)[..., :X])
    ws = [jnp.asarray(rng.normal(size=shape), jnp.float32) / 5 for shape in ((E, K, N), (E, K, N), (E, N, K))]

    def dense(x, weight, w_gate, w_up, w_down):
        gate, up = (jnp.einsum("BTD,EDF->BTEF", x, w) for w in (w_gate, w_up))
        every = jnp.einsum("BTEF,EFD->BTED", jax.nn.silu(gate) * up, w_down)
        return jnp.sum(jnp.take_along_axis(every, expert[..., None], 2) * weight[..., None], 2)

    mixture = Mixture(KINDS[kind], E)
    y, back = jax.vjp(dense, x, weight, *ws)
    dy = jnp.asarray(rng.normal(size=y.shape), jnp.float32)
    np.testing.assert_allclose(mixture(x, weight, expert, *ws), y, rtol=1e-5, atol=1e-5)
    (dx, d_weight), dws = mixture.backward(x, weight, expert, dy, *ws)
    for ours, theirs in zip((dx, d_weight, *dws), back(dy), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


# --- for GPUs that aren't here ---


@pytest.mark.parametrize(
    ("name", "dtype", "tokens"),
    [
        ("a100", "bfloat16", 4096),
        *[
            pytest.param(name, *rest, marks=pytest.mark.slow)
            for name, *rest in (("h100", "bfloat16", 4096), ("a100", "float32", 4096), ("h100", "float32", 4096))
        ],
        *[pytest.param(name, "bfloat16", 1, marks=pytest.mark.slow) for name in ("a100", "h100")],  # as in decoding
    ],
)
def test_on_gpus_no_kernel_spills_and_no_array_has_all_experts_rows(name, dtype, tokens, tmp_path):
    """An eighth of Mixtral 8x7B's feedforward, and a chunk of 4,096 tokens."""
    machine, (E, D, F, X) = compiler(name), (8, 4096, 14336 // 8, 2)
    array, mixture = arrays_on(machine), Mixture(make_grouped(machine.devices[0]), E)
    x, weight, expert = (array((1, tokens, D), dtype), array((1, tokens, X), "float32"), array((1, tokens, X), "int32"))
    ws = [array(shape, dtype) for shape in ((E, D, F), (E, D, F), (E, F, D))]

    def both(x, weight, expert, dy, *ws):
        return mixture(x, weight, expert, *ws), mixture.backward(x, weight, expert, dy, *ws)

    program = compiled(machine, both, (x, weight, expert, x, *ws), tmp_path)
    ours = [kernel for kernel in kernels(tmp_path, machine) if "triton" in kernel.name]
    print(name, dtype, tokens, program.memory_analysis().temp_size_in_bytes, *ours, sep="\n  ")
    assert {kernel.name.split("__")[0] for kernel in ours} == {"triton_product_kernel", "triton_outer_kernel"}
    assert not [kernel for kernel in ours if kernel.spilled_bytes or kernel.registers > 255]
    rows = tokens * X + E * 128
    # Five arrays of rows as wide as the model are alive at most; of all experts' rows one is eight.
    assert program.memory_analysis().temp_size_in_bytes < 5 * rows * D * x.dtype.itemsize
