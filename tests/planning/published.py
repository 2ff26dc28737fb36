"""Published training runs of others, as data, and what the plan's own cost model says of them.

    python -m tests.planning.published            # every run: measured, bracket, inside or not
    python -m tests.planning.published --memory   # peaks beside ours, compiled: minutes, and the compilers for GPUs

What a run's page says (model, mesh, rows, what is computed again, what waits in the host's memory) is counted here by
hand, where a plan reads it off its own compiled program; the shares of peak, the rates and the sum are the plan's.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ringbpt import hardware
from ringbpt.config import Architecture, parse, parse_args
from ringbpt.dims import MeshShape
from ringbpt.hardware import Hardware
from ringbpt.model.flops import forward_flops
from ringbpt.planning.program import compile_program
from ringbpt.planning.step_time import BACKWARD, Bracket, Pass, Work, bracket
from ringbpt.planning.topologies import topology
from ringbpt.rates import Links

FILE = Path(__file__).with_name("published_runs.json")
COMPUTE_BYTES, SUM_BYTES, ADAM_BYTES = 2, 4, 8  # of a number: bf16, float32, Adam's two moments


@dataclass(frozen=True)
class Run:
    """One published run. again: what its backward computes once more. offloaded: what waits in the host's memory."""

    table: str
    source: str
    model: str
    topology: str
    mesh: MeshShape
    rows: int
    seq_length: int
    seconds: float
    kernel: str
    again: tuple[str, ...]
    fit: bool
    architecture: Architecture
    strategy: str = "ring"
    offloaded: str = ""
    peak_tflops: float | None = None
    peak_gib: float | None = None
    note: str = ""

    @cached_property
    def known(self) -> Hardware:
        name = self.topology.rpartition("-")[0] if self.topology.startswith("v") else self.topology.rpartition("x")[2]
        found = hardware.find(name)
        assert found, self.topology
        return replace(found, bf16_tflops=self.peak_tflops) if self.peak_tflops else found

    @property
    def links(self) -> Links:
        return Links(self.known, 8 if self.known.platform == "gpu" else self.devices)

    @property
    def devices(self) -> int:
        return math.prod(self.mesh)

    @cached_property
    def work(self) -> Work:
        """What one device does in a step."""
        a, tokens = self.architecture, self.rows * self.seq_length
        pairs = self.rows * self.seq_length * (self.seq_length + 1) / 2
        dense = forward_flops(a, tokens, 0)
        attention = (forward_flops(a, tokens, pairs) - dense) / self.devices
        passes = [self._pass(attention, COMPUTE_BYTES), self._pass(BACKWARD * attention, COMPUTE_BYTES + SUM_BYTES)]
        if "attention" in self.again:
            passes.append(passes[0])
        sp = self.mesh.sp
        ulysses = self.strategy == "ulysses"
        meanwhile, after = self._host()
        return Work(
            passes=passes,
            dense=(3 * dense + sum(self._again(name) for name in self.again)) / self.devices,
            hop_rate=self.links.neighbour(1, sp),
            waits=self._over(self._dealt(), self.links.all_to_all(1, sp)) if ulysses else (0.0, 0.0),
            others=self._over(self._weights(), self.links.collective(self.mesh.tp, self.mesh.fsdp * sp)),
            meanwhile=meanwhile,
            after=after,
        )

    @staticmethod
    def _over(size: float, rate: tuple[float, float]) -> tuple[float, float]:
        return size / rate[0], size / rate[1]

    @property
    def _device_tokens(self) -> float:
        return self.rows * self.seq_length / (self.mesh.row_shards * self.mesh.sp)

    def _pass(self, flops: float, itemsize: int) -> Pass:
        a, n = self.architecture, self.mesh.sp
        if n == 1 or self.strategy != "ring":
            return Pass(flops)
        keys = 2 * self._device_tokens * a.num_key_value_heads / self.mesh.tp * a.head_dim
        return Pass(flops, behind=a.num_hidden_layers * (n - 1) * keys * itemsize, share_behind=(n - 1) / n)

    def _dealt(self) -> float:
        """Bytes of ulysses' all-to-alls, forward and backward, with a forward again where attention is."""
        a, n, c = self.architecture, self.mesh.sp, COMPUTE_BYTES
        heads = (5 * c + SUM_BYTES) * a.num_attention_heads + (4 * c + 2 * SUM_BYTES) * max(a.num_key_value_heads, n)
        forward = (
            c * (2 * a.num_attention_heads + 2 * max(a.num_key_value_heads, n)) if "attention" in self.again else 0
        )
        return a.num_hidden_layers * self._device_tokens * a.head_dim * (heads + forward) * (n - 1) / n

    def _numbers(self) -> float:
        a = self.architecture
        return (forward_flops(a, 1, 0) / 2 + a.hidden_size * a.vocab_size) / self.mesh.tp

    def _weights(self) -> float:
        """Bytes of weights gathered for the forward and for the backward, and of their gradients reduced, once each."""
        return self._numbers() * (2 * COMPUTE_BYTES + SUM_BYTES)

    def _again(self, what: str) -> float:
        """FLOPs of what the backward computes once more, all devices together."""
        a, tokens = self.architecture, self.rows * self.seq_length
        of_one = 2.0 * tokens * a.num_hidden_layers * a.hidden_size * a.head_dim
        feedforward = 2.0 * tokens * a.num_hidden_layers * 3 * a.hidden_size * a.intermediate_size
        projections = of_one * 2 * (a.num_attention_heads + a.num_key_value_heads)
        return {
            "attention": 0.0,  # a pass of its own
            "projections": projections,
            "output projection": of_one * a.num_attention_heads,
            "feedforward": feedforward * 2 / 3,
            "output of the feedforward": feedforward / 3,
            "logits": 2.0 * tokens * a.hidden_size * a.vocab_size,
            "half of the products": (projections + feedforward) / 2,
        }[what]

    def _host(self) -> tuple[float, float]:
        """(bytes during the computation, in the update) that one device exchanges with the host."""
        a, share = self.architecture, self._numbers() * self.mesh.tp / self.devices
        activations = 2 * COMPUTE_BYTES * self._device_tokens * a.num_hidden_layers
        meanwhile = after = 0.0
        meanwhile += activations * a.hidden_size * ("inputs" in self.offloaded)
        meanwhile += activations * a.num_attention_heads * a.head_dim * ("attention" in self.offloaded)
        meanwhile += share * SUM_BYTES * 3 * ("weights" in self.offloaded)
        after += share * SUM_BYTES * 2 * ("weights" in self.offloaded)
        after += share * ADAM_BYTES * 2 * ("optimizer" in self.offloaded)
        return meanwhile, after

    @property
    def bracket(self) -> Bracket:
        return bracket(self.work, self.known, self.kernel, self.architecture.head_dim)

    @property
    def inside(self) -> bool:
        return self.bracket.low <= self.seconds <= self.bracket.high

    @property
    def flags(self) -> list[str]:
        """Of the same step here, where layers' inputs wait on the host and all else is computed again, as there."""
        assert self.offloaded == "inputs" and len(self.again) == 3, self
        sizes = {name: n for name, n in asdict(self.architecture).items() if n != getattr(Architecture(), name)}
        sizes |= {"max_sequence_length": self.seq_length, "sequence_parallel": self.strategy, "scan_mlp": True}
        sizes |= {"attention_type": "ring_blockwise", "remat_block": "offload_inputs"}
        data = {"seq_length": self.seq_length, "batch_size": self.rows}
        return [
            *(f"--llama.{name}={value}" for name, value in sizes.items()),
            *(f"--train_dataset.json_dataset.{name}={value}" for name, value in data.items()),
            "--dtype=bf16",
            f"--mesh_dim={','.join(map(str, self.mesh))}",
        ]


