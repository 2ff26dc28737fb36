"""Bad input, as a table: what is wrong, which entry or script is given it, and what is to be said of it.

`make_files` writes the files; `CASES` names them as {f}/name. What a file may turn out to be, whoever reads it, is
KINDS; who reads files, READERS: each of these pairs is a case of its own.
"""

import gzip
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ESC = "\x1b[31mred\u202e"
LONG = "n" * 300
DEEP = "[" * 5000 + "]" * 5000


class Case(NamedTuple):
    """entry: ringbpt.<entry>, or a script. said: a part of the line. code: the exit code."""

    entry: str
    flags: str
    said: str = ""
    code: int = 2


# --- files ---

SETTINGS: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
SHAPES = {
    "model.embed_tokens.weight": (32, 16), "model.norm.weight": (16,), "lm_head.weight": (32, 16),
    "model.layers.0.input_layernorm.weight": (16,), "model.layers.0.post_attention_layernorm.weight": (16,),
    "model.layers.0.self_attn.q_proj.weight": (16, 16), "model.layers.0.self_attn.k_proj.weight": (8, 16),
    "model.layers.0.self_attn.v_proj.weight": (8, 16), "model.layers.0.self_attn.o_proj.weight": (16, 16),
    "model.layers.0.mlp.gate_proj.weight": (24, 16), "model.layers.0.mlp.up_proj.weight": (24, 16),
    "model.layers.0.mlp.down_proj.weight": (16, 24),
}  # fmt: skip
WORDS = {"model": {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1, "b": 2}, "unk_token": "<unk>"}}
RUN = {"llama": {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2}, "tokenizer": {"vocab_file": "bytes"}}


def safetensors(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def whole_header() -> tuple[dict[str, Any], bytes]:
    header, end = dict[str, Any](), 0
    for name, shape in SHAPES.items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    return header, bytes(end)


def model_folder(folder: Path, settings: Any = None, weights: bytes | None = None, **files: Any) -> None:
    """A Hugging Face folder. files: by their names, __ for the dot, as bytes or what becomes JSON."""
    folder.mkdir(parents=True)
    files = {"config__json": SETTINGS if settings is None else settings, "tokenizer__json": WORDS} | files
    for name, content in files.items():
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name.replace("__", ".")).write_bytes(body)
    (folder / "model.safetensors").write_bytes(safetensors(*whole_header()) if weights is None else weights)


def gguf(*pairs: tuple[str, int, bytes], tensors: bytes = b"", counts: tuple[int, int] | None = None) -> bytes:
    """A GGUF header of (key, type, value) and of what stands there for tensors."""
    text = lambda s: struct.pack("<Q", len(s.encode())) + s.encode()
    body = b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in pairs)
    return b"GGUF" + struct.pack("<IQQ", 3, *(counts or (0, len(pairs)))) + body + tensors


