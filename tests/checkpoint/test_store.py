"""Our own checkpoints: saved and restored exactly, on any mesh; what is wrong with one said in one line."""

import json
import shutil
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ringbpt.checkpoint.checkpointer import Checkpointer
from ringbpt.checkpoint.load import describe_checkpoint
from ringbpt.checkpoint.store import Entry, Rule, Wanted, newest_step, open_orbax
from ringbpt.checkpoint.tensors import flatten
from ringbpt.config import CheckpointerConfig, UserError
from ringbpt.training.run import entries
from ringbpt.training.state import TrainState
from tests.checkpoint.helpers import MESH, D, H, L, abstract, load, params_like, same, wanted

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def restore(checkpointer, step, params, opt_state=None):
    found = checkpointer.restore(step, wanted(params, opt_state))
    return found["params"], found["opt_state"], found["meta"]


def save_weights(checkpointer, step, params, milestone, **meta):
    checkpointer.save(step, {"params": Entry(params, jnp.bfloat16), "meta": meta}, milestone)


def opt_state_like(params):
    return jax.tree.map(lambda x: x + 1, OPTIMIZER.init(params))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's checkpoints with step 7, a full train state; nobody writes into it."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    params = params_like()
    checkpointer = Checkpointer(directory)
    state = {"params": Entry(params), "opt_state": Entry(flatten(opt_state_like(params)))}
    checkpointer.save(7, state | {"meta": {"data": {"next_batch": 7}}}, milestone=False)
    checkpointer.close()
    return directory


# ---------------------------------------------------------------------------------------------- our own


def test_a_train_state_comes_back_exactly_onto_another_sharding(saved):
    params = params_like(axis="sp")  # the same values, placed otherwise
    opt_state = opt_state_like(params)
    checkpointer = Checkpointer(saved)
    assert checkpointer.latest_step() == 7
    got, got_opt, meta = restore(checkpointer, 7, abstract(params), abstract(opt_state))
    same(got, params)
    same(got_opt, opt_state)
    assert meta == {"step": 7, "milestone": False, "data": {"next_batch": 7}}
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), got, params)))
    assert not got["embed"].sharding.is_fully_replicated


def test_weights_alone_are_saved_as_float_dtype_and_have_no_opt_state(tmp_path):
    params = params_like()
    checkpointer = Checkpointer(tmp_path)
    state = TrainState(jnp.int32(1), params, opt_state_like(params))
    checkpointer.save(1, entries(state, CheckpointerConfig(float_dtype="bf16")), milestone=True)
    checkpointer.wait()
    got, opt_state, meta = restore(checkpointer, 1, abstract(params), abstract(opt_state_like(params)))
    same(got, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params))
    assert opt_state is None and meta["milestone"] is True
    assert not (tmp_path / "1" / "opt_state").exists()


def test_params_may_be_donated_while_they_are_being_written(tmp_path):
    params = {"w": jax.device_put(jnp.arange(2.0**23).reshape(8, -1), NamedSharding(MESH, P(("fsdp", "sp"))))}
    expected, shape = {"w": np.array(params["w"])}, abstract(params)
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0).lower(params["w"]).compile()
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, {"params": Entry(params)}, milestone=False)
    overwrite(params["w"]).block_until_ready()
    checkpointer.wait()
    same(restore(checkpointer, 1, shape, None)[0], expected)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_the_newest_rolling_checkpoints_and_every_milestone_stay(tmp_path):
    params = {"w": jnp.ones(8)}
    checkpointer = Checkpointer(tmp_path)
    for step, milestone in ((1, False), (2, True), (3, False), (4, False), (5, True)):
        save_weights(checkpointer, step, params, milestone)
    checkpointer.close()
    assert names(tmp_path) == ["2", "3", "4", "5"]
    resumed = Checkpointer(tmp_path, keep=1, keep_period=3)  # the retention outlives the process
    save_weights(resumed, 6, params, milestone=False)
    save_weights(resumed, 7, params, milestone=False)
    resumed.close()
    assert names(tmp_path) == ["2", "3", "5", "6", "7"]


