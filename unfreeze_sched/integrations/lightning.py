"""`UnfreezeCallback` for Lightning; [the guide](lightning.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Unpack

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import SWALR

from unfreeze_sched._checks import as_count
from unfreeze_sched.integrations._callback import Blocks, Head, Schedule, Unfreezing, Unit
from unfreeze_sched.model.freezing import asked_of, is_held, is_norm, norms_of
from unfreeze_sched.optimizer.groups import layers
from unfreeze_sched.parallel import rewrap_ddp
from unfreeze_sched.unfreezer import Options

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:
        try:
            from pytorch_lightning import Callback
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "`UnfreezeCallback` needs lightning, which is not installed; pip install 'unfreeze-sched[lightning]'",
                name="lightning",
            ) from error


class UnfreezeCallback(Unfreezing, Callback):
    """Unfreezes blocks at the start of epochs or steps, and lets them join an optimizer of `configure_optimizers`.

    That optimizer may hold the whole model: the blocks' parameters are taken out when training starts, and each joins
    in its turn. Its LR schedulers are found, as are those that take over in mid-run. A checkpoint of the Trainer holds
    all that a resume needs. Under DDP the model is wrapped anew when the blocks change, unless it was made with
    `find_unused_parameters=True`. `unfreeze/blocks`, and `unfreeze/lr/NAME` for each block that has joined, go to the
    loggers once an epoch and at each transition between.

    Args:
        schedule: An `UnfreezeSchedule`, or a preset, which is then laid over the Trainer's epochs or steps.
        blocks: The blocks, shallow to deep, or a function of the LightningModule that returns them; None takes
            `encoder_blocks(module, head=head)`.
        optimizer: 0-based index among the optimizers of `configure_optimizers`.
        unit: What the schedule counts: `"epochs"`, or `"steps"` of that optimizer.
        monitor: Name of a metric, logged in validation, that `caps` are fed with.
        head: What trains from the start, as for `encoder_blocks`, or a function of the LightningModule.
        strict: False lets a run be resumed with another schedule, such as one of more blocks.
        **options: As for `ProgressiveUnfreezer`, from `learning_rate_scale` on; `template` is among the optimizer's own
            groups.

    Raises:
        TypeError, ValueError: A wrong argument; what depends on the model is checked when training starts.

    Example:
        >>> from unfreeze_sched import MEDIUM
        >>> callback = UnfreezeCallback(MEDIUM, layer_decay=0.8)  # Trainer(max_epochs=50, callbacks=[callback])
    """

    def __init__(
        self,
        schedule: Schedule,
        blocks: Blocks | None = None,
        optimizer: int = 0,
        unit: Unit = "epochs",
        monitor: str | None = None,
        head: Head | None = None,
        strict: bool = True,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(schedule, blocks, unit, monitor, head, strict, **options)
        self._index = as_count(optimizer, "optimizer", minimum=0, fix="0 is the first of configure_optimizers")
        self._steps = 0
        self._modes: dict[nn.Module, bool] = {}  # asked of the norms, before evaluations of Lightning's own

    @property
    def state_key(self) -> str:
        """Where a checkpoint keeps the state: callbacks of several optimizers have their own."""
        return self._generate_state_key(optimizer=self._index)

    def state_dict(self) -> dict[str, Any]:
        """The unfreezer's, and the number of steps, for the Trainer's checkpoint."""
        return {**self.unfreezer.state_dict(), "steps": self._steps} if self.unfreezer else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Called by the Trainer: before there is an optimizer; or after, by strategies that shard, and by tuners."""
        self._saved: Mapping[str, Any] | None = state_dict or None
        if self.unfreezer and self._saved:
            self._resume(self._saved)
            self._has_loaded = True

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget an earlier fit, take note of the norms' modes, and take the place among the callbacks."""
        self._modes = {module: asked_of(module) for module in pl_module.modules() if is_norm(module)}
        if stage == "fit":
            self.unfreezer = self._saved = None  # type: ignore[assignment]  # as at first
            self._statistics: dict[nn.Module, dict[str, Tensor]] = {}  # of held norms, which an SWA is going to reset
            self._epochs = trainer.max_epochs or 0  # to which an SWA adds one, for norms
            trainer.callbacks = sorted(trainer.callbacks, key=_place)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Replay the groups of a checkpoint, since the optimizer's state is loaded next; or begin."""
        if self._index >= len(trainer.optimizers):
            raise ValueError(
                f"`optimizer` must be below {len(trainer.optimizers)}, the number of optimizers of "
                f"configure_optimizers, got {self._index}; 0 is the first"
            )
        last, every = trainer.max_epochs, trainer.check_val_every_n_epoch or 1
        if not trainer.enable_validation or (last not in {None, -1} and last < every):
            self._refuse_unfed(
                "give the fit a validation loader and its module a validation_step, with limit_val_batches above 0 and "
                "check_val_every_n_epoch within the run"
            )
        self._fixes = self._ways(pl_module)
        optimizer = trainer.optimizers[self._index]
        self._live = _schedulers_of(optimizer, trainer)  # as last seen
        # An SWA that resumes has put the schedulers away; it brings its own.
        schedulers = None if self._saved and not self._live else self._live
        self._take_up(pl_module, optimizer, schedulers, lambda: self._total(trainer, pl_module))
        if not trainer.global_step:  # else this is a further fit of a run
            self._steps = 0
        self._applied_at: int | None = None  # the epoch or step
        self._has_loaded = False  # within the fit
        norms = [norm for block in self.unfreezer.blocks for norm in norms_of(block)]
        self._modes = {norm: self._modes.get(norm, asked_of(norm)) for norm in norms}
        if self._saved:
            self._resume(self._saved)
            self._settle(trainer)
        elif _has(trainer.callbacks, "LearningRateFinder", "BatchSizeFinder"):
            self._apply(trainer)  # they come next, and are to train what the run begins with

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Bring the model to the state of the epoch or step, and log it."""
        for norm, statistics in self._statistics.items():  # an SWA may have reset them just now
            for name, value in statistics.items():
                norm.get_buffer(name).copy_(value)
        self._apply(trainer)
        self._log(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Bring the model to the state of the step."""
        if self._unit == "steps" and self._apply(trainer):
            self._log(trainer)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Count the steps of this optimizer, where the Trainer counts those of all together."""
        self._steps += optimizer is trainer.optimizers[self._index]

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Feed guards and triggers."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._feed(trainer.callback_metrics)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """As at the end of a run, which then has none."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take back what evaluations asked of held norms: Lightning restores the modes past `train()`."""
        for norm in filter(is_held, self._modes):
            norm.train(self._modes[norm])

    def _ways(self, pl_module: nn.Module) -> dict[str, str]:
        """The ways out of refusals that are Lightning's own, by their beginnings."""
        asks = "`head` must say what trains from the start, got None for a "
        way = f"pass blocks=lambda module: encoder_blocks(module{_network(pl_module)}"
        return {
            f"{asks}{type(pl_module).__name__},": f"{way})",
            asks: f"{way}, head=[...])",
            "`model`": f"{way})" if self._head is None else f"{way}, head=[...])",
            "`lr_schedulers` must be of known classes": (
                "say what it keeps for each group, by unfreeze_sched.optimizer.rates.register, or return another from "
                "configure_optimizers"
            ),
            "`lr_schedulers` must hold": "return it from configure_optimizers, where the callback finds it",
        }

    def _total(self, trainer: Any, pl_module: Any) -> float:
        """The number of epochs or steps that a preset is laid over; 0 where nobody knows."""
        if trainer.fast_dev_run:  # its one epoch says nothing of the run that the preset is meant for
            return 1_000
        if self._unit == "epochs":
            return self._epochs
        if not pl_module.automatic_optimization:
            return 0
        total: float = trainer.estimated_stepping_batches
        if self._saved:
            # It has set up the loaders before their own states are there; they are set up anew.
            trainer.fit_loop._combined_loader = None  # noqa: SLF001  # as Lightning's tuners do
        return total

    def _resume(self, saved: Mapping[str, Any]) -> None:
        own = dict(saved)
        self._steps = own.pop("steps", 0)
        super()._resume(own)

    def _apply(self, trainer: Any) -> bool:
        """Bring the model to the present state; whether it changed."""
        if self._has_loaded:
            self._has_loaded = False
            self._settle(trainer)
            if _has(trainer.callbacks, "LearningRateFinder"):
                self._take_over_rate()
        self._follow(trainer)
        number = self._steps if self._unit == "steps" else trainer.current_epoch
        if number == self._applied_at:  # within an accumulation
            return False
        self._applied_at = number
        if has_changed := self._bring_to(number):
            self._settle(trainer)
        return has_changed

    def _follow(self, trainer: Any) -> None:
        """Take note of LR schedulers that took over, as an SWA's does."""
        live = _schedulers_of(self.unfreezer.rebuilder.optimizer, trainer)
        if live == self._live:
            return
        self._live = self.unfreezer.rebuilder.lr_schedulers = live
        for scheduler in live:
            if isinstance(scheduler, SWALR):
                # Without epochs to anneal over, the rate is at its peak already.
                self._share("swa_lr", "initial_lr", *(() if scheduler.anneal_epochs else ("lr",)))

    def _take_over_rate(self) -> None:
        """Go on from the rate that a search left in all groups, which the schedulers have to know of."""
        self._share("lr")
        rebuilder = self.unfreezer.rebuilder
        for scheduler in self._live:
            if hasattr(scheduler, "_last_lr"):
                scheduler._last_lr = [group["lr"] for group in rebuilder.optimizer.param_groups]  # noqa: SLF001  # torch's
        if not self._live:
            rebuilder.lr_schedulers = None  # the search's own left its marks

    def _share(self, *keys: str) -> None:
        """Give each block its share of what was written into all groups alike; a list of the user's own is left."""
        for group, template, ratio in self.unfreezer.rebuilder.shares():
            if group[keys[0]] == template[keys[0]]:
                group.update({key: template[key] * ratio for key in keys})

    def _settle(self, trainer: Any) -> None:
        """After a change: the norms' modes, and a DDP that covers what trains now."""
        if self.unfreezer.norms != "train":
            for norm, mode in self._modes.items():
                norm.train(mode)  # after validation Lightning restores modes past `train()`, unseen by what holds norms
        if _has(trainer.callbacks, "StochasticWeightAveraging"):
            held = filter(is_held, self._modes)
            self._statistics = {norm: {name: b.clone() for name, b in norm.named_buffers()} for norm in held}
        ddp = trainer.strategy.model
        if isinstance(ddp, DistributedDataParallel) and not ddp.find_unused_parameters:
            trainer.strategy.model = rewrap_ddp(ddp)

    def _log(self, trainer: Any) -> None:
        for logger in trainer.loggers:
            # The step of Lightning's own metrics, as LearningRateMonitor has it.
            step = trainer.fit_loop.epoch_loop._batches_that_stepped  # noqa: SLF001
            logger.log_metrics(self._logged(self.unfreezer.rebuilder.learning_rates()), step=step)


def _has(callbacks: Iterable[Any], *names: str) -> bool:
    """Whether one of them is of these classes of Lightning's, which has two packages."""
    return any(cls.__name__ in names for callback in callbacks for cls in type(callback).__mro__)


def _place(callback: Any) -> int:
    """Where a callback stands: what swaps the LR scheduler first, then this, then what searches on what it leaves."""
    return 0 if _has([callback], "StochasticWeightAveraging") else 1 if isinstance(callback, UnfreezeCallback) else 2


def _schedulers_of(optimizer: Any, trainer: Any) -> list[Any]:
    """Those of this optimizer, or of one that it wraps."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    return [scheduler for scheduler in schedulers if any(scheduler.optimizer is each for each in layers(optimizer))]


def _network(pl_module: nn.Module) -> str:
    """Where the network lies: the one child with nearly all parameters, or what it is usually called."""
    sizes = {name: sum(p.numel() for p in child.parameters()) for name, child in pl_module.named_children()}
    most = 0.9 * sum(p.numel() for p in pl_module.parameters())
    return "." + next((name for name, size in sizes.items() if size > most), "model")
