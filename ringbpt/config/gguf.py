"""GGUF files, llama.cpp's: what their header says, checked against the file, and the config.json that it amounts to.

The header is read here, and not by the `gguf` package, whose reader takes a count or a length as the file has it and
three seconds for 50,000 tokens; what a type of tensor is called, how large its blocks are and what their bits mean is
the package's. No tensor is read. It stands beside families.py, and imports no jax, for the same reason.
Ref: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import os
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ringbpt.config.families import FAMILIES
from ringbpt.config.foreign import open_regular, read_json, user_path
from ringbpt.config.hub import model_folder
from ringbpt.config.values import UserError

MAGIC = b"GGUF"
TOKENIZER = "tokenizer.ggml.model"  # the key without which a file has no tokenizer
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# More than any file has: of bytes before the tensors, of values in an array, of a tensor's dims.
HEADER_BYTES, MOST_IN_ARRAY, MOST_DIMS = 1 << 28, 1 << 22, 8

# Prefixes of a --load_checkpoint that name a model with all that belongs to it -> what stands behind them.
FOREIGN = {"huggingface": "folder", "gguf": "file"}

# general.architecture -> Hugging Face's. Mistral's files say llama.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# Keys below the architecture's name -> keys of config.json.
_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_NEEDED = ("context_length", "embedding_length", "feed_forward_length", "block_count", "attention.head_count",
           "attention.layer_norm_rms_epsilon")  # fmt: skip
# Keys that change nothing where they say this, and are refused where they say something else.
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scale_linear": (1.0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "tensor_data_layout": ("Meta AI original pth",),  # the one that all files have
    "use_parallel_residual": (False,),
}
# Keys that say nothing about the model, or are read where they belong.
_READ_ELSEWHERE = {
    "vocab_size", "attention.value_length", "rope.dimension_count", "rope.scaling.factor", "rope.scaling.finetuned",
    "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
}  # fmt: skip
_SCALING = "rope.scaling.type"
ROPE_FACTORS = "rope_freqs.weight"  # a tensor that is a setting of the model
_EMBED, _UNEMBED = "token_embd.weight", "output.weight"
# Llama 3.1 and 3.2 differ in the factor alone, and a file holds only what comes out, a factor a frequency.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class GgufTensor(NamedTuple):
    """Where a tensor is, [rows, columns] or [columns]. A row is a whole number of blocks: block numbers in size bytes.

    kind: the type's name, as the gguf package has it. start: its first byte in the file.
    """

    kind: str
    shape: tuple[int, ...]
    start: int
    block: int
    size: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.block * self.size


class Gguf(NamedTuple):
    """The header of a file."""

    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def is_gguf(file: Path) -> bool:
    """Told by the first bytes, whatever its name."""
    try:
        with open_regular(file) as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except (OSError, UserError):
        return False


class _Damaged(Exception):
    pass


class _Reader:
    """Values one after the other, none from beyond the end of the file."""

    def __init__(self, content: mmap.mmap):
        self.content, self.at = content, 0

    def expect(self, count: int) -> None:
        """Raises _Damaged where so many bytes are not left."""
        if count > len(self.content) - self.at:
            raise _Damaged("it ends inside its header")

    def bytes(self, count: int) -> bytes:
        self.expect(count)
        if self.at + count > HEADER_BYTES:
            raise _Damaged(f"its header has more than {HEADER_BYTES} bytes")
        self.at += count
        return self.content[self.at - count : self.at]

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        width = struct.calcsize(f"<{code}")
        return struct.unpack(f"<{count}{code}", self.bytes(count * width))

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def text(self) -> str:
        return self.bytes(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise _Damaged(f"a value is of type {kind}, which there is not")
        kind, count = self.number("I"), self.number("Q")
        self.expect(count)
        if count > MOST_IN_ARRAY:
            raise _Damaged(f"an array has {count} values, and none has more than {MOST_IN_ARRAY}")
        if kind in _NUMBERS:
            return list(self.numbers(_NUMBERS[kind], count))
        if kind != _STRING:
            raise _Damaged(f"an array is of type {kind}: only arrays of numbers and of text are known here")
        return [self.text() for _ in range(count)]


def read_gguf(file: Path) -> Gguf:
    """The header of a file, every tensor checked to lie inside of it and on no other.

    Raises UserError in one line for a file that is missing, damaged, truncated, of another version, or one of several,
    for a type of tensor that the gguf package does not know, and where the package is not installed.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    return _read_once(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1)  # who loads a model asks for its settings, its tokenizer and its tensors
