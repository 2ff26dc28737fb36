"""Pairs and single answers from their files to rows: units, labels, what stands once for all answers, and refusals."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringbpt.attention.core import MaskSpec, visible
from ringbpt.config import Config, DatasetConfig, JsonDatasetConfig, TextProcessorConfig, TokenizerConfig, UserError
from ringbpt.data.documents import Piece, columns_of, make_row, pieces_of
from ringbpt.data.loader import Loader, make_loader
from ringbpt.data.text.tokenizers import BytesTokenizer
from ringbpt.objectives import OBJECTIVES
from ringbpt.types import TokenMeta

PAIRS = [
    {"prompt": "Which animal barks? ", "chosen": "A dog.", "rejected": "A cat, of course.", "margin": 2.0},
    {"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"},
    {"chosen": "The sky is blue.", "rejected": "The sky is green."},  # what both begin with is the prompt
    {"prompt": "same ", "chosen": "yes", "rejected": "yes"},
]
ANSWERS = [
    {"prompt": "Which animal barks? ", "completion": "A dog.", "label": True},
    {"prompt": "2 + 2 = ", "completion": "5", "label": False},
    {"prompt": "Say no: ", "completion": "no", "label": 1},
]
T = 96


def load(tmp_path, rows, name="dpo", **changes) -> Loader:
    objective = OBJECTIVES[name]
    path = tmp_path / f"{len(rows)}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = JsonDatasetConfig(path=str(path), seq_length=changes.pop("seq_length", T), batch_size=1)
    dataset = DatasetConfig(cache_dir=str(tmp_path / "cache"), json_dataset=source, **changes)
    return make_loader(
        dataset,
        BytesTokenizer(TokenizerConfig("bytes")),
        seed=0,
        vocab_size=512,
        columns=objective.columns,
        optional=objective.optional,
        shapes=objective.shapes,
        taker=f"--objective={name}",
        whole_documents=objective.whole_documents,
        mismatched=objective.mismatched,
    )


def said(row, apart=True) -> list[tuple[str, str, int]]:
    """(what is given, what is learnt, the label) of each document of a row."""
    found = []
    for length, values, *_ in pieces_of(row, apart=apart):
        token, mask = values["token"][:length], values["mask"][:length] > 0
        text = [
            "".join(chr(t) if t < 256 else {256: "^", 257: "$"}[t] for t in some)
            for some in (token[~mask], token[mask])
        ]
        found.append((text[0], text[1], int(values["label"][1]) if "label" in values else 0))
    return found


def all_said(loader: Loader) -> list[list[tuple[str, str, int]]]:
    rows = [loader.row(0, number) for number in range(loader.epoch_rows)]
    units = []
    for row in rows:
        documents = said(row)
        numbers = [int(row["unit"][row["segment"] == s][0]) for s in range(1, len(documents) + 1)]
        units += [[d for d, n in zip(documents, numbers, strict=True) if n == unit] for unit in sorted(set(numbers))]
    return sorted(units)


WANTED = sorted([
    [("^Which animal barks? ", "A dog.$", 1), ("^Which animal barks? ", "A cat, of course.$", -1)],
    [("^2 + 2 = ", "4$", 1), ("^2 + 2 = ", "5$", -1)],
    [("^The sky is ", "blue.$", 1), ("^The sky is ", "green.$", -1)],
    [("^same ", "yes$", 1), ("^same ", "yes$", -1)],
])  # fmt: skip


@pytest.mark.parametrize("share", [True, False])
def test_pairs(tmp_path, share):
    loader = load(tmp_path, PAIRS, share_prompts=share)
    assert all_said(loader) == WANTED
    assert ("last" in loader.columns) == share and {"unit", "label", "margin"} <= set(loader.columns)
    tokens = sum(len(prompt) + len(answer) for unit in WANTED for prompt, answer, _ in unit)
    # Each rejected answer begins with a copy of the last token of what it shares: P - 1 tokens stand once.
    shared = sum(len(unit[0][0]) - 1 for unit in WANTED)
    assert loader.summary["tokens"] == tokens and loader.tokens_in == tokens
    assert (
        sum(np.count_nonzero(loader.row(0, n)["segment"]) for n in range(loader.epoch_rows)) == tokens - share * shared
    )
    assert loader.summary["alike"] == 1 and "1 pairs whose answers are the same" in loader.describe()
    margins = {float(m) for n in range(loader.epoch_rows) for m in loader.row(0, n)["margin"]}
    assert margins == {0.0, 2.0}


def test_answers_come_with_the_completion_before(tmp_path):
    found = all_said(load(tmp_path, ANSWERS, "kto"))
    assert found == sorted([
        [("^Which animal barks? ", "A dog.$", 1), ("^Which animal barks? ", "no$", 2)],
        [("^2 + 2 = ", "5$", -1), ("^2 + 2 = ", "A dog.$", 2)],
        [("^Say no: ", "no$", 1), ("^Say no: ", "5$", 2)],
    ])  # fmt: skip
    assert [[d for d in unit if d[2] != 2] for unit in found] == all_said(load(tmp_path, ANSWERS, "apo_zero_unpaired"))


def test_what_is_refused(tmp_path):
    def error(rows, name="dpo", **changes) -> str:
        with pytest.raises(UserError) as found:
            load(tmp_path, rows, name, **changes)
        return str(found.value)

    what = "some documents must share a row: --train_dataset.packing=best_fit keeps them"
    assert error(PAIRS, packing="concat") == f"--train_dataset.packing=concat: {what}"
    assert "1 packing units are longer than --train_dataset.json_dataset.seq_length=40" in error(PAIRS, seq_length=40)
    assert load(tmp_path, PAIRS, seq_length=40, long_documents="drop").tokens_dropped[
        "documents longer than seq_length"
    ]
    long = [{"prompt": "p", "completion": "c" * T, "label": True}]
    assert "longer than" in error(long * 2, "apo_zero_unpaired")
    assert "a 'kto' example does not go with --objective=dpo" in error(ANSWERS)
    assert ":2: 'label' is 'yes'; it must be true (desirable) or false" in error(
        [ANSWERS[0], ANSWERS[1] | {"label": "yes"}], "kto"
    )
    assert "the completion is empty" in error([PAIRS[0] | {"chosen": ""}])


def test_a_store_that_was_changed_is_made_again(tmp_path):
    before = all_said(load(tmp_path, PAIRS))
    (label,) = (tmp_path / "cache").glob("tokens-*/label.npy")
    array = np.load(label)
    np.save(label, -array)
    assert all_said(load(tmp_path, PAIRS)) == before
    label = next((tmp_path / "cache").glob("tokens-*/shared.npy"))
    label.unlink()
    assert all_said(load(tmp_path, PAIRS)) == before


def test_several_answers_to_one_prompt(tmp_path):
    rows = [
        {"prompt": "Name a colour: ", "completion": ["red", "green", "blue"]},
        {"prompt": "Hello", "completion": " you"},
        {
            "prompt": [{"role": "user", "content": "q"}],
            "completion": [[{"role": "assistant", "content": c}] for c in "ab"],
        },
    ]
    template = TextProcessorConfig(chat_template="chatml")
    loader = load(tmp_path, rows, "sft", text_processor=template)
    rows_of = [loader.row(0, number) for number in range(loader.epoch_rows)]
    found = sorted((prompt, answer) for row in rows_of for prompt, answer, _ in said(row))
    assert [(prompt, answer) for prompt, answer in found if "colour" in prompt] == [
        ("^Name a colour: ", f"{colour}$") for colour in ("blue", "green", "red")
    ]
    assert len(found) == 6 and {answer[0] for prompt, answer in found if "user" in prompt} == {"a", "b"}
    assert loader.summary["split"] == 0 and "best_fit" in loader.describe()
    assert sum(np.count_nonzero(row["last"] > row["segment"]) for row in rows_of) == loader.tokens_dropped[
        "beginnings that stand in the row already"
    ] - len("^Name a colour:")  # shared by three, it is counted once more


def test_a_field_in_the_template_of_a_prompt(tmp_path):
    rows = [{"prompt": "2 + 2 = {}", "completion": "4", "reward": 0.5}, {"prompt": "x", "completion": "y", "reward": 1}]
    template = TextProcessorConfig(input_template="{} <score>: {reward}\\n")
    loader = load(tmp_path, rows, "sft", text_processor=template, packing="first_fit")
    assert [prompt for prompt, _, _ in said(loader.row(0, 0))] == ["^2 + 2 = {} <score>: 0.5\n", "^x <score>: 1\n"]
    with pytest.raises(
        UserError, match=r":2: field 'reward', which --train_dataset.text_processor.input_template names"
    ):
        load(tmp_path, [rows[0], {"prompt": "x", "completion": "y"}, rows[1]], "sft", text_processor=template)


# --- trees of any depth ---

trees = st.recursive(
    st.integers(1, 5), lambda inner: st.tuples(st.integers(1, 5), st.lists(inner, min_size=1, max_size=3)), max_leaves=6
)


def documents_of(tree, path=()) -> list[list[int]]:  # type: ignore[no-untyped-def]
    """The documents of a tree of lengths, by the numbers of their tokens: what two share has the same numbers."""
    length, branches = (tree, []) if isinstance(tree, int) else tree
    first = len(path)
    path = (*path, *range(documents_of.next, documents_of.next + length))  # type: ignore[attr-defined]
    documents_of.next += length  # type: ignore[attr-defined]
    assert len(path) == first + length
    return [d for branch in branches for d in documents_of(branch, path)] if branches else [list(path)]


@settings(max_examples=100, deadline=None)
@given(st.lists(trees, min_size=1, max_size=4))
def test_a_row_of_trees_is_its_documents(some):
    documents_of.next = 1  # type: ignore[attr-defined]
    pieces, whole = [], []
    for unit, tree in enumerate(some):
        before: list[int] = []
        for document in documents_of(tree):
            common = next((i for i, (a, b) in enumerate(zip(before, document, strict=False)) if a != b), len(before))
            shared = max(0, min(common, len(document)) - 1)
            values = {"token": np.array(document), "mask": np.arange(len(document)) == len(document) - 1}
            whole.append(Piece(len(document), values, unit))
            pieces.append(Piece(len(document) - shared, {k: v[shared:] for k, v in values.items()}, unit, shared))
            before = document
    length = sum(piece.length for piece in whole)
    row = make_row(pieces, length, columns_of(("token", "mask"), "unit", "last"))
    apart = pieces_of(row, apart=True)
    again = make_row([piece._replace(values=piece.values) for piece in apart], length, columns_of((), "unit"))
    want = make_row(whole, length, columns_of((), "unit"))
    for name, array in want.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)
    same = make_row(pieces_of(row), length, columns_of((), "unit", "last"))
    for name, array in row.items():
        np.testing.assert_array_equal(same[name], array, err_msg=name)
    # Each place sees as many as its document has before it: what the log counts as pairs.
    meta = TokenMeta(*(row[name][None] for name in ("position", "segment", "last")))
    seen = np.asarray(visible(meta, meta, MaskSpec()))[0].sum(axis=1)
    np.testing.assert_array_equal(seen, np.where(row["segment"] > 0, row["position"] + 1, 0))


def test_the_flag_of_packing_is_what_the_objective_needs(tmp_path):
    assert "best_fit" in load(tmp_path, PAIRS).describe()
    assert replace(Config()).train_dataset.packing == "auto"
