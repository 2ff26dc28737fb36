"""Which strategy a mesh should use, by a cost model small enough to be read: strategy="auto".

Estimated is one layer's attention, forward and backward, on one device; b rows of t tokens, N query and K kv heads of
H numbers of c bytes on each of n devices over sp:

    compute         3.5 · 4 b N H t (n t / 2) / (ATTENTION_SHARE · peak): half, as under a causal mask; a backward is
                    2.5 forwards
    ring            n - 1 hops of 2 b t K H c bytes forward and 2 b t K H (c + 4) backward, each hidden behind its
                    hop's compute: only what is longer counts
    all_gather      the same bytes, none of them hidden
    ulysses         b t H ((5 c + 4) N + (4 c + 8) K') · (n - 1) / n bytes all-to-all, none hidden; K' = max(K, n)
    ulysses_ring    ulysses among u neighbours, and a ring of n / u groups with u times the compute behind each hop

A byte to a neighbour takes 1 / link on a TPU's torus, and all-to-all among n on a line of it n / 8 times that: n / 4
links on average, in both directions at once. GPUs of a host reach each other over all their links alike; further hosts
over their adapters. Each collective costs COLLECTIVE_SECONDS besides. What is reached of peaks, links and networks is
in hardware.py.
"""

from dataclasses import dataclass

from jax.sharding import Mesh

from ringbpt import hardware

GATHERED_SHARE = 0.1  # of a device's memory that gathered keys and their gradients may take
_NETWORK = hardware.NETWORK_GB_PER_S[0] * 1e9


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


@dataclass(frozen=True)
class Machine:
    """What it does it on. torus: a TPU's links; otherwise a switch among the `host` devices of a host."""

    name: str
    flops: float
    memory_bytes: float
    link: float
    torus: bool
    host: int

    def neighbour(self, distance: int, span: int) -> float:
        """Bytes a second of a ring whose members stand `distance` apart, `span` devices in all."""
        if self.torus:
            return self.link / distance
        return self.link if span <= self.host else _NETWORK

    def all_to_all(self, n: int) -> float:
        if self.torus:
            return self.link * min(1.0, 8 / n)
        return self.link if n <= self.host else _NETWORK


@dataclass(frozen=True)
class Choice:
    strategy: str
    ulysses_degree: int | None
    why: str


def machine(mesh: Mesh) -> Machine | None:
    """The machine of a mesh; None where nothing is known of its devices (a CPU)."""
    devices = mesh.devices.reshape(-1, mesh.shape["sp"])[0]
    known = hardware.find(devices[0].device_kind)
    if known is None:
        return None
    torus = devices[0].platform == "tpu"
    link = known.link_gb_per_s * 1e9 * (1 if torus else known.links)
    host = sum(device.process_index == devices[0].process_index for device in devices)
    return Machine(known.name, known.bf16_tflops * 1e12, known.hbm_gib * 2**30, link, torus, host)


def estimate(load: Load, on: Machine) -> dict[tuple[str, int | None], float]:
    """{(strategy, ulysses_degree): seconds of one layer, forward and backward}, of those that are possible."""
    found: dict[tuple[str, int | None], float] = {("ring", None): _ulysses_ring(load, on, 1)}
    gathered = 2 * load.rows * load.sp * load.tokens * load.kv_heads * load.head_dim * (load.itemsize + 4)
    if gathered <= GATHERED_SHARE * on.memory_bytes:
        sent = 2 * load.rows * load.tokens * load.kv_heads * load.head_dim * (2 * load.itemsize + 4)
        transfers = (load.sp - 1) * sent / on.neighbour(1, load.sp) + 3 * hardware.COLLECTIVE_SECONDS
        found["all_gather", None] = _compute(load, on) + transfers
    for u in range(2, load.sp + 1):
        if load.sp % u == 0 and can_deal(load.heads, load.kv_heads, u):
            name = ("ulysses", None) if u == load.sp else ("ulysses_ring", u)
            found[name] = _ulysses_ring(load, on, u)
    return found


def can_deal(heads: int, kv_heads: int, size: int) -> bool:
    """Whether ulysses can deal a device's heads out to so many devices."""
    return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


def _compute(load: Load, on: Machine) -> float:
    pairs = load.rows * load.heads * load.tokens * load.sp * load.tokens / 2
    return 3.5 * 4 * load.head_dim * pairs / (hardware.ATTENTION_SHARE * on.flops)


def _ulysses_ring(load: Load, on: Machine, u: int) -> float:
    """Ulysses among u devices and a ring of sp / u groups; with u = 1 a ring, with u = sp ulysses alone."""
    numbers, c, groups = load.rows * load.tokens * load.head_dim, load.itemsize, load.sp // u
    kv_heads = max(load.kv_heads, u)
    dealt = numbers * ((5 * c + 4) * load.heads + (4 * c + 8) * kv_heads) * (u - 1) / u
    seconds = dealt / on.all_to_all(u) + (8 * hardware.COLLECTIVE_SECONDS if u > 1 else 0)
    hop = _compute(load, on) / groups
    for share, size in ((1 / 3.5, c), (2.5 / 3.5, c + 4)):  # forward, backward
        transfer = 2 * numbers * kv_heads * size / on.neighbour(u, load.sp) + hardware.COLLECTIVE_SECONDS
        seconds += share * hop + (groups - 1) * max(share * hop, transfer)
    return seconds


def choose(load: Load, on: Machine | None) -> Choice:
    """The quickest strategy, and one line that says why."""
    if load.sp == 1:
        return Choice("none", None, "one device holds the sequence")
    if on is None:
        return Choice("ring", None, "nothing is known of this device's peak and links, and a ring needs least of both")
    seconds = estimate(load, on)
    best = min(seconds, key=lambda name: seconds[name])
    cheapest: dict[str, str] = {}  # of each strategy
    for (strategy, u), value in sorted(seconds.items(), key=lambda entry: entry[1]):
        cheapest.setdefault(strategy, f"{strategy}{f' by {u}' if u else ''} {value * 1e3:.3g} ms")
    what = (
        f"{load.tokens:,} tokens, {load.heads} query and {load.kv_heads} kv heads a device, sp={load.sp} on {on.name}"
    )
    return Choice(*best, f"{what}; a layer there and back: {', '.join(cheapest.values())}")
