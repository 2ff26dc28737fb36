"""The largest value that still fits, in few compiles: memory is close to linear in what is searched for."""

from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from ringbpt.config import Config, UserError, nearest_name, parse
from ringbpt.planning.report import Plan, make_plan, size
from ringbpt.planning.topologies import Topology

SEARCHABLE = ("seq_length", "batch_size", "sp")
CLOSE = 1.04
MOST_COMPILES = 12


Say = Callable[[str], None]


def find(
    tree: ConfigDict, machine: Topology, what: str, say: Say, close: float = CLOSE, most_compiles: int = MOST_COMPILES
) -> Plan:
    """The plan of the largest seq_length or batch_size, or the smallest sp (fsdp takes the rest), that fits.

    close: the search ends when what fits and what does not are this close, or after most_compiles. The sequence grows
    in steps that the mesh, the layout and the chunks divide. Raises UserError where nothing fits.
    """
    if what not in SEARCHABLE:
        raise UserError(
            f"--find={what} is none of {', '.join(SEARCHABLE)}: did you mean --find={nearest_name(what, SEARCHABLE)}?"
        )
    if machine.memory is None:
        raise UserError(f"--find={what}: a CPU's memory has no limit that is known: plan for a TPU or a GPU")
    start = parse(tree, len(machine.devices))
    if what == "sp":
        return _smallest_sp(tree, machine, start, say)
    source = f"{start.train_dataset.type}_dataset"
    unit, first = _unit(start, what)

    def plan(units: int) -> Plan:
        tree.train_dataset[source][what] = units * unit
        if what == "seq_length":
            tree.llama.max_sequence_length = max(units * unit, start.architecture.max_sequence_length)
        return _tried(f"{what}={units * unit:,}", parse(tree, len(machine.devices)), machine, say)

    return _largest(plan, first, machine.memory, close, most_compiles)


def _tried(what: str, config: Config, machine: Topology, say: Say) -> Plan:
    made = make_plan(config, machine)
    say(f"{what}: {size(made.total)} of {size(machine.memory or 0)}, {made.verdict}")
    return made


# What may make it fit or go faster, as the flags that one would add; several of one line go together.
CHANGES: tuple[dict[str, Any], ...] = (
    {"llama.remat_block": "save_attention"},
    {"llama.remat_block": "nothing_saveable"},
    {"llama.scan_mlp": True},
    {"llama.residual_over_tp": True},
    {"llama.kv_heads_at_a_time": 1},
    {"llama.remat_block": "offload_inputs"},
    {"optimizer.offload_state": True},
    {"optimizer.offload_state": True, "optimizer.offload_params": True},
    {
        "llama.remat_block": "offload_inputs",
        "llama.residual_over_tp": True,
        "llama.kv_heads_at_a_time": 1,
        "optimizer.offload_state": True,
        "optimizer.offload_params": True,
    },
    {"llama.loss_chunk_size": 512},
    {"llama.ring_bidirectional": True},
    {"llama.sequence_layout": "zigzag"},
    {"llama.sequence_parallel": "auto"},
    {"llama.gathered_weights": "keep"},
)


def suggest(tree: ConfigDict, machine: Topology) -> Iterator[tuple[str, Plan]]:
    """(the flags to add, the plan with them), for each change that is one and that the model and the mesh allow."""
    current = parse(tree, len(machine.devices))
    for change in CHANGES:
        changed = tree.copy_and_resolve_references()
        for name, value in change.items():
            group, leaf = name.split(".")
            changed[group][leaf] = value
        try:
            config = parse(changed, len(machine.devices))
        except UserError:
            continue
        _, fsdp, tp, sp = config.mesh_shape
        idle = (
            (config.execution.residual_over_tp and tp == 1)
            or (sp == 1 and any(name.startswith(("llama.ring", "llama.sequence")) for name in change))
            or (fsdp * sp == 1 and "llama.gathered_weights" in change)
        )
        if config != current and not idle:
            yield " ".join(f"--{name}={value}" for name, value in change.items()), make_plan(config, machine)


def _unit(config: Config, what: str) -> tuple[int, int]:
    """(the step by which the value grows, how many of them to begin with)."""
    dp, fsdp, _, sp = config.mesh_shape
    if what == "batch_size":
        unit = dp * fsdp * config.optimizer.accumulate_gradient_steps
        return unit, max(1, config.train_dataset.batch_size // unit)
    execution = config.execution
    # A device's tokens: whole chunks, and an even number of them (zigzag).
    chunk = max(execution.loss_chunk_size, execution.scan_mlp_chunk_size if execution.scan_mlp else 1, 2)
    return sp * chunk, max(1, config.train_dataset.seq_length // (sp * chunk))


def _largest(plan: Callable[[int], Plan], first: int, memory: int, close: float, most_compiles: int) -> Plan:
    """By the straight line through what is known, kept inside the bracket; the best plan that fits."""
    known: dict[int, Plan] = {}
    units = first
    for _ in range(most_compiles):
        known[units] = plan(units)
        fitting = [n for n, made in known.items() if made.fits]
        failing = [n for n, made in known.items() if not made.fits]
        low, high = max(fitting, default=0), min(failing, default=None)
        if high is not None and (high - low <= 1 or (low and high / low <= close)):
            break
        guess = _line(known, memory)
        if high is None:
            if low and guess <= low * close:
                break  # what is known fills the memory
            units = min(max(guess, low + 1), low * 8)
        else:
            units = min(max(guess, low + 1), high - 1)
    if not fitting:
        raise UserError(
            f"nothing fits: even the smallest that was tried needs {size(known[min(known)].total)} of "
            f"{size(memory)}: use more devices, --llama.remat_block=nothing_saveable, or offload"
        )
    return known[max(fitting)]


def _line(known: dict[int, Plan], memory: int) -> int:
    """Where the line through the two values nearest to the limit meets it; with one alone, in proportion."""
    nearest = sorted(known, key=lambda n: abs(known[n].total - memory))[:2]
    totals = [known[n].total for n in nearest]
    if len(nearest) == 1 or totals[0] == totals[1]:
        fixed = sum(known[nearest[0]].program.arguments.values())
        grows = max(totals[0] - fixed, 1)
        return int(nearest[0] * max(memory - fixed, 1) / grows * 0.98)
    slope = (totals[1] - totals[0]) / (nearest[1] - nearest[0])
    if slope <= 0:
        return nearest[0] + 1
    return int(nearest[0] + (memory - totals[0]) / slope - 0.01 * nearest[0])


def _smallest_sp(tree: ConfigDict, machine: Topology, start: Config, say: Say) -> Plan:
    """sp = 1, 2, 4 ...; what is left of the devices, dp and tp aside, is fsdp's."""
    dp, _, tp, _ = start.mesh_shape
    rest = len(machine.devices) // (dp * tp)
    refused: UserError | None = None
    for sp in (n for n in range(1, rest + 1) if rest % n == 0 and n & (n - 1) == 0):
        tree.mesh_dim = f"{dp},{rest // sp},{tp},{sp}"
        tree.llama.mesh_dim = None
        try:
            config = parse(tree, len(machine.devices))
        except UserError as error:
            say(f"sp={sp}: {error}")
            refused = error
            continue
        made = _tried(f"sp={sp}", config, machine, say)
        if made.fits:
            return made
    raise refused or UserError("no sp fits: a shorter --train_dataset.*.seq_length, or a larger --topology, would")
