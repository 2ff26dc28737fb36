"""Documents that share their beginning, which stands in the row once: as good as one after the other, and less work."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ringbpt.attention import MaskSpec, permutation
from ringbpt.attention.core import row_visibility, visible
from ringbpt.attention.work import count
from ringbpt.layouts import LAYOUTS, order_of
from ringbpt.types import TokenMeta
from tests.attention.suite import arrays, forest_metas, laid_apart, tree_metas
from tests.attention.test_parallel import BY_2, HEAD_DIM, LENGTH, SKIP, TWO_WAYS, WINDOW, Program, computed, options

EIGHT = (1, 1, 1, 8)
ALONE = Program("none", mesh=(1, 1, 1, 1))
QUICK = [
    ALONE,
    Program("ring", TWO_WAYS + SKIP, mesh=EIGHT),
    Program("all_gather", options(heads_k_stride=1), mesh=EIGHT),
    Program("ulysses", mesh=EIGHT, heads=(8, 2)),
    Program("ulysses_ring", BY_2 + TWO_WAYS + SKIP, mesh=EIGHT),
]
MORE = [
    *[Program(strategy, mesh=ALONE.mesh) for strategy in ("ring", "all_gather", "ulysses")],
    Program("ulysses_ring", options(ulysses_degree=1), mesh=ALONE.mesh),
    Program("ring", mesh=EIGHT),
    Program("ring", SKIP, mesh=EIGHT, mask=WINDOW, heads=(4, 1)),
    Program("all_gather", mesh=EIGHT, mask=WINDOW),
    *[replace(program, local="reference") for program in QUICK],
    *[replace(ALONE, local=f"pallas_{name}_interpreted") for name in ("tpu", "triton")],
    Program("ring", SKIP, mesh=EIGHT, local="pallas_triton_interpreted"),
]


@pytest.mark.parametrize(
    "program", [*QUICK, *(pytest.param(program, marks=pytest.mark.slow) for program in MORE)], ids=str
)
def test_every_document_is_as_if_it_stood_alone(program):
    inputs = arrays(np.random.default_rng(0), 2, LENGTH, LENGTH, *program.heads, HEAD_DIM)
    meta = jax.tree.map(lambda x: np.repeat(x, 2, 0), forest_metas(LENGTH)[0])
    out, _, *grads = laid_apart(*inputs, LENGTH, program.mask)
    for layout in LAYOUTS:
        got_out, *got_grads = computed(program, layout, inputs, meta)
        assert np.abs(got_out - out).max() <= 1e-6 * np.abs(out).max()
        for name, a, b in zip(("dq", "dk", "dv"), got_grads, grads, strict=True):
            assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max(), name


TREES = st.recursive(
    st.integers(1, 9), lambda trees: st.tuples(st.integers(1, 9), st.lists(trees, min_size=1, max_size=4)), max_leaves=8
).map(lambda tree: flat(tree))
MASKS = st.builds(MaskSpec, st.booleans(), st.none() | st.integers(1, 12))


def flat(tree):
    return tree if isinstance(tree, int) else (tree[0], *map(flat, tree[1]))


def examples(number: int) -> settings:
    return settings(max_examples=number, deadline=None, phases=[Phase.explicit, Phase.generate])


def places(meta: TokenMeta, order: np.ndarray) -> TokenMeta:
    return jax.tree.map(lambda x: x[:, order], meta)


def padded(trees: list, multiple: int, more: int = 0) -> TokenMeta:
    """A row of the trees and at least `more` places of padding."""
    rest = -tree_metas(trees)[0].position_BT.shape[1] % multiple
    return tree_metas(trees, rest + more * multiple)[0]


@examples(60)
@given(
    trees=st.lists(TREES, min_size=1, max_size=4),
    mask=MASKS,
    sizes=st.sampled_from([(8, 16), (16, 8), (4, 4), (1, 3)]),
    order=st.sampled_from([*LAYOUTS, "shuffled"]),
    padding=st.integers(0, 1),
    seed=st.integers(0, 2**16),
)
def test_bounds_are_never_wrong(trees, mask, sizes, order, padding, seed):
    """`some` is never wrong about a visible pair, `every` never at all; on each side stand any tokens of the row."""
    meta = padded(trees, 48, padding)
    length = meta.position_BT.shape[1]
    rng = np.random.default_rng(seed)
    q, k = (places(meta, rng.permutation(length) if order == "shuffled" else permutation(order, length, 3)),) * 2
    if seed % 2:
        k = places(k, np.roll(np.arange(length), length // 2))
    pairs = np.asarray(visible(q, k, mask)).reshape(1, length // sizes[0], sizes[0], length // sizes[1], sizes[1])
    some, every = row_visibility(q, k, mask, *sizes)
    assert not (pairs.any(axis=(2, 4)) & ~some).any()
    assert (every == pairs.all(axis=(2, 4))).all()


@examples(60)
@given(trees=st.lists(TREES, min_size=1, max_size=4), sizes=st.sampled_from([(8, 16), (16, 8), (4, 4)]))
def test_in_one_text_no_block_is_visited_in_vain(trees, sizes):
    meta = padded(trees, 16)
    length = meta.position_BT.shape[1]
    some, _ = row_visibility(meta, meta, MaskSpec(), *sizes)
    seen = np.asarray(visible(meta, meta, MaskSpec()))
    assert (some == seen.reshape(1, length // sizes[0], sizes[0], length // sizes[1], sizes[1]).any(axis=(2, 4))).all()


@examples(30)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8), mask=MASKS)
def test_documents_that_share_nothing_are_what_they_were(lengths, mask):
    meta = padded(lengths, 16)
    plain = replace(meta, last_BT=None)
    for got, want in zip(row_visibility(meta, meta, mask, 8, 4), row_visibility(plain, plain, mask, 8, 4), strict=True):
        assert (got == want).all()
    assert (np.asarray(visible(meta, meta, mask)) == np.asarray(visible(plain, plain, mask))).all()


@examples(30)
@given(trees=st.lists(TREES, min_size=1, max_size=4), mask=MASKS, layout=st.sampled_from(LAYOUTS))
def test_pairs_are_counted(trees, mask, layout):
    sp = 4
    meta = padded(trees, 8, more=1)
    length = meta.position_BT.shape[1]
    order = order_of(layout, meta, sp, mask.window)
    laid_out = jax.tree.map(order.lay_out, order.meta(meta))
    seen = np.asarray(visible(laid_out, laid_out, mask)).reshape(sp, length // sp, sp, length // sp).sum(axis=(1, 3))
    pairs = count(meta, layout, sp, mask, 8, 8).pairs
    assert [[pairs[r, (r - s) % sp] for s in range(sp)] for r in range(sp)] == seen.tolist()


@pytest.mark.parametrize(("answers", "share"), [(2, 0.595), (8, 0.291)])
def test_what_a_shared_prompt_saves(answers, share):
    """Documents of 8,192 tokens, 90 % of them prompt, whose last token each answer repeats."""
    shared, prompt = 8192, round(0.9 * 8192)
    meta, apart, _ = tree_metas([(prompt - 1, *[shared - prompt + 1] * answers)])
    pairs = [int(count(x, "contiguous", 1).pairs.sum()) for x in (meta, apart)]
    assert pairs[0] / pairs[1] == pytest.approx(share, abs=0.005)
    blocks = [int(count(x, "contiguous", 1, MaskSpec(), 128, 128).blocks.sum()) for x in (meta, apart)]
    assert blocks[0] / blocks[1] == pytest.approx(share, abs=0.01)  # so is what is computed
