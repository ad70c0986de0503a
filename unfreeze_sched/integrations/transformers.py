"""`UnfreezeTrainerCallback` for the Trainer of transformers; [the guide](transformers.md)."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any, ClassVar

from unfreeze_sched.integrations._callback import Unfreezing
from unfreeze_sched.unfreezer import Options

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:  # transformers' own without torch's companions is one too
    raise ModuleNotFoundError(
        "`UnfreezeTrainerCallback` needs transformers and accelerate, of which one is not installed; "
        "pip install 'unfreeze-sched[transformers]'",
        name="transformers",
    ) from error

_STATE = "unfreeze_sched"  # in trainer_state.json, beside the states of other callbacks


class UnfreezeTrainerCallback(Unfreezing, TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """Unfreezes blocks at the start of epochs or steps, and lets them join the Trainer's own optimizer.

    The Trainer makes its optimizer of the whole model: the blocks' parameters are taken out when training starts, and
    each joins in its turn. A checkpoint of the Trainer holds all that `resume_from_checkpoint` needs.
    `unfreeze/blocks`, and `unfreeze/lr/NAME` for each block that has joined, are logged beside the training loss.

    Args:
        schedule: An `UnfreezeSchedule`, or a preset, which is then laid over the run's epochs or steps.
        blocks: The blocks, shallow to deep, or a function of the model that returns them; None takes
            `encoder_blocks(model, head=head)`.
        unit: What the schedule counts: `"epochs"`, or optimizer `"steps"`.
        monitor: Name of a metric of evaluation, such as `"eval_loss"`, that `caps` are fed with.
        head: What trains from the start, as for `encoder_blocks`, or a function of the model.
        strict: False lets a run be resumed with another schedule, such as one of more blocks.
        **options: As for `ProgressiveUnfreezer`, from `learning_rate_scale` on; `template` is among the optimizer's own
            groups. `no_decay` is True where it is left out, as norms and biases get no weight decay from the Trainer.

    Raises:
        TypeError, ValueError: A wrong argument; what depends on the model is checked when training starts.

    Example:
        >>> from unfreeze_sched import MEDIUM
        >>> callback = UnfreezeTrainerCallback(MEDIUM)  # Trainer(..., callbacks=[callback])
    """

    _defaults: ClassVar[Options] = {"no_decay": True}
    _fixes: Mapping[str, str] = {
        "`model`": "{}, both of encoder_blocks: blocks=lambda model: encoder_blocks(model, ...)",
        "`lr_schedulers` must be of known classes": (
            "say what it keeps for each group, by unfreeze_sched.optimizer.rates.register, or take another "
            "lr_scheduler_type, such as 'constant'"
        ),
    }
    _epoch: int | None = None  # while a run is on

    def begin(self, model: Any, optimizer: Any, lr_scheduler: Any, state: Any) -> None:
        """Take up a run, once: before a checkpoint is loaded, or when training begins."""
        rebuilder = self.unfreezer and self.unfreezer.rebuilder
        if rebuilder and rebuilder.optimizer is optimizer and rebuilder.lr_schedulers == [lr_scheduler]:
            return
        total = state.num_train_epochs if self._unit == "epochs" else state.max_steps
        self._take_up(model, optimizer, [lr_scheduler], lambda: total)
        if saved := state.stateful_callbacks.get(_STATE):
            self._resume(json.loads(saved))

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Take up the run; its optimizer and LR scheduler are there now."""
        if args.eval_strategy == "no":
            self._refuse_unfed("pass eval_strategy='epoch' to TrainingArguments")
        self.begin(objects["model"], objects["optimizer"], objects["lr_scheduler"], state)
        self._epoch = int(state.epoch or 0)
        self._rates: dict[str, float] = {}  # of the last step
        self._heard: dict[str, Any] = {}  # metrics of evaluations since

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Bring the model to the epoch's state."""
        assert self._epoch is not None
        if self._unit == "epochs" and self._bring_to(self._epoch):
            self._keep(state)
        self._epoch += 1  # `state.epoch` falls behind where an epoch is stopped early

    def on_step_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Bring the model to the step's state; between steps of the optimizer this is not called."""
        if self._heard and self._monitor not in self._heard:
            self._feed(self._heard)  # which it refuses
        self._heard = {}
        if self._unit == "steps" and self._bring_to(state.global_step):
            self._keep(state)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Note the rates, which the LR scheduler changes next."""
        self._rates = self.unfreezer.rebuilder.learning_rates()

    def on_evaluate(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Feed guards and triggers; of several datasets, which are evaluated one after another, one has the metric."""
        if self._epoch is not None:
            self._heard.update(objects["metrics"])
            if self._monitor in {None, *objects["metrics"]}:
                self._feed(objects["metrics"])
                self._keep(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Take no evaluation into account that is none of the run's."""
        self._epoch = None

    def metrics(self) -> dict[str, float]:
        """What is logged of the last step."""
        return {} if self._epoch is None else self._logged(self._rates)

    def _keep(self, state: Any) -> None:
        """Leave the state where the Trainer's checkpoint takes it from; as text, since the Trainer sorts keys."""
        state.stateful_callbacks[_STATE] = json.dumps(self.unfreezer.state_dict())


# The Trainer has no event between making its optimizer and loading a checkpoint into it, where the groups have to be
# replayed, and none before its loggers get what it logs. Without the callback these two do nothing more.
_load, _log = Trainer._load_optimizer_and_scheduler, Trainer.log  # noqa: SLF001


def _callbacks_of(trainer: Any) -> list[UnfreezeTrainerCallback]:
    return [each for each in trainer.callback_handler.callbacks if isinstance(each, UnfreezeTrainerCallback)]


@functools.wraps(_load)
def _replay_and_load(trainer: Any, checkpoint: str | None) -> None:
    for callback in _callbacks_of(trainer) if checkpoint is not None else ():
        callback.begin(trainer.model, trainer.optimizer, trainer.lr_scheduler, trainer.state)
    _load(trainer, checkpoint)


@functools.wraps(_log)
def _log_more(trainer: Any, logs: dict[str, float], *args: Any, **keywords: Any) -> None:
    for callback in _callbacks_of(trainer) if "learning_rate" in logs else ():  # of a training step
        logs.update(callback.metrics())
    _log(trainer, logs, *args, **keywords)


Trainer._load_optimizer_and_scheduler, Trainer.log = _replay_and_load, _log_more  # noqa: SLF001
