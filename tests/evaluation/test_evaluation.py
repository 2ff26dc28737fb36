"""Scores against sums made by hand, pictures that are pictures, and the whole verb on a tiny model."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from ringbpt.checkpoint.export import logits
from ringbpt.checkpoint.load import load_model
from ringbpt.config import UserError, run_main
from ringbpt.data.prompts import read_prompts
from ringbpt.evaluate import main
from ringbpt.evaluation.choices import accuracy, read_choices, score_choices
from ringbpt.evaluation.passkey import draw_grid, passkey_grid, passkey_items
from ringbpt.evaluation.perplexity import Curve, draw_curve, make_loss_by_position, read_texts
from ringbpt.evaluation.score import Item, Scorer
from ringbpt.evaluation.texts import Haystack, make_passkey, training_rows
from ringbpt.training.metrics import read_rows
from tests.golden.make_families import restore
from tests.pictures import cut_off, drawn


def encode(text: str) -> np.ndarray:
    return np.array([1, *(2 + ord(c) % 94 for c in text)], np.int32)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama3")
    restore("llama3", folder)
    return folder, *load_model(f"huggingface::{folder}", (1, 1, 1, 1))


@pytest.fixture(scope="module")
def items_and_logp(loaded):
    """Items of unequal length, and the log-probability of every next token of each, alone."""
    _, model, params = loaded
    rng = np.random.default_rng(0)
    items = [
        Item(rng.integers(2, 96, size).astype(np.int32), start) for size, start in ((20, 3), (9, 8), (31, 1), (5, 2))
    ]
    padded = np.zeros((4, 32), np.int32)
    for row, item in zip(padded, items, strict=True):
        row[: len(item.tokens)] = item.tokens
    logp = np.asarray(jax.nn.log_softmax(logits(model, params, padded)))
    return items, logp


def test_scores_are_those_of_each_text_alone(loaded, items_and_logp):
    """Packed with others over sp=2 and alone on one device: the same."""
    items, logp = items_and_logp
    want = [
        sum(logp[i, t - 1, item.tokens[t]] for t in range(item.start, len(item.tokens))) for i, item in enumerate(items)
    ]
    model, params = load_model(f"huggingface::{loaded[0]}", (1, 1, 1, 2))
    found = Scorer(model, rows=2).score(params, items)
    np.testing.assert_allclose(found.logp, want, rtol=1e-5)
    np.testing.assert_array_equal(found.count, [17, 1, 30, 3])
    best = logp.argmax(-1)
    greedy = Item(np.append(items[1].tokens[:8], best[1, 7]).astype(np.int32), 8)
    other = greedy._replace(tokens=np.append(items[1].tokens[:8], (best[1, 7] + 1) % 96).astype(np.int32))
    assert Scorer(model, rows=2).score(params, [greedy, other]).exact.tolist() == [True, False]


def test_loss_by_position_is_the_loss(loaded, items_and_logp):
    _, model, params = loaded
    items, logp = items_and_logp
    items = [item._replace(start=1) for item in items]
    scorer = Scorer(model, rows=2)
    measure = make_loss_by_position(model, 32, buckets=4)
    curve = measure(params, (batch for batch, _ in scorer.batches(items, 32)))
    lost = [
        (t - 1, -logp[i, t - 1, item.tokens[t]]) for i, item in enumerate(items) for t in range(1, len(item.tokens))
    ]
    for bucket in range(4):
        mine = [loss for place, loss in lost if bucket * 8 <= place < bucket * 8 + 8]
        assert curve.tokens[bucket] == len(mine)
        assert curve.loss[bucket] == pytest.approx(np.mean(mine), rel=1e-5)
    none = measure(params, [jax.tree.map(lambda x: x * 0, next(scorer.batches(items, 32))[0])])
    assert np.isnan(none.loss).all() and not none.tokens.any()  # no number where there is nothing, not a perfect 0


def test_passkey_texts():
    haystack, rng = Haystack("heldout"), np.random.default_rng(0)
    for depth in (0.0, 0.3, 1.0):
        text = make_passkey(haystack, rng, 400, depth)
        assert sum(map(len, text)) == 400
        hay = len(text.before) + len(text.after)
        assert len(text.before) == round(depth * hay)
        assert not any(c.isdigit() for c in text.before + text.after)
        assert text.needle.count(text.answer.strip()) == 2
    with pytest.raises(UserError, match="no room"):
        make_passkey(haystack, rng, 50, 0.5)


def test_texts_for_training_grow():
    rows = list(training_rows(40, 300, seed=0))
    lengths = [sum(map(len, row.values())) for row in rows]
    assert max(lengths[:16]) <= 170 < 200 < max(lengths) <= 300
    for row in rows:
        assert row["again"] == row["answer"].strip()
        assert row["given"].count(row["again"]) == 1  # what takes loss has been said
        assert not any(c.isdigit() for c in row["between"])
    assert rows == list(training_rows(40, 300, seed=0))


def test_passkey_items_end_with_the_key():
    for length in (200, 300):
        for item in passkey_items(encode, length, [0.0, 1.0], 2, seed=0):
            assert len(item.tokens) in (length - 1, length - 2)
            assert len(item.tokens) - item.start == 6  # a space and five digits


def test_a_model_that_knows_finds_every_key(loaded):
    """The grid's shape, and its meaning: a stub that scores everything exact finds all, one that doesn't none."""
    _, model, params = loaded
    scorer = Scorer(model)
    grid = passkey_grid(scorer, params, encode, [160, 200], [0.0, 0.5, 1.0], samples=2)
    assert grid.shape == (2, 3)
    assert grid.max() == 0  # random weights know nothing
    scorer.score = lambda params, items, length: type("All", (), {"exact": np.ones(len(items), bool)})
    assert passkey_grid(scorer, params, encode, [160, 200], [0.0, 0.5, 1.0], samples=2).min() == 1


def test_choices(loaded, tmp_path):
    _, model, params = loaded
    file = tmp_path / "q.jsonl"
    file.write_text(
        '{"prompt": "ab", "choices": ["c", "de"], "answer": "de"}\n{"prompt": "x", "choices": ["y", "z"]}\n'
    )
    rows = score_choices(Scorer(model), params, encode, read_choices(file))
    alone = Scorer(model).score(params, [Item(encode("abde"), 3)]).logp[0]
    assert rows[0]["logp"][1] == pytest.approx(alone, rel=1e-5)
    assert rows[0]["answer"] == 1
    assert accuracy(rows) in (0.0, 1.0)
    assert accuracy(rows[1:]) is None
    file.write_text('{"prompt": "ab", "choices": ["c", "de"], "answer": 2}\n')
    with pytest.raises(UserError, match=r"q\.jsonl:1: not"):
        read_choices(file)


def test_texts_of_a_file(tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": "a"}\n\n{"text": "2"}\n')
    assert read_texts(str(file)) == ["a", "2"]
    for line in ('{"txt": "a"}', '{"text": 2}', "{", "3"):
        file.write_text(line)
        with pytest.raises(UserError, match=r't\.jsonl:1: no {"text"'):
            read_texts(str(file))
    with pytest.raises(UserError, match=r"--perplexity=.*No such file"):
        read_texts(str(tmp_path / "u.jsonl"))


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x1c", "\ufeff", "\r\n\x0b\x0c"])
def test_only_lf_ends_a_line(tmp_path, inside):
    """R18: of prompts, texts, choices and metrics, as of training data; a byte order mark begins none."""
    text, file = f"a{inside}b", tmp_path / "rows.jsonl"

    def write(row: dict) -> Path:
        content = "\n".join([json.dumps(row, ensure_ascii=False)] * 2) + "\r\n"
        file.write_bytes(b"\xef\xbb\xbf" + content.encode())
        return file

    assert read_texts(str(write({"text": text}))) == [text] * 2
    assert read_prompts(write({"prompt": text})) == [{"prompt": text}] * 2
    rows = read_choices(write({"prompt": text, "choices": [text, "c"]}))
    assert [row["choices"] for row in rows] == [[text, "c"]] * 2
    file.write_bytes(write({"step": 1, "note": text}).read_bytes()[3:])
    assert read_rows(file) == [{"step": 1, "note": text}] * 2
    file.write_bytes(b'{"text": "a"}\r{"text": "b"}')  # CR ends none either
    with pytest.raises(UserError, match=r"rows\.jsonl:1: no"):
        read_texts(str(file))


def test_pictures(tmp_path, monkeypatch):
    curve = Curve(np.array([0, 4000, 8000]), np.array([1.0, np.nan]), np.array([3, 0]))
    draw_grid(tmp_path / "grid.png", np.array([[0.0, 1.0]]), [64], [0.0, 1.0], "title")
    draw_curve(tmp_path / "curve.png", curve, "title")
    for name in ("grid", "curve"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    pictures, title = drawn(monkeypatch), "/a/path/without/any/space/" * 5 + "\n8 keys a cell"
    draw_grid(tmp_path / "grid.png", np.array([[0.0, 1.0]]), [64], [0.0, 1.0], title)
    draw_curve(tmp_path / "curve.png", curve, title)
    for figure, _ in pictures:
        assert figure.axes[0].get_title().replace("\n", "") == title.replace("\n", "") and cut_off(figure) == []
    axes = pictures[1][0].axes[0]
    labels = [label.get_text() for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels()]
    assert "2,000" in labels and not any("10^" in label for label in labels)


def test_the_verb(loaded, tmp_path, capsys, monkeypatch):
    pictures = drawn(monkeypatch)
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n')
    texts = tmp_path / "t.jsonl"
    texts.write_text('{"text": "def f(x): return x"}\n' * 3)
    # The bytes tokenizer's ids do not fit this vocabulary, and are cut off by the embedding: the numbers mean nothing,
    # and would be refused.
    monkeypatch.setattr("ringbpt.generation.generator.check_vocabulary", lambda *_: None)
    argv = [
        f"--load_checkpoint=huggingface::{loaded[0]}", "--tokenizer=bytes", "--mesh_dim=1,1,1,-1",
        f"--choices={questions}", f"--perplexity={texts}", "--passkey=160", "--depths=2", "--samples=1",
        "--seq_length=64", f"--output={tmp_path}/out",
    ]  # fmt: skip
    assert run_main(main, [*argv, "--json"]) == 0
    shown = capsys.readouterr()
    assert "perplexity" in shown.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results == json.loads(shown.out)
    assert np.array(results["passkey"]["found"]).shape == (1, 2)
    assert results["mesh"] == [1, 1, 1, 8]
    titles = [figure.axes[0].get_title().replace("\n", "") for figure, _ in pictures]
    assert [title.startswith(str(loaded[0])) for title in titles] == [True, True]
    by_position = results["perplexity"]["by_position"]
    losses, seen = by_position["loss"], by_position["tokens"]
    assert [loss is None for loss in losses] == [tokens == 0 for tokens in seen] and None in losses
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "results.json", "choices.jsonl", "passkey.png", "perplexity.png",
    }  # fmt: skip
    assert run_main(main, argv[:1]) == 2
    assert run_main(main, [*argv[:1], "--passkey=big"]) == 2
    assert run_main(main, [*argv[:1], "--pass_key=5"]) == 2
    assert capsys.readouterr().err.count("\n") == 3
