"""How quickly devices work and talk: what is reached of a peak, and bytes a second along a mesh's axes.

The only owner of rates: plans, `auto` strategies and the check of published runs all ask here. A rate is a pair, at
best and at worst. What is reached of the bf16 peak stands in shares.json with the runs that it was fitted to;
tests/planning/fit_shares.py makes it.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ringbpt.hardware import Hardware

Pair = tuple[float, float]  # at best, at worst

# Between hosts with GPUs: what one GPU sends and receives over an adapter of its own (InfiniBand), 1e9 bytes/s.
NETWORK_GB_PER_S = (50.0, 25.0)
# Between a device and its host's memory, 1e9 bytes/s one way: PCIe 5 with 16 lanes, and what is left of less where
# several devices share it.
HOST_GB_PER_S = (50.0, 10.0)
# A collective takes this long with nothing to send.
COLLECTIVE_SECONDS = 20e-6
# float32 products take this many times the time of bf16 ones.
FLOAT32_COST = 6

FILE = Path(__file__).with_name("shares.json")


@dataclass(frozen=True)
class Share:
    """What is reached of the bf16 peak, at best and at worst, and where that comes from."""

    best: float
    worst: float
    source: str

    def __str__(self) -> str:
        return f"{self.best:.0%} to {self.worst:.0%}"


@cache
def _table() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def _share(entry: dict[str, Any], scale: float = 1.0) -> Share:
    best, worst = entry["share"]
    return Share(best * scale, worst * scale, entry["from"])


def _row(kind: str, known: Hardware, kernel: str) -> dict[str, Any]:
    """Of the generation and the kernel, else of its `auto`, else of the platform's."""
    rows = _table()[kind]
    for name in (known.generation, known.platform):
        for way in (kernel, "auto"):
            if found := rows.get(name, {}).get(way):
                return found
    raise KeyError(kind, known.name, kernel)


def matmul_share(known: Hardware, kernel: str) -> Share:
    """Of large matrix products, with all that stands between them in a step (norms, sums, the optimizer).

    kernel: that of the step's attention; of runs with older ones older products are known.
    """
    return _share(_row("matmul", known, kernel))


def attention_share(known: Hardware, kernel: str, head_dim: int) -> Share:
    """Of attention by a kernel: the row of the least head dim that is no smaller, else of the greatest.

    Where a head is smaller than the smallest row's, a TPU's matrix unit is filled that much less.
    """
    entries = _row("attention", known, kernel)
    sizes = sorted(map(int, entries))
    size = next((size for size in sizes if size >= head_dim), sizes[-1])
    small = known.platform == "tpu" and head_dim < sizes[0]
    return _share(entries[str(size)], head_dim / size if small else 1.0)


@dataclass(frozen=True)
class Links:
    """What joins devices. reach: how many are joined by links of their own: a GPU's host or NVLink domain, a TPU's
    slice; beyond it each has an adapter of a network.

    Along an axis of a mesh, neighbours stand `inner` devices apart and `size` of them span inner * size. Bytes a second
    that one device sends.
    """

    known: Hardware
    reach: int

    @property
    def torus(self) -> bool:
        return self.known.platform == "tpu"

    @property
    def network(self) -> Pair:
        best, worst = NETWORK_GB_PER_S
        if self.torus:
            best, worst = self.known.network_gb_per_s, self.known.network_gb_per_s / 2
        return best * 1e9, worst * 1e9

    @property
    def _inside(self) -> float:
        """Over all links that an axis has: on a torus the two of a line, both ways; else every one."""
        return self.known.link_gb_per_s * 1e9 * (2 if self.torus else self.known.links)

    def neighbour(self, inner: int, size: int, ways: int = 1) -> Pair:
        """To the next one of a ring, `inner` devices further; on a torus over one link, or one each way."""
        if inner * size > self.reach:
            return self.network
        rate = self.known.link_gb_per_s * 1e9 * ways / inner if self.torus else self._inside
        return rate, rate

    def collective(self, inner: int, size: int) -> Pair:
        """Gathers and reductions. Where they leave the reach, all members within it cross together, each over its
        own adapter.
        """
        inside, members = self._inside, min(size, max(1, self.reach // inner))
        if inner * size <= self.reach:
            return inside, inside
        best, worst = (min(inside, members * rate) for rate in self.network)
        return best, worst

    def all_to_all(self, inner: int, size: int) -> Pair:
        """On a line of a torus size / 4 links on average, in both directions at once; over adapters what leaves."""
        if inner * size > self.reach:
            members = max(1, self.reach // inner)
            leaves = (size - members) / (size - 1)
            best, worst = (min(self._inside, rate / leaves) for rate in self.network)
            return best, worst
        rate = self.known.link_gb_per_s * 1e9 * min(1.0, 8 / size) if self.torus else self._inside
        return rate, rate
