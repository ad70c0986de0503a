"""What was unfrozen when, at what learning rates, and why: as a table, as JSON, as a picture; no torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, overload

from unfreeze_sched._fields import as_count
from unfreeze_sched._history_table import Row, plain, rich_table
from unfreeze_sched._saved import short

_SUFFIXES = (".png", ".svg", ".pdf")
_LISTED = 3  # more blocks than these, joining at once, are told by the first and the last


@dataclass(frozen=True)
class Transition:
    """A change of the number of unfrozen blocks, or the moment at which something began to hold it.

    Attributes:
        epoch: 0-based, the one about to be trained.
        number: Blocks unfrozen from then on, counted from the deep end; 0 to `total`, both inclusive.
        total: Blocks of the encoder, at least 1.
        learning_rates: Of the unfrozen blocks at that moment, by block name, deepest first; empty where the optimizer
            has no such thing.
        reason: `"schedule"`, `"resumed"`, or a guard's or trigger's sentence.

    Raises:
        TypeError: A field of the wrong type.
        ValueError: A field out of range.

    Example:
        >>> Transition(10, 1, 7, {"layer4": 1e-4}, "schedule")
        Transition(epoch=10, number=1, total=7, learning_rates={'layer4': 0.0001}, reason='schedule')
    """

    epoch: int
    number: int
    total: int
    learning_rates: dict[str, float] = field(hash=False)
    reason: str

    def __post_init__(self) -> None:
        for name, value in _checked(vars(self), "").items():
            object.__setattr__(self, name, value)


_FIELDS = tuple(each.name for each in fields(Transition))


def _checked(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A transition's values in their own types; `where` is what stands before a field's name in an error."""
    total = as_count(values["total"], f"{where}total", minimum=1, fix="count the encoder's blocks")
    epoch = as_count(values["epoch"], f"{where}epoch", minimum=0, fix="epochs are 0-based whole numbers")
    number = as_count(values["number"], f"{where}number", minimum=0, fix="count the unfrozen blocks")
    if number > total:
        raise ValueError(f"`{where}number` must be at most `total`, {total}, got {number}; count the unfrozen blocks")
    rates, reason = values["learning_rates"], values["reason"]
    fix = "map the names of the unfrozen blocks to numbers"
    if not isinstance(rates, Mapping):
        raise TypeError(f"`{where}learning_rates` must be a mapping, got {short(rates)}; {fix}")
    for name, rate in rates.items():
        if not isinstance(name, str):
            raise TypeError(f"`{where}learning_rates` must have names as keys, got {short(name)}; {fix}")
        if isinstance(rate, bool) or not isinstance(rate, (int, float)):
            raise TypeError(f"`{where}learning_rates[{name!r}]` must be a number, got {short(rate)}; {fix}")
        if not math.isfinite(rate):
            raise ValueError(f"`{where}learning_rates[{name!r}]` must be finite, got {rate}; look at the LR scheduler")
    if len(rates) not in {0, number}:
        raise ValueError(f"`{where}learning_rates` must have {number} names, or none, got {len(rates)}; {fix}")
    if not isinstance(reason, str):
        raise TypeError(f"`{where}reason` must be a string, got {short(reason)}; say why, such as 'schedule'")
    numbers = {name: float(rate) for name, rate in rates.items()}
    return {"epoch": epoch, "number": number, "total": total, "learning_rates": numbers, "reason": reason}


