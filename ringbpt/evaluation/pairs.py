"""How sure a reward model is of the pairs of held-out data, and how sure it may be: rewards.png."""

from pathlib import Path

import jax
import numpy as np

from ringbpt.evaluation.pictures import set_title
from ringbpt.types import Mean


def draw_pictured(folder: Path, means: dict[str, Mean], step: int) -> None:
    """Takes what an objective has pictured out of the means of held-out data, on the host, and draws it in `folder`."""
    found = means.pop("probabilities", None)
    if found is not None and found.weight and jax.process_index() == 0:
        draw_probabilities(folder / "rewards.png", np.asarray(found.total), f"{folder.name}\nstep {step:,}")


def reliability(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """(probabilities, how often what had them was so, the expected calibration error) of a histogram over 0..1.

    A pair with probability p that its chosen answer is better says 1 - p of the other one: so each bin above 1/2 and
    its mirror image below are one statement, right so often as the upper one's share of both. NaN where nothing stands.
    """
    half = len(counts) // 2
    right, wrong = counts[half:], counts[:half][::-1]
    said, total = (np.arange(half, len(counts)) + 0.5) / len(counts), right + wrong
    with np.errstate(invalid="ignore"):
        seen = right / total
    error = np.nansum(np.abs(seen - said) * total) / max(total.sum(), 1)
    return said, seen, float(error)


def draw_probabilities(file: Path, counts: np.ndarray, title: str) -> None:
    """A histogram over 0..1 of the probability that a pair's chosen answer is the better one, and its reliability."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    edges = np.linspace(0, 1, len(counts) + 1)
    left.bar(edges[:-1], counts, np.diff(edges), align="edge", edgecolor="white")
    left.axvline(0.5, color="grey", linewidth=1)
    left.set_xlabel("probability that the chosen answer is better")
    left.set_ylabel("pairs")
    said, seen, error = reliability(counts)
    right.plot([0.5, 1], [0.5, 1], color="grey", linewidth=1)
    right.plot(said, seen, marker=".")
    right.set_xlabel("probability of the answer with the higher score")
    right.set_ylabel("share in which it is the chosen one")
    right.set_ylim(-0.02, 1.02)
    set_title(left, title)
    set_title(right, f"expected calibration error {error:.3f}\n{int(counts.sum()):,} pairs held out")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, metadata={"Software": None})
