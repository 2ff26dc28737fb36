"""Which weights count: of two sets in a folder none is chosen in silence; a file's bytes are what its header says."""

import json
import random
import shutil
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import SafetensorError, deserialize
from safetensors.numpy import load_file, save, save_file

from ringbpt.checkpoint.export import to_huggingface
from ringbpt.checkpoint.huggingface import open_folder, to_ours
from ringbpt.checkpoint.load import describe_checkpoint, load_model
from ringbpt.checkpoint.safetensors import TensorFolder
from ringbpt.config import UserError
from ringbpt.config.families import EMBED, HEAD
from tests.checkpoint.test_huggingface import edit_tensors, recast, same, tensors
from tests.golden.make_families import restore

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def refused(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- a head beside the embedding that it is tied to ---


def with_head(folder: Path, head) -> Path:
    """A tied model's folder, and head(embedding) in it."""
    restore("llama3.2", folder)
    found = load_file(folder / WHOLE)
    save_file(found | {HEAD: np.ascontiguousarray(head(found[EMBED]))}, folder / WHOLE)
    return folder


def one_bit(embed: np.ndarray) -> np.ndarray:
    head = embed.copy()
    head[-1:, -1:].view(np.uint32)[:] ^= 1
    return head


@pytest.mark.parametrize(
    "head", [one_bit, np.negative, lambda embed: embed[:-1], lambda embed: embed.astype(np.float16)]
)
def test_a_head_that_differs_from_a_tied_embedding_is_refused(head, tmp_path, monkeypatch):
    """R19. Training and generation: tests/checkpoint/test_huggingface.py."""
    monkeypatch.setattr("ringbpt.checkpoint.huggingface.COMPARED_BYTES", 1000)  # it is the last of many blocks
    source, spec = with_head(tmp_path / "hf", head), f"huggingface::{tmp_path}/hf"
    for call, args in ((to_ours, (source, tmp_path / "ours")), (load_model, (spec, (1, 1, 1, 1)))):
        error = refused(call, *args)
        assert HEAD in error and EMBED in error and "tie_word_embeddings=False" in error
    assert not (tmp_path / "ours").exists()
    if head is one_bit:  # with the flag that the message names it is taken as it is
        _, params = load_model(spec, (1, 1, 1, 1), tie_word_embeddings=False)
        np.testing.assert_array_equal(np.asarray(params["unembed"]).T, load_file(source / WHOLE)[HEAD])


def test_a_head_that_is_the_embedding_stays_tied(tmp_path):
    source, spec = with_head(tmp_path / "hf", lambda embed: embed), f"huggingface::{tmp_path}/hf"
    _, params = load_model(spec, (1, 1, 1, 1))
    assert "unembed" not in params
    to_ours(source, tmp_path / "ours")
    to_huggingface(f"params::{tmp_path}/ours", tmp_path / "back")
    same(tensors(tmp_path / "back") | {HEAD: tensors(source)[HEAD]}, tensors(source))


def test_a_head_in_a_wider_dtype_may_be_the_embedding(tmp_path):
    restore("llama3.2", tmp_path)

    def widen(found: dict[str, np.ndarray]) -> None:
        found[EMBED] = found[EMBED].astype(jnp.bfloat16)
        found[HEAD] = found[EMBED].astype(np.float32)

    edit_tensors(widen)(tmp_path)
    assert open_folder(tmp_path).files.entries[HEAD].dtype == np.float32


def test_a_description_reads_no_weight(tmp_path):
    with_head(tmp_path, one_bit)
    (tmp_path / WHOLE).unlink()
    assert describe_checkpoint(f"huggingface::{tmp_path}").architecture.tie_word_embeddings


def test_tied_by_a_flag_is_refused_where_the_file_has_a_head(tmp_path):
    restore("llama3", tmp_path)
    assert HEAD in refused(lambda: load_model(f"huggingface::{tmp_path}", (1, 1, 1, 1), tie_word_embeddings=True))


# --- two sets of files ---


def shards(folder: Path, stem: str = "model") -> list[Path]:
    return sorted(folder.glob(f"{stem}-*-of-*.safetensors"))


def both(folder: Path, stem: str) -> list[str]:
    """R22: a whole file, and the index with its shards of another day."""
    shutil.copyfile(shards(folder, stem)[0], folder / f"{stem}.safetensors")
    return [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]


def stale(folder: Path, stem: str) -> list[str]:
    shutil.copyfile(shards(folder, stem)[0], folder / f"{stem}-00001-of-00099.safetensors")
    return [f"{stem}-00001-of-00099.safetensors", f"{stem}.safetensors.index.json"]


def without_index(folder: Path, stem: str) -> list[str]:
    (folder / f"{stem}.safetensors.index.json").unlink()
    return [shards(folder, stem)[0].name, f"{stem}.safetensors.index.json"]


def whole_and_shards(folder: Path, stem: str) -> list[str]:
    both(folder, stem)
    (folder / f"{stem}.safetensors.index.json").unlink()
    return [shards(folder, stem)[0].name, f"{stem}.safetensors"]


def unnamed(folder: Path, stem: str) -> list[str]:
    """A tensor of a shard that the index has nothing of."""
    index = folder / f"{stem}.safetensors.index.json"
    content = json.loads(index.read_text())
    name, file = content["weight_map"].popitem()
    assert file in content["weight_map"].values()
    index.write_text(json.dumps(content))
    return [name, file, index.name]


def twice_in_the_index(folder: Path, stem: str) -> list[str]:
    index = folder / f"{stem}.safetensors.index.json"
    name, file = next(iter(json.loads(index.read_text())["weight_map"].items()))
    index.write_text(index.read_text().replace('"weight_map": {', f'"weight_map": {{"{name}": "{file}",', 1))
    return [name, index.name]


@pytest.mark.parametrize("damage", [both, stale, without_index, whole_and_shards, unnamed, twice_in_the_index])
@pytest.mark.parametrize("stem", ["model", "params"])
def test_two_sets_are_refused_by_name(stem, damage, tmp_path):
    restore("llama3", tmp_path / "hf")
    recast(tmp_path / "hf", np.float32, 20_000)
    to_ours(tmp_path / "hf", tmp_path / "ours", max_shard_bytes=20_000)
    folder = tmp_path / ("hf" if stem == "model" else "ours")
    names = damage(folder, stem)
    error = refused(TensorFolder, folder, stem)
    assert all(name in error for name in names)
    spec = f"huggingface::{folder}" if stem == "model" else f"params::{folder}"
    assert refused(load_model, spec, (1, 1, 1, 1)) == error


def test_a_name_in_two_shards_is_read_as_the_index_says(tmp_path):
    for number in (1, 2):
        found = {"a": np.full(2, number, np.float32), f"b{number}": np.zeros(1, np.float32)}
        save_file(found, tmp_path / f"{number}.safetensors")
    for number in (1, 2):
        places = {"b1": "1.safetensors", "b2": "2.safetensors", "a": f"{number}.safetensors"}
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
        assert TensorFolder(tmp_path).read("a").tolist() == [number] * 2
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places | {"b1": "2.safetensors"}}))
    assert "b1" in refused(TensorFolder, tmp_path)


