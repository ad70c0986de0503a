"""`unit="steps"` of Lightning's callback: optimizer steps, between accumulations, through a resume at any of them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

L = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.loggers import CSVLogger  # noqa: E402  # after the skip
from test_lightning import (  # noqa: E402
    EPOCHS,
    Automatic,
    Manual,
    Net,
    Resumable,
    Steps,
    assert_equal,
    blocks_of,
    cosine,
    fit,
    loader,
    one_rank,  # noqa: F401  # a fixture
    pytestmark,  # noqa: F401  # pytest reads it
    trainer,
    twins,
)

from unfreeze_sched import FractionPreset, MilestonePreset, ProgressiveUnfreezer, RatePreset, UnfreezeSchedule  # noqa: E402
from unfreeze_sched.guards import PlateauTrigger  # noqa: E402
from unfreeze_sched.integrations.lightning import UnfreezeCallback  # noqa: E402

PRESET = RatePreset(unfreeze_start_epoch=3, unfreeze_rate=2, learning_rate_scale=0.5)


def by_steps(net: Net, total: int, accumulate: int = 1, preset: Any = PRESET) -> Any:
    """The library in a loop of one's own, which steps at the end of an epoch too, as Lightning does."""
    optimizer = torch.optim.AdamW(net.head.parameters(), lr=0.01)
    scheduler = cosine(optimizer)
    schedule = UnfreezeSchedule(preset=preset, total_blocks=3, total_epochs=total)
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, schedule, lr_schedulers=[scheduler])
    step = 0
    for _ in range(EPOCHS):
        net.train()
        batches = list(loader())
        for index, (x, y) in enumerate(batches):
            if index % accumulate == 0:
                unfreezer.apply(step)
                optimizer.zero_grad()
            (nn.functional.mse_loss(net(x), y) / accumulate).backward()
            if (index + 1) % accumulate == 0 or index + 1 == len(batches):
                optimizer.step()
                step += 1
        scheduler.step()
    return optimizer, unfreezer


@pytest.mark.parametrize(("accumulate", "total"), [(1, 30), (2, 15), (4, 10)])
def test_a_fit_by_steps_equals_the_plain_loop(tmp_path: Path, accumulate: int, total: int) -> None:
    """Weights, moments and rates are those of the plain loop, to the bit; no block joins within an accumulation."""
    net, twin = twins()
    callback = UnfreezeCallback(PRESET, blocks_of, unit="steps")
    run = fit(tmp_path, Automatic(net), callback=callback, accumulate_grad_batches=accumulate)
    optimizer, unfreezer = by_steps(twin, total, accumulate)
    assert_equal(net, run.optimizers[0], twin, optimizer)
    assert callback.unfreezer.schedule.total_epochs == run.global_step == total
    assert list(callback.unfreezer.history) == list(unfreezer.history)


# Lightning keeps no gradients of an accumulation that is not over.
@pytest.mark.parametrize(
    ("accumulate", "batch"),
    [(1, 2), (1, 3), (1, 4), (1, 6), (1, 7), (1, 12), (1, 18), (4, 4), (4, 6), (4, 10), (4, 12)],
)
def test_a_resume_by_steps(tmp_path: Path, accumulate: int, batch: int) -> None:
    """From the end of any batch that made a step the run goes on to what the uninterrupted one ends with, to the bit."""

    def run(net: Net, ckpt: Any = None, *callbacks: Any) -> Any:
        callback = UnfreezeCallback(FractionPreset(start=0.1, end=0.9), blocks_of, unit="steps")
        run = trainer(
            tmp_path, callback, callbacks=[*callbacks], accumulate_grad_batches=accumulate, enable_checkpointing=True
        )
        run.fit(Automatic(net), Resumable(loader().dataset, batch_size=4), loader(), ckpt_path=ckpt)
        return run

    class Stop(L.Callback):
        """Saves after a batch and ends the run there."""

        seen = 0

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.seen += 1
            if self.seen == batch:
                trainer.save_checkpoint(tmp_path / "kept.ckpt")
                trainer.should_stop = True

    whole_net, _ = twins()
    whole = run(whole_net)
    run(twins()[0], None, Stop())
    net = Net()
    resumed = run(net, tmp_path / "kept.ckpt")
    assert_equal(net, resumed.optimizers[0], whole_net, whole.optimizers[0])


def test_a_resume_at_the_end_of_a_run_by_steps(tmp_path: Path) -> None:
    """The number of steps is that of the optimizer, and lies in the checkpoint."""
    saver = L.callbacks.ModelCheckpoint(tmp_path / "kept", every_n_train_steps=7)
    callback = UnfreezeCallback(PRESET, blocks_of, unit="steps")
    fit(tmp_path, Automatic(Net()), 2, callback=callback, callbacks=[saver], enable_checkpointing=True)
    saved = torch.load(saver.best_model_path, weights_only=True)
    assert saved["callbacks"][callback.state_key]["steps"] == 7


class Uneven(Manual):
    """The optimizer that blocks join steps with every other batch."""

    def training_step(self, batch: Any, index: int) -> None:
        x, y = batch
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(nn.functional.mse_loss(self.net(x) * self.scale, y))
        first.step()
        if index % 2:
            second.step()


