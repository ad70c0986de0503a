"""Checks that every room shares: each error names the argument, the constraint, the value and one fix; no torch."""

from __future__ import annotations

import difflib
import operator
import reprlib
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

_REPR = reprlib.Repr()  # what is shown of a value, which may be anything
_REPR.maxstring = _REPR.maxother = 200


def as_count(value: Any, name: str, *, minimum: int, fix: str) -> int:
    """An integer of at least `minimum`: anything with `__index__` is one, save a bool."""
    text = f"`{name}` must be an integer of at least {minimum}, got {short(value)}; {fix}"
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(text) from None
    if isinstance(value, bool):
        raise TypeError(text)
    if count < minimum:
        raise ValueError(text)
    return count


def as_ratio(value: Any, name: str, *, fix: str, zero: bool = False) -> float:
    """A number in (0, 1], or in [0, 1] where `zero` is allowed."""
    text = f"`{name}` must be a number in {'[0, 1]' if zero else '(0, 1]'}, got {short(value)}; {fix}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(text)
    if not (0 < value <= 1 or (zero and value == 0)):  # false for NaN
        raise ValueError(text)
    return float(value)


def as_float(value: Any, name: str, *, fix: str) -> float:
    """A real number: Python's, NumPy's, or the one element of a tensor or an array."""
    # Of several elements, NumPy's is a ValueError and torch's a RuntimeError.
    with suppress(TypeError, ValueError, RuntimeError, OverflowError):
        number = value.item() if hasattr(value, "item") else value
        if hasattr(number, "__float__") and not isinstance(number, bool):  # a string has none, though float() reads it
            return float(number)
    raise TypeError(f"`{name}` must be a number, got {short(value)}; {fix}")


def one_of(value: Any, name: str, allowed: Sequence[str]) -> Any:
    """One of some words, the first of which is the default."""
    if value not in allowed:
        words = ", ".join(allowed)
        raise ValueError(f"`{name}` must be one of {words}, got {short(value)}; {allowed[0]!r} is the default")
    return value


def warn(text: str) -> None:
    """Warn at the line of the user's code that led here, past this package and torch, which calls its hooks."""
    level, frame = 1, sys._getframe()  # noqa: SLF001  # `skip_file_prefixes` comes with Python 3.12
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in {"unfreeze_sched", "torch"}:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, UserWarning, stacklevel=level)


def short(value: Any) -> str:
    """A value on one line, whatever it is."""
    return " ".join(_REPR.repr(value).split())


def plain(line: str) -> str:
    r"""A line that no terminal obeys: what cannot be printed stands there as its escape, such as \x1b."""
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def listed(items: Sequence[str], most: int = 1, separator: str = ", ") -> str:
    """The first items, and how many more there are, as in 'stem.weight and 2 more'."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + more


def one_line(error: ValidationError) -> str:
    """What pydantic says of the first field that it refused."""
    first = error.errors()[0]
    if first["type"] == "missing":
        return f"`{first['loc'][-1]}` must be given, got none; add it"
    return first["msg"].removeprefix("Value error, ")


def differences(where: str, saved: Any, own: Any) -> Iterator[str]:
    """Where two JSON-like values differ, in words; order counts, since groups follow it."""
    if isinstance(saved, Mapping) and isinstance(own, Mapping):
        for key in {**saved, **own}:
            if key not in own or key not in saved:
                yield f"{where}[{short(key)}] {'saved alone' if key in saved else 'not saved'}"
            else:
                yield from differences(f"{where}[{key!r}]", saved[key], own[key])
        if set(saved) == set(own) and list(saved) != list(own):
            yield f"{where} saved in the order {', '.join(saved)}"
    elif not _equal(saved, own):
        yield f"{where} saved as {short(saved)}, now {own!r}"


def _equal(saved: Any, own: Any) -> bool:
    """Whether two values of JSON's types are equal, where the saved one may be anything."""
    if isinstance(own, list):
        return isinstance(saved, (list, tuple)) and len(saved) == len(own) and all(map(_equal, saved, own))
    return type(saved) is type(own) and bool(saved == own)


def columns(header: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[str] = (), gap: int = 2) -> str:
    """A table of plain text, whose cells may have several lines; the columns named in `right` are flush right."""
    lines = [tuple(header)]
    for row in rows:
        lines += zip_longest(*(cell.split("\n") for cell in row), fillvalue="")
    table = []
    for name, *cells in zip(*lines, strict=True):
        width, flush = max(map(len, (name, *cells))), str.rjust if name in right else str.ljust
        table.append([flush(cell, width) for cell in (name, "-" * width, *cells)])
    return "\n".join((" " * gap).join(line).rstrip() for line in zip(*table, strict=True))


def checked(field: str, check: Callable[..., Any], mode: Literal["before", "plain"] = "before", **keywords: Any) -> Any:
    """A field's validator by one of the checks above, beside a plain annotation that help and tools can read."""

    def validated(value: Any) -> Any:
        try:
            return check(value, field, **keywords)
        except TypeError as error:  # pydantic gathers ValueErrors alone
            raise ValueError(str(error)) from None

    return field_validator(field, mode=mode)(validated)


Model = TypeVar("Model", bound=BaseModel)


def as_state(kind: type[Model], saved: Any, giver: str) -> Model:
    """A saved state, possibly by way of JSON or `torch.save`, as the model of its fields; `giver` gave it."""
    fix = "pass a saved state_dict() as it is"
    if not isinstance(saved, Mapping):
        raise TypeError(f"`state_dict` must be a mapping, got {type(saved).__name__}; {fix}")
    if set(saved) != set(kind.model_fields):
        keys, got = ", ".join(kind.model_fields), ", ".join(map(short, saved)) or "none"
        raise ValueError(f"`state_dict` must have the keys {keys}, got {got}; {fix} to a {giver}")
    try:
        return kind.model_validate(dict(saved))
    except ValidationError as error:
        first = error.errors()[0]
        got = f"{first['loc'][0]}={short(first['input'])}"
        raise ValueError(f"`state_dict` must be one that {giver} gave, got {got}; {fix}") from None


class FrozenModel(BaseModel):
    """An immutable, hashable pydantic model that takes its own fields and no others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        fields = list(cls.model_fields)
        for key in data if isinstance(data, Mapping) else ():
            if key not in fields:
                known = ", ".join(difflib.get_close_matches(str(key), fields, 1) or fields)
                raise ValueError(
                    f"`{key}` must not be given to {cls.__name__}, got {short(data[key])}; it takes {known}"
                )
        return data

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As `replace`: pydantic's own would validate nothing, and keep what was computed from the old fields."""
        return self.replace(**update) if update else super().model_copy(deep=deep)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated as by the constructor."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**(fields | changes))
