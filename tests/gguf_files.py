"""Small GGUF files, written by the gguf package: a model's tensors in any of its types, and a tokenizer."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

Kind = gguf.GGMLQuantizationType
D, N, K, F, V, L = 256, 4, 2, 256, 63, 2  # blocks have 32 or 256 numbers
HEAD = {"llama": 64, "mistral": 64, "qwen2": 64, "qwen3": 128}
METADATA: dict[str, Any] = {
    "context_length": 512, "embedding_length": D, "feed_forward_length": F, "block_count": L,
    "attention.head_count": N, "attention.head_count_kv": K, "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 500000.0, "vocab_size": V,
}  # fmt: skip
# What an architecture's files have besides.
MORE = {
    "llama": {"rope.dimension_count": 64},
    "mistral": {"rope.dimension_count": 64, "attention.sliding_window": 128},
    "qwen2": {},
    "qwen3": {"attention.key_length": 128, "attention.value_length": 128},
}


def shapes(name: str, tied: bool = False) -> dict[str, tuple[int, ...]]:
    """The tensors of an architecture's file; "mistral": what is called llama there, with a window."""
    H = HEAD.get(name, 64)
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (V, D), "output_norm.weight": (D,)}
    found |= {} if tied else {"output.weight": (V, D)}
    for i in range(L):
        layer = {
            "attn_norm.weight": (D,), "attn_q.weight": (N * H, D), "attn_k.weight": (K * H, D),
            "attn_v.weight": (K * H, D), "attn_output.weight": (D, N * H), "ffn_norm.weight": (D,),
            "ffn_gate.weight": (F, D), "ffn_up.weight": (F, D), "ffn_down.weight": (D, F),
        }  # fmt: skip
        if name == "qwen2":
            layer |= {f"attn_{x}.bias": (n * H,) for x, n in (("q", N), ("k", K), ("v", K))}
        if name == "qwen3":
            layer |= {"attn_q_norm.weight": (H,), "attn_k_norm.weight": (H,)}
        found |= {f"blk.{i}.{key}": shape for key, shape in layer.items()}
    return found


def packed(rng: np.random.Generator, shape: tuple[int, ...], kind: Kind) -> np.ndarray:
    """Random numbers of a type, as its bytes: all are blocks of random bits with scales that are numbers."""
    values = rng.normal(0, 0.1, shape).astype(np.float32)
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:  # the package can only read this one
        block, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
        places = {Kind.Q6_K: (208,), Kind.Q2_K: (80, 82), Kind.Q3_K: (108,)}.get(kind, (0, 2))
        for at in places:  # of the float16 by which the others are multiplied
            blocks[..., at : at + 2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
        return blocks.reshape(*shape[:-1], -1)


def write_gguf(
    path: Path, name: str = "llama", kind: Kind = Kind.F32, tied: bool = False, seed: int = 0, **edits: Any
) -> Path:
    """A model's file. edits: metadata below the architecture's name, `rope__scaling__type` for rope.scaling.type, a
    None leaves the key out; `tensors`: more of them, or others; `tokenizer`: whole keys."""
    architecture = {"mistral": "llama"}.get(name, name)
    writer, rng = gguf.GGUFWriter(path, architecture), np.random.default_rng(seed)
    tensors, tokenizer = edits.pop("tensors", {}), edits.pop("tokenizer", {})
    named = {key.replace("__", "."): value for key, value in edits.items()}
    below = {f"{architecture}.{key}": value for key, value in (METADATA | MORE.get(name, {}) | named).items()}
    for key, value in (below | tokenizer).items():
        if value is not None:
            _add(writer, key, value)
    for key, shape in shapes(name, tied).items():
        if tensors.get(key, ()) is None:
            continue
        of = kind if len(shape) == 2 else Kind.F32
        data = packed(rng, shape, of) if key not in tensors else tensors.pop(key)
        writer.add_tensor(key, data, raw_dtype=of)
    for key, data in tensors.items():
        if data is not None:
            writer.add_tensor(key, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)


def tokenizer_keys(model: str, tokens: list[str], kinds: list[int], **more: Any) -> dict[str, Any]:
    """more: as eos_token_id=2; chat_template stands elsewhere in a file, and is put there."""
    keys = {"model": model, "tokens": tokens, "token_type": kinds} | more
    template = keys.pop("chat_template", None)
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()} | {"tokenizer.chat_template": template}
