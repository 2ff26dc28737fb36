"""Attention against attention, taking turns in one process: on a machine that others share only ratios can be believed.

scripts/bench_attention.py is the command. A contender is a function of (q_BTNH, k_BTKH, v_BTKH, meta: TokenMeta),
in layout order, to out_BTNH.
"""

import statistics
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ringbpt.attention.api import LOCALS, AttentionSpec, make_attention
from ringbpt.attention.core import MaskSpec
from ringbpt.bench.kernels import Problem, ring_rank
from ringbpt.layouts import permutation
from ringbpt.mesh import make_mesh
from ringbpt.types import TokenMeta

Contender = Callable[..., jax.Array]
KINDS = ("forward", "forward+backward")


@dataclass(frozen=True)
class Settings:
    """What is measured. rival: ringattention, cudnn, one_device: the ranks of a ring against one device alone, or

    unshared: answers to one prompt that stands in the row once, against documents of T tokens one after the other.
    """

    rival: str
    T: int
    heads: int
    kv_heads: int
    H: int
    dtype: str
    local: str
    strategy: str
    chunk_size: int
    rival_chunk_size: tuple[int, ...]
    devices: int
    ranks: int
    repeats: int


@dataclass(frozen=True)
class Case:
    """Causal attention over `documents` packed documents of equal length, each query seeing `window` tokens at most.

    layout and skip_hops are ours, as one would choose them: balanced where everybody sees far, neighbours side by side
    where nobody does. Of unshared, documents are the answers, and their prompt is PROMPT of a document.
    """

    name: str
    documents: int = 1
    window: int | None = None
    layout: str = "contiguous"
    skip_hops: bool = True

    @property
    def mask(self) -> MaskSpec:
        return MaskSpec(causal=True, window=self.window)


CASES = (
    Case("dense causal", layout="zigzag", skip_hops=False),
    Case("8 documents", documents=8),
    Case("window 512", window=512),
)
PROMPT = 0.9
SHARED_OR_NOT = ("shared", "unshared")
ANSWERS = (Case("2 answers", documents=2), Case("8 answers", documents=8))


def inputs(settings: Settings, case: Case, mesh: Mesh, layout: str) -> tuple[Any, ...]:
    """(q, k, v, meta), the numbers random; sharded over sp, in layout order."""
    problem = Problem(settings.T, settings.H, settings.heads, settings.kv_heads, "packed", case.documents)
    q, k, v, _ = problem.inputs(settings.dtype)
    order = permutation(layout, settings.T, settings.ranks if settings.rival == "one_device" else mesh.shape["sp"])
    in_order = jax.tree.map(lambda x: x[:, order], (q, k, v, problem.meta()))
    return jax.device_put(in_order, NamedSharding(mesh, PartitionSpec(None, "sp")))


def shared_or_not(settings: Settings, case: Case, shared: bool) -> tuple[Any, ...]:
    """(q, k, v, meta), the numbers random: of the documents as they are, or `shared`, what they begin with once.

    Each answer begins with a copy of the prompt's last token, which has to predict its first: that one is not shared.
    The row ends in padding up to a whole block, as rows of a data set do.
    """
    s, answers = settings, case.documents
    once = round(PROMPT * s.T) - 1 if shared else 0
    length = once + answers * (s.T - once)
    place = np.arange(length + -length % s.chunk_size, dtype=np.int32)[None]
    answer, own = np.divmod(place - once, s.T - once)
    in_prompt = place < once
    segment = np.where(in_prompt, 1, np.where(place < length, 1 + answer, 0))
    meta = TokenMeta(np.where(in_prompt, place, once + own), segment)
    if shared:
        meta = replace(meta, last_BT=np.where(in_prompt, answers, segment))
    q, k, v, _ = Problem(place.size, s.H, s.heads, s.kv_heads).inputs(s.dtype)
    return jax.device_put((q, k, v, meta))


def ringattention(case: Case, mesh: Mesh, chunk_size: int) -> Contender:
    """The package `ringattention`, its blockwise JAX. It knows no windows: there it does the dense causal case."""
    import jax.lib

    if not hasattr(jax.lib, "xla_bridge"):  # gone from jax; the package asks it for the platform, and no more
        bridge = types.ModuleType("jax.lib.xla_bridge")
        bridge.get_backend = lambda: jax.local_devices()[0].client  # type: ignore[attr-defined]
        sys.modules["jax.lib.xla_bridge"] = jax.lib.xla_bridge = bridge  # type: ignore[attr-defined]
    from ringattention import ringattention as attend

    blocks = {
        "causal_block_size": 1,
        "deterministic": True,
        "dropout_rng": None,
        "attn_pdrop": 0.0,
        "query_chunk_size": chunk_size,
        "key_chunk_size": chunk_size,
        "dtype": jnp.float32,
        "policy": jax.checkpoint_policies.nothing_saveable,
        "precision": None,
        "prevent_cse": False,
    }

    def share(q, k, v, segment):
        options = {"axis_name": "sp", "float32_logits": False, "cache_idx": None, "blockwise_kwargs": blocks}
        return attend(q, k, v, None, segment if case.documents > 1 else None, **options)

    split, whole = PartitionSpec(None, "sp"), PartitionSpec()
    shares = jax.shard_map(share, mesh=mesh, in_specs=(split,) * 3 + (whole,), out_specs=split, check_vma=False)
    return lambda q, k, v, meta: shares(q, k, v, meta.segment_BT)


