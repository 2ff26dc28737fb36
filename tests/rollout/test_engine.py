"""Samples: what a token was drawn with is what the trainer says of it, on every mesh, and one prefill serves many."""

from functools import cache
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringbpt.config import UserError
from ringbpt.data.documents import make_batch
from ringbpt.generation.stream import Stream
from ringbpt.mesh import put_batch
from ringbpt.rollout.collect import _piece
from ringbpt.rollout.engine import LocalEngine, Sample
from ringbpt.types import ALWAYS
from tests.model.helpers import make_model

END = 1
PROMPTS = [np.array(tokens, np.int32) for tokens in ([5, 9, 11], [7], [4, 4, 8, 30, 31, 32, 33])]
WAYS = [
    ((1, 1, 1, 1), {"attention_type": "blockwise"}),
    ((1, 1, 1, 8), {"sequence_layout": "balanced"}),
    ((1, 2, 2, 2), {}),
]


def engine_of(mesh: Any, temperature: float = 1.0, dtype: str = "fp32", **flags: Any) -> tuple[Any, Any, LocalEngine]:
    model = make_model(mesh, dtype=dtype, loss_chunk_size=64, scan_mlp=False, **flags)
    model = type(model)(**{**vars(model), "temperature": temperature})
    params = model.init(jax.random.key(0))
    engine = LocalEngine(model, longest=7, max_new_tokens=6, ends=frozenset({END}))
    engine.update(params)
    return model, params, engine


@cache
def drawn(temperature: float) -> list[list[Sample]]:
    _, _, engine = engine_of((1, 1, 1, 1), attention_type="blockwise")
    return engine.generate(PROMPTS, 4, temperature, seed=3)


@pytest.mark.parametrize(("mesh", "flags"), WAYS)
def test_what_a_token_was_drawn_with_is_what_the_trainer_says(mesh, flags):
    """In float32, with prompts shared in the row that is learnt, at a temperature that is not 1."""
    model, params, engine = engine_of(mesh, temperature=0.7, **flags)
    samples = engine.generate(PROMPTS, 4, 0.7, seed=3)
    assert [[s.tokens for s in answers] for answers in samples] == [[s.tokens for s in a] for a in drawn(0.7)]
    rows = [
        [_piece(prompt, sample, 0.0, unit=0, first=i == 0) for i, sample in enumerate(answers)]
        for prompt, answers in zip(PROMPTS, samples, strict=True)
    ]
    rows += [[]] * (4 - len(rows))
    columns = [*ALWAYS, "rollout_logp", "last"]
    host = make_batch(rows, (4, 64), columns)
    batch = put_batch(host.rows, (4, 64), model.mesh, model.execution.sequence_layout)
    logp = jax.jit(lambda p, b: model.token_stats(p, b).logp_BT)(params, batch)
    there = np.asarray(batch.weight_BT) > 0
    difference = np.abs(np.asarray(logp) - np.asarray(batch.columns["rollout_logp"]))[there]
    assert there.sum() == sum(len(s.tokens) for answers in samples for s in answers)
    assert difference.max() <= 1e-4 and difference.mean() <= 1e-5


def test_bf16_samplers_are_near_their_trainers():
    model, params, engine = engine_of((1, 1, 1, 1), dtype="bf16", attention_type="blockwise")
    samples = engine.generate(PROMPTS, 8, 1.0, seed=3)
    rows = [[_piece(PROMPTS[i], s, 0.0, 0, n == 0) for n, s in enumerate(samples[i])] for i in range(3)]
    host = make_batch(rows, (3, 64), [*ALWAYS, "rollout_logp", "last"])
    batch = put_batch(host.rows, (3, 64), model.mesh, "contiguous")
    logp = jax.jit(lambda p, b: model.token_stats(p, b).logp_BT)(params, batch)
    there = np.asarray(batch.weight_BT) > 0
    difference = np.abs(np.asarray(logp) - np.asarray(batch.columns["rollout_logp"]))[there]
    assert np.exp(difference).mean() <= 1.01


