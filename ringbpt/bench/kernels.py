"""Attention kernels against a float32 reference and against the clock, ours beside those of others, on one device.

Each kernel is checked first, at the problem's head dim, group of heads and mask; what is wrong is not timed. Programs
are compiled side by side and then timed with nothing else at work, the most telling problem first, until the time is
up: what was left out is listed. TFLOP/s count the visible pairs only: 4 H a pair and query head forward, 10 H backward.
"""

import importlib
import itertools
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ringbpt.attention.api import LOCALS
from ringbpt.attention.core import Local, MaskSpec, Partial
from ringbpt.attention.local import reference
from ringbpt.attention.work import visible_pairs
from ringbpt.layouts import permutation
from ringbpt.types import TokenMeta

TOLERANCE = 2e-2  # of the largest number of each of out, dq, dk, dv; bf16 keeps 8 bits
_REPEATS = 5


@dataclass(frozen=True)
class Problem:
    """One attention. mask: causal, packed (documents of equal length) or window."""

    length: int
    head_dim: int
    heads: int
    kv_heads: int
    mask: str = "causal"
    documents: int = 8
    window: int = 1024

    @property
    def spec(self) -> MaskSpec:
        return MaskSpec(window=min(self.window, self.length // 4) if self.mask == "window" else None)

    def meta(self) -> TokenMeta:
        """numpy, [1, length]."""
        place = np.arange(self.length, dtype=np.int32)[None]
        size = -(-self.length // self.documents) if self.mask == "packed" else self.length
        return TokenMeta(place % size, place // size + 1)

    def flops(self, direction: str) -> float:
        pairs = visible_pairs(self.meta(), self.meta(), self.spec)
        return {"forward": 4, "backward": 10}[direction] * float(self.head_dim * self.heads * pairs)

    def inputs(self, dtype: Any = jnp.bfloat16) -> list[jax.Array]:
        """q, k, v and d_out of random numbers, on the device."""
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        keys = jax.random.split(jax.random.key(0), 4)
        shapes = ((1, self.length, n, self.head_dim) for n in heads)
        return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


# A peer is a function of a problem to (forward, backward, prepare): the first two are functions of what
# prepare(q, k, v, d_out) returns. Those of jax are not yet compiled. NotImplementedError says what a peer cannot do.
Peer = Callable[[Problem], tuple[Any, Any, Callable]]


def own_programs(local: Local, spec: MaskSpec) -> tuple[Callable, Callable]:
    """(forward, backward) of one of ours, not yet compiled: functions of what own_arguments returns."""

    def forward(q, k, v, d_out, out, lse, meta):
        part = local.attend(q, k, v, meta, meta, spec)
        return part.out_BTNH.astype(q.dtype), part.lse_BTN

    def backward(q, k, v, d_out, out, lse, meta):
        grads = local.attend_bwd(q, k, v, out, lse, d_out, meta, meta, spec)
        return [grad.astype(q.dtype) for grad in grads]

    return jax.jit(forward), jax.jit(backward)


def own_arguments(problem: Problem, q, k, v, d_out) -> list:
    """[q, k, v, d_out, out, lse, meta], with room for the forward's out and lse, which the backward reads."""
    meta = jax.tree.map(jnp.asarray, problem.meta())
    return [q, k, v, d_out, jnp.zeros(q.shape, q.dtype), jnp.zeros(q.shape[:-1], jnp.float32), meta]


def ours(name: str, device: jax.Device) -> Peer:
    local = LOCALS[name](device, None, None)

    def programs(problem: Problem):
        forward, backward = own_programs(local, problem.spec)
        prepare = partial(own_arguments, problem)
        jax.eval_shape(backward, *jax.eval_shape(prepare, *jax.eval_shape(problem.inputs)))  # refuses now or never
        return forward, backward, prepare

    return programs


def differentiated(name: str, attend: Callable) -> Peer:
    """A peer whose backward is its function's vjp; it is timed together with its forward, which is then taken off."""

    def programs(problem: Problem):
        if problem.mask != "causal":
            raise NotImplementedError(f"{name} is asked for plain causal attention only")

        def forward(q, k, v, d_out):
            return [attend(q, k, v)]

        def both(q, k, v, d_out):
            return jax.vjp(attend, q, k, v)[1](d_out)

        return jax.jit(forward), jax.jit(both), lambda *inputs: list(inputs)

    return programs


def torch_sdpa(backend: str) -> Peer:
    """PyTorch's attention by one of its backends: FLASH_ATTENTION or CUDNN_ATTENTION."""
    torch = importlib.import_module("torch")
    attention = importlib.import_module("torch.nn.attention")

    def programs(problem: Problem):
        if problem.mask != "causal":
            raise NotImplementedError("PyTorch's fused attention knows neither documents nor a window")

        def prepare(*inputs):
            tensors = [torch.from_dlpack(x).transpose(1, 2).detach() for x in inputs]
            return [*[x.requires_grad_() for x in tensors[:3]], tensors[3]]

        def attend(q, k, v):
            with attention.sdpa_kernel(getattr(attention.SDPBackend, backend)):
                grouped = q.shape[1] != k.shape[1]
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

        def forward(q, k, v, d_out):
            with torch.no_grad():
                return [attend(q, k, v)]

        def both(q, k, v, d_out):
            return torch.autograd.grad(attend(q, k, v), (q, k, v), d_out)

        return forward, both, prepare

    return programs


def peers(device: jax.Device, names: list[str], others: bool = True) -> Iterator[tuple[str, Peer | str]]:
    """Each of ours by `names`, and those of others where they are asked for; or why there is none."""

    def cudnn() -> Peer:
        attend = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        return differentiated("jax cudnn", attend)

    def tokamax() -> Peer:
        attend = importlib.import_module("tokamax").dot_product_attention
        return differentiated("tokamax", partial(attend, is_causal=True))

    def torch(backend: str) -> Peer:
        if not importlib.import_module("torch").cuda.is_available():
            raise ImportError("this torch has no CUDA")
        return torch_sdpa(backend)

    makers: dict[str, Callable[[], Peer]] = {name: partial(ours, name, device) for name in names}
    if others and device.platform == "gpu":
        makers |= {"jax cudnn": cudnn, "tokamax": tokamax}
        makers |= {"torch flash": partial(torch, "FLASH_ATTENTION"), "torch cudnn": partial(torch, "CUDNN_ATTENTION")}
    for name, make in makers.items():
        try:
            yield name, make()
        except (ImportError, NotImplementedError) as refusal:
            yield name, str(refusal)


# --- correctness ---


def _numpy(x: Any) -> np.ndarray:
    """float32 [1, T, heads, H], of a jax array or a torch tensor (heads before tokens)."""
    if isinstance(x, jax.Array):
        return np.asarray(x, np.float32)
    return x.detach().float().cpu().numpy().swapaxes(1, 2)


@lru_cache(1)
def _truth(problem: Problem) -> tuple[Partial, list[jax.Array]]:
    """The float32 reference's out and lse; and its out, dq, dk and dv."""
    q, k, v, d_out = (x.astype(jnp.float32) for x in problem.inputs())
    meta = problem.meta()
    whole = jax.jit(partial(reference.attend, mask=problem.spec))(q, k, v, meta, meta)
    backward = jax.jit(partial(reference.attend_bwd, mask=problem.spec))
    return whole, [whole.out_BTNH, *backward(q, k, v, whole.out_BTNH, whole.lse_BTN, d_out, meta, meta)]


def errors(problem: Problem, forward: Callable, backward: Callable, prepare: Callable) -> dict[str, float]:
    """The greatest difference from the float32 reference, over the greatest number there, of out, dq, dk and dv."""
    whole, truth = _truth(problem)
    args = prepare(*problem.inputs())
    if len(args) > 4:  # ours: out and lse are the global ones
        args[4:6] = [whole.out_BTNH.astype(jnp.bfloat16), whole.lse_BTN]
    found = [forward(*args)[0], *backward(*args)]
    differences = {}
    for name, a, b in zip(("out", "dq", "dk", "dv"), map(_numpy, found), map(np.asarray, truth), strict=True):
        error = np.abs(a - b).max() / np.abs(b).max()
        differences[name] = float(error) if np.isfinite(a).all() else float("inf")
    return differences


# --- time ---


def _wait(result: Any) -> None:
    first = jax.tree.leaves(result)[0]
    if isinstance(first, jax.Array):
        jax.block_until_ready(result)
    elif first.is_cuda:
        importlib.import_module("torch").cuda.synchronize()


def seconds(function: Callable, args: list, least: float = 0.03) -> float:
    """The median time of a call: each measurement is of as many calls in a row as take `least` seconds."""

    def measure(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            result = function(*args)
        _wait(result)
        return (time.perf_counter() - start) / calls

    measure(1)
    calls = max(1, int(least / max(measure(1), 1e-6)))
    return median(measure(calls) for _ in range(_REPEATS))


def _compiled(peer: Peer, problem: Problem) -> tuple[Callable, Callable, Callable]:
    """Both programs, ready to run, and prepare."""
    forward, backward, prepare = peer(problem)
    if hasattr(forward, "lower"):  # jax's, and not PyTorch's
        shapes = jax.eval_shape(prepare, *jax.eval_shape(problem.inputs))
        forward, backward = (function.lower(*shapes).compile() for function in (forward, backward))
    return forward, backward, prepare


def measure(problem: Problem, forward: Callable, backward: Callable, prepare: Callable) -> dict[str, float]:
    """{"forward": TFLOP/s, "backward": TFLOP/s} of one peer's compiled programs."""
    args = prepare(*problem.inputs())
    if len(args) > 4:
        args[4:6] = forward(*args)
    times = {"forward": seconds(forward, args), "backward": seconds(backward, args)}
    if len(args) == 4:  # the backward ran its forward too
        times["backward"] = max(times["backward"] - times["forward"], 1e-9)
    return {direction: problem.flops(direction) / spent / 1e12 for direction, spent in times.items()}


def ring_rank(local: Local, mask: MaskSpec, ranks: int, backward: bool) -> Callable:
    """What one rank of a ring computes, on one device: hop by hop, without the transfers.

    A function of everybody's (q, k, v, d_out, meta), in layout order, and of the rank, to the rank's out, or to its dq
    and the sums of each hop's dk and dv. One device alone is a ring of one rank.
    """

    def attend(q, k, v, d_out, meta, rank):
        everybody = jax.tree.map(lambda x: x.reshape(1, ranks, -1, *x.shape[2:]), (q, k, v, d_out, meta))

        def of(r):
            return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, r % ranks, 1, keepdims=False), everybody)

        q, k, v, d_out, own = of(rank)

        def hop(part, i):
            _, k, v, _, meta = of(rank - i)
            return local.attend(q, k, v, own, meta, mask, part), None

        part, _ = lax.scan(hop, local.attend(q, k, v, own, own, mask), jnp.arange(1, ranks))
        out = part.out_BTNH.astype(q.dtype)

        def hop_back(dq, i):
            _, k, v, _, meta = of(rank - i)
            more, dk, dv = local.attend_bwd(q, k, v, out, part.lse_BTN, d_out, own, meta, mask)
            return dq + more, (jnp.sum(dk), jnp.sum(dv))  # summed, so that they are computed and not kept

        return lax.scan(hop_back, jnp.zeros(q.shape, jnp.float32), jnp.arange(ranks)) if backward else out

    return attend


def ring_of_ranks(local: Local, length: int, ranks: int, problem: Problem) -> dict[str, float]:
    """A zigzag ring without its transfers, a rank at a time, against one shot over the whole sequence.

    length: tokens a rank. {"forward": one shot's time / ranks / the slowest rank's, "both": forward and backward}.
    """
    whole = replace(problem, length=length * ranks, mask="causal")
    arrays = (*whole.inputs(), jax.tree.map(jnp.asarray, whole.meta()))
    order = permutation("zigzag", whole.length, ranks)
    dealt = jax.tree.map(lambda x: x[:, order], arrays)
    found = {}
    for name, backward in (("forward", False), ("both", True)):
        shot = seconds(jax.jit(ring_rank(local, MaskSpec(), 1, backward)), [*arrays, 0])
        rank = jax.jit(ring_rank(local, MaskSpec(), ranks, backward))
        slowest = max(seconds(rank, [*dealt, r]) for r in (0, ranks - 1))
        found[name] = shot / ranks / slowest
    return found


# --- the whole of it ---


def problems(lengths: list[int], head_dims: list[int], heads: list[tuple[int, int]]) -> list[Problem]:
    """Every one, the most telling first: by mask and heads, and the longest of each."""
    masks = ("causal", "packed", "window")
    found = [
        Problem(length, head_dim, *count, mask)
        for head_dim, count, mask in itertools.product(sorted(head_dims, reverse=True), heads, masks)
        for length in sorted(lengths, reverse=True)
    ]
    return sorted(
        found, key=lambda p: (p.mask != "causal") + 2 * (p.head_dim < max(head_dims)) + 2 * (p.heads == p.kv_heads)
    )


def versions(device: jax.Device) -> dict[str, str]:
    """The date, the device, its driver where it has one, and what is installed."""
    found = {"date": time.strftime("%Y-%m-%d"), "device": device.device_kind, "python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "torch", "tokamax", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    if device.platform == "gpu":
        with suppress(OSError, subprocess.SubprocessError):
            asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.split()
            found |= {"driver": said[0]} if said else {}
    return found


def _of_each(
    found: dict[str, Peer], problem: Problem, label: Callable[[str], str], report: dict, call: Callable[..., dict]
) -> Iterator[tuple[str, dict]]:
    """(name, call(problem, *its programs)) of each peer; why there is none is said in the report, under its label."""
    with ThreadPoolExecutor() as pool:
        futures = {name: pool.submit(_compiled, peer, problem) for name, peer in found.items()}
    for name, programs in futures.items():
        try:
            result = call(problem, *programs.result())
        except Exception as failure:  # of whatever kind: it must not end the others' measurements
            report["refused"][label(name)] = line(failure)
        else:
            yield name, result


def _check_all(found: dict[str, Peer], problem: Problem, report: dict, say: Callable) -> dict[str, Peer]:
    """Fills the report's errors, returns those that are right, and takes out of `found` those that are wrong."""
    right = {}

    def label(name: str) -> str:
        return f"{name} {problem.mask} D={problem.head_dim} {problem.heads}/{problem.kv_heads}"

    for name, off in _of_each(dict(found), problem, label, report, errors):
        report["errors"][label(name)] = off
        worst = max(off.values())
        if worst > TOLERANCE:
            del found[name]
        else:
            right[name] = found[name]
        say(f"{label(name)}: off by {worst:.1e} of the greatest number{', WRONG' if worst > TOLERANCE else ''}")
    return right


def _time_all(found: dict[str, Peer], problem: Problem, report: dict, say: Callable, keep: Callable) -> None:
    for name, speed in _of_each(found, problem, lambda name: f"{name} {problem}", report, measure):
        report["tflops"].append({"kernel": name, **asdict(problem), **speed})
        say(f"{name:28} {problem.length:6} D={problem.head_dim:3} {problem.heads}/{problem.kv_heads} "
            f"{problem.mask:7} {speed['forward']:8.3g} {speed['backward']:8.3g}")  # fmt: skip
        keep(report)


def line(failure: Exception) -> str:
    """Its kind, and the first line of what it says."""
    return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"


def run(
    names: list[str], todo: list[Problem], check_length: int, ring: tuple[int, int] | None, budget_s: float,
    say: Callable[[str], None] = print, keep: Callable[[dict], None] = lambda report: None, others: bool = True,
) -> dict:  # fmt: skip
    """Everything, within the budget of seconds; the ring after the first kind of problem, at its heads.

    ring: (tokens a rank, ranks). keep is handed the report as it grows. others: whether peers are timed beside ours.
    """
    start, device = time.monotonic(), jax.devices()[0]
    report: dict[str, Any] = {
        "versions": versions(device), "errors": {}, "refused": {}, "tflops": [], "ring": {}, "left_out": [],
    }  # fmt: skip
    say(f"{report['versions']}")
    every = dict(peers(device, names, others))
    found = {name: peer for name, peer in every.items() if not isinstance(peer, str)}
    report["refused"] |= {name: why for name, why in every.items() if isinstance(why, str)}

    def in_time(what: Any) -> bool:
        if time.monotonic() - start <= 0.85 * budget_s:
            return True
        report["left_out"].append(str(what))
        return False

    kinds = itertools.groupby(todo, lambda p: Problem(check_length, p.head_dim, p.heads // p.kv_heads, 1, p.mask))
    for number, (kind, group) in enumerate(kinds):
        right = _check_all(found, kind, report, say) if in_time(f"the check of {kind}") else {}
        keep(report)
        for problem in group:
            if in_time(problem):
                _time_all(right, problem, report, say, keep)
        for name in names if ring and number == 0 else ():
            if name in report["refused"] or not in_time(f"{name} ring") or name not in right:
                continue
            assert ring
            try:
                report["ring"][name] = ring_of_ranks(LOCALS[name](device, None, None), *ring, problem=todo[0])
            except Exception as failure:
                report["refused"][f"{name} ring"] = line(failure)
                continue
            say(f"{name}: a zigzag ring of {ring[1]}, {ring[0]} tokens a rank, over one shot: {report['ring'][name]}")
            keep(report)
    for name, why in report["refused"].items():
        say(f"not measured: {name}: {why}")
    for what in report["left_out"]:
        say(f"left out, for want of time: {what}")
    report["seconds"] = time.monotonic() - start
    keep(report)
    return report


def table(report: dict) -> str:
    """Markdown: a line for each problem, a column for each kernel: forward / backward TFLOP/s, and what auto reaches of
    PyTorch's best; then the rings."""
    rows: dict[tuple, dict[str, tuple[float, float]]] = {}
    for entry in report["tflops"]:
        key = (entry["length"], entry["head_dim"], f"{entry['heads']}/{entry['kv_heads']}", entry["mask"])
        rows.setdefault(key, {})[entry["kernel"]] = entry["forward"], entry["backward"]
    names = list(dict.fromkeys(entry["kernel"] for entry in report["tflops"]))
    heads = [*names, "auto / torch's best"]
    lines = [f"| tokens | D | heads | mask | {' | '.join(heads)} |", "|---" * (4 + len(heads)) + "|"]
    for key, cells in rows.items():
        theirs = [speeds for name, speeds in cells.items() if name.startswith("torch")]
        if theirs and "auto" in cells:
            best = [max(speeds) for speeds in zip(*theirs, strict=True)]
            cells[heads[-1]] = cells["auto"][0] / best[0], cells["auto"][1] / best[1]
        texts = [f"{cells[name][0]:.4g} / {cells[name][1]:.4g}" if name in cells else "" for name in heads]
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(texts)} |")
    for name, shares in report["ring"].items():
        forward, both = f"{shares['forward']:.3f}", f"{shares['both']:.3f}"
        lines += ["", f"Zigzag ring over {name}: {forward} of one shot forward, {both} with its backward."]
    return "\n".join(lines)


def save(report: dict, path: Path, table: Callable[[dict], str] = table) -> None:
    """Both files, each whole at any time: a run that is killed leaves what it had."""
    for file, text in ((path, json.dumps(report, indent=1)), (path.with_suffix(".md"), table(report))):
        new = file.with_name(file.name + ".new")
        new.write_text(text + "\n")
        new.replace(file)
