"""The timing of experts, tiny: what it compares is the same work, and ours takes no more rows for more experts."""

import pytest

from ringbpt.bench.experts import SIDES, measure


def test_every_side_is_measured_and_rows_do_not_grow_with_the_experts():
    few, many = ({row.side: row for row in measure(512, E, 1, 64, 128, "float32")} for E in (2, 16))
    assert list(few) == list(many) == list(SIDES)
    for row in (*few.values(), *many.values()):
        assert min(row.forward, row.backward) > 0
        assert row.tflops * (row.forward + row.backward) == pytest.approx(11 * 2 * 512 * 64 * 128 / 1e12)
    more = {side: many[side].temporaries - few[side].temporaries for side in SIDES}
    print(more)
    # Of the weights themselves XLA keeps copies; all rows by all experts are 14 x 512 x 128 numbers, several times.
    assert more["experts"] < 10 * (14 * 64 * 128 * 4) < more["ragged_dot"]
