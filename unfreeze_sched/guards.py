"""Caps on the schedule that follow a metric: `OverfitGuard`, a brake, and `PlateauTrigger`, a trigger; no torch."""

from __future__ import annotations

import copy
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, Self, get_args, runtime_checkable

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, model_validator

from unfreeze_sched import parallel
from unfreeze_sched._checks import as_count, as_float, as_state

Mode = Literal["min", "max"]

log = logging.getLogger("unfreeze_sched")


@runtime_checkable
class Cap(Protocol):
    """An upper bound on the number of unfrozen blocks: an unfreezer takes the least of its schedule and its caps."""

    @property
    def cap(self) -> int | None:
        """At most so many blocks, counted from the deep end; None: no limit."""

    @property
    def reason(self) -> str:
        """Why it holds blocks back now, in one sentence with the figures; empty when it does not."""

    def follow(self, number: int, total: int) -> None:
        """Told by the unfreezer at each `apply`: `number` of `total` blocks are unfrozen now; idempotent."""

    def step(self, metric: float) -> None:
        """Called once a check, usually once an epoch, with the metric; on every rank of a parallel run."""

    def state_dict(self) -> dict[str, Any]:
        """All that changes, for a checkpoint."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state; nothing changes when it is refused."""


def checked_caps(caps: Sequence[Cap]) -> tuple[Cap, ...]:
    """The caps of an unfreezer, each of them one."""
    given = caps if isinstance(caps, (list, tuple)) else [caps]
    strange = [type(cap).__name__ for cap in given if not isinstance(cap, Cap)]
    if strange or given is not caps:
        raise TypeError(
            "`caps` must be a sequence of guards and triggers, got "
            f"{(strange or [type(caps).__name__])[0]}; pass caps=[OverfitGuard()]"
        )
    return tuple(caps)


class _State(BaseModel):
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


class _Follower:
    """What guard and trigger share: the settings, the checks since the last transition, the state."""

    _Kind: ClassVar[type[_State]]
    _state: _State

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
        metric = parallel.agreed(as_float(metric, "metric", fix="pass one number, such as loss.item()"))
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
        name = type(self).__name__
        state = as_state(self._Kind, state_dict, name)
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


class _GuardState(_State):
    cap: NonNegativeInt | None = None
    reason: str = ""
    kept: float | None = None  # the check that the kept weights belong to

    @model_validator(mode="after")
    def _held_with_reason(self) -> Self:
        if (self.cap is None) != (not self.reason) or (self.cap or 0) > (self.total or 0):
            raise ValueError(f"cap={self.cap} of total={self.total} with reason={self.reason!r}")
        if self.cap is not None and self.kept is not None:
            raise ValueError(f"cap={self.cap} with kept={self.kept}")
        return self


class _TriggerState(_State):
    cap: NonNegativeInt