def test_what_is_no_other_set_is_let_be(tmp_path):
    """An index that names the whole file, the files of other variants, and the weights of others' programs."""
    restore("llama3", tmp_path)
    whole = tensors(tmp_path)
    for name in ("consolidated.safetensors", "model.fp16.safetensors", "adapter_model.safetensors"):
        shutil.copyfile(tmp_path / WHOLE, tmp_path / name)
    same(tensors(tmp_path), whole)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(whole, WHOLE)}))
    same(tensors(tmp_path), whole)


# --- one file: the rules of the format's own library ---

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.float16)}
FILE = save(TENSORS | {"c": np.zeros((0, 3), np.float32)})
(LENGTH,) = struct.unpack("<Q", FILE[:8])
HEADER, BODY = FILE[8 : 8 + LENGTH], FILE[8 + LENGTH :]


def whole(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + BODY


def edited(**changes: object) -> bytes:
    return whole(json.dumps(json.loads(HEADER) | changes).encode())


def of(dtype: str, shape: object, *offsets: object) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


FILES = {
    "overlap": (edited(b=of("F16", [4], 0, 8)), "tensor a overlaps tensor b"),
    "the same bytes": (edited(d=of("F32", [2, 3], 0, 24)), "overlaps tensor"),
    "gap": (edited(a=of("F32", [2, 2], 8, 24), c=of("F32", [0, 3], 24, 24)), "a begins 8 bytes after"),
    "not covered": (FILE + b"\0", "1 bytes after tensor b belong to no tensor"),
    "truncated": (FILE[:-1], "truncated: tensor b ends 1 bytes after the file does"),
    "twice": (FILE.replace(b'"c":{', b'"a":{'), "its header: a stands there twice"),
    "a key twice": (whole(HEADER.replace(b'"shape":[4]', b'"shape":[4],"shape":[4]')), "shape stands there twice"),
    "wrong dtype size": (edited(a=of("F16", [2, 3], 0, 24)), "tensor a contradicts itself"),
    "half a dimension": (edited(a=of("F32", [2, 3.0], 0, 24)), "tensor a is malformed"),
    "a text as dimension": (edited(a=of("F32", ["2", 3], 0, 24)), "tensor a is malformed"),
    "three offsets": (edited(a=of("F32", [2, 3], 0, 24, 48)), "tensor a is malformed"),
    "negative": (edited(a=of("F32", [-2, -3], 0, 24)), "tensor a is malformed"),
    "beyond all numbers": (edited(c=of("F32", [1 << 40, 1 << 40, 0], 24, 24)), "tensor c is malformed"),
    "no dtype": (edited(a=of("F33", [2, 3], 0, 24)), "tensor a is 'F33'"),
    "metadata": (edited(__metadata__={"format": 1}), "__metadata__"),
    "NaN": (edited(a=of("F32", [float("nan")], 0, 24)), "its header is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_its_own_library_refuses_is_one_line(name, tmp_path):
    content, message = FILES[name]
    with pytest.raises(SafetensorError):
        deserialize(content)
    (tmp_path / WHOLE).write_bytes(content)
    error = refused(TensorFolder, tmp_path)
    assert error.startswith(str(tmp_path / WHOLE)) and message in error


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_file_is_what_its_own_library_says_it_is(seed, tmp_path):
    """Bits flipped, letters changed, cut: what that library refuses, we refuse, and the rest is read as it reads it."""
    rng, taken = random.Random(seed), 0
    for _ in range(400):
        content = bytearray(FILE)
        match rng.randrange(4):
            case 0:
                content[rng.randrange(8 + LENGTH)] ^= 1 << rng.randrange(8)
            case 1:
                content[rng.randrange(8, 8 + LENGTH)] = rng.choice(b'0123456789,:{}[]" -.eE')
            case 2:
                content = content[: rng.randrange(len(content))]
            case 3:
                at = rng.randrange(8, 8 + LENGTH)
                content[at : at + rng.randrange(3)] = bytes(rng.choices(b"0123456789", k=rng.randrange(3)))
                content[:8] = struct.pack("<Q", len(content) - len(BODY) - 8)
        (tmp_path / WHOLE).write_bytes(content)
        try:
            want = dict(deserialize(bytes(content)))
        except SafetensorError:
            assert "\n" not in refused(TensorFolder, tmp_path)
            continue
        try:
            files = TensorFolder(tmp_path)
        except UserError as error:  # a dtype that no weight has, or a name twice, which the library lets pass
            assert "only F32, F16, BF16" in str(error) or "stands there twice" in str(error)
            continue
        assert {name: files.read(name).tobytes() for name in files.entries} == {
            name: bytes(about["data"]) for name, about in want.items()
        }
        taken += 1
    assert taken


def test_devices_read_what_the_index_says(tmp_path):
    """A folder in shards is the whole file's, tensor by tensor, on the mesh too."""
    restore("llama3", tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "many")
    recast(tmp_path / "many", np.float32, 20_000)
    loaded = [load_model(f"huggingface::{tmp_path}/{name}", (1, 1, 1, 2))[1] for name in ("one", "many")]
    jax.tree.map(np.testing.assert_array_equal, *loaded)
