"""Hugging Face folders in and out: every tensor bit by bit, and every damaged folder one line."""

import importlib.util
import json
import struct
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from ringbpt import generate, mesh, train
from ringbpt.checkpoint import load
from ringbpt.checkpoint.checkpointer import Checkpointer
from ringbpt.checkpoint.export import parity, report_parity, to_huggingface
from ringbpt.checkpoint.huggingface import load_folder, open_folder, to_ours
from ringbpt.checkpoint.safetensors import FolderWriter, Planned, TensorFolder
from ringbpt.checkpoint.store import Entry, Wanted
from ringbpt.checkpoint.tensors import repack
from ringbpt.config import (
    Architecture,
    Config,
    TokenizerConfig,
    UserError,
    complete,
    parse,
    parse_args,
    run_main,
    to_dict,
)
from ringbpt.config.families import FAMILIES, family_of, hf_settings, llama_fields
from tests.golden.make_families import CASES, SIZES, make_model, restore

ROOT = Path(__file__).parents[2]


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *argv: run_main(module.main, list(argv))


hf2jax, jax2hf = script("hf2jax"), script("jax2hf")


@pytest.mark.parametrize("convert", [hf2jax, jax2hf])
def test_converters_look_for_no_device_that_is_not_here(convert, monkeypatch, tmp_path, capsys):
    """jax printed the tracebacks of plugins whose devices it did not find."""
    monkeypatch.setattr(mesh, "choose_platform", lambda: print("chosen") or exit(7))
    flags = {hf2jax: ("checkpoint_dir=x", "output_file=y"), jax2hf: ("load_checkpoint=params::x", "output_dir=y")}
    with pytest.raises(SystemExit):
        convert(*(f"--{flag}" for flag in flags[convert]))
    assert capsys.readouterr() == ("chosen\n", "")


def tensors(folder: Path) -> dict[str, np.ndarray]:
    files = TensorFolder(folder)
    return {name: files.read(name) for name in files.entries}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, array in a.items():
        assert array.dtype == b[name].dtype
        np.testing.assert_array_equal(array, b[name], err_msg=name)


def recast(folder: Path, dtype, shard_bytes: int) -> None:
    """The folder's tensors again in another dtype, sharded with an index."""
    found = tensors(folder)
    (folder / "model.safetensors").unlink()
    plan = [Planned(name, np.dtype(dtype), array.shape) for name, array in found.items()]
    with FolderWriter(folder / "new", plan, shard_bytes) as writer:
        for name, array in found.items():
            writer.write(name, array.astype(dtype))
    for file in (folder / "new").iterdir():
        file.rename(folder / file.name)


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_the_same_bits(case, tmp_path, capsys):
    source = tmp_path / "hf"
    restore(case, source)
    if case != "llama":
        recast(source, jnp.bfloat16, 20_000)
        assert (source / "model.safetensors.index.json").is_file()
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert hf2jax(f"--checkpoint_dir={source}", f"--output_file={tmp_path}/ours", "--streaming") == 0
    assert jax2hf(f"--load_checkpoint=params::{tmp_path}/ours", f"--output_dir={tmp_path}/back") == 0
    same(tensors(source), tensors(tmp_path / "back"))
    assert (tmp_path / "back" / "generation_config.json").read_text() == '{"eos_token_id": [1, 2]}'
    settings = json.loads((tmp_path / "back" / "config.json").read_text())
    before = json.loads((source / "config.json").read_text())
    after, before = (complete(replace(Architecture(), **llama_fields(x, ""))) for x in (settings, before))
    assert after == before
    assert settings["torch_dtype"] == settings["dtype"] == ("float32" if case == "llama" else "bfloat16")


