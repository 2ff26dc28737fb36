"""Every row of every table: there and back is the same array, and a box of ours is read from a box of theirs."""

import itertools

import numpy as np
import pytest

from ringbpt.checkpoint.original import ROWS
from ringbpt.checkpoint.tensors import Conversion, conversions
from ringbpt.config import Architecture
from ringbpt.config.families import FAMILIES, TensorRow

SIZES = Architecture(
    vocab_size=6, hidden_size=8, intermediate_size=10, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, num_experts=3, param_scan_axis=1,
)  # fmt: skip
TABLES = {"original": ROWS, **{name: family.rows for name, family in FAMILIES.items()}}


def numbered(conversion: Conversion) -> dict[str, np.ndarray]:
    """Their tensors, every number of which is another."""
    shape = (len(conversion.names()), *conversion.their_shape)
    return dict(zip(conversion.names(), np.arange(np.prod(shape), dtype=np.float32).reshape(shape), strict=True))


def whole(conversion: Conversion, theirs: dict[str, np.ndarray]) -> np.ndarray:
    parts = np.stack([conversion.to_ours(tensor) for tensor in theirs.values()])
    if conversion.has_experts:
        parts = parts.reshape(SIZES.num_hidden_layers, SIZES.num_experts, *parts.shape[1:])
    return parts[0] if conversion.layer_axis is None else np.moveaxis(parts, 0, conversion.layer_axis)


@pytest.mark.parametrize("name", TABLES)
def test_there_and_back(name):
    for conversion in conversions(TABLES[name], SIZES):
        theirs = numbered(conversion)
        ours = whole(conversion, theirs)
        for part, layer, expert in conversion.parts():
            np.testing.assert_array_equal(
                conversion.to_theirs(conversion.pick(ours, layer, expert)), theirs[part], err_msg=part
            )


@pytest.mark.parametrize("name", TABLES)
def test_a_box_is_read_from_a_box(name):
    """Halves of every dim that a mesh may split; a head's own dim stays whole."""
    for conversion in conversions(TABLES[name], SIZES):
        theirs = numbered(conversion)
        ours, asked = whole(conversion, theirs), []

        def read(name, box, theirs=theirs, asked=asked):
            asked.append(theirs[name][box].size)
            return theirs[name][box]

        halves = [
            [slice(0, size)] if size == SIZES.head_dim else [slice(0, size // 2), slice(size // 2, size)]
            for size in ours.shape
        ]
        for box in itertools.product(*halves):
            asked.clear()
            got = conversion.read(box, np.float64, read)
            np.testing.assert_array_equal(got, ours[box], err_msg=conversion.ours)
            assert got.dtype == np.float64 and sum(asked) == got.size  # no number that the box has no need of


def test_a_head_cannot_be_split():
    (conversion,) = conversions([TensorRow("x", "x", "(N H) D -> D N H")], SIZES)
    with pytest.raises(AssertionError, match=r"'N', 'H'.* is sharded"):
        conversion.read((slice(0, 8), slice(0, 4), slice(0, 3)), np.float32, lambda name, box: np.zeros(1))
