"""Plots of the unfreezing study."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
from pairing import Table, against, interval
from unfreezing_arms import ARMS
from unfreezing_report import titled
from unfreezing_statistics import final, shifted

SHOWN = ("frozen", "full", "full_low", "guide", "kept", "cleared", "norms_frozen", "kept_b99", "recreated_b99")


def draw(found: dict[tuple[int, str], Table], path: Path) -> None:
    """A row for each kind of run: differences to frozen, shifted differences, curves, losses at transitions."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415  # after the backend is chosen

    figure, axes = plt.subplots(len(found), 4, figsize=(24, 5.5 * len(found)), squeeze=False, layout="constrained")
    for (which, table), row in zip(found.items(), axes, strict=True):
        row[0].set_title(f"{titled(which, table)}\ntest mIoU, points over frozen, 95 % interval", fontsize=10)
        _forest(row[0], table, {"test": final("test")})
        row[1].set_title("the same on the shifted test part", fontsize=10)
        _forest(row[1], table, {"noise": shifted("noise"), "blur": shifted("blur")})
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


def _forest(axis: Any, table: Table, measures: dict[str, Any]) -> None:
    """Paired differences to the frozen arm, one line an arm."""
    arms = [arm for arm in table if arm != "frozen"]
    for offset, (name, measure) in enumerate(measures.items()):
        column = against(table, "frozen", measure)
        places = [place + 0.25 * offset for place in range(len(arms))]
        values = [column[arm][0] for arm in arms]
        half = [one.half if len(table[arms[0]]) > 1 else 0.0 for one in values]
        label = f"{name} (frozen {interval([measure(cell) for cell in table['frozen']]).mean:.1f} %)"
        axis.errorbar([one.mean for one in values], places, xerr=half, fmt="o", capsize=3, label=label)
    axis.set_yticks(range(len(arms)), [ARMS[arm].text.removeprefix("... ") for arm in arms], fontsize=7)
    axis.invert_yaxis()
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.legend(fontsize=7)
