"""What was unfrozen when, at what learning rates, and why: as a table, as JSON, as a picture; no torch."""

from __future__ import annotations

import json
import operator
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from itertools import pairwise, zip_longest
from math import ceil, log
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Self, overload

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from unfreeze_sched._checks import as_count, columns, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SUFFIXES = (".png", ".svg", ".pdf")
_LISTED = 3  # more blocks than these, joining at once, are told by the first and the last


def _plain(value: Any) -> Any:
    """NumPy's integers as Python's; the rest is pydantic's to judge."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except (TypeError, RuntimeError):  # a tensor of several elements, or of none that can be looked at
        return value


_Integer = Annotated[int, BeforeValidator(_plain), Field(strict=True)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Transition:
    """A change of the number of unfrozen blocks, or the moment at which something began to hold it.

    Args:
        epoch: 0-based, the one about to be trained.
        number: Blocks unfrozen from then on, counted from the deep end; 0 to `total`, both inclusive.
        total: Blocks of the encoder, at least 1.
        learning_rates: Of the unfrozen blocks at that moment, by block name, deepest first; empty where the optimizer
            has no such thing.
        reason: `"schedule"`, `"resumed"`, or a guard's or trigger's sentence.

    Raises:
        pydantic.ValidationError: A ValueError that names the field and the value.

    Example:
        >>> Transition(10, 1, 7, {"layer4": 1e-4}, "schedule")
        Transition(epoch=10, number=1, total=7, learning_rates={'layer4': 0.0001}, reason='schedule')
    """

    epoch: Annotated[_Integer, Field(ge=0)]
    number: Annotated[_Integer, Field(ge=0)]
    total: Annotated[_Integer, Field(ge=1)]
    learning_rates: dict[str, Annotated[float, Field(allow_inf_nan=False, strict=True)]] = field(hash=False)
    reason: Annotated[str, Field(strict=True)]

    @model_validator(mode="after")
    def _numbers_fit(self) -> Self:
        if self.number > self.total or len(self.learning_rates) not in {0, self.number}:
            raise ValueError(f"number={self.number} of total={self.total}, {len(self.learning_rates)} learning rates")
        return self


_SAVED = TypeAdapter(list[Transition])


class History(Sequence[Transition]):
    """The transitions of a run, in the order in which they happened; a `ProgressiveUnfreezer` writes it.

    `print(history)` is a table. There, `+` are the blocks that joined, `-` those that
    were frozen again, and the line without a sign the others that are unfrozen. Where a line speaks of several blocks,
    the first and the last are named (of the last only what differs), and the learning rates are the highest and the
    lowest.

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
    """

    def __init__(self) -> None:
        self._transitions: list[Transition] = []
        self._names: list[str] = []  # deepest first, as far as they ever were unfrozen

    @overload
    def __getitem__(self, index: int) -> Transition: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Transition]: ...
    def __getitem__(self, index: int | slice) -> Transition | Sequence[Transition]:
        return self._transitions[index]

    def __len__(self) -> int:
        return len(self._transitions)

    @property
    def last(self) -> Transition | None:
        """The last transition, None before the first."""
        return self._transitions[-1] if self._transitions else None

    def __repr__(self) -> str:
        return f"<History of {len(self)} transition{'s' * (len(self) != 1)}>"

    def add(self, transition: Transition, given: str = "transition") -> None:
        """Note a transition; the unfreezer calls this, and nobody else.

        Args:
            transition: Of the same blocks as those before.
            given: What a refusal calls it.

        Raises:
            TypeError: It is no Transition.
            ValueError: It is of other blocks.
        """
        if not isinstance(transition, Transition):
            raise TypeError(f"`transition` must be a Transition, got {short(transition)}; make one")
        total = self._transitions[0].total if self._transitions else transition.total
        if transition.total != total:
            raise ValueError(
                f"`{given}` must be of {total} blocks throughout, got {transition.total} at epoch "
                f"{transition.epoch}; a history is of one model"
            )
        names = [*transition.learning_rates]
        for known, name in zip(self._names, names, strict=False):
            if known != name:
                raise ValueError(
                    f"`{given}` must have the same names throughout, deepest first, got {name!r} in the place of "
                    f"{known!r} at epoch {transition.epoch}; a history is of one model"
                )
        self._names += names[len(self._names) :]
        self._transitions.append(transition)

    def state_dict(self) -> list[dict[str, Any]]:
        """The transitions, of JSON's types alone.

        Example:
            >>> history = History()
            >>> history.add(Transition(5, 1, 3, {"layer3": 1e-4}, "schedule"))
            >>> history.state_dict()
            [{'epoch': 5, 'number': 1, 'total': 3, 'learning_rates': {'layer3': 0.0001}, 'reason': 'schedule'}]
        """
        return _SAVED.dump_python(self._transitions)  # type: ignore[no-any-return]  # as the annotation says

    def load_state_dict(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Go on from a saved history, which takes the place of this one.

        Args:
            saved: What `state_dict` gave, possibly by way of JSON.

        Raises:
            ValueError: It is none; nothing has changed.
        """
        loaded = History()
        try:
            for transition in _SAVED.validate_python(saved):
                loaded.add(transition, "saved")
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"[{part!r}]" for part in first["loc"])
            raise ValueError(
                f"`saved{where}` must be what History.state_dict gave, got {short(first['input'])} ({first['msg']}); "
                "pass it as it is"
            ) from None
        self._transitions[:], self._names = loaded._transitions, loaded._names

    def to_json(self) -> str:
        """`state_dict()` as JSON text.

        Example:
            >>> print(History().to_json())
            []
        """
        return json.dumps(self.state_dict(), indent=2, allow_nan=False)

    def __str__(self) -> str:
        return _table(list(self._rows()))

    def _all_names(self) -> list[str]:
        """The names of all blocks, deepest first; those that never were unfrozen by their place."""
        total = self[0].total if self else 0
        return self._names + [f"blocks[{index}]" for index in range(total - len(self._names) - 1, -1, -1)]

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
            ModuleNotFoundError: matplotlib is not installed.
            OSError: The file cannot be written.

        Example:
            >>> import tempfile
            >>> history = History()
            >>> history.add(Transition(5, 1, 3, {"layer3": 1e-4}, "schedule"))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     history.plot(Path(folder, "run.svg"), total_epochs=10)
            ...     Path(folder, "run.svg").stat().st_size > 1_000
            True
        """
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"`path` must be a path, got {short(path)}; pass one such as 'run.png'")
        path = Path(path)
        if path.suffix.lower() not in _SUFFIXES:
            raise ValueError(f"`path` must end in one of {', '.join(_SUFFIXES)}, got {path}; name it run.png")
        if not self:
            raise RuntimeError("`plot` must be called after the first transition, got an empty history; apply an epoch")
        lasting = self._lasting()
        edges = [transition.epoch for transition in lasting]
        end = _end(edges, total_epochs)
        names = self._all_names()
        rows: list[list[tuple[int, int, float | None]]] = [[] for _ in names]
        for transition, stop in zip(lasting, [*edges[1:], end], strict=True):
            rates: Sequence[float | None] = [*transition.learning_rates.values()] or [None] * transition.number
            for row, rate in zip(rows, rates, strict=False):
                row.append((transition.epoch, stop, rate))
        marked = [transition.epoch for transition in lasting if transition.reason != "schedule"]
        try:
            save_chart(
                path,
                list(zip(names, rows, strict=True)),
                (edges[0], end),
                edges if total_epochs is None else [*edges, end],
                marked,
            )
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            raise ModuleNotFoundError(
                f"`plot` needs {missing}, which is not installed; pip install 'unfreeze-sched[plot]'", name=error.name
            ) from None

    def _lasting(self) -> list[Transition]:
        """The transitions that a later one did not undo by going back to their epoch or further."""
        lasting: list[Transition] = []
        for transition in self:
            while lasting and lasting[-1].epoch >= transition.epoch:
                lasting.pop()
            lasting.append(transition)
        return lasting

    def _rows(self) -> Iterator[_Row]:
        names, before = self._all_names(), 0
        for transition in self:
            number, rates = transition.number, [*transition.learning_rates.values()]
            changes = [(f"+ {_span(names[part])}", _range(rates[part])) for part in _parts(before, number)]
            changes += [(f"- {_span(names[part][::-1])}", "frozen") for part in _parts(number, before)[::-1]]
            if kept := min(before, number):
                changes.append((f"  {_span(names[:kept])}", _range(rates[:kept])))
            shown = f"{number}/{transition.total}"
            yield _Row(str(transition.epoch), shown, changes or [("all frozen", "")], transition.reason)
            before = number


def _end(edges: Sequence[int], total_epochs: int | None) -> int:
    """The epoch at which a picture ends."""
    if total_epochs is None:
        return edges[-1] + max(1, edges[-1] - edges[-2] if len(edges) > 1 else 0)
    end = as_count(total_epochs, "total_epochs", minimum=1, fix="it is the number of epochs of the run")
    if end <= edges[-1]:
        raise ValueError(
            f"`total_epochs` must be above {edges[-1]}, the epoch of the last transition, got {end}; "
            "pass that of the run, or None"
        )
    return end


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
    shown = [f"{rate:.1e}" for rate in (max(rates), min(rates))] if rates else [""]
    return " to ".join(dict.fromkeys(shown))


# --- the table

_HEADER = ("epoch", "blocks", "names", "learning rate", "reason")
_WIDE = 80  # columns of a terminal
_REASON = 16  # columns that are left for reasons at least, if they need so many


class _Row(NamedTuple):
    """A transition in words."""

    epoch: str
    blocks: str
    changes: Sequence[tuple[str, str]]  # names and learning rates; a name begins with its sign, "+", "-" or none
    reason: str


def _table(rows: Sequence[_Row]) -> str:
    """The table as text: names and reasons are wrapped where 80 columns do not hold them."""
    if not rows:
        return "no transitions yet"
    names, reason = _widths(rows)
    cells = []
    for row in rows:
        changes = [
            (part, rate)
            for name, first in row.changes
            for part, rate in zip_longest(_wrapped(name, names, indent="  "), [first], fillvalue="")
        ]
        columns_of_changes = ["\n".join(column) for column in zip(*changes, strict=True)]
        cells.append([row.epoch, row.blocks, *columns_of_changes, "\n".join(_wrapped(row.reason, reason))])
    return columns(_HEADER, cells, right=("epoch", "blocks"))


def _widths(rows: Sequence[_Row]) -> tuple[int, int]:
    """Those of names and reasons, which the other columns leave room for."""
    cells = [
        _HEADER,
        *((row.epoch, row.blocks, "", "", row.reason) for row in rows),
        *(("", "", *change, "") for row in rows for change in row.changes),
    ]
    epoch, blocks, names, rates, reason = (max(map(len, column)) for column in zip(*cells, strict=True))
    room = max(_WIDE - epoch - blocks - rates - 2 * (len(_HEADER) - 1), 20)
    if names + reason > room:
        names = min(names, room - min(reason, _REASON))
        reason = room - names
    return names, reason


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False) or [""]


# --- the picture; needs matplotlib, and leaves pyplot alone

Span = tuple[int, int, float | None]
"""From one epoch up to another, not inclusive, at a learning rate; None where the optimizer has none."""

_FROZEN, _NO_RATE, _QUIET = "#e8e8e8", "#9a9a9a", "#707070"
_MOST_LABELS = 60  # more names than these cannot be read beside each other
_LONGEST = 40  # characters of a name
_MOST_TICKS = 8  # of epochs, where not each change can have one
_MOST_RATES = 10  # beside the colour bar
_LABEL_HEIGHT = 0.19  # inches that a tick label of the colour bar takes
_DIGIT_WIDTH = 0.09  # likewise, of a label below


def save_chart(
    path: Path,
    rows: Sequence[tuple[str, Sequence[Span]]],
    limits: tuple[int, int],
    edges: Sequence[int],
    marked: Sequence[int],
) -> None:
    """Draw rows into a file of their own.

    Args:
        path: Where to; its suffix says in which format.
        rows: Names and what is coloured of them, from top to bottom; the rest is frozen.
        limits: Epochs at which the picture begins and ends.
        edges: Epochs at which something changes, ascending; they get a tick if there is room.
        marked: Epochs that get a dashed line.

    Raises:
        OSError: It cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  # optional
    from matplotlib.figure import Figure  # noqa: PLC0415  # likewise
    from matplotlib.ticker import FixedLocator, MaxNLocator  # noqa: PLC0415  # likewise

    figure = Figure(figsize=(8.5, min(max(1.2 + 0.3 * len(rows), 2.6), 12)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    draw_rows(figure, axes, rows, limits, edges)
    for epoch in marked:
        axes.axvline(epoch, color="#303030", linewidth=1, linestyle=(0, (3, 2)), clip_on=False)
    axes.set_xlabel("epoch (0-based)")
    axes.set_ylabel("block, deepest on top")
    room = (figure.get_figwidth() - 2.5) / (limits[1] - limits[0])
    digits = _DIGIT_WIDTH * (len(str(edges[-1])) + 1)
    fits = all((after - before) * room > digits for before, after in pairwise(edges))
    round_ones = MaxNLocator(_MOST_TICKS, integer=True, steps=[1, 2, 5, 10])
    axes.xaxis.set_major_locator(FixedLocator(edges) if fits else round_ones)
    axes.xaxis.set_major_formatter(lambda epoch, _: f"{epoch:.0f}")
    notes = ["grey: frozen"]
    if any(rate is None for _, spans in rows for *_, rate in spans):
        notes.append("dark grey: trained, without a learning rate")
    if marked:
        notes.append("dashed: not by the schedule")
    axes.set_title("; ".join(notes), loc="right", color=_QUIET, fontsize=8)
    figure.savefig(path, format=path.suffix[1:].lower())


def draw_rows(
    figure: Figure,
    axes: Axes,
    rows: Sequence[tuple[str, Sequence[Span]]],
    limits: tuple[int, int],
    edges: Iterable[int],
) -> None:
    """Draw rows into axes, with a colour bar where there are learning rates; the arguments are `save_chart`'s."""
    import matplotlib as mpl  # noqa: PLC0415  # optional
    from matplotlib.cm import ScalarMappable  # noqa: PLC0415  # likewise
    from matplotlib.colors import LogNorm  # noqa: PLC0415  # likewise
    from matplotlib.ticker import FixedLocator, NullLocator  # noqa: PLC0415  # likewise

    rates = sorted({rate for _, spans in rows for *_, rate in spans if rate is not None and rate > 0})
    low, high = (rates[0], rates[-1]) if rates else (1.0, 1.0)
    # A little room at both ends, so that the lightest bar stands out from the frozen grey.
    norm, colours = LogNorm(low / 2, high * 1.2), mpl.colormaps["YlGnBu"]
    first, end = limits
    axes.barh(range(len(rows)), end - first, left=first, height=0.8, color=_FROZEN)
    for place, (_, spans) in enumerate(rows):
        axes.broken_barh(
            [(start, stop - start) for start, stop, _ in spans],
            (place - 0.4, 0.8),
            # A rate of zero, as at the start of some warm-ups, has no place on a log scale: the lightest.
            facecolors=[_NO_RATE if rate is None else colours(norm(max(rate, low / 2))) for *_, rate in spans],
        )
    for epoch in edges:
        axes.axvline(epoch, color="white", linewidth=0.8)
    step = ceil(len(rows) / _MOST_LABELS)
    axes.set_yticks(range(0, len(rows), step))
    axes.set_yticklabels([_cut(name) for name, _ in rows[::step]], parse_math=False)
    axes.set_xlim(first, end)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    if not rates:
        return
    bar = figure.colorbar(
        ScalarMappable(norm, colours),
        ax=axes,
        label="learning rate",
        pad=0.015,
        fraction=0.03,
        aspect=5 * figure.get_figheight(),
    )
    apart = max(_LABEL_HEIGHT / (figure.get_figheight() - 1), 1 / _MOST_RATES) * log(2.4 * high / low)
    bar.ax.yaxis.set_major_locator(FixedLocator(_thinned(rates, apart)))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(lambda rate, _: f"{rate:.1e}")
    bar.outline.set_visible(False)


def _thinned(rates: Sequence[float], apart: float) -> list[float]:
    """The highest rate, the lowest, and of the others those that are so far apart, in logarithms."""
    low, high = rates[0], rates[-1]
    kept = [high]
    for rate in reversed(rates):
        if log(kept[-1] / rate) >= apart and (rate == low or log(rate / low) >= apart):
            kept.append(rate)
    return kept


def _cut(name: str) -> str:
    """The end of a long name, which tells it from the others."""
    return name if len(name) <= _LONGEST else f"...{name[3 - _LONGEST :]}"
