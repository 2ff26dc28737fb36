"""What one device sends in a step, by what it is and in which pass, beside the least that must go."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp

from ringbpt.attention.api import SCOPE as ATTENTION
from ringbpt.attention.parallel.ring import GRADIENTS_SCOPE
from ringbpt.config import Config
from ringbpt.model.llama import COMPUTE_DTYPES, make_dims
from ringbpt.planning.attention_runs import AGAIN
from ringbpt.planning.collectives import Transfer, transfers
from ringbpt.planning.hlo import Module, shape_bytes
from ringbpt.reduction import SCOPE as SUMMED
from ringbpt.training.late_sums import SCOPE as LATE
from ringbpt.training.late_sums import are_late

KEYS, KEY_GRADIENTS, DEALT = "keys and values", "gradients of keys and values", "heads for tokens"
WEIGHTS, GRADIENTS, OVER_DP = "weights", "gradients of weights", "gradients of weights, over dp"
ACTIVATIONS = "activations over tp"  # sums of products that tp deals out; no weight is gathered along it
EMBEDDED, PLACES, REST = "embedding", "ids and places", "the rest"
FORWARD, AGAIN_FORWARD, BACKWARD, AT_LAST = "forward", "forward again", "backward", "after all micro-batches"
_BARE = {(KEYS, FORWARD), (KEYS, BACKWARD), (KEY_GRADIENTS, BACKWARD)}  # what a ring must send, whatever is kept


@dataclass(frozen=True)
class Flow:
    """sent: bytes of one device in a step. least: bytes that no ring of these devices can do without; None where
    nothing is counted.
    """

    what: str
    way: str
    sent: int
    least: int | None


def traffic(module: Module, config: Config) -> list[Flow]:
    """The flows of a compiled step of `config`, the largest first."""
    sent: Counter[tuple[str, str]] = Counter()
    for transfer in transfers(module, config.mesh_shape):
        for name, dtype, count in _arrays(transfer):
            sent[_what(name, dtype, transfer.kind, transfer.axis), _way(name)] += count
    known = least(config)
    return [Flow(*name, count, known.get(name)) for name, count in sent.most_common()]


def _arrays(transfer: Transfer) -> Iterator[tuple[str, str, int]]:
    """(name, dtype, bytes) of each array: of several that are sent at once the names are joined, as a/(b:c/d)."""
    computation, name = transfer.computation, transfer.instruction.op_name
    shapes = [computation.by_name[x].shape for x in transfer.instruction.operands if x in computation.by_name]
    before, _, joined = name.removesuffix(")").rpartition("(")
    names = [before + part for part in joined.split(":")] if name.endswith(")") else []
    if len(names) != len(shapes):
        names = [name] * len(shapes)
    whole = sum(map(shape_bytes, shapes)) or 1
    for own, shape in zip(names, shapes, strict=True):
        yield own, shape.lstrip("(").partition("[")[0], int(transfer.bytes * shape_bytes(shape) / whole)


def _way(name: str) -> str:
    if AGAIN in name and f"/{ATTENTION}/" in name:
        return AGAIN_FORWARD
    if f"/{LATE}/" in name:
        return AT_LAST
    return BACKWARD if "transpose(" in name else FORWARD


def _what(name: str, dtype: str, kind: str, axis: str) -> str:
    sums = f"/{SUMMED}/" in name or kind in ("reduce-scatter", "all-reduce")
    if dtype in ("s32", "u32"):
        return PLACES
    if f"/{ATTENTION}/" in name:
        gradients = sums or f"/{GRADIENTS_SCOPE}/" in name
        return KEY_GRADIENTS if gradients else DEALT if kind == "all-to-all" else KEYS
    if axis == "tp" and kind != "all-to-all":
        return ACTIVATIONS
    # What a TPU's compiler makes of gathers over a torus loses its name; sums go in hops there.
    if kind == "all-reduce" and (not name or name.endswith("all_gather")):
        return WEIGHTS
    if sums:
        return OVER_DP if axis == "dp" else GRADIENTS
    return {"all-gather": WEIGHTS, "all-to-all": EMBEDDED}.get(kind, REST)


def least(config: Config) -> dict[tuple[str, str], int]:
    """{(what, way): bytes} of one device: keys once all the way round for each pass, weights gathered once for each,
    gradients summed once for each micro-batch, over dp once; the heads and the feedforward that tp deals out counted
    for one of its devices.
    """
    execution, d, (dp, fsdp, tp, sp) = config.execution, make_dims(config.architecture), config.mesh_shape
    numbers, travels = (jnp.dtype(COMPUTE_DTYPES[x]).itemsize for x in (config.dtype, execution.reduce_dtype))
    rows, micros = config.train_dataset.batch_size // (dp * fsdp), config.optimizer.accumulate_gradient_steps
    keys = 2 * rows * (config.train_dataset.seq_length // sp) * max(1, d.K // tp) * d.H
    round_trip = d.L * (sp - 1) * keys
    layers = d.L * (2 * d.D * d.N * d.H + 2 * d.D * d.K * d.H + 3 * d.D * d.F * max(1, d.E)) // tp
    again = execution.gathered_weights != "keep"
    others, whole = fsdp * sp - 1, layers + (d.D * d.V // tp)
    found = {
        (KEYS, FORWARD): round_trip * numbers,
        (KEYS, BACKWARD): round_trip * numbers,
        (KEY_GRADIENTS, BACKWARD): round_trip * travels,
        (WEIGHTS, FORWARD): micros * whole * numbers * others // (others + 1),
        (WEIGHTS, BACKWARD): again * micros * layers * numbers * others // (others + 1),
        (GRADIENTS, BACKWARD): micros * whole * travels * others // (others + 1),
    }
    learned = whole + (0 if config.architecture.tie_word_embeddings else d.D * d.V // tp)
    over_dp = 2 * (dp - 1) * learned * travels // (dp * (others + 1))
    found[OVER_DP, AT_LAST if are_late(config, dp) else BACKWARD] = over_dp
    rings = execution.sequence_parallel == "ring" and sp > 1 and not execution.ring_skip_hops
    return {name: count for name, count in found.items() if count and (rings or name not in _BARE)}
