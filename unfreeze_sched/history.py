"""What was unfrozen when, at what learning rates, and why: as a table, as JSON, as a picture; no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from itertools import chain, pairwise, zip_longest
from math import ceil, log
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any, Self, overload

from pydantic import ConfigDict, Field, FiniteFloat, StrictStr, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from unfreeze_sched._checks import as_count, columns, short

_LISTED = 3  # more blocks than these, joining at once, are told by the first and the last
_LONGEST = 40  # characters of a name in a picture
_SUFFIXES = (".png", ".svg", ".pdf")
_Count = Annotated[int, Field(strict=True, ge=0)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Transition:
    """A change of the number of unfrozen blocks, or the moment at which something began to hold it.

    Args:
        epoch: 0-based, the one about to be trained.
        number: Blocks unfrozen from then on, counted from the deep end; 0 to `total`, both inclusive.
        total: Blocks of the encoder, at least 1.
        learning_rates: Of the unfrozen blocks at that moment, by block name, deepest first; empty where the optimizer
            has no such thing.
        reason: `"schedule"`, or a guard's or trigger's sentence.

    Example:
        >>> Transition(10, 1, 7, {"layer4": 1e-4}, "schedule")
        Transition(epoch=10, number=1, total=7, learning_rates={'layer4': 0.0001}, reason='schedule')
    """

    epoch: _Count
    number: _Count
    total: Annotated[_Count, Field(ge=1)]
    learning_rates: dict[str, Annotated[FiniteFloat, Field(strict=True)]] = field(hash=False)
    reason: StrictStr

    @model_validator(mode="after")
    def _numbers_fit(self) -> Self:
        if self.number > self.total or len(self.learning_rates) not in {0, self.number}:
            raise ValueError(f"number={self.number} of total={self.total}, {len(self.learning_rates)} learning rates")
        return self


_SAVED = TypeAdapter(list[Transition])


class History(Sequence[Transition]):
    """The transitions of a run, in the order in which they happened; a `ProgressiveUnfreezer` writes it.

    Printed it is a table: `+` are the blocks that joined, `-` those that were frozen again, and the line without a sign
    the others that are unfrozen. Of several blocks on a line the first and the last are named (of the last only what
    differs), and the learning rates are the highest and the lowest.

    Example:
        >>> history = History()
        >>> history.add(Transition(0, 0, 3, {}, "schedule"))
        >>> history.add(Transition(5, 2, 3, {"layer3": 1e-4, "layer2": 8e-5}, "schedule"))
        >>> history.add(Transition(8, 1, 3, {"layer3": 5e-5}, "schedule"))
        >>> print(history)
        epoch  blocks  names       learning rate  reason
        -----  ------  ----------  -------------  --------
            0     0/3  all frozen                 schedule
            5     2/3  + layer3    1.0e-04        schedule
                       + layer2    8.0e-05
            8     1/3  - layer2    frozen         schedule
                         layer3    5.0e-05
        >>> history[-1].reason, [transition.number for transition in history]
        ('schedule', [0, 2, 1])
        >>> history.state_dict()[2]
        {'epoch': 8, 'number': 1, 'total': 3, 'learning_rates': {'layer3': 5e-05}, 'reason': 'schedule'}
    """

    def __init__(self) -> None:
        self._transitions: list[Transition] = []
        self.last: Transition | None = None  # `history[-1]`, where there is one

    @overload
    def __getitem__(self, index: int) -> Transition: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Transition]: ...
    def __getitem__(self, index: int | slice) -> Transition | Sequence[Transition]:
        return self._transitions[index]

    def __len__(self) -> int:
        return len(self._transitions)

    def __repr__(self) -> str:
        return f"<History of {len(self)} transition{'s' * (len(self) != 1)}>"

    def add(self, transition: Transition) -> None:
        """Note a transition, of the same blocks as those before; the unfreezer calls this."""
        self._transitions.append(transition)
        self.last = transition

    def _all_names(self) -> list[str]:
        """The names of all blocks, deepest first; of those that never were unfrozen their place."""
        known = [*max((transition.learning_rates for transition in self), key=len)]
        return known + [f"blocks[{index}]" for index in reversed(range(self[0].total - len(known)))]

    def state_dict(self) -> list[dict[str, Any]]:
        """The transitions, of JSON's types alone."""
        return _SAVED.dump_python(self._transitions)  # type: ignore[no-any-return]  # as the annotation says

    def load_state_dict(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Go on from what `state_dict` gave, possibly by way of JSON, in the place of this history.

        Raises:
            ValueError: It is none; nothing has changed.
        """
        try:
            self._transitions = _SAVED.validate_python(saved)
            self.last = next(reversed(self), None)
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"[{part!r}]" for part in first["loc"])
            raise ValueError(
                f"`saved{where}` must be what History.state_dict gave, got {short(first['input'])} ({first['msg']}); "
                "pass it as it is"
            ) from None

    def to_json(self) -> str:
        """`state_dict()` as JSON text."""
        return json.dumps(self.state_dict(), indent=2, allow_nan=False)

    def __str__(self) -> str:
        if not self:
            return "no transitions yet"
        changes = [*self._changes()]
        names, rates = zip(*chain.from_iterable(changes), strict=True)
        epochs, blocks, reasons = zip(*((str(t.epoch), f"{t.number}/{t.total}", t.reason) for t in self), strict=True)
        cells = {"epoch": epochs, "blocks": blocks, "names": names, "learning rate": rates, "reason": reasons}
        width = {head: max(map(len, (head, *column))) for head, column in cells.items()}
        # Names and reasons are wrapped where a terminal of 80 columns does not hold them.
        room = max(80 - width["epoch"] - width["blocks"] - width["learning rate"] - 2 * 4, 20)
        widest = min(width["names"], room - min(width["reason"], 16))
        rows: list[tuple[str, ...]] = []
        for epoch, number, changed, reason in zip(epochs, blocks, changes, reasons, strict=True):
            lines: list[tuple[str, str]] = []
            for name, rate in changed:
                parts = wrap(name, widest, subsequent_indent="  ", break_on_hyphens=False)
                lines += zip_longest(parts, [rate], fillvalue="")
            told = wrap(reason, room - widest, break_on_hyphens=False)
            rows += zip_longest([epoch], [number], *zip(*lines, strict=True), told, fillvalue="")
        return columns(tuple(cells), rows, right=("epoch", "blocks"))

    def _changes(self) -> Iterator[list[tuple[str, str]]]:
        """What each transition did, in names with their sign and learning rates."""
        names, before = self._all_names(), 0
        for transition in self:
            number, rates = transition.number, [*transition.learning_rates.values()]
            changes = [(f"+ {_span(names[part])}", _range(rates[part])) for part in _parts(before, number)]
            changes += [(f"- {_span(names[part][::-1])}", "frozen") for part in _parts(number, before)[::-1]]
            if kept := min(before, number):
                changes.append((f"  {_span(names[:kept])}", _range(rates[:kept])))
            yield changes or [("all frozen", "")]
            before = number

    def plot(self, path: str | Path, total_epochs: int | None = None) -> None:
        """Draw blocks over epochs, coloured by the learning rate that they had at the transition.

        Where a run went back, what was trained last counts: a transition takes the place of all that had happened at
        its epoch or later. Dashed are those that are not the schedule's doing.

        Args:
            path: Where to; its suffix, one of .png, .svg and .pdf, says in which format.
            total_epochs: Epochs of the run; None draws the last state as long as the one before.

        Raises:
            TypeError: `path` is no path, or `total_epochs` no integer.
            ValueError: Another suffix, or a run that ends before its last transition.
            RuntimeError: There is nothing to draw yet.
            ModuleNotFoundError, OSError: matplotlib is not installed; the file cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() not in _SUFFIXES:
            raise ValueError(f"`path` must end in one of {', '.join(_SUFFIXES)}, got {path}; name it run.png")
        if not self:
            raise RuntimeError("`plot` must be called after the first transition, got an empty history; apply an epoch")
        lasting = [t for place, t in enumerate(self) if all(later.epoch > t.epoch for later in self[place + 1 :])]
        edges = [transition.epoch for transition in lasting]
        if total_epochs is None:
            end = 2 * edges[-1] - edges[-2] if len(edges) > 1 else edges[-1] + 1
        else:
            fix = f"pass the run's, whose last transition is at epoch {edges[-1]}, or None"
            end = as_count(total_epochs, "total_epochs", minimum=edges[-1] + 1, fix=fix)
        rows: list[tuple[str, list[Span]]] = [(name, []) for name in self._all_names()]
        for transition, stop in zip(lasting, [*edges[1:], end], strict=True):
            rates: Sequence[float | None] = [*transition.learning_rates.values()] or [None] * transition.number
            for (_, spans), rate in zip(rows, rates, strict=False):
                spans.append((transition.epoch, stop, rate))
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  # optional
            from matplotlib.figure import Figure  # noqa: PLC0415  # likewise
            from matplotlib.ticker import FixedLocator, MaxNLocator  # noqa: PLC0415  # likewise
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "`plot` needs matplotlib, which is not installed; pip install 'unfreeze-sched[plot]'", name=error.name
            ) from None
        figure = Figure(figsize=(8.5, min(max(1.2 + 0.3 * len(rows), 2.6), 12)), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        draw_rows(figure, axes, rows, (edges[0], end), edges)
        notes = ["grey: frozen"]
        if any(not transition.learning_rates for transition in lasting if transition.number):
            notes.append("dark grey: trained, without a learning rate")
        if marked := [transition.epoch for transition in lasting if transition.reason != "schedule"]:
            notes.append("dashed: not by the schedule")
        for epoch in marked:
            axes.axvline(epoch, color="#303030", linewidth=1, linestyle=(0, (3, 2)), clip_on=False)
        axes.set_title("; ".join(notes), loc="right", color="#707070", fontsize=8)
        axes.set(xlabel="epoch (0-based)", ylabel="block, deepest on top")
        ticks = edges if total_epochs is None else [*edges, end]
        room = (figure.get_figwidth() - 2.5) / (end - edges[0])  # inches of an epoch
        fits = all((after - before) * room > 0.09 * (len(str(end)) + 1) for before, after in pairwise(ticks))
        axes.xaxis.set_major_locator(FixedLocator(ticks) if fits else MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(lambda epoch, _: f"{epoch:.0f}")
        figure.savefig(path, format=path.suffix[1:].lower())


def _parts(start: int, stop: int) -> list[slice]:
    """Depths as they are listed: one by one where they are few."""
    if stop - start > _LISTED:
        return [slice(start, stop)]
    return [slice(depth, depth + 1) for depth in range(start, stop)]


def _span(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    parent, dot, own = names[-1].rpartition(".")
    return f"{names[0]} to {own if names[0].startswith(parent + dot) else names[-1]}"


def _range(rates: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys(f"{extreme(rates):.1e}" for extreme in (max, min) if rates))


# From one epoch up to another, not inclusive, at a learning rate; None where the optimizer has none.
Span = tuple[int, int, float | None]


def draw_rows(
    figure: Any, axes: Any, rows: Sequence[tuple[str, Sequence[Span]]], limits: tuple[int, int], edges: Iterable[int]
) -> None:
    """Draw what trains when, from top to bottom, into axes of matplotlib; the rest is frozen.

    The picture begins and ends at the epochs `limits`; at `edges` something changes.
    """
    import matplotlib as mpl  # noqa: PLC0415  # optional
    from matplotlib.cm import ScalarMappable  # noqa: PLC0415  # likewise
    from matplotlib.colors import LogNorm  # noqa: PLC0415  # likewise
    from matplotlib.ticker import FixedLocator, NullLocator  # noqa: PLC0415  # likewise

    rates = sorted({rate for _, spans in rows for *_, rate in spans if rate}, reverse=True)
    high, low = (rates[0], rates[-1]) if rates else (1.0, 1.0)
    # A little room at both ends, so that the lightest bar stands out from the frozen grey.
    norm, colours = LogNorm(low / 2, high * 1.2), mpl.colormaps["YlGnBu"]
    first, end = limits
    axes.barh(range(len(rows)), end - first, left=first, height=0.8, color="#e8e8e8")
    for place, (_, spans) in enumerate(rows):
        axes.broken_barh(
            [(start, stop - start) for start, stop, _ in spans],
            (place - 0.4, 0.8),
            # A rate of zero, as at the start of some warm-ups, has no place on a log scale: the lightest.
            facecolors=["#9a9a9a" if rate is None else colours(norm(max(rate, low / 2))) for *_, rate in spans],
        )
    for epoch in edges:
        axes.axvline(epoch, color="white", linewidth=0.8)
    # The end of a long name tells it from the others.
    names = [name if len(name) <= _LONGEST else f"...{name[3 - _LONGEST :]}" for name, _ in rows]
    step = ceil(len(rows) / 60)  # more names cannot be read beside each other
    axes.set_yticks(range(0, len(rows), step), names[::step], parse_math=False)
    axes.set(xlim=limits, ylim=(len(rows) - 0.5, -0.5))
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    if not rates:
        return
    height = figure.get_figheight()
    bar = figure.colorbar(
        ScalarMappable(norm, colours), ax=axes, label="learning rate", pad=0.015, fraction=0.03, aspect=5 * height
    )
    # The highest rate, the lowest, and the others so far apart that their labels have room, at most ten.
    apart = max(0.19 / (height - 1), 0.1) * log(2.4 * high / low)
    ticks = [high]
    for rate in rates:
        if log(ticks[-1] / rate) >= apart and (rate == low or log(rate / low) >= apart):
            ticks.append(rate)
    bar.ax.yaxis.set_major_locator(FixedLocator(ticks))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(lambda rate, _: f"{rate:.1e}")
    bar.outline.set_visible(False)
