"""A step's arithmetic by our own count, and a bracket of its time, with every assumption written out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from ringbpt import rates
from ringbpt.attention.core import MaskSpec
from ringbpt.attention.work import count
from ringbpt.config import Config
from ringbpt.dims import AXES
from ringbpt.model.flops import forward_flops, training_flops
from ringbpt.model.llama import make_dims
from ringbpt.planning.between_slices import NETWORK
from ringbpt.planning.overlap import Hop
from ringbpt.planning.step_time import BACKWARD, UNHIDDEN, Bracket, Pass, Work, bracket
from ringbpt.planning.topologies import Topology
from ringbpt.planning.traffic import AT_LAST, OVER_DP, least
from ringbpt.rates import Links, Pair
from ringbpt.training.memory import host_traffic
from ringbpt.types import TokenMeta

# Policies that keep attention's result for the backward; under any other one a layer's attention runs again.
KEPT = ("", "everything_saveable", "save_attention")
# Policies under which a layer's projections and its feedforward run again.
NOTHING_SAVED = ("nothing_saveable", "offload_inputs")


@dataclass(frozen=True)
class Flops:
    """Of one step, all devices together. attention: its visible pairs only, forward and backward."""

    model: float
    attention: float
    recompute: float


def visible_pairs(config: Config) -> float:
    """(query, key) pairs of a batch whose rows are one document each."""
    length = config.train_dataset.seq_length
    window = min(config.architecture.sliding_window or length, length)
    return config.train_dataset.batch_size * (window * (window + 1) / 2 + (length - window) * window)


def attends_again(config: Config) -> bool:
    """Whether by the flags a layer's backward runs the forward of its attention once more."""
    execution = config.execution
    return not {execution.remat_block, execution.remat_attention} <= set(KEPT)


def step_flops(config: Config, again: bool | None = None, pairs: float | None = None) -> Flops:
    """The model's own (forward and backward), attention's part in it, and what is computed once more.

    Computed again are each layer's products but what the policy saved, and but the feedforward's last one, which no
    backward asks for; in attention's backward the scores; in the blockwise feedforward's gate and up, once, whatever
    the policy; in the loss's the logits. A layer in blocks computes its projections again in the backward, and
    attention's operands for the policy's sake before. again: whether attention's forward runs again, as the compiled
    program says; None: as the flags do. pairs: visible ones of a batch; None: each row is one document.
    """
    architecture, execution, d = config.architecture, config.execution, make_dims(config.architecture)
    tokens = config.train_dataset.batch_size * config.train_dataset.seq_length
    pairs = visible_pairs(config) if pairs is None else pairs
    attention = forward_flops(architecture, tokens, pairs) - forward_flops(architecture, tokens, 0)
    experts = architecture.num_experts_per_tok if architecture.num_experts else 1
    gate_and_up = 2.0 * tokens * d.L * 2 * d.D * d.F * experts
    of_one = 2.0 * tokens * d.L * d.D * d.H  # a head's queries, keys, values or output
    computed = attention / 2 + 2.0 * tokens * d.D * d.V  # the scores are half of attention's products
    layers = execution.remat_block in (*NOTHING_SAVED, "save_attention")
    if execution.scan_mlp or execution.kv_heads_at_a_time or layers:
        computed += gate_and_up
    if attends_again(config) if again is None else again:
        computed += attention
    if execution.kv_heads_at_a_time:
        computed += of_one * (2 * d.N + 2 * d.K)
        computed += of_one * (d.N + 2 * d.K) * (execution.remat_block in NOTHING_SAVED)
    elif layers:
        computed += of_one * (2 * d.N + 2 * d.K)
    return Flops(training_flops(config, tokens, pairs), attention=3 * attention, recompute=computed)


def balance(config: Config) -> float:
    """The most loaded device's attention over the average, for rows of one document each; a small sequence tells."""
    sp = config.mesh_shape[3]
    length = 16 * sp
    meta = TokenMeta(np.arange(length)[None], np.ones((1, length), int))
    window = config.architecture.sliding_window
    scaled = window and max(1, round(window * length / config.train_dataset.seq_length))
    mask = MaskSpec(window=scaled if window else None)
    return count(meta, config.execution.sequence_layout, sp, mask, 1, 1).balance


