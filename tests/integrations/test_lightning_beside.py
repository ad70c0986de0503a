"""Callbacks of Lightning's own beside ours, which swap the LR scheduler or search for a rate in mid-fit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

L = pytest.importorskip("lightning.pytorch")

from test_lightning import (  # noqa: E402  # after the skip
    EPOCHS,
    PRESET,
    Automatic,
    Net,
    assert_equal,
    blocks_of,
    cosine,
    fit,
    loader,
    plain_loop,
    pytestmark,  # noqa: F401  # pytest reads it
    schedule_of,
    trainer,
    twins,
)

from unfreeze_sched import MilestonePreset  # noqa: E402
from unfreeze_sched.integrations.lightning import UnfreezeCallback  # noqa: E402
from unfreeze_sched.model.freezing import freeze, unfreeze  # noqa: E402

SWAP = 2  # the first epoch under SWALR; blocks join at 1, 2 and 3


# --- StochasticWeightAveraging


class Declared(Automatic):
    """The oracle's module: all groups there from the start, deepest block first, at their shares of the rate."""

    def configure_optimizers(self) -> Any:
        groups = [{"params": list(self.net.head.parameters()), "lr": 0.01}]
        groups += [{"params": list(block.parameters()), "lr": 0.005} for block in reversed(self.net.blocks)]
        optimizer = torch.optim.AdamW(groups)
        return [optimizer], [cosine(optimizer)]


class Flip(L.Callback):
    """The oracle's callback: it only freezes and unfreezes."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        number = schedule_of().blocks_at(trainer.current_epoch)
        for depth, block in enumerate(reversed(pl_module.net.make_blocks())):
            (unfreeze if depth < number else freeze)(block)
            if depth < number:
                block.members[0].train()


class Rates(L.Callback):
    """The rates that each epoch is trained at."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_start(self, trainer: Any, *others: Any) -> None:
        if others[-1] == 0:  # the first batch
            self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def averaging(lrs: Any, annealing: int) -> Any:
    return L.callbacks.StochasticWeightAveraging(lrs, swa_epoch_start=SWAP + 1, annealing_epochs=annealing)


@pytest.mark.parametrize("annealing", [0, 2])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("membership", ["late", "declared"])
def test_blocks_join_before_and_after_a_swap(tmp_path: Path, annealing: int, first: bool, membership: Any) -> None:
    """With one peak for all groups each block keeps its share of it, as if it had been declared, to the bit."""
    net, twin = twins()
    rates, own_rates = Rates(), Rates()
    callback = UnfreezeCallback(PRESET, blocks_of, membership=membership)
    swa = averaging(0.04, annealing)
    run = trainer(tmp_path, callback, callbacks=[rates, swa] if first else [rates])
    if not first:
        run.callbacks.append(swa)
    run.fit(Automatic(net), loader(), loader())
    oracle = trainer(tmp_path, averaging([0.04, 0.02, 0.02, 0.02], annealing), callbacks=[own_rates, Flip()])
    oracle.fit(Declared(twin), loader(), loader())

    assert len(rates.seen) == EPOCHS + 1  # SWA adds one for the norms
    for ours, theirs in zip(rates.seen, own_rates.seen, strict=True):
        assert ours == theirs[: len(ours)]
        assert ours[1:] == [ours[0] / 2] * (len(ours) - 1)
    assert type(run.lr_scheduler_configs[0].scheduler).__name__ == "SWALR"
    assert callback.unfreezer.rebuilder.lr_schedulers == [run.lr_scheduler_configs[0].scheduler]
    ours, theirs = net.state_dict(), twin.state_dict()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert callback.unfreezer.schedule == schedule_of()  # the added epoch is none of the preset's


def test_a_list_of_peaks_is_the_users_own(tmp_path: Path) -> None:
    """Peaks that differ by group are taken as they are."""
    rates = Rates()
    callback = UnfreezeCallback(PRESET, blocks_of, membership="declared")
    fit(tmp_path, Automatic(Net()), callback=callback, callbacks=[rates, averaging([0.04, 0.03, 0.02, 0.01], 1)])
    assert rates.seen[-1] == [0.04, 0.03, 0.02, 0.01]


def test_an_average_of_a_partly_frozen_net_keeps_its_statistics(tmp_path: Path) -> None:
    """SWA resets all norms for its last epoch; those of frozen blocks, which take no part in it, keep theirs."""
    net = Net()
    for block in net.blocks:
        block[1].running_mean.fill_(3.0)
        block[1].num_batches_tracked.fill_(7)
    preset = MilestonePreset(milestones={1: 1}, learning_rate_scale=0.5)
    fit(tmp_path, Automatic(net), callback=UnfreezeCallback(preset, blocks_of), callbacks=[averaging(0.04, 1)])
    kept = [(block[1].running_mean.eq(3).all().item(), block[1].num_batches_tracked.item()) for block in net.blocks]
    assert kept == [(True, 7), (True, 7), (False, 6)]  # the last epoch's batches


def test_an_average_is_over_with_its_fit(tmp_path: Path) -> None:
    """A further fit of the same callback, without an average, leaves the statistics of what joins alone."""
    net, callback = Net(), UnfreezeCallback(schedule_of(), blocks_of)
    fit(tmp_path, Automatic(net), 1, callback=callback, callbacks=[averaging(0.04, 1)])
    before = [int(block[1].num_batches_tracked) for block in net.blocks]
    fit(tmp_path, Automatic(net), callback=callback)
    after = [int(block[1].num_batches_tracked) for block in net.blocks]
    assert [now - then for now, then in zip(after, before, strict=True)] == [12, 18, 24]


