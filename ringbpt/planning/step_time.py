"""The one cost model of a step: what the slowest device computes and sends -> a bracket of seconds.

A plan reads its Work off the compiled program (estimate.py); the check of published runs fills it in by hand
(tests/planning/published.py). Each pass of a ring takes as long as its computation or its transfers, the longer:

    step = Σ over passes max(attention of the pass, its hops / rate) + dense + what nothing hides + the rest's excess

At best every transfer that may hide does, at the best rates; at worst three quarters of weights and gradients do, at
the worst rates. No step is shorter than what it sends.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ringbpt import rates
from ringbpt.hardware import Hardware
from ringbpt.rates import Pair

# Of a forward's attention: a backward computes the scores again, and four products where the forward has two.
BACKWARD = 2.5
# Of transfers that computation may hide, what is not hidden at worst: no more than a fitted run that sends for a tenth
# of its time or more can have left in the open, had its products been the quickest. The tightest is Llama-2-70B on 256
# v6e: 9.05 s, of which 8.31 are computation at the best shares, and 2.76 s of transfers: 0.27 of them.
UNHIDDEN = 0.25


@dataclass(frozen=True)
class Pass:
    """Attention over the whole sequence once, in all layers: forward, again, or backward.

    flops: of the slowest device. behind: bytes of the ring that it sends behind some of that computation, and which
    share of it that is (a ring of n: (n - 1) / n). alone: bytes that it sends with nothing to hide them.
    """

    flops: float
    behind: float = 0.0
    share_behind: float = 1.0
    alone: float = 0.0


@dataclass(frozen=True)
class Work:
    """Of one device in one step. dense: FLOPs of everything but attention. hop_rate: bytes a second of a ring's hop.

    waits: seconds of transfers that nothing hides (the all-to-alls of ulysses, sums after all micro-batches). between:
    of those that stand between a layer's products (sums over tp), all hidden at best and none at worst. others: of all
    other transfers. meanwhile, after: bytes to and from the host's memory, during the computation and in the update.
    """

    passes: Sequence[Pass]
    dense: float
    hop_rate: Pair = (1.0, 1.0)
    waits: Pair = (0.0, 0.0)
    between: Pair = (0.0, 0.0)
    others: Pair = (0.0, 0.0)
    meanwhile: float = 0.0
    after: float = 0.0


@dataclass(frozen=True)
class Bracket:
    """low, high: seconds of a step. exposed: of them, those in which a device waits for a ring, for ulysses or for sums
    after all micro-batches, at best and at worst. margins: for each pass its computation over its transfer, at the
    slowest transfer and the quickest computation: from 1 on its hops hide in time; None where none is sent behind
    anything.
    """

    low: float
    high: float
    exposed: Pair
    margins: tuple[float | None, ...]


def bracket(work: Work, known: Hardware, kernel: str, head_dim: int, float32: bool = False) -> Bracket:
    """kernel: which of llama.attention_kernel's computes attention."""
    peak = known.bf16_tflops * 1e12 / (rates.FLOAT32_COST if float32 else 1)
    attention, matmul = rates.attention_share(known, kernel, head_dim), rates.matmul_share(known, kernel)
    quick, slow = (share * peak for share in (attention.best, attention.worst))
    (low, least), (high, most) = (
        (sum(_seconds(p, speed, rate) for p in work.passes), sum(_waited(p, other, rate) for p in work.passes))
        for speed, other, rate in ((quick, slow, work.hop_rate[0]), (slow, quick, work.hop_rate[1]))
    )
    host_best, host_worst = (rate * 1e9 for rate in rates.HOST_GB_PER_S)
    low += work.dense / (matmul.best * peak)
    high += work.dense / (matmul.worst * peak)
    unhidden = sum(max(UNHIDDEN * sent, sent - high) for sent in (work.others[1], work.meanwhile / host_worst))
    low = max(low, work.between[0], work.others[0], work.meanwhile / host_best)
    return Bracket(
        low=low + work.waits[0] + work.after / host_best,
        high=high + unhidden + work.between[1] + work.waits[1] + work.after / host_worst,
        exposed=(least + work.waits[0], most + work.waits[1]),
        margins=tuple(_margin(p, quick, work.hop_rate[1]) for p in work.passes),
    )


def _hiding(part: Pass, speed: float) -> float:
    return part.flops * part.share_behind / speed


def _margin(part: Pass, speed: float, rate: float) -> float | None:
    return _hiding(part, speed) / (part.behind / rate) if part.behind else None


def _seconds(part: Pass, speed: float, rate: float) -> float:
    return part.flops / speed + _waited(part, speed, rate)


def _waited(part: Pass, speed: float, rate: float) -> float:
    """Seconds of a pass in which its device has nothing to compute."""
    return max(0.0, part.behind / rate - _hiding(part, speed)) + part.alone / rate
