"""Text out: the same 64 tokens as transformers' generate on every mesh, whatever else is in the batch."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringbpt.checkpoint.load import load_model
from ringbpt.config import UserError
from ringbpt.data.documents import Piece, make_batch
from ringbpt.generation.generator import Generator, plan_rows, rounded_length
from ringbpt.generation.sampling import Options, Sampling, filtered, penalise
from ringbpt.generation.stream import BatchShape, Draw, NewToken, Unit
from ringbpt.layouts import inverse, permutation, row_length
from ringbpt.mesh import put_batch
from ringbpt.model.llama import Model
from ringbpt.types import Params
from tests.golden.make_families import CASES, NEW_TOKENS, PROMPT, documents, live, restore

MESHES = {"one device": (1, 1, 1, 1), "sp=4": (1, 1, 1, 4), "tp=2": (1, 1, 2, 1), "fsdp=2": (1, 2, 1, 1)}
GREEDY = Sampling()
COVER = [("llama3.2", "sp=4"), ("mistral", "one device"), ("qwen2.5", "tp=2")]


def run(generator: Generator, prompts: list[np.ndarray], new_tokens: int, sampling=GREEDY, batch_size=8):
    return [[token.id for token in text] for text in draw(generator, prompts, new_tokens, sampling, batch_size)]


def draw(generator: Generator, prompts: list[np.ndarray], new_tokens: int, sampling=GREEDY, batch_size=8):
    shape, rows = plan_rows([len(p) for p in prompts], generator.model, batch_size, new_tokens)
    found: dict[int, list[NewToken]] = {i: [] for i in range(len(prompts))}
    for tokens in generator.tokens(prompts, shape, rows, sampling):
        for number, token in tokens.items():
            found[number].append(token)
    return [found[i] for i in range(len(prompts))]


def check(folder: Path, want: np.ndarray, mesh: str, packed: bool = True) -> None:
    """The prompt beside two others of other lengths, all in one row where they fit; or alone."""
    first = documents()[0][:PROMPT]
    rng = np.random.default_rng(0)
    prompts = [first, rng.integers(2, 96, 29), rng.integers(2, 96, 7)] if packed else [first]
    model, params = load_model(f"huggingface::{folder}", MESHES[mesh])
    texts = draw(Generator(model, params), prompts, NEW_TOKENS)
    assert [token.id for token in texts[0]] == want.tolist()
    if mesh in ("one device", "sp=4"):
        same_logps(model, params, prompts, texts)


def same_logps(model: Model, params: Params, prompts: list[np.ndarray], texts: list[list[NewToken]]) -> None:
    """The log-probability of each new token is what training's statistics say of it."""
    whole = [np.array([*prompt, *(token.id for token in text)]) for prompt, text in zip(prompts, texts, strict=True)]
    sp, layout = model.mesh.shape["sp"], model.execution.sequence_layout
    length = row_length(max(map(len, whole)), sp, model.execution.scan_mlp_chunk_size)
    rows = [[Piece(len(tokens), {"token": tokens, "mask": np.ones(len(tokens))})] for tokens in whole]
    batch = put_batch(make_batch(rows, (len(rows), length)).rows, (len(rows), length), model.mesh, layout)
    logp_BT = np.asarray(jax.jit(lambda params, batch: model.token_stats(params, batch).logp_BT)(params, batch))
    logp_BT = logp_BT[:, inverse(permutation(layout, length, sp))]
    for prompt, text, logp_T in zip(prompts, texts, logp_BT, strict=True):
        mine = logp_T[len(prompt) - 1 : len(prompt) - 1 + len(text)]
        np.testing.assert_allclose([token.logp for token in text], mine, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("case", "mesh"), COVER)
def test_greedy_text_is_that_of_transformers(case, mesh, tmp_path):
    check(tmp_path, restore(case, tmp_path)["continuation"], mesh)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_greedy_text_is_that_of_transformers_live(case, tmp_path):
    want = live(case, tmp_path)["continuation"]
    for mesh in MESHES:
        for packed in (True, False):
            check(tmp_path, want, mesh, packed)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> tuple[Model, Params]:
    folder = tmp_path_factory.mktemp("llama")
    restore("llama", folder)
    return load_model(f"huggingface::{folder}", MESHES["one device"])


@pytest.fixture(scope="module")
def generator(loaded) -> Generator:
    return Generator(*loaded)


