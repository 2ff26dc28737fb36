"""Trajectories with tools: what was sampled is what is learnt, bit for bit, and an environment may do what it likes."""

import json
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ringbpt.config import RolloutConfig, TokenizerConfig, UserError
from ringbpt.data.documents import make_batch
from ringbpt.data.text.chat import set_chat_template
from ringbpt.data.text.tokenizers import make_tokenizer
from ringbpt.mesh import put_batch
from ringbpt.objectives.advantages import by_critic
from ringbpt.rollout.collect import _piece
from ringbpt.rollout.engine import LocalEngine, Sample
from ringbpt.rollout.episodes import Episodes
from ringbpt.training.metrics import read_rows
from ringbpt.types import ALWAYS
from scripts import environments
from tests.model.helpers import CHEAP, make_model
from tests.training.test_loop import FULL, TINY, losses, train

pytestmark = pytest.mark.usefixtures("compiled_once")
LETTERS = "abcdefgh 0123456789"
MERGES = [("a", "b"), ("ab", "c"), ("d", "e"), ("g", "h"), ("1", "2"), ("12", "3"), (" ", "a")]
SPECIAL = environments.SPECIAL
FILE = """
import os, time

class Counts:
    tools = [{"name": "count"}]

    def reset(self, row):
        self.turns = 0
        return [{"role": "user", "content": row["text"]}]

    def step(self, messages):
        self.turns += 1
        done = self.turns == 3
        return ([] if done else [{"role": "tool", "content": f"{self.turns}23 abc"}]), 0.5 * self.turns, done

class Odd(Counts):
    def reset(self, row):
        self.mode = row["mode"]
        return super().reset(row)

    def step(self, messages):
        found = super().step(messages)
        mode = self.mode if self.turns == 2 else ""
        if mode == "raise":
            raise RuntimeError("no idea")
        if mode == "hang":
            time.sleep(60)
        if mode == "die":
            os._exit(3)
        return {
            "none": None, "nan": ([], float("nan"), True), "text": ([], "much", True), "done": ([], 1.0, "yes"),
            "empty": ([], 1.0, False), "no messages": ("abc", 1.0, False), "no role": ([{"content": "a"}], 1.0, False),
            "assistant": ([{"role": "assistant", "content": "a"}], 1.0, False), "no json": ([{1, 2}], 1.0, False),
        }.get(mode, found)

class Unsteady(Counts):
    begun = 0

    def reset(self, row):
        type(self).begun += 1
        return [{"role": "user", "content": "abc"[self.begun % 3]}]
"""


@cache
def _vocabulary() -> dict[str, int]:
    return {text: n for n, text in enumerate((*SPECIAL, *LETTERS, *("".join(pair) for pair in MERGES)))}


def tokenizer_in(folder: Path, template: str = environments.TEMPLATE) -> Any:
    """One of characters and a few pairs of them: most of what is drawn from it at random is not as it would encode."""
    files = environments.tokenizer()
    files["tokenizer.json"]["model"] |= {"vocab": _vocabulary(), "merges": MERGES, "unk_token": None}
    files["tokenizer_config.json"]["chat_template"] = template
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    found = make_tokenizer(TokenizerConfig(str(folder)))
    set_chat_template(found, "", "x")
    return found


@pytest.fixture
def made(tmp_path):
    """make(name, said, template, **flags) -> Episodes of the environment of this name in FILE."""
    (tmp_path / "mine.py").write_text(FILE)
    open_now = []

    def make(name: str, said: list[str] | None = None, template: str = environments.TEMPLATE, **flags) -> Episodes:
        tokenizer = tokenizer_in(tmp_path, template)
        given = {"max_new_tokens": 12, "max_turns": 4, "samples_per_prompt": 8, "reward_failures": 1.0} | flags
        config = RolloutConfig(environment=f"{tmp_path}/mine.py:{name}", **given)
        open_now.append(Episodes(config, tokenizer, (said if said is not None else []).append))
        return open_now[-1]

    yield make
    for episodes in open_now:
        episodes.close()