@dataclass(frozen=True)
class Estimate:
    """The bracket of a step, and one line for each of its assumptions. hops: of its rings; hidden: of them, those that
    are sent behind a computation that lasts as long, however quick it is and however slow the transfer.
    """

    bracket: Bracket
    hops: int
    hidden: int
    assumptions: list[str]


def estimate(
    config: Config,
    machine: Topology,
    collectives: Mapping[str, Mapping[str, int]],
    hops: list[Hop],
    kernel: str,
    again: bool,
    pairs: float | None = None,
) -> Estimate:
    """The bracket for a machine whose peaks are known. Raises ValueError for one whose peaks are not (a CPU).

    kernel: what computes attention in the compiled program. again: whether its forward runs again for the backward.
    pairs: visible ones of a batch, as a run counted them; None: each row is one document.
    """
    if machine.links is None:
        raise ValueError(f"nobody knows the peaks of {machine.name}")
    links, flops, devices = machine.links, step_flops(config, again, pairs), len(machine.devices)
    uneven = balance(config)
    forward = flops.attention / 3 * uneven / devices
    parts = {"forward": forward, "backward": forward * BACKWARD} | ({"again": forward} if again else {})
    executed = flops.attention * (0.5 / 3 + again / 3)  # of attention, beyond the model's own
    meanwhile, after = host_traffic(config, config.train_dataset.batch_size, config.train_dataset.seq_length)
    rates_of, sp = link_rates(config, machine), config.mesh_shape.sp
    deals = config.execution.sequence_parallel in ("ulysses", "ulysses_ring", "auto")
    dealt = collectives.get("sp", {}).get("all-to-all", 0) if deals else 0
    ring = sum(hop.bytes * hop.times for hop in hops)
    hidden = {"sp": ring + dealt, NETWORK: collectives.get(NETWORK, {}).get("collective-permute", 0)}  # the ring's own
    late_along = NETWORK if machine.slices > 1 and config.mesh_slices == "dp" else "dp"
    late = min(least(config).get((OVER_DP, AT_LAST), 0), collectives.get(late_along, {}).get("all-reduce", 0))
    hidden[late_along] = hidden.get(late_along, 0) + late
    rest = {axis: sum(kinds.values()) - hidden.get(axis, 0) for axis, kinds in collectives.items()}
    work = Work(
        passes=[_pass(name, amount, hops, sp) for name, amount in parts.items()],
        dense=(flops.model - flops.attention + flops.recompute - executed) / devices,
        hop_rate=hop_rate(config, machine),
        waits=_seconds([(dealt, _along(config, machine, "sp").all_to_all(1, sp)), (late, rates_of[late_along])]),
        between=_seconds([(rest.pop("tp", 0), rates_of["tp"])]),
        others=_seconds([(size, rates_of[axis]) for axis, size in rest.items()]),
        meanwhile=meanwhile,
        after=after,
    )
    found = bracket(work, links.known, kernel, make_dims(config.architecture).H, config.dtype == "fp32")
    in_time = {name for name, margin in zip(parts, found.margins, strict=True) if margin is not None and margin >= 1}
    return Estimate(
        found,
        hops=sum(hop.times for hop in hops),
        hidden=sum(hop.times for hop in hops if hop.hidden and _part(hop) in in_time),
        assumptions=_assumptions(config, machine, kernel, uneven, work, meanwhile + after, pairs),
    )


def _part(hop: Hop) -> str:
    """Which pass of attention a hop belongs to."""
    return "again" if hop.again else "backward" if hop.backward else "forward"


def _seconds(sent: Sequence[tuple[float, Pair]]) -> Pair:
    best, worst = (sum(size / rate[i] for size, rate in sent) for i in (0, 1))
    return best, worst


