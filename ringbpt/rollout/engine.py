"""Engines: prompts in as token ids, samples out, each token with its log-probability where it was drawn.

`local` is our Generator on the trainer's own mesh, with its weights handed over in memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ringbpt.generation.generator import Generator, check_lengths, check_vocabulary
from ringbpt.generation.sampling import Sampling
from ringbpt.generation.stream import BatchShape, rows_at_once
from ringbpt.layouts import row_length
from ringbpt.model.llama import Model
from ringbpt.types import Params


class Sample(NamedTuple):
    """One answer. tokens: ids, the end token among them where it has ended by one. logps: of each under the
    distribution that it was drawn from, in nats. finish: "stop", or "length" where max_new_tokens ended it. drawn:
    which of the tokens were, where not all were: others are an environment's (see episodes.py), with a 0 in logps.
    """

    tokens: list[int]
    logps: list[float]
    finish: str
    drawn: Sequence[bool] = ()

    @property
    def mask(self) -> np.ndarray:
        """bool [tokens]: which of them were drawn."""
        return np.array(self.drawn or [True] * len(self.tokens), bool)

    @property
    def said(self) -> list[int]:
        """The tokens without the one that ended it."""
        return self.tokens[:-1] if self.finish == "stop" else self.tokens


class LocalEngine:
    """Samples several answers to each prompt on the model's mesh; all prompts of a call share one compiled program.

    A prompt whose answers have ended makes room for the next one.
    """

    def __init__(self, model: Model, longest: int, max_new_tokens: int, ends: frozenset[int], rows: int = 0):
        """longest: tokens of a prompt, at most. ends: the tokens that end an answer. rows: prompts answered at a time,
        a multiple of dp x fsdp; 0: all of a call, or as many as there is room for (see rows_at_once). Raises UserError
        where prompt and answer are above the model's length.
        """
        check_lengths(longest, max_new_tokens, model.architecture.max_sequence_length)
        mesh, execution = model.mesh.shape, model.execution
        self._model, self._ends, self._most = model, ends, max_new_tokens
        self._length = row_length(longest, mesh["sp"], execution.scan_mlp_chunk_size)
        self._rows = rows
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
        """`samples` answers to each prompt, in the order of the prompts; the same seed draws the same.

        An empty prompt holds a place: it has no answers, and the others are drawn as if it had.
        """
        assert self._generator is not None, "an engine has weights before it is asked"
        check_vocabulary(prompts, self._model.architecture.vocab_size)
        shape = BatchShape(0, self._length, samples, self._most)
        shape = shape._replace(rows=self._rows or rows_at_once(shape, len(prompts), self._model.mesh))
        found = [Sample([], [], "length") for _ in range(len(prompts) * samples)]
        over: set[int] = set()
        sampling, rows = Sampling(temperature, seed=seed), [[n] for n, prompt in enumerate(prompts) if len(prompt)]
        for new in self._generator.tokens(prompts, shape, rows, sampling, samples, over=over):
            for number, token in new.items():
                found[number].tokens.append(token.id)
                found[number].logps.append(token.logp)
                if token.id in self._ends:
                    found[number] = found[number]._replace(finish="stop")
                    over.add(number)
        return [found[i * samples : (i + 1) * samples] if len(prompt) else [] for i, prompt in enumerate(prompts)]
