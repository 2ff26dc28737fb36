"""Passkey retrieval over length and depth: does the model find a number again that it has read?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ringbpt.evaluation.pictures import set_title
from ringbpt.evaluation.score import Encode, Item, Scorer
from ringbpt.evaluation.texts import Haystack, make_passkey
from ringbpt.types import Params


def passkey_items(encode: Encode, length: int, depths: Sequence[float], samples: int, seed: int) -> list[Item]:
    """For each depth `samples` texts of at most `length` tokens, the answer being what is judged."""
    rng, haystack = np.random.default_rng(seed), Haystack("heldout")
    first = len(encode(""))  # a bos is not said again in the middle
    items = []
    for depth in (depth for depth in depths for _ in range(samples)):
        text = make_passkey(haystack, rng, length - 1, depth, lambda text: len(encode(text)))
        prompt = encode(text.before + text.needle + text.after + text.question)
        tokens = np.concatenate([prompt, encode(text.answer)[first:]])[:length]
        items.append(Item(tokens, len(prompt)))
    return items


def passkey_grid(
    scorer: Scorer, params: Params, encode: Encode, lengths: Sequence[int], depths: Sequence[float], samples: int = 4,
    seed: int = 0,
) -> np.ndarray:  # fmt: skip
    """The share of keys found, [lengths, depths]: a key counts when a greedy continuation would be it, to the end."""
    grid = []
    for length in lengths:
        items = passkey_items(encode, length, depths, samples, seed)
        exact = scorer.score(params, items, scorer.row_length(length)).exact
        grid.append(exact.reshape(len(depths), samples).mean(axis=1))
    return np.array(grid)


def draw_grid(file: Path, grid: np.ndarray, lengths: Sequence[int], depths: Sequence[float], title: str) -> None:
    """The heat map as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5.0, 0.8 * len(lengths) + 2.5), 4.0), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid.T, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto", origin="upper")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth of the key")
    set_title(axes, title)
    for (i, j), share in np.ndenumerate(grid):
        axes.text(i, j, f"{100 * share:.0f}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, label="keys found")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, metadata={"Software": None})  # the same picture, the same bytes


def report_passkeys(
    scorer: Scorer, params: Params, encode: Encode, lengths: list[int], depth_count: int, samples: int, seed: int,
    output: Path, model: str,
) -> dict[str, Any]:  # fmt: skip
    """Draws passkey.png, prints the share found at each length, and returns the grid."""
    depths = [float(depth) for depth in np.linspace(0, 1, depth_count)]
    grid = passkey_grid(scorer, params, encode, lengths, depths, samples, seed)
    mesh = ",".join(map(str, scorer.model.mesh.shape.values()))
    draw_grid(output / "passkey.png", grid, lengths, depths, f"{model}\n{samples} keys a cell, mesh {mesh}")
    for length, row in zip(lengths, grid, strict=True):
        print(f"passkey {length:>8,} tokens: {100 * row.mean():.1f} % found")
    return {"lengths": lengths, "depths": depths, "samples": samples, "found": grid.tolist()}
