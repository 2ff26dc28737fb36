"""A plan: the compiled step's memory, arithmetic, transfers and time, as a dict for JSON, a table and a picture."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ringbpt.config import POLICIES, Config
from ringbpt.evaluation.pictures import set_title
from ringbpt.planning.attention_runs import kernel_of, runs_again
from ringbpt.planning.between_slices import NETWORK, bytes_between
from ringbpt.planning.collectives import collective_bytes
from ringbpt.planning.estimate import attends_again, estimate, step_flops
from ringbpt.planning.overlap import ring_hops
from ringbpt.planning.program import Program, compile_program
from ringbpt.planning.sampling import Sampling, compile_sampling, rows_of_step
from ringbpt.planning.topologies import Topology
from ringbpt.planning.traffic import traffic
from ringbpt.training.memory import ARGUMENTS, closed_form, decided

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """sampling: of rollouts on the same devices, beside the state; None where there are none. pairs: visible ones of a
    batch, where a run has counted them.
    """

    config: Config
    machine: Topology
    program: Program
    sampling: Sampling | None = None
    pairs: float | None = None

    @property
    def total(self) -> int:
        """Bytes of one device, in a step or while rollouts are sampled, whichever are more."""
        return max(self.program.total, self.sampled or 0)

    @property
    def sampled(self) -> int | None:
        """Bytes of one device while rollouts are sampled."""
        kept = sum(count for name, count in self.program.arguments.items() if name != "batch")
        return self.sampling.total + kept if self.sampling else None

    @property
    def fits(self) -> bool:
        return self.machine.memory is None or self.total <= self.machine.memory

    @property
    def verdict(self) -> str:
        return "fits" if self.fits else "too much"

    def as_dict(self) -> dict[str, Any]:
        """The whole report, in what JSON knows; what a program that does not fit cannot say is None."""
        config, machine, program = self.config, self.machine, self.program
        module = program.module
        again = attends_again(config) if module is None else runs_again(module)
        flops = step_flops(config, again, self.pairs)
        report: dict[str, Any] = {
            "model": model_name(config),
            "topology": machine.name,
            "devices": len(machine.devices),
            "mesh": config.mesh_shape._asdict(),
            "rows": config.train_dataset.batch_size,
            "seq_length": config.train_dataset.seq_length,
            "bytes": {
                "arguments": sum(program.arguments.values()),
                "temporaries": program.temporaries,
                "total": program.total,
                "limit": machine.memory,
                "host": program.host,
            },
            "arguments": program.arguments,
            "largest": [asdict(buffer) for buffer in program.largest],
            "closed_form": closed_form(config, machine.platform),
            "sampling": asdict(self.sampling) | {"total": self.sampled} if self.sampling else None,
            "fits": self.fits,
            "flops": asdict(flops),
            **dict.fromkeys(
                (
                    "collectives",
                    "traffic",
                    "ring_overlap",
                    "step_seconds",
                    "tokens_per_second",
                    "mfu",
                    "hop_margin",
                    "exposed_seconds",
                )
            ),
            "assumptions": [],
        }
        if module is None:
            return report
        kinds = collective_bytes(module, config.mesh_shape)
        if machine.slices > 1:
            kinds[NETWORK] = bytes_between(module, machine.slices)
        report["collectives"] = {axis: sum(sizes.values()) for axis, sizes in kinds.items()}
        report["traffic"] = [asdict(flow) for flow in traffic(module, config)]
        if machine.hardware is None:  # a CPU: no schedule, no peaks
            return report
        guess = estimate(config, machine, kinds, ring_hops(module), kernel_of(module), again, self.pairs)
        found = guess.bracket
        report["ring_overlap"] = {"hops": guess.hops, "hidden": guess.hidden, "exposed": guess.hops - guess.hidden}
        tokens = config.train_dataset.batch_size * config.train_dataset.seq_length
        full = machine.hardware.bf16_tflops * 1e12 * len(machine.devices)
        return report | {
            "step_seconds": [found.low, found.high],
            "tokens_per_second": [tokens / found.high, tokens / found.low],
            "mfu": [flops.model / found.high / full, flops.model / found.low / full],
            "hop_margin": min((margin for margin in found.margins if margin is not None), default=None),
            "exposed_seconds": list(found.exposed),
            "assumptions": guess.assumptions,
        }


def model_name(config: Config) -> str:
    """What the run's flags call the model, and its sizes: "7b, 32 layers of 4,096"."""
    architecture, path = config.architecture, config.load_checkpoint.rpartition("::")[2]
    name = path.rstrip("/").rpartition("/")[2] or config.load_llama_config
    return ", ".join(filter(None, (name, f"{architecture.num_hidden_layers} layers of {architecture.hidden_size:,}")))


def make_plan(config: Config, machine: Topology) -> Plan:
    if config.objective in POLICIES:
        data = config.train_dataset
        rows = {data.group: replace(data.source, batch_size=rows_of_step(config))}
        config = replace(config, train_dataset=replace(data, **rows))
    config = decided(config, machine.platform, machine.memory)
    samples = config.objective in POLICIES and not config.rollout.servers
    sampling = compile_sampling(config, machine) if samples else None  # the quicker refusals first
    return Plan(config, machine, compile_program(config, machine), sampling)


def _temporaries(report: dict[str, Any]) -> dict[str, int]:
    """The closed form's part of what is neither a parameter nor the optimizer's; {} where there is none."""
    return {name: n for name, n in (report["closed_form"] or {}).items() if name not in ARGUMENTS}


