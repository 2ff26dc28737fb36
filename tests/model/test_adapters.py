"""Low-rank pairs: the same numbers as their sum with the weight, wherever and however a layer is computed."""

import re
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringbpt.model.adapters import IN_OUT, SCALE, A, B, Pair, is_of_a_pair, split
from ringbpt.model.llama import Model
from ringbpt.model.weights import merge
from ringbpt.training.state import divide
from tests.model.helpers import make_batch, make_model

ALL = tuple(Pair(name, rank, 0.75 + 0.25 * rank) for rank, name in enumerate(IN_OUT, start=2))
SOME = (Pair("w_q", 4, 2.0), Pair("w_down", 3, 0.5))


def adapted(model: Model, pairs: tuple[Pair, ...]) -> Model:
    return replace(model, pairs=pairs)


def drawn(model: Model) -> Any:
    """Params with pairs that do something: b is zero at first."""
    params = model.init(jax.random.key(0))
    layers = dict(params["layers"])
    for number, name in enumerate(sorted(layers)):
        if name.endswith(B):
            layers[name] = 0.3 * jax.random.normal(jax.random.key(number), layers[name].shape)
    return params | {"layers": jax.device_put(layers, model.shardings["layers"])}


def merged(params: Any, pairs: tuple[Pair, ...], axis: int = 0) -> Any:
    """The weights of a plain model: w + scale a b."""
    layers = dict(params["layers"])
    for pair in pairs:
        a, b, scale = (
            jnp.moveaxis(layers.pop(pair.weight + part), axis if part != SCALE else 0, 0) for part in (A, B, SCALE)
        )
        low = jax.vmap(lambda a, b, s: s * jnp.tensordot(a, b, 1, precision="highest"))(a, b, scale)
        layers[pair.weight] = layers[pair.weight] + jnp.moveaxis(low, 0, axis)
    return params | {"layers": layers}


def loss_of(model: Model, batch: Any, frozen: Any) -> Any:
    def loss(trained: Any, fold: Any = lambda params: params) -> Any:
        stats = model.token_stats(fold(merge(trained, frozen)), batch)
        return -jnp.sum(batch.weight_BT * stats.logp_BT) / jnp.sum(batch.weight_BT)

    return loss


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.float64(x).ravel() for x in jax.tree.leaves(tree)])


@cache
def truth(pairs: tuple[Pair, ...], axis: int) -> tuple[float, np.ndarray]:
    """By a plain model of the sum of each weight and its pair, and jax's own gradient of that."""
    plain = make_model(attention_type="standard", scan_mlp=False, loss_chunk_size=32, param_scan_axis=axis)
    params = drawn(adapted(plain, pairs))
    trained, frozen = divide(params, lambda name: not is_of_a_pair(name))
    loss = loss_of(plain, make_batch(plain, rows=4, length=64), frozen)
    value, grads = jax.jit(jax.value_and_grad(lambda t: loss(t, lambda params: merged(params, pairs, axis))))(trained)
    return float(value), flat(grads)


WAYS = [
    ((1, 1, 1, 1), {"scan_mlp": False}, ALL),
    ((1, 1, 1, 4), {"scan_layers": False}, ALL),
    ((1, 2, 2, 2), {"param_scan_axis": 1, "remat_block": "nothing_saveable", "gathered_weights": "keep"}, ALL),
    ((1, 2, 2, 2), {"kv_heads_at_a_time": 1}, ALL),
    ((2, 1, 1, 2), {"kv_heads_at_a_time": 2, "gathered_weights": "keep"}, SOME),
    ((1, 1, 2, 1), {"attention_type": "blockwise"}, SOME),
]


