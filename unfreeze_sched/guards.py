"""Caps on the schedule that follow a metric: `OverfitGuard`, a brake, and `PlateauTrigger`, a trigger; no torch."""

from __future__ import annotations

import copy
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from unfreeze_sched import parallel
from unfreeze_sched._checks import as_count, as_float, as_state

Mode = Literal["min", "max"]

log = logging.getLogger("unfreeze_sched")


@runtime_checkable
class Cap(Protocol):
    """An upper bound on the number of unfrozen blocks: an unfreezer takes the least of its schedule and its caps.

    What is refused, by a TypeError or ValueError, changes nothing.
    """

    @property
    def cap(self) -> int | None:
        """At most so many blocks, counted from the deep end; None: no limit."""

    @property
    def reason(self) -> str:
        """Why it holds blocks back now, in one sentence with the figures; empty when it does not."""

    def follow(self, number: int, total: int) -> None:
        """Told by the unfreezer at each `apply`: `number` of `total` blocks are unfrozen now; idempotent."""

    def step(self, metric: float) -> None:
        """Called once a check, usually once an epoch, with a number, a one-element tensor or a NumPy scalar.

        In a parallel run every rank calls this, and the metric of rank 0 decides on all.
        """

    def state_dict(self) -> dict[str, Any]:
        """All that changes, for a checkpoint; of the settings `mode`, to be compared."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state, possibly by way of JSON or `torch.save`, with this object's other settings."""


def checked_caps(caps: Sequence[Cap]) -> tuple[Cap, ...]:
    """The caps of an unfreezer, each of them one."""
    strange = [cap for cap in caps if not isinstance(cap, Cap)] if isinstance(caps, (list, tuple)) else [caps]
    if strange:
        got = type(strange[0]).__name__
        raise TypeError(f"`caps` must be a sequence of guards and triggers, got {got}; pass caps=[OverfitGuard()]")
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
    cap: NonNegativeInt | None = None


class _Follower(Cap):
    """What guard and trigger share: the settings, the checks since the last transition, the state."""

    _state: _State

    def __init__(self, patience: int, mode: Mode, min_delta: float) -> None:
        self.patience = as_count(patience, "patience", minimum=1, fix="it is a number of checks, such as 3")
        if mode not in get_args(Mode):
            raise ValueError(f"`mode` must be 'min' or 'max', got {mode!r}; 'min' suits a loss, 'max' an accuracy")
        self.mode = mode
        self.min_delta = as_float(min_delta, "min_delta", fix="0.0 counts any difference")
        if not 0 <= self.min_delta < math.inf:
            raise ValueError(f"`min_delta` must be finite and at least 0, got {min_delta!r}; 0.0 counts any difference")
        self._rule = f"mode={mode!r}, min_delta={self.min_delta:g}"

    @property
    def cap(self) -> int | None:
        return self._state.cap

    def follow(self, number: int, total: int) -> None:
        state = self._state
        if state.total not in {None, total}:
            name = type(self).__name__
            raise ValueError(f"`total` must stay {state.total}, got {total}; make a {name} for each unfreezer")
        if number != state.number:  # a transition
            state.number, state.total = number, total
            state.best, state.count = state.last, 0

    def step(self, metric: float) -> None:
        metric = parallel.agreed(as_float(metric, "metric", fix="pass one number, such as loss.item()"))
        wrong_end = math.inf if self.mode == "min" else -math.inf
        # JSON has no infinities, so the one at the right end is clamped.
        finite = max(-sys.float_info.max, min(sys.float_info.max, metric))
        self._take(None if math.isnan(metric) or metric == wrong_end else finite, metric)

    def _take(self, check: float | None, metric: float) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return self._state.model_dump()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._state = self._validated(state_dict)

    def _validated(self, state_dict: Mapping[str, Any]) -> Any:
        name = type(self).__name__
        state = as_state(type(self._state), state_dict, name)
        if state.mode != self.mode:
            raise ValueError(
                f"`state_dict` must be of mode {self.mode!r}, got {state.mode!r}; make the {name} with that mode"
            )
        return state

    def _gain(self, check: float | None, best: float | None) -> float:
        """By how much a check is better than the best; where both are None, the worst that there is, NaN."""
        sign = 1 if self.mode == "min" else -1
        loss, least = (math.inf if value is None else sign * value for value in (check, best))
        return least - loss


class _GuardState(_State):
    reason: str = ""
    kept: float | None = None  # the check that the kept weights belong to


