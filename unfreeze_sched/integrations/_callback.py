"""What the callbacks share: their arguments, checked before there is an optimizer, and the unfreezer of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import Optimizer

from unfreeze_sched._checks import one_of
from unfreeze_sched.model import Block, encoder_blocks
from unfreeze_sched.model.admission import validate_blocks
from unfreeze_sched.model.tracing import unwrap
from unfreeze_sched.schedule import Preset, UnfreezeSchedule
from unfreeze_sched.unfreezer import ProgressiveUnfreezer

Head = Iterable[nn.Module | nn.Parameter] | Callable[[Any], Iterable[nn.Module | nn.Parameter]]
Blocks = Iterable[Block] | Callable[[Any], Iterable[Block]]
Schedule = UnfreezeSchedule | Preset
Unit = Literal["epochs", "steps"]

# How a refusal begins, and its way out within a framework, which makes optimizer and LR schedulers before a callback
# sees anything.
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


class Arguments:
    """The arguments of a callback.

    Args:
        schedule: A schedule, or a preset, which becomes one over the framework's own number of epochs or steps.
        blocks: The blocks, a function of the model that returns them, or None for `encoder_blocks(model, head=head)`.
        head: What trains from the start, or a function of the model that returns it.
        unit: What the schedule counts.
        monitor: Name of the metric that the caps are fed with, None where the user feeds them.
        strict: Whether a saved run has to be of the same schedule.
        options: Of `ProgressiveUnfreezer`.
        fixes: By its beginning, the way out of a refusal that is the framework's own.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: Both blocks and head, or an unknown unit.
    """

    def __init__(
        self,
        schedule: Schedule,
        blocks: Blocks | None,
        head: Head | None,
        unit: Unit,
        monitor: str | None,
        strict: bool,
        options: Mapping[str, Any],
        fixes: Mapping[str, str],
    ) -> None:
        if not isinstance(schedule, (UnfreezeSchedule, *get_args(Preset))):
            raise TypeError(
                f"`schedule` must be an UnfreezeSchedule or a preset, got {type(schedule).__name__}; pass MEDIUM"
            )
        if monitor is not None and not isinstance(monitor, str):
            raise TypeError(f"`monitor` must be a metric's name or None, got {monitor!r}; pass one that you log")
        if not isinstance(strict, bool):
            raise TypeError(f"`strict` must be True or False, got {strict!r}; False lets another schedule go on")
        if blocks is not None and head is not None:
            raise ValueError("`head` must be left out where blocks are given, got both; what is in no block is head")
        self.schedule = schedule
        self.blocks = blocks if blocks is None or callable(blocks) else validate_blocks(blocks)
        self.head = head
        self.unit: Unit = one_of(unit, "unit", get_args(Unit))
        self.monitor = monitor
        self.strict = strict
        self.options = dict(options)
        self._fixes = {**_FIXES, **fixes}

    def unfreezer(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        lr_schedulers: Sequence[Any] | None,
        total: Callable[[], float],
        network: str = "",
    ) -> ProgressiveUnfreezer:
        """The unfreezer of a run; the blocks' parameters are taken out of the optimizer, to join in their turn.

        Args:
            model: Where the blocks are looked for.
            optimizer: The live optimizer, of all parameters or of the head's.
            lr_schedulers: All of this optimizer.
            total: Gives the run's number of epochs or steps, asked for by a preset; below 1 or infinite where the
                framework knows none.
            network: Where in the model the network that has the blocks lies, such as `.net`.
        """
        blocks = self._blocks_of(model, network)
        schedule = self.schedule
        if not isinstance(schedule, UnfreezeSchedule):
            number = total()
            if not 1 <= number < float("inf"):
                raise ValueError(
                    f"`schedule` must be an UnfreezeSchedule where the run's number of {self.unit} is not known, got a "
                    f"{type(schedule).__name__}; pass UnfreezeSchedule(preset=..., total_blocks=..., total_epochs=...)"
                )
            schedule = UnfreezeSchedule(preset=schedule, total_blocks=len(blocks), total_epochs=int(number))
        with self._with_fixes():
            return ProgressiveUnfreezer.taking_out(
                blocks, optimizer, schedule, lr_schedulers=lr_schedulers, **self.options
            )

    def _blocks_of(self, model: nn.Module, network: str) -> Sequence[Block]:
        if self.blocks is not None:
            blocks = validate_blocks(self.blocks(model)) if callable(self.blocks) else self.blocks
            return [block.within(unwrap(model)) for block in blocks]  # which tells where a member is replaced
        head = self.head(model) if callable(self.head) else self.head
        try:
            return encoder_blocks(model, head=head)
        except (TypeError, ValueError) as error:
            what, _, fix = str(error).rpartition("; ")
            asks_for_head = head is None and what.startswith("`head`")
            if not what.startswith("`model`") and not (network and asks_for_head):
                raise  # that is about the callback's own `head`
            if network:
                asks_of_network = asks_for_head and f"for a {type(model).__name__}," not in what
                more = ", head=[...]" if asks_of_network or head is not None else ""
                fix = f"pass blocks=lambda module: encoder_blocks(module{network}{more})"
            else:
                fix += ", both of encoder_blocks: blocks=lambda model: encoder_blocks(model, ...)"
            raise type(error)(f"{what}; {fix}") from error

    @contextmanager
    def _with_fixes(self) -> Iterator[None]:
        """Name the way out that the framework's order of things leaves."""
        try:
            yield
        except (TypeError, ValueError) as error:
            what, _, _ = str(error).rpartition("; ")
            fix = next((fix for start, fix in self._fixes.items() if what.startswith(start)), None)
            if fix is None:
                raise
            raise type(error)(f"{what}; {fix}") from None

    def apply(self, unfreezer: ProgressiveUnfreezer, number: int) -> bool:
        """Bring a run to the state of an epoch or step; whether there is something new in its history."""
        before = len(unfreezer.history)
        with self._with_fixes():
            unfreezer.apply(number)
        return len(unfreezer.history) > before

    def load(self, unfreezer: ProgressiveUnfreezer, saved: Mapping[str, Any]) -> None:
        """Replay the groups of a saved run; a preset follows the run's length, which may be another one now."""
        if not isinstance(self.schedule, UnfreezeSchedule):
            total = unfreezer.schedule.total_epochs
            saved = {**saved, "schedule": {**saved["schedule"], "total_epochs": total}}
        with self._with_fixes():
            unfreezer.load_state_dict(saved, strict=self.strict)

    def refuse_unfed(self, *, validates: bool, fix: str) -> None:
        """Refuse caps that would wait for a metric in vain."""
        if self.options["caps"] and self.monitor is not None and not validates:
            raise ValueError(
                f"`monitor` must be a metric of a validation that takes place, got {self.monitor!r} in a run without "
                f"one, so that no cap would ever hear of it; {fix}"
            )

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


def metrics(unfreezer: ProgressiveUnfreezer, rates: Mapping[str, float]) -> dict[str, float]:
    """What goes to the loggers: the number of blocks that train, and the learning rate of each that has joined."""
    blocks = sum(not block.is_frozen() for block in unfreezer.blocks)
    return {"unfreeze/blocks": blocks, **{f"unfreeze/lr/{name}": rate for name, rate in rates.items()}}
