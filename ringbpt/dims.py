"""The alphabet: one letter per logical dimension, and where each letter lives on the mesh.

B rows, T query tokens, S key tokens, N query heads, K key/value heads, G = N/K, H head dim, D model,
F feedforward, V vocabulary, L layers, E experts, A an adapter's rank, P prompts or pairs, R rollouts.

The same letters name variables (`q_BTNH`), shape strings, shardings and checkpoint patterns. An *axis* is
an axis of the device mesh (`dp, fsdp, tp, sp`), a *dim* is a dimension of a tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the flags need the axes' names, and --help must not wait for jax
    from jax.sharding import PartitionSpec


class MeshShape(NamedTuple):
    """The sizes of the mesh's axes: data parallel, sharded data parallel, tensor parallel, sequence parallel."""

    dp: int = 1
    fsdp: int = 1
    tp: int = 1
    sp: int = 1

    @property
    def row_shards(self) -> int:
        """Over how many groups of devices the rows of a batch are split."""
        return self.dp * self.fsdp


AXES = MeshShape._fields

Axes = str | tuple[str, ...]

# Weights: tensor parallel over heads, feedforward and vocabulary; the model dim is split over every device
# that holds a different part of the batch or of the sequence (ZeRO-3), and gathered just before use.
WEIGHT_AXES: dict[str, Axes] = {"V": "tp", "D": ("fsdp", "sp"), "N": "tp", "K": "tp", "F": "tp"}
# Weights at the moment of use: what remains after the gather over fsdp and sp.
GATHERED_AXES: dict[str, Axes] = {letter: axes for letter, axes in WEIGHT_AXES.items() if letter != "D"}
ACTIVATION_AXES: dict[str, Axes] = {
    "B": ("dp", "fsdp"),
    "T": "sp",
    "S": "sp",
    "N": "tp",
    "K": "tp",
    "F": "tp",
    "V": "tp",
}


@dataclass(frozen=True)
class Dims:
    """Sizes of the dims that a model's weights are made of (config fields spell words, weights use letters)."""

    L: int
    D: int
    N: int
    K: int
    H: int
    F: int
    V: int
    E: int = 0
    A: int = 0

    def shape(self, dims: str) -> tuple[int, ...]:
        """`"D N H"` -> the three sizes. Raises KeyError for a letter that is no weight dim."""
        sizes = {field.name: getattr(self, field.name) for field in fields(self)}
        return tuple(sizes[letter] for letter in dims.split())


def spec(dims: str, axes: Mapping[str, Axes]) -> "PartitionSpec":
    """`spec("D N H", WEIGHT_AXES) == P(("fsdp", "sp"), "tp", None)`; `_` marks a dim without a letter.

    Raises ValueError where two dims would claim the same mesh axis.
    """
    from jax.sharding import PartitionSpec

    entries = [axes.get(letter) for letter in dims.split()]
    used = [axis for entry in entries if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
    if len(set(used)) != len(used):
        raise ValueError(f"spec({dims!r}): a mesh axis is used twice: {entries}")
    return PartitionSpec(*entries)


def weight_spec(dims: str) -> "PartitionSpec":
    """Sharding of a stored weight. Vectors (norms) stay whole: gathering 16 KB costs more than it saves."""
    matrix = [letter for letter in dims.split() if letter != "L"]
    return spec(dims, WEIGHT_AXES if len(matrix) > 1 else {})
