"""Caps on the schedule that follow a metric: `OverfitGuard`, a brake, and `PlateauTrigger`, a trigger; no torch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol, Self, runtime_checkable

from pydantic import NonNegativeInt, model_validator

from unfreeze_sched._fields import as_count
from unfreeze_sched._follower import Follower, Mode, State, log, speaks


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


class _GuardState(State):
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


class _TriggerState(State):
    cap: NonNegativeInt


class OverfitGuard(Follower):
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
        if speaks():
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


class PlateauTrigger(Follower):
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
            if speaks():
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
