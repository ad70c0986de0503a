"""What the callbacks share: their arguments, checked before there is an optimizer, and the unfreezer of a run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Unpack, get_args

from torch import nn
from torch.optim import Optimizer

from unfreeze_sched._checks import one_of
from unfreeze_sched.model import Block, encoder_blocks
from unfreeze_sched.model.block import validate_blocks
from unfreeze_sched.model.tracing import unwrap
from unfreeze_sched.optimizer.rebuilder import taken_out
from unfreeze_sched.schedule import Preset, UnfreezeSchedule
from unfreeze_sched.unfreezer import Options, ProgressiveUnfreezer

Head = Iterable[nn.Module | nn.Parameter] | Callable[[Any], Iterable[nn.Module | nn.Parameter]]
Blocks = Iterable[Block] | Callable[[Any], Iterable[Block]]
Schedule = UnfreezeSchedule | Preset
Unit = Literal["epochs", "steps"]

# How a refusal begins, and its way out within a framework, which makes optimizer and LR schedulers before a callback
# sees anything; a framework's own are `_fixes`, where {} stands for the way out that the refusal names.
_FIXES = {
    "`learning_rate_scale` must be 1 to join late": "pass membership='declared'",
    "`lr_schedulers` must be what sets": (
        "leave the rate to the LR scheduler, or, where your own code sets each group's, say "
        "callback.unfreezer.rebuilder.lr_schedulers = None when training starts"
    ),
    "`state_dict` must be of this schedule and these blocks, got schedule": (
        "pass strict=False to go on with another schedule"
    ),
}


class Unfreezing:
    """The part of a callback that knows no framework."""

    unfreezer: ProgressiveUnfreezer = None  # type: ignore[assignment]  # which nobody asks before there is a run
    """That of the present or last run; None before the first."""

    _defaults: ClassVar[Options] = {}
    _fixes: Mapping[str, str] = {}

    def __init__(
        self,
        schedule: Schedule,
        blocks: Blocks | None = None,
        unit: Unit = "epochs",
        monitor: str | None = None,
        head: Head | None = None,
        strict: bool = True,
        **options: Unpack[Options],
    ) -> None:
        if not isinstance(schedule, Schedule):
            got = type(schedule).__name__
            raise TypeError(f"`schedule` must be an UnfreezeSchedule or a preset, got {got}; pass MEDIUM")
        if monitor is not None and not isinstance(monitor, str):
            raise TypeError(f"`monitor` must be a metric's name or None, got {monitor!r}; pass one that you log")
        if not isinstance(strict, bool):
            raise TypeError(f"`strict` must be True or False, got {strict!r}; False lets another schedule go on")
        if blocks is not None and head is not None:
            raise ValueError("`head` must be left out where blocks are given, got both; what is in no block is head")
        inspect.signature(ProgressiveUnfreezer).bind(blocks, None, schedule, None, **options)
        self._schedule = schedule
        self._blocks = blocks if blocks is None or callable(blocks) else validate_blocks(blocks)
        self._head = head
        self._unit: Unit = one_of(unit, "unit", get_args(Unit))
        self._monitor = monitor
        self._strict = strict
        self._options: Options = {**self._defaults, **options}

    def _take_up(
        self, model: nn.Module, optimizer: Optimizer, lr_schedulers: Sequence[Any] | None, total: Callable[[], float]
    ) -> None:
        """Begin a run; `total` gives a preset its number of epochs or steps, below 1 or infinite where nobody knows."""
        blocks, schedule = self._blocks_of(model), self._schedule
        if not isinstance(schedule, UnfreezeSchedule):
            if not 1 <= (number := total()) < math.inf:
                got = type(schedule).__name__
                raise ValueError(
                    f"`schedule` must be an UnfreezeSchedule where the run's number of {self._unit} is not known, got a"
                    f" {got}; pass UnfreezeSchedule(preset=..., total_blocks=..., total_epochs=...)"
                )
            schedule = UnfreezeSchedule(preset=schedule, total_blocks=len(blocks), total_epochs=int(number))
        with self._own_fixes(), taken_out(optimizer, blocks):
            self.unfreezer = ProgressiveUnfreezer(blocks, optimizer, schedule, lr_schedulers, **self._options)

    def _blocks_of(self, model: nn.Module) -> Sequence[Block]:
        if self._blocks is not None:
            blocks = validate_blocks(self._blocks(model)) if callable(self._blocks) else self._blocks
            return [block.within(unwrap(model)) for block in blocks]  # which tells where a member is replaced
        head = self._head(model) if callable(self._head) else self._head
        with self._own_fixes():
            return encoder_blocks(model, head=head)

    @contextmanager
    def _own_fixes(self) -> Iterator[None]:
        try:
            yield
        except (TypeError, ValueError) as error:
            what, _, fix = str(error).rpartition("; ")
            own = next((own for start, own in {**_FIXES, **self._fixes}.items() if what.startswith(start)), None)
            if own is None:
                raise
            raise type(error)(f"{what}; {own.format(fix)}") from error

    def _bring_to(self, number: int) -> bool:
        """Bring the run to the state of an epoch or step; whether there is something new in its history."""
        before = len(self.unfreezer.history)
        with self._own_fixes():
            self.unfreezer.apply(number)
        return len(self.unfreezer.history) > before

    def _resume(self, saved: Mapping[str, Any]) -> None:
        """Replay the groups of a saved run; a preset follows the run's length, which may be another one now."""
        if not isinstance(self._schedule, UnfreezeSchedule):
            total = self.unfreezer.schedule.total_epochs
            saved = {**saved, "schedule": {**saved["schedule"], "total_epochs": total}}
        with self._own_fixes():
            self.unfreezer.load_state_dict(saved, strict=self._strict)

    def _refuse_unfed(self, fix: str) -> None:
        """Refuse caps that would wait for a metric in vain, in a run that never validates."""
        if self._options.get("caps") and self._monitor is not None:
            raise ValueError(
                f"`monitor` must be a metric of a validation that takes place, got {self._monitor!r} in a run without "
                f"one, so that no cap would ever hear of it; {fix}"
            )

    def _feed(self, metrics: Mapping[str, Any]) -> None:
        """Give the monitored metric to the unfreezer's caps, after a validation."""
        if self._monitor is None:
            return
        if self._monitor not in metrics:
            raise ValueError(
                f"`monitor` must be a metric of the validation, got {self._monitor!r}; pass one of {', '.join(metrics)}"
            )
        for cap in self.unfreezer.caps:
            cap.step(metrics[self._monitor])

    def _logged(self, rates: Mapping[str, float]) -> dict[str, float]:
        """What goes to the loggers: the number of blocks that train, and the learning rate of each that has joined."""
        blocks = sum(not block.is_frozen() for block in self.unfreezer.blocks)
        return {"unfreeze/blocks": blocks, **{f"unfreeze/lr/{name}": rate for name, rate in rates.items()}}
