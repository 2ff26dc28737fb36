"""A whole model over documents that share their beginnings, three levels deep: every answer as if it stood alone."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringbpt.data.documents import Piece, make_batch
from ringbpt.layouts import LAYOUTS
from ringbpt.types import ALWAYS, Batch
from tests.model.helpers import make_model

T = 64
# (tokens of a node's own, its children); a leaf is an answer. A prompt, what may follow it, and what may follow that.
FORESTS = [
    [(11, [(7, [(4, []), (1, []), (6, [])]), (5, [(9, []), (3, [])])]), (2, [(8, [])])],
    [(3, [(2, [(5, []), (2, [])]), (20, [(1, []), (4, [])])])],
]


def leaves(node: tuple, before: list[np.ndarray], rng: np.random.Generator) -> list[tuple[np.ndarray, int]]:
    """(tokens, how many of them are the answer's own) of each answer below a node, in order."""
    size, children = node
    path = [*before, rng.integers(0, 64, size)]
    if not children:
        return [(np.concatenate(path), size)]
    return [leaf for child in children for leaf in leaves(child, path, rng)]


def pieces(tree: tuple, unit: int, rng: np.random.Generator, shared: bool) -> list[Piece]:
    """Its answers; all of a beginning but its last token, which predicts what differs, is shared."""
    found: list[Piece] = []
    tokens_before = np.zeros(0, np.int64)
    for tokens, own in leaves(tree, [], rng):
        common = int(np.argmin(np.append(tokens[: len(tokens_before)] == tokens_before[: len(tokens)], False)))
        start = max(0, common - 1) if shared else 0
        values = {"token": tokens, "mask": (np.arange(len(tokens)) >= len(tokens) - own).astype(np.float32)}
        found.append(Piece(len(tokens) - start, {name: x[start:] for name, x in values.items()}, unit, start))
        tokens_before = tokens
    return found


def host_batch(shared: bool) -> Batch:
    """As many rows as it takes: the trees' own two, or a row for each answer."""
    rng = np.random.default_rng(5)
    rows = [[pieces(tree, number, rng, shared) for number, tree in enumerate(forest)] for forest in FORESTS]
    if shared:
        return make_batch([[piece for tree in row for piece in tree] for row in rows], (2, T), (*ALWAYS, "last"))
    answers = [piece for row in rows for tree in row for piece in tree]
    return make_batch([[piece] for piece in answers], (len(answers), T))


def answers_and_gradient(model: Any, host: Batch, params: Any) -> tuple[np.ndarray, np.ndarray]:
    """(each answer's log-probability, in order; the gradient, as one vector, of their sum weighed by 1, 2, ...)."""
    batch = model.put_batch(host.rows, host.token_BT.shape)
    segment_BT = model.order_of(host.meta).lay_out(host.segment_BT)
    names = sorted({(row, number) for row in range(len(segment_BT)) for number in segment_BT[row] if number})
    number_BT = np.zeros(segment_BT.shape, np.int32)  # of the answer, or 0
    for at, (row, number) in enumerate(names, start=1):
        number_BT[row][segment_BT[row] == number] = at

    def total(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logp_BT = model.token_stats(params, batch).logp_BT * batch.weight_BT
        answers = jnp.zeros(len(names) + 1).at[jnp.asarray(number_BT)].add(logp_BT)[1:]
        return (answers * jnp.arange(1.0, len(names) + 1)).sum(), answers

    (_, answers), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params, batch)
    return np.asarray(answers), np.concatenate([np.float64(x).ravel() for x in jax.tree.leaves(grads)])


def model_of(sp: int, strategy: str, layout: str, kernel: str) -> Any:
    return make_model(
        (1, 1, 1, sp),
        attention_type="ring_blockwise" if sp > 1 else "blockwise",
        attention_kernel=kernel,
        sequence_parallel=strategy,
        **({"ulysses_degree": 2} if strategy == "ulysses_ring" else {}),
        sequence_layout=layout,
        num_attention_heads=8,
        scan_mlp=False,
        loss_chunk_size=T,
    )


@cache
def apart() -> tuple[np.ndarray, np.ndarray]:
    model = model_of(1, "ring", "contiguous", "blockwise")
    return answers_and_gradient(model, host_batch(shared=False), model.init(jax.random.key(0)))


WAYS = [
    (8, "ring", "zigzag", "blockwise"),
    (8, "ulysses", "striped", "blockwise"),
    (8, "ring", "balanced", "blockwise"),
    (1, "ring", "contiguous", "blockwise"),
]
MORE = [
    (sp, strategy, layout, kernel)
    for sp in (1, 8)
    for strategy in (("ring", "all_gather", "ulysses", "ulysses_ring") if sp > 1 else ("ring",))
    for layout in LAYOUTS
    for kernel in ("blockwise", "pallas_tpu_interpreted", "pallas_triton_interpreted")
    if (sp, strategy, layout, kernel) not in WAYS
]


def test_they_share_three_levels():
    host = host_batch(shared=True)
    spans_BT = host.columns["last"] - host.segment_BT  # how many more answers have this token
    assert [sorted(set(spans_T[row > 0])) for spans_T, row in zip(spans_BT, host.segment_BT, strict=True)] == [
        [0, 1, 2, 4],
        [0, 1, 3],
    ]
    assert host_batch(shared=False).token_BT.shape[0] == 10


@pytest.mark.parametrize(
    ("sp", "strategy", "layout", "kernel"), [*WAYS, *(pytest.param(*way, marks=pytest.mark.slow) for way in MORE)]
)
def test_every_answer_is_as_if_it_stood_alone(sp, strategy, layout, kernel):
    model = model_of(sp, strategy, layout, kernel)
    answers, grads = answers_and_gradient(model, host_batch(shared=True), model.init(jax.random.key(0)))
    want_answers, want_grads = apart()
    assert np.abs(answers - want_answers).max() <= 1e-6 * np.abs(want_answers).max()
    assert np.abs(grads - want_grads).max() <= 1e-5 * np.abs(want_grads).max()
