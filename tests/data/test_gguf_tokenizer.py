"""A GGUF file's tokenizer gives the ids of the one it was made from: of Hugging Face's or SentencePiece."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from ringbpt.config import TokenizerConfig, UserError
from ringbpt.data.text import gguf_tokenizer
from ringbpt.data.text.tokenizers import Ends, Tokenizer, keep_tokenizer, make_tokenizer
from tests.gguf_files import tokenizer_keys, write_gguf

TEXTS = [
    "Hello, world! I'm you're WE'LL they'd",
    "  two  spaces and\ttabs\n\n\n  and lines \n",
    "12345 6.78e-9, 1st\n  2nd 0x1F 1,000,000",
    "x = foo(bar[1:20]) # 100%\n    return None\n\treturn\r\n\r\n",
    "naïve café — “quotes”… ½ ² Ⅷ ๑๒",
    "日本語 한국어 русский العربية",
    "🙂\U0001f469\u200d\U0001f467 e\u0301 \u00a0nbsp\u2003em",
    "<|end|> and <tool>x</tool> <s> </s>",
    "CamelCaseHTTPServer HTTPrequest iPhone http://x.y/z?q=1&r=2",
    *("", " ", "\n", " hi", "aaaaaaaaaaaa", "▁a ▁"),
]
CORPUS = [text for text in TEXTS if "<" not in text] * 20 + [Path(__file__).read_text()]

ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str) -> list[Any]:
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


# As the tokenizer.json of the models that these names stand for cut a text.
CUTS = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": split(ENGLISH + r"\p{N}{1,3}" + REST),
    "qwen2": split(ENGLISH + r"\p{N}" + REST),
    "tekken": split(TEKKEN),
}


def byte_level(pre: str) -> FastTokenizer:
    original = FastTokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    original.normalizer = normalizers.NFC() if pre == "qwen2" else None
    original.pre_tokenizer = pre_tokenizers.Sequence(CUTS[pre])
    original.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    original.train_from_iterator(CORPUS, trainer)
    original.add_tokens([AddedToken("<tool>", normalized=False)])
    return original


def keys_of(original: FastTokenizer, pre: str, **more: Any) -> dict[str, Any]:
    """As llama.cpp's converter writes them."""
    ids = original.get_vocab(with_added_tokens=True)
    added = original.get_added_tokens_decoder()
    kinds = [(3 if added[token].special else 4) if token in added else 1 for token in range(len(ids))]
    merges = [" ".join(pair) for pair in json.loads(original.to_str())["model"]["merges"]]
    return tokenizer_keys("gpt2", sorted(ids, key=ids.__getitem__), kinds, pre=pre, merges=merges, **more)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RINGBPT_CACHE", str(tmp_path / "cache"))


def make(tmp_path: Path, keys: dict[str, Any]) -> Tokenizer:
    return make_tokenizer(TokenizerConfig(str(write_gguf(tmp_path / "the-model.gguf", tokenizer=keys))))


@pytest.mark.parametrize("pre", CUTS)
def test_byte_level(pre, tmp_path):
    original = byte_level(pre)
    ours = make(tmp_path, keys_of(original, pre))
    assert ours.vocab_size == original.get_vocab_size()
    for text in TEXTS:
        ids = original.encode(text, add_special_tokens=False).ids
        assert ours.encode_places(text, special=True).ids.tolist() == ids, text
        assert ours.decode(ids, special=True) == original.decode(ids, skip_special_tokens=False)
        assert ours.decode(ours.encode(text)) == (original.normalizer.normalize_str(text) if pre == "qwen2" else text)
    assert ours.describe() == f"the-model/tokenizer.json, {ours.vocab_size} tokens"


def test_the_formats_own_default(tmp_path):
    keys = keys_of(byte_level("gpt-2"), "default")
    ours = make(tmp_path, keys)
    pieces = ours._tokenizer.pre_tokenizer.pre_tokenize_str("x 1234567+y, don't")
    assert [piece for piece, _ in pieces] == ["x", "Ġ", "123", "456", "7", "+", "y", ",", "Ġdon", "'", "t"]


def test_words_that_are_tokens_stay_whole_where_they_do_so(tmp_path):
    keys = {"tokens": ["a", "b", "c", "ab", "abc"], "kinds": [1] * 5, "merges": ["a b"]}
    ids = {pre: make(tmp_path, tokenizer_keys("gpt2", pre=pre, **keys)).encode("abc").tolist() for pre in CUTS}
    assert ids == {"gpt-2": [3, 2], "smollm": [3, 2], "llama-bpe": [4], "qwen2": [3, 2], "tekken": [4]}


