"""A learning rate that the known schedulers did not set is refused before anything changes, with the way out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bits import differences
from oracle import Net
from torch import nn
from torch.optim import lr_scheduler

from unfreeze_sched import ProgressiveUnfreezer, RatePreset, UnfreezeSchedule

SCHEDULE = UnfreezeSchedule(preset=RatePreset(unfreeze_start_epoch=2, unfreeze_rate=1), total_blocks=3, total_epochs=6)


def begun(rate: Any = 0.1) -> tuple[Net, Any, Any, ProgressiveUnfreezer]:
    """Two epochs into a run, before the first block joins."""
    net = Net(3)
    optimizer = torch.optim.AdamW(net.head.parameters(), lr=rate)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, SCHEDULE, [scheduler])
    for epoch in range(2):
        unfreezer.apply(epoch)
        optimizer.step()
        scheduler.step()
    return net, optimizer, scheduler, unfreezer


def new_scheduler(optimizer: Any) -> None:
    """A new one for the next phase, at another rate; the old one is forgotten."""
    for group in optimizer.param_groups:
        group["initial_lr"] = 0.07
    lr_scheduler.LinearLR(optimizer, 0.5)


def dampened(optimizer: Any) -> None:
    """What pytorch_warmup does after each step."""
    for group in optimizer.param_groups:
        group["lr"] *= 0.9


def by_hand(optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] = 0.01


def by_hand_in_place(optimizer: Any) -> None:
    """As a compiled optimizer's rate is set."""
    optimizer.param_groups[0]["lr"] *= 0.5


@pytest.mark.parametrize("meddle", [new_scheduler, dampened, by_hand])
def test_another_hand_is_noticed(meddle: Callable[[Any], None]) -> None:
    """The message has both rates, the usual causes and a way out; model and optimizer are as they were."""
    net, optimizer, scheduler, unfreezer = begun()
    meddle(optimizer)
    with pytest.raises(
        ValueError, match=r"got a template at 0\.\d+ where it last set 0\.025: another scheduler took over"
    ):
        unfreezer.apply(2)
    assert len(optimizer.param_groups) == 1
    assert len(scheduler.base_lrs) == 1
    assert not any(parameter.requires_grad for parameter in net.blocks.parameters())


def test_the_way_out_where_another_scheduler_took_over() -> None:
    """Assigned to the rebuilder, the new scheduler gets the row, and the block follows it at its ratio."""
    _, optimizer, _, unfreezer = begun()
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["initial_lr"] = 0.08
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    unfreezer.rebuilder.lr_schedulers = [scheduler]
    assert unfreezer.apply(2)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.04, 0.004])


def test_the_way_out_where_the_loop_sets_the_rate() -> None:
    """With None nothing is compared."""
    _, optimizer, _, unfreezer = begun()
    by_hand(optimizer)
    unfreezer.rebuilder.lr_schedulers = None
    assert unfreezer.apply(2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.001])


def test_a_tensor_rate() -> None:
    """It is compared by value, and a change in place is seen."""
    for meddles in (False, True):
        _, optimizer, scheduler, unfreezer = begun(torch.tensor(0.1))
        if not meddles:
            assert unfreezer.apply(2)
            continue
        if scheduler.get_last_lr()[0] is optimizer.param_groups[0]["lr"]:
            pytest.skip("this torch's schedulers keep no copy of a tensor rate, so that it changes under them")
        by_hand_in_place(optimizer)
        with pytest.raises(ValueError, match=r"got a template at 0\.0125 where it last set 0\.025"):
            unfreezer.apply(2)


def test_two_schedulers_of_which_the_last_to_step_is_right() -> None:
    """Schedulers that take turns each report a rate; one of them is the optimizer's."""
    net = Net(3)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    schedulers = [lr_scheduler.ExponentialLR(optimizer, 0.5), lr_scheduler.ReduceLROnPlateau(optimizer, patience=9)]
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, SCHEDULE, schedulers)
    for epoch in range(SCHEDULE.total_epochs):
        unfreezer.apply(epoch)
        optimizer.step()
        schedulers[0].step()
    assert len(optimizer.param_groups) == 4


def test_a_resume_in_the_wrong_order_is_named() -> None:
    """A scheduler that was loaded before the unfreezer stands elsewhere than the optimizer; the error says the order."""
    _, _, scheduler, unfreezer = begun()
    unfreezer.apply(2)
    saved = unfreezer.state_dict(), scheduler.state_dict()
    net = Net(3)
    optimizer = torch.optim.AdamW(nn.ModuleList([net.head]).parameters(), lr=0.1)
    fresh = lr_scheduler.ExponentialLR(optimizer, 0.5)
    again = ProgressiveUnfreezer(net.make_blocks(), optimizer, SCHEDULE, [fresh])
    fresh.load_state_dict(saved[1])
    with pytest.raises(ValueError, match="before the unfreezer; load unfreezer, scheduler, optimizer in this order"):
        again.load_state_dict(saved[0])
    assert len(again.history) == 0


@pytest.mark.parametrize("composite", [False, True])
def test_a_state_in_memory_stays_what_it_was(composite: bool) -> None:
    """A scheduler's `state_dict` holds its lists themselves, so a join gives it new ones."""
    net = Net(3)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    scheduler: Any = lr_scheduler.StepLR(optimizer, 2)
    if composite:
        scheduler = lr_scheduler.SequentialLR(optimizer, [lr_scheduler.LinearLR(optimizer), scheduler], [2])
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, SCHEDULE, [scheduler])
    saved = scheduler.state_dict()
    before = copy.deepcopy(saved)
    unfreezer.apply(9)
    assert len(optimizer.param_groups) == 4
    assert differences(saved, before) == []