@contextmanager
def compiles() -> Iterator[list[str]]:
    """What is compiled meanwhile, an entry for each program."""
    found: list[str] = []

    def told(event: str, duration: float, **_: object) -> None:
        found.extend([event] * ("backend_compile" in event))

    jax.monitoring.register_event_duration_secs_listener(told)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(told)


def test_seeds_reproduce_whatever_stands_beside(generator):
    rng = np.random.default_rng(1)
    prompts = [rng.integers(2, 96, n) for n in (9, 5, 12)]
    warm = Sampling(temperature=1.0, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=7)
    together = run(generator, prompts, 8, warm)
    assert together == run(generator, prompts, 8, warm)
    assert together == run(generator, prompts, 8, warm, batch_size=1)
    assert together != run(generator, prompts, 8, replace(warm, seed=8))


def test_texts_drawn_each_in_its_own_way(generator):
    """By options, a seed and a number of their own, beside others: as alone, by the numbers of a call of their own."""
    prompts = [np.arange(2, 12), np.arange(20, 25), np.arange(40, 60)]
    ways = [Sampling(1.0, seed=7), Sampling(0.5, top_k=5, seed=2**32 - 1), Sampling(2.0, top_p=0.5, min_p=0.1, seed=7)]
    shape = BatchShape(4, rounded_length(20, generator.model), 1, 6)
    draws = [Draw(way, number) for way, number in zip(ways, (0, 1, 0), strict=True)]
    steps = generator.tokens(prompts, shape, [[0], [1], [2]], ways[0], draws=draws)
    found = [[step[number] for step in steps_of] for number, steps_of in enumerate([[*steps]] * 3)]
    beside = [[prompts[0]], [prompts[2], prompts[1]], [prompts[2]]]
    for number, (way, alone) in enumerate(zip(ways, beside, strict=True)):
        wanted = draw(generator, alone, 6, way)[draws[number].number]
        assert [token.id for token in found[number]] == [token.id for token in wanted]
        np.testing.assert_allclose([x.logp for x in found[number]], [x.logp for x in wanted], atol=1e-5)


@pytest.mark.parametrize(("mesh", "layout"), [("sp=4", "zigzag"), ("fsdp=2", "contiguous")])
def test_texts_go_on_while_their_batch_grows(mesh, layout, generator, tmp_path):
    """More rows, longer prompts and longer texts, at several turns of the ring of slots: as each is alone."""
    restore("llama", tmp_path)
    model, params = load_model(f"huggingface::{tmp_path}", MESHES[mesh])
    model = replace(model, execution=replace(model.execution, sequence_layout=layout))
    rng, ways = np.random.default_rng(2), [Sampling(1.0, seed=5), GREEDY, Sampling(0.7, repetition_penalty=1.5, seed=1)]
    prompts = [rng.integers(2, 96, size) for size in (11, 5, 9, 30, 7, 16)]
    mosts, found = [9, 16, 16, 40, 3, 21], [list[NewToken]() for _ in prompts]
    first = BatchShape(2, 16, 1, 16)
    stream = Generator(model, params).stream(first)
    at: dict[int, int] = {}  # {row: number of its text}
    for number, shape, steps in (
        (0, first, 2), (1, first, 5), (2, BatchShape(4, 16, 1, 16), 6), (3, BatchShape(4, 32, 1, 64), 9),
        (4, BatchShape(4, 32, 1, 64), 4), (5, BatchShape(8, 48, 1, 64), 99),
    ):  # fmt: skip
        if shape != stream.shape:
            moved = stream.grow(shape)
            at = {moved[row]: text for row, text in at.items()}
        row = stream.free[0]
        stream.fill({row: Unit([prompts[number]], [Draw(ways[number % 3], 0)], mosts[number])})
        at[row] = number
        for step in range(steps + 4):
            if not stream.under_way or (step >= steps and stream.may_grow):
                break
            for row, [token] in stream.step().items():
                found[at[row]].append(token)
    assert not stream.under_way
    for prompt, most, way, text in zip(prompts, mosts, ways * 2, found, strict=True):
        [wanted] = draw(generator, [prompt], most, way)
        assert [token.id for token in text] == [token.id for token in wanted]
        np.testing.assert_allclose([x.logp for x in text], [x.logp for x in wanted], atol=2e-5)


def test_no_recompiles(generator):
    """One program a shape: neither rows that begin others nor other options compile anything."""
    prompts = [np.full(n, 5) for n in (8, 8, 8, 8, 3)]
    run(generator, prompts[:3], 4, Sampling(temperature=0.7), batch_size=2)
    with compiles() as compiled:
        run(generator, prompts, 4, Sampling(temperature=0.2, top_k=3, min_p=0.1, seed=4), batch_size=2)
        assert not compiled
        jax.jit(lambda x: 3 * x + 1)(jnp.ones(3)).block_until_ready()
        assert compiled


