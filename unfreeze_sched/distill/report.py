"""What a reference run shows: a table by phase, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.box import SIMPLE
from rich.table import Table

from unfreeze_sched.distill.data import SegmentationData
from unfreeze_sched.distill.training import Arm, EpochRecord, predicted_classes

_SHOWN_IMAGES = 6


@dataclass(frozen=True)
class Phase:
    """Consecutive epochs with one number of unfrozen blocks.

    Attributes:
        records: Theirs.
        miou_before: Validation mIoU at the end of the phase before, or None for the first.
    """

    records: tuple[EpochRecord, ...]
    miou_before: float | None

    def cells(self) -> list[str]:
        """The phase as a row of the table."""
        first, last = self.records[0], self.records[-1]
        losses = [record.train_loss for record in self.records]
        encoder = [rate for name, rate in first.learning_rates.items() if name != "head"][: first.blocks]
        peak = max((record.peak_bytes or 0 for record in self.records), default=0)
        return [
            str(first.epoch) if first is last else f"{first.epoch}-{last.epoch}",
            f"{first.blocks}",
            f"{first.learning_rates['head']:.1e}",
            f"{max(encoder):.1e}" if encoder else "-",
            f"{sum(losses) / len(losses):.3f}",
            f"{100 * last.validation_miou:.1f}",
            "" if self.miou_before is None else f"{100 * (last.validation_miou - self.miou_before):+.1f}",
            f"{sum(record.seconds for record in self.records) / len(self.records):.1f}",
            f"{last.saved_bytes / 2**20:.0f}" + (f" / {peak / 2**20:.0f}" if peak else ""),
        ]


def phases(records: Sequence[EpochRecord]) -> list[Phase]:
    """The phases of an arm, in order."""
    found: list[Phase] = []
    for _, group in groupby(records, key=lambda record: record.blocks):
        before = found[-1].records[-1].validation_miou if found else None
        found.append(Phase(tuple(group), before))
    return found


def phase_table(records: Sequence[EpochRecord], title: str) -> Table:
    """One row a phase.

    Args:
        records: Of one arm, in order.
        title: Of the table.

    Returns:
        Epochs, 0-based and inclusive; number of unfrozen blocks; learning rates at the phase's start, of the head and
        the highest of a block; mean training loss; validation mIoU at the end, and its change over the phase before in
        points; seconds an epoch; MiB that the first step kept for backward, and the device's peak where it is known.
    """
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0), title_justify="left")
    for column in ("epochs", "blocks", "lr head", "lr blocks", "loss", "mIoU %", "change", "s/epoch", "MiB kept"):
        table.add_column(column, justify="right", no_wrap=True)
    for phase in phases(records):
        table.add_row(*phase.cells())
    return table


def draw_report(
    path: Path,
    arm: Arm,
    records: Sequence[EpochRecord],
    frozen: Sequence[EpochRecord],
    examples: SegmentationData,
    device: str,
) -> None:
    """Draw the picture of a run.

    Args:
        path: The PNG to write.
        arm: The trained student.
        records: Its epochs.
        frozen: Those of the student whose encoder stayed frozen; may be empty.
        examples: Images of which the first few are shown with truth and prediction.
        device: Where the student lies.
    """
    # No pyplot, whose global state belongs to the caller.
    figure = Figure(figsize=(12, 11), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(5, _SHOWN_IMAGES, height_ratios=[1.3, 1.1, 0.8, 0.8, 0.8])
    _draw_blocks(figure, figure.add_subplot(grid[0, :]), arm, records)
    half = _SHOWN_IMAGES // 2
    transitions = [record.epoch for record in records if record.joined]
    curves = (("validation_loss", "validation loss", 1.0), ("validation_miou", "validation mIoU, %", 100.0))
    for (key, label, scale), place in zip(curves, (grid[1, :half], grid[1, half:]), strict=True):
        axes = figure.add_subplot(place)
        for name, run, style in ((arm.name, records, "-"), ("frozen encoder", frozen, "--")):
            if run:
                axes.plot([r.epoch for r in run], [scale * getattr(r, key) for r in run], style, label=name)
        for epoch in transitions:
            axes.axvline(epoch - 0.5, color="0.7", linewidth=0.8, zorder=0)
        axes.set(xlabel="epoch (grey: a block joins)", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
    _draw_predictions(figure, grid, arm, examples, device)
    figure.savefig(path, dpi=110)


def _draw_blocks(figure: Figure, axes: Any, arm: Arm, records: Sequence[EpochRecord]) -> None:
    names = ["head", *(block.name for block in reversed(arm.blocks))]
    rates = np.full((len(names), len(records)), np.nan)
    for column, record in enumerate(records):
        for row, name in enumerate(names[: record.blocks + 1]):
            rates[row, column] = record.learning_rates[name]
    colours = mpl.colormaps["viridis"].with_extremes(bad="0.92")
    low, high = np.nanmin(rates), np.nanmax(rates)
    norm = LogNorm(low if low < high else low / 2, high)
    edges = np.arange(len(records) + 1) - 0.5
    mesh = axes.pcolormesh(edges, np.arange(len(names) + 1) - 0.5, np.ma.masked_invalid(rates), cmap=colours, norm=norm)
    axes.set_facecolor("0.92")
    axes.set_yticks(range(len(names)), names)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(
        xlabel="epoch", title="What trains when (grey: frozen), coloured by learning rate at the epoch's first step"
    )
    figure.colorbar(mesh, ax=axes, label="learning rate")


@torch.no_grad()
def _draw_predictions(figure: Figure, grid: Any, arm: Arm, examples: SegmentationData, device: str) -> None:
    colours = ListedColormap(mpl.colormaps["tab10"](range(max(examples.classes, 2))))
    arm.unet.eval()
    for column in range(min(_SHOWN_IMAGES, len(examples))):
        # Spread over the set, whose order is that of its files.
        index = column * len(examples) // _SHOWN_IMAGES
        image, mask = examples[index]
        prediction = predicted_classes(arm.unet(image[None].to(device))).cpu()[0]
        shown = examples.raw(index)[0].permute(1, 2, 0)
        for row, (title, picture) in enumerate((("image", shown), ("mask", mask), ("prediction", prediction)), start=2):
            axes = figure.add_subplot(grid[row, column])
            keywords: dict[str, Any] = {} if title == "image" else {"cmap": colours, "vmin": 0, "vmax": colours.N - 1}
            axes.imshow(picture.numpy(), interpolation="nearest", **keywords)
            axes.set_xticks([])
            axes.set_yticks([])
            if column == 0:
                axes.set_ylabel(title)
    handles = [
        mpl.patches.Patch(color=colours(index), label=name)
        for index, name in enumerate(examples.class_names[: colours.N])
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 10), frameon=False)