NAME = ("general.architecture", 8, struct.pack("<Q", 5) + b"llama")
GGUFS = {
    "magic alone": b"GGUF",
    "version": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
    "endless counts": gguf(NAME, counts=(2**63, 2**63)),
    "array without end": gguf(NAME, ("x", 9, struct.pack("<IQ", 4, 2**62))),
    "text without end": gguf(NAME, ("x", 8, struct.pack("<Q", 2**62))),
    "array of arrays": gguf(NAME, ("x", 9, struct.pack("<IQ", 9, 1))),
    "type": gguf(NAME, ("x", 77, b"")),
    "no UTF-8": gguf(("general.architecture", 8, struct.pack("<Q", 2) + b"\xff\xfe")),
    "another architecture": gguf(("general.architecture", 8, struct.pack("<Q", 4) + b"rwkv")),
    "no architecture": gguf(("x", 4, struct.pack("<I", 1))),
    "no sizes": gguf(NAME),
    "key twice": gguf(NAME, NAME),
    "dims": gguf(NAME, tensors=struct.pack("<Q", 1) + b"t" + struct.pack("<I", 2**31), counts=(1, 1)),
    "a bool as a size": gguf(NAME, ("llama.context_length", 7, b"\x01")),
    "a list as a size": gguf(NAME, ("llama.context_length", 9, struct.pack("<IQI", 4, 1, 5))),
    "NaN": gguf(NAME, ("llama.rope.freq_base", 6, struct.pack("<f", float("nan")))),
    "alignment": gguf(NAME, ("general.alignment", 4, struct.pack("<I", 3))),
}
# What is wrong in a config.json; None takes the key out.
SETTINGS_EDITS: dict[str, dict[str, Any]] = {
    "a size that is text": {"hidden_size": "16"},
    "a size that is 288.5": {"hidden_size": 288.5},
    "a size in a list": {"hidden_size": [288.5]},
    "a size that is true": {"num_hidden_layers": True},
    "no size at all": {"hidden_size": None},
    "size 0": {"num_attention_heads": 0},
    "size below 0": {"vocab_size": -1},
    "more than 2^53": {"max_position_embeddings": 2**60},
    "a number of 400 digits": {"rope_theta": 10**400},
    "a size of 400 digits": {"intermediate_size": 10**400},
    "epsilon as text": {"rms_norm_eps": "1e-6"},
    "epsilon 0": {"rms_norm_eps": 0},
    "10^9 layers": {"num_hidden_layers": 10**9},
    "10^12 layers of kinds": {"layer_types": ["full_attention"] * 3},
    "a vocabulary of 10^12": {"vocab_size": 10**12},
    "10^9 experts": {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 10**9},
    "heads that divide nothing": {"num_attention_heads": 5},
    "another architecture": {"architectures": ["MambaForCausalLM"]},
    "architectures of another type": {"architectures": [["LlamaForCausalLM"]]},
    "code of its own": {"auto_map": {"AutoModel": "x.py"}},
    "model_type of another": {"model_type": "qwen2"},
    "model_type that is a list": {"model_type": ["llama"]},
    "rope_scaling a list": {"rope_scaling": [1]},
    "rope_scaling deep": {"rope_scaling": {"rope_type": {"a": [1]}}},
    "rope_scaling without a factor": {"rope_scaling": {"rope_type": "linear"}},
    "rope_scaling factor as text": {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
    "rope_scaling unknown": {"rope_scaling": {"rope_type": "warp", "factor": 2.0}},
    "yarn of no numbers": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": -9.0, "mscale_all_dim": 1}},
    "a key with ESC": {ESC: 1},
    "a setting nobody knows": {"attention_sinks": True},
    "an activation": {"hidden_act": ESC},
    "tied as text": {"tie_word_embeddings": "false"},
    "bos in a list": {"bos_token_id": [288.5]},
    "eos as text": {"eos_token_id": "2"},
}
# config.json as text.
SETTINGS_TEXTS = {
    "NaN": json.dumps(SETTINGS)[:-1] + ', "rope_theta": NaN}',
    "1e999": json.dumps(SETTINGS)[:-1] + ', "rope_theta": 1e999}',
    "a key twice": json.dumps(SETTINGS)[:-1] + ', "vocab_size": 3}',
    "deep": '{"a": ' + DEEP + "}",
    "depth 200": '{"a": ' + "[" * 200 + "]" * 200 + "}",
    "half a pair": json.dumps(SETTINGS)[:-1] + r', "x": "\ud800"}',
    "a list": "[]",
    "a number": "3",
    "cut short": json.dumps(SETTINGS)[:40],
    "5000 digits": '{"vocab_size": ' + "9" * 5000 + "}",
    "single quotes": str(SETTINGS),
    "empty": "",
    "a million values": '{"a": [' + "0," * 4_000_001 + "0]}",
}
TOKENIZERS: dict[str, dict[str, Any]] = {
    "no model": {"tokenizer__json": {"model": None}},
    "a list for a vocabulary": {"tokenizer__json": {"model": {"type": "WordLevel", "vocab": [], "unk_token": "x"}}},
    "no vocabulary": {"tokenizer__json": {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}}},
    "ids of 4 billion": {
        "tokenizer__json": {"model": {"type": "WordLevel", "vocab": {"a": 2**32 - 2}, "unk_token": "a"}}
    },
    "ids below 0": {"tokenizer__json": {"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}}},
    "unk that is none": {"tokenizer__json": {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7}}},
    "deep": {"tokenizer__json": ('{"model": ' + DEEP + "}").encode()},
    "cut short": {"tokenizer__json": json.dumps(WORDS).encode()[:-9]},
    "no UTF-8": {"tokenizer__json": b'{"model": "\xff"}'},
    "settings that are a list": {"tokenizer_config__json": []},
    "settings deep": {"tokenizer_config__json": ('{"a": ' + DEEP + "}").encode()},
    "settings twice": {"tokenizer_config__json": b'{"bos_token": "a", "bos_token": "b"}'},
    "settings with half a pair": {"tokenizer_config__json": rb'{"bos_token": "\ud800"}'},
    "added tokens a list": {"tokenizer_config__json": {"added_tokens_decoder": [1]}},
    "added token without an id": {"tokenizer_config__json": {"added_tokens_decoder": {"x": {"content": "c"}}}},
    "added token without text": {"tokenizer_config__json": {"added_tokens_decoder": {"3": {}}}},
    "added token that is null": {"tokenizer_config__json": {"added_tokens_decoder": {"3": None}}},
    "added token of odd flags": {
        "tokenizer_config__json": {"added_tokens_decoder": {"3": {"content": "c", "lstrip": 3}}}
    },
    "added token elsewhere": {"tokenizer_config__json": {"added_tokens_decoder": {"77": {"content": ESC}}}},
    "bos that is none": {"tokenizer_config__json": {"bos_token": ESC}},
    "ends that are no tokens": {"generation_config__json": {"eos_token_id": [288.5]}},
    "an end below 0": {"generation_config__json": {"eos_token_id": -3}},
    "an end beyond all": {"generation_config__json": {"eos_token_id": 2**70}},
    "ends as text": {"generation_config__json": {"eos_token_id": "2"}},
    "ends in NaN": {"generation_config__json": b'{"eos_token_id": NaN}'},
}
# Templates: each a file, for a conversation of one message.
TEMPLATES = {
    "loops without end": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a text without end": "{{ 'x' * 10**10 }}",
    "a power without end": "{{ 9**9**9 }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "a wide text": "{{ '%9999999999d' % 1 }}",
    "a long list": "{{ [0] * 10**10 }}",
    "a macro without end": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "no template": "{% for",
    "a filter that is none": "{{ messages|nosuch }}",
    "nested too deep": "{% if true %}" * 3000 + "{% endif %}" * 3000,
    "a class": "{{ messages.__class__.__mro__[1].__subclasses__()[3]() }}",
    "a file of ours": "{% include '/etc/passwd' %}",
    "nothing by nothing": "{{ 1 // 0 }}",
    "its own complaint": "{{ raise_exception('no " + ESC + "') }}",
    "lorem": "{{ lipsum(n=99999999) }}",
}
# Lines of a data set, the second of which is bad.
LINES: dict[str, str] = {
    "an array": "[1]", "a number": "17", "null": "null", "text alone": '"x"', "cut short": '{"text": "x', "deep": DEEP,
    "deep inside": '{"text": "x", "more": ' + "[" * 300 + "]" * 300 + "}", "half a pair": r'{"text": "\udfff"}',
    "another key": '{"' + ESC.replace("\x1b", r"\u001b") + '": "x"}', "text is a list": '{"text": ["x"]}',
    "text is an object": '{"text": {}}', "text is NaN": '{"text": NaN}', "text is empty": '{"text": ""}',
    "5000 digits": '{"text": ' + "9" * 5000 + "}", "nothing there": "{}", "python's": "{'text': 'x'}",
    "U+2028 between": '{"text":\u2028"x"}', "a control character": '{"text": "a\x1bb"}',
}  # fmt: skip
CHATS: dict[str, Any] = {
    "messages is text": {"messages": "x"},
    "messages is empty": {"messages": []},
    "a message is text": {"messages": ["x"]},
    "no role": {"messages": [{"content": "x"}]},
    "role is a list": {"messages": [{"role": ["user"], "content": "x"}]},
    "content is a number": {"messages": [{"role": "user", "content": 3}]},
    "content is an object": {"messages": [{"role": "user", "content": {"a": 1}}]},
    "a part is a picture": {"messages": [{"role": "user", "content": [{"type": ESC}]}]},
    "weight is 3": {"messages": [{"role": "user", "content": "x", "weight": [3]}]},
    "calls are text": {"messages": [{"role": "assistant", "content": "", "tool_calls": "{"}]},
    "calls are deep": {"messages": [{"role": "assistant", "content": "", "tool_calls": DEEP}]},
    "calls have no name": {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
    "a noncharacter": {"messages": [{"role": "user", "content": "\ufdd0"}]},
    "a speaker is a list": {"conversations": [{"from": ["human"], "value": "x"}]},
    "a turn without a value": {"conversations": [{"from": "human"}]},
    "an instruction is a number": {"instruction": 3, "output": "y"},
    "margin of 400 digits": {"chosen": "a", "rejected": "b", "margin": 10**400},
    "tools are a number": {"messages": [{"role": "user", "content": "x"}], "tools": 3},
    "settings are a list": {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": [1]},
}


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


def make_files(f: Path) -> None:
    for name, content in KINDS.items():
        if content is not None:
            write(f / name, content)
    (f / "folder").mkdir()
    os.mkfifo(f / "pipe")
    (f / "loop").symlink_to(f / "loop")
    (f / "nowhere").symlink_to(f / "none")
    with (f / "sparse").open("wb") as file:
        file.truncate(50 << 30)
    model_folder(f / "model")
    for name, edits in SETTINGS_EDITS.items():
        settings = {key: value for key, value in (SETTINGS | edits).items() if value is not None}
        model_folder(f / "settings" / name, settings if edits != {"hidden_size": None} else settings | edits)
    for name, text in SETTINGS_TEXTS.items():
        model_folder(f / "texts" / name, text.encode())
    for name, files in TOKENIZERS.items():
        model_folder(f / "tokenizers" / name, **files)
    for name, weights in WEIGHTS.items():
        model_folder(f / "weights" / name, weights=weights)
    for name, index in INDEXES.items():
        model_folder(f / "indexes" / name)
        (f / "indexes" / name / "model.safetensors").rename(f / "indexes" / name / "a.safetensors")
        write(f / "indexes" / name / "model.safetensors.index.json", index)
    os.mkfifo(f / "indexes" / "a pipe" / "p.safetensors")
    for name, content in GGUFS.items():
        write(f / "gguf" / f"{name}.gguf", content)
    for name, text in TEMPLATES.items():
        write(f / "templates" / f"{name}.jinja", text)
    for name, line in LINES.items():
        write(f / "lines" / f"{name}.jsonl", f'{{"text": "good"}}\n{line}\n')
    for name, chat in CHATS.items():
        write(f / "chats" / f"{name}.jsonl", json.dumps(chat) + "\n")
    for name, text in RUNS.items():
        write(f / "runs" / name / "config.json", text if isinstance(text, str) else json.dumps(text))
    for name, text in RECIPES.items():
        write(f / f"{name}.py", text)
    for name, line in PROMPTS.items():
        write(f / "prompts" / f"{name}.jsonl", line)
    for name, line in CHOICES.items():
        write(f / "choices" / f"{name}.jsonl", line)
    write(f / "good.jsonl", '{"text": "a good document"}\n' * 64)
    write(f / "asked.jsonl", '{"prompt": "x", "choices": ["a", "b"]}\n')
    write(f / "question.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n')
    write(f / "bomb.jsonl.gz", gzip.compress(bytes(150 << 20), 9))
    write(f / f"{ESC}.jsonl", "{\n")
    write(f / "mega.idx", b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 2**40, 2**40))
    write(f / "mega.bin", b"\0" * 64)
    write(f / "tokens" / "summary.json", '{"shards": [{"tokens": 1e400}]}')
    write(f / "packed" / "manifest.json", '{"format": "ringbpt packed rows 1", "shards": ' + DEEP + "}")
    write(f / "stale" / "state.json", '{"_data_files": [{"filename": "../../x"}]}')
    write(f / "x.parquet", b"PAR1" + bytes(40) + b"PAR1")
    write(f / "x.arrow", b"ARROW1\0\0" + bytes(40))
    write(f / "x.csv", 'text\n"never closed\n')
    write(f / "latin.csv", b"te\xffxt,x\na,b\n")
    write(f / "blank.csv", "\n\ntext,x\na,b\n")
    for name, content in ADAPTERS.items():
        write(f / "adapters" / name / "adapter_config.json", content)
    (f / "open").mkdir()
    (f / "open").chmod(0o777)


# What a file may turn out to be; None: no content of ours.
KINDS: dict[str, bytes | None] = {
    "empty": b"",
    "nul": b"\0" * 4096,
    "noise": bytes(np.random.default_rng(0).integers(128, 256, 4096, np.uint8)),
    "bom": b"\xef\xbb\xbf",
    "deep": DEEP.encode(),
    "brackets": b'{"a":' * 100_000,
    "pickle": b"\x80\x04\x95K.",
    "zip": b"PK\x03\x04" + bytes(60),
    "missing": None,
    "folder": None,
    "pipe": None,
    "loop": None,
    "nowhere": None,
    "sparse": None,
    LONG: None,
}
# Who reads a file: the entry, and its flags, {} being the file.
DATA = "--train_dataset.json_dataset.path="
READERS: dict[str, tuple[str, str]] = {
    "data": ("inspect", f"{{small}} {DATA}{{}}"),
    "tokenizer": ("inspect", "{small} --tokenizer.vocab_file={}"),
    "template": ("inspect", f"{{small}} {DATA}{{f}}/question.jsonl --train_dataset.text_processor.chat_template={{}}"),
    "recipe": ("train", "--config={}"),
    "weights": ("train", "{small} --load_checkpoint=params::{}"),
    "gguf": ("train", "{small} --load_checkpoint=gguf::{}"),
    "folder": ("train", "{small} --load_checkpoint=huggingface::{}"),
    "prompts": ("generate", "--load_checkpoint=huggingface::{f}/model --prompts={}"),
    "choices": ("evaluate", "--load_checkpoint=huggingface::{f}/model --choices={}"),
    "texts": ("evaluate", "--load_checkpoint=huggingface::{f}/model --perplexity={}"),
    "adapter": ("generate", "--load_checkpoint=huggingface::{f}/model --prompt=a --max_new_tokens=4 --adapter={}"),
    "converted": ("scripts/hf2jax.py", "--checkpoint_dir={} --output_file={out}"),
    "run": ("plan", "--topology=8xh100 --check_run={}"),
}
# adapter_config.json beside nothing.
ADAPTERS = {
    "nothing": b"",
    "half an object": b'{"peft_type": "LORA"',
    "a list": b"[]",
    "no kind": b"{}",
    "another kind": b'{"peft_type": ["LORA"]}',
    "a rank of text": b'{"peft_type": "LORA", "r": "4"}',
    "a rank without end": b'{"peft_type": "LORA", "r": 1e999}',
    "a pattern that is none": b'{"peft_type": "LORA", "rank_pattern": {"(": 4}}',
    "patterns that are none": b'{"peft_type": "LORA", "alpha_pattern": "q_proj"}',
    "no tensors": b'{"peft_type": "LORA", "r": 4}',
    "depth": DEEP.encode(),
}
HEADER, DATA_BYTES = whole_header()
FIRST = "model.embed_tokens.weight"


def edited(**about: Any) -> bytes:
    return safetensors(HEADER | {FIRST: HEADER[FIRST] | about}, DATA_BYTES)


WEIGHTS = {
    "empty": b"",
    "7 bytes": b"1234567",
    "a length without end": struct.pack("<Q", 2**63) + b"{}",
    "no JSON": safetensors(b"{" * 80),
    "a list": safetensors([]),
    "deep": safetensors(DEEP.encode()),
    "twice": safetensors(b'{"a": 1, "a": 2}'),
    "NaN": safetensors(b'{"a": NaN}'),
    "half a pair": safetensors(rb'{"\ud800": {}}'),
    "no tensors": safetensors({}),
    "truncated": safetensors(HEADER, DATA_BYTES[:-1]),
    "a byte more": safetensors(HEADER, DATA_BYTES + b"x"),
    "a tensor more": safetensors(HEADER | {ESC: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, DATA_BYTES),
    "shape 288.5": edited(shape=[288.5]),
    "shape as text": edited(shape="32"),
    "shape below 0": edited(shape=[-32, 16]),
    "shape beyond all": edited(shape=[2**62, 2**62]),
    "offsets of one": edited(data_offsets=[0]),
    "offsets that are NaN": edited(data_offsets=[0, None]),
    "dtype": edited(dtype=ESC),
    "dtype a list": edited(dtype=["F32"]),
    "null": safetensors(HEADER | {FIRST: None}, DATA_BYTES),
    "metadata": safetensors(HEADER | {"__metadata__": {"a": 1}}, DATA_BYTES),
}
INDEXES = {
    "a list": "[]",
    "no map": '{"weight_map": []}',
    "names that are numbers": '{"weight_map": {"a": 3}}',
    "a file outside": '{"weight_map": {"a": "../a.safetensors"}}',
    "a file that is missing": '{"weight_map": {"a": "none.safetensors"}}',
    "a pipe": '{"weight_map": {"a": "p.safetensors"}}',
    "ESC": json.dumps({"weight_map": {ESC: "a.safetensors"}}),
    "deep": '{"weight_map": ' + DEEP + "}",
    "cut short": '{"weight_map": {"a',
}
RUNS: dict[str, Any] = {
    "no JSON": "{",
    "deep": '{"llama": ' + DEEP + "}",
    "NaN": '{"llama": {"theta": NaN}, "tokenizer": {}}',
    "no llama": {"tokenizer": {}},
    "llama a list": {"llama": [], "tokenizer": {}},
    "another's": {"model_type": "llama"},
    "sizes as text": RUN | {"llama": {"hidden_size": "16"}},
    "epsilon as text": RUN | {"llama": {"rms_norm_eps": "1e-6"}},
    "size in a list": RUN | {"llama": {"hidden_size": [288.5]}},
    "10^9 layers": RUN | {"llama": {"num_hidden_layers": 10**9}},
    "no heads": RUN | {"llama": {"num_attention_heads": 0}},
    "a scaling": RUN | {"llama": {"rope_scaling_type": ESC}},
    "tokenizer a number": RUN | {"tokenizer": {"vocab_file": 3}},
    "origin a list": RUN | {"load_checkpoint": ["huggingface::x"]},
}
RECIPES = {
    "raises": "raise ValueError('no " + r"\x1b[31m" + "')\n",
    "leaves": "import sys\nsys.exit(3)\n",
    "nothing": "x = 1\n",
    "syntax": "def get_config(:\n",
    "none": "def get_config():\n    return None\n",
    "nul": "x = '\0'\n",
    "latin": b"# caf\xe9\n",
    "endless": "def get_config():\n    return get_config()\n",
    "odd": "from ringbpt.config import default_config\ndef get_config():\n    tree = default_config()\n"
    "    tree.mesh_dim = [1]\n    return tree\n",
}
PROMPTS = {
    "no JSON": "{\n",
    "no prompt": '{"text": "x"}\n',
    "prompt is a number": '{"prompt": 3}\n',
    "prompt is NaN": '{"prompt": NaN}\n',
    "half a pair": '{"prompt": "\\ud800"}\n',
    "deep": '{"prompt": "x", "a": ' + DEEP + "}\n",
    "a list": "[]\n",
    "no UTF-8": b'{"prompt": "\xff"}\n',
    "blank": "\n \n",
    "the second": '{"prompt": "a"}\n{"prompt": null}\n',
    "no roles": '{"messages": [{}]}\n',
}
CHOICES = {
    "choices are text": '{"prompt": "x", "choices": "ab"}\n',
    "choices are an object": '{"prompt": "x", "choices": {"a": 1, "b": 2}}\n',
    "one choice": '{"prompt": "x", "choices": ["a"]}\n',
    "a choice is empty": '{"prompt": "x", "choices": ["a", ""]}\n',
    "answer beyond": '{"prompt": "x", "choices": ["a", "b"], "answer": 2}\n',
    "answer is 0.5": '{"prompt": "x", "choices": ["a", "b"], "answer": 0.5}\n',
    "answer is true": '{"prompt": "x", "choices": ["a", "b"], "answer": true}\n',
    "answer is 1e400": '{"prompt": "x", "choices": ["a", "b"], "answer": 1e400}\n',
    "answer is another": '{"prompt": "x", "choices": ["a", "b"], "answer": "c"}\n',
}

# --- flags ---

MODEL = "--load_checkpoint=huggingface::{f}/model"
SMALL = "{small}"
ASKED = "--objective=grpo --eval_steps=0 --rollout.prompts={f}/good.jsonl"
FLAGS: dict[str, list[tuple[str, str]]] = {
    "train": [
        ("--totl_steps=3", "--total_steps?"),
        ("--profile=3", "--profile=10,3"),
        ("--profile=9,3 --total_steps=10", "--profile=9,2"),
        ("--lora.rank=-1", "--lora.rank=-1 is below 0"),
        ("--lora.rank=99999999999", "16384 at most"),
        (f"--lora.rank=4 --lora.target_modules={ESC}", r"\x1b"),
        ("--lora.rank=4 --lora.target_modules=(((", "is no pattern"),
        ("--lora.rank=4 --lora.rank_pattern=dict(q_proj=1e400)", "q_proj"),
        ("--lora.rank=4 --lora.alpha=nan", "--lora.alpha"),
        ("--objective=reward --eval_steps=5 --eval_passkey=64", "predicts none"),
        ("--llama.head=score", "--objective=reward"),
        ("--rollout.environment=x.py:E", "and --objective=sft has none: --objective=grpo"),
        (f"{ASKED} --rollout.reward=x.py:f --rollout.environment=x.py:E", "leave --rollout.reward out"),
        (f"{ASKED} --rollout.environment=x.py:E", "chat template"),
        (f"{ASKED} --rollout.max_turns=0", "below 1"),
        ("--total_steps=0", "--total_steps=0 is below 1"),
        ("--total_steps=1.5", "write 1"),
        ("--total_steps=9007199254740992", "--total_steps=2147483647 at most"),
        ("--total_steps=" + "9" * 5000, "--total_steps="),
        ("--total_steps=3 --total_steps=4", "twice"),
        ("--seed=-1", "--seed=-1 is below 0"),
        ("--num_cpu_devices=1000000000", "--num_cpu_devices=4096 at most"),
        ("--mesh_dim=1,1,1,999999999", "--num_cpu_devices"),
        ("--mesh_dim=0", "--mesh_dim='0'"),
        ("--mesh_dim=-1,-1,1,1", "more than one -1"),
        ("--mesh_dim=a,b,c,d", "no size of an axis"),
        ("--mesh_dim=1,1,1," + "9" * 4000, "no size of an axis"),
        ("--llama.num_hidden_layers=1000000000", "4096 at most"),
        ("--llama.vocab_size=100000000000", "16777216 at most"),
        ("--llama.hidden_size=9007199254740992", "1048576 at most"),
        ("--llama.num_attention_heads=0", "below 1"),
        ("--llama.rms_norm_eps=nan", "not a finite number"),
        ("--optimizer.adamw_optimizer.lr=nan", "not a finite number"),
        ("--optimizer.adamw_optimizer.lr=-1", "below 0"),
        ("--optimizer.adamw_optimizer.lr=1e999", "not a finite number"),
        ("--update_llama_config=__import__('os').system('x')", "no literal"),
        ("--update_llama_config=dict(a=9**9**9)", "no literal"),
        ("--update_llama_config=().__class__", "no dict"),
        ("--update_llama_config=dict(" + "x=dict(" * 40 + ")" * 41, "--update_llama_config"),
        ("--update_llama_config=" + "(" * 4000, "--update_llama_config"),
        ("--update_llama_config=" + "x" * 9000, "8192 at most"),
        ("--load_checkpoint=nosuch::x", "'nosuch::' is none of"),
        ("--load_checkpoint=params::", "no path"),
        ("--load_checkpoint=x", "does not say what it holds"),
        (f"{SMALL} --load_checkpoint=params::~nosuchuser/x", "no such file or folder"),
        (f"--config={ESC}.py", r"\x1b[31mred\u202e"),
        (f"--{ESC}=1", r"\x1b"),
        (f"{SMALL} --logger.experiment_id=../../x", "not a plain name"),
        (f"{SMALL} --logger.experiment_id={LONG}", "a name of 300 bytes"),
        (f"{SMALL} --logger.output_dir={{f}}/good.jsonl", "no folder"),
        (f"{SMALL} --logger.output_dir={{f}}/good.jsonl/x", "no folder"),
        (f"{SMALL} --logger.output_dir={{f}}/pipe", "no folder"),
        (f"{SMALL} --logger.output_dir={{f}}/loop", "no folder"),
        (f"{SMALL} --logger.output_dir={{f}}/{LONG}", "a name of 300 bytes"),
        (f"{SMALL} --load_dataset_state={{f}}/none", "--load_dataset_state="),
        (f"{SMALL} --load_dataset_state={{f}}/model", "--load_dataset_state="),
        ("--jax_distributed.coordinator_address=nowhere", "<host>:<port>"),
        ("--jax_distributed.coordinator_address=10.0.0.1:99999", "between 1 and 65535"),
        ("--jax_distributed.coordinator_address=10.0.0.1:0", "between 1 and 65535"),
        ("--jax_distributed.coordinator_address=a^b:80", "<host>:<port>"),
        ("--jax_distributed.coordinator_address=http://h:80", "<host>:<port>"),
        ("--jax_distributed.num_processes=2 --jax_distributed.process_id=5", "--jax_distributed.process_id"),
        (f"{SMALL} --eval_steps=1 --eval_passkey=99999999999", "no list of lengths"),
        (f"{SMALL} --eval_steps=1 --eval_passkey=" + "9" * 5000, "no list of lengths"),
        (f"{SMALL} --mesh_dim=1,2,1,1", "'1,8,1,1' fits"),
        (
            f"{SMALL} --llama.hidden_size=132 --llama.num_attention_heads=6 --mesh_dim=1,1,1,8",
            "--llama.hidden_size=132",
        ),
        (f"{SMALL} --mesh_dim=1,1,1,8 --train_dataset.json_dataset.seq_length=66", "seq_length=64"),
        (f"{SMALL} --tokenizer.vocab_file={{f}}/good.jsonk", "the nearest name is"),
        (f"{SMALL} {DATA}{{f}}/empty", "/empty:1: "),
        (f"{SMALL} --llama.vocab_size=200", "--llama.vocab_size=258 works"),
        (f"{SMALL} --load_checkpoint=params::{{f}}/none", "/none: no such"),
        (f"{SMALL} --train_dataset.on_bad_line=skip:x", "skip:10"),
        (f"{SMALL} --train_dataset.text_processor.fields=,", "--train_dataset.text_processor.fields"),
        (f"{SMALL} --train_dataset.text_processor.roles_to_train=,", "an empty name"),
        (f"{SMALL} --train_dataset.json_dataset.seq_length=99999999999", "2147483647 at most"),
        (f"{SMALL} --train_dataset.json_dataset.batch_size=99999999", "--train_dataset.json_dataset.batch_size"),
        (f"{SMALL} {DATA}s3://user:secret@host/x", "user:***@host"),
        (f"{SMALL} {DATA}{{f}}/bomb.jsonl.gz", "times its own size"),
        (f"{SMALL} {DATA}{{f}}/*.nothing", "matches no file"),
        (f"{SMALL} {DATA}/dev/zero", "a pipe or a device"),
        (f"{SMALL} {DATA}{{f}}/{ESC}.jsonl", r"\x1b"),
        (f"{SMALL} --train_dataset.type=csv --train_dataset.files_dataset.path={{f}}/x.csv", "never closed"),
        (f"{SMALL} --train_dataset.type=csv --train_dataset.files_dataset.path={{f}}/latin.csv", "latin.csv:1: "),
        (f"{SMALL} --train_dataset.type=csv --train_dataset.files_dataset.path={{f}}/blank.csv", "blank.csv:1: "),
        (f"{SMALL} --train_dataset.type=parquet --train_dataset.files_dataset.path={{f}}/x.parquet", "x.parquet"),
        (f"{SMALL} --train_dataset.type=arrow --train_dataset.files_dataset.path={{f}}/x.arrow", "x.arrow"),
        (f"{SMALL} --train_dataset.type=arrow --train_dataset.files_dataset.path={{f}}/stale", "state.json"),
        (f"{SMALL} --train_dataset.type=array_record --train_dataset.files_dataset.path={{f}}/noise", "noise"),
        (f"{SMALL} --train_dataset.type=megatron --train_dataset.files_dataset.path={{f}}/mega.idx", "mega.idx"),
        (f"{SMALL} --train_dataset.type=text --train_dataset.files_dataset.path={{f}}/sparse", "sparse"),
    ],
    "generate": [
        ("--prompt=x", "--load_checkpoint is missing"),
        (MODEL, "--prompt=TEXT"),
        (f"{MODEL} --prompt=a --chat", "give one of"),
        (f"{MODEL} --prompt=a --max_new_tokens=99999999999", "2147483647 at most"),
        (f"{MODEL} --prompt=a --max_new_tokens=1000000", "--max_new_tokens=63 at most"),
        (f"{MODEL} --prompt=a --batch_size=0", "below 1"),
        (f"{MODEL} --prompt=a --temperature=-1", "--temperature"),
        (f"{MODEL} --prompt=a --top_p=nan", "--top_p"),
        (f"{MODEL} --prompt=a --num_cpu_devices=99999999", "4096 at most"),
        (f"{MODEL} --prompt=a --max_new_tokens=4 --mesh_dim=1,1,1,999", "--mesh_dim"),
        (f"{MODEL} --prompt=a --tokenizer=/dev/zero", "a pipe or a device"),
        (f"{MODEL} --prompt=a --output={{f}}/folder", "no file"),
        (f"{MODEL} --prompt=a --output={{f}}/{LONG}", "a name of 300 bytes"),
        (f"{MODEL} --prompt=\udcff", "no UTF-8"),
        (f"{MODEL} --prompt=a --max_new_tokens=4 --adapter={{f}}/{ESC}", r"\x1b"),
        (f"{MODEL} --prompt=a --dtype={ESC}", r"\x1b"),
        ("--load_checkpoint=params::{f}/folder --prompt=a", "no config.json of a run"),
    ],
    "rollout": [
        (MODEL, "--prompts"),
        (f"{MODEL} --prompts={{f}}/missing.jsonl --output={{out}}/x.jsonl", "missing.jsonl"),
        (f"{MODEL} --prompts={{f}}/good.jsonl --output={{out}}/x.jsonl --keep=best", "--reward=FILE.py:NAME"),
        (f"{MODEL} --prompts={{f}}/good.jsonl --output={{out}}/x.jsonl --keep=much", "--keep"),
        (
            f"{MODEL} --prompts={{f}}/good.jsonl --output={{out}}/x.jsonl --keep=pair --reward=x.py:f",
            "--samples=4",
        ),
        (f"{MODEL} --prompts={{f}}/good.jsonl --output={{out}}/x.jsonl --temperature=0", "must be above 0"),
    ],
    "serve": [
        ("--port=0", "--load_checkpoint is missing"),
        (f"{MODEL} --port=65536", "65535 at most"),
        (f"{MODEL} --port=-1", "below 0"),
        (f"{MODEL} --host=0.0.0.0 --port=0", "RINGBPT_API_KEY"),
        (f"{MODEL} --host=:: --port=0", "RINGBPT_API_KEY"),
        (f"{MODEL} --host=nosuch.invalid --port=0", "RINGBPT_API_KEY"),
        (f"{MODEL} --host={ESC} --api_key=k", r"\x1b"),
        (f"{MODEL} --api_key=k{ESC} --port=0", "plain characters"),
        (f"{MODEL} --batch_size=0", "below 1"),
        (f"{MODEL} --max_new_tokens=0", "below 1"),
        (f"{MODEL} --chat_template={{f}}/none.jinja --port=0", "none.jinja"),
        (f"{MODEL} --mesh_dim=1,1,1,999 --port=0", "--mesh_dim"),
        ("--load_checkpoint=params::{f}/folder --port=0", "no config.json of a run"),
    ],
    "evaluate": [
        (MODEL, "give at least one of"),
        (f"{MODEL} --passkey=99999999999", "no list of lengths"),
        (f"{MODEL} --passkey=9999999999", "--passkey=64"),
        (f"{MODEL} --passkey=" + "9" * 5000, "no list of lengths"),
        (f"{MODEL} --passkey=65", "--passkey=64"),
        (f"{MODEL} --passkey=3 --tokenizer=bytes", "no room for its question"),
        (f"{MODEL} --passkey=\u0661\u0662", "no list of lengths"),
        (f"{MODEL} --perplexity={{f}}/good.jsonl --tokenizer=bytes", "has a vocabulary of 32"),
        (f"{MODEL} --choices={{f}}/asked.jsonl --tokenizer=bytes", "has a vocabulary of 32"),
        (f"{MODEL} --passkey=32 --samples=99999999", "10000 at most"),
        (f"{MODEL} --passkey=32 --depths=0", "below 1"),
        (f"{MODEL} --passkey=32 --output={{f}}/good.jsonl", "no folder"),
        (f"{MODEL} --passkey=32 --json={{f}}/none/x.json", "make it first"),
        (f"{MODEL} --passkey=32 --json={{f}}/folder", "no file"),
        (f"{MODEL} --passkey=32 --seed=-1", "below 0"),
    ],
    "inspect": [
        (
            f"{SMALL} --objective=grpo --rollout.prompts={{f}}/good.jsonl --rollout.reward=x.py:f",
            "learns from what the run itself samples",
        ),
        (f"{SMALL} --batches=0", "below 1"),
        (f"{SMALL} --split=nothing", "train_dataset"),
        (f"{SMALL} --json={{f}}/none/x", "make it first"),
        (f"{SMALL} --json={{f}}/folder", "no file"),
        (f"{SMALL} --html={{f}}/folder", "no file"),
        (f"{SMALL} --html={{f}}/{LONG}", "a name of 300 bytes"),
        (f"{SMALL} --digest=-1", "below 0"),
        (f"{SMALL} --train_dataset.type=tokens --train_dataset.files_dataset.path={{f}}/model", "neither a manifest"),
    ],
    "columns": [
        (f"{SMALL}", "--objective=sft is compared with no reference model"),
        (f"{SMALL} --objective=dpo", "a 'text' example does not go with --objective=dpo"),
        (f"{SMALL} --objective=exo --preference.label_smoothing=0", "--preference.label_smoothing=0.1"),
        (f"{SMALL} --objective=dpo --preference.beta=0", "must be above 0"),
        (f"{SMALL} --objective=dpo --reference_checkpoint=here", "params::here"),
        (f"{SMALL} --objective=dpoo", "--objective='dpo'"),
    ],
    "plan": [
        ("", "--topology is missing"),
        ("--topology=v9-1", "did you mean"),
        ("--topology=cpu-0", "cpu-0"),
        ("--topology=" + "9" * 400, "no machine"),
        (f"--topology={ESC}", r"\x1b"),
        ("--topology=999999x999999xh100", "16384 at most"),
        ("--topology=" + "9" * 5000 + "xh100", "no machine"),
        ("--topology=cpu-8 --llama.num_hidden_layers=1000000000", "4096 at most"),
        ("--topology=cpu-8 --png={f}/folder", "no file"),
        ("--topology=cpu-8 --json={f}/none/x", "make it first"),
        ("--topology=cpu-8 --num_cpu_devices=1000000000", "4096 at most"),
        ("--topology=8xh100 --check_run={f}/good.jsonl", "no row with step_seconds"),
        ("--topology=8xh100 --check_run={f}/none", "--check_run="),
        ("--topology=8xh100 --check_run={f}/folder", "a folder"),
    ],
    "verify": [
        (
            f"{SMALL} --objective=grpo --rollout.prompts={{f}}/good.jsonl --rollout.reward=x.py:f",
            "learns from what the run itself samples",
        ),
        ("--tolerance=nan", "not a finite number"),
        ("--tolerance=-1", "below 0"),
        ("--tolerance=x", "is not a number"),
        ("--json={f}/none/x", "make it first"),
        ("--json={f}/pipe/x", "no folder"),
        ("--nosuch", "no flag"),
        ("--num_cpu_devices=-1", "below 0"),
    ],
    "autotune": [
        ("--nosuch=1", "no flag here"),
        ("--kernel=nosuch", "--kernel=nosuch"),
        ("--tokens=0", "below 1"),
        ("--tokens=99999999999", "at most"),
        ("--head_dim=a", "no list of numbers"),
        ("--head_dim=" + "9" * 5000, "no list of numbers"),
        ("--blocks=0", "no list of numbers"),
        ("--heads=3 --kv_heads=2", "does not divide"),
        ("--budget_s=-1", "below 0"),
    ],
    "checkpoint": [
        ("", "did you mean"),
        ("ls", "did you mean"),
        ("lss {f}/model", "checkpoint ls runs/<run>"),
        ("ls {f}/none", "no such folder"),
        ("verify {f}/good.jsonl", "no such folder"),
        (f"verify {{f}}/{LONG}", "no such folder"),
        (f"verify {{f}}/{ESC}", r"\x1b"),
        ("ls {f}/model --json={f}/none/x", "make it first"),
    ],
    "scripts/hf2jax.py": [
        ("", "--checkpoint_dir is missing"),
        ("--checkpoint_dir={f}/model", "--output_file is missing"),
        ("--checkpoint_dir={f}/model --output_file={f}/good.jsonl", "no folder"),
        ("--checkpoint_dir={f}/model --output_file={f}/folder", "exists already"),
        ("--checkpoint_dir={f}/model --output_file={out} --model_size=7b", "--model_size=7b"),
        ("--checkpoint_dir={f}/model --output_file={out} --model_size=x", "--model_size=x"),
        ("--checkpoint_dir={f}/model --output_file={out} --max_shard_gb=nan", "not a finite number"),
        ("--checkpoint_dir={f}/model --output_file={out} --max_shard_gb=0", "above 0"),
        ("--checkpoint_dir=/dev/zero --output_file={out}", "/dev/zero"),
    ],
    "scripts/jax2hf.py": [
        ("--output_dir={out}", "--load_checkpoint is missing"),
        ("--load_checkpoint=huggingface::{f}/model --output_dir={out}", "already: copy it"),
        ("--load_checkpoint=params::{f}/none --output_dir={out}", "no such file or folder"),
        ("--load_checkpoint=params::{f}/folder --output_dir={out}", "no config.json of a run"),
        ("--load_checkpoint=params::{f}/folder --output_dir={f}/pipe", "no folder"),
        ("--load_checkpoint=gguf::{f}/noise --output_dir={out}", "no GGUF file"),
    ],
    "scripts/make_passkey.py": [
        ("", "--output is missing"),
        ("--output={f}/folder", "no file"),
        ("--output={out}.jsonl --count=0", "below 1"),
        ("--output={out}.jsonl --length=99999999999", "16777216 at most"),
        ("--output={out}.jsonl --length=10", "no room for its question"),
        ("--output={out}.jsonl --seed=-1", "below 0"),
    ],
    "scripts/compare_runs.py": [
        ("", "--run is missing"),
        ("--run={f}/folder --output={out}.png", "no metrics.jsonl there"),
        ("--run={f}/folder --output={f}/good.jsonl/x.png", "no folder"),
    ],
    "scripts/make_preferences.py": [
        ("", "--output is missing"),
        ("--output={f}/good.jsonl/x", "no folder"),
        ("--output={out} --pairs=0", "below 1"),
        ("--output={out} --seed=-1", "below 0"),
    ],
    "scripts/make_prompts.py": [
        ("", "--output is missing"),
        ("--output={f}/good.jsonl/x", "no folder"),
        ("--output={out} --task=passkeys", "--task='passkey'"),
        ("--output={out} --task=passkey --length=9", "below 48"),
        ("--output={out} --count=0", "below 1"),
    ],
    "scripts/environments.py": [
        ("", "--output is missing"),
        ("--output={f}/good.jsonl/x", "no folder"),
        ("--output={out} --count=0", "below 1"),
    ],
    "scripts/bench_shared_prompts.py": [
        (f"{SMALL} --answers=x", "--answers=2"),
        (f"{SMALL} --prompt=1", "must be below 1"),
    ],
    "scripts/bench_experts.py": [
        ("--chosen=9", "at most that"),
        ("--tokens=0", "below 1"),
    ],
    "scripts/bench_reduce.py": [
        (f"{SMALL} --every=0", "below 1"),
    ],
    "scripts/prepare_data.py": [
        ("", "--output is empty"),
        (f"{SMALL} --output={{f}}/good.jsonl/x", "no folder"),
        (f"{SMALL} --output={{f}}/model", "is not empty"),
        (f"{SMALL} --output={{out}} --processes=0", "below 1"),
        (f"{SMALL} --output={{out}} {DATA}/dev/zero", "a pipe or a device"),
    ],
    "scripts/train_tokenizer.py": [
        ("", "--output='' is empty"),
        (f"{SMALL} --output={{f}}/folder", "there already"),
        (f"{SMALL} --output={{out}}.model --kind=nosuch", "sentencepiece"),
        (f"{SMALL} --output={{out}}.model --vocab_size=0", "below 1"),
        (f"{SMALL} --output={{out}}.model --vocab_size=99999999999", "at most"),
        (f"{SMALL} --output={{f}}/none/x.model", "make it first"),
    ],
    "scripts/demo.py": [("--output_dir={f}/good.jsonl", "no folder"), ("--nosuch", "no flag")],
    "scripts/screenshot.py": [("--output={f}/folder", "no file"), ("--nosuch", "no flag")],
    "scripts/bench_data.py": [("--megabytes=0", "below 1"), ("--folder={f}/pipe", "no folder")],
    "scripts/bench_attention.py": [
        ("--T=0", "below 1"),
        ("--strategy=x", "--strategy"),
        ("--rival_chunk_size=a", "each"),
    ],
    "scripts/balance.py": [("--timed_runs=-1", "below 0"), ("--sp=2000", "at most"), ("--block=0", "below 1")],
    "scripts/bench_kernels.py": [
        ("--lengths=a", "--lengths"),
        ("--kernels=x", "--kernels=x"),
        ("--heads=3", "--heads"),
    ],
    "scripts/bench_step.py": [
        ("--steps=131072", "--steps=131072x2"),
        ("--parts=step", "--parts=step"),
        ("--kernels=x", "--kernels=x"),
        ("--budget_s=0", "above 0"),
        ("--out={f}/good.jsonl/x", "no folder"),
        ("", "--tiny"),
    ],
    "scripts/bench_decode.py": [("--context=0", "below 1"), ("--layers=x", "not a whole number")],
    "scripts/bench_convert.py": [("", "--folder is missing"), ("--folder={f}/pipe", "no folder")],
    "scripts/compare_maxtext.py": [
        ("--only=nosuch", "did you mean"),
        ("--side=mine", "ours, theirs, plain"),
        ("--minutes=0", "above 0"),
    ],
    "scripts/context_lengths.py": [("--close=0", "above 1"), ("--most=0", "below 1")],
    "scripts/compare_splash.py": [("--tokens=0", "below 512"), ("--topology=v9-1", "did you mean")],
}
OPEN_CACHE = f"{SMALL} --output={{out}} --train_dataset.cache_dir={{f}}/open"
TOKENS = f"{SMALL} --train_dataset.type=tokens --train_dataset.files_dataset.path={{f}}/tokens"
STORAGE: dict[str, tuple[str, str, str]] = {
    "where nothing can be made": ("train", f"{SMALL} --logger.output_dir=/proc/ringbpt", "/proc"),
    "an output where nothing can be made": ("evaluate", f"{MODEL} --passkey=32 --output=/proc/ringbpt/x", "/proc"),
    "a picture where nothing can be made": ("plan", "--topology=cpu-8 --png=/proc/x.png", "/proc"),
    "an open cache": ("inspect", f"{SMALL} --train_dataset.cache_dir={{f}}/open", "can be written by others"),
    "a file for a cache": ("inspect", f"{SMALL} --train_dataset.cache_dir={{f}}/good.jsonl", "give a folder with room"),
    "rows in an open cache": ("scripts/prepare_data.py", OPEN_CACHE, "written by others"),
    "no checkpoints": ("checkpoint", "ls {f}/model", "no checkpoints"),
    "tokens without sense": ("inspect", TOKENS, "offset.npy"),
}


def of_files() -> Iterator[tuple[str, Case]]:
    for reader, (entry, flags) in READERS.items():
        for kind in [*KINDS, "/dev/zero"]:
            if (reader, kind) in LET_THROUGH:
                continue
            path = kind if kind.startswith("/") else f"{{f}}/{kind}"
            yield f"{reader}: {kind[:20]}", Case(entry, flags.replace("{}", path))
    hf2jax = "--checkpoint_dir={f}/%s --output_file={out}"
    for folder, names in (
        ("settings", SETTINGS_EDITS),
        ("texts", SETTINGS_TEXTS),
        ("weights", WEIGHTS),
        ("indexes", INDEXES),
    ):
        for name in names:
            yield f"{folder}, {name}", Case("scripts/hf2jax.py", hf2jax % f"{folder}/{name}")
    for name in GGUFS:
        yield f"gguf: {name}", Case("scripts/hf2jax.py", hf2jax % f"gguf/{name}.gguf", name + ".gguf")
    for name in TOKENIZERS:
        yield (
            f"tokenizer: {name}",
            Case("generate", f"--load_checkpoint=huggingface::{{f}}/tokenizers/{name} --prompt=a"),
        )
    template = f"{SMALL} {DATA}{{f}}/question.jsonl --train_dataset.text_processor.chat_template={{f}}/templates/"
    for name in TEMPLATES:
        yield f"template: {name}", Case("inspect", f"{template}{name}.jinja", "")
    for name in LINES:
        yield f"line: {name}", Case("inspect", f"{SMALL} {DATA}{{f}}/lines/{name}.jsonl", ".jsonl:2: ")
    chatml = "--train_dataset.text_processor.chat_template=chatml"
    for name in CHATS:
        yield f"chat: {name}", Case("inspect", f"{SMALL} {chatml} {DATA}{{f}}/chats/{name}.jsonl", ".jsonl:1: ")
    for name in RUNS:
        yield f"run: {name}", Case("generate", f"--load_checkpoint=params::{{f}}/runs/{name} --prompt=a", "config.json")
    for name in RECIPES:
        yield f"recipe: {name}", Case("train", f"--config={{f}}/{name}.py")
    for name in PROMPTS:
        yield f"prompts: {name}", Case("generate", f"{MODEL} --prompts={{f}}/prompts/{name}.jsonl")
    for name in ADAPTERS:
        yield (
            f"adapter of {name}",
            Case("generate", f"{MODEL} --prompt=a --max_new_tokens=4 --adapter={{f}}/adapters/{name}", "adapter"),
        )
    for name in CHOICES:
        yield f"choices: {name}", Case("evaluate", f"{MODEL} --choices={{f}}/choices/{name}.jsonl", ".jsonl:1: ")


# What is no mistake: a template may be empty text or any text, and a folder may be named by a link to nowhere.
LET_THROUGH = {("template", kind) for kind in ("empty", "bom", "nul", "deep", "zip", "brackets")}
CASES: dict[str, Case] = {
    f"{entry} {flags[:40]} {number}": Case(entry, flags, said)
    for entry, every in FLAGS.items()
    for number, (flags, said) in enumerate(every)
}
ENTRIES = (
    "train", "generate", "serve", "evaluate", "inspect", "columns", "plan", "verify", "autotune", "checkpoint",
    "rollout",
)  # fmt: skip
SCRIPTS = [f"scripts/{path.name}" for path in sorted((Path(__file__).parents[1] / "scripts").glob("*.py"))]
CASES |= {f"{entry}: no such flag": Case(entry, f"--nosuch={ESC}") for entry in (*ENTRIES, *SCRIPTS)}
CASES |= {name: Case(*about, code=4) for name, about in STORAGE.items()} | dict(of_files())