def test_sentencepiece(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text for text in CORPUS if text.strip()), model_writer=model, vocab_size=700,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2, user_defined_symbols=["<tool>"],
    )  # fmt: skip
    original = sentencepiece.SentencePieceProcessor()
    original.LoadFromSerializedProto(model.getvalue())
    size = original.vocab_size()
    kinds = [
        2 if original.is_unknown(i) else 3 if original.is_control(i) else 6 if original.is_byte(i) else 1
        for i in range(size)
    ]
    pieces = [original.id_to_piece(i) for i in range(size)]
    kinds[pieces.index("<tool>")] = 4
    scores = [original.get_score(i) for i in range(size)]
    keys = tokenizer_keys("llama", pieces, kinds, scores=scores, bos_token_id=1, eos_token_id=2, unknown_token_id=0)
    ours = make(tmp_path, keys)
    for text in [*TEXTS, *(line for line in CORPUS[-1].splitlines() if line)]:
        if "<tool>" not in text:  # after one of these llama.cpp begins a text anew
            assert ours.encode(text).tolist() == original.encode(text), text
            assert ours.decode(ours.encode(text)) == original.decode(original.encode(text))
    assert ours.encode_prompt("the").tolist() == [1, *original.encode("the")]
    assert ours.encode_places("a<tool>b", True).ids.tolist() == [
        *original.encode("a"), pieces.index("<tool>"), *original.encode("b"),
    ]  # fmt: skip
    plain = make(tmp_path, keys | {"tokenizer.ggml.add_space_prefix": False})
    assert plain.encode(" the").tolist() == original.encode("the") != plain.encode("the").tolist()


def test_ends_and_template_are_the_files(tmp_path):
    original = byte_level("llama-bpe")
    names = {"bos_token_id": 0, "eos_token_id": 1, "chat_template": "{{ messages[0].content }}<|end|>"}

    def with_(**more: Any) -> Tokenizer:
        return make(tmp_path, keys_of(original, **({"pre": "llama-bpe"} | names | more)))

    ours = with_()
    assert ours.ends == Ends(0, 1, True, frozenset({1})) and ours.encode_prompt("a")[0] == 0
    assert ours.special_names == {"bos_token": "<s>", "eos_token": "<|end|>"}
    assert ours.special_ids == {0, 1} and ours.chat_template == names["chat_template"]
    assert with_(eot_token_id=5, eom_token_id=6).ends.in_order == [1, 5, 6]
    assert not with_(add_bos_token=False).ends.begins
    assert not with_(pre="smollm").ends.begins and with_(pre="smollm", add_bos_token=True).ends.begins
    none = with_(bos_token_id=None, eos_token_id=None, chat_template=None)
    assert none.ends == Ends(None, None, False) and none.chat_template is None  # and nothing is invented

    keep_tokenizer(ours, tmp_path / "kept")
    again = make_tokenizer(TokenizerConfig(str(tmp_path / "kept")))
    assert (again.ends, again.chat_template) == (ours.ends, ours.chat_template)
    assert {x.name for x in (tmp_path / "kept").iterdir()} == {
        "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
    }  # fmt: skip


REFUSED = {
    "none": ({"model": None}, "holds no tokenizer: give one as a Hugging Face folder"),
    "model": ({"model": "bert"}, "tokenizer.ggml.model='bert' is none of gpt2, llama"),
    "pre": ({"pre": "chatglm"}, "tokenizer.ggml.pre='chatglm' is none of default, gpt-2"),
    "no pre": ({"pre": None}, "tokenizer.ggml.pre is missing"),
    "twice": ({"tokens": ["a", "a"]}, "a token stands in tokenizer.ggml.tokens twice"),
    "kinds": ({"token_type": [1]}, "or not all have a token_type"),
    "no merges": ({"merges": None}, "incomplete or damaged: 'ggml.merges'"),
    "no pair": ({"merges": ["ab"]}, "tokenizer.ggml.merges has 'ab', which is no pair"),
    "merge of nothing": ({"merges": ["a c"]}, "tokenizer.ggml.merges: "),
    "no scores": ({"model": "llama"}, "incomplete or damaged: 'ggml.scores'"),
    "spaces": ({"model": "llama", "scores": [0.0] * 3, "remove_extra_whitespaces": True}, "=True is not supported"),
    "eos": ({"eos_token_id": 7}, "incomplete or damaged"),
}


@pytest.mark.parametrize(("edits", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_done_is_refused(edits, message, tmp_path):
    right = {"model": "gpt2", "tokens": ["a", "b", "ab"], "kinds": [1, 1, 1], "pre": "gpt-2", "merges": ["a b"]}
    edits = {"kinds" if key == "token_type" else key: value for key, value in edits.items()}
    assert make(tmp_path, tokenizer_keys(**right)).encode("ab").tolist() == [2]
    with pytest.raises(UserError) as caught:
        make(tmp_path, tokenizer_keys(**right | edits))
    text = str(caught.value)
    assert message in text and str(tmp_path / "the-model.gguf") in text and "\n" not in text


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RINGBPT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"the cache '.*': .*; give a folder with room, in \$RINGBPT_CACHE"):
        make(tmp_path, keys_of(byte_level("gpt-2"), "gpt-2"))


def test_it_is_unpacked_once(tmp_path, monkeypatch):
    keys = keys_of(byte_level("gpt-2"), "gpt-2")
    first = make(tmp_path, keys)
    monkeypatch.setattr(gguf_tokenizer, "cached", lambda folder, name, build, flag: folder / name)
    assert make(tmp_path, keys).fingerprint() == first.fingerprint()
