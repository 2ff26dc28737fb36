"""Saved and restored exactly, on any mesh; the original's files read; what is wrong with a file said in one line."""

import json
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import flax.serialization
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ringbpt.checkpoint.load import load_checkpoint
from ringbpt.checkpoint.store import Checkpointer, Entry, Rule, Wanted, newest_step
from ringbpt.checkpoint.tensors import flatten
from ringbpt.config import Architecture, CheckpointerConfig, UserError
from ringbpt.training.run import entries
from ringbpt.training.state import TrainState

L, D, N, K, H, F, V = 3, 8, 2, 1, 4, 12, 16
SHAPES = {
    "embed": (V, D),
    "layers": {
        "attention_norm": (L, D),
        "w_q": (L, D, N, H),
        "w_k": (L, D, K, H),
        "w_v": (L, D, K, H),
        "w_o": (L, N, H, D),
        "feedforward_norm": (L, D),
        "w_gate": (L, D, F),
        "w_up": (L, D, F),
        "w_down": (L, F, D),
    },
    "norm": (D,),
    "unembed": (D, V),
}
ARCHITECTURE = Architecture(
    vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=N,
    num_key_value_heads=K, head_dim=H,
)  # fmt: skip
MESH = jax.make_mesh((2, 4), ("fsdp", "sp"), axis_types=(AxisType.Auto,) * 2)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def wanted(params, opt_state=None):
    fresh = Wanted(rule=Rule.IGNORED) if opt_state is None else Wanted(opt_state, Rule.FRESH_IF_ABSENT)
    return {"params": Wanted(params), "opt_state": fresh}


def load(spec, params, opt_state=None, architecture=ARCHITECTURE) -> SimpleNamespace:
    loaded = load_checkpoint(spec, wanted(params, opt_state), architecture)
    return SimpleNamespace(**loaded.entries, note=loaded.note)


def restore(checkpointer, step, params, opt_state=None):
    found = checkpointer.restore(step, wanted(params, opt_state))
    return found["params"], found["opt_state"], found["meta"]


def save_weights(checkpointer, step, params, milestone, **meta):
    checkpointer.save(step, {"params": Entry(params, jnp.bfloat16), "meta": meta}, milestone)


def params_like(shapes=SHAPES, seed=0, axis="fsdp"):
    rng = np.random.default_rng(seed)
    sharding = NamedSharding(MESH, P(axis))

    def leaf(shape):
        place = sharding if shape[0] % MESH.shape[axis] == 0 else NamedSharding(MESH, P())
        return jax.device_put(rng.normal(size=shape).astype(np.float32), place)

    return jax.tree.map(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def opt_state_like(params):
    return jax.tree.map(lambda x: x + 1, OPTIMIZER.init(params))


def same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


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


def test_the_newest_rolling_checkpoint_and_every_milestone_stay(tmp_path):
    params = {"w": jnp.ones(8)}
    checkpointer = Checkpointer(tmp_path)
    for step, milestone in ((1, False), (2, True), (3, False), (4, False), (5, True)):
        save_weights(checkpointer, step, params, milestone)
    checkpointer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4", "5"]
    resumed = Checkpointer(tmp_path)  # the retention outlives the process
    save_weights(resumed, 6, params, milestone=False)
    resumed.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5", "6"]


def test_a_step_just_saved_is_not_written_twice_but_can_become_a_milestone(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    save_weights(checkpointer, 1, {"w": jnp.ones(8)}, milestone=False, written=1)
    save_weights(checkpointer, 1, {"w": jnp.ones(8)}, milestone=False, written=2)
    checkpointer.wait()
    meta = tmp_path / "1" / "meta" / "metadata"
    assert json.loads(meta.read_text())["written"] == 1
    save_weights(checkpointer, 1, {"w": jnp.ones(8)}, milestone=True, written=3)
    checkpointer.close()
    assert json.loads(meta.read_text()) == {"written": 3, "step": 1, "milestone": True}


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
    with pytest.raises(UserError, match=f"checkpoint {tmp_path}/file/1: ") as error:
        save_weights(blocked, 1, {"w": jnp.ones(8)}, milestone=False)
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


def test_a_leaf_is_read_by_its_name(saved):
    step = newest_step(saved, "")
    assert step.dtypes("params")["layers.w_q"] == np.float32 and step.dtypes("opt_state")["1.0.count"] == np.int32
    np.testing.assert_array_equal(step.read("params", "layers.w_q"), params_like()["layers"]["w_q"])


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


# ---------------------------------------------------------------------------------------------- the original's


def interleaved(w):
    """[..., H] with each head's channels in the original's order: pair i at places 2i and 2i + 1."""
    first, second = np.split(np.asarray(w), 2, axis=-1)
    return np.stack([first, second], axis=-1).reshape(w.shape)


def theirs(params, axis=0, scanned=True):
    """Our params as the original's tree, without its outer "params", written out by hand."""
    p = jax.tree.map(np.asarray, params)["layers"]
    flat = {
        ("attention", "wq", "kernel"): interleaved(p["w_q"]).reshape(L, D, N * H),
        ("attention", "wk", "kernel"): interleaved(p["w_k"]).reshape(L, D, K * H),
        ("attention", "wv", "kernel"): p["w_v"].reshape(L, D, K * H),
        ("attention", "wo", "kernel"): p["w_o"].reshape(L, N * H, D),
        ("feed_forward", "w1", "kernel"): p["w_gate"],
        ("feed_forward", "w2", "kernel"): p["w_down"],
        ("feed_forward", "w3", "kernel"): p["w_up"],
        ("attention_norm", "kernel"): p["attention_norm"],
        ("ffn_norm", "kernel"): p["feedforward_norm"],
    }
    tree = {
        ("transformer", "wte", "embedding"): np.asarray(params["embed"]),
        ("transformer", "ln_f", "kernel"): np.asarray(params["norm"]),
        ("lm_head", "kernel"): np.asarray(params["unembed"]),
    }
    for key, value in flat.items():
        if scanned:
            tree["transformer", "h", "scan_decoder", *key] = np.ascontiguousarray(np.moveaxis(value, 0, axis))
        else:
            tree |= {("transformer", "h", str(layer), *key): value[layer] for layer in range(L)}
    return tree


def write_stream(path: Path, tree, outer=("params",)) -> Path:
    packer = msgpack.Packer()
    with path.open("wb") as file:
        for key, value in tree.items():
            file.write(packer.pack(((*outer, *key), flax.serialization.to_bytes(value))))
    return path


def write_flax(path: Path, tree) -> Path:
    from flax.traverse_util import unflatten_dict

    path.write_bytes(flax.serialization.msgpack_serialize(unflatten_dict(tree)))
    return path


@pytest.mark.parametrize("scanned", [True, False], ids=["scanned", "single layers"])
@pytest.mark.parametrize("outer", [("params",), ()], ids=["params", "bare"])
def test_a_stream_of_the_originals_weights(tmp_path, scanned, outer):
    params = params_like()
    path = write_stream(tmp_path / "streaming_params", theirs(params, scanned=scanned), outer)
    state = load(f"params::{path}", abstract(params))
    same(state.params, params)
    assert state.params["embed"].sharding == params["embed"].sharding and state.note == ""


def test_both_of_its_scan_axes_load_into_both_of_ours(tmp_path):
    params = params_like()
    paths = [write_stream(tmp_path / str(axis), theirs(params, axis)) for axis in (0, 1)]
    moved = params | {"layers": jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), params["layers"])}
    for path in paths:
        same(load(f"params::{path}", abstract(params)).params, params)
        same(
            load(f"params::{path}", abstract(moved), architecture=replace(ARCHITECTURE, param_scan_axis=1)).params,
            moved,
        )


