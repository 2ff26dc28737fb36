"""What is looked at in a picture without looking at it."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Figure, Path]]:
    """(figure, file) of each picture that is saved from now on."""
    found: list[tuple[Figure, Path]] = []
    save = Figure.savefig
    spy = lambda figure, path, **how: found.append((figure, path)) or save(figure, path, **how)
    monkeypatch.setattr(Figure, "savefig", spy)
    return found


def cut_off(figure: Figure) -> list[str]:
    """The titles, labels and lines of legends that reach beyond the picture."""
    figure.draw_without_rendering()
    legends = [*figure.legends, *filter(None, (axes.get_legend() for axes in figure.axes))]
    texts = [text for legend in legends for text in legend.get_texts()]
    for axes in figure.axes:
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    width, height = figure.bbox.size + 1  # of a pixel
    return [text for text, box in boxes if box.x0 < -1 or box.y0 < -1 or box.x1 > width or box.y1 > height]
