"""A conversation in the terminal: each turn's tokens shown as they come."""

import sys
from collections.abc import Sequence

from ringbpt.generation.generator import Generator, Group, Shape, round_length
from ringbpt.generation.sampling import Sampling
from ringbpt.generation.text import Codec, Text


def chat(
    generator: Generator, codec: Codec, sampling: Sampling, max_new_tokens: int, stops: Sequence[str], system: str
) -> int:
    """Until an empty line or the end of the input. The whole conversation is the prompt of each turn.

    Prompt lengths are rounded up to powers of two, so that few programs are compiled.
    """
    mesh, architecture = generator.model.mesh.shape, generator.model.architecture
    messages = [{"role": "system", "content": system}] if system else []
    print("an empty line ends the conversation", file=sys.stderr)
    while True:
        print("> ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return 0
        messages.append({"role": "user", "content": line})
        prompt = codec.chat(messages)
        longest = architecture.max_sequence_length - len(prompt)
        if longest < 1:
            print(f"the conversation has filled the model's {architecture.max_sequence_length} tokens", file=sys.stderr)
            return 0
        length = round_length(
            1 << max(len(prompt) - 1, 63).bit_length(), mesh["sp"], generator.model.execution.scan_mlp_chunk_size
        )
        rows = mesh["dp"] * mesh["fsdp"]
        group = Group([[0], *([] for _ in range(rows - 1))])
        shape = Shape(rows, length, 1, max_new_tokens)
        text = Text(codec, stops)
        for tokens in generator.tokens([prompt], shape, group, sampling):
            print(text.add(tokens[0]), end="", flush=True)
            if text.finished or len(text.tokens) >= longest:
                break
        print(text.rest(), flush=True)
        messages.append({"role": "assistant", "content": text.text})