def size(count: float) -> str:
    """12345678 -> "11.8 MiB"."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def table(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    sizes, mesh = report["bytes"], ",".join(str(n) for n in report["mesh"].values())
    limit = sizes["limit"]
    lines = [
        f"model   {report['model']}",
        f"plan    {report['rows']} x {report['seq_length']:,} tokens a step on {report['topology']} "
        f"({report['devices']} devices), mesh dp,fsdp,tp,sp = {mesh}",
        "",
        f"{'memory of one device':<34}{'compiled':>12}{'closed form':>14}",
    ]
    formula, working = report["closed_form"] or {}, _temporaries(report)
    guessed = {
        "parameters": sum(formula.get(name, 0) for name in ARGUMENTS if name != "optimizer"),
        "optimizer state": formula.get("optimizer", 0),
        "temporaries": sum(working.values()),
        "total": sum(formula.values()),
    }
    for name, count in (report["arguments"] | {name: sizes[name] for name in ("temporaries", "total")}).items():
        known = size(guessed[name]) if formula and name in guessed else ""
        lines.append(f"  {name:<32}{size(count):>12}{known:>14}")
    if sizes["host"]:
        lines.append(f"  {'in the host memory':<32}{size(sizes['host']):>12}")
    most = sizes["total"]
    if sampling := report["sampling"]:
        most = max(most, sampling["total"])
        lines += ["", f"while it samples, {sampling['rows']} prompts of {sampling['prompt']:,} tokens at a time"]
        lines += [f"  {name:<32}{size(sampling[name]):>12}" for name in ("weights", "cache", "working", "total")]
    if limit is not None:
        left = limit - most
        verdict = f"fits, {size(left)} left" if report["fits"] else f"does not fit: {size(-left)} too much"
        lines.append(f"  {'of':<32}{size(limit):>12}   {verdict}")
    if formula:
        lines += ["", "what the temporaries are for, by the closed form"]
        lines += [f"  {name:<32}{size(count):>12}" for name, count in working.items()]
    if report["largest"]:
        lines += ["", "largest temporaries"]
        for buffer in report["largest"]:
            lines.append(f"  {size(buffer['bytes']):>12}  {buffer['shape']:<32} {buffer['made_by'][-60:]}")
    flops = report["flops"]
    lines += [
        "",
        f"arithmetic   {flops['model']:.3g} FLOPs a step, {flops['attention'] / flops['model']:.0%} of it attention; "
        f"computed again: {flops['recompute']:.3g}",
    ]
    if report["collectives"] is not None:
        sent = ", ".join(f"{axis} {size(count)}" for axis, count in sorted(report["collectives"].items()))
        lines.append(f"transfers    a device sends a step: {sent or 'nothing'}")
        for flow in report["traffic"]:
            if flow["sent"] >= 2**20:
                must = f" of {size(flow['least'])} at least" if flow["least"] else ""
                lines.append(f"               {flow['what']}, {flow['way']}: {size(flow['sent'])}{must}")
    if report["ring_overlap"]:
        hops = report["ring_overlap"]
        margin = f"; a hop's computation is {report['hop_margin']:.1f} x its transfer" if report["hop_margin"] else ""
        lines.append(f"ring         {hops['hops']} hops, {hops['hidden']} hidden, {hops['exposed']} exposed{margin}")
        least, most = report["exposed_seconds"]
        lines.append(
            f"exposed      {least:.3g} to {most:.3g} s a step of waiting for a ring, for all-to-alls or for late sums"
        )
    if report["step_seconds"]:
        (low, high), (slow, fast) = report["step_seconds"], report["tokens_per_second"]
        worst, best = report["mfu"]
        lines.append(
            f"time         {low:.3g} to {high:.3g} s a step, {slow:,.0f} to {fast:,.0f} tokens/s, "
            f"MFU {worst:.0%} to {best:.0%}, if"
        )
        lines += [f"               {line}" for line in report["assumptions"]]
    return "\n".join(lines)


def suggestion(flags: str, plan: Plan) -> str:
    """One line for a change: what it needs, and how long a step would take."""
    report = plan.as_dict()
    seconds = report["step_seconds"]
    time = f"{seconds[0]:.3g} to {seconds[1]:.3g}" if seconds else ""
    host = f", {size(plan.program.host)} on the host" if plan.program.host else ""
    waits = report["exposed_seconds"]
    exposed = f", {waits[1]:.2g} s exposed" if waits and waits[1] else ""
    return f"  {flags:<50}{size(plan.total):>12}  {time:>16}  {plan.verdict}{host}{exposed}"


def draw(report: dict[str, Any], path: Path) -> None:
    """One bar: the closed form's shares of the temporaries scaled to what the compiler allocated, up to the limit."""
    from matplotlib.figure import Figure

    sizes, named = report["bytes"], {name: count for name, count in _temporaries(report).items() if count}
    scale = sizes["temporaries"] / sum(named.values()) if named else 0
    scaled = {name: count * scale for name, count in named.items()} or {"temporaries": sizes["temporaries"]}
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    left = 0.0
    for name, count in (report["arguments"] | scaled).items():
        axes.barh(0, count / GIB, left=left, label=f"{name} {size(count)}")
        left += count / GIB
    if sizes["limit"]:
        axes.axvline(sizes["limit"] / GIB, color="black", linestyle="--", label=f"limit {size(sizes['limit'])}")
    axes.set_yticks([])
    axes.set_xlabel("GiB of one device")
    mesh = ",".join(str(n) for n in report["mesh"].values())
    set_title(
        axes,
        f"{report['model']}: {report['rows']} x {report['seq_length']:,} tokens\n"
        f"{report['topology']}, mesh dp,fsdp,tp,sp = {mesh}: {size(sizes['total'])}",
    )
    # Outside of the axes, where the layout makes room for it, however many lines it has.
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
