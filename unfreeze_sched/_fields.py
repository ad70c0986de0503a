"""Pydantic fields whose errors name the field, the value and one fix; no torch."""

from __future__ import annotations

import difflib
import math
import operator
import reprlib
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, model_validator


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


def count_field(minimum: int, fix: str) -> BeforeValidator:
    """The validator of an integer field of at least `minimum`."""

    def check(value: Any, info: ValidationInfo) -> int:
        try:
            return as_count(value, str(info.field_name), minimum=minimum, fix=fix)
        except TypeError as error:  # pydantic gathers ValueErrors alone
            raise ValueError(str(error)) from None

    return BeforeValidator(check)


def ratio_field(fix: str, *, zero: bool) -> BeforeValidator:
    """The validator of a number in (0, 1], or in [0, 1] where `zero` is allowed."""

    def check(value: Any, info: ValidationInfo) -> float:
        number = math.nan if isinstance(value, bool) or not isinstance(value, (int, float)) else value
        if not (0 < number <= 1 or (zero and number == 0)):  # false for NaN
            interval = "[0, 1]" if zero else "(0, 1]"
            raise ValueError(f"`{info.field_name}` must be a number in {interval}, got {value!r}; {fix}")
        return float(number)

    return BeforeValidator(check)


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
                raise ValueError(f"`{key}` must not be given to {cls.__name__}, got {data[key]!r}; it takes {known}")
        return data

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed and all validated, as `model_copy(update=...)` does not.

        Args:
            **changes: Fields and their new values.

        Raises:
            pydantic.ValidationError: As the constructor.
        """
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})
