"""What a reference run shows: a table by phase, and a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from unfreeze_sched._checks import columns
from unfreeze_sched.distill.command.arms import Arm
from unfreeze_sched.distill.command.data import SegmentationData
from unfreeze_sched.distill.command.evaluation import predicted_classes
from unfreeze_sched.distill.command.records import EpochRecord, around_transitions
from unfreeze_sched.distill.command.training import Training
from unfreeze_sched.history import Span, draw_rows

_COLUMNS = ("epochs", "blocks", "lr head", "lr enc.", "loss", "val. loss", "mIoU %", "change", "s", "MiB kept")
_SHOWN_IMAGES = 6
_MOST_FIGURES = 12  # more transitions than these leave no room for figures


def phase_table(records: Sequence[EpochRecord], title: str) -> str:
    """One row a phase.

    Args:
        records: Of one arm, in order.
        title: Of the table.

    Returns:
        The title, and a table: epochs, 0-based and inclusive; number of unfrozen blocks; learning rates at the phase's
        start, of the head and the highest of a block; mean training loss; validation loss before the transition and
        after the first epoch since; validation mIoU at the end, and its change over the phase before in points; seconds
        an epoch; MiB that the first step kept for backward, and the device's peak where it is known.
    """
    rows, before = [], None
    for _, group in groupby(records, key=lambda record: record.blocks):
        epochs = tuple(group)
        rows.append(_cells(epochs, before))
        before = epochs[-1]
    return f"{title}\n{columns(_COLUMNS, rows, right=_COLUMNS, gap=1)}"


def _cells(epochs: Sequence[EpochRecord], before: EpochRecord | None) -> list[str]:
    """A row: epochs with one number of unfrozen blocks, beside the last epoch before them."""
    first, last = epochs[0], epochs[-1]
    losses = [record.train_loss for record in epochs]
    encoder = [rate for name, rate in first.learning_rates.items() if name != "head"][: first.blocks]
    peak = max((record.peak_bytes or 0 for record in epochs), default=0)
    return [
        str(first.epoch) if first is last else f"{first.epoch}-{last.epoch}",
        f"{first.blocks}",
        f"{first.learning_rates['head']:.1e}",
        f"{max(encoder):.1e}" if encoder else "-",
        f"{sum(losses) / len(losses):.3f}",
        "" if before is None else f"{before.validation_loss:.3f}>{first.validation_loss:.3f}",
        f"{100 * last.validation_miou:.1f}",
        "" if before is None else f"{100 * (last.validation_miou - before.validation_miou):+.1f}",
        f"{sum(record.seconds for record in epochs) / len(epochs):.1f}",
        f"{last.saved_bytes / 2**20:.0f}" + (f"/{peak / 2**20:.0f}" if peak else ""),
    ]


def draw_report(path: Path, runs: dict[str, Training], examples: SegmentationData, device: str) -> None:
    """Draw the picture of a run.

    Args:
        path: The PNG to write.
        runs: The trained student's, and that of the frozen one where it is there, by name.
        examples: Images of which a few are shown with truth and prediction.
        device: Where the student lies.
    """
    student = runs["student"]
    # No pyplot, whose global state belongs to the caller.
    figure = Figure(figsize=(12, 11), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(5, _SHOWN_IMAGES, height_ratios=[1.3, 1.1, 0.8, 0.8, 0.8])
    _draw_blocks(figure, figure.add_subplot(grid[0, :]), student)
    half = _SHOWN_IMAGES // 2
    curves = (("validation_loss", "validation loss", 1.0), ("validation_miou", "validation mIoU, %", 100.0))
    for (key, label, scale), place in zip(curves, (grid[1, :half], grid[1, half:]), strict=True):
        axes = figure.add_subplot(place)
        for name, style, label_ in (("student", "-", "student"), ("frozen", "--", "frozen encoder")):
            if name in runs:
                records = runs[name].records
                axes.plot([r.epoch for r in records], [scale * getattr(r, key) for r in records], style, label=label_)
        around = around_transitions(student.records)
        for epoch in around:
            axes.axvline(epoch - 0.5, color="0.7", linewidth=0.8, zorder=0)
        axes.set(xlabel="epoch (grey: a block joins)", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
        if key == "validation_loss":
            _draw_around(axes, around)
    _draw_predictions(figure, grid, student.arm, examples, device)
    figure.savefig(path, dpi=110)


def _draw_around(axes: Any, around: dict[int, tuple[float, float]]) -> None:
    """The validation loss before and after each transition: as dots, and as figures where there is room."""
    for epoch, losses in around.items():
        axes.plot([epoch - 1, epoch], losses, "o", color="C0", markersize=3.5)
        if len(around) <= _MOST_FIGURES:
            axes.text(
                epoch - 0.5,
                0.98,
                "{:.3f} > {:.3f}".format(*losses),
                transform=axes.get_xaxis_transform(),
                rotation=90,
                va="top",
                ha="right",
                fontsize=7,
                color="0.4",
                bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1},
            )


def _draw_blocks(figure: Figure, axes: Any, training: Training) -> None:
    records, end = training.records, len(training.records)
    names = ["head", *(block.name for block in reversed(training.arm.blocks))]
    rows: list[tuple[str, list[Span]]] = [
        (
            name,
            [(r.epoch, r.epoch + 1, r.learning_rates[name]) for r in records if place <= r.blocks],
        )
        for place, name in enumerate(names)
    ]
    draw_rows(figure, axes, rows, (0, end), [transition.epoch for transition in training.history])
    title = ["What trains when (grey: frozen), coloured by learning rate at the epoch's first step"]
    for transition in training.history:
        if transition.reason != "schedule":
            axes.axvline(transition.epoch, color="0.2", linewidth=1, linestyle=(0, (3, 2)))
            title += textwrap.wrap(f"from epoch {transition.epoch} on (dashed): {transition.reason}", 150)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch (0-based)")
    axes.set_title("\n".join(title), fontsize=10)


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