def test_flax_files_bf16_tensors_and_tied_embeddings(tmp_path):
    params = params_like()
    tree = {key: value.astype(jnp.bfloat16) for key, value in theirs(params).items() if key[0] != "lm_head"}
    path = write_flax(tmp_path / "model.msgpack", tree)
    tied = {name: leaf for name, leaf in params.items() if name != "unembed"}
    got = load(f"flax_params::{path}", abstract(tied)).params
    same(got, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), tied))


def test_a_train_state_of_the_original_gives_its_weights_and_says_what_it_left(tmp_path):
    params = params_like()
    path = tmp_path / "streaming_train_state"
    whole = {("params", "params", *key): value for key, value in theirs(params).items()}
    whole |= {("opt_state", "0", "mu", *key): value for key, value in theirs(params).items()}
    write_stream(path, {("step",): np.int32(5), **whole}, outer=())
    state = load(f"trainstate::{path}", abstract(params))
    same(state.params, params)
    assert state.opt_state is None and "optimizer state is not read" in state.note and "\n" not in state.note
    state = load(f"trainstate_params::{path}", abstract(params))
    same(state.params, params)
    assert state.note == ""
    with pytest.raises(UserError, match="holds a train state; use trainstate_params::"):
        load(f"params::{path}", abstract(params))
    alone = write_stream(tmp_path / "streaming_params", theirs(params))
    with pytest.raises(UserError, match="holds params alone; use params::"):
        load(f"trainstate::{alone}", abstract(params))


