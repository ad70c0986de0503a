"""A plan as a picture: blocks over epochs, coloured by learning rate, and the memory of each phase below."""

from __future__ import annotations

from itertools import pairwise
from operator import add
from pathlib import Path
from textwrap import shorten
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from unfreeze_sched.history import draw_rows
from unfreeze_sched.plan.phases import Plan, in_short, title, unit_of

_APART = 0.035  # of the axis: epochs of transitions nearer than that would overlap
_KINDS = {"weights": "#8c8c8c", "gradients": "#d98b5f", "optimizer": "#5f8fb5", "activations": "#6aa56a"}


def draw(plan: Plan, path: Path) -> None:
    """Draw a plan; the path's suffix says in which format."""
    height = min(max(1.5 + 0.3 * len(plan.blocks), 2.6), 12)
    with mpl.rc_context({"font.size": 9, "axes.titlesize": 10}):
        figure = Figure(figsize=(9.5, height + (2.0 if plan.encoder else 0)), dpi=150, layout="constrained")
        if plan.encoder:
            top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[height, 1.8])
            _draw_memory(bottom, plan, plan.encoder.batch_size)
            top.tick_params(axis="x", length=0)
        else:
            top = bottom = figure.subplots()
        _draw_blocks(figure, top, plan)
        bottom.set_xlabel("epoch (0-based)")
        bottom.set_xlim(0, plan.schedule.total_epochs)
        edges = [phase.first_epoch for phase in plan.phases] + [plan.schedule.total_epochs]
        apart = min(after - before for before, after in pairwise(edges)) / edges[-1]
        bottom.xaxis.set_major_locator(FixedLocator(edges) if apart > _APART else MaxNLocator("auto", integer=True))
        head, _, preset = title(plan).partition("; ")
        figure.suptitle(f"{head}\n{shorten(preset, 110, placeholder=' ...')}", fontsize=10)
        figure.savefig(path)


def _draw_blocks(figure: Figure, axes: Axes, plan: Plan) -> None:
    """One bar a block; the head is on top, and below it the encoder from deep to shallow."""
    head = ("head", plan.encoder.head_parameters if plan.encoder else None)
    rows = []
    for name, number in [head, *((block.name, block.parameters) for block in reversed(plan.blocks))]:
        trained = [phase for phase in plan.phases if name in phase.learning_rates]
        spans = [(phase.first_epoch, phase.last_epoch + 1, phase.learning_rates[name]) for phase in trained]
        rows.append((name if number is None else f"{name}  ({in_short(number)})", spans))
    edges = [phase.first_epoch for phase in plan.phases[1:]]
    draw_rows(figure, axes, rows, (0, plan.schedule.total_epochs), edges)
    axes.text(1, 1.01, "grey: frozen", transform=axes.transAxes, ha="right", va="bottom", color="#707070", fontsize=8)


def _draw_memory(axes: Axes, plan: Plan, batch_size: int) -> None:
    """Steps of what each phase keeps, stacked."""
    memories = [phase.memory for phase in plan.phases if phase.memory is not None]
    starts = [phase.first_epoch for phase in plan.phases]
    widths = [phase.last_epoch + 1 - phase.first_epoch for phase in plan.phases]
    (unit, size), floor = unit_of(plan), [0.0] * len(memories)
    style: dict[str, Any] = {"align": "edge", "edgecolor": "white", "linewidth": 0.8}
    for kind, colour in _KINDS.items():
        sizes = [getattr(memory, kind) / size for memory in memories]
        axes.bar(starts, sizes, widths, bottom=floor, color=colour, label=kind, **style)
        floor = list(map(add, floor, sizes))
    axes.set_ylabel(f"{unit}, batch of {batch_size}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(0, 1.25 * max(floor))  # room for the legend
    axes.legend(loc="upper left", frameon=False, fontsize=8, ncols=len(_KINDS))
