"""What the pictures have in common: titles that are never cut off, and numbers on axes that are read at a glance."""

import textwrap
from typing import Any


def set_title(axes: Any, title: str) -> None:
    """The lines of a title, each broken where the picture ends: in the midst of a path too, which has no spaces."""
    columns = int(axes.figure.get_size_inches()[0] * 9)  # of 12 points, and some room
    lines = (textwrap.wrap(line, columns) or [""] for line in title.splitlines())
    axes.set_title("\n".join("\n".join(broken) for broken in lines))


def thousands(axis: Any) -> None:
    """12,000 on an axis, and whole numbers alone."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def plain_log(axis: Any) -> None:
    """On a logarithmic axis numbers as one would write them, also where it has no power of ten."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    low, high = axis.get_view_interval()
    if high / low < 20:
        axis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
