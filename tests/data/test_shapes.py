"""Shapes are told by their keys, renamed by the flags that people know, and refused in one line."""

import pytest

from ringbpt.config import DatasetConfig, FilesDatasetConfig, TextProcessorConfig, TokenizerConfig, UserError
from ringbpt.data.loader import make_loader
from ringbpt.data.text.shapes import (
    AS_TEXT,
    LEARNT_AS_TEXT,
    SHAPES,
    conversation,
    detect,
    preference,
    prompt_and_completion,
)
from ringbpt.data.text.tokenizers import BytesTokenizer
from ringbpt.objectives import OBJECTIVES

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
EXAMPLES = {
    "text": {"text": "t", "id": 3},
    "messages": {"messages": TALK, "tools": None},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}]},
    "alpaca": {"instruction": "i", "input": "", "output": "o"},
    "prompt_completion": {"prompt": "p", "completion": "c"},
    "preference": {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 0.5},
    "kto": {"prompt": "p", "completion": "c", "label": True},
    "rl": {"prompt": "p", "label": "42"},
}


def told(example, **config) -> str:
    return detect(example, TextProcessorConfig(**config), "train_dataset.text_processor", "d.jsonl:1")


def error(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("shape", EXAMPLES)
def test_shapes_are_told(shape):
    assert told(EXAMPLES[shape]) == shape and set(EXAMPLES) == set(SHAPES)


def test_flags_say_otherwise():
    assert told({"q": "x", "a": "y"}, input_key="q", output_key="a") == "prompt_completion"
    assert told({"q": "x"}, input_key="q") == "text" and told({"q": TALK}, input_key="q") == "messages"
    assert told({"yes": "x", "no": "y"}, chosen_key="yes", rejected_key="no") == "preference"
    assert told(EXAMPLES["preference"], output_key="chosen") == "prompt_completion"
    assert told({"conversations": TALK}) == "messages"
    assert told({"text": None, "prompt": "p", "completion": "c"}) == "prompt_completion"  # as tables fill up
    assert told(EXAMPLES["text"], shape="rl") == "rl"


def test_nothing_is_told():
    expected = "no shape that is known here in 'id', 'body': --train_dataset.text_processor.fields=body names"
    assert expected in error(told, {"id": 1, "body": "x"})
    assert "no field 'qq', the prompt by the flags; the nearest is 'q'" in error(told, {"q": "x"}, input_key="qq")


def test_pairs():
    config = TextProcessorConfig()
    alpaca = {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["a", "b"]]}
    assert prompt_and_completion(alpaca, "alpaca", config, "w") == ("i\nx", "o")
    pair = prompt_and_completion(alpaca, "alpaca", TextProcessorConfig(apply_chat_template=True), "w")
    assert [m["role"] for m in pair.prompt] == ["system", "user", "assistant", "user"] and len(pair.completion) == 1
    mixed = prompt_and_completion({"prompt": TALK[:1], "completion": "c"}, "prompt_completion", config, "w")
    assert mixed.completion == [{"role": "assistant", "content": "c"}]
    empty = {"prompt": "p", "completion": ""}
    assert "the completion is empty" in error(prompt_and_completion, empty, "prompt_completion", config, "w")


def test_preferences_without_a_prompt_share_their_beginning():
    config = TextProcessorConfig()
    chosen, rejected, margin = preference({"chosen": "ab cd", "rejected": "ab xd"}, config, "w")
    assert (chosen, rejected, margin) == (("ab ", "cd"), ("ab ", "xd"), 0.0)
    other = [TALK[0], {"role": "assistant", "content": "b"}]
    chosen, rejected, _ = preference({"chosen": TALK, "rejected": other}, config, "w")
    assert chosen == (TALK[:1], TALK[1:]) and rejected == (TALK[:1], other[1:])
    assert preference(EXAMPLES["preference"], config, "w")[2] == 0.5
    assert "'chosen' is a string and 'rejected' is an array" in error(
        preference, {"chosen": "a", "rejected": TALK}, config, "w"
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "d:7: field 'messages' is empty; it must be a list of messages"),
        ("x", "d:7: field 'messages' is a string; it must be a list of messages"),
        ([{"content": "x"}], "d:7: message 0 of 'messages' has no 'role'"),
        ([{"role": "user", "content": 3}], "d:7: the content of message 0 of 'messages' is a number, not text"),
    ],
)
def test_messages_that_are_none(messages, message):
    assert error(conversation, {"messages": messages}, "messages", TextProcessorConfig(), "d:7") == message


def test_what_is_learnt_as_text_is_what_sft_takes():
    assert set(LEARNT_AS_TEXT) == set(OBJECTIVES["sft"].shapes) and set(AS_TEXT) | set(LEARNT_AS_TEXT) == set(SHAPES)


def test_an_objective_says_what_it_takes(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "t"}\n{"text": "u"}\n')
    files = FilesDatasetConfig(path=str(tmp_path / "data.jsonl"), seq_length=1, batch_size=1)
    dataset = DatasetConfig(type="files", cache_dir=str(tmp_path), files_dataset=files)
    settings = {"seed": 0, "vocab_size": 258, "shapes": ("preference", "kto"), "taker": "--objective=toy"}
    message = error(make_loader, dataset, BytesTokenizer(TokenizerConfig("bytes")), **settings)
    assert message.endswith(":1: a 'text' example does not go with --objective=toy: it takes preference, kto")
