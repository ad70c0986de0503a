"""A history's rows as a table: plain text of 80 columns, or rich's."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table

_HEADER = ("epoch", "blocks", "names", "learning rate", "reason")
_NUMBERS = 2  # columns of numbers, the first ones
_GAP = "  "
_WIDE = 80  # columns of a terminal
_REASON = 16  # columns that are left for reasons at least, if they need so many
_NOTHING = "no transitions yet"


class Row(NamedTuple):
    """A transition in words."""

    epoch: str
    blocks: str
    changes: Sequence[tuple[str, str]]
    """Names and learning rates, a line each; a name begins with its sign, "+", "-" or none."""
    reason: str


def plain(rows: Sequence[Row]) -> str:
    """The table as text: names and reasons are wrapped where 80 columns do not hold them."""
    if not rows:
        return _NOTHING
    widths = _widths(rows, _WIDE)
    lines = [_HEADER, tuple("-" * width for width in widths), *(line for line, _ in _lines(rows, widths))]
    return "\n".join(
        _GAP.join(
            cell.rjust(width) if column < _NUMBERS else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def rich_table(rows: Sequence[Row]) -> Table:
    """The table of the library rich, laid out for its console, or for 80 columns where that is narrower."""
    from rich import get_console  # noqa: PLC0415  # optional
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415  # likewise
    from rich.table import Table  # noqa: PLC0415  # likewise
    from rich.text import Text  # noqa: PLC0415  # likewise

    # A name and its learning rate are on one line, so it is not left to rich to wrap them.
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.caption = None if rows else _NOTHING
    for column, name in enumerate(_HEADER):
        table.add_column(name, justify="right" if column < _NUMBERS else "left", overflow="fold")
    styles = {"+": "green", "-": "yellow", " ": "dim"}
    for (epoch, blocks, name, rate, reason), sign in _lines(rows, _widths(rows, max(get_console().width, _WIDE) - 1)):
        style = styles.get(sign, "")
        table.add_row(epoch, blocks, Text(name, style), Text(rate, style), Text(reason))
    return table


def _widths(rows: Sequence[Row], wide: int) -> tuple[int, ...]:
    """Those of the columns, which need no more than `wide` together."""
    cells = [
        _HEADER,
        *((row.epoch, row.blocks, "", "", row.reason) for row in rows),
        *(("", "", *change, "") for row in rows for change in row.changes),
    ]
    epoch, blocks, names, rates, reason = (max(map(len, column)) for column in zip(*cells, strict=True))
    room = max(wide - epoch - blocks - rates - len(_GAP) * (len(_HEADER) - 1), 20)
    if names + reason > room:
        names = min(names, room - min(reason, _REASON))
        reason = room - names
    return epoch, blocks, names, rates, reason


def _lines(rows: Sequence[Row], widths: tuple[int, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """The lines of the table, each with the sign of the change that it tells of, or none."""
    *_, names, _, reason = widths
    for row in rows:
        changes = [
            (part, rate, name[0])
            for name, first in row.changes
            for part, rate in zip_longest(_wrapped(name, names, indent="  "), [first], fillvalue="")
        ]
        numbers = [(row.epoch, row.blocks)]
        for number, change, why in zip_longest(numbers, changes, _wrapped(row.reason, reason)):
            name, rate, sign = change or ("", "", "")
            yield (*(number or ("", "")), name, rate, why or ""), sign


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False) or [""]