def test_the_tokenizer_comes_along(tmp_path):
    """As transformers' save_pretrained writes it, special tokens and chat template included: the same ids and texts."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from ringbpt.data.text.tokenizers import make_tokenizer
    from ringbpt.generation.text import make_chat_encoder

    letters = {chr(32 + i): i for i in range(94)} | {"<s>": 94, "</s>": 95}
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=letters, merges=[])), bos_token="<s>", eos_token="</s>",
        chat_template="{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}",
    )  # fmt: skip
    source, messages = tmp_path / "hf", [{"role": "user", "content": "to be <s> or </s>"}]
    restore("llama3", source)
    words.save_pretrained(source)
    to_ours(source, tmp_path / "ours")
    to_huggingface(f"params::{tmp_path}/ours", tmp_path / "back")
    want = words(words.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    assert {94, 95} <= set(want)
    for folder in (tmp_path / "ours" / "huggingface", tmp_path / "back"):
        again = AutoTokenizer.from_pretrained(folder)
        assert again(again.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"] == want
        assert again.all_special_tokens == words.all_special_tokens
        tokenizer = make_tokenizer(TokenizerConfig(str(folder)))
        assert make_chat_encoder(tokenizer)(messages, None, "here").tolist() == want
        assert tokenizer.encode_prompt("a b").tolist() == words("a b")["input_ids"]
        assert 95 in tokenizer.ends.stop


def test_a_trained_run_goes_to_hugging_face(tmp_path):
    """Through an Orbax checkpoint with stacked layers at axis 1, on a mesh, beside a run's config.json."""
    source = tmp_path / "hf"
    restore("mixtral", source)
    model, params = load.load_model(f"huggingface::{source}", (1, 1, 2, 2), param_scan_axis=1)
    run = tmp_path / "run"
    saver = Checkpointer(run / "checkpoints")
    saver.save(3, {"params": Entry(params)}, milestone=False)
    saver.close()
    config = Config(
        architecture=model.architecture,
        execution=model.execution,
        tokenizer=TokenizerConfig("bytes"),
        load_checkpoint=f"huggingface::{source}",
    )
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    assert jax2hf(f"--load_checkpoint=params::{run}", f"--output_dir={tmp_path}/back") == 0
    same(tensors(source), tensors(tmp_path / "back"))
    assert load.describe_checkpoint(f"params::{run}").architecture == model.architecture
    # A run from nothing: the ends of its own tokenizer.
    (run / "config.json").write_text(json.dumps(to_dict(replace(config, load_checkpoint=""))))
    assert jax2hf(f"--load_checkpoint=params::{run}", f"--output_dir={tmp_path}/new") == 0
    settings = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"]) == (256, 257)


def test_each_device_reads_its_own_bytes(tmp_path):
    restore("qwen3", tmp_path)
    found = open_folder(tmp_path)
    files, (w_q,) = found.files, [conversion for conversion in found.table if conversion.ours == "layers.w_q"]
    whole = w_q.read((slice(0, 2), slice(0, 32), slice(0, 4), slice(0, 16)), np.float32, files.read)
    files.bytes_read = 0
    box = w_q.read((slice(1, 2), slice(8, 16), slice(2, 4), slice(0, 16)), np.float32, files.read)
    np.testing.assert_array_equal(box, whole[1:2, 8:16, 2:4])
    assert files.bytes_read == box.nbytes
    model, params = load.load_model(f"huggingface::{tmp_path}", (1, 2, 2, 2))
    _, same_params = load.load_model(f"huggingface::{tmp_path}", (1, 1, 1, 1))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(same_params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert params["layers"]["w_q"].sharding.spec == model.specs["layers"]["w_q"]


def test_the_model_of_a_folder_becomes_the_flags(tmp_path):
    """--load_checkpoint=huggingface:: brings sizes and tokenizer along; flags on the line win."""
    restore("llama3.1", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    spec = f"--load_checkpoint=huggingface::{tmp_path}"
    config = parse(parse_args([spec, "--llama.max_sequence_length=4096", "--mesh_dim=1,1,1,1"]), 1)
    assert config.architecture.rope_scaling_type == "llama3"
    assert (config.architecture.hidden_size, config.architecture.head_dim, config.architecture.max_sequence_length) == (
        32,
        16,
        4096,
    )
    assert config.tokenizer.vocab_file == str(tmp_path)


OLD = {"rope_theta": 500000.0, "torch_dtype": "bfloat16"}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_both_generations_of_config_json(key):
    sizes = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 1,
    }  # fmt: skip
    old = sizes | OLD | {"rope_scaling": {**SCALING, key: "llama3"}}
    new = sizes | {"dtype": "bfloat16", "rope_parameters": {**SCALING, "rope_type": "llama3", "rope_theta": 500000.0}}
    fields = llama_fields(old, "")
    assert fields == llama_fields(new, "")
    assert (fields["theta"], fields["rope_scaling_type"], fields["rope_scaling_factor"]) == (500000.0, "llama3", 8.0)


def test_a_family_is_told_by_its_features():
    assert family_of(Architecture())[0] == "LlamaForCausalLM"
    assert family_of(Architecture(sliding_window=8))[0] == "MistralForCausalLM"
    assert family_of(Architecture(num_experts=4))[0] == "MixtralForCausalLM"
    assert family_of(Architecture(qkv_bias=True))[0] == "Qwen2ForCausalLM"
    with pytest.raises(UserError, match="qk_norm and qkv_bias"):
        family_of(Architecture(qkv_bias=True, qk_norm=True))


def test_transposing_in_tiles_is_transposing():
    x = np.arange(300 * 260, dtype=np.float32).reshape(300, 260)
    np.testing.assert_array_equal(repack(x, np.transpose, None), x.T)
    heads = x.reshape(300, 2, 130).transpose(1, 2, 0)
    np.testing.assert_array_equal(repack(x, lambda x: x.reshape(300, 2, 130).transpose(1, 2, 0), None), heads)
    np.testing.assert_array_equal(repack(x, np.transpose, np.dtype(jnp.bfloat16)), x.T.astype(jnp.bfloat16))


# --- what is wrong with a folder: one line, exit 2, nothing written ---


def edit_config(**changes):
    def damage(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | changes))

    return damage