@pytest.mark.parametrize("epoch", [1, 2, 3, 4])
def test_a_resume_before_and_after_a_swap(tmp_path: Path, epoch: int) -> None:
    """A run of SWA resumes from any epoch to what the uninterrupted one ends with, blocks that join later included."""

    def run(net: Net, last: int | None = None, ckpt: Any = None) -> Any:
        class Stop(L.Callback):
            def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
                trainer.should_stop = trainer.current_epoch == last

        saver = L.callbacks.ModelCheckpoint(tmp_path / "kept", "{epoch}", every_n_epochs=1, save_top_k=-1)
        return fit(
            tmp_path,
            Automatic(net),
            ckpt=ckpt,
            callbacks=[averaging(0.04, 2), Stop(), saver],
            enable_checkpointing=True,
        )

    whole_net, _ = twins()
    whole = run(whole_net)
    run(twins()[0], epoch)
    net = Net()
    resumed = run(net, ckpt=tmp_path / "kept" / f"epoch={epoch}.ckpt")
    assert_equal(net, resumed.optimizers[0], whole_net, whole.optimizers[0])


# --- LearningRateFinder


class Searched(Automatic):
    """With a rate to be found, and a look at what trains meanwhile."""

    scheduled = True

    def __init__(self, net: Net) -> None:
        super().__init__(net)
        self.lr = 0.01
        self.trained: list[bool] = []

    def training_step(self, batch: Any, index: int) -> Any:
        self.trained.append(any(p.requires_grad for p in self.net.blocks.parameters()))
        return super().training_step(batch, index)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=self.lr)
        return ([optimizer], [cosine(optimizer)]) if self.scheduled else optimizer


def finder() -> Any:
    return L.callbacks.LearningRateFinder(min_lr=1e-4, max_lr=0.1, num_training_steps=20, early_stop_threshold=None)


@pytest.mark.filterwarnings("ignore:.*scheduler.step\\(\\).*before.*optimizer.step:UserWarning")
@pytest.mark.parametrize("scheduled", [True, False])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("start", [0, 1])
def test_a_search_before_the_fit(tmp_path: Path, scheduled: bool, first: bool, start: int) -> None:
    """It trains what the first epoch does, and leaves the run as one that begins at the rate found, to the bit."""
    net, twin = twins()
    module = Searched(net)
    module.scheduled = scheduled
    preset = PRESET.replace(unfreeze_start_epoch=start)
    callback, search = UnfreezeCallback(preset, blocks_of), finder()
    run = trainer(tmp_path, callback, callbacks=[search] if first else [])
    if not first:
        run.callbacks.append(search)
    torch.manual_seed(1)
    run.fit(module, loader(), loader())
    assert module.trained[:20] == [start == 0] * 20
    found = search.optimal_lr.suggestion()
    assert module.lr == found != 0.01
    assert [past.epoch for past in callback.unfreezer.history] == ([0, 1, 2] if start == 0 else [0, 1, 2, 3])

    optimizer = torch.optim.AdamW(twin.head.parameters(), lr=found)
    scheduler = cosine(optimizer) if scheduled else None
    plain_loop(twin, schedule_of().replace(preset=preset), optimizer=optimizer, scheduler=scheduler)
    ours, theirs = net.state_dict(), twin.state_dict()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    rates = [[group["lr"] for group in each.param_groups] for each in (run.optimizers[0], optimizer)]
    assert rates[0] == rates[1]
    assert all(math.isclose(rate, rates[0][0] / 2) for rate in rates[0][1:])


def test_a_tuner(tmp_path: Path) -> None:
    """`Tuner(trainer).lr_find` searches with the head alone, and the fit that follows begins anew at the rate found."""
    from lightning.pytorch.tuner import Tuner  # noqa: PLC0415  # after the skip

    net, twin = twins()
    module = Searched(net)
    callback = UnfreezeCallback(PRESET, blocks_of)
    run = trainer(tmp_path, callback)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = Tuner(run).lr_find(
        module, loader(), loader(), min_lr=1e-4, max_lr=0.1, num_training=20, early_stop_threshold=None
    )
    assert module.trained == [False] * 20
    assert [key for key, value in net.state_dict().items() if not torch.equal(value, before[key])] == []
    run.fit(module, loader(), loader())
    optimizer = torch.optim.AdamW(twin.head.parameters(), lr=found.suggestion())
    plain_loop(twin, schedule_of(), optimizer=optimizer, scheduler=cosine(optimizer))
    assert_equal(net, run.optimizers[0], twin, optimizer)


def test_a_search_for_a_batch_size(tmp_path: Path) -> None:
    """`BatchSizeFinder` saves and restores likewise: the run that follows is as without it."""

    class Sized(Automatic):
        batch_size = 4

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(loader().dataset, batch_size=self.batch_size)

    net, twin = twins()
    module = Sized(net)
    search = L.callbacks.BatchSizeFinder(init_val=4, max_trials=1, steps_per_trial=2)
    run = trainer(tmp_path, UnfreezeCallback(PRESET, blocks_of), callbacks=[search])
    run.fit(module, val_dataloaders=loader())
    optimizer, _ = plain_loop(twin, schedule_of(), lambda _: module.train_dataloader())
    assert_equal(net, run.optimizers[0], twin, optimizer)
