"""A picture of blocks over epochs, coloured by learning rate; needs matplotlib, and leaves pyplot alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import ceil, log
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

Span = tuple[int, int, float | None]
"""From one epoch up to another, not inclusive, at a learning rate; None where the optimizer has none."""

_FROZEN, _NO_RATE, _QUIET = "#e8e8e8", "#9a9a9a", "#707070"
_MOST_LABELS = 60  # more names than these cannot be read beside each other
_LONGEST = 40  # characters of a name
_MOST_TICKS = 8  # of epochs, where not each change can have one
_MOST_RATES = 10  # beside the colour bar
_LABEL_HEIGHT = 0.19  # inches that a tick label of the colour bar takes
_DIGIT_WIDTH = 0.09  # likewise, of a label below


def save_chart(
    path: Path,
    rows: Sequence[tuple[str, Sequence[Span]]],
    limits: tuple[int, int],
    edges: Sequence[int],
    marked: Sequence[int],
) -> None:
    """Draw rows into a file of their own.

    Args:
        path: Where to; its suffix says in which format.
        rows: Names and what is coloured of them, from top to bottom; the rest is frozen.
        limits: Epochs at which the picture begins and ends.
        edges: Epochs at which something changes, ascending; they get a tick if there is room.
        marked: Epochs that get a dashed line.

    Raises:
        OSError: It cannot be written.
    """
    figure = Figure(figsize=(8.5, min(max(1.2 + 0.3 * len(rows), 2.6), 12)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    draw_rows(figure, axes, rows, limits, edges)
    for epoch in marked:
        axes.axvline(epoch, color="#303030", linewidth=1, linestyle=(0, (3, 2)), clip_on=False)
    axes.set_xlabel("epoch (0-based)")
    axes.set_ylabel("block, deepest on top")
    room = (figure.get_figwidth() - 2.5) / (limits[1] - limits[0])
    digits = _DIGIT_WIDTH * (len(str(edges[-1])) + 1)
    fits = all((after - before) * room > digits for before, after in pairwise(edges))
    round_ones = MaxNLocator(_MOST_TICKS, integer=True, steps=[1, 2, 5, 10])
    axes.xaxis.set_major_locator(FixedLocator(edges) if fits else round_ones)
    axes.xaxis.set_major_formatter(lambda epoch, _: f"{epoch:.0f}")
    notes = ["grey: frozen"]
    if any(rate is None for _, spans in rows for *_, rate in spans):
        notes.append("dark grey: trained, without a learning rate")
    if marked:
        notes.append("dashed: not by the schedule")
    axes.set_title("; ".join(notes), loc="right", color=_QUIET, fontsize=8)
    figure.savefig(path, format=path.suffix[1:].lower())


def draw_rows(
    figure: Figure,
    axes: Axes,
    rows: Sequence[tuple[str, Sequence[Span]]],
    limits: tuple[int, int],
    edges: Iterable[int],
) -> None:
    """Draw rows into axes, with a colour bar where there are learning rates; the arguments are `save_chart`'s."""
    rates = sorted({rate for _, spans in rows for *_, rate in spans if rate is not None and rate > 0})
    low, high = (rates[0], rates[-1]) if rates else (1.0, 1.0)
    # A little room at both ends, so that the lightest bar stands out from the frozen grey.
    norm, colours = LogNorm(low / 2, high * 1.2), mpl.colormaps["YlGnBu"]
    first, end = limits
    axes.barh(range(len(rows)), end - first, left=first, height=0.8, color=_FROZEN)
    for place, (_, spans) in enumerate(rows):
        axes.broken_barh(
            [(start, stop - start) for start, stop, _ in spans],
            (place - 0.4, 0.8),
            # A rate of zero, as at the start of some warm-ups, has no place on a log scale: the lightest.
            facecolors=[_NO_RATE if rate is None else colours(norm(max(rate, low / 2))) for *_, rate in spans],
        )
    for epoch in edges:
        axes.axvline(epoch, color="white", linewidth=0.8)
    step = ceil(len(rows) / _MOST_LABELS)
    axes.set_yticks(range(0, len(rows), step))
    axes.set_yticklabels([_cut(name) for name, _ in rows[::step]], parse_math=False)
    axes.set_xlim(first, end)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    if not rates:
        return
    bar = figure.colorbar(
        ScalarMappable(norm, colours),
        ax=axes,
        label="learning rate",
        pad=0.015,
        fraction=0.03,
        aspect=5 * figure.get_figheight(),
    )
    apart = max(_LABEL_HEIGHT / (figure.get_figheight() - 1), 1 / _MOST_RATES) * log(2.4 * high / low)
    bar.ax.yaxis.set_major_locator(FixedLocator(_thinned(rates, apart)))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(lambda rate, _: f"{rate:.1e}")
    bar.outline.set_visible(False)


def _thinned(rates: Sequence[float], apart: float) -> list[float]:
    """The highest rate, the lowest, and of the others those that are so far apart, in logarithms."""
    low, high = rates[0], rates[-1]
    kept = [high]
    for rate in reversed(rates):
        if log(kept[-1] / rate) >= apart and (rate == low or log(rate / low) >= apart):
            kept.append(rate)
    return kept


def _cut(name: str) -> str:
    """The end of a long name, which tells it from the others."""
    return name if len(name) <= _LONGEST else f"...{name[3 - _LONGEST :]}"
