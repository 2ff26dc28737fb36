"""Weights in 4 and 8 bits: each number by its definition, the same on every mesh, and few bytes on the way."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringbpt.mesh import make_mesh
from ringbpt.model.adapters import IN_OUT, Pair, is_of_a_pair
from ringbpt.model.quantised import LEVELS, Kept, Quantised, dequantised, quantise, stacked_dims
from ringbpt.model.weights import gather, merge
from ringbpt.planning.collectives import collective_bytes
from ringbpt.planning.hlo import parse
from ringbpt.training.state import divide
from tests.model.helpers import make_batch, make_model
from tests.model.test_adapters import flat, loss_of

KINDS = [Kept("nf4"), Kept("nf4", double=True), Kept("int8"), Kept("int8", double=True)]
SHAPES = [("D F", (128, 192)), ("N H D", (2, 8, 192)), ("L F D", (2, 64, 64)), ("D L K H", (64, 3, 2, 16))]


def drawn(shape: tuple[int, ...]) -> np.ndarray:
    w = np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)
    w[np.abs(w) < 0.01] = 0
    return w * np.float32(0.02)


@pytest.mark.parametrize("kept", KINDS)
@pytest.mark.parametrize(("dims", "shape"), SHAPES)
def test_each_number_is_the_nearest_level_of_its_block(kept, dims, shape):
    """By definition, in float64: of all levels times what is kept of the block's largest size the nearest."""
    w, axis = drawn(shape), dims.split().index("D")
    found = quantise(jnp.asarray(w), kept, dims)
    got = np.float64(dequantised(found, dims, jnp.float32))
    blocks = np.moveaxis(np.float64(w), axis, -1).reshape(-1, 64)
    got = np.moveaxis(got, axis, -1).reshape(-1, 64)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    levels = np.array(LEVELS) if kept.kind == "nf4" else np.arange(-127, 128) / 127
    scale = largest
    if kept.double:  # within 1 / 255 of the largest that they have in common, and above nothing
        across = dims.split().index("H" if "H" in dims else "F")
        tops = np.repeat(found.tops, found.scales.shape[across] // found.tops.shape[across], across)
        scale = np.moveaxis(np.float64(found.scales) * np.float64(tops), axis, -1).reshape(-1, 1)
        scale *= 1 if kept.kind == "nf4" else 127
        assert np.all(np.abs(scale - largest) <= largest.max() / 255)
        assert np.all((scale > 0) == (largest > 0))
    nearest = np.min(np.abs(blocks[..., None] - (levels * scale[..., None])), axis=-1)
    np.testing.assert_allclose(np.abs(blocks - got), nearest, rtol=0, atol=1e-6 * largest.max())


@pytest.mark.parametrize(("kept", "bits"), [*zip(KINDS, (4.5, 4.133, 8.5, 8.133), strict=True)])
def test_bits_of_a_number(kept, bits):
    abstract = kept.abstract(jax.ShapeDtypeStruct((4, 4096, 1024), jnp.float32), "L D F")
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    assert 8 * size / (4 * 4096 * 1024) == pytest.approx(bits, abs=0.001)


def test_nothing_is_nothing():
    """A block of zeros has no largest number to be divided by."""
    for kept in KINDS:
        found = quantise(jnp.zeros((64, 64)), kept, "D F")
        assert not np.asarray(dequantised(found, "D F", jnp.float32)).any()


def test_layers_one_by_one_are_the_stack():
    sizes = {"L": 3, "D": 64, "N": 2, "K": 2, "H": 8, "F": 64}
    for kept, name, axis in ((KINDS[1], "w_q", 0), (KINDS[1], "w_o", 1), (KINDS[2], "w_down", 1)):
        dims = stacked_dims(name, axis)
        w = jax.device_put(drawn(tuple(sizes[letter] for letter in dims.split())), jax.devices()[0])
        jax.tree.map(np.testing.assert_array_equal, kept.of_stack(w, dims), quantise(w, kept, dims))


PAIRS = tuple(Pair(name, rank, 0.5) for rank, name in enumerate(IN_OUT, start=2))
SIZES = {"hidden_size": 256, "intermediate_size": 768}  # a layer in blocks takes the feedforward in two parts
WAYS = [
    ((1, 1, 1, 1), {"scan_mlp": False, "attention_type": "blockwise"}),
    ((1, 2, 2, 2), {"param_scan_axis": 1, "remat_block": "nothing_saveable", "gathered_weights": "keep"}),
    ((1, 2, 2, 2), {"kv_heads_at_a_time": 1}),
    ((2, 1, 1, 4), {"scan_layers": False}),
]


@pytest.mark.parametrize(
    ("mesh", "flags", "kept"), [(*way, KINDS[1]) for way in WAYS] + [(*way, KINDS[2]) for way in WAYS[1:3]]
)
def test_the_loss_and_gradients_are_those_of_the_numbers_that_the_codes_stand_for(mesh, flags, kept):
    """Wherever a layer is computed; the pairs' gradients, for weights that stay have none."""
    model = replace(make_model(mesh, **SIZES | flags), pairs=PAIRS)
    axis = flags.get("param_scan_axis", 0)
    params = model.init(jax.random.key(1))
    layers = dict(params["layers"])
    for number, name in enumerate(sorted(layers)):
        if name.endswith("_b"):
            noise = 0.1 * jax.random.normal(jax.random.key(number), layers[name].shape)
            layers[name] = jax.device_put(noise, model.shardings["layers"][name])
    plain = dict(layers)
    for name in IN_OUT:
        dims = stacked_dims(name, axis)
        layers[name] = kept.of_stack(layers[name], dims)
        number = dequantised(layers[name], dims, jnp.float32)
        plain[name] = jax.device_put(number, model.shardings["layers"][name])
        assert all(x.sharding.spec == model.specs["layers"][name] for x in jax.tree.leaves(layers[name]))
    batch, found = make_batch(model, rows=4, length=64), []
    for stack in (layers, plain):
        trained, frozen = divide(params | {"layers": stack}, lambda name: not is_of_a_pair(name))
        assert merge(trained, frozen).keys() == params.keys()
        found.append(jax.jit(jax.value_and_grad(loss_of(model, batch, frozen)))(trained))
    (loss, grads), (want, want_grads) = found
    assert float(loss) == pytest.approx(float(want), rel=1e-6)
    assert np.linalg.norm(flat(grads) - flat(want_grads)) <= 1e-5 * np.linalg.norm(flat(want_grads))


@pytest.mark.parametrize(("kept", "share"), [*zip(KINDS, (0.282, 0.26, 0.532, 0.51), strict=True)])
def test_codes_travel_and_not_numbers(kept, share):
    """The bytes of a gather, read from the compiled program, as a share of bfloat16's."""
    mesh_shape = (1, 2, 1, 2)
    mesh, shape = make_mesh(mesh_shape), (4096, 1024)
    model = make_model(mesh_shape, **SIZES)
    sharding = model.shardings["layers"]["w_gate"]
    whole = jax.ShapeDtypeStruct((1, *shape), jnp.float32, sharding=sharding)
    abstract = kept.abstract(whole, "L D F")

    def one(stack: Quantised) -> jax.Array:
        return gather(jax.tree.map(lambda x: x[0], stack), mesh, "D F", jnp.bfloat16)

    program = jax.jit(one).lower(abstract).compile().as_text()
    sent = collective_bytes(parse(program), mesh_shape)
    assert set(sent) == {"fsdp+sp"} and set(sent["fsdp+sp"]) == {"all-gather"}
    bfloat16 = 2 * shape[0] * shape[1] * 3 / 4  # what a device receives of four devices' shares
    assert sent["fsdp+sp"].total() / bfloat16 <= share
