"""What the callbacks share: their arguments, and an optimizer that the framework made of all parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import compress
from typing import Any

from torch import nn
from torch.optim import Optimizer

from unfreeze_sched.model import Block, encoder_blocks
from unfreeze_sched.model.block import validate_blocks
from unfreeze_sched.optimizer.groups import BLOCK_KEY, layers
from unfreeze_sched.schedule import FractionPreset, MilestonePreset, RatePreset, UnfreezeSchedule
from unfreeze_sched.unfreezer import ProgressiveUnfreezer

Blocks = Iterable[Block] | Callable[[Any], Iterable[Block]]
Schedule = UnfreezeSchedule | RatePreset | MilestonePreset | FractionPreset

_OWN = ("blocks", "optimizer", "schedule", "lr_schedulers")
_KEYWORDS = tuple(name for name in inspect.signature(ProgressiveUnfreezer).parameters if name not in _OWN)


class Plan:
    """The arguments of a callback, checked before there is an optimizer.

    Args:
        schedule: A schedule, or a preset, which becomes one over the framework's own number of epochs or steps.
        blocks: The blocks, a function of the model that returns them, or None for `encoder_blocks(model)`.
        monitor: Name of the metric that the caps are fed with, None where the user feeds them.
        keywords: Of `ProgressiveUnfreezer`.

    Raises:
        TypeError: An argument of the wrong type, or a keyword that `ProgressiveUnfreezer` does not have.

    Example:
        >>> from unfreeze_sched import MEDIUM
        >>> Plan(MEDIUM, None, None, {"layer_dekay": 0.8})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        TypeError: `layer_dekay` must be a keyword of ProgressiveUnfreezer (learning_rate_scale, ...); correct its name
    """

    def __init__(
        self, schedule: Schedule, blocks: Blocks | None, monitor: str | None, keywords: Mapping[str, Any]
    ) -> None:
        if not isinstance(schedule, (UnfreezeSchedule, RatePreset, MilestonePreset, FractionPreset)):
            raise TypeError(
                f"`schedule` must be an UnfreezeSchedule or a preset, got {type(schedule).__name__}; pass MEDIUM"
            )
        for name in keywords:
            if name not in _KEYWORDS:
                raise TypeError(
                    f"`{name}` must be a keyword of ProgressiveUnfreezer ({', '.join(_KEYWORDS)}); correct its name"
                )
        self.schedule = schedule
        self.blocks = blocks if blocks is None or callable(blocks) else validate_blocks(blocks)
        if monitor is not None and not isinstance(monitor, str):
            raise TypeError(f"`monitor` must be a metric's name or None, got {monitor!r}; pass one that you log")
        self.monitor = monitor
        self.keywords = dict(keywords)

    def unfreezer(
        self, model: nn.Module, optimizer: Optimizer, lr_schedulers: Sequence[Any] | None, total: int
    ) -> ProgressiveUnfreezer:
        """The unfreezer of a run.

        Args:
            model: Where the blocks are looked for.
            optimizer: The live optimizer; the blocks' parameters are taken out of its groups, to join in their turn.
            lr_schedulers: All of this optimizer.
            total: Number of epochs or steps of the run; below 1 where the framework knows none.
        """
        blocks = self.blocks
        if blocks is None:
            blocks = encoder_blocks(model)
        elif callable(blocks):
            blocks = validate_blocks(blocks(model))
        schedule = self.schedule
        if not isinstance(schedule, UnfreezeSchedule):
            if total < 1:
                raise ValueError(
                    f"`schedule` must be an UnfreezeSchedule where the run has no end, got a "
                    f"{type(schedule).__name__}; pass UnfreezeSchedule(preset=..., total_blocks=..., total_epochs=...)"
                )
            schedule = UnfreezeSchedule(preset=schedule, total_blocks=len(blocks), total_epochs=total)
        put_back = take_out(optimizer, blocks)
        try:
            return ProgressiveUnfreezer(blocks, optimizer, schedule, lr_schedulers, **self.keywords)
        except Exception:
            put_back()
            raise

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


def take_out(optimizer: Optimizer, blocks: Iterable[Block]) -> Callable[[], None]:
    """Take the blocks' parameters out of an optimizer that was made of the whole model: in place, with their state.

    Args:
        optimizer: The live optimizer.
        blocks: The blocks; their own groups stay.

    Returns:
        A function that puts them back.

    Raises:
        ValueError: Nothing would be left, or a group would be left empty whose learning rate is its own, which would be
            lost silently.
    """
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    groups = [group for group in optimizer.param_groups if BLOCK_KEY not in group]
    kept = [[id(parameter) not in inside for parameter in group["params"]] for group in groups]
    _refuse_loss(groups, kept)
    lists: list[tuple[list[Any], list[Any]]] = []
    states = [(layer.state, dict(layer.state)) for layer in layers(optimizer)]
    for group, keep in zip(groups, kept, strict=True):
        left = [parameter for parameter, stays in zip(group["params"], keep, strict=True) if not stays]
        for state, _ in states:
            for parameter in left:
                state.pop(parameter, None)
        for values in (group[key] for key in ("params", "param_names") if key in group):
            lists.append((values, list(values)))
            values[:] = compress(values, keep)

    def put_back() -> None:
        for values, before in lists:
            values[:] = before
        for state, content in states:
            state.clear()
            state.update(content)

    return put_back


def _refuse_loss(groups: list[dict[str, Any]], kept: list[list[bool]]) -> None:
    """Refuse to leave nothing, or a group empty whose learning rate no other has."""
    if not any(map(any, kept)):
        raise ValueError(
            "`blocks` must leave parameters to the optimizer, got all that it holds; leave the head out of the blocks"
        )
    rates = [float(group["lr"]) for group, keep in zip(groups, kept, strict=True) if any(keep) and "lr" in group]
    for index, (group, keep) in enumerate(zip(groups, kept, strict=True)):
        if keep and not any(keep) and "lr" in group and float(group["lr"]) not in rates:
            raise ValueError(
                f"`optimizer` must not hold a group of block parameters alone with a rate of its own, got group "
                f"{index} at lr={float(group['lr']):g}; leave it out, and pass learning_rate_scale"
            )
