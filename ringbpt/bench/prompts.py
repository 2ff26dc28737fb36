"""A train step on answers that share their prompt, against the same answers each with a prompt of its own; and the pass
that says what the tokens' log-probabilities are, by which rollouts know the old policy and the reference.

The two steps compute one thing (the loss is compared); they take turns, so that what else a machine does meets both.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ringbpt.attention.core import MaskSpec
from ringbpt.attention.work import visible_pairs
from ringbpt.config import Config
from ringbpt.data.documents import Piece, make_batch
from ringbpt.mesh import make_mesh
from ringbpt.model.llama import Model
from ringbpt.objectives import objective_of
from ringbpt.training.step import make_gradients
from ringbpt.types import ALWAYS, Batch


@dataclass(frozen=True)
class Sharing:
    """Ratios of the shared step to the unshared one. pairs: visible ones of a query and a key. said: of the pass, in
    seconds as well. loss: the difference.
    """

    answers: int
    tokens: float
    pairs: float
    seconds: float
    said: float
    temporaries: float
    loss: float


def answers_of(
    length: int,
    prompt: float,
    answers: int,
    vocab_size: int,
    shared: bool,
    multiple: int,
    columns: tuple[str, ...] = (),
) -> Batch:
    """One row of documents of `length` tokens, of which the share `prompt` is the same in all and takes no loss; the
    row is padded to a multiple. An answer shares all of its prompt but the last token, which predicts its first one.
    columns: of an objective, with numbers that mean nothing.
    """
    rng = np.random.default_rng(0)
    common = round(prompt * length)
    start, pieces = rng.integers(1, vocab_size, common), []
    for number in range(answers):
        token = np.concatenate([start, rng.integers(1, vocab_size, length - common)])
        cut = common - 1 if shared and number else 0
        values = {"token": token[cut:], "mask": (np.arange(length) >= common)[cut:].astype(np.float32)}
        values |= {name: rng.normal(size=length)[cut:].astype(np.float32) for name in columns}
        pieces.append(Piece(length - cut, values, 0, cut))
    places = sum(piece.length for piece in pieces)
    return make_batch(
        [pieces], (1, -(-places // multiple) * multiple), (*ALWAYS, *(("last",) if shared else ()), *columns)
    )


def measure(config: Config, length: int, prompt: float, answers: int, repeats: int) -> Sharing:
    """Gradients of `config`'s model and objective on its mesh; `repeats` timed runs of each, of which the median."""
    model = Model.of(config, make_mesh(config.mesh_shape))
    objective = objective_of(config)
    gradients = make_gradients(config, model, objective)
    params = model.init(jax.random.key(0))
    multiple = 2 * config.mesh_shape.sp * max(config.execution.loss_chunk_size, config.execution.scan_mlp_chunk_size)
    found: dict[bool, dict[str, Any]] = {}
    for shared in (True, False):
        vocab_size = config.architecture.vocab_size
        host = answers_of(length, prompt, answers, vocab_size, shared, multiple, objective.columns)
        batch = model.put_batch(host.rows, host.token_BT.shape)
        program = jax.jit(gradients).lower(params, batch).compile()
        said = jax.jit(lambda params, batch: model.token_stats(params, batch).logp_BT).lower(params, batch).compile()
        memory = program.memory_analysis()
        found[shared] = {
            "seconds": lambda program=program, batch=batch: jax.block_until_ready(program(params, batch)),
            "said": lambda said=said, batch=batch: jax.block_until_ready(said(params, batch)),
            "tokens": np.count_nonzero(host.segment_BT),
            "pairs": visible_pairs(host.meta, host.meta, MaskSpec()),
            "temporaries": memory.temp_size_in_bytes if memory else 0,
        }
        found[shared]["loss"] = objective.values(found[shared]["seconds"]()[1], config)["loss"]
        found[shared]["said"]()
    a, b = found[True], found[False]
    times: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name in ("seconds", "said"):
            for which, one in (("a", a), ("b", b)):
                begin = time.perf_counter()
                one[name]()
                times.setdefault(name + which, []).append(time.perf_counter() - begin)
    ratio = {
        name: statistics.median(times[f"{name}a"]) / statistics.median(times[f"{name}b"])
        for name in ("seconds", "said")
    }
    return Sharing(
        answers,
        a["tokens"] / b["tokens"],
        a["pairs"] / b["pairs"],
        ratio["seconds"],
        ratio["said"],
        a["temporaries"] / b["temporaries"],
        abs((a["loss"] - b["loss"]) / b["loss"]),
    )
