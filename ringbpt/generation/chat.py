"""A conversation in the terminal: each turn's tokens shown as they come."""

import sys
from collections.abc import Callable, Sequence
from typing import TextIO

import numpy as np

from ringbpt.config import UserError, for_terminal
from ringbpt.data.text.tokenizers import Tokenizer
from ringbpt.generation.generator import Generator, rounded_length
from ringbpt.generation.sampling import Sampling
from ringbpt.generation.stream import BatchShape
from ringbpt.generation.text import BEFORE, Text


def chat(
    generator: Generator,
    tokenizer: Tokenizer,
    encode: Callable[..., np.ndarray],
    sampling: Sampling,
    max_new_tokens: int,
    stops: Sequence[str],
    system: str,
    out: TextIO,
) -> int:
    """Until an empty line or the end of the input. The whole conversation, by `encode`, is the prompt of each turn, and
    each answer goes to `out`.
    """
    mesh, architecture = generator.model.mesh.shape, generator.model.architecture
    messages = [{"role": "system", "content": system}] if system else []
    print("an empty line ends the conversation", file=sys.stderr)
    while True:
        print("> ", end="", flush=True, file=out)
        line = sys.stdin.readline().strip()
        if not line:
            return 0
        try:
            line.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError("what was typed is no UTF-8 text: type it again") from None
        messages.append({"role": "user", "content": line})
        prompt = encode(messages, None, "the conversation")
        longest = architecture.max_sequence_length - len(prompt)
        if longest < 1:
            print(f"the conversation has filled the model's {architecture.max_sequence_length} tokens", file=sys.stderr)
            return 0
        shape = BatchShape(mesh["dp"] * mesh["fsdp"], rounded_length(len(prompt), generator.model), 1, max_new_tokens)
        text = Text(tokenizer, stops, prompt[-BEFORE:])
        for tokens in generator.tokens([prompt], shape, [[0]], sampling):
            print(for_terminal(text.add(tokens[0].id), out), end="", flush=True, file=out)
            if text.finished or len(text.tokens) >= longest:
                break
        print(for_terminal(text.rest(), out), flush=True, file=out)
        messages.append({"role": "assistant", "content": text.text})
