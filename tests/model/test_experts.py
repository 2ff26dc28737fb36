"""The mixture of experts against every expert for every token."""

import jax
import jax.numpy as jnp
import numpy as np

from ringbpt.config import Architecture
from ringbpt.model.experts import Mixture, Routing, route
from ringbpt.model.grouped import make_grouped


def test_no_token_is_dropped_however_uneven_the_loads():
    rng = np.random.default_rng(0)
    x_BTD, E, F = jnp.asarray(rng.normal(size=(2, 8, 6)), jnp.float32), 4, 5
    w_gate, w_up = (jnp.asarray(rng.normal(size=(E, 6, F)), jnp.float32) for _ in range(2))
    w_down = jnp.asarray(rng.normal(size=(E, F, 6)), jnp.float32)
    expert_BTX = np.stack([np.zeros((2, 8)), rng.integers(1, 4, (2, 8))], -1).astype(np.int32)  # expert 0 takes all
    weight_BTX = rng.uniform(size=(2, 8, 2)).astype(np.float32)
    got = Mixture(make_grouped(jax.devices()[0]), E)(x_BTD, weight_BTX, expert_BTX, w_gate, w_up, w_down)
    gate, up = (np.einsum("BTD,EDF->BTEF", x_BTD, w) for w in (w_gate, w_up))
    every = np.einsum("BTEF,EFD->BTED", gate / (1 + np.exp(-gate)) * up, w_down)
    want = sum(
        weight_BTX[..., x, None] * np.take_along_axis(every, expert_BTX[..., x, None, None], 2)[:, :, 0] for x in (0, 1)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_routing_sums_over_layers_what_the_routers_chose():
    architecture = Architecture(num_experts=4, num_experts_per_tok=2, num_hidden_layers=3)
    logits = np.random.default_rng(1).normal(size=(3, 2, 5, 4)).astype(np.float32)
    routing = Routing.zeros(architecture, (2, 5))
    for layer in logits:
        routing = routing.add(route(architecture, jnp.asarray(layer)))
    p = np.asarray(jax.nn.softmax(logits, -1))
    np.testing.assert_allclose(routing.probability_BTE, p.sum(0), rtol=1e-6)
    chosen = np.argsort(-p, -1)[..., :2]
    np.testing.assert_array_equal(routing.chosen_BTE, np.sum(chosen[..., None] == np.arange(4), (0, 3)))