def test_log_probabilities_of_drawn_tokens(loaded, generator):
    """At temperature 1 those of the model; with fewer tokens left in, those of what is left."""
    prompts = [np.full(8, 5), np.arange(8) + 3]
    same_logps(*loaded, prompts, draw(generator, prompts, 4, Sampling(temperature=1.0, seed=3), batch_size=2))
    for text in draw(generator, prompts, 4, Sampling(temperature=1.0, top_k=1), batch_size=2):
        assert [token.logp for token in text] == [0.0] * 4


def test_new_weights_compile_nothing(loaded):
    prompts, warm = [np.full(8, 5), np.arange(8) + 3], Sampling(temperature=1.0)
    model, params = loaded
    generator = Generator(*loaded)  # whatever another has compiled may have been cleared since (conftest)
    other = jax.device_put(jax.tree.map(lambda x: x[..., ::-1] if x.ndim > 2 else x, params), model.shardings)
    before = draw(generator, prompts, 4, warm, batch_size=2)
    with compiles() as compiled:
        generator.update(other)
        after = draw(generator, prompts, 4, warm, batch_size=2)
        generator.update(params)
        again = draw(generator, prompts, 4, warm, batch_size=2)
        assert not compiled
    assert before == again != after


@pytest.mark.parametrize("mesh", ["one device", "sp=4"])
def test_decoding_copies_no_cache(mesh, tmp_path):
    """The compiled step has the cache as its donated argument and updates it in place: no copy of its shape, ever."""
    restore("llama3.2", tmp_path)
    model, params = load_model(f"huggingface::{tmp_path}", MESHES[mesh])
    generator = Generator(model, params)
    stream = generator.stream(BatchShape(rows=2, length=448, texts=1, new_tokens=40))
    args = generator.weights, stream._cache, stream._told[0], None, stream._texts, jnp.int32(0)
    cache, step = stream._cache, generator.programs.step(448 // model.mesh.shape["sp"], drawn=False)
    compiled = step.lower(*args).compile()
    sizes = cache.k[0].addressable_shards[0].data.shape
    text = compiled.as_text()
    shown = ",".join(map(str, sizes))
    assert f"[{shown}]" in text
    copies = [line for line in text.splitlines() if re.search(rf"= f32\[{shown}\]\S* (copy|transpose|convert)\(", line)]
    assert not copies, copies[0]
    assert text.count("may-alias") + text.count("must-alias") >= 4  # k and v of both layers, given back in place
    cache_bytes = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(cache))
    assert compiled.memory_analysis().temp_size_in_bytes < cache_bytes / 2


def test_plan_packs_unequal_prompts(generator):
    lengths = [100, 60, 40, 30, 30, 30, 10]
    shape, rows = plan_rows(lengths, generator.model, 7, 16)
    assert (shape.rows, shape.length) == (3, 100)
    assert sorted(n for row in rows for n in row) == list(range(7)) and len(rows) == 3
    shape, rows = plan_rows(lengths, generator.model, 3, 16)
    assert rows == [[0], [1, 2], [3], [4, 5], [6]] and shape == BatchShape(2, 100, 2, 16)
    with pytest.raises(UserError, match="--max_new_tokens=412"):
        plan_rows(lengths, generator.model, 7, 500)


def test_filters():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]]))

    def kept(**options):
        numbers = Sampling(temperature=1.0, **options).numbers()
        return np.flatnonzero(np.isfinite(filtered(logits, Options(*numbers))[0])).tolist()

    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=2) == [0, 1]
    assert kept(top_p=0.6) == [0, 1]
    assert kept(top_p=0.5) == [0]
    assert kept(min_p=0.4) == [0, 1]
    assert kept(top_k=3, top_p=0.8) == [0, 1]  # of three, renormalised: 0.56, 0.28, 0.17
    seen = jnp.array([[True, False, False, False]])
    np.testing.assert_allclose(penalise(jnp.array([[2.0, -1, 1, 0]]), seen, 2.0)[0], [1, -1, 1, 0])
    np.testing.assert_allclose(penalise(jnp.array([[-2.0, -1, 1, 0]]), seen, 2.0)[0], [-4, -1, 1, 0])


def test_bad_options():
    with pytest.raises(UserError, match="--top_p=1 is"):
        Sampling(top_p=2.0)
