"""Text to token ids and back: bytes, SentencePiece models and Hugging Face's tokenizer.json, behind one interface.

A GGUF file's tokenizer is unpacked into the latter by gguf_tokenizer.py.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ringbpt.config import TokenizerConfig, UserError, printable
from ringbpt.config.fields import LARGEST_VOCABULARY
from ringbpt.config.foreign import quiet, read_file, read_json, refusing, shown, user_path
from ringbpt.config.gguf import is_gguf
from ringbpt.data.reading.files import nearest_path
from ringbpt.data.reading.wire import fields_of
from ringbpt.data.text.gguf_tokenizer import unpack_tokenizer

FLAG = "--tokenizer.vocab_file"
TOKENIZER_BYTES = 1 << 27  # of any of its files; 250,000 tokens with their merges have 35 million
TEMPLATE_BYTES = 1 << 20
TRIAL = "A text, 1 word\n"
SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")  # beside a tokenizer.json; the last one's word counts
# What a tokenizer consists of, beside a model's weights.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
CHOICES = "give a SentencePiece .model file, a Hugging Face folder or tokenizer.json, a .gguf file, or 'bytes'"
# Names by which a tokenizer.json without a tokenizer_config.json beside it is asked for its special tokens.
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "<|endoftext|>", "[BOS]")
EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "<|im_end|>", "[EOS]")


class Places(NamedTuple):
    """ids int32 [tokens], and where in the text each token's characters begin and end, int64 [tokens]."""

    ids: np.ndarray
    begin: np.ndarray
    end: np.ndarray


class Ends(NamedTuple):
    """Which tokens begin and end a text. bos, eos: None where the tokenizer's files declare none.

    begins: whether a text begins with bos, a prompt and a document of training alike: as the tokenizer puts it there
    itself. others: further ones after which a generated text is over, those that end a turn among them.
    """

    bos: int | None
    eos: int | None
    begins: bool = True
    others: frozenset[int] = frozenset()

    @property
    def stop(self) -> frozenset[int]:
        """All tokens after which a generated text is over."""
        return self.others if self.eos is None else self.others | {self.eos}

    @property
    def in_order(self) -> int | list[int] | None:
        """The same as a generation_config.json has them: eos first, a list where there are several."""
        found = sorted(self.stop, key=lambda token: (token != self.eos, token))
        return found if len(found) > 1 else found[0] if found else None


class Tokenizer(Protocol):
    """Text to ids. `encode` adds no special token and reads none out of the text: the text_processor places them by id.

    config: makes the same tokenizer again in a worker process. vocab_size: one more than the largest id. ends: which
    tokens begin and end a text. special_names: bos_token, eos_token, ... as a chat template writes them; empty where no
    special token can be written as text. special_ids: of those. chat_template: its own, if it has one.
    """

    config: TokenizerConfig
    vocab_size: int
    ends: Ends
    special_names: dict[str, str] = {}  # noqa: RUF012  (never written)
    special_ids: frozenset[int] = frozenset()
    chat_template: str | None = None

    def encode(self, text: str) -> np.ndarray:
        """int32 [tokens]."""

    def encode_prompt(self, text: str) -> np.ndarray:
        """int32 [tokens], the only ones with special tokens: as the model's own tokenizer begins a text."""

    def encode_places(self, text: str, special: bool) -> Places:
        """The tokens and which characters each stands for. special: read special tokens out of the text."""

    def decode(self, ids: Sequence[int] | np.ndarray, special: bool = False) -> str:
        """The text, in which special tokens leave no trace, or (special) stand by their names."""

    def name(self, token: int) -> str:
        """What a special token is called; empty for one that stands for text."""
        return ""

    def fingerprint(self) -> str:
        """Hex digest of what decides the ids."""

    def describe(self) -> str:
        """One short phrase for the log."""


