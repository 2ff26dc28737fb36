"""Conversations: the text and the masks are those of transformers, and nothing is tokenised apart."""

import datetime
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from ringbpt.config import TextProcessorConfig, TokenizerConfig, UserError
from ringbpt.data.text.chat import CHATML, ChatTemplate, find_template
from ringbpt.data.text.template import TODAY
from ringbpt.data.text.text_processor import TextProcessor
from ringbpt.data.text.tokenizers import BytesTokenizer, Tokenizer, make_tokenizer

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
CHAT = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3+3? "},
    {"role": "assistant", "content": "Six,\nI think."},
]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def templates() -> list[Path]:
    """Those of TRL's wheel, which the test extra brings without its dependencies."""
    found = importlib.util.find_spec("trl")
    assert found and found.origin, "make test installs trl without its dependencies: pip install --no-deps trl"
    return sorted((Path(found.origin).parent / "chat_templates").glob("*.jinja"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    corpus = [message["content"] for message in CHAT] * 9 + ["user\nassistant\n:\nÉcole \U0001f600"] * 9
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(corpus, trainer)
    folder = tmp_path_factory.mktemp("chat")
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(NAMES | {"chat_template": CHATML}))
    return make_tokenizer(TokenizerConfig(str(folder)))


@pytest.fixture
def theirs(monkeypatch):
    """transformers' own rendering, on the day that ours always is."""
    from transformers.utils import chat_template_utils

    class Today(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return TODAY

    monkeypatch.setattr(chat_template_utils, "datetime", Today)
    return chat_template_utils.render_jinja_template


def characters(spans) -> list[int]:
    return [place for begin, end in spans for place in range(begin, end)]


def parts(chat):
    return [message | {"content": [{"type": "text", "text": message["content"]}]} for message in chat]


def test_all_templates_of_trl_render_and_mask_as_in_transformers(theirs):
    seen = {True: 0, False: 0}
    for path in templates():
        template = ChatTemplate(path.read_text(), NAMES, "x")
        ((text, spans),) = template.learnt(CHAT, [1, 3], None, "data.jsonl:1")
        chat = parts(CHAT) if template._parts else CHAT
        marks = {"return_assistant_tokens_mask": template.marked}
        texts, marked = theirs([chat], chat_template=path.read_text(), **marks, **NAMES)
        assert text == texts[0], path.name
        if template.marked:
            assert characters(spans) == characters(marked[0]), path.name
        answers = [text[begin:end] for begin, end in spans[:2]]
        for answer, said in zip(answers, (CHAT[1]["content"], CHAT[3]["content"]), strict=True):
            assert said in answer and "What" not in answer and "3+3" not in answer, path.name
        seen[template.marked] += 1
    assert seen == {True: 34, False: 38}


def test_tokens_and_masks_are_those_of_transformers(tokenizer):
    from transformers import PreTrainedTokenizerFast

    folder = Path(tokenizer.config.vocab_file)
    fast = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), chat_template=CHATML, **NAMES)
    want = fast.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    got = process(tokenizer, {"messages": CHAT})
    assert got.token.tolist() == want["input_ids"] and got.mask.tolist() == want["assistant_masks"]
    assert got.loss_bytes == sum(len(f"{CHAT[n]['content']}<|im_end|>".encode()) for n in (1, 3))


def process(tokenizer: Tokenizer, example, shape: str = "messages", **config):
    return TextProcessor(TextProcessorConfig(**config), tokenizer, "train_dataset", shape)(example, "data.jsonl:7")


def shown(tokenizer: Tokenizer, document) -> tuple[str, str]:
    """What is learnt, and what is not, as text."""
    learnt = document.mask.astype(bool)
    return tokenizer.decode(document.token[learnt]), tokenizer.decode(document.token[~learnt])


LEARNT = {
    "turn": "It is 4.<|im_end|>Six,\nI think.<|im_end|>",
    "none": "It is 4.Six,\nI think.",
    "last": "It is 4.Six,\nI think.<|im_end|>",
    "all": "<|im_end|>It is 4.<|im_end|><|im_end|>Six,\nI think.<|im_end|>",
}


@pytest.mark.parametrize("template", [CHATML, PLAIN])
@pytest.mark.parametrize("train_on_eos", LEARNT)
def test_the_end_of_a_turn_is_learnt_as_asked(tokenizer, template, train_on_eos):
    document = process(tokenizer, {"messages": CHAT}, train_on_eos=train_on_eos, chat_template=template)
    ids = tokenizer._tokenizer.decode(document.token[document.mask > 0].tolist(), skip_special_tokens=False)
    assert ids == LEARNT[train_on_eos]


@pytest.mark.parametrize("template", [CHATML, PLAIN])
def test_roles_to_train(tokenizer, template):
    document = process(
        tokenizer, {"messages": CHAT}, roles_to_train="user,assistant", train_on_eos="none", chat_template=template
    )
    assert shown(tokenizer, document)[0] == "What is 2+2?It is 4.And 3+3? Six,\nI think."
    document = process(tokenizer, {"messages": CHAT}, roles_to_train="user", chat_template=template)
    learnt = tokenizer._tokenizer.decode(document.token[document.mask > 0].tolist(), skip_special_tokens=False)
    assert learnt == "What is 2+2?<|im_end|>And 3+3? <|im_end|>"


