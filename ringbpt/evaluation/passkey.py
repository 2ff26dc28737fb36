"""Passkey retrieval over length and depth: does the model find a number again that it has read?"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ringbpt.evaluation.score import Curve, Item, Scorer
from ringbpt.evaluation.texts import Haystack, make_passkey
from ringbpt.types import Params

Encode = Callable[[str], np.ndarray]  # text -> ids, with bos where the model is used to one


def passkey_items(
    encode: Encode, lengths: Sequence[int], depths: Sequence[float], samples: int, seed: int
) -> list[Item]:
    """For each length, each depth: `samples` texts of at most that many tokens, the answer being what is judged."""
    rng, haystack = np.random.default_rng(seed), Haystack("heldout")
    items = []
    for length in lengths:
        for depth in depths:
            for _ in range(samples):
                text = make_passkey(haystack, rng, length - 1, depth, lambda text: len(encode(text)))
                prompt = encode(text.before + text.needle + text.after + text.question)
                first = len(encode(""))  # a bos is not said again in the middle
                tokens = np.concatenate([prompt, encode(text.answer)[first:]])[:length]
                items.append(Item(tokens, len(prompt)))
    return items


def passkey_grid(
    scorer: Scorer,
    params: Params,
    encode: Encode,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int = 4,
    seed: int = 0,
) -> np.ndarray:
    """The share of keys found, [lengths, depths]: a key counts when a greedy continuation would be it, to the end."""
    grid = []
    for length in lengths:
        items = passkey_items(encode, [length], depths, samples, seed)
        exact = scorer.score(params, items, scorer.row_length(length)).exact
        grid.append(exact.reshape(len(depths), samples).mean(axis=1))
    return np.array(grid)


def draw_grid(file: Path, grid: np.ndarray, lengths: Sequence[int], depths: Sequence[float], title: str) -> None:
    """The heat map as a PNG."""
    pyplot, figure, axes = _figure(max(5.0, 0.8 * len(lengths) + 2.5), 4.0)
    image = axes.imshow(grid.T, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto", origin="upper")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth of the key")
    axes.set_title(title)
    for i, row in enumerate(grid):
        for j, share in enumerate(row):
            axes.text(i, j, f"{100 * share:.0f}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, label="keys found")
    _save(pyplot, figure, file)


def draw_curve(file: Path, curve: Curve, title: str) -> None:
    """Perplexity by position as a PNG."""
    pyplot, figure, axes = _figure(6.0, 4.0)
    seen = curve.tokens > 0
    middles = (curve.edges[:-1] + curve.edges[1:]) / 2
    axes.plot(middles[seen], np.exp(curve.loss[seen]), marker=".")
    axes.set_xlabel("position in the document, tokens")
    axes.set_ylabel("perplexity")
    axes.set_yscale("log")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    _save(pyplot, figure, file)


def _figure(width: float, height: float) -> tuple[Any, Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), constrained_layout=True)
    return pyplot, figure, axes


def _save(pyplot: Any, figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, metadata={"Software": None})  # the same picture, the same bytes
    pyplot.close(figure)
