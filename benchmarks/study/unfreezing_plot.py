"""Plots of the unfreezing study."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import matplotlib as mpl
from pairing import Table, forest
from unfreezing_arms import ARMS
from unfreezing_report import titled
from unfreezing_statistics import final, shifted

SHOWN = ("frozen", "full", "full_low", "guide", "kept", "cleared", "norms_frozen", "kept_b99", "recreated_b99")


def draw(found: dict[tuple[int, str], Table], path: Path) -> None:
    """A row for each kind of run: differences to frozen, shifted differences, curves, losses at transitions."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415  # after the backend is chosen

    texts = {name: arm.text for name, arm in ARMS.items()}
    figure, axes = plt.subplots(len(found), 4, figsize=(24, 5.5 * len(found)), squeeze=False, layout="constrained")
    for (which, table), row in zip(found.items(), axes, strict=True):
        row[0].set_title(f"{titled(which, table)}\ntest mIoU, points over frozen, 95 % interval", fontsize=10)
        forest(row[0], table, {"test": final("test")}, texts)
        row[1].set_title("the same on the shifted test part", fontsize=10)
        forest(row[1], table, {"noise": shifted("noise"), "blur": shifted("blur")}, texts)
        row[2].set_title("validation mIoU by epoch, %, mean", fontsize=10)
        row[3].set_title("loss around a transition, over the frozen arm's", fontsize=10)
        for arm in (name for name in SHOWN if name in table):
            cells, style = table[arm], {"label": ARMS[arm].text, "color": f"C{SHOWN.index(arm)}"}
            epochs = [int(epoch) + 1 for epoch in cells[0]["validation"]]
            curves = zip(*(cell["validation"].values() for cell in cells), strict=True)
            row[2].plot(epochs, [100 * mean(values) for values in curves], **style)
            pairs = zip(cells, table["frozen"], strict=True)
            ratios = [[a / b for a, b in zip(x["loss_profile"], y["loss_profile"], strict=True)] for x, y in pairs]
            profile = [mean(values) for values in zip(*ratios, strict=True)]
            row[3].plot(range(-len(profile) // 2, len(profile) // 2), profile, **style)
        row[3].axvline(-0.5, color="grey", linewidth=0.8)
        row[2].legend(fontsize=7)
    figure.savefig(path, dpi=70)
    plt.close(figure)