def test_rotated_queries_and_keys_agree_with_the_originals_rotation(tmp_path):
    """Its rope turns the complex numbers x[2i] + 1j x[2i+1]; ours turns (x[i], x[i + H/2])."""
    from ringbpt.model.rope import apply_rope, rotation

    params = params_like()
    tree = theirs(params)
    rng = np.random.default_rng(3)
    for name in ("wq", "wk"):  # any weights of theirs, not made from ours
        key = ("transformer", "h", "scan_decoder", "attention", name, "kernel")
        tree[key] = rng.normal(size=tree[key].shape).astype(np.float32)
    ours = load(f"params::{write_stream(tmp_path / 'p', tree)}", abstract(params)).params["layers"]
    frequency = 100.0 ** (-np.arange(0, H, 2) / H)
    x_TD, positions = rng.normal(size=(5, D)), np.array([0, 3, 4, 9, 20])

    def rotate_theirs(kernel, heads):
        x = (x_TD @ kernel).reshape(5, heads, H // 2, 2)
        turned = (x[..., 0] + 1j * x[..., 1]) * np.exp(1j * positions[:, None] * frequency)[:, None]
        return np.stack([turned.real, turned.imag], axis=-1).reshape(5, heads, H)

    cos, sin = rotation(jnp.asarray(positions)[None], frequency.astype(np.float32))
    for layer in range(L):
        kernels = [
            tree["transformer", "h", "scan_decoder", "attention", name, "kernel"][layer] for name in ("wq", "wk")
        ]
        expected = np.einsum("tnh,sh->nts", rotate_theirs(kernels[0], N), rotate_theirs(kernels[1], K)[:, 0])
        q, k = (jnp.einsum("td,dnh->tnh", x_TD, ours[name][layer])[None] for name in ("w_q", "w_k"))
        q, k = apply_rope(q, cos, sin)[0], apply_rope(k, cos, sin)[0]
        got = jnp.einsum("tnh,sh->nts", q, k[:, 0])
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
        unturned = np.einsum("tnh,sh->nts", q, np.roll(k[:, 0], 1, axis=-1))  # the channels do matter
        assert not np.allclose(unturned, expected, atol=0.1)


# What is wrong with a file -> what is said of it.
WQ = ("transformer", "h", "scan_decoder", "attention", "wq", "kernel")
BROKEN = {
    "missing": (lambda t: t.pop(WQ), "tensor transformer/h/scan_decoder/attention/wq/kernel is missing"),
    "extra": (lambda t: t.update({("transformer", "bias"): np.ones(2)}), "transformer/bias has no place in this model"),
    "shape": (
        lambda t: t.update({WQ: np.ones((L, D, 4))}),
        r"wq/kernel has shape \(3, 8, 4\), this model wants \(3, 8, 8\)",
    ),
    "layers": (lambda t: t.update({WQ: np.ones((5, D, 8))}), r"wq/kernel has shape \(5, 8, 8\), .* \(3, 8, 8\)"),
    "vocabulary": (
        lambda t: t.update({("transformer", "wte", "embedding"): np.ones((V + 1, D))}),
        r"wte/embedding has shape \(17, 8\), this model wants \(16, 8\)",
    ),
    "integers": (lambda t: t.update({WQ: np.ones((L, D, 8), np.int32)}), "is not a tensor of floats"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, fault):
    change, message = BROKEN[fault]
    tree = theirs(params_like())
    change(tree)
    with pytest.raises(UserError, match=message) as error:
        load(f"params::{write_stream(tmp_path / 'p', tree)}", abstract(params_like()))
    assert "\n" not in str(error.value) and error.value.code == 2


def test_a_layer_too_many_or_too_few_is_named(tmp_path):
    tree = theirs(params_like(), scanned=False)
    norm = ("transformer", "h", "{}", "ffn_norm", "kernel")
    many = tree | {("transformer", "h", "3", *norm[3:]): np.ones(D, np.float32)}
    with pytest.raises(UserError, match="h/3/ffn_norm/kernel has no place"):
        load(f"params::{write_stream(tmp_path / 'many', many)}", abstract(params_like()))
    few = {key: value for key, value in tree.items() if key != ("transformer", "h", "1", *norm[3:])}
    with pytest.raises(UserError, match="h/1/ffn_norm/kernel is missing"):
        load(f"params::{write_stream(tmp_path / 'few', few)}", abstract(params_like()))


@pytest.mark.parametrize("write, prefix", [(write_stream, "params"), (write_flax, "flax_params")])
def test_a_truncated_file_is_refused_wherever_it_is_cut(tmp_path, write, prefix):
    path = write(tmp_path / "whole", theirs(params_like()))
    data = path.read_bytes()
    for cut in (3, 40, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(UserError, match="truncated or damaged") as error:
            load(f"{prefix}::{path}", abstract(params_like()))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("prefix", ["params", "trainstate", "trainstate_params", "flax_params"])
def test_pickles_and_torch_archives_are_refused_under_any_name(tmp_path, prefix):
    for protocol in (2, 3, 4, 5):
        (tmp_path / "model.msgpack").write_bytes(pickle.dumps({"a": 1}, protocol=protocol))
        with pytest.raises(UserError, match="a pickle: never opened"):
            load(f"{prefix}::{tmp_path}/model.msgpack", abstract(params_like()))
    with zipfile.ZipFile(tmp_path / "streaming_params", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    with pytest.raises(UserError, match="a zip archive"):
        load(f"{prefix}::{tmp_path}/streaming_params", abstract(params_like()))
    for content in (b"", b"{}", b"\x80", b"(dp0\n."):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(UserError, match="neither a streaming nor a flax msgpack file"):
            load(f"{prefix}::{tmp_path}/other", abstract(params_like()))


def test_the_names_of_leaves():
    names = list(flatten({"a": {"b": 1, "c": (2, 3)}}))
    assert names == ["a.b", "a.c.0", "a.c.1"]
    assert set(flatten(flatten_dict({"a": {"b": 1}}, sep="."))) == {"a.b"}
