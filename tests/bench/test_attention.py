"""The simulated ring computes what the ring does, and a measurement is written down whole."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from ringbpt.attention.api import LOCALS
from ringbpt.attention.local import reference
from ringbpt.bench import attention as bench
from ringbpt.layouts import permutation
from ringbpt.mesh import make_mesh
from tests.attention.suite import tree_metas

SETTINGS = bench.Settings(
    rival="one_device", T=64, heads=2, kv_heads=1, H=8, dtype="float32", local="blockwise", strategy="ring",
    chunk_size=16, rival_chunk_size=(), devices=8, ranks=2, repeats=1,
)  # fmt: skip
CASE = bench.Case("documents", documents=4, layout="zigzag")


def test_the_ranks_together_are_the_whole():
    arrays = bench.inputs(SETTINGS, CASE, make_mesh((1, 1, 1, 1), devices=jax.devices()[:1]), "zigzag")
    q, k, v, meta = arrays
    rank = jax.jit(bench.ring_rank(LOCALS["blockwise"](jax.devices()[0], 16, 16), CASE.mask, 2, backward=False))
    got = jnp.concatenate([rank(q, k, v, q, meta, r) for r in range(2)], axis=1)
    np.testing.assert_allclose(got, reference.attend(q, k, v, meta, meta, CASE.mask).out_BTNH, atol=1e-5)
    assert (np.asarray(meta.position_BT)[0] == (permutation("zigzag", 64, 2) % 16)).all()


def test_a_table_a_row_for_each_and_a_plot(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "CASES", (CASE,))
    lines = []
    rows = bench.run(SETTINGS, say=lines.append)
    assert [(row["kind"], row["contender"]) for row in rows] == [
        (kind, name) for kind in bench.KINDS for name in ("rank 0 of 2", "rank 1 of 2", "one device")
    ]
    assert len(lines) == len(rows) and all(row["temp_bytes"] > 0 and len(row["all"]) == 1 for row in rows)
    assert rows[2]["ratio"] == 1 and rows[0]["ratio"] == rows[2]["seconds"] / rows[0]["seconds"] / 2
    bench.plot(rows, str(tmp_path / "ratios.png"))
    assert (tmp_path / "ratios.png").stat().st_size > 1000


def test_answers_share_their_prompt_or_repeat_it():
    """They begin with a copy of its last token; the row ends in padding up to a block."""
    settings, case = replace(SETTINGS, rival="unshared", T=40), bench.Case("answers", documents=3)
    (*_, shared), (q, _, _, apart) = (bench.shared_or_not(settings, case, once) for once in (True, False))
    want, want_apart, _ = tree_metas([(35, 5, 5, 5)])
    for meta, of in ((shared, want), (apart, want_apart)):
        length = of.position_BT.shape[1]
        assert meta.segment_BT.shape[1] == length + -length % 16 and not meta.segment_BT[:, length:].any()
        assert jax.tree.all(jax.tree.map(lambda a, b, n=length: bool((a[:, :n] == b).all()), meta, of))
    assert q.shape[:2] == apart.segment_BT.shape == (1, 128)