def _pass(name: str, flops: float, hops: list[Hop], sp: int) -> Pass:
    """With the hops that are its own, and behind which of them the schedule has a computation."""
    own = [hop for hop in hops if _part(hop) == name]
    behind, alone = (sum(hop.bytes * hop.times for hop in own if hop.hidden is way) for way in (True, False))
    return Pass(flops, behind, (sp - 1) / sp, alone)


def _along(config: Config, machine: Topology, axis: str) -> Links:
    """The links of an axis: of several slices, one stretches over the network, and the others stay inside."""
    assert machine.links
    if machine.slices == 1:
        return machine.links
    members = getattr(config.mesh_shape, axis) // machine.slices
    return replace(machine.links, reach=members if axis == config.mesh_slices else len(machine.devices))


def hop_rate(config: Config, machine: Topology) -> Pair:
    """Bytes a second of one hop of the ring."""
    inner, ways = config.execution.ulysses_degree or 1, 2 if config.execution.ring_bidirectional else 1
    return _along(config, machine, "sp").neighbour(inner, config.mesh_shape.sp // inner, ways)


def link_rates(config: Config, machine: Topology) -> dict[str, Pair]:
    """{axis or axes: bytes a second that one device sends along it, (at best, at worst)}.

    Of several slices each axis has the links inside of a slice: what goes between them is counted apart.
    """
    assert machine.links
    found: dict[str, Pair] = {}
    inner = 1
    within = replace(machine.links, reach=len(machine.devices)) if machine.slices > 1 else machine.links
    for name, size in reversed(list(zip(AXES, config.mesh_shape, strict=True))):
        found[name] = within.collective(inner, size)
        inner *= size
    for number in range(2, len(AXES) + 1):
        for together in combinations(AXES, number):
            best, worst = (min(found[name][i] for name in together) for i in (0, 1))
            found["+".join(together)] = best, worst
    return found | {"none": machine.links.collective(1, 1), NETWORK: machine.links.network}


def _assumptions(
    config: Config, machine: Topology, kernel: str, uneven: float, work: Work, host: float, pairs: float | None
) -> list[str]:
    assert machine.links
    known, axes = machine.links.known, link_rates(config, machine)
    head_dim = make_dims(config.architecture).H
    slower = f", float32 products {rates.FLOAT32_COST} times as long" if config.dtype == "fp32" else ""
    window = config.architecture.sliding_window
    seen = f"a window of {window} tokens" if window else "so every earlier token"
    products, attention = rates.matmul_share(known, kernel), rates.attention_share(known, kernel, head_dim)
    lines = [
        f"peak {known.bf16_tflops:g} TFLOP/s a device{slower}",
        f"matrix products reach {products} of it: {products.source}",
        f"attention ({kernel}, heads of {head_dim}) reaches {attention} of it: {attention.source}",
        f"each row of the batch is one document, {seen} is visible"
        if pairs is None
        else f"{pairs:,.0f} pairs of a batch are visible, as the run counted them",
        f"the slowest device has {uneven:.2f} times the average attention ({config.execution.sequence_layout} "
        "layout; python -m ringbpt.inspect counts it of your documents)",
        f"a hop goes at {work.hop_rate[1] / 1e9:g} to {work.hop_rate[0] / 1e9:g} GB/s",
        f"at best every other transfer hides, at worst {1 - UNHIDDEN:.0%} of it does, and nothing along tp: "
        + ", ".join(f"{axis} at {axes[axis][1] / 1e9:g} GB/s" for axis in (*AXES, *[NETWORK] * (machine.slices > 1))),
        "reading the data, the host's own work and stragglers cost nothing",
    ]
    if config.architecture.num_experts:
        lines.insert(2, "the products of experts reach as much of it as dense ones, and loads are even: not measured")
    if host:
        speed = f"{rates.HOST_GB_PER_S[1]:g} to {rates.HOST_GB_PER_S[0]:g} GB/s"
        lines.append(
            f"{host / 2**30:.1f} GiB to and from the host's memory at {speed}: at best all but the update hides, "
            f"at worst {1 - UNHIDDEN:.0%} of that"
        )
    if machine.platform == "cuda":
        lines.append("memory: the run is given XLA_PYTHON_CLIENT_MEM_FRACTION=0.95")
    return lines