def cudnn(case: Case) -> Contender:
    """cuDNN's attention on one GPU; documents of equal length are rows of a batch, which is the best that it can do."""

    def attend(q, k, v, meta):
        rows = [x.reshape(-1, x.shape[1] // case.documents, *x.shape[2:]) for x in (q, k, v)]
        window = None if case.window is None else (case.window - 1, 0)
        out = jax.nn.dot_product_attention(*rows, is_causal=True, local_window_size=window, implementation="cudnn")
        return out.reshape(q.shape)

    return attend


def program(contender: Contender, kind: str) -> Callable:
    def total(q, k, v, meta):
        return jnp.sum(contender(q, k, v, meta).astype(jnp.float32) ** 2)

    return contender if kind == "forward" else jax.grad(total, (0, 1, 2))


def compiled(settings: Settings, case: Case, kind: str) -> dict[str, tuple[Callable, tuple]]:
    """{contender: (its program, what it is given)}, ours first."""
    s = settings
    mesh = make_mesh((1, 1, 1, s.devices if s.rival == "ringattention" else 1))

    def build(function: Callable, arrays: tuple, *more: Any) -> tuple[Callable, tuple]:
        return jax.jit(function).lower(*arrays, *more).compile(), (*arrays, *more)

    spec = AttentionSpec(s.strategy, s.local, case.mask, s.chunk_size, s.chunk_size, skip_hops=case.skip_hops)
    own = make_attention(mesh, spec)
    if s.rival == "unshared":
        return {name: build(program(own, kind), shared_or_not(s, case, name == "shared")) for name in SHARED_OR_NOT}
    laid_out, in_order = (inputs(s, case, mesh, layout) for layout in (case.layout, "contiguous"))
    if s.rival == "one_device":
        local = LOCALS[s.local](jax.devices()[0], s.chunk_size, s.chunk_size)

        def rank_of(ranks: int) -> Callable:
            attend = ring_rank(local, case.mask, ranks, backward=kind != "forward")
            return lambda q, k, v, meta, rank: attend(q, k, v, q, meta, rank)  # any d_out costs the same

        ring = build(rank_of(s.ranks), laid_out, 0)[0]
        ranks = {f"rank {r} of {s.ranks}": (ring, (*laid_out, r)) for r in range(s.ranks)}
        return ranks | {"one device": build(rank_of(1), in_order, 0)}
    if s.rival == "cudnn":
        contenders = {"cudnn": cudnn(case)}
    else:
        contenders = {f"ringattention, blocks {n}": ringattention(case, mesh, n) for n in s.rival_chunk_size}
    first = {f"ringbpt, blocks {s.chunk_size}": build(program(own, kind), laid_out)}
    return first | {name: build(program(contender, kind), in_order) for name, contender in contenders.items()}


def run(settings: Settings, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """A row for each case, kind and contender: median seconds, every run, temporary bytes of a device.

    Taking turns; each timed run comes right after one of the same program that is not timed. Seconds of the clock, and
    of all cores, which other programs on the same ones change less. 'ratio' and 'core_ratio': a rival's seconds over
    ours. Of one_device: one device's seconds over the sum that so many ranks would take at this rank's pace, the share
    of the ideal that is left before any transfer. Of unshared: seconds, and temporary bytes, over those of documents
    that share nothing.
    """
    rows = []
    for case, kind in product(ANSWERS if settings.rival == "unshared" else CASES, KINDS):
        programs = compiled(settings, case, kind)
        times: dict[str, list[float]] = {name: [] for name in programs}
        core_times: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(settings.repeats):
            for name, (call, arguments) in programs.items():
                # As in training, a program runs after itself: what others left in the caches, and gave back of their
                # memory, is not its own.
                jax.block_until_ready(call(*arguments))
                start, core_start = time.perf_counter(), time.process_time()
                jax.block_until_ready(call(*arguments))
                times[name].append(time.perf_counter() - start)
                core_times[name].append(time.process_time() - core_start)
        seconds, cores = ({name: statistics.median(x) for name, x in of.items()} for of in (times, core_times))
        memory = {
            name: call.memory_analysis().temp_size_in_bytes  # type: ignore[attr-defined]
            for name, (call, _) in programs.items()
        }
        for name in programs:
            of_memory = ""
            if settings.rival == "unshared":
                ratio = seconds[name] / seconds["unshared"]
                of_memory = f"{memory[name] / memory['unshared']:6.2f} x"
            elif settings.rival == "one_device":
                ratio = seconds["one device"] / seconds[name] / (settings.ranks if "rank" in name else 1)
            else:
                ratio = seconds[name] / seconds[next(iter(seconds))]
            core_ratio = cores[name] / cores[next(iter(cores))]
            row = {"case": case.name, "kind": kind, "contender": name, "seconds": seconds[name], "ratio": ratio}
            row |= {"core_seconds": cores[name], "core_ratio": core_ratio}
            rows.append(row | {"temp_bytes": memory[name], "all": times[name]})
            of_clock = f"{seconds[name]:9.4f} s {ratio:6.2f} x"
            of_cores = f"{cores[name]:9.4f} s of cores {core_ratio:6.2f} x"
            say(f"{case.name:12} {kind:17} {name:26} {of_clock} {of_cores} {memory[name] / 2**20:8.1f} MiB{of_memory}")
    return rows


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """The ratios as bars, a group for each case and kind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    groups = list(dict.fromkeys((row["case"], row["kind"]) for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    for i, name in enumerate(names):
        ratios = [
            next(r["ratio"] for r in rows if (r["case"], r["kind"], r["contender"]) == (*g, name)) for g in groups
        ]
        bars = axes.bar(np.arange(len(groups)) + i * 0.8 / len(names), ratios, 0.8 / len(names), label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set_xticks(np.arange(len(groups)) + 0.4, ["\n".join(group) for group in groups], fontsize=7)
    axes.set_ylabel("ratio of seconds")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
