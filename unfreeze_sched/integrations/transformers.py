"""`UnfreezeTrainerCallback` for the Trainer of transformers; [the guide](transformers.md).

The Trainer has no event between making its optimizer and loading a checkpoint into it, where the groups have to be
replayed, and none before its loggers get what it logs. So importing this module wraps `Trainer.log` and
`Trainer._load_optimizer_and_scheduler`, which do nothing more for a Trainer without the callback.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

from unfreeze_sched.guards import Cap
from unfreeze_sched.integrations._callback import Arguments, Blocks, Head, Schedule, Unit, metrics
from unfreeze_sched.model.freezing import Norms
from unfreeze_sched.optimizer.rebuilder import Membership, OnRefreeze, Scale
from unfreeze_sched.optimizer.subsets import Overrides
from unfreeze_sched.optimizer.watch import Probe
from unfreeze_sched.unfreezer import ProgressiveUnfreezer

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:  # transformers' own without torch's companions is one too
    raise ModuleNotFoundError(
        "`UnfreezeTrainerCallback` needs transformers and accelerate, of which one is not installed; "
        "pip install 'unfreeze-sched[transformers]'",
        name="transformers",
    ) from error

_FIXES = {
    "`lr_schedulers` must be of known classes": (
        "say what it keeps for each group, by unfreeze_sched.optimizer.rates.register, or take another "
        "lr_scheduler_type, such as 'constant'"
    )
}
_STATE = "unfreeze_sched"  # in trainer_state.json, beside the states of other callbacks


class UnfreezeTrainerCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """Unfreezes blocks at the start of epochs or steps, and lets them join the Trainer's own optimizer.

    The Trainer makes its optimizer of the whole model: the blocks' parameters are taken out when training starts, and
    each joins in its turn. As the Trainer does, norms and biases get no weight decay. A checkpoint of the Trainer holds
    all that `resume_from_checkpoint` needs.

    `unfreeze/blocks`, and `unfreeze/lr/NAME` for each block that has joined, are logged beside the training loss.

    Args:
        schedule: An `UnfreezeSchedule`, or a preset, which is then laid over the run's epochs or steps.
        blocks: The blocks, shallow to deep, or a function of the model that returns them; None takes
            `encoder_blocks(model, head=head)`.
        unit: What the schedule counts: `"epochs"`, or optimizer `"steps"`.
        monitor: Name of a metric of evaluation, such as `"eval_loss"`, that `caps` are fed with.
        head: What trains from the start, as for `encoder_blocks`, or a function of the model.
        learning_rate_scale: As for `ProgressiveUnfreezer`, like all that follow up to `caps`.
        layer_decay: In (0, 1].
        template: 0-based index among the optimizer's own groups.
        on_refreeze: `"keep"` or `"drop"`.
        membership: `"late"` or `"declared"`.
        no_decay: False, True, or a function of name and parameter.
        warmup_steps: At least 0.
        norms: `"eval"`, `"frozen"`, `"fixed"` or `"train"`.
        probe: `"ranks"`, `"local"` or `"off"`.
        caps: Guards and triggers.
        strict: False lets a run be resumed with another schedule, such as one of more blocks.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of range; what depends on the model is checked when training starts.

    Example:
        >>> from unfreeze_sched import MEDIUM
        >>> callback = UnfreezeTrainerCallback(MEDIUM)  # Trainer(..., callbacks=[callback])
    """

    unfreezer: ProgressiveUnfreezer | None = None
    """That of the present or last run; None before the first."""

    def __init__(
        self,
        schedule: Schedule,
        blocks: Blocks | None = None,
        unit: Unit = "epochs",
        monitor: str | None = None,
        head: Head | None = None,
        learning_rate_scale: Scale | None = None,
        layer_decay: float = 1.0,
        template: int = 0,
        on_refreeze: OnRefreeze = "keep",
        membership: Membership = "late",
        no_decay: bool | Overrides = True,
        warmup_steps: int = 0,
        norms: Norms = "eval",
        probe: Probe = "ranks",
        caps: Sequence[Cap] = (),
        strict: bool = True,
    ) -> None:
        self._arguments = Arguments(
            schedule,
            blocks,
            head,
            unit,
            monitor,
            strict,
            {
                "learning_rate_scale": learning_rate_scale,
                "layer_decay": layer_decay,
                "template": template,
                "on_refreeze": on_refreeze,
                "membership": membership,
                "no_decay": no_decay,
                "warmup_steps": warmup_steps,
                "norms": norms,
                "probe": probe,
                "caps": caps,
            },
            _FIXES,
        )
        self._rates: dict[str, float] = {}  # of the last step
        self._fed_at: int | None = None
        self._unheard: dict[str, Any] = {}  # metrics since, without the monitored one
        self._epoch: int | None = None  # while a run is on

    def begin(self, model: Any, optimizer: Any, lr_scheduler: Any, state: Any) -> None:
        """Take up a run, once: before a checkpoint is loaded, or when training begins."""
        unfreezer = self.unfreezer
        if (
            unfreezer
            and unfreezer.rebuilder.optimizer is optimizer
            and unfreezer.rebuilder.lr_schedulers == [lr_scheduler]
        ):
            return
        total = state.num_train_epochs if self._arguments.unit == "epochs" else state.max_steps
        self.unfreezer = self._arguments.unfreezer(model, optimizer, [lr_scheduler], lambda: total)
        if saved := state.stateful_callbacks.get(_STATE):
            self._arguments.load(self.unfreezer, json.loads(saved))

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Take up the run; its optimizer and LR scheduler are there now."""
        del control
        self._arguments.refuse_unfed(
            validates=args.eval_strategy != "no", fix="pass eval_strategy='epoch' to TrainingArguments"
        )
        self.begin(objects["model"], objects["optimizer"], objects["lr_scheduler"], state)
        self._epoch = int(state.epoch or 0)
        self._fed_at, self._unheard = None, {}

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Bring the model to the epoch's state."""
        del args, control, objects
        assert self._epoch is not None
        if self._arguments.unit == "epochs":
            self._apply(self._epoch, state)
        self._epoch += 1  # `state.epoch` falls behind where an epoch is stopped early

    def on_step_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Bring the model to the step's state; between steps of the optimizer this is not called."""
        del args, control, objects
        if self._unheard and self.unfreezer:
            self._arguments.feed(self.unfreezer, self._unheard)  # which it refuses
        if self._arguments.unit == "steps":
            self._apply(state.global_step, state)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Note the rates, which the LR scheduler changes next."""
        del args, state, control, objects
        assert self.unfreezer is not None
        self._rates = self.unfreezer.rebuilder.learning_rates()

    def metrics(self) -> dict[str, float]:
        """What is logged of the last step."""
        return metrics(self.unfreezer, self._rates) if self.unfreezer else {}

    def on_evaluate(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Feed guards and triggers; of several datasets, which are evaluated one after another, one has the metric."""
        del args, control
        if not self.unfreezer or self._epoch is None:
            return
        if self._arguments.monitor in {None, *objects["metrics"]}:
            self._fed_at, self._unheard = state.global_step, {}
            self._arguments.feed(self.unfreezer, objects["metrics"])
            self._keep(state)
        elif self._fed_at != state.global_step:
            self._unheard.update(objects["metrics"])

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Take no evaluation into account that is none of the run's."""
        del args, state, control, objects
        self._epoch = None

    def _apply(self, number: int, state: Any) -> None:
        assert self.unfreezer is not None
        if self._arguments.apply(self.unfreezer, number):
            self._keep(state)

    def _keep(self, state: Any) -> None:
        """Leave the state where the Trainer's checkpoint takes it from; as text, since the Trainer sorts keys."""
        assert self.unfreezer is not None
        state.stateful_callbacks[_STATE] = json.dumps(self.unfreezer.state_dict())


def _callbacks_of(trainer: Any) -> list[UnfreezeTrainerCallback]:
    return [each for each in trainer.callback_handler.callbacks if isinstance(each, UnfreezeTrainerCallback)]


_load = Trainer._load_optimizer_and_scheduler  # noqa: SLF001  # see above
_log = Trainer.log


@functools.wraps(_load)
def _replay_and_load(trainer: Any, checkpoint: str | None) -> None:
    if checkpoint is not None:
        for callback in _callbacks_of(trainer):
            callback.begin(trainer.model, trainer.optimizer, trainer.lr_scheduler, trainer.state)
    _load(trainer, checkpoint)


@functools.wraps(_log)
def _log_more(trainer: Any, logs: dict[str, float], *args: Any, **keywords: Any) -> None:
    if "learning_rate" in logs:  # of a training step
        for callback in _callbacks_of(trainer):
            logs.update(callback.metrics())
    _log(trainer, logs, *args, **keywords)


Trainer._load_optimizer_and_scheduler = _replay_and_load  # noqa: SLF001
Trainer.log = _log_more
