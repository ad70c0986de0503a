"""Measures of the unfreezing study, and its tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean

from pairing import Cell, Measure, Table, complete
from unfreezing_arms import ARMS, EVALUATIONS, LONG_ARMS


def tables(cells: list[Cell], planned: Sequence[str]) -> dict[tuple[int, str], Table]:
    """The cells by length and LR schedule; only the seeds of which every planned arm of the table is there."""
    found: dict[tuple[int, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell["run"]["epochs"], cell["run"]["lr_schedule"]), []).append(cell)
    made = {
        which: complete(some, [arm for arm in ARMS if arm in planned and (which[0] == EVALUATIONS or arm in LONG_ARMS)])
        for which, some in sorted(found.items(), key=lambda item: (item[0][0], item[0][1] != "cosine"))
    }
    return {which: table for which, table in made.items() if table}


def final(part: str) -> Measure:
    """Percent of mIoU at the end of a run."""
    return lambda cell: 100 * float(list(cell[part].values())[-1])


def shifted(kind: str) -> Measure:
    """Percent of mIoU on the shifted test part."""
    return lambda cell: 100 * float(cell["shifted"][kind])


def at(place: int) -> Measure:
    """Test mIoU in percent at the end of a phase."""
    return lambda cell: 100 * float(list(cell["test"].values())[place])


def loss_ratio(cell: Cell) -> float:
    """Percent by which the loss of the 20 steps after a transition differs from the 20 before; mean over transitions."""
    return 100 * (mean(map(float, cell["loss_ratios"])) - 1)


def reach(cell: Cell, target: float) -> tuple[float, float]:
    """Steps and CPU seconds of training until the validation mIoU was first at least `target`; infinite if never."""
    for epoch, value in cell["validation"].items():
        if 100 * value >= target:
            done = int(epoch) + 1
            return done * cell["steps_per_epoch"], sum(cell["seconds"][:done])
    return math.inf, math.inf