def make_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that `vocab_file` names; what a file is, is read from its first bytes and not from its name.

    Raises UserError for a file that is missing, corrupt, or a pickle under any name.
    """
    if not config.vocab_file:
        raise UserError(f"{FLAG} is empty: {CHOICES}")
    if config.vocab_file == "bytes":
        return BytesTokenizer(config)
    path = _tokenizer_file(user_path(config.vocab_file))
    if is_gguf(path):
        path = unpack_tokenizer(path)
    content = _read(path)
    if content.lstrip()[:1] == b"{":
        return HuggingFaceTokenizer(config, path, content)
    if content[:1] == b"\n":  # the tag of the first field of a serialised SentencePiece ModelProto
        return SentencePieceTokenizer(config, path, content)
    if content[:1] == b"\x80" or content[:4] == b"PK\x03\x04":
        raise UserError(f"{FLAG}={str(path)!r} is a pickle or a torch file, which could run code: {CHOICES}")
    raise UserError(f"{FLAG}={str(path)!r} is no tokenizer that is known here ({len(content)} bytes): {CHOICES}")


class PlainTokenizer(Tokenizer):
    """A tokenizer without special tokens that could be written as text; a prompt begins with bos."""

    def encode_prompt(self, text: str) -> np.ndarray:
        first = [self.ends.bos] if self.ends.begins and self.ends.bos is not None else []
        return np.array([*first, *self.encode(text)], np.int32)


class BytesTokenizer(PlainTokenizer):
    """Ids 0..255 are the UTF-8 bytes, 256 is bos, 257 is eos."""

    vocab_size = 258
    ends = Ends(256, 257)

    def __init__(self, config: TokenizerConfig):
        self.config = config

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def encode_places(self, text: str, special: bool) -> Places:
        ids = self.encode(text)
        begin = np.cumsum((ids & 0xC0) != 0x80) - 1  # bytes 10xxxxxx go on with a character
        return Places(ids, begin, begin + 1)

    def decode(self, ids: Sequence[int] | np.ndarray, special: bool = False) -> str:
        """bos and eos have no names and leave no trace; bytes that are no UTF-8 become U+FFFD."""
        return bytes(int(token) for token in ids if token < 256).decode("utf-8", errors="replace")

    def name(self, token: int) -> str:
        return {self.ends.bos: "<bos>", self.ends.eos: "<eos>"}.get(token, "")

    def fingerprint(self) -> str:
        return "bytes"

    def describe(self) -> str:
        return "bytes"


class SentencePieceTokenizer(PlainTokenizer):
    """A SentencePiece model, as the original LLaMA's tokenizer.model."""

    def __init__(self, config: TokenizerConfig, path: Path, content: bytes):
        from sentencepiece import SentencePieceProcessor

        self.config = config
        self.path, self._digest = path, hashlib.sha256(content).hexdigest()
        self._processor: Any = SentencePieceProcessor()
        try:
            with quiet():
                self._processor.LoadFromSerializedProto(content)
            self.vocab_size = self._processor.vocab_size()
        except Exception:  # a RuntimeError, or what else the library's C++ has met
            raise UserError(f"{FLAG}={str(path)!r}: the SentencePiece model is corrupt; copy it again") from None
        if not self.vocab_size:
            raise UserError(f"{FLAG}={str(path)!r}: the SentencePiece model is empty; copy it again")
        bos, eos = self._processor.bos_id(), self._processor.eos_id()
        settings = _settings(path)
        self.chat_template = _own_template(path, settings)
        begins = settings.get("add_bos_token") is not False
        self.ends = _find_ends(path, bos if bos >= 0 else None, eos if eos >= 0 else None, begins)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._processor.encode(text), np.int32)

    def encode_places(self, text: str, special: bool) -> Places:
        message = self._processor.encode(text, out_type="serialized_proto")
        pieces = [dict(fields_of(piece)) for field, piece in fields_of(message) if field == 2]
        # SentencePiece{2: id, 4: first byte, 5: byte after the last}, zeros left out
        numbers = np.array([[piece.get(key, 0) for key in (2, 4, 5)] for piece in pieces], np.int64).reshape(-1, 3)
        starts = (np.frombuffer(text.encode("utf-8"), np.uint8) & 0xC0) != 0x80
        characters_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(starts)])
        begin, end = characters_before[numbers[:, 1:]].T
        return Places(numbers[:, 0].astype(np.int32), begin, end)

    def decode(self, ids: Sequence[int] | np.ndarray, special: bool = False) -> str:
        return self._processor.decode([int(token) for token in ids])

    def name(self, token: int) -> str:
        special = self._processor.is_control(token) or self._processor.is_unknown(token)
        return self._processor.id_to_piece(token) if special else ""

    def fingerprint(self) -> str:
        return f"sentencepiece {self._digest}"

    def describe(self) -> str:
        return printable(f"SentencePiece {self.path.name}, {self.vocab_size:,} pieces")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json; bos and eos as the tokenizer_config.json or special_tokens_map.json beside it name them."""

    def __init__(self, config: TokenizerConfig, path: Path, content: bytes):
        from tokenizers import Tokenizer as FastTokenizer

        self.config = config
        self.path, self._digest = path, hashlib.sha256(content).hexdigest()
        with refusing(f"{FLAG}={str(path)!r} is no tokenizer.json"), quiet():
            self._tokenizer = FastTokenizer.from_buffer(content)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._tokenizer.encode(TRIAL)  # what it trips over, it does at the first text
        settings = _settings(path)
        with refusing(f"{FLAG}={str(path)!r}"), quiet():
            _declare(self._tokenizer, settings, path.parent / "tokenizer_config.json")
            ids = self._tokenizer.get_vocab(with_added_tokens=True)
        if not ids:
            raise UserError(f"{FLAG}={str(path)!r}: the vocabulary is empty; copy it again")
        self.vocab_size = max(ids.values()) + 1
        if self.vocab_size > LARGEST_VOCABULARY:
            what = f"a token has the id {self.vocab_size - 1}, and none has more than {LARGEST_VOCABULARY - 1}"
            raise UserError(f"{FLAG}={str(path)!r}: {what}; copy it again")
        bos = _special_token(settings, "bos_token", BOS_NAMES, ids, path)
        eos = _special_token(settings, "eos_token", EOS_NAMES, ids, path)
        self.ends = _find_ends(path, bos, eos, bos is not None and bos in self._encode("", True, True).ids)
        named = {"bos_token": bos, "eos_token": eos}
        names = {token: name for name, token in ids.items()}
        self.special_names = {key: names[token] for key, token in named.items() if token is not None}
        for key in ("unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
            if (name := _named(settings, key)) is not None:
                self.special_names[key] = name
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, what in added.items() if what.special)
        self.chat_template = _own_template(path, settings)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._encode(text, False, False).ids, np.int32)

    def encode_prompt(self, text: str) -> np.ndarray:
        return np.array(self._encode(text, True, True).ids, np.int32)

    def encode_places(self, text: str, special: bool) -> Places:
        found = self._encode(text, special, False)
        offsets = np.array(found.offsets, np.int64).reshape(-1, 2)
        return Places(np.array(found.ids, np.int32), offsets[:, 0], offsets[:, 1])

    def _encode(self, text: str, special: bool, framed: bool) -> Any:
        """framed: with the tokens that tokenizer.json puts around a text."""
        self._tokenizer.encode_special_tokens = not special  # as text, as "<|endoftext|>" inside a document is
        with refusing(f"{FLAG}={str(self.path)!r} fails at a text"):
            return self._tokenizer.encode(text, add_special_tokens=framed)

    def decode(self, ids: Sequence[int] | np.ndarray, special: bool = False) -> str:
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=not special)

    def name(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or "" if token in self.special_ids else ""

    def fingerprint(self) -> str:
        template = hashlib.sha256((self.chat_template or "").encode()).hexdigest()
        return f"tokenizer.json {self._digest} {sorted(self.special_names.items())} template {template}"

    def to_json(self) -> str:
        """A tokenizer.json, with the tokens that only the settings beside it declared."""
        return self._tokenizer.to_str()

    def describe(self) -> str:
        return printable(f"{self.path.parent.name}/{self.path.name}, {self.vocab_size:,} tokens")


def reads_as(tokenizer: Tokenizer, token: int) -> str:
    """One token as it reads behind another, with the space that it may begin with; a special one by its name.

    A part of a character reads as U+FFFD.
    """
    if name := tokenizer.name(token):
        return name
    once, twice = (tokenizer.decode([token] * count, special=True) for count in (1, 2))
    return twice[len(once) :]


def describe_ends(tokenizer: Tokenizer) -> str:
    """What begins and what ends a text, for people: names and ids."""
    ends = tokenizer.ends

    def named(token: int) -> str:
        name = reads_as(tokenizer, token) if token < tokenizer.vocab_size else ""
        return f"{name} ({token})".strip()

    begin = f"begins with {named(ends.bos)}" if ends.begins and ends.bos is not None else "begins with no bos"
    return printable(f"a text {begin}, ends with {', '.join(map(named, sorted(ends.stop))) or 'nothing'}")


def keep_tokenizer(tokenizer: Tokenizer, folder: Path, begins: bool = True) -> None:
    """Writes what makes the same tokenizer again, with its chat template and its ends, for us and for transformers.

    begins: whether texts were trained with the bos that the tokenizer puts before them. Nothing is written of one that
    has no files. Raises OSError.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer | SentencePieceTokenizer):
        return
    ends, source = tokenizer.ends, tokenizer.path
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source.parent / name).is_file() and not (folder / name).exists():
            (folder / name).write_bytes((source.parent / name).read_bytes())
    settings = _settings(source)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        whole = json.loads(tokenizer.to_json())
        if ends.begins and not begins:
            whole["post_processor"] = None
        (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | tokenizer.special_names | settings
    else:
        (folder / "tokenizer.model").write_bytes(source.read_bytes())
        settings = settings | ({} if begins else {"add_bos_token": False})
    if settings:
        settings.pop("chat_template", None)  # it has a file of its own
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    if tokenizer.chat_template:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    beside = source.parent / "generation_config.json"
    said = (read_json(beside) if beside.is_file() else {}) | {"bos_token_id": ends.bos, "eos_token_id": ends.in_order}
    (folder / "generation_config.json").write_text(json.dumps(said, indent=2) + "\n")


def _tokenizer_file(path: Path) -> Path:
    """The file to read: the path, or the one that a folder holds."""
    if os.path.isdir(path):
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                return path / name
        raise UserError(f"{FLAG}={str(path)!r}: the folder has neither tokenizer.json nor tokenizer.model: {CHOICES}")
    if not os.path.exists(path):
        raise UserError(f"{FLAG}={str(path)!r} does not exist{nearest_path(path)}: {CHOICES}")
    if not path.is_file():
        raise UserError(f"{FLAG}={str(path)!r} is a pipe or a device: {CHOICES}")
    return path


def _read(path: Path) -> bytes:
    return read_file(path, TOKENIZER_BYTES, f"{FLAG}={str(path)!r}")


def _find_ends(path: Path, bos: int | None, eos: int | None, begins: bool) -> Ends:
    """bos, eos, and what eos_token_id is in the files of a model beside the tokenizer: one token, several, or none."""
    others: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        # A config.json may be anybody's: who reads the model says what is wrong with its own.
        with suppress(UserError) if name == "config.json" else nullcontext():
            found = read_json(path.parent / name).get("eos_token_id") if (path.parent / name).is_file() else None
            for token in found if isinstance(found, list) else [found]:
                if token is None:
                    continue
                if type(token) is not int or not 0 <= token < LARGEST_VOCABULARY:
                    raise UserError(
                        f"{path.parent / name}: eos_token_id={shown(found)} is no token, nor a list of some"
                    )
                others.add(token)
    return Ends(bos, eos, begins, frozenset(others))


def _settings(path: Path) -> dict[str, Any]:
    """What the files beside a tokenizer say."""
    found: dict[str, Any] = {}
    for beside in SETTINGS:
        file = path.parent / beside
        if file.is_file():
            found |= read_json(file)
    return found


def _named(settings: dict[str, Any], key: str) -> str | None:
    token = settings.get(key)
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _declare(tokenizer: Any, settings: dict[str, Any], where: Path) -> None:
    """Adds the tokens that only the settings declare, at the ids they have there, as transformers does.

    Raises UserError for an id that the tokenizer cannot give them.
    """
    from tokenizers import AddedToken

    declared = settings.get("added_tokens_decoder") or {}
    known = tokenizer.get_vocab(with_added_tokens=True)
    flags = ("lstrip", "normalized", "rstrip", "single_word", "special")
    for token, about in declared.items() if isinstance(declared, dict) else [("", declared)]:
        good = re.fullmatch("[0-9]{1,9}", token) and isinstance(about, dict) and isinstance(about.get("content"), str)
        if not good or not all(isinstance(about.get(name, False), bool) for name in flags):
            raise UserError(f"{where}: added_tokens_decoder: {shown(token)}: {shown(about)} declares no token")
    for token, about in sorted(declared.items(), key=lambda item: int(item[0])):
        if about["content"] in known:
            continue
        tokenizer.add_tokens([AddedToken(about["content"], **{name: about.get(name, False) for name in flags})])
        if tokenizer.token_to_id(about["content"]) != int(token):
            found = tokenizer.token_to_id(about["content"])
            raise UserError(f"{where}: {about['content']!r} is declared as token {token}, and would be {found}")


def _special_token(
    settings: dict[str, Any], key: str, names: tuple[str, ...], ids: dict[str, int], path: Path
) -> int | None:
    """The id of bos or eos: as the settings name it (they may name none); without settings the first known name.

    Raises UserError for a name that is no token.
    """
    if not any((path.parent / beside).is_file() for beside in SETTINGS):
        return next((ids[name] for name in names if name in ids), None)
    name = _named(settings, key)
    if name and name not in ids:
        where = path.parent / "tokenizer_config.json"
        raise UserError(f"{where}: {key} {name!r} is not in {path.name}: copy both files again")
    return ids[name] if name else None


def _own_template(path: Path, settings: dict[str, Any]) -> str | None:
    """The chat template beside a tokenizer.json: chat_template.jinja, or in its settings (of several, the default)."""
    file = path.parent / "chat_template.jinja"
    if file.is_file():
        return read_file(file, TEMPLATE_BYTES).decode("utf-8", errors="replace")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {str(item.get("name")): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    if isinstance(template, str) and len(template) > TEMPLATE_BYTES:
        raise UserError(f"{path.parent}: its chat_template has {len(template)} characters: {TEMPLATE_BYTES} at most")
    return template if isinstance(template, str) else None