class History(Sequence[Transition]):
    """The transitions of a run, in the order in which they happened; a `ProgressiveUnfreezer` writes it.

    `print(history)` is a table, and so is `rich.print(history)`. There, `+` are the blocks that joined, `-` those that
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
        """Note a transition; the unfreezer calls this, and nobody else.

        Args:
            transition: Of the same blocks as those before.

        Raises:
            TypeError: It is no Transition.
            ValueError: It is of other blocks.
        """
        if not isinstance(transition, Transition):
            raise TypeError(f"`transition` must be a Transition, got {short(transition)}; make one")
        _names([*self, transition], "transition")
        self._transitions.append(transition)

    def state_dict(self) -> list[dict[str, Any]]:
        """The transitions, of JSON's types alone.

        Example:
            >>> history = History()
            >>> history.add(Transition(5, 1, 3, {"layer3": 1e-4}, "schedule"))
            >>> history.state_dict()
            [{'epoch': 5, 'number': 1, 'total': 3, 'learning_rates': {'layer3': 0.0001}, 'reason': 'schedule'}]
        """
        return [asdict(transition) for transition in self]

    def load_state_dict(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Go on from a saved history, which takes the place of this one.

        Args:
            saved: What `state_dict` gave, possibly by way of JSON.

        Raises:
            TypeError: It is no list, or holds something of the wrong type; nothing has changed.
            ValueError: It holds something out of range; likewise.
        """
        if not isinstance(saved, (list, tuple)):
            raise TypeError(f"`saved` must be a list, got {type(saved).__name__}; pass a saved state_dict()")
        transitions = []
        for place, values in enumerate(saved):
            if not isinstance(values, Mapping):
                raise TypeError(f"`saved[{place}]` must be a mapping, got {short(values)}; pass a saved state_dict()")
            if set(values) != set(_FIELDS):
                got = ", ".join(map(short, values)) or "none"
                raise ValueError(
                    f"`saved[{place}]` must have the keys {', '.join(_FIELDS)}, got {got}; pass a saved state_dict()"
                )
            transitions.append(Transition(**_checked(values, f"saved[{place}].")))
        _names(transitions, "saved")
        self._transitions[:] = transitions

    def to_json(self) -> str:
        """`state_dict()` as JSON text.

        Example:
            >>> print(History().to_json())
            []
        """
        return json.dumps(self.state_dict(), indent=2, allow_nan=False)

    def __str__(self) -> str:
        return plain(list(self._rows()))

    def __rich__(self) -> Any:
        """A `rich.table.Table` for `rich.print`, which alone calls this."""
        return rich_table(list(self._rows()))

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
        try:
            from unfreeze_sched.rate_chart import save_chart  # noqa: PLC0415  # optional
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            raise ModuleNotFoundError(
                f"`plot` needs {missing}, which is not installed; pip install 'unfreeze-sched[plot]'", name=error.name
            ) from None

        names = _names(self._transitions, "saved")
        rows: list[list[tuple[int, int, float | None]]] = [[] for _ in names]
        for transition, stop in zip(lasting, [*edges[1:], end], strict=True):
            rates: Sequence[float | None] = [*transition.learning_rates.values()] or [None] * transition.number
            for row, rate in zip(rows, rates, strict=False):
                row.append((transition.epoch, stop, rate))
        save_chart(
            path,
            list(zip(names, rows, strict=True)),
            (edges[0], end),
            edges if total_epochs is None else [*edges, end],
            [transition.epoch for transition in lasting if transition.reason != "schedule"],
        )

    def _lasting(self) -> list[Transition]:
        """The transitions that a later one did not undo by going back to their epoch or further."""
        lasting: list[Transition] = []
        for transition in self:
            while lasting and lasting[-1].epoch >= transition.epoch:
                lasting.pop()
            lasting.append(transition)
        return lasting

    def _rows(self) -> Iterator[Row]:
        names, before = _names(self._transitions, "saved"), 0
        for transition in self:
            number, rates = transition.number, [*transition.learning_rates.values()]
            changes = [(f"+ {_span(names[part])}", _range(rates[part])) for part in _parts(before, number)]
            changes += [(f"- {_span(names[part][::-1])}", "frozen") for part in _parts(number, before)[::-1]]
            if kept := min(before, number):
                changes.append((f"  {_span(names[:kept])}", _range(rates[:kept])))
            shown = f"{number}/{transition.total}"
            yield Row(str(transition.epoch), shown, changes or [("all frozen", "")], transition.reason)
            before = number


def _names(transitions: Sequence[Transition], argument: str) -> list[str]:
    """The names of all blocks, deepest first, as far as they ever were unfrozen; the others by their place."""
    names: list[str] = []
    for transition in transitions:
        total, more = transitions[0].total, [*transition.learning_rates]
        if transition.total != total:
            raise ValueError(
                f"`{argument}` must be of {total} blocks throughout, got {transition.total} at epoch "
                f"{transition.epoch}; a history is of one model"
            )
        for known, name in zip(names, more, strict=False):
            if known != name:
                raise ValueError(
                    f"`{argument}` must have the same names throughout, deepest first, got {name!r} in the place of "
                    f"{known!r} at epoch {transition.epoch}; a history is of one model"
                )
        names += more[len(names) :]
    total = transitions[0].total if transitions else 0
    return names + [f"blocks[{index}]" for index in range(total - len(names) - 1, -1, -1)]


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
