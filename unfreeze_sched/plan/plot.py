"""A plan as a picture: blocks over epochs, coloured by learning rate, and the memory of each phase below."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from textwrap import shorten

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from unfreeze_sched.history import draw_rows
from unfreeze_sched.plan.phases import Plan
from unfreeze_sched.plan.table import title

_APART = 0.035  # of the axis: epochs of transitions nearer than that would overlap
_KINDS = {"weights": "#8c8c8c", "gradients": "#d98b5f", "optimizer": "#5f8fb5", "activations": "#6aa56a"}


def draw(plan: Plan, path: Path) -> None:
    """Draw a plan.

    Args:
        plan: The plan.
        path: Where to; its suffix says in which format.

    Raises:
        OSError: It cannot be written.
    """
    names = ["head", *(block.name for block in reversed(plan.blocks))]
    height = min(max(1.2 + 0.3 * len(names), 2.6), 12)
    has_memory = plan.encoder is not None
    with mpl.rc_context({"font.size": 9, "axes.titlesize": 10}):
        figure = Figure(figsize=(9.5, height + (2.0 if has_memory else 0)), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        if has_memory:
            top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[height, 1.8])
            _draw_memory(bottom, plan)
            top.tick_params(axis="x", length=0)
        else:
            top = bottom = figure.subplots()
        _draw_blocks(figure, top, plan, names)
        bottom.set_xlabel("epoch (0-based)")
        bottom.set_xlim(0, plan.schedule.total_epochs)
        edges = [phase.first_epoch for phase in plan.phases] + [plan.schedule.total_epochs]
        apart = min(after - before for before, after in pairwise(edges)) / edges[-1]
        bottom.xaxis.set_major_locator(FixedLocator(edges) if apart > _APART else MaxNLocator("auto", integer=True))
        head, _, preset = title(plan).partition("; ")
        figure.suptitle(f"{head}\n{shorten(preset, 110, placeholder=' ...')}", fontsize=10)
        figure.savefig(path)


def _draw_blocks(figure: Figure, axes: Axes, plan: Plan, names: list[str]) -> None:
    """One bar a block; the head is on top, and below it the encoder from deep to shallow."""
    rows = [
        (
            _with_parameters(plan, row, names),
            [
                (phase.first_epoch, phase.last_epoch + 1, phase.learning_rates[name])
                for phase in plan.phases
                if name in phase.learning_rates
            ],
        )
        for row, name in enumerate(names)
    ]
    edges = [phase.first_epoch for phase in plan.phases[1:]]
    draw_rows(figure, axes, rows, (0, plan.schedule.total_epochs), edges)
    axes.text(1, 1.01, "grey: frozen", transform=axes.transAxes, ha="right", va="bottom", color="#707070", fontsize=8)


def _with_parameters(plan: Plan, row: int, names: list[str]) -> str:
    if plan.encoder is None:
        return names[row]
    number = plan.encoder.head_parameters if row == 0 else plan.blocks[-row].parameters or 0
    shown = f"{number / 1e6:.1f} M" if number >= 10**6 else f"{number / 1e3:.0f} k"
    return f"{names[row]}  ({shown})"


def _draw_memory(axes: Axes, plan: Plan) -> None:
    """Steps of what each phase keeps, stacked."""
    measured = [(phase, phase.memory) for phase in plan.phases if phase.memory is not None]
    scale = 2**30 if max(memory.total for _, memory in measured) >= 2**30 else 2**20
    floor = [0.0] * len(measured)
    for kind, colour in _KINDS.items():
        sizes = [getattr(memory, kind) / scale for _, memory in measured]
        axes.bar(
            [phase.first_epoch for phase, _ in measured],
            sizes,
            [phase.last_epoch + 1 - phase.first_epoch for phase, _ in measured],
            bottom=floor,
            align="edge",
            color=colour,
            label=kind,
            edgecolor="white",
            linewidth=0.8,
        )
        floor = [below + size for below, size in zip(floor, sizes, strict=True)]
    axes.set_ylabel(
        ("GiB" if scale == 2**30 else "MiB") + (f", batch of {plan.encoder.batch_size}" if plan.encoder else "")
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(0, 1.25 * max(floor))  # room for the legend
    axes.legend(loc="upper left", frameon=False, fontsize=8, ncols=len(_KINDS))
