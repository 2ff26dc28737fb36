"""The tokenizer that a GGUF file holds, as the files that Hugging Face would have it in.

A file has the pieces, what kind each is, and either the merges of a byte-level BPE and the name of how texts are cut
into words before ("gpt2"), or SentencePiece's scores ("llama"), which are the merges' order. What is not said there is
llama.cpp's default, for that is what the format means. Ref: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from ringbpt.config import UserError
from ringbpt.config.foreign import quiet, refusing
from ringbpt.config.gguf import TOKENIZER, Gguf, read_gguf
from ringbpt.data.reading.files import cached, default_cache

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # of tokenizer.ggml.token_type
LONGEST_PIECE = 4096  # characters; where SentencePiece's are put together, the work grows with the square
NEVER_MERGED = {UNKNOWN, CONTROL, BYTE}

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What tokenizer.ggml.pre names -> how a text is cut, one expression after the other, before merges are looked for.
_CUTS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    **dict.fromkeys(("gpt-2", "olmo", "mpt"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "dbrx", "smaug-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
}
# Whose words that are tokens stay whole, whatever the merges, and whose texts begin with bos.
_WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"}


def unpack_tokenizer(file: Path) -> Path:
    """tokenizer.json, with its settings, ends and chat template beside it, in a folder of the cache.

    Raises UserError where the file has no tokenizer, or one that is not done here.
    """
    header = read_gguf(file)
    if TOKENIZER not in header.metadata:
        raise UserError(f"{file} holds no tokenizer: give one as a Hugging Face folder")
    with refusing(f"{file}: the tokenizer in its header is incomplete or damaged"), quiet():
        files = _tokenizer_files(header)
    content = {name: text for name, text in files.items() if text is not None}

    def build(folder: Path) -> None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text, encoding="utf-8")

    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
    return cached(default_cache() / "tokenizers" / digest, file.stem, build, "") / "tokenizer.json"


def _tokenizer_files(header: Gguf) -> dict[str, str | None]:
    """Name -> content; None: there is none."""
    said = {key.removeprefix("tokenizer."): x for key, x in header.metadata.items() if key.startswith("tokenizer.")}
    pieces, kinds = said["ggml.tokens"], said.get("ggml.token_type") or []
    if long := max((piece for piece in pieces if isinstance(piece, str)), key=len, default="")[LONGEST_PIECE:]:
        raise UserError(f"{header.file}: tokenizer.ggml.tokens: a token of {LONGEST_PIECE + len(long)} characters")
    ids = {piece: token for token, piece in enumerate(pieces)}
    if len(ids) < len(pieces) or len(kinds) not in (0, len(pieces)):
        raise UserError(f"{header.file}: a token stands in tokenizer.ggml.tokens twice, or not all have a token_type")
    make = {"gpt2": _byte_level, "llama": _sentencepiece}.get(said["ggml.model"])
    if make is None:
        raise UserError(f"{header.file}: tokenizer.ggml.model={said['ggml.model']!r} is none of gpt2, llama")
    tokenizer, begins = make(said, ids, kinds or [1] * len(pieces), str(header.file))

    def piece(name: str) -> str | None:
        token = said.get(f"ggml.{name}_token_id")
        return None if token is None else pieces[token]

    bos = piece("bos")
    if bos is not None and said.get("ggml.add_bos_token", begins):
        from tokenizers.processors import TemplateProcessing

        frame = (f"{bos} $A", f"{bos} $A $B", [(bos, ids[bos])])
        tokenizer.post_processor = TemplateProcessing(*frame)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {f"{ours}_token": piece(theirs) for ours, theirs in names.items()}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {name: token for name, token in special.items() if token is not None}
    ends = dict.fromkeys(said.get(f"ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    stops = [token for token in ends if token is not None]
    generation = {"bos_token_id": said.get("ggml.bos_token_id"), "eos_token_id": stops or None}
    return {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False),
        "generation_config.json": json.dumps(generation, indent=2),
        "chat_template.jinja": said.get("chat_template"),
    }


def _byte_level(said: dict[str, Any], ids: dict[str, int], kinds: list[int], where: str) -> tuple[Any, bool]:
    """(a tokenizer, whether a text begins with bos unless the file says otherwise)"""
    from tokenizers import Regex, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    name = said.get("ggml.pre")
    if not name:
        raise UserError(
            f"{where}: tokenizer.ggml.pre is missing, as in files from before May 2024, and nothing else says how "
            "texts are cut into words: convert the model again, or give its tokenizer as a Hugging Face folder"
        )
    if name not in _CUTS:
        raise UserError(f"{where}: tokenizer.ggml.pre={name!r} is none of {', '.join(_CUTS)}")
    pairs = [_pair(merge) for merge in said["ggml.merges"]]
    whole = name in _WHOLE_WORDS
    try:
        tokenizer = Tokenizer(BPE(vocab=ids, merges=pairs, ignore_merges=whole))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{where}: tokenizer.ggml.merges: {' '.join(str(error).split())}") from None
    if name == "qwen2":  # as Qwen's own tokenizer does
        tokenizer.normalizer = normalizers.NFC()
    cuts = [Split(Regex(cut), behavior="isolated") for cut in _CUTS[name]]
    tokenizer.pre_tokenizer = Sequence([*cuts, ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, ids, kinds, (CONTROL,))
    return tokenizer, whole


def _pair(merge: str) -> tuple[str, str]:
    first, space, second = merge[1:].partition(" ")  # a piece may begin with a space
    if not space:
        raise ValueError(f"tokenizer.ggml.merges has {merge!r}, which is no pair")
    return merge[:1] + first, second


def _sentencepiece(said: dict[str, Any], ids: dict[str, int], kinds: list[int], where: str) -> tuple[Any, bool]:
    """As `_byte_level`. SentencePiece merges the pair whose piece has the highest score, the first of several."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    if said.get("ggml.remove_extra_whitespaces"):
        raise UserError(f"{where}: tokenizer.ggml.remove_extra_whitespaces=True is not supported")
    scores, merged = said["ggml.scores"], {piece for piece, token in ids.items() if kinds[token] not in NEVER_MERGED}
    merges = [
        (-scores[ids[piece]], len(piece[:cut]), piece[:cut], piece[cut:])
        for piece in merged
        for cut in range(1, len(piece))
        if piece[:cut] in merged and piece[cut:] in merged
    ]
    pairs = [(first, second) for *_, first, second in sorted(merges)]
    unknown = next((piece for piece, token in ids.items() if kinds[token] == UNKNOWN), None)
    fallback = any(kind == BYTE for kind in kinds)
    tokenizer = Tokenizer(BPE(vocab=ids, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=fallback))
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    shown: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if said.get("ggml.add_space_prefix", True):
        spaces, shown = [normalizers.Prepend("▁"), *spaces], [*shown, decoders.Strip(" ", 1, 0)]
    tokenizer.normalizer, tokenizer.decoder = normalizers.Sequence(spaces), decoders.Sequence(shown)
    _add_tokens(tokenizer, ids, kinds, (CONTROL, UNKNOWN))
    return tokenizer, True


def _add_tokens(tokenizer: Any, ids: dict[str, int], kinds: list[int], special: tuple[int, ...]) -> None:
    """Tokens that are found whole in a text, before anything else is done with it."""
    from tokenizers import AddedToken

    def of(*wanted: int) -> list[Any]:
        return [AddedToken(piece, normalized=False) for piece, token in ids.items() if kinds[token] in wanted]

    tokenizer.add_special_tokens(of(*special))
    tokenizer.add_tokens(of(USER_DEFINED))
