"""Statistics of the unfreezing study: complete seeds, paired differences, Student's t, Holm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from scipy import stats  # type: ignore[import-untyped]
from unfreezing_arms import ARMS, EVALUATIONS, LONG_ARMS

LEVEL = 0.05
Cell = dict[str, Any]
Table = dict[str, list[Cell]]
"""The cells of one length and LR schedule: by arm, in the order of the seeds that all arms have."""
Measure = Callable[[Cell], float]


class Interval(NamedTuple):
    """A mean, half of the width of its 95 % confidence interval, and Student's p of the hypothesis that it is 0."""

    mean: float
    half: float
    p: float

    def __str__(self) -> str:
        return f"{self.mean:.1f}{self._bounds}"

    @property
    def signed(self) -> str:
        """With a sign, as a difference."""
        return f"{self.mean:+.1f}{self._bounds}"

    @property
    def _bounds(self) -> str:
        return f" ± {self.half:.1f}" if self.half < math.inf else " (one seed)"


def interval(values: Sequence[float]) -> Interval:
    """Student's t interval of a mean; infinite for fewer than two values."""
    n = len(values)
    if n < 2:
        return Interval(mean(values), math.inf, math.nan)
    error = stdev(values) / math.sqrt(n)
    half = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * error
    if error == 0:
        return Interval(mean(values), 0.0, 1.0 if mean(values) == 0 else 0.0)
    return Interval(mean(values), half, 2 * float(stats.t.sf(abs(mean(values)) / error, n - 1)))


def paired(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Of the differences `first - second`, seed by seed."""
    return interval([a - b for a, b in zip(first, second, strict=True)])


def holm(ps: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction over one family of comparisons; NaNs stay, and do not count."""
    known = sorted((p, name) for name, p in ps.items() if not math.isnan(p))
    adjusted, highest = dict.fromkeys(ps, math.nan), 0.0
    for rank, (p, name) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[name] = highest
    return adjusted


def tables(cells: list[Cell], planned: Sequence[str]) -> dict[tuple[int, str], Table]:
    """The cells by length and LR schedule; only the seeds of which every planned arm of the table is there."""
    found: dict[tuple[int, str], dict[str, dict[int, Cell]]] = {}
    for cell in cells:
        run = cell["run"]
        found.setdefault((run["epochs"], run["lr_schedule"]), {}).setdefault(run["arm"], {})[run["seed"]] = cell
    complete = {}
    for which, arms in sorted(found.items(), key=lambda item: (item[0][0], item[0][1] != "cosine")):
        wanted = [arm for arm in planned if which[0] == EVALUATIONS or arm in LONG_ARMS]
        seeds = sorted(set.intersection(*(set(arms.get(arm, {})) for arm in wanted)))
        if seeds:
            complete[which] = {arm: [arms[arm][seed] for seed in seeds] for arm in ARMS if arm in wanted}
    return complete


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


def of(table: Table, arm: str, measure: Measure) -> list[float]:
    """By seed."""
    return [measure(cell) for cell in table[arm]]


def comparison(table: Table, arm: str, other: str, measure: Measure) -> Interval:
    return paired(of(table, arm, measure), of(table, other, measure))


def against(table: Table, reference: str, measure: Measure) -> dict[str, tuple[Interval, float]]:
    """Each other arm's paired difference to one, and its p by Holm over this column."""
    if reference not in table:
        return {}
    found = {arm: comparison(table, arm, reference, measure) for arm in table if arm != reference}
    adjusted = holm({arm: one.p for arm, one in found.items()})
    return {arm: (one, adjusted[arm]) for arm, one in found.items()}


def reach(cell: Cell, target: float) -> tuple[float, float]:
    """Steps and CPU seconds of training until the validation mIoU was first at least `target`; infinite if never."""
    for epoch, value in cell["validation"].items():
        if 100 * value >= target:
            done = int(epoch) + 1
            return done * cell["steps_per_epoch"], sum(cell["seconds"][:done])
    return math.inf, math.inf