class OverfitGuard(_Follower):
    """A brake: unfreezes no further once a validation metric has got worse since the last transition.

    The reference is the best check since the last transition, the check just before it included. When `patience`
    consecutive checks are worse by more than `min_delta`, `cap` becomes the number of blocks unfrozen at that moment,
    for good: what is unfrozen trains on, and nothing joins. It says so once, under the logger `unfreeze_sched` at
    WARNING (rank 0 alone) and in `reason`. A check of NaN, or of the infinity at the wrong end, is worse than any.

    A transition starts the count afresh, so `patience` has to be at most the checks from one to the next, or it cannot
    trip before the last of them. While no block is unfrozen it does not trip: there is nothing to hold.

    With `model` the weights of the best check of the whole run come back in place when it trips, from a copy on the
    CPU. So pass the model whose metric it is (an average, where that is what is evaluated), plain or DDP, not sharded.
    Optimizer, LR schedulers and the number of unfrozen blocks stay as they are. Until it trips `state_dict` holds the
    copy, so it is as large as the model and no JSON.

    Args:
        patience: Consecutive worse checks that trip it, at least 1.
        mode: `"min"`: lower is better, such as a loss; `"max"`: higher is better.
        min_delta: How much worse does not count, at least 0, in the metric's unit.
        model: Its best weights are restored; anything with `state_dict` and `load_state_dict`. None restores nothing.

    Raises:
        TypeError, ValueError: An argument of the wrong type, or out of range.

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

    _state: _GuardState

    def __init__(self, patience: int = 3, mode: Mode = "min", min_delta: float = 0.0, model: Any = None) -> None:
        super().__init__(patience, mode, min_delta)
        if model is not None and not all(callable(getattr(model, n, None)) for n in ("state_dict", "load_state_dict")):
            got = type(model).__name__
            raise TypeError(f"`model` must have state_dict and load_state_dict, got {got}; pass an nn.Module")
        self._model = model
        self._weights: dict[str, Any] | None = None
        self._state = _GuardState(mode=mode)

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
        state.last = check
        if not state.number:
            return
        gain = self._gain(check, state.best)
        state.count = 0 if gain >= -self.min_delta else state.count + 1
        if gain > 0:
            state.best = check
        if state.count >= self.patience:
            self._trip(metric)

    def _trip(self, metric: float) -> None:
        state = self._state
        worse = "without a number"  # a finite one would be the best
        if state.best is not None:
            worse = f"worse than {state.best:g}, the best since the last transition"
        reason = (
            f"held at {state.number} of {state.total} blocks after {state.count} check{'s' * (state.count > 1)} "
            f"in a row {worse}, the last {metric:g} ({self._rule})"
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
        weights = self._weights and dict(self._weights)
        return super().state_dict() | ({} if self._model is None else {"weights": weights})

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state of a guard with `model`, if this has one, or else without."""
        weights = None
        if isinstance(state_dict, Mapping):
            if (self._model is None) is ("weights" in state_dict):
                wrong = "have the kept weights, got one of a guard without a model; leave model= out here too"
                if self._model is None:
                    wrong = "be without weights, got those of a guard with a model; pass model= to this one too"
                raise ValueError(f"`state_dict` must {wrong}")
            state_dict = dict(state_dict)
            weights = state_dict.pop("weights", None)
        state = self._validated(state_dict)
        if (weights is None) != (state.kept is None):
            raise ValueError(
                f"`state_dict` must have weights where it has a check that they belong to, got kept={state.kept} with "
                f"{'no ' if weights is None else ''}weights; pass a saved state_dict() as it is"
            )
        if weights is not None:
            _refuse_others(weights, self._model.state_dict())
            weights = _cpu_copy(weights)
        self._state, self._weights = state, weights


class _TriggerState(_State):
    cap: NonNegativeInt


class PlateauTrigger(_Follower):
    """A trigger: allows the next block when the metric has stopped improving, the schedule being the upper bound.

    `cap` begins at `start` blocks and rises by one when `patience` consecutive checks have not improved on the best
    since the last transition (the check just before it included) by more than `min_delta`; up to all blocks. A check of
    NaN, or of the infinity at the wrong end, is no improvement. To let the metric alone decide, give a schedule that
    allows all blocks from epoch 0 on, such as `MilestonePreset(milestones={0: total_blocks})`.

    A check counts only while as many blocks are unfrozen as the cap allows. So where the schedule holds back, the cap
    is never more than one block ahead and no plateau of the waiting time unfreezes several at once; nor does a check
    count between a rise and the `apply` that follows it, or before the first `apply`.

    Args:
        patience: Consecutive checks without an improvement that allow one more block, at least 1.
        mode: `"min"`: lower is better, such as a loss; `"max"`: higher is better.
        min_delta: An improvement is more than this, at least 0, in the metric's unit.
        start: Blocks allowed before any plateau, counted from the deep end, at least 0.

    Raises:
        TypeError, ValueError: An argument of the wrong type, or out of range.

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

    _state: _TriggerState

    def __init__(self, patience: int = 2, mode: Mode = "min", min_delta: float = 0.0, start: int = 0) -> None:
        super().__init__(patience, mode, min_delta)
        self.start = as_count(start, "start", minimum=0, fix="it is a number of blocks, such as 0")
        self._state = _TriggerState(mode=mode, cap=self.start)

    @property
    def reason(self) -> str:
        """Why the next block waits, with the figures; empty where the schedule holds back or none is left."""
        state = self._state
        if not self._holds():
            return ""
        best = "" if state.best is None else f" on {state.best:g}, the best since the last transition"
        return (
            f"held at {state.number} of {state.total} blocks until {self.patience} checks in a row bring no improvement"
            f"{best}, {state.count} so far ({self._rule})"
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
                number, total = state.cap + 1, state.total
                log.info("PlateauTrigger: block %d of %d may join, no longer %s", number, total, self.reason)
            state.cap += 1  # the transition that follows starts the count afresh

    def _holds(self) -> bool:
        return self._state.number == self._state.cap != self._state.total


def _cpu_copy(weights: Mapping[str, Any]) -> dict[str, Any]:
    """An independent copy of a model's state; what is no tensor (`get_extra_state`) is copied as it is."""
    return {
        key: value.detach().cpu().clone() if hasattr(value, "detach") else copy.deepcopy(value)
        for key, value in weights.items()
    }


def _refuse_others(weights: Any, own: Mapping[str, Any]) -> None:
    """Refuse weights that are not of this model, by the first name that differs."""
    saved, here = (
        {key: f"a tensor of {list(v.shape)}" if hasattr(v, "detach") else "an object" for key, v in state.items()}
        for state in (weights if isinstance(weights, Mapping) else {}, own)
    )
    for key in {**here, **saved}:
        if saved.get(key) != here.get(key):
            raise ValueError(
                f"`state_dict['weights']` must be of this model, got {saved.get(key, 'nothing')} for {key}, "
                f"where it has {here.get(key, 'nothing')}; build the model that was saved"
            )
