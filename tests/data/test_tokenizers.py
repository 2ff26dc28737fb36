"""Tokenizers: text survives the way there and back, and a file that is none is refused in one line."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ringbpt.config import TokenizerConfig, UserError
from ringbpt.data.text.tokenizers import Ends, Tokenizer, _find_ends, make_tokenizer

CORPUS = ["the ring carries the keys and the values", "a block of queries stays where it is"] * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A SentencePiece model and a Hugging Face BPE, trained here."""
    import sentencepiece
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    path = tmp_path_factory.mktemp("tokenizers")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",  # as LLaMA's: a newline stays one
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (path / "sp.model").write_bytes(model.getvalue())
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>", "<end>"]
    fast.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    fast.enable_truncation(4)
    (path / "hf").mkdir()
    fast.save(str(path / "hf" / "tokenizer.json"))
    return path


def make(path: Path | str) -> Tokenizer:
    return make_tokenizer(TokenizerConfig(str(path)))


def error(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        make(path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("--tokenizer.vocab_file")
    return str(caught.value)


@pytest.mark.parametrize("name", ["bytes", "sp.model", "hf", "hf/tokenizer.json"])
def test_text_comes_back(folder, name):
    tokenizer = make("bytes" if name == "bytes" else folder / name)
    text = "the keys stay\nwhere <s> é\U0001f600 </s> it is"
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1 and len(ids) > 4
    assert ids.min() >= 0 and ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == text
    assert tokenizer.ends.bos not in ids and tokenizer.ends.eos not in ids  # <s> in a text is text
    assert len(tokenizer.encode("")) == 0 and tokenizer.encode("").dtype == np.int32
    again = make_tokenizer(tokenizer.config)
    assert again.fingerprint() == tokenizer.fingerprint() and tokenizer.describe()


def test_bytes_are_their_ids():
    tokenizer = make("bytes")
    assert tokenizer.encode("aé\0").tolist() == [97, 0xC3, 0xA9, 0]
    assert (tokenizer.vocab_size, tokenizer.ends.bos, tokenizer.ends.eos) == (258, 256, 257)
    assert tokenizer.decode([256, 97, 0xC3, 257]) == "a�"


def test_special_tokens(folder, tmp_path):
    assert (make(folder / "sp.model").ends.bos, make(folder / "sp.model").ends.eos) == (1, 2)
    assert (make(folder / "hf").ends.bos, make(folder / "hf").ends.eos) == (1, 2)
    content = (folder / "hf" / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(content)
    settings = {"bos_token": None, "eos_token": {"content": "<end>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    told = make(tmp_path)
    assert (told.ends.bos, told.ends.eos) == (None, 3)
    assert told.fingerprint() != make(folder / "hf").fingerprint()
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json:1: malformed JSON"):
        make(tmp_path)


def test_a_folder_with_a_sentencepiece_model(folder, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((folder / "sp.model").read_bytes())
    assert make(tmp_path).fingerprint() == make(folder / "sp.model").fingerprint()


def test_fingerprints_differ(folder):
    names = ["bytes", folder / "sp.model", folder / "hf"]
    assert len({make(name).fingerprint() for name in names}) == 3


def test_what_is_missing(folder, tmp_path):
    assert error("").startswith("--tokenizer.vocab_file is empty: ") and "or 'bytes'" in error("")
    assert f"the nearest name is '{folder}/sp.model'" in error(folder / "spm.model")
    assert "neither tokenizer.json nor tokenizer.model" in error(tmp_path)
    assert "is a pipe or a device" in error("/dev/null")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer.pt"])
def test_pickles_are_refused_under_any_name(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps({"a": 1}))
    assert "is a pickle or a torch file" in error(tmp_path / name)
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}))
    assert "is a pickle or a torch file" in error(tmp_path / name)
    (tmp_path / name).write_bytes(pickle.dumps({"a": 1}, protocol=0))
    assert "is no tokenizer that is known here" in error(tmp_path / name)


def test_corrupt_files(folder, tmp_path):
    model = (folder / "sp.model").read_bytes()
    for content in (model[: len(model) // 2], b"\n", b"\n\n\n\n"):
        (tmp_path / "t.model").write_bytes(content)
        assert "SentencePiece model is" in error(tmp_path / "t.model")
    fast = (folder / "hf" / "tokenizer.json").read_bytes()
    for content in (fast[: len(fast) // 2], b"{}", b'{"model": 3}'):
        (tmp_path / "t.json").write_bytes(content)
        assert "is no tokenizer.json" in error(tmp_path / "t.json")
    for content in (b"", b"IQ== 0\nIg== 1\n"):
        (tmp_path / "other").write_bytes(content)
        assert "is no tokenizer that is known here" in error(tmp_path / "other")


def test_a_config_json_beside_a_tokenizer_may_be_anybodys_but_not_a_generation_config(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    (tmp_path / "config.json").write_text("[1, 2]")
    assert _find_ends(file, 1, 2, True) == Ends(1, 2)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert _find_ends(file, 1, 2, True).stop == {2, 3, 4}
    (tmp_path / "generation_config.json").write_text("[3")
    with pytest.raises(UserError, match=r"generation_config\.json"):
        _find_ends(file, 1, 2, True)