def test_samples_of_a_prompt_are_those_of_the_prompt_alone():
    """By number of the text: one prefill of a prompt for all of its samples changes nothing."""
    _, _, engine = engine_of((1, 1, 1, 1), attention_type="blockwise")
    apart = engine.generate([prompt for prompt in PROMPTS for _ in range(4)], 1, 0.7, seed=3)
    for together, alone in zip([s for answers in drawn(0.7) for s in answers], apart, strict=True):
        assert together.tokens == alone[0].tokens and together.finish == alone[0].finish
        np.testing.assert_allclose(together.logps, alone[0].logps, atol=1e-5)


def test_an_answer_ends_at_its_end_token():
    found = [sample for answers in drawn(0.7) for sample in answers]
    for sample in found:
        assert len(sample.tokens) == len(sample.logps) <= 6
        assert (sample.finish == "stop") == (sample.tokens[-1] == END) and END not in sample.tokens[:-1]
        assert sample.finish == "stop" or len(sample.tokens) == 6


def test_one_prefill_serves_a_prompts_samples():
    """The prompts' tokens stand in the batch once, however many samples there are."""
    _, _, engine = engine_of((1, 1, 1, 1), attention_type="blockwise")
    seen = []
    programs = engine._generator.programs
    prefill = programs.prefill
    programs.prefill = lambda weights, batch, *rest: seen.append(batch) or prefill(weights, batch, *rest)
    engine.generate(PROMPTS, 4, 0.7, seed=3)
    (batch,) = seen
    assert int(jnp.sum(batch.segment_BT > 0)) == sum(map(len, PROMPTS))


MANY = [np.roll(prompt, shift) for shift in range(3) for prompt in PROMPTS]
MANY_ENDS = frozenset(range(24))


@cache
def all_at_once(temperature: float, samples: int) -> list[list[Sample]]:
    model, params, _ = engine_of((1, 1, 1, 1), attention_type="blockwise")
    engine = LocalEngine(model, longest=7, max_new_tokens=6, ends=MANY_ENDS)
    engine.update(params)
    return engine.generate(MANY, samples, temperature, seed=5)


@pytest.mark.parametrize(
    ("mesh", "flags", "rows", "temperature", "samples"),
    [(*WAYS[0], 1, 0.0, 1), (*WAYS[0], 2, 1.0, 3), (*WAYS[1], 2, 1.0, 3), (*WAYS[2], 4, 1.0, 3)],
)
def test_how_many_rows_there_are_at_once_changes_nothing(mesh, flags, rows, temperature, samples):
    """A row begins the next prompt where its answers have ended, and others go on."""
    model, params, _ = engine_of(mesh, **flags)
    engine = LocalEngine(model, longest=7, max_new_tokens=6, ends=MANY_ENDS, rows=rows)
    engine.update(params)
    found, wanted = engine.generate(MANY, samples, temperature, seed=5), all_at_once(temperature, samples)
    assert len({max(len(sample.tokens) for sample in answers) for answers in found}) > 2  # rows are free at other steps
    for ours, theirs in zip(chain(*found), chain(*wanted), strict=True):
        assert (ours.tokens, ours.finish) == (theirs.tokens, theirs.finish)
        np.testing.assert_allclose(ours.logps, theirs.logps, atol=1e-5)


def test_a_row_waits_for_no_other(monkeypatch):
    """Steps: two rows that begin the next prompt at once, against pairs that wait for the longer of the two."""
    steps, step = [], Stream.step
    monkeypatch.setattr(Stream, "step", lambda stream: steps.append(1) or step(stream))
    model, params, _ = engine_of((1, 1, 1, 1), attention_type="blockwise")
    engine = LocalEngine(model, longest=7, max_new_tokens=6, ends=MANY_ENDS, rows=2)
    engine.update(params)
    lengths = [max(len(s.tokens) for s in answers) for answers in engine.generate(MANY, 1, 1.0, seed=5)]
    free = [0, 0]
    for length in lengths:  # each in the row that is free first
        free[free.index(min(free))] += length
    assert len(steps) == max(free) < sum(max(lengths[i : i + 2]) for i in range(0, len(lengths), 2))


def test_a_prompt_and_its_answers_must_fit_the_model():
    model = make_model((1, 1, 1, 1), attention_type="blockwise", max_sequence_length=16)
    with pytest.raises(UserError, match="above the model's 16"):
        LocalEngine(model, longest=12, max_new_tokens=6, ends=frozenset({END}))