@pytest.mark.parametrize(("mesh", "flags", "pairs"), WAYS)
def test_the_loss_and_gradients_of_the_sum(mesh, flags, pairs):
    kind = {"attention_type": "blockwise"} if mesh[3] == 1 else {}
    model = adapted(make_model(mesh, **kind | flags), pairs)
    trained, frozen = divide(drawn(model), lambda name: not is_of_a_pair(name))
    assert set(trained) == {"layers"} and all(map(is_of_a_pair, trained["layers"]))
    loss = loss_of(model, make_batch(model, rows=4, length=64), frozen)
    value, grads = jax.jit(jax.value_and_grad(loss))(trained)
    want, want_grads = truth(pairs, flags.get("param_scan_axis", 0))
    assert float(value) == pytest.approx(want, rel=1e-5)
    assert np.linalg.norm(flat(grads) - want_grads) <= 1e-4 * np.linalg.norm(want_grads)


def test_fresh_pairs_change_nothing_and_the_base_is_the_same():
    plain = make_model(attention_type="standard", scan_mlp=False)
    model = adapted(plain, ALL)
    params, base = model.init(jax.random.key(3)), plain.init(jax.random.key(3))
    for name, w in base["layers"].items():
        np.testing.assert_array_equal(params["layers"][name], w, err_msg=name)
    batch = make_batch(plain)
    ours, theirs = (m.token_stats(p, batch).logp_BT for m, p in ((model, params), (plain, base)))
    np.testing.assert_array_equal(ours, theirs)
    a = np.asarray(params["layers"]["w_o_a"])
    assert a.shape == (2, 4, 8, 5) and np.abs(a).max() <= 32**-0.5 and np.abs(a).max() > 0.9 * 32**-0.5
    assert np.asarray(params["layers"]["w_q_scale"]).tolist() == [1.25, 1.25]


def test_equations():
    assert split("BTD,DNH->BTNH") == ("BTD,DA->BTA", "BTA,ANH->BTNH")
    assert split("BTNH,NHD->BTD") == ("BTNH,NHA->BTA", "BTA,AD->BTD")
    assert split("GBTQ,GQD->BTD") == ("GBTQ,GQA->BTA", "BTA,AD->BTD")


def made(text: str, shape: tuple[int, ...]) -> list[str]:
    """The instructions of a compiled program whose product has this shape in float32, by a product or a sum.

    A copy into another layout may be a fusion too, of XLA's own name.
    """
    sides = ",".join(map(str, shape))
    sums = "dot|add|fusion|scatter|dynamic-update-slice"
    return re.findall(rf"%(?!wrapped_copy)\S+ = f32\[{sides}\]\S* ({sums})\(", text)


@pytest.mark.parametrize(
    ("flags", "share", "width"),
    [({"scan_mlp": False}, 0.72, 1280), ({"scan_mlp": True}, 0.80, 1280), ({"kv_heads_at_a_time": 1}, 0.80, 384)],
)
def test_no_gradient_of_the_base_is_computed(flags, share, width):
    """FLOPs as the compiler counts them, of a layer that is not scanned: of a loop it counts one turn of the body.

    The feedforward in chunks, and the layer in blocks, compute the forward once more in either case. width: of F, in
    one product; in blocks of two of its four parts, the others being 256.
    """
    flags |= {"num_hidden_layers": 1, "scan_layers": False, "attention_type": "standard", "scan_mlp_chunk_size": 256}
    flags |= {"attention_type": "blockwise"} if "kv_heads_at_a_time" in flags else {}
    sizes = {"hidden_size": 320, "intermediate_size": 1280, "vocab_size": 8, "loss_chunk_size": 256}
    plain = make_model(**flags, **sizes, num_key_value_heads=4, head_dim=80)
    batch, costs, gradients = make_batch(plain, rows=1, length=256), [], []
    for model in (plain, adapted(plain, tuple(Pair(name, 2, 1.0) for name in IN_OUT))):
        frozen_name = (lambda name: not is_of_a_pair(name)) if model.pairs else (lambda name: False)
        trained, frozen = divide(model.init(jax.random.key(0)), frozen_name)
        compiled = jax.jit(jax.grad(loss_of(model, batch, frozen))).lower(trained).compile()
        costs.append(compiled.cost_analysis()["flops"])
        gradients.append(made(compiled.as_text(), (320, width)) + made(compiled.as_text(), (width, 320)))
    assert costs[1] <= share * costs[0], costs
    assert gradients[0] and not gradients[1], gradients