class OverfitGuard(_Follower):
    """A brake: unfreezes no further once a validation metric has got worse since the last transition.

    The reference is the best check since the last transition, the check just before it included. When `patience`
    consecutive checks are worse by more than `min_delta`, `cap` becomes the number of blocks unfrozen at that moment,
    for good: what is unfrozen trains on, and nothing joins. It says so once, under the logger `unfreeze_sched` at
    WARNING (rank 0 alone) and in `reason`.

    A transition starts the count afresh, so `patience` has to be at most the checks from one to the next, or it cannot
    trip before the last of them. While no block is unfrozen it does not trip: nothing trains in the encoder, so there
    is nothing to hold. A check of NaN, or of the infinity at the wrong end, is worse than any, even than itself.

    With `model` the best weights come back when it trips: a copy of `model.state_dict()` is kept on the CPU from the
    best check of the whole run, so from before the last transition where that was better, and is loaded in place. So
    pass the model whose metric it is (an average, where that is what is evaluated). The optimizer's state, averages
    and the LR schedulers go on as they are, and the number of unfrozen blocks stays. Plain and DDP models; not sharded
    ones. `state_dict` then holds the tensors until it trips, so it is as large as the model and no JSON.

    Args:
        patience: Consecutive worse checks that trip it, at least 1.
        mode: `"min"`: lower is better, such as a loss; `"max"`: higher is better.
        min_delta: How much worse does not count, at least 0, in the metric's unit.
        model: Its best weights are restored; anything with `state_dict` and `load_state_dict`. None restores nothing.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of range.

    Example:
        >>> guard = OverfitGuard(patience=2)
        >>> for number, loss in [(0, 0.9), (1, 0.6), (2, 0.5), (2, 0.7), (2, 0.8)]:
        ...     guard.follow(number, total=4)  # the unfreezer does this
        ...     guard.step(loss)
        >>> guard.cap
        2
        >>> guard.reason  # doctest: +NORMALIZE_WHITESPACE
        "held at 2 of 4 blocks after 2 checks in a row worse than 0.5, the best since the last transition, the last 0.8
        (mode='min', min_delta=0)"
    """

    _Kind = _GuardState
    _state: _GuardState

    def __init__(self, patience: int = 3, mode: Mode = "min", min_delta: float = 0.0, model: Any = None) -> None:
        super().__init__(patience, mode, min_delta)
        if model is not None and not all(callable(getattr(model, n, None)) for n in ("state_dict", "load_state_dict")):
            raise TypeError(
                f"`model` must have state_dict and load_state_dict, got {type(model).__name__}; pass an nn.Module"
            )
        self._model = model
        self._weights: dict[str, Any] | None = None
        self._state = _GuardState(mode=mode)

    @property
    def cap(self) -> int | None:
        """The number of blocks at which it tripped; None before."""
        return self._state.cap

    @property
    def reason(self) -> str:
        """Why it holds, with the figures; empty before it tripped."""
        return self._state.reason

    def _take(self, check: float | None, metric: float) -> None:
        state = self._state
        if state.cap is not None:
            return
        if self._model is not None and self._gain(check, state.kept) > 0:
            self._weights, state.kept = _cpu_copy(self._model.state_dict()), check
        if state.number:
            gain = self._gain(check, state.best)
            state.count = state.count + 1 if -gain > self.min_delta else 0
            if state.count >= self.patience:
                self._trip(metric)
                return
            if gain > 0:
                state.best = check
        state.last = check

    def _trip(self, metric: float) -> None:
        state = self._state
        worse = "without a number"  # a finite one would be the best
        if state.best is not None:
            worse = f"worse than {state.best:g}, the best since the last transition"
        reason = (
            f"held at {state.number} of {state.total} blocks after {state.count} check{'s' * (state.count > 1)} "
            f"in a row {worse}, the last {metric:g} ({self._rule()})"
        )
        if self._weights is not None:
            self._model.load_state_dict(self._weights)
            reason += f"; the weights of the best check, {state.kept:g}, are restored"
        elif self._model is not None:
            reason += "; no check was finite, so no weights are restored"
        self._weights = state.kept = None
        state.cap, state.reason = state.number, reason
        if parallel.speaks():
            log.warning("OverfitGuard: %s", reason)

    def state_dict(self) -> dict[str, Any]:
        """All that changes, of JSON's types alone; with `model` also the kept weights, under `"weights"`."""
        state = super().state_dict()
        return state if self._model is None else {**state, "weights": self._weights and dict(self._weights)}

    def _validated(self, state_dict: Mapping[str, Any]) -> Any:
        held = isinstance(state_dict, Mapping) and "weights" in state_dict
        if held and self._model is None:
            raise ValueError(
                "`state_dict` must be without weights, got those of a guard with a model; pass model= to this one too"
            )
        if isinstance(state_dict, Mapping) and not held and self._model is not None:
            raise ValueError(
                "`state_dict` must have the kept weights, got one of a guard without a model; leave model= out here too"
            )
        state = super()._validated(
            {key: state_dict[key] for key in state_dict if key != "weights"} if held else state_dict
        )
        weights = state_dict.get("weights")
        if (weights is None) != (state.kept is None):
            raise ValueError(
                f"`state_dict` must have weights where it has a check that they belong to, got kept={state.kept} with "
                f"{'no ' if weights is None else ''}weights; pass a saved state_dict() as it is"
            )
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state, with this object's `patience`, `min_delta` and `model`.

        Args:
            state_dict: What `state_dict` gave, possibly by way of JSON or `torch.save`.

        Raises:
            TypeError: `state_dict` is no mapping.
            ValueError: It is of another kind, mode or model, or has been tampered with; nothing has changed.
        """
        state = self._validated(state_dict)
        weights = state_dict.get("weights")
        if weights is not None:
            _check_weights(weights, self._model.state_dict())
            weights = _cpu_copy(weights)
        self._state, self._weights = state, weights


class PlateauTrigger(_Follower):
    """A trigger: allows the next block when the metric has stopped improving, the schedule being the upper bound.

    `cap` begins at `start` blocks and rises by one when `patience` consecutive checks have not improved on the best
    since the last transition (the check just before it included) by more than `min_delta`; up to all blocks. To let
    the metric alone decide, give a schedule that allows all blocks from epoch 0 on, such as
    `MilestonePreset(milestones={0: total_blocks})`.

    A check counts only while the cap is what holds the blocks back, that is while as many blocks are unfrozen as it
    allows. Where the schedule holds back, nothing is counted, so the cap is never more than one block ahead and no
    plateau of the waiting time unfreezes several at once. Nor is anything counted between a rise and the `apply` that
    follows it, or before the first `apply`. A check of NaN, or of the infinity at the wrong end, is no improvement.

    Args:
        patience: Consecutive checks without an improvement that allow one more block, at least 1.
        mode: `"min"`: lower is better, such as a loss; `"max"`: higher is better.
        min_delta: An improvement is more than this, at least 0, in the metric's unit.
        start: Blocks allowed before any plateau, counted from the deep end, at least 0.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of range.

    Example:
        >>> trigger = PlateauTrigger(patience=2)
        >>> trigger.follow(0, total=4)  # the unfreezer does this
        >>> caps = []
        >>> for loss in [0.9, 0.7, 0.7, 0.8]:
        ...     trigger.step(loss)
        ...     caps.append(trigger.cap)
        >>> caps
        [0, 0, 0, 1]
    """

    _Kind = _TriggerState
    _state: _TriggerState

    def __init__(self, patience: int = 2, mode: Mode = "min", min_delta: float = 0.0, start: int = 0) -> None:
        super().__init__(patience, mode, min_delta)
        self.start = as_count(start, "start", minimum=0, fix="it is a number of blocks, such as 0")
        self._state = _TriggerState(mode=mode, cap=self.start)

    @property
    def cap(self) -> int:
        """The number of blocks allowed so far."""
        return self._state.cap

    @property
    def reason(self) -> str:
        """Why the next block waits, with the figures; empty where the schedule holds back or none is left."""
        state = self._state
        if not self._holds():
            return ""
        best = "" if state.best is None else f" on {state.best:g}, the best since the last transition"
        return (
            f"held at {state.number} of {state.total} blocks until {self.patience} checks in a row bring no improvement"
            f"{best}, {state.count} so far ({self._rule()})"
        )

    def _take(self, check: float | None, metric: float) -> None:
        del metric
        state = self._state
        state.last = check
        if not self._holds():
            return
        if self._gain(check, state.best) > self.min_delta:
            state.best, state.count = check, 0
            return
        state.count += 1
        if state.count >= self.patience:
            if parallel.speaks():
                log.info(
                    "PlateauTrigger: block %d of %d may join, no longer %s", state.cap + 1, state.total, self.reason
                )
            state.cap += 1  # the transition that follows starts the count afresh

    def _holds(self) -> bool:
        state = self._state
        return state.number == state.cap and state.number != state.total


def _cpu_copy(weights: Mapping[str, Any]) -> dict[str, Any]:
    """An independent copy of a model's state; what is no tensor (`get_extra_state`) is copied as it is."""
    return {
        key: value.detach().cpu().clone() if hasattr(value, "detach") else copy.deepcopy(value)
        for key, value in weights.items()
    }


def _check_weights(weights: Any, own: Mapping[str, Any]) -> None:
    """Refuse weights that are not of this model, by the first name that differs."""
    saved = weights if isinstance(weights, Mapping) else {}
    for key in [*own, *(key for key in saved if key not in own)]:
        if _kind(saved, key) != _kind(own, key):
            raise ValueError(
                f"`state_dict['weights']` must be of this model, got {_kind(saved, key)} for {key}, "
                f"where it has {_kind(own, key)}; build the model that was saved"
            )


def _kind(weights: Mapping[str, Any], key: str) -> str:
    if key not in weights:
        return "nothing"
    value = weights[key]
    return f"a tensor of {list(value.shape)}" if hasattr(value, "detach") else "an object"