def edit_tensors(change):
    def damage(folder: Path) -> None:
        found = tensors(folder)
        change(found)
        (folder / "model.safetensors").unlink()
        plan = [Planned(name, array.dtype, array.shape) for name, array in found.items()]
        with FolderWriter(folder / "new", plan, 1 << 30) as writer:
            for name, array in found.items():
                writer.write(name, array)
        (folder / "new" / "model.safetensors").rename(folder / "model.safetensors")

    return damage


def cut(size: int):
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:size])

    return damage


def pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lose_a_shard(folder: Path) -> None:
    recast(folder, np.float32, 20_000)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def add_an_index(folder: Path) -> None:
    places = dict.fromkeys(tensors(folder), "model-00001-of-00001.safetensors")
    (folder / "model-00001-of-00001.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def write_header(header: str):
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())

    return damage


NORM = "model.layers.1.input_layernorm.weight"
DAMAGES = {
    "another architecture": (edit_config(architectures=["GPT2LMHeadModel"]), "none of LlamaForCausalLM"),
    "auto_map": (edit_config(auto_map={"AutoModel": "x.Y"}), "never run"),
    "another size": (edit_config(intermediate_size=64), "has shape (48, 32), and its config.json"),
    "more layers": (edit_config(num_hidden_layers=3), "model.layers.2.input_layernorm.weight is missing"),
    "rope": (edit_config(rope_parameters={"rope_type": "dynamic"}), "none of default, linear, llama3, yarn"),
    "bias": (edit_config(attention_bias=True), "attention_bias=True is not supported"),
    "quantised": (edit_config(quantization_config={"bits": 4}), "quantization_config"),
    "not JSON": (lambda folder: (folder / "config.json").write_text("{\n]"), "config.json:2: malformed JSON"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: No such file"),
    "missing": (edit_tensors(lambda found: found.pop(NORM)), f"{NORM} is missing"),
    "extra": (edit_tensors(lambda found: found.update(x=np.zeros(2, np.float32))), "tensor x has no place"),
    "truncated": (cut(5000), "truncated: tensor"),
    "truncated header": (cut(100), "truncated, or no safetensors"),
    "empty": (cut(0), "truncated, or no safetensors"),
    "a lost shard": (lose_a_shard, ".safetensors: No such file"),
    "no JSON header": (write_header("{]"), "its header is not JSON"),
    "a list as header": (write_header("[1]"), "its header is not JSON"),
    "no numbers in the header": (
        write_header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["a", 4]}}'), "tensor a is malformed",
    ),
    "pickles": (pickles, "could run code"),
    "another head": (edit_config(tie_word_embeddings=True), "lm_head.weight is not model.embed_tokens.weight"),
    "an index of other shards": (add_an_index, "both model.safetensors and model.safetensors.index.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_one_line(name, tmp_path, capsys):
    source = tmp_path / "hf"
    restore("llama3", source)
    damage, message = DAMAGES[name]
    damage(source)
    assert hf2jax(f"--checkpoint_dir={source}", f"--output_file={tmp_path}/ours") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "ours").exists()
    assert not (tmp_path / "ours.partial").exists()


@pytest.mark.parametrize(
    "name",
    [
        "another architecture",
        "auto_map",
        "another size",
        "missing",
        "extra",
        "truncated",
        "truncated header",
        "another head",
        "an index of other shards",
    ],
)
def test_a_damaged_folder_is_one_line_to_who_loads_it(name, tmp_path, capsys):
    """Straight onto the mesh, by training and by generation; no run is begun."""
    source = tmp_path / "hf"
    restore("llama3", source)
    letters = Tokenizer(models.BPE(vocab={chr(32 + i): i for i in range(95)}, merges=[]))
    letters.save(str(source / "tokenizer.json"))
    damage, message = DAMAGES[name]
    damage(source)
    (tmp_path / "texts.jsonl").write_text('{"text": "a few words"}\n' * 40)
    spec = f"--load_checkpoint=huggingface::{source}"
    training = [
        spec, "--mesh_dim=1,1,1,-1", "--llama.attention_type=ring_blockwise", f"--logger.output_dir={tmp_path}/runs",
        f"--train_dataset.json_dataset.path={tmp_path}/texts.jsonl", "--train_dataset.json_dataset.seq_length=64",
        "--train_dataset.json_dataset.batch_size=1", "--train_dataset.text_processor.add_bos_token=False",
        "--train_dataset.text_processor.add_eos_token=False", f"--train_dataset.cache_dir={tmp_path}/cache",
    ]  # fmt: skip
    for main, argv in ((train.main, training), (generate.main, [spec, "--prompt=a"])):
        assert run_main(main, argv) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_damaged_folder_of_ours_is_one_line(tmp_path, capsys):
    restore("llama3", tmp_path / "hf")
    to_ours(tmp_path / "hf", tmp_path / "ours")
    file, spec = tmp_path / "ours" / "params.safetensors", f"--load_checkpoint=params::{tmp_path}/ours"
    file.write_bytes(file.read_bytes()[:5000])
    assert jax2hf(spec, f"--output_dir={tmp_path}/back") == 2
    words = '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'
    (tmp_path / "words.json").write_text(words)
    asked = [spec, "--prompt=a", f"--tokenizer={tmp_path}/words.json", "--max_new_tokens=1"]
    assert run_main(generate.main, asked) == 2
    errors = capsys.readouterr().err
    assert errors.count("truncated: tensor") == errors.count("\n") == 2
    assert not (tmp_path / "back").exists()