class Watched:
    """An engine whose calls are kept: (prompts, samples) of each."""

    def __init__(self, engine: Any):
        self.engine, self.calls = engine, []

    def generate(self, prompts, samples, temperature, seed):
        found = self.engine.generate(prompts, samples, temperature, seed)
        self.calls.append((prompts, found, seed))
        return found


class Scripted:
    """An engine that says "ab" and ends its turn."""

    def generate(self, prompts, samples, temperature, seed):
        ids = [_vocabulary()["a"], _vocabulary()["b"], _vocabulary()["<|end|>"]]
        return [[Sample(ids, [-1.0] * 3, "stop")] * samples if len(p) else [] for p in prompts]


def drawn_of(calls, each: int) -> list[list[list[int]]]:
    """Of each trajectory what the engine drew, turn after turn."""
    found = [[sample.tokens] for answers in calls[0][1] for sample in answers]
    for _, answered, _ in calls[1:]:
        for turns, answers in zip(found, answered, strict=True):
            turns += [sample.tokens for sample in answers]
    return found


def test_what_was_sampled_is_learnt_and_what_a_tool_said_is_seen(made):
    """200 trajectories, most of whose text encodes to other ids; the trainer says of each id what it was drawn with."""
    episodes = made("Counts")
    model = make_model((1, 1, 1, 2), **{"vocab_size": len(_vocabulary()), "max_sequence_length": 128})
    params = model.init(jax.random.key(0))
    rows = [{"text": "abcd"[: n % 4 + 1] + str(n)} for n in range(25)]
    prompts = episodes.begin(rows)
    engine = LocalEngine(model, 100, 12, frozenset({3}))
    engine.update(params)
    watched = Watched(engine)
    samples, rewards, facts = episodes.play(watched, range(25), rows, prompts, 108, lambda turn: 7 + turn)
    drawn = drawn_of(watched.calls, 8)
    pieces = [
        [_piece(prompt, sample, 0.0, unit=0, first=i == 0) for i, sample in enumerate(answers)]
        for prompt, answers in zip(prompts, samples, strict=True)
    ]
    host = make_batch(pieces, (25, 1024), [*ALWAYS, "rollout_logp", "last"])
    trained = [
        host.target_BT[b][(host.segment_BT[b] == i + 1) & (host.weight_BT[b] > 0)].tolist()
        for b in range(25)
        for i in range(8)
    ]
    assert len(trained) == 200 and trained == [[*chain(*turns)] for turns in drawn]
    tokenizer = episodes._tokenizer
    other = [any(tokenizer.encode(tokenizer.decode(t[:-1])).tolist() != t[:-1] for t in turns) for turns in drawn]
    assert sum(other) >= 20
    several = [turns for turns in drawn if len(turns) > 1]
    assert len(several) >= 20
    assert facts["rollout/turns"] == np.mean([len(turns) for turns in drawn])
    # What the engine was asked is what stands in the row, the tool's words among it, and none of these is learnt.
    flat = [sample for answers in samples for sample in answers]
    for number, turns in enumerate(drawn):
        told = np.array(flat[number].tokens)[~flat[number].mask]
        said = "".join(f"\n<|tool|>{n}23 abc<|end|><|assistant|>"[1:] for n in range(1, len(turns)))
        assert tokenizer.decode(told, special=True) == said
        if len(turns) > 1:
            asked = watched.calls[len(turns) - 1][0][number]
            whole = np.concatenate([prompts[number // 8], flat[number].tokens])
            np.testing.assert_array_equal(asked, whole[: len(asked)])
        ended = turns[-1][-1] == 3
        assert rewards[number // 8, number % 8] == sum(0.5 * (n + 1) for n in range(len(turns) - (not ended)))
    batch = put_batch(host.rows, (25, 1024), model.mesh, model.execution.sequence_layout)
    logp = np.asarray(jax.jit(lambda p, b: model.token_stats(p, b).logp_BT)(params, batch))
    there = np.asarray(batch.weight_BT) > 0
    assert np.abs(logp - np.asarray(batch.columns["rollout_logp"]))[there].max() <= 1e-4


def test_turns_are_drawn_by_their_own_seeds_and_places():
    """A trajectory's tokens don't depend on whether another one is still under way."""
    model = make_model((1, 1, 1, 1), **CHEAP)
    engine = LocalEngine(model, 8, 4, frozenset({3}))
    engine.update(model.init(jax.random.key(0)))
    prompts = [np.array(tokens, np.int32) for tokens in ([5, 9], [7, 7, 8], [4])]
    whole = engine.generate(prompts, 1, 1.0, seed=3)
    some = engine.generate([prompts[0], prompts[1][:0], prompts[2]], 1, 1.0, seed=3)
    assert some[1] == [] and [a[0].tokens for a in (some[0], some[2])] == [whole[0][0].tokens, whole[2][0].tokens]


MODES = (
    "",
    "raise",
    "hang",
    "die",
    "none",
    "nan",
    "text",
    "done",
    "empty",
    "no messages",
    "no role",
    "assistant",
    "no json",
)
WHY = (
    "RuntimeError: no idea", "no answer after 1 s", "its process has ended", "the reward is nan", "could not convert",
    "done is 'yes'", "what it says is no list of messages", "has no 'role'", "last message is the assistant's",
)  # fmt: skip


def test_an_environment_that_fails_is_counted_and_the_others_go_on(made):
    """Also those whose objects were in a process that had to be ended: they are where they were."""
    said: list[str] = []
    episodes = made("Odd", said, reward_timeout=1.0, samples_per_prompt=2)
    rows = [{"text": "a", "mode": mode} for mode in MODES]
    prompts = episodes.begin(rows)
    samples, rewards, _ = episodes.play(Scripted(), range(len(rows)), rows, prompts, 200, lambda turn: turn)
    assert np.array_equal(np.isnan(rewards), np.array([[bool(mode)] * 2 for mode in MODES]))
    assert rewards[0].tolist() == [3.0, 3.0]  # 0.5, 1 and 1.5: its turns were counted through
    for why in WHY:
        assert any(why in line for line in said), why
    assert all(sample.mask.sum() >= 3 for answers in samples for sample in answers)
    with pytest.raises(UserError, match="24 of 26 trajectories of a rollout have failed"):
        strict = made("Odd", reward_timeout=1.0, samples_per_prompt=2, reward_failures=0.5)
        strict.play(Scripted(), range(len(rows)), rows, strict.begin(rows), 200, lambda turn: turn)


def test_one_that_begins_otherwise_fails(made):
    said: list[str] = []
    episodes = made("Unsteady", said, samples_per_prompt=2)
    _, rewards, _ = episodes.play(Scripted(), [0], [{}], episodes.begin([{}]), 200, lambda turn: turn)
    assert np.isnan(rewards).all() and "begins with a row otherwise" in said[0]


@pytest.mark.parametrize(
    ("flags", "room", "turns", "over"), [({"max_turns": 2}, 200, 2, "out_of_turns"), ({}, 30, 2, "too_long")]
)
def test_a_trajectory_ends_where_turns_or_places_do(made, flags, room, turns, over):
    episodes = made("Counts", samples_per_prompt=1, **flags)
    rows = [{"text": "abc"}]
    [[sample]], rewards, facts = episodes.play(Scripted(), [0], rows, episodes.begin(rows), room, lambda turn: turn)
    assert facts["rollout/turns"] == turns and facts[f"rollout/{over}"] == 1.0
    assert rewards.tolist() == [[1.5]] and len(sample.tokens) <= room


def test_a_critic_carries_over_what_a_tool_said():
    """The places that were not drawn are none of a sample's: GAE goes from a turn's end to the next one's begin."""
    sample = Sample(
        [5, 6, 3, 9, 9, 7, 3], [-1.0] * 3 + [0.0] * 2 + [-1.0] * 2, "stop", [True] * 3 + [False] * 2 + [True] * 2
    )
    piece = _piece(np.array([1, 2], np.int32), sample, 1.0, unit=0, first=True)
    assert piece.values["mask"].tolist() == [0, 0, 1, 1, 1, 0, 0, 1, 1]
    whole = by_critic(np.array([[1.0]]), [np.zeros(5)], [np.arange(5.0)], 0.9, 0.8)
    host = make_batch([[piece]], (1, 16), [*ALWAYS, "rollout_logp"])
    assert int((host.weight_BT > 0).sum()) == 5 == len(whole[0][0])


REWRITES = environments.TEMPLATE.replace("message.content", "(message.content if loop.last else 'gone')")
NO_END = environments.TEMPLATE.replace("'<|end|>'", "' '")
CHECKS_ROLES = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "message"),
    [(REWRITES, "rewrites earlier turns"), (NO_END, "no special token"), ("", "no chat template")],
)
def test_a_template_that_cannot_go_on_is_refused_at_the_start(made, template, message):
    with pytest.raises(UserError, match=message) as error:
        made("Counts", template=template).begin([{"text": "a"}])
    assert "\n" not in str(error.value) and "--rollout.environment" in str(error.value)


def test_a_template_may_know_no_tools(made):
    made("Counts", template=CHECKS_ROLES + environments.TEMPLATE).begin([{"text": "a"}])


def test_rows_that_no_environment_begins_with_are_refused(made):
    with pytest.raises(UserError, match="prompt 2: KeyError: 'text'"):
        made("Counts").begin([{"text": "a"}, {}])


# --- the examples ---


def played(environment: Any, row: dict, *said: str) -> tuple[list[str], float, bool]:
    """What an environment says to what is said, what it is worth, and whether it is over."""
    messages, heard, worth, done = environment.reset(row), [], 0.0, False
    for text in said:
        messages = [*messages, {"role": "assistant", "content": text}]
        more, reward, done = environment.step(messages)
        messages, worth, heard = messages + more, worth + reward, heard + [m["content"] for m in more]
    return heard, worth, done


@pytest.mark.parametrize(
    ("said", "heard", "worth"),
    [
        (("=37*85", "3145"), ["3145"], 1.0),
        (("= -3 - 4 ", "=2**9", "-7"), ["-7", "?"], 0.0),
        (("3145",), [], 1.0),
    ],
)
def test_a_calculator(said, heard, worth):
    assert played(environments.Calculator(), {"question": "37*85", "answer": "3145"}, *said) == (heard, worth, True)


@pytest.mark.parametrize(
    ("said", "heard", "worth"),
    [
        (("C", "5"), ["..C5b"], 1.0),
        (("C", "6"), ["..C5b"], 0.6),
        (("A", "5"), ["A7."], 0.6),
        (("nowhere", "C", "5"), ["?", "..C5b"], 0.5),
        (("5",), [], 0.0),
    ],
)
def test_a_search_in_a_text_that_is_not_seen(said, heard, worth):
    row = {"text": "A7....C5bb", "word": "C", "label": "5"}
    assert played(environments.Search(), row, *said) == (heard, worth, True)


def test_each_word_has_its_key():
    for row in environments.rows(20):
        for word in environments.WORDS:
            heard, worth, _ = played(environments.Search(), row, word, row["label"])
            assert sum(map(str.isdecimal, heard[0])) == 1 and (worth == 1.0) == (word == row["word"])


# --- in a run ---


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("search")
    assert environments.main([f"--output={folder}", "--count=60"]) == 0
    return (
        *("--objective=grpo", f"--rollout.prompts={folder}/prompts.jsonl", f"--tokenizer.vocab_file={folder}"),
        *("--rollout.environment=scripts/environments.py:Search", "--rollout.max_new_tokens=3"),
        *("--rollout.prompts_per_step=4", "--rollout.samples_per_prompt=4", "--rollout.max_turns=2", "--log_freq=1"),
        TINY[0].replace("288", "29").replace("length=64", "length=128"),
        "--train_dataset.json_dataset.seq_length=128",
    )


def test_a_run_goes_on_bit_by_bit(words, tmp_path):
    """Stopped between the two steps of a rollout."""
    words = (*words, *FULL, "--rollout.updates=2")
    whole = train(tmp_path, *words, "--total_steps=6", name="whole")
    train(tmp_path, *words, "--total_steps=3", name="run")
    run = train(tmp_path, *words, "--total_steps=6", "--autoresume", name="run")
    assert losses(run) == losses(whole)
    row = read_rows(run / "metrics.jsonl")[0]
    assert row["mismatch"] == pytest.approx(1.0, abs=1e-4) and {"rollout/turns", "rollout/too_long"} <= row.keys()