def test_a_step_just_saved_is_not_written_twice_but_can_become_a_milestone(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    save_weights(checkpointer, 1, {"w": jnp.ones(8)}, milestone=False, written=1)
    save_weights(checkpointer, 1, {"w": jnp.ones(8)}, milestone=False, written=2)
    checkpointer.wait()
    meta = tmp_path / "1" / "meta" / "metadata"
    assert json.loads(meta.read_text())["written"] == 1
    save_weights(checkpointer, 1, {"w": jnp.ones(8)}, milestone=True, written=3)
    checkpointer.close()
    assert json.loads(meta.read_text()) == {"written": 3, "step": 1, "milestone": True, "digests": 1}


def test_unfinished_and_foreign_folders_are_no_checkpoints(tmp_path):
    assert Checkpointer(tmp_path / "absent").latest_step() is None
    checkpointer = Checkpointer(tmp_path)
    save_weights(checkpointer, 3, {"w": jnp.ones(8)}, milestone=False)
    checkpointer.close()
    (tmp_path / "99").mkdir()
    (tmp_path / "100.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "101" / "params").mkdir(parents=True)
    (tmp_path / "101" / "_CHECKPOINT_METADATA").write_text("{}")
    assert checkpointer.latest_step() == 3
    with pytest.raises(UserError, match=r"99.*no whole checkpoint.*\[3\]"):
        restore(checkpointer, 99, {"w": jax.ShapeDtypeStruct((8,), jnp.float32)}, None)


def test_another_model_is_refused_by_its_first_differing_parameter(saved):
    checkpointer = Checkpointer(saved)
    shape = abstract(params_like())
    wide = shape["layers"] | {"w_q": jax.ShapeDtypeStruct((L, D, 4, H), jnp.float32)}
    with pytest.raises(UserError, match=r"layers\.w_q has shape \(3, 8, 2, 4\) .* \(3, 8, 4, 4\)") as error:
        restore(checkpointer, 7, shape | {"layers": wide}, None)
    assert "\n" not in str(error.value) and error.value.code == 2
    with pytest.raises(UserError, match=r"parameter bias is not in the checkpoint"):
        restore(checkpointer, 7, shape | {"bias": shape["norm"]}, None)
    with pytest.raises(UserError, match=r"parameter unembed of the checkpoint has no place"):
        restore(checkpointer, 7, {name: leaf for name, leaf in shape.items() if name != "unembed"}, None)
    with pytest.raises(UserError, match=r"parameter norm is float32 in the checkpoint and int8 here"):
        restore(checkpointer, 7, shape | {"norm": jax.ShapeDtypeStruct((D,), jnp.int8)}, None)
    with pytest.raises(
        UserError, match=r"optimizer state .*mu.* is not in the checkpoint|optimizer state .*nu.* no place"
    ):
        restore(checkpointer, 7, shape, jax.eval_shape(optax.chain(optax.identity(), optax.lion(1e-3)).init, shape))


def test_a_damaged_or_unwritable_place_is_an_error_of_the_storage(saved, tmp_path):
    checkpointer = Checkpointer(tmp_path)
    save_weights(checkpointer, 1, {"w": jnp.ones(8)}, milestone=False)
    checkpointer.wait()
    for data in (tmp_path / "1" / "params").rglob("d/*"):
        data.unlink()
    with pytest.raises(UserError, match=f"checkpoint {tmp_path}/1: ") as error:
        restore(checkpointer, 1, {"w": jax.ShapeDtypeStruct((8,), jnp.float32)}, None)
    assert error.value.code == 4 and "\n" not in str(error.value)
    (tmp_path / "file").write_text("")
    blocked = Checkpointer(tmp_path / "file")
    save_weights(blocked, 1, {"w": jnp.ones(8)}, milestone=False)
    with pytest.raises(UserError, match=f"checkpoint {tmp_path}/file/1: ") as error:
        blocked.wait()
    assert error.value.code == 4 and "\n" not in str(error.value)


# What is asked of a checkpoint with an adapter and a guard, beside its params -> what comes back, or is said.
ASKED = {
    "required": ({"adapter": "required", "guard": "required"}, {"adapter", "guard"}),
    "fresh if absent": ({"adapter": "fresh", "guard": "ignored", "score_head": "fresh"}, {"adapter"}),
    "ignored": ({"adapter": "ignored", "guard": "ignored", "score_head": "ignored"}, set()),
    "not there": ({"adapter": "ignored", "guard": "ignored", "score_head": "required"}, "it holds no score_head"),
    "forgotten": ({"guard": "ignored"}, "its entry adapter has no place here"),
    "an object forgotten": ({"adapter": "ignored"}, "its entry guard has no place here"),
}


@pytest.mark.parametrize("case", ASKED)
def test_entries_that_nobody_has_heard_of_are_saved_and_read_by_their_rules(tmp_path, case):
    """A tree of tuples, which is stored by the names of its leaves, and a JSON object."""
    params, adapter, guard = {"w": jnp.ones(8)}, (jnp.arange(4.0), {"b": jnp.arange(3)}), {"window": [1.5, 2.5]}
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(
        1, {"params": Entry(params), "adapter": Entry(flatten(adapter), jnp.bfloat16), "guard": guard}, milestone=False
    )
    checkpointer.close()
    trees = {"adapter": abstract(adapter), "score_head": abstract(params)}
    rules = {"required": Rule.REQUIRED, "fresh": Rule.FRESH_IF_ABSENT, "ignored": Rule.IGNORED}
    asked, expected = ASKED[case]
    names = {name: Wanted(trees.get(name), rules[rule]) for name, rule in asked.items()}
    read = lambda: Checkpointer(tmp_path).restore(1, {"params": Wanted(abstract(params)), **names})
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            read()
        return
    found = read()
    assert found.keys() == {"params", "meta", *asked} and found["meta"] == {"step": 1, "milestone": False}
    assert {name for name, value in found.items() if value is not None} == {"params", "meta", *expected}
    same(found["params"], params)
    if "adapter" in expected:
        same(found["adapter"], adapter)
    if "guard" in expected:
        assert found["guard"] == guard


def test_an_entry_whose_description_is_missing_is_damaged_and_not_absent(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "7" / "opt_state" / "_METADATA").unlink()
    params = params_like()
    wanted = {
        "params": Wanted(abstract(params)),
        "opt_state": Wanted(abstract(opt_state_like(params)), Rule.FRESH_IF_ABSENT),
    }
    with pytest.raises(UserError, match="its entry opt_state is damaged") as error:
        Checkpointer(tmp_path / "checkpoints").restore(7, wanted)
    assert error.value.code == 4


# What Orbax leaves behind when it gives up in the middle.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning")
@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("params/_METADATA", "key_type", "key_typo"),
        ("params/_sharding", "NamedSharding", "AnySharding"),
        ("params/array_metadatas/process_0", "write_shape", "write_shade"),
        ("meta/metadata", '"step": 7', '"step": 7,,'),
    ],
)
def test_a_damaged_description_of_an_older_checkpoint_is_one_line(tmp_path, file, old, new):
    """Of before there were digests: written by Orbax alone."""
    params, folder = params_like(), tmp_path / "checkpoints" / "7"
    with closing(open_orbax({"params"}, {"meta"})) as orbax:
        meta = ocp.args.JsonSave({"step": 7, "milestone": False})
        orbax.save(folder, args=ocp.args.Composite(params=ocp.args.PyTreeSave(params), meta=meta))
    same(load(f"params::{tmp_path}", abstract(params)).params, params)
    path = folder / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError) as error:
        load(f"params::{tmp_path}", abstract(params))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert error.value.code == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "llama"}', "is no run's config.json: it is a Hugging Face folder's, use huggingface::"),
        ('{"llama": {}}', "is no run's config.json"),
        ('{"llama": {"vocab_size": "x"}, "tokenizer": {}}', "config.json: llama.vocab_size='x' is not a whole number"),
        ('{"llama": 1', "config.json:1: malformed JSON"),
    ],
)
def test_a_damaged_description_of_a_run_is_one_line(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as error:
        describe_checkpoint(f"params::{tmp_path}")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_leaf_is_read_by_its_name(saved):
    step = newest_step(saved, "")
    assert step.dtypes("params")["layers.w_q"] == np.float32 and step.dtypes("opt_state")["1.0.count"] == np.int32
    np.testing.assert_array_equal(step.read("params", "layers.w_q"), params_like()["layers"]["w_q"])
    count = step.read("opt_state", "1.0.count")
    assert (count.dtype, count.shape, count) == (np.int32, (), 1)


def test_the_prefixes_take_their_part_of_our_folders(saved):
    params = params_like()
    opt_state = opt_state_like(params)
    shape, opt_shape = abstract(params), abstract(opt_state)
    for path in (saved.parent, saved, saved / "7"):  # a run, its checkpoints, a step
        state = load(f"params::{path}", shape, opt_shape)
        same(state.params, params)
        assert (state.opt_state, state.meta, state.note) == (None, None, "")
    assert load(f"trainstate_params::{saved}", shape, opt_shape).opt_state is None
    state = load(f"trainstate::{saved}", shape, opt_shape)
    same(state.opt_state, opt_state)
    assert state.meta["step"] == 7


@pytest.mark.parametrize(
    "spec, message",
    [
        ("{saved}", "expected one of params::PATH, trainstate::PATH"),
        ("weights::{saved}", "expected one of params::PATH"),
        ("params::", "expected one of"),
        ("params::{saved}/nowhere", "no such file or folder"),
        ("flax_params::{saved}", "a folder, where a flax msgpack file is expected.*params::"),
        ("params::{empty}", "no whole checkpoint"),
    ],
)
def test_a_wrong_spec_is_refused_in_one_line(saved, tmp_path, spec, message):
    spec = spec.format(saved=saved, empty=tmp_path)
    with pytest.raises(UserError, match=message) as error:
        load(spec, abstract(params_like()))
    assert str(error.value).startswith(f"--load_checkpoint={spec}: ") and "\n" not in str(error.value)


def test_trainstate_of_weights_alone_names_the_prefix_that_works(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    save_weights(checkpointer, 1, params_like(), milestone=False)
    checkpointer.close()
    with pytest.raises(UserError, match="saved without optimizer state; use params::"):
        load(f"trainstate::{tmp_path}", abstract(params_like()))


def test_the_names_of_leaves():
    names = list(flatten({"a": {"b": 1, "c": (2, 3)}}))
    assert names == ["a.b", "a.c.0", "a.c.1"]
    assert set(flatten(flatten_dict({"a": {"b": 1}}, sep="."))) == {"a.b"}