def test_a_file_that_lies_about_its_tensors(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(UserError, match="tensor a contradicts itself"):
        TensorFolder(tmp_path)
    index = {"weight_map": {"a": "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="plain file names"):
        TensorFolder(tmp_path)


def test_wrong_words(tmp_path, capsys):
    restore("llama3", tmp_path / "hf")
    assert hf2jax(f"--checkpoint_dir={tmp_path}/hf", f"--output_file={tmp_path}/o", "--model_size=7b") == 2
    assert "--model_size=7b has hidden_size=4096" in capsys.readouterr().err
    (tmp_path / "o").mkdir()
    assert hf2jax(f"--checkpoint_dir={tmp_path}/hf", f"--output_file={tmp_path}/o") == 2
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(UserError, match="no such folder"):
        parse_args([f"--load_checkpoint=huggingface::{tmp_path}/nowhere"])


# --- with torch ---


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_what_we_write(case, tmp_path):
    """Logits of transformers from the folder that went through us, and of ours, within 2e-5."""
    make_model(case, tmp_path / "hf")
    to_ours(tmp_path / "hf", tmp_path / "ours")
    to_huggingface(f"params::{tmp_path}/ours", tmp_path / "back")
    model, params = load.load_model(f"params::{tmp_path}/ours", (1, 1, 1, 1))
    for folder in ("hf", "back"):
        found = parity(tmp_path / folder, model, params)
        assert found["largest_difference"] <= 2e-5
        assert found["same_best_token"] == 1.0
    assert report_parity(f"params::{tmp_path}/ours", tmp_path / "hf").startswith("verify: 64 tokens")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_our_config(case, tmp_path):
    from transformers import AutoConfig

    restore(case, tmp_path)
    llama = complete(replace(Architecture(), **llama_fields(json.loads((tmp_path / "config.json").read_text()), "")))
    theirs = AutoConfig.from_pretrained(tmp_path).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(hf_settings(llama, "float32")))
    ours = AutoConfig.from_pretrained(tmp_path).to_dict()
    for key in ("rope_parameters", "hidden_size", "head_dim", "sliding_window", "tie_word_embeddings", "model_type"):
        if key in theirs:
            got, want = ours[key], theirs[key]
            if key == "rope_parameters":
                got = {name: value for name, value in got.items() if name in want}
            assert got == want, key
    assert ours["architectures"][0] in FAMILIES


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama3", "mistral", "qwen2", "qwen3", "mixtral"])
def test_a_key_left_out_is_what_it_is_to_transformers(case, tmp_path):
    """R25 and its like, by logits; tests/test_families_settings.py holds the settings themselves to its classes."""
    make_model(case, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    sized = {*SIZES} - {"rms_norm_eps", "initializer_range"} | {"head_dim", "num_local_experts", "num_experts_per_tok"}
    for key in settings.keys() - sized - {"model_type", "architectures"}:
        left = {name: value for name, value in settings.items() if name != key}
        (tmp_path / "config.json").write_text(json.dumps(left))
        model, params = load.load_model(f"huggingface::{tmp_path}", (1, 1, 1, 1))
        assert parity(tmp_path, model, params)["largest_difference"] <= 2e-5, key


def test_folders_of_ours_load(tmp_path):
    restore("qwen2", tmp_path / "hf")
    to_ours(tmp_path / "hf", tmp_path / "ours")
    model, params = load.load_model(f"params::{tmp_path}/ours", (1, 1, 1, 1))
    direct = load_folder(tmp_path / "hf", model.architecture, Wanted(model.abstract_params))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(direct), strict=True):
        np.testing.assert_array_equal(a, b)
