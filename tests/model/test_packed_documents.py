"""A document's loss is its own: the same packed with others or padded alone, and blind to what the others say."""

import jax
import numpy as np
import pytest

from ringbpt.data.documents import Row, make_row
from ringbpt.data.packing import PACKINGS, Corpus
from ringbpt.types import ALWAYS, Batch
from tests.model.helpers import make_model

T, B = 32, 4
LENGTHS = (9, 14, 6, 25, 3, 30)
MESHES = [
    ((1, 1, 1, 1), "contiguous"),
    ((1, 1, 1, 8), "zigzag"),
    ((1, 2, 2, 2), "striped"),
    ((1, 2, 1, 4), "balanced"),
]


def rows_of(lengths, tokens: np.ndarray, packing: str) -> tuple[list[Row], list[list[slice]]]:
    ends = np.cumsum(lengths)
    starts = ends - lengths
    plan = PACKINGS[packing](Corpus(starts, ends, T))
    values = {"token": tokens, "mask": np.ones(len(tokens), np.uint8)}
    return [plan.row(0, row, values) for row in range(plan.rows)], [plan.pieces(0, r) for r in range(plan.rows)]


def batch_of(rows: list[Row]) -> Batch:
    """The rows, and padding to B of them."""
    rows = [*rows, *[make_row([], T)] * (B - len(rows))]
    return Batch.of({name: np.stack([row[name] for row in rows]) for name in ALWAYS})


@pytest.mark.parametrize(("mesh", "layout"), MESHES)
def test_the_loss_of_a_document_is_its_own(mesh, layout):
    model = make_model(mesh, sequence_layout=layout)
    params = model.init(jax.random.key(0))
    run = jax.jit(lambda params, batch: model.token_stats(params, batch).logp_BT * batch.weight_BT)

    def logp(rows: list[Row]) -> np.ndarray:
        """In text order, [rows, T]."""
        host = batch_of(rows)
        values = np.asarray(run(params, model.put_batch(host.rows, (B, T))))
        return model.order_of(host.meta).in_text_order(values)[: len(rows)]

    tokens = np.random.default_rng(0).integers(0, 64, sum(LENGTHS)).astype(np.int32)
    packed, pieces = rows_of(LENGTHS, tokens, "best_fit")
    assert len(packed) < len(LENGTHS) and max(len(row) for row in pieces) >= 2
    together = {}
    for row, (values, slices) in enumerate(zip(logp(packed), pieces, strict=True)):
        for number, piece in enumerate(slices, start=1):
            together[piece.start] = float(values[packed[row]["segment"] == number].sum())
    starts = np.cumsum(LENGTHS) - LENGTHS
    alone: dict[int, float] = {}
    for first in range(0, len(LENGTHS), B):
        some = range(first, min(first + B, len(LENGTHS)))
        rows = [rows_of([LENGTHS[d]], tokens[starts[d] : starts[d] + LENGTHS[d]], "first_fit")[0][0] for d in some]
        alone |= {int(starts[d]): float(v.sum()) for d, v in zip(some, logp(rows), strict=True)}
    assert together.keys() == alone.keys()
    for start, value in together.items():
        assert abs(value - alone[start]) <= 1e-5 * max(1.0, abs(value)), start

    before = logp(packed)
    for row, slices in enumerate(pieces):
        for number, piece in enumerate(slices, start=1):
            changed = tokens.copy()
            changed[piece] = (changed[piece] + 1) % 64
            after = logp(rows_of(LENGTHS, changed, "best_fit")[0])
            mine = np.zeros_like(before, bool)
            mine[row] = packed[row]["segment"] == number
            np.testing.assert_array_equal(after[~mine], before[~mine])  # bit by bit
            assert (after[mine] != before[mine]).any()
