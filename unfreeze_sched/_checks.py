"""Checks that every room shares: each error names the argument, the constraint, the value and one fix; no torch."""

from __future__ import annotations

import difflib
import operator
import reprlib
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from inspect import isfunction
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass as _ModelType
else:
    _ModelType = type(BaseModel)  # which has no public name

_REPR = reprlib.Repr()  # what is shown of a value, which may be anything
_REPR.maxstring = _REPR.maxother = 200


# --- values


def as_count(value: Any, name: str, *, minimum: int, fix: str) -> int:
    """An integer of at least `minimum`: anything with `__index__` is one, save a bool.

    Raises:
        TypeError: `value` is no integer.
        ValueError: `value` is below `minimum`.

    Example:
        >>> as_count(3, "epoch", minimum=0, fix="epochs are 0-based")
        3
    """
    text = f"`{name}` must be an integer of at least {minimum}, got {' '.join(reprlib.repr(value).split())}; {fix}"
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
    """A number in (0, 1], or in [0, 1] where `zero` is allowed.

    Raises:
        TypeError: `value` is no number.
        ValueError: `value` lies outside, or is NaN.

    Example:
        >>> as_ratio(1, "learning_rate_scale", fix="1 keeps the rate")
        1.0
    """
    text = f"`{name}` must be a number in {'[0, 1]' if zero else '(0, 1]'}, got {short(value)}; {fix}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(text)
    if not (0 < value <= 1 or (zero and value == 0)):  # false for NaN
        raise ValueError(text)
    return float(value)


def as_float(value: Any, name: str, *, fix: str) -> float:
    """A real number: Python's, NumPy's, or the one element of a tensor or an array.

    Raises:
        TypeError: `value` is none of these.

    Example:
        >>> as_float(2, "metric", fix="pass one number")
        2.0
    """
    try:
        number = value.item() if hasattr(value, "item") else value
        # A string has no __float__, though float() reads it.
        result = None if isinstance(number, (bool, complex)) or not hasattr(number, "__float__") else float(number)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # torch raises RuntimeError for several elements
        result = None
    if result is None:
        raise TypeError(f"`{name}` must be a number, got {' '.join(reprlib.repr(value).split())}; {fix}")
    return result


def one_of(value: Any, name: str, allowed: Sequence[str]) -> Any:
    """One of some words, the first of which is the default.

    Raises:
        ValueError: `value` is another.

    Example:
        >>> one_of("keep", "on_refreeze", ("keep", "drop"))
        'keep'
    """
    if value not in allowed:
        raise ValueError(
            f"`{name}` must be one of {', '.join(allowed)}, got {short(value)}; {allowed[0]!r} is the default"
        )
    return value


# --- words


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
    r"""A line that no terminal obeys: what cannot be printed stands there as its escape.

    Example:
        >>> plain("road\x1b[2J")
        'road\\x1b[2J'
    """
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def listed(items: Sequence[str], most: int = 1, separator: str = ", ") -> str:
    """The first items, and how many more there are.

    Example:
        >>> listed(["stem.weight", "stem.bias", "body.weight"])
        'stem.weight and 2 more'
    """
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
        for key in [*saved, *(key for key in own if key not in saved)]:
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
    r"""A table of plain text.

    Args:
        header: Names of the columns.
        rows: Their cells; one may have several lines.
        right: Names of the columns that are flush right, as numbers are.
        gap: Blanks between columns.

    Example:
        >>> print(columns(["block", "lr"], [["layer4\nlayer3", "1e-4"]]))
        block   lr
        ------  ----
        layer4  1e-4
        layer3
    """
    lines = [list(header), ["" for _ in header]]
    for row in rows:
        lines += map(list, zip_longest(*(cell.split("\n") for cell in row), fillvalue=""))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines[1] = ["-" * width for width in widths]
    return "\n".join(
        (" " * gap)
        .join(
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(header, line, widths, strict=True)
        )
        .rstrip()
        for line in lines
    )


# --- pydantic


def count_field(field: str, *, minimum: int, fix: str) -> Any:
    """The validator of an integer field of at least `minimum`, as a class attribute of a model.

    The annotation stays plain `int`, which help, signatures and configuration tools read.
    """

    def check(value: Any) -> int:
        try:
            return as_count(value, field, minimum=minimum, fix=fix)
        except TypeError as error:  # pydantic gathers ValueErrors alone
            raise ValueError(str(error)) from None

    return field_validator(field, mode="before")(check)


def ratio_field(field: str, *, fix: str, zero: bool = False) -> Any:
    """Likewise of a number in (0, 1], or in [0, 1] where `zero` is allowed."""

    def check(value: Any) -> float:
        try:
            return as_ratio(value, field, fix=fix, zero=zero)
        except TypeError as error:  # likewise
            raise ValueError(str(error)) from None

    return field_validator(field, mode="before")(check)


Model = TypeVar("Model", bound=BaseModel)


def as_state(kind: type[Model], saved: Any, giver: str) -> Model:
    """A saved state as the model of its fields.

    Args:
        kind: The model.
        saved: What `state_dict` of the giver gave, possibly by way of JSON or `torch.save`.
        giver: Name of the class whose state it is.

    Raises:
        TypeError: `saved` is no mapping.
        ValueError: It is of another kind, or has been tampered with.
    """
    fix = "pass a saved state_dict() as it is"
    if not isinstance(saved, Mapping):
        raise TypeError(f"`state_dict` must be a mapping, got {type(saved).__name__}; {fix}")
    if set(saved) != set(kind.model_fields):
        got = ", ".join(map(short, saved)) or "none"
        raise ValueError(
            f"`state_dict` must have the keys {', '.join(kind.model_fields)}, got {got}; {fix} to a {giver}"
        )
    try:
        return kind.model_validate(dict(saved))
    except ValidationError as error:
        first = error.errors()[0]
        got = f"{first['loc'][0]}={short(first['input'])}" if first["loc"] else str(first["ctx"]["error"])
        raise ValueError(f"`state_dict` must be one that {giver} gave, got {got}; {fix}") from None


# Of the many methods of a pydantic model, those that are part of this package's contract: out and in again.
_KEPT = ("model_dump", "model_dump_json", "model_validate", "model_validate_json")


class _OwnNames(_ModelType):
    """Lists what a model's own classes define, so that `help` is about them and not 400 lines of pydantic."""

    def __dir__(cls) -> list[str]:  # noqa: N805  # a metaclass, which ruff does not see
        own = [vars(kind) for kind in cls.__mro__ if isinstance(kind, _OwnNames)]
        return sorted({*_KEPT, *(name for names in own for name, value in names.items() if _is_own(name, value))})


def _is_own(name: str, value: Any) -> bool:
    """Whether a class attribute is public and was written, not made by pydantic."""
    if name.startswith("_"):
        return name.endswith("__") and isfunction(value) and not value.__module__.startswith("pydantic")
    return name != "model_config"


class FrozenModel(BaseModel, metaclass=_OwnNames):
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
        return self.replace(**(update or {})) if update else super().model_copy(deep=deep)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed and all validated.

        Args:
            **changes: Fields and their new values.

        Raises:
            pydantic.ValidationError: As the constructor.
        """
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})