def _read_once(file: Path, size: int, changed: int) -> Gguf:
    try:
        with open_regular(file) as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            reader = _Reader(content)
            metadata, tensors = _read_header(reader)
            _check_places(tensors, size)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except (_Damaged, ValueError) as error:  # an empty file cannot be mapped, and text may be no UTF-8
        what = error if isinstance(error, _Damaged) else "no GGUF file, or a damaged one"
        raise UserError(f"{file}: {what}; copy it again") from None
    if metadata.get("split.count", 1) not in (0, 1):
        raise UserError(f"{file}: one of {metadata['split.count']} files: join them with llama-gguf-split --merge")
    return Gguf(file, metadata, tensors)


def _read_header(reader: _Reader) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    if reader.bytes(4) != MAGIC:
        raise _Damaged("no GGUF file")
    version = reader.number("I")
    if version not in (2, 3):
        raise _Damaged(f"GGUF version {version}, where 2 and 3, little-endian, are known here")
    tensor_count, count = reader.numbers("Q", 2)
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = reader.text()
        if key in metadata:
            raise _Damaged(f"the key {key} stands in it twice")
        metadata[key] = reader.value(reader.number("I"))
    raw: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensor_count):
        name = reader.text()
        if name in raw:
            raise _Damaged(f"tensor {name} stands in it twice")
        reader.expect(8 * (count := reader.number("I")))
        if count > MOST_DIMS:
            raise _Damaged(f"tensor {name} has {count} dims, and none has more than {MOST_DIMS}")
        dims = reader.numbers("Q", count)
        raw[name] = (dims[::-1], reader.number("I"), reader.number("Q"))  # the columns stand first in the file
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _Damaged(f"general.alignment={alignment} is no power of two")
    start = -(-reader.at // alignment) * alignment
    return metadata, {name: _tensor(name, *about, start, alignment) for name, about in raw.items()}


def _tensor(name: str, shape: tuple[int, ...], kind: int, offset: int, start: int, alignment: int) -> GgufTensor:
    sizes, types = _types()
    if kind not in list(types):
        raise _Damaged(f"tensor {name} is of type {kind}, which the gguf package does not know")
    block, size = sizes[types(kind)]
    if not shape or not math.prod(shape) or shape[-1] % block or offset % alignment:
        what = f"{list(shape)}, {types(kind).name}, at {offset}"
        raise _Damaged(f"the header of tensor {name} contradicts itself: {what}")
    return GgufTensor(types(kind).name, shape, start + offset, block, size)


def _types() -> tuple[Any, Any]:
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        raise UserError("a GGUF file needs the gguf package: pip install 'ringbpt[gguf]'") from None
    return GGML_QUANT_SIZES, GGMLQuantizationType


def _check_places(tensors: dict[str, GgufTensor], size: int) -> None:
    end, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < end:
            raise _Damaged(f"the tensors {before} and {name} overlap")
        end, before = tensor.start + tensor.nbytes, name
        if end > size:
            raise _Damaged(f"truncated: tensor {name} ends {end - size} bytes after the file does")


# --- what model it is ---


def find_foreign(spec: str, weights: bool = False) -> Path | None:
    """The path of a PREFIX::PATH that names a whole model; None where the prefix is another. weights: see model_folder.

    Raises UserError where nothing of that kind is there.
    """
    prefix, _, name = spec.partition("::")
    if prefix not in FOREIGN or not name:
        return None
    where = f"--load_checkpoint={spec}"
    path = model_folder(name, where, weights) if FOREIGN[prefix] == "folder" else user_path(name)
    if not (os.path.isdir(path) if FOREIGN[prefix] == "folder" else os.path.isfile(path)):
        raise UserError(f"{where}: no such {FOREIGN[prefix]}")
    return path


def model_settings(path: Path) -> tuple[dict[str, Any], str]:
    """(config.json, where it stands) of a Hugging Face folder, or what the header of a GGUF file amounts to.

    Raises UserError for what is wrong with either.
    """
    if os.path.isdir(path):
        return read_json(path / "config.json"), str(path / "config.json")
    return gguf_settings(read_gguf(path)), str(path)


def gguf_settings(header: Gguf) -> dict[str, Any]:
    """The config.json, in Hugging Face's words, of the model in a file.

    Raises UserError, by name, for another architecture and for a key that says what is not done here.
    """
    file, metadata, tensors = header
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UserError(f"{file}: general.architecture={name!r} is none of {', '.join(ARCHITECTURES)}")
    given = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
    window = given.pop("attention.sliding_window", 0) if name == "llama" else 0
    architecture = "MistralForCausalLM" if window else ARCHITECTURES[name]
    for key, value in given.items():
        if isinstance(value, list):
            raise UserError(f"{file}: {name}.{key} has a value for each layer: only one for all is supported")
        if value not in _ONLY.get(key, (value,)) or key not in {*_KEYS, *_ONLY, *_READ_ELSEWHERE, _SCALING}:
            raise UserError(f"{file}: {name}.{key}={value!r} is not supported")
        if key not in {*_ONLY, _SCALING} and not (type(value) in (int, float) and 0 <= value < math.inf):
            raise UserError(f"{file}: {name}.{key}={value!r} is no number of 0 or more")
    for key in _NEEDED:
        if key not in given:
            raise UserError(f"{file}: {name}.{key} is missing from its header")
    if _EMBED not in tensors:
        raise UserError(f"{file}: tensor {_EMBED} is missing")
    settings = {theirs: _plain(given[key]) for key, theirs in _KEYS.items() if key in given}
    heads = settings["num_attention_heads"]
    settings.setdefault("num_key_value_heads", heads)
    settings.setdefault("rope_theta", 10000.0)
    head_dim = settings.setdefault("head_dim", settings["hidden_size"] // max(heads, 1))
    for key in ("rope.dimension_count", "attention.value_length"):
        if given.get(key, head_dim) != head_dim:
            raise UserError(f"{file}: {name}.{key}={given[key]}, and a head has {head_dim}: only the same is supported")
    settings |= {
        "architectures": [architecture],
        "model_type": FAMILIES[architecture].model_type,
        "vocab_size": tensors[_EMBED].shape[0],
        "tie_word_embeddings": _UNEMBED not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    } | ({"sliding_window": window} if window else {})
    scaling = _rope_scaling(header, given, settings)
    return settings | ({"rope_scaling": scaling} if scaling else {})


def _plain(value: Any) -> Any:
    """A float32 as it was written, 1e-05, and not as a float64 shows it, 9.99999974e-06."""
    if not isinstance(value, float):
        return value
    rounded = (float(f"{value:.{digits}g}") for digits in range(6, 10))
    return next((x for x in rounded if struct.pack("<f", x) == struct.pack("<f", value)), value)


def _rope_scaling(header: Gguf, given: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any] | None:
    """rope_scaling of a config.json, from the keys, or from the factors of Llama 3.1's kind, which are a tensor."""
    kind, where = given.get(_SCALING, "none"), f"{header.file}: rope.scaling.type={{}} is not supported"
    if kind not in ("none", "linear", "yarn"):
        raise UserError(where.format(repr(kind)))
    if ROPE_FACTORS in header.tensors:
        if kind != "none":
            raise UserError(where.format(f"{kind!r} beside {ROPE_FACTORS}"))
        return _llama3_scaling(header, settings)
    factor = _plain(given.get("rope.scaling.factor", 0.0))
    if kind == "none" or factor == 1.0:
        return None
    if not factor:
        raise UserError(f"{header.file}: rope.scaling.type={kind!r} without a rope.scaling.factor")
    keys = {
        "original_context_length": "original_max_position_embeddings",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    }
    more = {ours: _plain(given[f"rope.scaling.{key}"]) for key, ours in keys.items() if f"rope.scaling.{key}" in given}
    return {"rope_type": kind, "factor": factor} | (more if kind == "yarn" else {})


def _llama3_scaling(header: Gguf, settings: dict[str, Any]) -> dict[str, Any] | None:
    tensor, half = header.tensors[ROPE_FACTORS], settings["head_dim"] // 2
    if tensor.kind != "F32" or tensor.shape != (half,):
        raise UserError(f"{header.file}: tensor {ROPE_FACTORS} is no {half} numbers of F32")
    with header.file.open("rb") as stream:
        stream.seek(tensor.start)
        factors = struct.unpack(f"<{half}f", stream.read(tensor.nbytes))
    if set(factors) == {1.0}:
        return None
    found = _LLAMA3 | {"rope_type": "llama3", "factor": max(factors)}
    expected = [_llama3_factor(found, settings["rope_theta"] ** (2 * i / settings["head_dim"])) for i in range(half)]
    if not all(math.isclose(x, y, rel_tol=1e-4) for x, y in zip(factors, expected, strict=True)):
        raise UserError(f"{header.file}: the factors of {ROPE_FACTORS} are not those of Llama 3.1's kind of scaling")
    return found


def _llama3_factor(scaling: dict[str, Any], per_radian: float) -> float:
    """By how much a frequency is divided, told by the tokens that a radian takes."""
    length, low, high = (scaling[key] for key in ("original_max_position_embeddings", *list(_LLAMA3)[:2]))
    share = (length / (2 * math.pi * per_radian) - low) / (high - low)
    share = min(max(share, 0.0), 1.0)
    return 1 / ((1 - share) / scaling["factor"] + share)
