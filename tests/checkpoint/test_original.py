"""The original's files, streaming and flax msgpack: read exactly; what is wrong with a file said in one line."""

import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest

from ringbpt.config import UserError
from tests.checkpoint.helpers import ARCHITECTURE, D, H, K, L, N, V, abstract, load, params_like, same


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


@pytest.mark.parametrize("scanned", [True, False])
def test_a_tensor_that_stands_twice_is_named(tmp_path, scanned):
    """As it is, or once more as a single layer: neither is chosen."""
    path = write_stream(tmp_path / "p", theirs(params_like()))
    again = theirs(params_like(seed=1), scanned=scanned)
    name = ("transformer", "h", "scan_decoder" if scanned else "1", "attention", "wq", "kernel")
    other = write_stream(tmp_path / "other", {name: again[name]})
    path.write_bytes(path.read_bytes() + other.read_bytes())
    with pytest.raises(UserError, match="/attention/wq/kernel stands there twice") as error:
        load(f"params::{path}", abstract(params_like()))
    assert "\n" not in str(error.value)


def test_a_weight_that_the_original_never_had_is_named(tmp_path):
    params = params_like()
    biased = params | {"layers": params["layers"] | {"b_q": jnp.zeros((L, N, H))}}
    with pytest.raises(UserError, match=r"the original's models have no layers\.b_q: leave out") as error:
        load(f"params::{write_stream(tmp_path / 'p', theirs(params))}", abstract(biased))
    assert "\n" not in str(error.value) and error.value.code == 2


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
