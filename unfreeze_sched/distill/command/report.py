"""What a reference run shows: a table by phase, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from unfreeze_sched._checks import columns
from unfreeze_sched.distill.command.data import SegmentationData
from unfreeze_sched.distill.command.runlog import EpochRecord
from unfreeze_sched.distill.command.training import Training, predicted_classes
from unfreeze_sched.history import draw_rows

_COLUMNS = ("epochs", "blocks", "lr head", "lr enc.", "loss", "val. loss", "mIoU %", "change", "s", "MiB kept")
_SHOWN_IMAGES = 6


def around_transitions(records: Sequence[EpochRecord]) -> dict[int, tuple[float, float]]:
    """The validation loss after the epoch before each transition, and after the first one since; by 0-based epoch."""
    return {
        now.epoch: (before.validation_loss, now.validation_loss)
        for before, now in pairwise(records)
        if now.blocks != before.blocks
    }


def phase_table(records: Sequence[EpochRecord], title: str) -> str:
    """The title, and a row for each number of unfrozen blocks that an arm trained with.

    Learning rates are those at the phase's start, of the head and the highest of a block; losses those of validation
    before the transition and after the first epoch since; mIoU that of validation at the end, and its change in points;
    seconds are an epoch's; MiB those that a step keeps for backward, and the device's peak where it is known.
    """
    rows, before = [], None
    for _, group in groupby(records, key=lambda record: record.blocks):
        epochs = tuple(group)
        first, last = epochs[0], epochs[-1]
        encoder = [rate for name, rate in first.learning_rates.items() if name != "head"][: first.blocks]
        peak = max(record.peak_bytes or 0 for record in epochs)
        cells = [
            str(first.epoch) if first is last else f"{first.epoch}-{last.epoch}",
            f"{first.blocks}",
            f"{first.learning_rates['head']:.1e}",
            f"{max(encoder):.1e}" if encoder else "-",
            f"{sum(record.train_loss for record in epochs) / len(epochs):.3f}",
            f"{before.validation_loss:.3f}>{first.validation_loss:.3f}" if before else "",
            f"{100 * last.validation_miou:.1f}",
            f"{100 * (last.validation_miou - before.validation_miou):+.1f}" if before else "",
            f"{sum(record.seconds for record in epochs) / len(epochs):.1f}",
            f"{last.saved_bytes / 2**20:.0f}" + (f"/{peak / 2**20:.0f}" if peak else ""),
        ]
        rows.append(cells)
        before = last
    return f"{title}\n{columns(_COLUMNS, rows, right=_COLUMNS, gap=1)}"


def draw_report(path: Path, runs: dict[str, Training], examples: SegmentationData) -> None:
    """Draw the student, the frozen one beside it where it is there, and a few examples with truth and prediction."""
    student = runs["student"]
    figure = Figure(figsize=(12, 11), layout="constrained")  # no pyplot, whose global state belongs to the caller
    grid = figure.add_gridspec(5, _SHOWN_IMAGES, height_ratios=[1.3, 1.1, 0.8, 0.8, 0.8])
    _draw_blocks(figure, figure.add_subplot(grid[0, :]), student)
    half = _SHOWN_IMAGES // 2
    losses, scores = figure.add_subplot(grid[1, :half]), figure.add_subplot(grid[1, half:])
    for name, style, label in (("student", "-", "student"), ("frozen", "--", "frozen encoder")):
        if name in runs:
            records = runs[name].records
            epochs = [record.epoch for record in records]
            losses.plot(epochs, [record.validation_loss for record in records], style, label=label)
            scores.plot(epochs, [100 * record.validation_miou for record in records], style, label=label)
    around = around_transitions(student.records)
    for epoch, pair in around.items():
        losses.plot([epoch - 1, epoch], pair, "o", color="C0", markersize=3.5)
    for axes, label in ((losses, "validation loss"), (scores, "validation mIoU, %")):
        for epoch in around:
            axes.axvline(epoch - 0.5, color="0.7", linewidth=0.8, zorder=0)
        axes.set(xlabel="epoch (grey: a block joins)", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
    _draw_predictions(figure, grid, student, examples)
    figure.savefig(path, dpi=110)


def _draw_blocks(figure: Figure, axes: Any, training: Training) -> None:
    records, names = training.records, ["head", *(block.name for block in reversed(training.arm.blocks))]
    rows = [
        (name, [(r.epoch, r.epoch + 1, r.learning_rates[name]) for r in records if place <= r.blocks])
        for place, name in enumerate(names)
    ]
    draw_rows(figure, axes, rows, (0, len(records)), [transition.epoch for transition in training.history])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch (0-based)")
    axes.set_title("What trains when (grey: frozen), coloured by learning rate at the epoch's first step", fontsize=10)


@torch.no_grad()
def _draw_predictions(figure: Figure, grid: Any, training: Training, examples: SegmentationData) -> None:
    colours = ListedColormap(mpl.colormaps["tab10"](range(max(examples.classes, 2))))
    unet = training.arm.unet.eval()
    for column in range(min(_SHOWN_IMAGES, len(examples))):
        # Spread over the set, whose order is that of its files.
        index = column * len(examples) // _SHOWN_IMAGES
        image, mask = examples[index]
        prediction = predicted_classes(unet(image[None].to(training.settings.device))).cpu()[0]
        shown = examples.raw(index)[0].permute(1, 2, 0)
        for row, (title, picture) in enumerate((("image", shown), ("mask", mask), ("prediction", prediction)), start=2):
            axes = figure.add_subplot(grid[row, column])
            # Of an image's own colours matplotlib asks for no map.
            axes.imshow(picture.numpy(), cmap=colours, vmin=0, vmax=colours.N - 1, interpolation="nearest")
            axes.set(xticks=[], yticks=[], ylabel="" if column else title)
    names = enumerate(examples.class_names)
    handles = [mpl.patches.Patch(color=colours(index), label=name) for index, name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 10), frameon=False)
