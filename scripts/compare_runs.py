"""Curves of several runs in one picture, and how far they part.

  python scripts/compare_runs.py --run=runs/a,runs/b [--run=runs/c,runs/d] [--key=loss] [--output=curves.png]

Of each run its metrics.jsonl is read; each --run is a panel of the picture, and runs whose names differ in a last
-NUMBER (seeds) have one colour. Printed is of each run its last number, and how far it is, relative to it, from the
panel's first run, at the most, over the steps that both have.
"""

import re
import sys
from pathlib import Path
from typing import Any

from ringbpt.config import Flag, UserError, check_writable, printed_help, read_flags, run_main, user_path

FLAGS = {
    "run": Flag(list, [], "runs' folders, in one panel", required=True),
    "key": Flag(str, "loss", "of the rows of metrics.jsonl: loss, eval_loss, eval_rewards/accuracies, ..."),
    "output": Flag(str, "curves.png", "the picture"),
    "title": Flag(str, "", "over the picture; empty: the key"),
}


def curve_of(text: str, key: str) -> tuple[str, dict[int, float]]:
    """(the run's name, its numbers by step)."""
    from ringbpt.training.metrics import read_rows

    folder = user_path(text)
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"--run={text}: no metrics.jsonl there: give a run's folder, as runs/<run>")
    curve = {row["step"]: row[key] for row in read_rows(folder / "metrics.jsonl") if row.get(key) is not None}
    if not curve:
        raise UserError(f"--key={key}: {folder} has no row with it: loss is one that it has")
    return folder.name, curve


def draw(panels: list[dict[str, dict[int, float]]], key: str, title: str, output: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ringbpt.evaluation.pictures import thousands

    figure = Figure(figsize=(max(8, 5 * len(panels)), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: list[Any] = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, curves in zip(axes, panels, strict=True):
        colors: dict[str, str] = {}
        for number, (name, curve) in enumerate(curves.items()):
            family = re.sub(r"-\d+$", "", name)
            label = None if family in colors else family
            color = colors.setdefault(family, f"C{len(colors)}")
            dashed = "--" if number and len(curves) == 2 else "-"  # where one hides the other
            axis.plot(list(curve), list(curve.values()), dashed, color=color, label=label, linewidth=1.5, alpha=0.8)
        axis.set_xlabel("step")
        axis.set_ylabel(key)
        thousands(axis.xaxis)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    figure.savefig(output, dpi=120)


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    args = read_flags(argv, FLAGS)
    output, key = user_path(args["output"]), args["key"]
    check_writable("--output", output, folder=False)
    panels = [dict(curve_of(text, key) for text in texts.split(",")) for texts in args["run"]]
    for curves in panels:
        first = next(iter(curves.values()))
        for name, curve in curves.items():
            both = first.keys() & curve.keys()
            apart = max((abs(curve[step] - first[step]) / max(abs(first[step]), 1e-30) for step in both), default=0.0)
            print(f"{name}: {list(curve.values())[-1]:.6g} at step {max(curve)}; {apart:.1e} from the first")
    draw(panels, key, args["title"] or key, output)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
