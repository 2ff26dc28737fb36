"""The cases that every local implementation goes through, and the dense reference that it is held to.

A test file of an implementation parametrises over `CASES` and calls `check`; what it refuses it names, case by case,
so that nothing is left out in silence:

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_the_suite(case):
        check(make_it(128, 128), case, refuses={"odd heads"})
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringbpt.attention import make_attention, permutation
from ringbpt.attention.core import Local, MaskSpec, Partial
from ringbpt.attention.local import reference
from ringbpt.mesh import make_mesh
from ringbpt.types import TokenMeta

REFERENCE = Local(reference.attend, reference.attend_bwd)
NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """Attention of T queries to S keys. The sizes are those of two or three blocks of 128, where there are blocks.

    hop: (layout, devices, whose queries, whose keys): one hop of a ring; empty: queries and keys of one text.
    split: the first so many keys go in first, the rest with their result as the carry; 0: all at once.
    trees: the documents are those of `forest`.
    strangers: queries and keys are of different documents, from this row on.
    """

    name: str
    T: int = 256
    S: int = 256
    heads: tuple[int, int] = (2, 2)
    head_dim: int = 64
    batch: int = 1
    mask: MaskSpec = MaskSpec()
    documents: int = 1
    padding: int = 0
    hop: tuple[str, int, int, int] | None = None
    split: int = 0
    trees: bool = False
    strangers: int | None = None
    dtype: str = "float32"

    def __str__(self) -> str:
        return self.name


# One case for each way in which attention differs, several ways at a time: interpreters are slow.
CASES = (
    Case("causal"),
    Case("full, more keys than queries", T=128, S=384, heads=(2, 1), mask=MaskSpec(causal=False)),
    Case("packed, grouped, padded", heads=(4, 2), batch=2, documents=4, padding=30, split=128),
    Case("window over documents", T=384, S=384, documents=2, mask=MaskSpec(window=70)),
    Case("window, both sides", mask=MaskSpec(causal=False, window=40), heads=(2, 1), split=128),
    Case("zigzag hop", hop=("zigzag", 4, 1, 2), heads=(4, 1), split=128, documents=3, padding=100),
    Case("striped hop", hop=("striped", 4, 2, 3), split=128),
    Case("nothing visible", hop=("contiguous", 2, 0, 1)),
    Case("a row without keys", batch=2, documents=2, strangers=1, split=128),
    Case("odd lengths", T=77, S=201, head_dim=96, documents=2, heads=(3, 1), mask=MaskSpec(causal=False)),
    Case("odd heads", T=130, S=130, head_dim=96, heads=(3, 3), split=65),
    Case("wide heads", T=128, S=256, head_dim=256, heads=(2, 1), documents=2),
    Case("bf16", head_dim=128, heads=(4, 2), documents=3, padding=20, split=128, dtype="bfloat16"),
    Case("bf16 hop", hop=("zigzag", 2, 1, 0), heads=(2, 1), split=128, dtype="bfloat16"),
    Case("one token", T=1, S=1, heads=(1, 1)),
    Case("trees", T=256, S=256, heads=(2, 1), trees=True, split=128),
    Case("trees, window", T=384, S=384, heads=(1, 1), trees=True, mask=MaskSpec(window=70)),
    Case("trees, both sides", heads=(2, 2), batch=2, trees=True, mask=MaskSpec(causal=False)),
    Case("trees, hop", hop=("zigzag", 4, 1, 2), heads=(2, 1), trees=True, split=128),
)

# For interpreters that take a second for each block of a head: whatever several of CASES ask, in few blocks.
SMALL = (
    Case("a carry", T=64, S=128, heads=(2, 1), documents=2, padding=20, split=64, mask=MaskSpec(causal=False)),
    Case(
        "a small hop", T=64, S=64, batch=2, heads=(1, 1), hop=("zigzag", 2, 1, 0),
        mask=MaskSpec(causal=False, window=40),
    ),
    Case(
        "a small window over trees", T=192, S=192, head_dim=128, heads=(1, 1), trees=True,
        mask=MaskSpec(window=40),
    ),
    Case("small, nothing visible", T=64, S=64, heads=(1, 1), strangers=0),
    Case("small odd heads and lengths", T=40, S=100, head_dim=96, heads=(1, 1), mask=MaskSpec(causal=False)),
)  # fmt: skip
# Of CASES, what is run in `make test`: together they ask all that CASES ask one by one; the others are slow.
COVERING = (
    "window over documents", "window, both sides", "zigzag hop", "a row without keys", "odd lengths", "wide heads",
    "bf16", "trees",
)  # fmt: skip
COVERING_WITH_SMALL = ("wide heads",)


def features(case: Case) -> set[str]:
    """What a case asks of a kernel, one by one."""
    mask, T, S = case.mask, case.T, case.S
    asked = {
        "a carry": case.split > 0,
        "documents": case.documents > 1 or case.trees,
        "documents that share": case.trees,
        "padding": case.padding > 0 or case.trees,
        "rows": case.batch > 1,
        "grouped heads": case.heads[0] > case.heads[1],
        "a hop": case.hop is not None,
        "no key to see": case.strangers is not None or case.name == "nothing visible",
        "more keys than queries": S > T,
        "several blocks": T > 128,
        "lengths that no block divides": bool(T % 64 or S % 64),
    }
    window = f", window {mask.window is not None}"
    return {name for name, is_asked in asked.items() if is_asked} | {
        f"heads of {case.head_dim}", f"causal {mask.causal}{window}"
    }  # fmt: skip


def cases(small: bool = False) -> list:
    """CASES as parameters, those outside the covering set marked slow; small: SMALL first, for slow interpreters."""
    quick = COVERING_WITH_SMALL if small else COVERING
    marked = [case if case.name in quick else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
    return [*SMALL, *marked] if small else marked


def packed_meta(rng: np.random.Generator, batch: int, length: int, documents: int, padding: int = 0) -> TokenMeta:
    """Rows of `documents` documents of random lengths, and `padding` padded places at the end."""
    position, segment = np.zeros((2, batch, length), np.int32)
    for row in range(batch):
        cuts = np.sort(rng.integers(0, length - padding + 1, documents - 1))
        starts = [0, *cuts, length - padding]
        for i, (start, stop) in enumerate(pairwise(starts)):
            position[row, start:stop] = np.arange(stop - start)
            segment[row, start:stop] = i + 1
    return TokenMeta(position, segment)


# A document's length; or the length of what several documents begin with, and the trees of how they go on from there.
Tree = int | tuple


def paths(tree: Tree) -> list[list[int]]:
    """Of each document of a tree, in order, the lengths of what it is made of."""
    return [[tree]] if isinstance(tree, int) else [[tree[0], *path] for child in tree[1:] for path in paths(child)]


def _walk(tree: Tree, segment: int, position: int) -> Iterator[tuple[int, int, int, int]]:
    """(length, first position, segment, last) of what stands in a row for a tree, depth first."""
    length, children = (tree, ()) if isinstance(tree, int) else (tree[0], tree[1:])
    yield length, position, segment, segment + len(paths(tree)) - 1
    for child in children:
        yield from _walk(child, segment, position + length)
        segment += len(paths(child))


def tree_metas(trees: Collection[Tree], padding: int = 0) -> tuple[TokenMeta, TokenMeta, np.ndarray]:
    """(a row of the trees, a row of the same documents one after the other, the former's place for each of the latter).

    What documents share stands in the first row once. Both rows end in `padding` places.
    """
    parts, documents = [], []
    for tree in trees:
        parts += list(_walk(tree, 1 + len(documents), 0))
        documents += paths(tree)
    columns = [(position + i, segment, last) for n, position, segment, last in parts for i in range(n)]
    position_T, segment_T, last_T = np.array(columns + [(0, 0, 0)] * padding, np.int32).T
    place = [np.flatnonzero((segment_T <= d) & (d <= last_T)) for d in range(1, 1 + len(documents))]
    assert [len(of) for of in place] == [sum(path) for path in documents]
    apart_T = np.concatenate([*place, np.flatnonzero(segment_T == 0)])
    numbers = np.array([*range(1, 1 + len(documents)), 0], np.int32)
    apart = TokenMeta(position_T[None, apart_T], np.repeat(numbers, [*map(len, place), padding])[None])
    return TokenMeta(position_T[None], segment_T[None], last_T[None]), apart, apart_T


def forest(length: int) -> list[Tree]:
    """Trees three levels deep, a document alone and a tree of two levels; the rest of `length` is padding."""
    u = length // 32
    return [(8 * u + 1, (2 * u, u, 2 * u - 1), (2 * u - 1, u, u + 1, u)), 4 * u - 1, (4 * u, 2 * u + 1, u, u)]


@cache
def forest_metas(length: int) -> tuple[TokenMeta, TokenMeta, np.ndarray]:
    """tree_metas of the forest of this length."""
    padding = length - tree_metas(forest(length))[0].position_BT.shape[1]
    return tree_metas(forest(length), padding)


def laid_apart(q, k, v, d_out, length: int, mask: MaskSpec) -> list[np.ndarray]:
    """(out, lse, dq, dk, dv) of a forest from its documents laid one after the other, by the reference in float64.

    Each is [B, length, ...]. What a document's copy of a shared place gives is the others' too, and is asserted to be;
    the gradients of a place are the sums over its copies, and of d_out each has an equal part.
    """
    _, apart, apart_T = forest_metas(length)
    copies_1T11 = np.bincount(apart_T)[None, :, None, None]
    rows = (q, k, v, np.asarray(d_out, np.float64) / copies_1T11)
    with jax.enable_x64(True):
        q, k, v, d_out = (jnp.asarray(np.asarray(x, np.float64)[:, apart_T]) for x in rows)
        part = reference.attend(q, k, v, apart, apart, mask)
        grads = reference.attend_bwd(q, k, v, part.out_BTNH, part.lse_BTN, d_out, apart, apart, mask)
    results = []
    for name, x in zip(NAMES, (part.out_BTNH, part.lse_BTN, *grads), strict=True):
        x = np.asarray(x)
        assert x.dtype == np.float64
        at_places = np.zeros((len(x), length, *x.shape[2:]))
        if name in ("out", "lse"):
            at_places[:, apart_T] = x
            np.testing.assert_allclose(at_places[:, apart_T], x, atol=1e-12)
        else:
            np.add.at(at_places, (slice(None), apart_T), x)
        results.append(at_places)
    return results


def arrays(rng, batch, length_T, length_S, heads, kv_heads, head_dim, dtype=np.float32):
    shapes = [(batch, length_T, heads, head_dim), *[(batch, length_S, kv_heads, head_dim)] * 2]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in (*shapes, shapes[0])]


def _meta(case: Case, rng: np.random.Generator, length: int) -> TokenMeta:
    if case.trees:
        return jax.tree.map(lambda x: np.repeat(x, case.batch, 0), forest_metas(length)[0])
    return packed_meta(rng, case.batch, length, case.documents, case.padding)


def metas(case: Case, rng: np.random.Generator) -> tuple[TokenMeta, TokenMeta]:
    """Where the queries and where the keys of a case stand."""
    if case.hop:
        layout, devices, queries, keys = case.hop
        meta = _meta(case, rng, case.T * devices)
        order = permutation(layout, case.T * devices, devices).reshape(devices, case.T)
        q_meta, kv_meta = (jax.tree.map(lambda x, i=i: x[:, order[i]], meta) for i in (queries, keys))
    else:
        meta = _meta(case, rng, max(case.T, case.S))
        q_meta, kv_meta = (jax.tree.map(lambda x, n=n: x[:, :n], meta) for n in (case.T, case.S))
    if case.strangers is not None:
        segment_BT = kv_meta.segment_BT.copy()
        segment_BT[case.strangers :] += 100
        kv_meta = replace(kv_meta, segment_BT=segment_BT)
    return q_meta, kv_meta


@cache
def inputs(case: Case) -> tuple:
    """q, k, v, d_out and the two metas; the numbers are those of the dtype, so that both sides start alike."""
    rng = np.random.default_rng(0)
    tensors = arrays(rng, case.batch, case.T, case.S, *case.heads, case.head_dim, case.dtype)
    return (*tensors, *metas(case, rng))


def results(local: Local, split: int, q, k, v, d_out, q_meta, kv_meta, mask: MaskSpec, whole: Partial):
    """out and lse, the first `split` keys handed on as a carry; and dq, dk, dv with the global out and lse."""
    part = None
    for keys in (slice(split), slice(split, None)) if split else (slice(None),):
        some_meta = jax.tree.map(lambda x, keys=keys: x[:, keys], kv_meta)
        part = local.attend(q, k[:, keys], v[:, keys], q_meta, some_meta, mask, part)
    assert part is not None
    grads = local.attend_bwd(q, k, v, whole.out_BTNH, whole.lse_BTN, d_out, q_meta, kv_meta, mask)
    return (part.out_BTNH, part.lse_BTN, *grads)


@cache
def wanted(case: Case) -> tuple:
    """What the dense reference says: out, lse, dq, dk, dv; of whole trees, where their documents stand apart."""
    q, k, v, d_out, q_meta, kv_meta = inputs(case)
    if case.trees and case.hop is None and case.mask.causal:
        return tuple(jnp.asarray(x, jnp.float32) for x in laid_apart(q, k, v, d_out, case.T, case.mask))
    whole = reference.attend(q, k, v, q_meta, kv_meta, case.mask)
    return results(REFERENCE, 0, q, k, v, d_out, q_meta, kv_meta, case.mask, whole)


def assert_close(got, want, tolerance=2e-5, names=NAMES):
    """Each of `names` within `tolerance` of its kind's largest number; infinite in the same places."""
    for name, a, b in zip(names, got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert not np.isnan(a).any(), name
        finite = np.isfinite(b)
        assert (np.isfinite(a) == finite).all(), name
        scale = max(np.abs(b[finite]).max(initial=0), 1.0)  # with one key a row, dq is 0 but for rounding
        assert np.abs(a[finite] - b[finite]).max(initial=0) <= tolerance * scale, name


def check(local: Local, case: Case, refuses: Collection[str] = ()) -> None:
    """Holds an implementation to the reference; those in `refuses` must raise, naming what to use instead."""
    q, k, v, d_out, q_meta, kv_meta = inputs(case)
    whole = Partial(*wanted(case)[:2])
    run = jax.jit(partial(results, local, case.split, mask=case.mask))
    if case.name in refuses:
        with pytest.raises(NotImplementedError, match="use "):
            run(q, k, v, d_out, q_meta, kv_meta, whole=whole)
        return
    got = run(q, k, v, d_out, q_meta, kv_meta, whole=whole)
    assert all(array.dtype == jnp.float32 for array in got)
    if case.dtype == "float32" and case.trees:
        assert_close(got, wanted(case), tolerance=1e-5)
        assert_close(got[:1], wanted(case)[:1], tolerance=1e-6, names=NAMES[:1])
    else:
        assert_close(got, wanted(case), tolerance=2e-5 if case.dtype == "float32" else 2e-2)


def check_ring(local: str, length: int, block: int, heads=(2, 1), head_dim: int = 8) -> None:
    """make_attention by ring over two devices, zigzag, three documents, against the reference on one."""
    rng = np.random.default_rng(0)
    *qkv, d_out = arrays(rng, 1, length, length, *heads, head_dim)
    meta = packed_meta(rng, 1, length, 3, padding=7)
    part = reference.attend(*qkv, meta, meta, MaskSpec())
    want = (part.out_BTNH, *reference.attend_bwd(*qkv, part.out_BTNH, part.lse_BTN, d_out, meta, meta, MaskSpec()))
    mesh, order = make_mesh((1, 1, 1, 2), devices=jax.devices()[:2]), permutation("zigzag", length, 2)
    attend = make_attention(mesh, local=local, query_chunk_size=block, key_chunk_size=block)

    def run(q, k, v, d_out, meta):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, meta), q, k, v)
        return out, *pull(d_out)

    got = jax.jit(run)(*jax.tree.map(lambda x: x[:, order], (*qkv, d_out, meta)))
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert np.abs(a - b[:, order]).max() <= 2e-5 * np.abs(b).max(), name