def published() -> list[Run]:
    data: dict[str, Any] = json.loads(FILE.read_text())
    models = {name: Architecture(**sizes) for name, sizes in data["models"].items()}
    return [
        Run(
            **{**row, "mesh": MeshShape(*row["mesh"]), "again": tuple(row["again"])},
            architecture=models[row["model"]],
        )
        for row in data["runs"]
    ]


def table(runs: list[Run]) -> str:
    """One line a run."""
    lines = [f"{'run':<66}{'measured, s':>12}{'bracket':>20}{'wide':>7}"]
    for run in runs:
        found = run.bracket
        name = f"{run.topology} {run.model}, {run.rows} x {run.seq_length:,}"
        verdict = "" if run.inside else "   outside"
        lines.append(
            f"{name:<66}{run.seconds:>12.4g}{f'{found.low:.4g} to {found.high:.4g}':>20}{found.high / found.low:>7.2f}"
            f"   {'fitted' if run.fit else 'left out'}{verdict}"
        )
    return "\n".join(lines)


def summary(runs: list[Run]) -> str:
    inside, widest = sum(run.inside for run in runs), max(run.bracket.high / run.bracket.low for run in runs)
    return f"{inside} of {len(runs)} inside; the widest bracket is {widest:.2f} x"


def memory(runs: list[Run]) -> str:
    """One line a run whose page gives its peak: that, ours as compiled, and their ratio."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    lines = [f"{'run':<40}{'peak, GiB':>11}{'ours':>8}{'ours / theirs':>15}"]
    for run in runs:
        name = f"{run.topology} {run.model}, {run.rows} x {run.seq_length:,}"
        if run.offloaded == "inputs":
            ours = compile_program(parse(parse_args(run.flags), run.devices), topology(run.topology)).total / 2**30
            lines.append(f"{name:<40}{run.peak_gib:>11}{ours:>8.1f}{ours / (run.peak_gib or 0):>15.2f}")
        else:
            lines.append(f"{name:<40}{run.peak_gib:>11}   keeps what no policy of ours does")
    return "\n".join(lines)


if __name__ == "__main__":
    every = published()
    if sys.argv[1:] == ["--memory"]:
        print(memory([run for run in every if run.peak_gib]))
        sys.exit()
    print(table(every))
    for what, chosen in (("fitted", True), ("left out", False)):
        print(f"{what}: {summary([run for run in every if run.fit is chosen])}")
