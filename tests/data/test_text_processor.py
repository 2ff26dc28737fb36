"""The `fields` language: which text, which special tokens, and what takes loss."""

import numpy as np
import pytest

from ringbpt.config import TextProcessorConfig, TokenizerConfig, UserError
from ringbpt.data.text.text_processor import Document, TextProcessor
from ringbpt.data.text.tokenizers import BytesTokenizer, Ends

BOS, EOS = 256, 257
TOKENIZER = BytesTokenizer(TokenizerConfig("bytes"))
EXAMPLE = {"q": "ab", "a": "c", "é": "é", "n": None, "i": 3, "l": ["x"], "e": "", "how": "[q],a", "bad": "half \ud83d"}


def process(fields: str = "", example=EXAMPLE, **config) -> Document:
    return TextProcessor(TextProcessorConfig(fields=fields, **config), TOKENIZER)(example, "data.jsonl:7")


def error(fields: str = "", example=EXAMPLE, **config) -> str:
    with pytest.raises(UserError) as caught:
        process(fields, example, **config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shown(document: Document) -> str:
    """Tokens without loss in lower case, with loss in upper case, < bos and > eos."""
    names = {BOS: ("<", "{"), EOS: (">", "}")}
    pairs = zip(document.token.tolist(), document.mask.tolist(), strict=True)
    return "".join(names[t][m] if t in names else chr(t).upper() if m else chr(t) for t, m in pairs)


@pytest.mark.parametrize(
    ("fields", "config", "expected"),
    [
        ("q", {}, "<AB}"),
        ("q", {"add_bos_token": False, "add_eos_token": False}, "AB"),
        ("q+a", {}, "<AB C}"),
        ("q+a", {"subfield_separator": "-"}, "<AB-C}"),
        ("[q+a],a", {}, "<ab cC}"),
        (" [q] , a ", {}, "<abC}"),
        ("[q],<|eos|>,a", {"add_eos_token": False}, "<ab}C"),
        ("<|bos|>,[<|eos|>],a", {"add_bos_token": False}, "{>C}"),
        ("[q],<|120|>,[<|121|>]", {}, "<abXy}"),
        ("[q],a", {"prepend_text": "x "}, "<x abC}"),
        ("<|bos|>,q,a", {"prepend_text": "x", "add_bos_token": False}, "{XABC}"),
        ("", {"fields_from_example": "how"}, "<abC}"),
        ("[e],a", {}, "<C}"),  # an empty prompt is no mistake
    ],
)
def test_fields(fields, config, expected):
    document = process(fields, **config)
    assert shown(document) == expected
    assert document.token.dtype == np.int32 and document.mask.dtype == np.uint8


def test_loss_bytes_are_those_of_the_text_that_takes_loss():
    assert process("q+é").loss_bytes == len("ab é".encode())
    assert process("[q],é").loss_bytes == 2
    assert process("[q]").loss_bytes == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("n", "data.jsonl:7: field 'n' is null; it must be a string"),
        ("q+i", "data.jsonl:7: field 'i' is a number; it must be a string"),
        ("l", "data.jsonl:7: field 'l' is an array; it must be a string"),
        ("e", "data.jsonl:7: the text is empty; leave the example out"),
        ("e+e,<|eos|>", "data.jsonl:7: the text is empty; leave the example out"),
        ("hwo", "data.jsonl:7: no field 'hwo' (--train_dataset.text_processor.fields); the nearest is 'how'"),
    ],
)
def test_examples_that_have_no_text(fields, message):
    assert error(fields) == message


def test_half_a_surrogate_pair():
    assert "field 'bad' has half of a surrogate pair (\\ud83d) at character 5" in error("bad")


@pytest.mark.parametrize("fields", ["", " ", "q,,a", "q+", "[]", "<|pad|>", "<|0x5|>", "<|9999999999|>"])
def test_fields_that_cannot_be_read(fields):
    assert error(fields).startswith("--train_dataset.text_processor.fields=")


def test_fields_of_the_example_that_cannot_be_read():
    assert error(example={"f": "q,,", "q": "x"}, fields_from_example="f").startswith("data.jsonl:7: fields 'q,,'")
    assert "no field 'f' (--train_dataset.text_processor.fields_from_example)" in error(fields_from_example="f")


def test_a_tokenizer_without_bos_and_eos():
    tokenizer = BytesTokenizer(TokenizerConfig("bytes"))
    tokenizer.ends = Ends(None, None)
    with pytest.raises(UserError, match=r"add_bos_token=True: .* no bos token; set it to False"):
        TextProcessor(TextProcessorConfig(fields="q"), tokenizer)
    with pytest.raises(UserError, match=r"fields='q,<\|eos\|>': .* no eos token; leave it out"):
        TextProcessor(TextProcessorConfig(fields="q,<|eos|>", add_bos_token=False, add_eos_token=False), tokenizer)
