"""Prompts: the objects of a .jsonl file, texts or conversations, and their tokens up to where an answer begins."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ringbpt.config import UserError
from ringbpt.data.reading.files import read_rows
from ringbpt.data.text.shapes import settings_of, tools_of
from ringbpt.data.text.tokenizers import Tokenizer


def read_prompts(file: Path, flag: str = "prompts", of_environment: bool = False) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, each with a prompt or messages, or with whatever an environment makes them of.

    Raises UserError with file and line.
    """

    def checked(row: Any) -> Any:
        is_prompt = isinstance(row.get("prompt"), str) or isinstance(row.get("messages"), list)
        if not is_prompt and not of_environment:
            raise ValueError
        return row

    wanted = "no object" if of_environment else 'neither "prompt", a text, nor "messages", a list'
    return read_rows(file, flag, wanted, checked)


def whole_text(text: str, where: str) -> str:
    """The text, which bytes of a command line that are no UTF-8 have not spoilt."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where} is no UTF-8 text") from None
    return text


def encode_prompt(
    row: dict[str, Any], tokenizer: Tokenizer, encode: Callable[..., np.ndarray] | None, where: str
) -> np.ndarray:
    """int32 tokens of a prompt, or of a conversation up to its next answer, as training renders them.

    encode: of conversations (generation.text.make_chat_encoder); None where there are none. Raises UserError, which
    begins with `where`.
    """
    if isinstance(text := row.get("prompt"), str):
        if not len(found := tokenizer.encode_prompt(whole_text(text, where))):
            raise UserError(f"{where}: no tokens: write something")
        return found
    assert encode is not None
    return encode(row["messages"], tools_of(row, where), where, settings_of(row, where))
