"""A run held against its plan: `python -m ringbpt.plan ... --check_run=RUN/metrics.jsonl`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ringbpt.config import UserError
from ringbpt.config.foreign import MIB, read_file, strict_json

MOST_BYTES = 256 * MIB  # of a metrics.jsonl: half a million rows
MEMORY_WITHIN = 0.05  # of what the compiler says


@dataclass(frozen=True)
class Check:
    """A figure that was measured, and between which the plan has it; measured None: the run says nothing of it."""

    name: str
    measured: float | None
    low: float
    high: float

    @property
    def inside(self) -> bool | None:
        return None if self.measured is None else self.low <= self.measured <= self.high

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        if self.inside:
            return "inside"
        bound = self.low if self.measured < self.low else self.high
        return f"outside, by {abs(self.measured / bound - 1):.0%}"


def read_run(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl that have a speed; a line that is no whole row is left out, as a kill leaves one.

    Raises UserError where there is none, with the path.
    """
    timed = []
    for line in read_file(path, MOST_BYTES, f"--check_run={path}").split(b"\n"):
        try:
            row = strict_json(line, f"--check_run={path}")
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and _number(row.get("step_seconds")):
            timed.append(row)
    if not timed:
        raise UserError(
            f"--check_run={path} has no row with step_seconds, as a run's metrics.jsonl has from its second step on: "
            "a run with --total_steps=10 --log_freq=1 writes some"
        )
    return timed


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def typical(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """The median of what the rows say, of steps as they mostly were."""
    found = [float(row[key]) for row in rows if _number(row.get(key))]
    return median(found) if found else None


def check(report: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[Check]:
    """Step time, tokens/s, MFU and peak memory of a run beside those of a plan's report.

    Raises UserError for a plan that has no bracket: of a CPU, or of a step that does not fit.
    """
    if report["step_seconds"] is None:
        why = "does not fit" if not report["fits"] else "is for a machine whose speed nobody knows"
        raise UserError(f"--check_run: the plan {why}: name the run's machine and its flags, as --topology=8xh100")
    found = [
        Check(name, typical(rows, key), *report[bracket])
        for name, key, bracket in (
            ("seconds a step", "step_seconds", "step_seconds"),
            ("tokens/s", "tokens_per_second", "tokens_per_second"),
            ("MFU", "mfu", "mfu"),
        )
    ]
    peaks = [float(row["device_memory_bytes"]) for row in rows if _number(row.get("device_memory_bytes"))]
    planned = report["bytes"]["total"] / 2**30
    low, high = planned * (1 - MEMORY_WITHIN), planned * (1 + MEMORY_WITHIN)
    return [*found, Check("peak memory, GiB", max(peaks) / 2**30 if peaks else None, low, high)]


def checked(found: Sequence[Check], steps: int) -> str:
    """One line a figure."""
    lines = [f"{f'the run, {steps} rows':<24}{'measured':>14}{'plan':>26}"]
    for each in found:
        measured = "" if each.measured is None else f"{each.measured:.4g}"
        lines.append(f"  {each.name:<22}{measured:>14}{f'{each.low:.4g} to {each.high:.4g}':>26}   {each.verdict}")
    return "\n".join(lines)
