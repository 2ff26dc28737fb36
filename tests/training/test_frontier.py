"""What trades time for memory changes no number: residuals over tp, layers' inputs, optimizer state, weights and
gradients on the host, layers in blocks with a few kv heads at a time."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from ringbpt.config import UserError, parse, parse_args
from ringbpt.mesh import make_mesh
from ringbpt.model.llama import Model
from ringbpt.objectives import OBJECTIVES
from ringbpt.training.memory import account
from ringbpt.training.state import StateLayout
from ringbpt.training.step import make_train_step
from ringbpt.types import Batch

FLAGS = [
    "--config=tests/recipe.py",
    "--train_dataset.python_dataset.seq_length=128",
    "--train_dataset.python_dataset.batch_size=2",
    "--eval_steps=0",
    "--mesh_dim=1,1,2,4",
    "--llama.intermediate_size=64",
    "--llama.num_hidden_layers=2",
    "--llama.hidden_size=64",
    "--llama.num_attention_heads=8",
    "--llama.num_key_value_heads=4",
    "--llama.qkv_bias",
    "--llama.qk_norm",
]


def steps(*flags: str) -> tuple[list[float], object]:
    """(the losses of three steps, the state after them)."""
    config = parse(parse_args([*FLAGS, *flags]), 8)
    model = Model.of(config, make_mesh(config.mesh_shape))
    layout = StateLayout(config, model)
    state = layout.start(model.init(jax.random.key(0)))
    step = make_train_step(layout, OBJECTIVES["sft"])
    token = np.random.default_rng(0).integers(0, 256, (2, 129)).astype(np.int32)
    ones, place = np.ones((2, 128), np.int32), np.tile(np.arange(128, dtype=np.int32), (2, 1))
    batch = Batch(token[:, :-1], token[:, 1:], ones.astype(np.float32), place, ones)
    losses = []
    for _ in range(3):  # the first step's rate is 0
        state, metrics = step(state, batch)
        losses.append(float(metrics.means["loss"].value()))
    return losses, state


@pytest.fixture(scope="module")
def plain():
    return steps()[0]


RESIDUAL, INPUTS, STATE = "--llama.residual_over_tp", "--llama.remat_block=offload_inputs", "--optimizer.offload_state"
HEADS, PARAMS = "--llama.kv_heads_at_a_time=1", "--optimizer.offload_params"
ALL = (RESIDUAL, INPUTS, STATE, HEADS, PARAMS)


# Weights on the host want a remat policy.
ALONE = [(RESIDUAL,), (INPUTS,), (STATE,), (HEADS,), (PARAMS, "--llama.remat_block=nothing_saveable")]


@pytest.mark.parametrize(
    "flags",
    [(*ALL, "--optimizer.accumulate_gradient_steps=2"), *(pytest.param(f, marks=pytest.mark.slow) for f in ALONE)],
)
def test_they_change_no_number(flags, plain):
    losses, state = steps(*flags)
    assert losses == pytest.approx(plain, rel=1e-6)
    assert plain[0] > plain[2]
    assert memory_kinds(state.opt_state) == {"pinned_host" if STATE in flags else "device"}
    assert memory_kinds(state.trained) == {"pinned_host" if PARAMS in flags else "device"}


def memory_kinds(tree) -> set[str]:
    """Of its matrices: vectors stay on the device."""
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim > 1 and max(x.shape) > 64}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lion", "muon"])
def test_another_optimizer_does_the_same_layer_by_layer(kind):
    (losses, state), (away, offloaded) = steps(f"--optimizer.type={kind}"), steps(f"--optimizer.type={kind}", *ALL)
    assert away == pytest.approx(losses, rel=1e-6)
    close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(close, jax.device_get(offloaded.trained), jax.device_get(state.trained))
    jax.tree.map(close, jax.device_get(offloaded.opt_state), jax.device_get(state.opt_state))


def test_the_account_knows_them():
    config = parse(parse_args([*FLAGS, "--llama.remat_block=nothing_saveable"]), 8)
    base = account(config, 2, 128)
    over_tp = account(replace(config, execution=replace(config.execution, residual_over_tp=True)), 2, 128)
    assert over_tp["saved layer inputs"] == base["saved layer inputs"] / 2
    away = account(replace(config, optimizer=replace(config.optimizer, offload_state=True)), 2, 128)
    assert away["optimizer"] == 0 and away["params"] == base["params"]
    away = account(replace(config, optimizer=replace(config.optimizer, offload_params=True)), 2, 128)
    assert away["params"] == away["gradients"] == 0 and away["optimizer"] == base["optimizer"]


def test_tokens_that_tp_does_not_divide_are_refused():
    with pytest.raises(UserError, match=r"seq_length=132 is not divisible by sp\*tp=4\*2"):
        parse(parse_args([*(flag.replace("=128", "=132") for flag in FLAGS), "--llama.sequence_layout=contiguous",
                          "--llama.residual_over_tp"]), 8)  # fmt: skip