def test_a_template_that_drops_what_was_thought(tokenizer):
    """Each turn is learnt once, in the text that still has all of it; one text where nothing was dropped."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if not loop.last %}{{ m.content.split('</think>')[-1] }}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    )
    processor = TextProcessor(TextProcessorConfig(chat_template=template), tokenizer, "train_dataset", "messages")
    (whole,) = processor.documents({"messages": CHAT}, "data.jsonl:7")
    learnt, rest = shown(tokenizer, whole)
    assert learnt == "It is 4.Six,\nI think." and "And 3+3? " in rest
    thought = [*CHAT[:1], {"role": "assistant", "content": "<think>a</think>b"}, *CHAT[2:]]
    documents = processor.documents({"messages": thought}, "data.jsonl:7")
    assert [shown(tokenizer, document)[0] for document in documents] == ["<think>a</think>b", "Six,\nI think."]
    pair = {"prompt": CHAT[:1], "chosen": thought[1:], "rejected": CHAT[1:]}
    processor = TextProcessor(TextProcessorConfig(chat_template=template), tokenizer, "train_dataset", "preference")
    with pytest.raises(UserError, match=r"data.jsonl:7: the chat template drops what earlier turns.*have thought"):
        processor.documents(pair, "data.jsonl:7")


def test_sharegpt_tools_and_nulls(tokenizer):
    turns = [{"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": "It is 4."}]
    same = process(tokenizer, {"messages": CHAT[:2]})
    got = process(tokenizer, {"conversations": turns}, "sharegpt")
    assert got.token.tolist() == same.token.tolist() and got.mask.tolist() == same.mask.tolist()
    system = process(tokenizer, {"conversations": turns, "system": "Be brief."}, "sharegpt")
    assert "system\nBe brief." in tokenizer.decode(system.token)
    nulls = [message | {"tool_calls": None} for message in CHAT]
    assert (
        process(tokenizer, {"messages": nulls}).token.tolist() == process(tokenizer, {"messages": CHAT}).token.tolist()
    )
    template = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tools = [{"name": "añadir"}]
    text = tokenizer.decode(process(tokenizer, {"messages": CHAT, "tools": tools}, chat_template=template).token)
    assert text.startswith('[{"name": "añadir"}]What')


def test_a_prompt_and_its_completion_are_one_text(tokenizer):
    """The seam's token may stand for both: it is learnt, and the ids are those of the whole text."""
    example = {"prompt": "It", "completion": " is 4."}
    document = process(tokenizer, example, "prompt_completion", add_bos_token=False)
    whole = [*tokenizer.encode("It is 4.").tolist(), tokenizer.ends.eos]
    assert document.token.tolist() == whole and document.mask[-1] == 1
    chat = process(tokenizer, example, "prompt_completion", apply_chat_template=True)
    assert shown(tokenizer, chat) == (" is 4.", "user\nIt\nassistant\n\n")
    told = process(tokenizer, example, "prompt_completion", input_template="User: {}\\nAssistant:")
    assert tokenizer.decode(told.token) == "User: It\nAssistant: is 4."
    listed = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    assert shown(tokenizer, process(tokenizer, listed, "prompt_completion"))[0] == "Six,\nI think."


def test_preferences_are_two_documents(tokenizer):
    processor = TextProcessor(TextProcessorConfig(), tokenizer, "train_dataset", "preference")
    chosen, rejected = processor.documents({"chosen": CHAT, "rejected": [*CHAT[:3], CHAT[1]]}, "data.jsonl:7")
    assert shown(tokenizer, chosen)[0] == "Six,\nI think." and shown(tokenizer, rejected)[0] == "It is 4."


def test_bytes_and_sentencepiece_take_bos_and_eos_by_the_flags():
    tokenizer = BytesTokenizer(TokenizerConfig("bytes"))
    document = process(tokenizer, {"messages": CHAT[:2]}, chat_template="chatml")
    assert document.token[0] == 256 and document.token[-1] == 257 and document.mask[-1] == 1
    assert shown(tokenizer, document)[0] == "It is 4.<|im_end|>"


def test_offsets_of_every_tokenizer(tokenizer, tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the keys é stay " * 5] * 20),
        model_prefix=str(tmp_path / "sp"),
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
    )
    pieces = make_tokenizer(TokenizerConfig(str(tmp_path / "sp.model")))
    text = "the é keys \U0001f600 stay"
    for some in (tokenizer, pieces, BytesTokenizer(TokenizerConfig("bytes"))):
        places = some.encode_places(text, special=False)
        np.testing.assert_array_equal(places.ids, some.encode(text))
        assert places.begin[0] == 0 and places.end[-1] == len(text) and (np.diff(places.begin) >= 0).all()
        inside = (places.begin < text.index("é") + 1) & (places.end > text.index("é"))
        assert "é" in some.decode(places.ids[inside])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "chat_template is empty, and the tokenizer has no template for conversations: --t.chat_template=chatml"),
        ("chatlm.jinja", "--t.chat_template='chatlm.jinja' is no .jinja file that can be read"),
    ],
)
def test_templates_that_are_not_there(text, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        find_template(text, None, "t.chat_template")


def test_templates_that_fail():
    with pytest.raises(UserError, match=r"--t\.chat_template: line 2: .*unknown tag"):
        ChatTemplate("a\n{% whatever %}", {}, "t.chat_template")
    refusing = ChatTemplate("{{ raise_exception('roles must\nalternate') }}", {}, "t.chat_template")
    with pytest.raises(UserError, match=r"f:1: the chat template refuses the conversation: roles must alternate"):
        refusing.learnt(CHAT, [1], None, "f:1")
    escaping = ChatTemplate("{{ messages.__class__.__mro__ }}", {}, "t.chat_template")
    with pytest.raises(UserError, match="refuses"):
        escaping.learnt(CHAT, [1], None, "f:1")
    with pytest.raises(UserError, match="noncharacter"):
        ChatTemplate(PLAIN, {}, "t").learnt([{"role": "user", "content": "\ufdd0"}], [], None, "f:1")
