"""Engines: prompts in as token ids, samples out, each token with its log-probability where it was drawn.

`local` is our Generator on the trainer's own mesh, with its weights handed over in memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ringbpt.generation.generator import BatchShape, Generator, Rows, check_lengths, check_vocabulary
from ringbpt.generation.sampling import Sampling
from ringbpt.layouts import row_length
from ringbpt.model.llama import Model
from ringbpt.types import Params


class Sample(NamedTuple):
    """One answer. tokens: ids, the end token among them where it has ended by one. logps: of each under the
    distribution that it was drawn from, in nats. finish: "stop", or "length" where max_new_tokens ended it.
    """

    tokens: list[int]
    logps: list[float]
    finish: str

    @property
    def said(self) -> list[int]:
        """The tokens without the one that ended it."""
        return self.tokens[:-1] if self.finish == "stop" else self.tokens


class LocalEngine:
    """Samples several answers to each prompt on the model's mesh; all prompts of a call share one compiled program."""

    def __init__(self, model: Model, longest: int, max_new_tokens: int, ends: frozenset[int]):
        """longest: tokens of a prompt, at most. ends: the tokens that end an answer. Raises UserError where prompt and
        answer are above the model's length.
        """
        check_lengths(longest, max_new_tokens, model.architecture.max_sequence_length)
        mesh, execution = model.mesh.shape, model.execution
        self._model, self._ends, self._most = model, ends, max_new_tokens
        self._length = row_length(longest, mesh["sp"], execution.scan_mlp_chunk_size)
        self._parts = mesh["dp"] * mesh["fsdp"]
        self._generator: Generator | None = None

    def update(self, params: Params) -> None:
        """Takes these weights for the answers to come."""
        if self._generator is None:
            self._generator = Generator(self._model, params)
        else:
            self._generator.update(params)

    def release(self) -> None:
        """Lets go of the weights, which a training step has better use for."""
        if self._generator is not None:
            self._generator.weights = {}

    def generate(
        self, prompts: Sequence[np.ndarray], samples: int, temperature: float, seed: int
    ) -> list[list[Sample]]:
        """`samples` answers to each prompt, in the order of the prompts; the same seed draws the same."""
        assert self._generator is not None, "an engine has weights before it is asked"
        check_vocabulary(prompts, self._model.architecture.vocab_size)
        rows = -(-len(prompts) // self._parts) * self._parts
        shape = BatchShape(rows, self._length, samples, self._most)
        batch: Rows = [[number] for number in range(len(prompts))] + [[] for _ in range(rows - len(prompts))]
        texts: list[list[int]] = [[] for _ in range(len(prompts) * samples)]
        logps: list[list[float]] = [[] for _ in texts]
        under_way = set(range(len(texts)))
        for new in self._generator.tokens(prompts, shape, batch, Sampling(temperature, seed=seed), samples):
            for number in tuple(under_way):
                texts[number].append(new[number].id)
                logps[number].append(new[number].logp)
                if new[number].id in self._ends:
                    under_way.remove(number)
            if not under_way:
                break
        found = [
            Sample(tokens, logp, "length" if number in under_way else "stop")
            for number, (tokens, logp) in enumerate(zip(texts, logps, strict=True))
        ]
        return [found[i : i + samples] for i in range(0, len(found), samples)]