def test_the_steps_of_one_optimizer_among_several(tmp_path: Path) -> None:
    """The Trainer counts all together, 45 here; what counts is the one that was named."""
    callback = UnfreezeCallback(
        UnfreezeSchedule(preset=PRESET, total_blocks=3, total_epochs=15), blocks_of, optimizer=1, unit="steps"
    )
    saver = L.callbacks.ModelCheckpoint(tmp_path / "kept")
    run = fit(tmp_path, Uneven(Net()), callback=callback, callbacks=[saver], enable_checkpointing=True)
    assert run.global_step == 45
    assert [(past.epoch, past.number) for past in callback.unfreezer.history] == [(0, 0), (3, 1), (5, 2), (7, 3)]
    saved = torch.load(saver.best_model_path, weights_only=True)
    assert saved["callbacks"][callback.state_key]["steps"] == 15


@pytest.mark.usefixtures("one_rank")
def test_ddp_is_wrapped_anew_within_an_epoch(tmp_path: Path) -> None:
    """Under DDP too, whose new wrapper comes between two batches."""
    net, twin = twins()
    callback = UnfreezeCallback(PRESET, blocks_of, unit="steps")
    run = fit(tmp_path, Automatic(net), callback=callback, strategy="ddp", use_distributed_sampler=False)
    optimizer, _ = by_steps(twin, 30)
    assert_equal(net, run.optimizers[0], twin, optimizer)


@pytest.mark.parametrize(("module", "keywords"), [(Manual, {}), (Automatic, {"max_time": "00:01:00:00"})])
def test_a_preset_by_steps_needs_their_number(tmp_path: Path, module: Any, keywords: Any) -> None:
    """Of a manual optimization, or of a run without an end, nobody knows the number of steps: a schedule says it."""
    epochs = -1 if keywords else EPOCHS
    text = (
        r"`schedule` must be an UnfreezeSchedule where the run's number of steps is not known, got a RatePreset; pass"
    )
    with pytest.raises(ValueError, match=text):
        fit(tmp_path, module(Net()), epochs, callback=UnfreezeCallback(PRESET, blocks_of, unit="steps"), **keywords)


@pytest.mark.parametrize(("epochs", "keywords", "total"), [(-1, {"max_steps": 8}, 8), (5, {"max_steps": 8}, 8)])
def test_a_preset_is_laid_over_the_steps(tmp_path: Path, epochs: int, keywords: Any, total: int) -> None:
    """That is the Trainer's own estimate, by the loader or by `max_steps`; a trial run is not measured by it."""
    callback = UnfreezeCallback(PRESET, blocks_of, unit="steps")
    run = fit(tmp_path, Automatic(Net()), epochs, callback=callback, **keywords)
    assert callback.unfreezer.schedule.total_epochs == run.global_step == total
    fit(tmp_path, Automatic(Net()), callback=callback, fast_dev_run=True)


def test_a_further_fit_of_one_trainer_goes_on(tmp_path: Path) -> None:
    """As epochs do: the Trainer keeps its place."""
    schedule = UnfreezeSchedule(preset=PRESET, total_blocks=3, total_epochs=40)
    callback = UnfreezeCallback(schedule, blocks_of, unit="steps")
    run = fit(tmp_path, Automatic(Net()), 1, callback=callback)
    run.fit_loop.max_epochs = 2
    run.fit(Automatic(Net()), loader(), loader())
    assert [(past.epoch, past.number) for past in callback.unfreezer.history] == [(6, 2), (7, 3)]


def test_a_cap_frees_a_block_between_epochs_too(tmp_path: Path) -> None:
    """A trigger is heard at the next step, wherever the validation was."""
    preset = MilestonePreset(milestones={0: 3}, learning_rate_scale=0.5)
    callback = UnfreezeCallback(
        preset, blocks_of, unit="steps", monitor="val_loss", caps=[PlateauTrigger(patience=1, min_delta=10.0)]
    )
    fit(tmp_path, Automatic(Net()), callback=callback, val_check_interval=3)
    assert [(past.epoch, past.number) for past in callback.unfreezer.history] == [(0, 0), (6, 1), (9, 2), (12, 3)]


def test_transitions_are_logged_when_they_come(tmp_path: Path) -> None:
    """Beside the rows of each epoch."""
    logger = CSVLogger(tmp_path)
    fit(tmp_path, Automatic(Net()), callback=UnfreezeCallback(PRESET, blocks_of, unit="steps"), logger=logger)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [(row["step"], row["unfreeze/blocks"]) for row in csv.DictReader(file) if row["unfreeze/blocks"]]
    assert rows == [("0", "0"), ("3", "1"), ("5", "2"), ("6", "2"), ("7", "3"), ("12", "3"), ("18", "3"), ("24", "3")]


def test_a_scheduler_by_steps(tmp_path: Path) -> None:
    """Blocks join in the middle of OneCycle's epoch at half the head's rate, and stay there."""
    run = fit(tmp_path, Steps(Net()), callback=UnfreezeCallback(PRESET, blocks_of, unit="steps"))
    rates = [group["lr"] for group in run.optimizers[0].param_groups]
    assert rates[1:] == [pytest.approx(rates[0] / 2)] * 3
