"""Statistics that the studies share: intervals of paired differences, Student's t, Holm, and tables by arm and seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from scipy import stats  # type: ignore[import-untyped]

LEVEL = 0.05
Cell = dict[str, Any]
Table = dict[str, list[Cell]]
"""Cells by arm, in the order of the seeds that all arms have."""
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


def complete(cells: Iterable[Cell], arms: Iterable[str]) -> Table:
    """The cells of these arms, of the seeds that all of them have alone; empty where there is none."""
    found: dict[str, dict[int, Cell]] = {arm: {} for arm in arms}
    for cell in cells:
        if cell["run"]["arm"] in found:
            found[cell["run"]["arm"]][cell["run"]["seed"]] = cell
    seeds = sorted(set.intersection(*map(set, found.values())))
    return {arm: [of_arm[seed] for seed in seeds] for arm, of_arm in found.items()} if seeds else {}


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


def shown(column: Mapping[str, tuple[Interval, float]], arm: str) -> tuple[str, str]:
    """An arm's difference, bold where it is significant, and its p; empty for the reference."""
    if arm not in column:
        return "", ""
    one, p = column[arm]
    mark = "**" if p < LEVEL else ""
    return f"{mark}{one.signed}{mark}", "-" if math.isnan(p) else f"{p:.3f}"


def forest(axis: Any, table: Table, measures: Mapping[str, Measure], texts: Mapping[str, str]) -> None:
    """Draw paired differences to the frozen arm, one line an arm."""
    arms = [arm for arm in table if arm != "frozen"]
    for offset, (name, measure) in enumerate(measures.items()):
        column = against(table, "frozen", measure)
        places = [place + 0.25 * offset for place in range(len(arms))]
        values = [column[arm][0] for arm in arms]
        half = [one.half if len(table[arms[0]]) > 1 else 0.0 for one in values]
        label = f"{name} (frozen {interval(of(table, 'frozen', measure)).mean:.1f} %)"
        axis.errorbar([one.mean for one in values], places, xerr=half, fmt="o", capsize=3, label=label)
    axis.set_yticks(range(len(arms)), [texts[arm].removeprefix("... ") for arm in arms], fontsize=7)
    axis.invert_yaxis()
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.legend(fontsize=7)
