"""A step's arithmetic by our own count, and a bracket of its time, with every assumption written out."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ringbpt import hardware
from ringbpt.attention.core import MaskSpec
from ringbpt.attention.work import count
from ringbpt.config import Config
from ringbpt.dims import AXES
from ringbpt.model.flops import forward_flops, training_flops
from ringbpt.model.llama import make_dims
from ringbpt.planning.overlap import Hop
from ringbpt.planning.topologies import Topology
from ringbpt.training.memory import host_traffic
from ringbpt.types import TokenMeta

# Policies under which a layer's backward runs its forward again, attention and all.
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


def step_flops(config: Config) -> Flops:
    """The model's own (forward and backward), attention's part in it, and what is computed once more.

    Computed again are, by the flags: each layer's forward pass but what the policy saved; in attention's backward
    the scores; in the blockwise feedforward's gate and up; in the loss's the logits. A layer in blocks computes its
    projections again in the backward, and attention's operands for the policy's sake before.
    """
    architecture, execution, d = config.architecture, config.execution, make_dims(config.architecture)
    tokens = config.train_dataset.batch_size * config.train_dataset.seq_length
    pairs = visible_pairs(config)
    forward, dense = forward_flops(architecture, tokens, pairs), forward_flops(architecture, tokens, 0)
    attention = forward - dense
    loss = 2.0 * tokens * d.D * d.V
    layers, feedforward = dense - loss, 2.0 * tokens * d.L * 3 * d.D * d.F * (architecture.num_experts_per_tok or 1)
    again = attention / 2 + loss  # the scores are half of attention's products
    if execution.scan_mlp or execution.kv_heads_at_a_time:
        again += feedforward * 2 / 3
    if execution.kv_heads_at_a_time:
        projected = 2.0 * tokens * d.L * d.D * d.H
        again += projected * (2 * d.N + 2 * d.K)  # queries, keys, values and output, in the backward itself
        if execution.remat_block in NOTHING_SAVED:
            again += attention + projected * (d.N + 2 * d.K)
    elif execution.remat_block == "save_attention":
        again += layers
    elif execution.remat_block in NOTHING_SAVED:
        again += layers + attention
    return Flops(training_flops(config, tokens, pairs), attention=3 * attention, recompute=again)


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
    """low, high: seconds a step. hop_margin: a hop's computation over its transfer, at the slowest transfer and the
    quickest computation: above 1 it hides; None without hops. assumptions: one line each.
    """

    low: float
    high: float
    hop_margin: float | None
    assumptions: list[str]


def estimate(
    config: Config,
    machine: Topology,
    flops: Flops,
    collectives: Mapping[str, Mapping[str, int]],
    hops: list[Hop],
    kernel: bool,
) -> Estimate:
    """The bracket for a machine whose peaks are known. Raises ValueError for one whose peaks are not (a CPU).

    kernel: attention is a fused kernel in the compiled program, and not blocks in plain XLA.
    """
    if machine.hardware is None:
        raise ValueError(f"nobody knows the peaks of {machine.name}")
    peak = machine.hardware.bf16_tflops * 1e12 / (hardware.FLOAT32_COST if config.dtype == "fp32" else 1)
    devices, uneven = len(machine.devices), balance(config)
    again_attention = flops.attention / 6 * (3 if config.execution.remat_block in NOTHING_SAVED else 1)
    attention = (flops.attention + again_attention) * uneven / devices / peak
    dense = (flops.model - flops.attention + flops.recompute - again_attention) / devices / peak
    attention_share = hardware.KERNEL_SHARE if kernel else hardware.BLOCKWISE_SHARE
    best, worst = (attention / attention_share[i] + dense / hardware.MATMUL_SHARE[i] for i in (0, 1))
    ring = sum(hop.bytes * hop.times for hop in hops)
    rates = link_rates(config, machine)
    others = sum(
        (sum(kinds.values()) - (ring if axis == "sp" else 0)) / rates[axis][1] for axis, kinds in collectives.items()
    )
    exposed = sum(hop.bytes * hop.times for hop in hops if not hop.hidden)
    # A hop of the ring goes over one link, one way, on a TPU's torus.
    permute = (machine.hardware.link_gb_per_s * 1e9,) * 2 if machine.platform == "tpu" else rates["sp"]
    margin = attention / attention_share[0] / (ring / permute[1]) if hops else None
    meanwhile, after = host_traffic(config, config.train_dataset.batch_size, config.train_dataset.seq_length)
    host_best, host_worst = (rate * 1e9 for rate in hardware.HOST_GB_PER_S)
    low = max(best, ring / permute[0], meanwhile / host_best) + after / host_best
    high = max(worst, ring / permute[1]) + exposed / permute[1] + others + (meanwhile + after) / host_worst
    lines = _assumptions(config, machine, attention_share, uneven, rates, permute, meanwhile + after)
    return Estimate(low, high, margin, lines)


def link_rates(config: Config, machine: Topology) -> dict[str, tuple[float, float]]:
    """{axis or axes: bytes a second that one device sends along it, (at best, at worst)}."""
    assert machine.hardware
    known = machine.hardware
    inside = known.link_gb_per_s * 1e9 * (2 if machine.platform == "tpu" else known.links)
    network = hardware.NETWORK_GB_PER_S
    rates: dict[str, tuple[float, float]] = {}
    stride = 1
    for name, size in reversed(list(zip(AXES, config.mesh_shape, strict=True))):
        stride *= size
        crosses = machine.platform == "cuda" and stride > machine.devices_per_host
        rates[name] = (network[0] * 1e9, network[1] * 1e9) if crosses else (inside, inside)
    for number in range(2, len(AXES) + 1):
        for together in combinations(AXES, number):
            best, worst = (min(rates[name][i] for name in together) for i in (0, 1))
            rates["+".join(together)] = best, worst
    return rates | {"none": (inside, inside)}


def _assumptions(config, machine, attention_share, uneven, rates, permute, host) -> list[str]:
    known, percent = machine.hardware, lambda pair: f"{pair[0]:.0%} to {pair[1]:.0%}"
    slower = f", float32 products {hardware.FLOAT32_COST} times as long" if config.dtype == "fp32" else ""
    window = config.architecture.sliding_window
    seen = f"a window of {window} tokens" if window else "so every earlier token"
    lines = [
        f"peak {known.bf16_tflops:g} TFLOP/s a device{slower}",
        f"matrix products reach {percent(hardware.MATMUL_SHARE)} of it, attention {percent(attention_share)}",
        f"each row of the batch is one document, {seen} is visible",
        f"the slowest device has {uneven:.2f} times the average attention ({config.execution.sequence_layout} layout)",
        f"a hop goes at {permute[1] / 1e9:g} to {permute[0] / 1e9:g} GB/s",
        "at best every other transfer hides, at worst none does: "
        + ", ".join(f"{axis} at {rates[axis][1] / 1e9:g} GB/s" for axis in AXES),
        "reading the data, the host's own work and stragglers cost nothing",
    ]
    if host:
        speed = f"{hardware.HOST_GB_PER_S[1]:g} to {hardware.HOST_GB_PER_S[0]:g} GB/s"
        lines.append(
            f"{host / 2**30:.1f} GiB to and from the host's memory at {speed}: at best all but the update hides, at "
            "worst nothing does"
        )
    if machine.platform == "cuda":
        lines.append("memory: the run is given XLA_PYTHON_CLIENT_MEM_FRACTION=0.95")
    return lines
