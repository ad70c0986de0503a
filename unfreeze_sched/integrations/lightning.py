"""`UnfreezeCallback` for Lightning; [the guide](lightning.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from unfreeze_sched._checks import as_count
from unfreeze_sched.guards import Cap
from unfreeze_sched.integrations._callback import Arguments, Blocks, Head, Schedule
from unfreeze_sched.model.freezing import Norms, norms_of
from unfreeze_sched.optimizer.groups import layers
from unfreeze_sched.optimizer.rebuilder import Membership, OnRefreeze, Scale
from unfreeze_sched.optimizer.subsets import Overrides
from unfreeze_sched.optimizer.watch import Probe
from unfreeze_sched.parallel import rewrap_ddp
from unfreeze_sched.unfreezer import ProgressiveUnfreezer

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


class UnfreezeCallback(Callback):
    """Unfreezes blocks at the start of epochs, and lets them join an optimizer of `configure_optimizers`.

    That optimizer may hold the whole model: the blocks' parameters are taken out when training starts, and each joins
    in its turn. Its LR schedulers are found. A checkpoint of the Trainer holds all that a resume needs. Under DDP the
    model is wrapped anew when the blocks change, unless it was made with `find_unused_parameters=True`.

    `unfreeze/blocks`, and `unfreeze/lr/NAME` for each block that has joined, go to the loggers once an epoch.

    Args:
        schedule: An `UnfreezeSchedule`, or a preset, which is then laid over the Trainer's `max_epochs`.
        blocks: The blocks, shallow to deep, or a function of the LightningModule that returns them; None takes
            `encoder_blocks(module, head=head)`.
        optimizer: 0-based index among the optimizers of `configure_optimizers`.
        monitor: Name of a metric, logged in validation, that `caps` are fed with.
        head: What trains from the start, as for `encoder_blocks`, or a function of the LightningModule.
        learning_rate_scale: As for `ProgressiveUnfreezer`, like all that follow.
        layer_decay: In (0, 1].
        template: 0-based index among the optimizer's own groups.
        on_refreeze: `"keep"` or `"drop"`.
        membership: `"late"` or `"declared"`.
        no_decay: False, True, or a function of name and parameter.
        warmup_steps: At least 0.
        norms: `"eval"`, `"frozen"` or `"train"`.
        probe: `"ranks"`, `"local"` or `"off"`.
        caps: Guards and triggers.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of range; what depends on the model is checked when training starts.

    Example:
        >>> from unfreeze_sched import MEDIUM
        >>> callback = UnfreezeCallback(MEDIUM, layer_decay=0.8)  # Trainer(max_epochs=50, callbacks=[callback])
    """

    unfreezer: ProgressiveUnfreezer | None = None
    """That of the present or last fit; None before the first."""

    def __init__(
        self,
        schedule: Schedule,
        blocks: Blocks | None = None,
        optimizer: int = 0,
        monitor: str | None = None,
        head: Head | None = None,
        learning_rate_scale: Scale | None = None,
        layer_decay: float = 1.0,
        template: int = 0,
        on_refreeze: OnRefreeze = "keep",
        membership: Membership = "late",
        no_decay: bool | Overrides = False,
        warmup_steps: int = 0,
        norms: Norms = "eval",
        probe: Probe = "ranks",
        caps: Sequence[Cap] = (),
    ) -> None:
        self._arguments = Arguments(
            schedule,
            blocks,
            head,
            monitor,
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
        )
        self._index = as_count(optimizer, "optimizer", minimum=0, fix="0 is the first of configure_optimizers")
        self._saved: Mapping[str, Any] | None = None
        self._modes: dict[nn.Module, bool] = {}
        self._covered: list[bool] = []

    @property
    def state_key(self) -> str:
        """Where a checkpoint keeps the state: callbacks of several optimizers have their own."""
        return self._generate_state_key(optimizer=self._index)

    def state_dict(self) -> dict[str, Any]:
        """The unfreezer's, for the Trainer's checkpoint."""
        return self.unfreezer.state_dict() if self.unfreezer else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Called by the Trainer: before there is an optimizer, or after it by strategies that shard the model."""
        self._saved = state_dict or None
        if self.unfreezer and self._saved:
            self._arguments.load(self.unfreezer, self._saved)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget an earlier fit."""
        del trainer, pl_module
        if stage == "fit":
            self.unfreezer = self._saved = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Replay the groups of a checkpoint, since the optimizer's state is loaded next."""
        if self._index >= len(trainer.optimizers):
            raise ValueError(
                f"`optimizer` must be below {len(trainer.optimizers)}, the number of optimizers of "
                f"configure_optimizers, got {self._index}; 0 is the first"
            )
        optimizer = trainer.optimizers[self._index]
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        own = [s for s in schedulers if any(s.optimizer is layer for layer in layers(optimizer))]
        # A trial run's one epoch says nothing of the run that the preset is meant for.
        total = 1_000 if trainer.fast_dev_run else trainer.max_epochs or 0
        self.unfreezer = self._arguments.unfreezer(pl_module, optimizer, own, total)
        norms = [norm for block in self.unfreezer.blocks for norm in norms_of(block)]
        self._modes = {norm: self._modes.get(norm, norm.training) for norm in norms}
        self._covered = self._trainable()
        if self._saved:
            self._arguments.load(self.unfreezer, self._saved)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Bring the model to the present epoch: one that goes on in its middle has no start."""
        del pl_module
        self._apply(trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Bring the model to the epoch's state, and log it."""
        del pl_module
        unfreezer = self._apply(trainer)
        blocks = sum(any(p.requires_grad for p in block.parameters()) for block in unfreezer.blocks)
        rates = unfreezer.rebuilder.learning_rates()
        metrics = {"unfreeze/blocks": blocks, **{f"unfreeze/lr/{name}": rate for name, rate in rates.items()}}
        for logger in trainer.loggers:
            # The step of Lightning's own metrics, as LearningRateMonitor has it.
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)  # noqa: SLF001

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Feed guards and triggers."""
        del pl_module
        if self.unfreezer and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._arguments.feed(self.unfreezer, trainer.callback_metrics)

    def _apply(self, trainer: Any) -> ProgressiveUnfreezer:
        assert self.unfreezer is not None
        before = self._trainable()
        self.unfreezer.apply(trainer.current_epoch)
        after = self._trainable()
        if after != before and self.unfreezer.norms != "train":
            for norm, mode in self._modes.items():
                norm.train(mode)  # after validation Lightning restores modes past `train()`, unseen by what holds norms
        ddp = trainer.strategy.model
        if after != self._covered and isinstance(ddp, DistributedDataParallel) and not ddp.find_unused_parameters:
            trainer.strategy.model = rewrap_ddp(ddp)
            self._covered = after
        return self.unfreezer

    def _trainable(self) -> list[bool]:
        assert self.unfreezer is not None
        return [p.requires_grad for block in self.unfreezer.blocks for p in block.parameters()]
