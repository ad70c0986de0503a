"""What the callbacks share: their arguments, checked before there is an optimizer, and the unfreezer of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

from torch import nn
from torch.optim import Optimizer

from unfreeze_sched.model import Block, encoder_blocks
from unfreeze_sched.model.block import validate_blocks
from unfreeze_sched.schedule import Preset, UnfreezeSchedule
from unfreeze_sched.unfreezer import ProgressiveUnfreezer

Head = Iterable[nn.Module | nn.Parameter] | Callable[[Any], Iterable[nn.Module | nn.Parameter]]
Blocks = Iterable[Block] | Callable[[Any], Iterable[Block]]
Schedule = UnfreezeSchedule | Preset


class Arguments:
    """The arguments of a callback.

    Args:
        schedule: A schedule, or a preset, which becomes one over the framework's own number of epochs or steps.
        blocks: The blocks, a function of the model that returns them, or None for `encoder_blocks(model, head=head)`.
        head: What trains from the start, or a function of the model that returns it.
        monitor: Name of the metric that the caps are fed with, None where the user feeds them.
        options: Of `ProgressiveUnfreezer`.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: Both blocks and head.
    """

    def __init__(
        self,
        schedule: Schedule,
        blocks: Blocks | None,
        head: Head | None,
        monitor: str | None,
        options: Mapping[str, Any],
    ) -> None:
        if not isinstance(schedule, (UnfreezeSchedule, *get_args(Preset))):
            raise TypeError(
                f"`schedule` must be an UnfreezeSchedule or a preset, got {type(schedule).__name__}; pass MEDIUM"
            )
        if monitor is not None and not isinstance(monitor, str):
            raise TypeError(f"`monitor` must be a metric's name or None, got {monitor!r}; pass one that you log")
        if blocks is not None and head is not None:
            raise ValueError("`head` must be left out where blocks are given, got both; what is in no block is head")
        self.schedule = schedule
        self.blocks = blocks if blocks is None or callable(blocks) else validate_blocks(blocks)
        self.head = head
        self.monitor = monitor
        self.options = dict(options)

    def unfreezer(
        self, model: nn.Module, optimizer: Optimizer, lr_schedulers: Sequence[Any] | None, total: int
    ) -> ProgressiveUnfreezer:
        """The unfreezer of a run; the blocks' parameters are taken out of the optimizer, to join in their turn.

        Args:
            model: Where the blocks are looked for.
            optimizer: The live optimizer, of all parameters or of the head's.
            lr_schedulers: All of this optimizer.
            total: Number of epochs or steps of the run; below 1 where the framework knows none.
        """
        if self.blocks is None:
            blocks = encoder_blocks(model, head=self.head(model) if callable(self.head) else self.head)
        else:
            blocks = validate_blocks(self.blocks(model)) if callable(self.blocks) else self.blocks
        schedule = self.schedule
        if not isinstance(schedule, UnfreezeSchedule):
            if total < 1:
                raise ValueError(
                    f"`schedule` must be an UnfreezeSchedule where the run has no end, got a "
                    f"{type(schedule).__name__}; pass UnfreezeSchedule(preset=..., total_blocks=..., total_epochs=...)"
                )
            schedule = UnfreezeSchedule(preset=schedule, total_blocks=len(blocks), total_epochs=total)
        return ProgressiveUnfreezer.taking_out(blocks, optimizer, schedule, lr_schedulers=lr_schedulers, **self.options)

    def load(self, unfreezer: ProgressiveUnfreezer, saved: Mapping[str, Any]) -> None:
        """Replay the groups of a saved run; a preset follows the run's length, which may be another one now."""
        if not isinstance(self.schedule, UnfreezeSchedule):
            total = unfreezer.schedule.total_epochs
            saved = {**saved, "schedule": {**saved["schedule"], "total_epochs": total}}
        unfreezer.load_state_dict(saved)

    def feed(self, unfreezer: ProgressiveUnfreezer, metrics: Mapping[str, Any]) -> None:
        """Give the monitored metric to the unfreezer's caps, after a validation."""
        if self.monitor is None:
            return
        if self.monitor not in metrics:
            raise ValueError(
                f"`monitor` must be a metric of the validation, got {self.monitor!r}; pass one of {', '.join(metrics)}"
            )
        for cap in unfreezer.caps:
            cap.step(metrics[self.monitor])
