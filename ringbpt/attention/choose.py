"""Which strategy a mesh should use, by a cost model small enough to be read: strategy="auto".

Estimated is one layer's attention, forward and backward, on one device; b rows of t tokens, N query and K kv heads of
H numbers of c bytes on each of n devices over sp:

    compute         3.5 · 4 b N H t (n t / 2) / speed: half, as under a causal mask; a backward is 2.5 forwards
    ring            n - 1 hops of 2 b t K H c bytes forward and 2 b t K H (c + 4) backward, each hidden behind its
                    hop's compute: only what is longer is exposed. Half each way where a torus has a link each way and
                    one alone would leave something exposed
    all_gather      the same bytes, all of them exposed
    ulysses         b t H ((5 c + 4) N + (4 c + 8) K') · (n - 1) / n bytes all-to-all, exposed; K' = max(K, n)
    ulysses_ring    ulysses among u neighbours, and a ring of n / u groups with u times the compute behind each hop

The speed is the quickest that a device may compute with and the rates are the slowest that its links may have, so that
what is called hidden is; both are rates.py's. Each collective costs COLLECTIVE_SECONDS besides.
"""

from dataclasses import dataclass
from typing import NamedTuple

from jax.sharding import Mesh

from ringbpt import hardware, rates
from ringbpt.rates import Links

GATHERED_SHARE = 0.1  # of a device's memory that gathered keys and their gradients may take


@dataclass(frozen=True)
class Load:
    """What a device has to do: sp devices, b rows of t tokens each, heads after tp, the bytes of a number."""

    sp: int
    rows: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int


class Cost(NamedTuple):
    """Seconds of one layer, forward and backward; those of them in which a device waits; ways: of a ring, 1 or 2."""

    seconds: float
    exposed: float
    ways: int = 1


@dataclass(frozen=True)
class Choice:
    strategy: str
    ulysses_degree: int | None
    why: str
    bidirectional: bool = False


def machine(mesh: Mesh) -> Links | None:
    """What joins the devices of a mesh along sp; None where nothing is known of them (a CPU)."""
    devices = mesh.devices.reshape(-1, mesh.shape["sp"])[0]
    known = hardware.find(devices[0].device_kind)
    if known is None:
        return None
    joined = "slice_index" if known.platform == "tpu" else "process_index"
    return Links(known, sum(getattr(d, joined, 0) == getattr(devices[0], joined, 0) for d in devices))


def estimate(load: Load, on: Links) -> dict[tuple[str, int | None], Cost]:
    """{(strategy, ulysses_degree): its cost}, of those that are possible."""
    found: dict[tuple[str, int | None], Cost] = {("ring", None): _ulysses_ring(load, on, 1)}
    gathered = 2 * load.rows * load.sp * load.tokens * load.kv_heads * load.head_dim * (load.itemsize + 4)
    if gathered <= GATHERED_SHARE * on.known.hbm_gib * 2**30:
        sent = 2 * load.rows * load.tokens * load.kv_heads * load.head_dim * (2 * load.itemsize + 4)
        transfers = (load.sp - 1) * sent / on.neighbour(1, load.sp)[1] + 3 * rates.COLLECTIVE_SECONDS
        found["all_gather", None] = Cost(_compute(load, on) + transfers, transfers)
    for u in range(2, load.sp + 1):
        if load.sp % u == 0 and can_deal(load.heads, load.kv_heads, u):
            name = ("ulysses", None) if u == load.sp else ("ulysses_ring", u)
            found[name] = _ulysses_ring(load, on, u)
    return found


def can_deal(heads: int, kv_heads: int, size: int) -> bool:
    """Whether ulysses can deal a device's heads out to so many devices."""
    return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


def _compute(load: Load, on: Links) -> float:
    pairs = load.rows * load.heads * load.tokens * load.sp * load.tokens / 2
    share = rates.attention_share(on.known, "auto", load.head_dim).best
    return 3.5 * 4 * load.head_dim * pairs / (share * on.known.bf16_tflops * 1e12)


def _ulysses_ring(load: Load, on: Links, u: int) -> Cost:
    """Ulysses among u devices and a ring of sp / u groups; with u = 1 a ring, with u = sp ulysses alone."""
    numbers, c, groups = load.rows * load.tokens * load.head_dim, load.itemsize, load.sp // u
    kv_heads = max(load.kv_heads, u)
    dealt = numbers * ((5 * c + 4) * load.heads + (4 * c + 8) * kv_heads) * (u - 1) / u
    waits = dealt / on.all_to_all(1, u)[1] + 8 * rates.COLLECTIVE_SECONDS if u > 1 else 0.0
    compute = _compute(load, on)

    def ring(ways: int) -> float:
        """Seconds that its hops are longer than what hides them."""
        exposed = 0.0
        for share, size in ((1 / 3.5, c), (2.5 / 3.5, c + 4)):  # forward, backward
            sent = 2 * numbers * kv_heads * size / on.neighbour(u, groups, ways)[1] + rates.COLLECTIVE_SECONDS * ways
            exposed += (groups - 1) * max(0.0, sent - share * compute / groups)
        return exposed

    one = ring(1)
    both = ring(2) if one and on.torus and load.tokens % 2 == 0 else one
    ways, exposed = (2, both) if both < one else (1, one)
    return Cost(waits + compute + exposed, waits + exposed, ways)


def choose(load: Load, on: Links | None) -> Choice:
    """The quickest strategy, and one line that says why."""
    if load.sp == 1:
        return Choice("none", None, "one device holds the sequence")
    if on is None:
        return Choice("ring", None, "nothing is known of this device's peak and links, and a ring needs least of both")
    costs = estimate(load, on)
    best = min(costs, key=lambda name: costs[name].seconds)
    cheapest: dict[str, str] = {}  # of each strategy
    for (strategy, u), (seconds, exposed, ways) in sorted(costs.items(), key=lambda entry: entry[1].seconds):
        name = f"{strategy}{f' by {u}' if u else ''}{' both ways' if ways == 2 else ''}"
        waits = f" ({exposed * 1e3:.2g} exposed)" if exposed else ""
        cheapest.setdefault(strategy, f"{name} {seconds * 1e3:.3g} ms{waits}")
    what = (
        f"{load.tokens:,} tokens, {load.heads} query and {load.kv_heads} kv heads a device, sp={load.sp} on "
        f"{on.known.name}"
    )
    why = f"{what}; a layer there and back: {', '.join(cheapest.values())}"
    return Choice(*best, why, costs[best].ways == 2)
