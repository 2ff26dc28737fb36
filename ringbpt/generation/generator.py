"""Text out: prompts packed into rows, prefilled as rows become free, and a token a step of all that are under way."""

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

import numpy as np

from ringbpt.config import UserError
from ringbpt.data.packing import best_fit
from ringbpt.generation.decode import make_split
from ringbpt.generation.sampling import Sampling
from ringbpt.generation.stream import BatchShape, Draw, NewToken, Programs, Stream, Unit
from ringbpt.layouts import row_length
from ringbpt.model.llama import Model
from ringbpt.types import Params

Rows = list[list[int]]  # the prompts that stand in a row together, by number: those of each row, in turn


def plan_rows(lengths: Sequence[int], model: Model, batch_size: int, new_tokens: int) -> tuple[BatchShape, Rows]:
    """One shape for all prompts, so that a file of them compiles once, and the rows, the longest prompts first.

    The first `batch_size` prompts decide how many rows there are at a time, and how many texts in one: as many of those
    behind them are shorter one by one, and stand together where theirs do. Raises UserError where prompt and new tokens
    are above the model's length.
    """
    mesh, chunk = model.mesh.shape, model.execution.scan_mlp_chunk_size
    longest = max(lengths)
    check_lengths(longest, new_tokens, model.architecture.max_sequence_length)
    length = row_length(longest, mesh["sp"], chunk)
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    row_of, count = best_fit(np.array([lengths[number] for number in order[:batch_size]]), length)
    rows: Rows = [[] for _ in range(-(-len(order) // batch_size) * count)]
    for place, number in enumerate(order):
        batch, place = divmod(place, batch_size)
        rows[batch * count + int(row_of[place])].append(number)
    parts = mesh["dp"] * mesh["fsdp"]
    return BatchShape(-(-count // parts) * parts, length, max(map(len, rows)), new_tokens), [row for row in rows if row]


def rounded_length(longest: int, model: Model) -> int:
    """Tokens of a row, a power of two where the mesh and the chunks allow: few programs serve prompts of any length."""
    power = 1 << max(longest - 1, 63).bit_length()
    return row_length(power, model.mesh.shape["sp"], model.execution.scan_mlp_chunk_size)


def check_lengths(longest: int, new_tokens: int, limit: int) -> None:
    """Raises UserError where the longest prompt and what follows it are more than a model's `limit` of tokens."""
    if longest + new_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens and --max_new_tokens={new_tokens} are above the model's {limit}: "
            f"--max_new_tokens={max(limit - longest, 1)} at most, or --max_sequence_length={longest + new_tokens}"
        )


def check_vocabulary(prompts: Sequence[np.ndarray], vocab_size: int) -> None:
    """Raises UserError where a prompt's tokens cannot be the model's."""
    largest = max((int(prompt.max()) for prompt in prompts if len(prompt)), default=0)
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer gives token {largest}, and the model has a vocabulary of {vocab_size}: give the tokenizer "
            "that belongs to it"
        )


class Generator:
    """A model ready to generate, on its mesh; what is compiled is kept."""

    def __init__(self, model: Model, params: Params):
        self.model, self.programs = model, Programs(model)
        self._split = make_split(model)
        self.weights = self._split(params)

    def update(self, params: Params) -> None:
        """Takes other weights, of the shapes, dtypes and shardings that the first had: nothing is compiled again.

        A Stream that was begun before goes on with the old ones, which stay in memory as long as it is there.
        """
        self.weights = {}  # let go of before the new are made
        self.weights = self._split(params)

    def stream(self, shape: BatchShape, shared: bool = False) -> Stream:
        return Stream(self.programs, self.weights, shape, shared)

    def tokens(
        self,
        prompts: Sequence[np.ndarray],
        shape: BatchShape,
        rows: Rows,
        sampling: Sampling,
        samples: int = 1,
        draws: Sequence[Draw] = (),
        over: AbstractSet[int] = frozenset(),
    ) -> Iterator[dict[int, NewToken]]:
        """{number of a text: its next token} at each step, of those that are under way, until each has new_tokens.

        rows: the prompts of each row, in the order in which they begin, as many rows at a time as the shape has. Each
        prompt has so many samples, which share its one prefill: text number i is of prompt i // samples, and drawn by a
        key of its own. draws: of each text, where not all are drawn as `sampling` says and by their own numbers. over:
        the texts that have ended before, to which the caller adds; a row begins others once all of its texts have.
        """
        draws = draws or [Draw(sampling, number) for number in range(len(prompts) * samples)]
        waiting = list(reversed(rows))
        texts: dict[int, list[int]] = {}
        stream = self.stream(shape, samples > 1)
        try:
            while waiting or stream.under_way:
                free = stream.free
                begun = {row: waiting.pop() for row in free[: len(waiting)]}
                for row, own in begun.items():
                    texts[row] = [number * samples + i for number in own for i in range(samples)]
                stream.fill(
                    {
                        row: Unit([prompts[number] for number in own], [draws[n] for n in texts[row]], shape.new_tokens)
                        for row, own in begun.items()
                    }
                )
                told = stream.step()
                yield {
                    number: token
                    for row, tokens in told.items()
                    for number, token in zip(texts[row], tokens, strict=True)
                    if number not in over
                }
                for row in told:
                    if row in stream.under_way and all(number in over for number in texts[row]):
                        stream.stop(row)
        finally:  # nothing is under way, for which a template's limit of memory (data/text/template.py) were too low
            stream.settle()
