"""Weights that stay as they are: no gradient, no optimizer state, not a bit changed; the others learn as before."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from ringbpt.config import Config, OptimizerConfig
from ringbpt.mesh import make_mesh, put_batch
from ringbpt.model.llama import Model
from ringbpt.model.weights import merge, part_of
from ringbpt.objectives import OBJECTIVES
from ringbpt.training.state import StateLayout, divide
from ringbpt.training.step import make_train_step
from tests.flags import llama_flags
from tests.model.helpers import CHEAP, LLAMA
from tests.objectives.test_objectives import batch_of

FROZEN = {"embed", "layers.w_gate", "norm"}


def test_a_tree_is_divided_and_merged_again():
    params = {"embed": 1, "layers": {"w_gate": 2, "w_q": 3}, "norm": 4}
    trained, frozen = divide(params, FROZEN.__contains__)
    assert (trained, frozen) == ({"layers": {"w_q": 3}}, {"embed": 1, "layers": {"w_gate": 2}, "norm": 4})
    assert merge(trained, frozen) == params == merge(frozen, trained)
    assert part_of(params, trained) == trained
    assert divide(params, lambda name: False) == (params, {})
    # An adapter stands beside what it adapts, below the weight's own name.
    assert merge({"w_q": {"a": 1, "b": 2}}, {"w_q": {"base": 3}}) == {"w_q": {"a": 1, "b": 2, "base": 3}}


def test_what_is_frozen_stays_and_the_rest_takes_the_same_step():
    llama = llama_flags(**LLAMA | CHEAP)
    config = Config(dtype="fp32", optimizer=OptimizerConfig(accumulate_gradient_steps=2), **llama)
    model = Model.of(config, make_mesh((1, 2, 1, 1)))
    host = batch_of([32, 20, 32, 7], [30, 20, 8, 7])
    batch = put_batch(lambda a, b: jax.tree.map(lambda x: x[a:b], host), (4, 32), model.mesh, "contiguous")
    params = jax.tree.map(np.asarray, model.init(jax.random.key(0)))
    after = {}
    for is_frozen in (FROZEN.__contains__, lambda name: False):
        layout = StateLayout(config, model, is_frozen)
        state = layout.start(params)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), layout.abstract) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
        step = make_train_step(layout, OBJECTIVES["sft"])
        state, metrics = step(state, batch)
        assert jax.tree.map(lambda x: x.sharding, state) == layout.shardings
        after[bool(state.frozen)] = state, float(metrics.means["loss"].value())
    (part, part_loss), (whole, whole_loss) = after[True], after[False]
    assert part_loss == whole_loss
    names = {keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(part.frozen)}
    assert names == FROZEN
    jax.tree.map(np.testing.assert_array_equal, part.frozen, part_of(params, part.frozen))
    moments = {keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(part.opt_state)}
    assert moments and not [name for name in moments if name.endswith(("mu.embed", "mu.layers.w_gate", "mu.norm"))]
    # AdamW's first step is the gradient's sign, which clipping by another norm leaves alone.
    assert optimizer_bytes(part) < optimizer_bytes(whole)
    for a, b in zip(jax.tree.leaves(part.trained), jax.tree.leaves(part_of(whole.trained, part.trained)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def optimizer_bytes(state) -> int:
    return sum(jnp.asarray(x).nbytes for x in jax.tree.leaves(state.opt_state))
