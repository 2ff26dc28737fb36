"""A vocabulary that tp does not divide: as if the rows that are added to its tables weren't there."""

import jax
import numpy as np
import pytest

from ringbpt.checkpoint.checkpointer import Checkpointer
from ringbpt.checkpoint.store import Entry, Wanted
from ringbpt.checkpoint.tensors import conversions, place
from ringbpt.config import Config, UserError, check_mesh
from ringbpt.config.families import FAMILIES
from ringbpt.generation.generator import Generator, plan_rows
from ringbpt.generation.sampling import Sampling
from tests.flags import llama_flags
from tests.model.helpers import CHEAP, LLAMA, assert_same, loss_and_grads, make_batch, make_model

SIZE = 63
MESHES = {1: (1, 1, 1, 1), 2: (1, 1, 2, 1), 4: (1, 1, 4, 1)}
HEADS = CHEAP | {"num_key_value_heads": 4, "num_hidden_layers": 1}


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["untied", "tied"])
def models(request):
    return {
        tp: make_model(mesh, vocab_size=SIZE, tie_word_embeddings=request.param, **HEADS) for tp, mesh in MESHES.items()
    }


def cut(model, params):
    """Without the added rows, which are zero."""
    params = jax.tree.map(np.asarray, params)
    for name, (axis, size) in model.tables.items():
        if name in params:
            assert not np.any(np.delete(params[name], np.s_[:size], axis))
            params[name] = np.take(params[name], np.arange(size), axis)
    return params


def test_the_numbers_are_those_of_one_device(models):
    """Weights, log-probabilities, entropy and their gradients; what is added gets none."""
    started = {tp: model.init(jax.random.key(0)) for tp, model in models.items()}
    assert [model.table_rows for model in models.values()] == [63, 64, 64]
    assert models[1].describe_tables() == "" and "63 tokens in tables of 64 rows" in models[2].describe_tables()
    jax.tree.map(np.testing.assert_array_equal, cut(models[2], started[2]), cut(models[1], started[1]))
    found = {}
    for tp in (1, 2):
        loss, grads = loss_and_grads(models[tp], started[tp], make_batch(models[tp]))
        found[tp] = (loss, cut(models[tp], grads))
    assert_same(found[2], found[1])


@pytest.mark.slow
def test_what_is_generated_is_the_same(models):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, SIZE, 9), rng.integers(0, SIZE, 5)]
    found = []
    for tp in (1, 2):
        generator = Generator(models[tp], models[tp].init(jax.random.key(0)))
        shape, rows = plan_rows([9, 5], models[tp], 8, 6)
        sampling = Sampling(temperature=5.0, seed=1, repetition_penalty=1.2)  # hot: what is added would be drawn
        found.append([[t.id for t in new.values()] for new in generator.tokens(prompts, shape, rows, sampling)])
    assert found[0] == found[1] and max(max(ids) for ids in found[0]) < SIZE


def test_checkpoints_go_from_mesh_to_mesh(models, tmp_path):
    params = {tp: model.init(jax.random.key(tp)) for tp, model in models.items()}
    for saved, read in ((1, 2), (2, 1), (2, 4)):
        directory = tmp_path / f"{saved} {read}"
        checkpointer = Checkpointer(directory)
        checkpointer.save(1, {"params": Entry(params[saved])}, False)
        checkpointer.close()
        wanted = {"params": Wanted(models[read].abstract_params, tables=models[read].tables)}
        got = Checkpointer(directory).restore(1, wanted)["params"]
        assert got["embed"].shape[0] == models[read].table_rows
        jax.tree.map(np.testing.assert_array_equal, cut(models[read], got), cut(models[saved], params[saved]))
        other = make_model(MESHES[read], vocab_size=70, tie_word_embeddings="unembed" not in got, **HEADS)
        wanted = {"params": Wanted(other.abstract_params, tables=other.tables)}
        with pytest.raises(UserError, match=r"parameter embed has shape \(6[34], 32\) in the checkpoint"):
            Checkpointer(directory).restore(1, wanted)


def test_foreign_tables_are_filled_up_and_cut(models):
    model = models[2]
    rows = [row for row in FAMILIES["LlamaForCausalLM"].rows if row.ours in ("embed", "unembed")]
    for conversion in conversions(rows, model.architecture):
        if conversion.ours in model.abstract_params:
            theirs = np.arange(SIZE * 32, dtype=np.float32).reshape(conversion.their_shape)
            placed = place(
                conversion, model.abstract_params[conversion.ours], lambda name, box, theirs=theirs: theirs[box]
            )
            whole = np.asarray(placed)
            assert 64 in whole.shape and whole.sum() == theirs.sum()
            np.testing.assert_array_equal(conversion.to_theirs(conversion.cut(whole)), theirs)


@pytest.mark.parametrize("flags", [{"type": "palm"}])
def test_what_looks_at_a_whole_table_is_refused(flags):
    from ringbpt.config import OptimizerConfig

    settings = llama_flags(**LLAMA | HEADS | {"vocab_size": SIZE, "attention_type": "blockwise"})
    config = Config(mesh_shape=MESHES[2], optimizer=OptimizerConfig(**flags), **settings)
    with pytest.raises(UserError, match=r"--llama.vocab_size=63 is not divisible by tp=2 .* scale of a whole table"):
        check_mesh(config)
