"""The tensors of a GGUF file: which weight each is, and their numbers, dequantised a box at a time."""

from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from ringbpt.checkpoint.safetensors import Stored, cut_box
from ringbpt.config import UserError
from ringbpt.config.families import TensorRow
from ringbpt.config.gguf import ROPE_FACTORS, Gguf

FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
_NAMES = {
    "embed": "token_embd.weight",
    "norm": "output_norm.weight",
    "unembed": "output.weight",
    "layers.attention_norm": "blk.{L}.attn_norm.weight",
    "layers.w_q": "blk.{L}.attn_q.weight",
    "layers.w_k": "blk.{L}.attn_k.weight",
    "layers.w_v": "blk.{L}.attn_v.weight",
    "layers.w_o": "blk.{L}.attn_output.weight",
    "layers.b_q": "blk.{L}.attn_q.bias",
    "layers.b_k": "blk.{L}.attn_k.bias",
    "layers.b_v": "blk.{L}.attn_v.bias",
    "layers.q_norm": "blk.{L}.attn_q_norm.weight",
    "layers.k_norm": "blk.{L}.attn_k_norm.weight",
    "layers.feedforward_norm": "blk.{L}.ffn_norm.weight",
    "layers.w_gate": "blk.{L}.ffn_gate.weight",
    "layers.w_up": "blk.{L}.ffn_up.weight",
    "layers.w_down": "blk.{L}.ffn_down.weight",
}
# LLaMA's queries and keys stand there as Meta's own code rotates them, neighbouring channels (0, 1), (2, 3), ...;
# other architectures' stand as in Hugging Face's folders.
_PERMUTED = {
    "layers.w_q": "(N pair two) D -> D N (two pair)",
    "layers.w_k": "(K pair two) D -> D K (two pair)",
}


def gguf_rows(rows: Iterable[TensorRow], architecture: str) -> list[TensorRow]:
    """A family's table for the tensors of a GGUF file. architecture: what its header says, llama, ...

    A weight that no file of these has a name for stands by Hugging Face's, and so is missing from the file.
    """
    patterns = _PERMUTED if architecture == "llama" else {}
    return [TensorRow(x.ours, _NAMES.get(x.ours, x.theirs), patterns.get(x.ours, x.pattern)) for x in rows]


class GgufTensors:
    """The tensors of a file, by name, as `TensorFolder` has those of a folder. Quantised ones are float32.

    Raises UserError for a type of tensor that the gguf package has but does not dequantise.
    """

    def __init__(self, header: Gguf):
        self.folder, self.bytes_read = header.file, 0
        self._tensors = {name: x for name, x in header.tensors.items() if name != ROPE_FACTORS}
        self.entries = {
            name: Stored(header.file, FLOATS.get(x.kind, np.dtype(np.float32)), x.shape, x.start)
            for name, x in self._tensors.items()
        }
        for name, tensor in self._tensors.items():
            if tensor.kind not in FLOATS:
                try:
                    dequantize(np.zeros((1, tensor.size), np.uint8), tensor.kind)
                except NotImplementedError:
                    raise UserError(f"{header.file}: tensor {name} is {tensor.kind}, which is not supported") from None

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A tensor, or a box of it, of which only the blocks that hold it are read."""
        entry, tensor = self.entries[name], self._tensors[name]
        *rows, columns = cut_box(index, entry.shape)
        first, last = columns.start // tensor.block, -(-columns.stop // tensor.block)
        per_row = entry.shape[-1] // tensor.block * tensor.size
        stored = np.memmap(entry.file, np.uint8, "r", entry.start, (*entry.shape[:-1], per_row))
        packed = np.ascontiguousarray(stored[(*rows, slice(first * tensor.size, last * tensor.size))])
        self.bytes_read += packed.nbytes
        if tensor.kind in FLOATS:
            return packed.view(entry.dtype)
        skipped = first * tensor.block
        return dequantize(packed, tensor.kind)[..., columns.start - skipped : columns.stop - skipped]


def dequantize(packed: np.ndarray, kind: str) -> np.ndarray:
    """uint8 [..., blocks * bytes of one] -> float32 [..., numbers], as the gguf package does."""
    from gguf import GGMLQuantizationType, quants

    return quants.dequantize(packed, GGMLQuantizationType[kind])
