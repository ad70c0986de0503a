"""What follows a metric: its checks, the state between them, and the agreement of all ranks; no torch."""

from __future__ import annotations

import logging
import math
import reprlib
import sys
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError, model_validator

from unfreeze_sched._fields import as_count

Mode = Literal["min", "max"]

log = logging.getLogger("unfreeze_sched")


class State(BaseModel):
    """What changes, of JSON's types alone."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    mode: Mode
    number: NonNegativeInt | None = None  # blocks now unfrozen; None before the first `follow`
    total: PositiveInt | None = None
    last: float | None = None  # the last check; None: none yet, or no finite one
    best: float | None = None  # since the last transition, the check just before it included
    count: NonNegativeInt = 0  # consecutive checks that count towards `patience`

    @model_validator(mode="after")
    def _number_within_total(self) -> Self:
        if (self.number is None) != (self.total is None) or (self.number or 0) > (self.total or 0):
            raise ValueError(f"number={self.number} of total={self.total}")
        return self


class Follower:
    """What guard and trigger share: the settings, the checks since the last transition, the state."""

    _Kind: ClassVar[type[State]]
    _state: State

    def __init__(self, patience: int, mode: Mode, min_delta: float) -> None:
        self.patience = as_count(patience, "patience", minimum=1, fix="it is a number of checks, such as 3")
        if mode not in get_args(Mode):
            raise ValueError(f"`mode` must be 'min' or 'max', got {mode!r}; 'min' suits a loss, 'max' an accuracy")
        self.mode = mode
        self.min_delta = as_float(min_delta, "min_delta", fix="0.0 counts any difference")
        if not 0 <= self.min_delta < math.inf:
            raise ValueError(f"`min_delta` must be finite and at least 0, got {min_delta!r}; 0.0 counts any difference")

    def follow(self, number: int, total: int) -> None:
        """Take note of the number of blocks now unfrozen; another number than before is a transition.

        Args:
            number: Blocks now unfrozen, counted from the deep end, from 0 to `total`, both inclusive.
            total: Blocks of the encoder, at least 1.

        Raises:
            TypeError: A number is no integer.
            ValueError: A number is out of range, or `total` is not that of earlier calls.
        """
        number = as_count(number, "number", minimum=0, fix="it is the number of unfrozen blocks")
        total = as_count(total, "total", minimum=1, fix="count the encoder's blocks")
        if number > total:
            raise ValueError(f"`number` must be at most `total`, {total}, got {number}; count unfrozen blocks alone")
        state = self._state
        if state.total not in {None, total}:
            raise ValueError(
                f"`total` must stay {state.total}, got {total}; make a {type(self).__name__} for each unfreezer"
            )
        if number != state.number:
            state.number, state.total = number, total
            state.best, state.count = state.last, 0

    def step(self, metric: float) -> None:
        """Take a check into account.

        Args:
            metric: A number, a one-element tensor or a NumPy scalar. In a parallel run every rank calls this, and the
                metric of rank 0 decides on all.

        Raises:
            TypeError: `metric` is no number.
        """
        metric = agreed(as_float(metric, "metric", fix="pass one number, such as loss.item()"))
        self._take(self._as_check(metric), metric)

    def _take(self, check: float | None, metric: float) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """All that changes, of JSON's types alone; of the settings `mode`, to be compared."""
        return self._state.model_dump()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state, with this object's `patience` and `min_delta`.

        Args:
            state_dict: What `state_dict` gave, possibly by way of JSON or `torch.save`.

        Raises:
            TypeError: `state_dict` is no mapping.
            ValueError: It is of another kind or mode, or has been tampered with; nothing has changed.
        """
        self._state = self._validated(state_dict)

    def _validated(self, state_dict: Mapping[str, Any]) -> Any:
        name, fix = type(self).__name__, "pass a saved state_dict() as it is"
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"`state_dict` must be a mapping, got {type(state_dict).__name__}; {fix}")
        fields = self._Kind.model_fields
        if set(state_dict) != set(fields):
            got = ", ".join(map(str, state_dict)) or "none"
            raise ValueError(f"`state_dict` must have the keys {', '.join(fields)}, got {got}; {fix} to a {name}")
        try:
            state = self._Kind.model_validate(dict(state_dict))
        except ValidationError as error:
            first = error.errors()[0]
            got = f"{first['loc'][0]}={reprlib.repr(first['input'])}" if first["loc"] else str(first["ctx"]["error"])
            raise ValueError(f"`state_dict` must be one that {name} gave, got {got}; {fix}") from None
        if state.mode != self.mode:
            raise ValueError(
                f"`state_dict` must be of mode {self.mode!r}, got {state.mode!r}; make the {name} with that mode"
            )
        return state

    def _as_check(self, metric: float) -> float | None:
        """None for NaN and for the infinity at the wrong end; JSON has no infinities, so the other one is clamped."""
        if math.isnan(metric) or metric == (math.inf if self.mode == "min" else -math.inf):
            return None
        return max(-sys.float_info.max, min(sys.float_info.max, metric))

    def _gain(self, check: float | None, best: float | None) -> float:
        """By how much a check is better than the best; None is infinitely worse than anything, even than None."""
        if check is None:
            return -math.inf
        if best is None:
            return math.inf
        return best - check if self.mode == "min" else check - best

    def _rule(self) -> str:
        return f"mode={self.mode!r}, min_delta={self.min_delta:g}"


def as_float(value: Any, name: str, *, fix: str) -> float:
    """A real number: Python's, NumPy's, or the one element of a tensor or an array."""
    try:
        number = value.item() if hasattr(value, "item") else value
        # A string has no __float__, though float() reads it.
        result = None if isinstance(number, (bool, complex)) or not hasattr(number, "__float__") else float(number)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # torch raises RuntimeError for several elements
        result = None
    if result is None:
        raise TypeError(f"`{name}` must be a number, got {' '.join(reprlib.repr(value).split())}; {fix}")
    return result


def _parallel() -> Any:
    """torch.distributed where a process group of several ranks is up, else None; torch is not imported for it."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist


def agreed(metric: float) -> float:
    """The metric of rank 0, on every rank: a decision that differed would unfreeze other blocks on each."""
    dist = _parallel()
    if dist is None:
        return metric
    metrics = [metric]
    dist.broadcast_object_list(metrics, src=0)  # on the device that the backend wants
    return metrics[0]


def speaks() -> bool:
    """Whether this process logs: the only one, or rank 0."""
    dist = _parallel()
    return dist is None or dist.get_rank() == 0
