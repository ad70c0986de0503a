"""What a scheduler's floor will refuse in the middle of a run is told at the first `apply`, and nothing else is."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from oracle import Net
from torch.optim import lr_scheduler

from unfreeze_sched import ProgressiveUnfreezer, RatePreset, UnfreezeSchedule

SCHEDULE = UnfreezeSchedule(preset=RatePreset(unfreeze_start_epoch=3, unfreeze_rate=3), total_blocks=3, total_epochs=12)


def cosine(optimizer: Any, eta_min: float = 0.01) -> Any:
    return lr_scheduler.CosineAnnealingLR(optimizer, 12, eta_min=eta_min)


def linear(optimizer: Any) -> Any:
    return lr_scheduler.LinearLR(optimizer, total_iters=2)


def timm(optimizer: Any, **keywords: Any) -> Any:
    return pytest.importorskip("timm.scheduler").CosineLRScheduler(optimizer, 12, **keywords)


CASES = {
    "none": (lambda _: [], False),
    "cosine": (lambda o: [cosine(o)], False),
    "warm-up, then cosine": (lambda o: [lr_scheduler.SequentialLR(o, [linear(o), cosine(o)], [2])], False),
    "chain": (lambda o: [lr_scheduler.ChainedScheduler([linear(o), cosine(o)])], True),
    "chain without a floor": (lambda o: [lr_scheduler.ChainedScheduler([linear(o), cosine(o, 0.0)])], False),
    "chain in a chain": (
        lambda o: [lr_scheduler.ChainedScheduler([lr_scheduler.ChainedScheduler([linear(o), cosine(o)])])],
        True,
    ),
    "two": (lambda o: [linear(o), cosine(o)], True),
    "plateau": (lambda o: [lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5)], False),
    "plateau with a floor": (lambda o: [lr_scheduler.ReduceLROnPlateau(o, patience=0, min_lr=0.02)], True),
    "plateau with a least step": (lambda o: [lr_scheduler.ReduceLROnPlateau(o, patience=0, eps=0.05)], True),
    "timm": (lambda o: [timm(o)], False),
    "timm with a floor": (lambda o: [timm(o, lr_min=0.01)], True),
    "timm with a warm-up": (lambda o: [timm(o, warmup_t=2, warmup_lr_init=0.01)], True),
}


@pytest.mark.parametrize("name", CASES)
def test_warned_at_the_first_apply_where_a_later_one_refuses(name: str) -> None:
    """One warning at the first `apply` exactly where the run ends in a refusal; none where it does not."""
    make, refused = CASES[name]
    net = Net(3)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    schedulers = make(optimizer)
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, SCHEDULE, schedulers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        unfreezer.apply(0)
    told = [str(each.message) for each in caught]
    assert len(told) == refused, told
    if refused:
        assert "`lr_schedulers` should have no floor where blocks join late, got a " in told[0]
        assert "set it to 0, pass learning_rate_scale=1.0, or membership='declared'" in told[0]
    failed = None
    for epoch in range(12):
        try:
            unfreezer.apply(epoch)
        except ValueError as error:
            failed = str(error)
            break
        optimizer.step()
        for scheduler in schedulers:
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                scheduler.step(1.0)
            else:
                scheduler.step(*([epoch + 1] if type(scheduler).__module__.startswith("timm") else []))
    assert (failed is not None) == refused, failed
    assert failed is None or "`learning_rate_scale` must be 1 to join late" in failed


def test_nothing_is_told_where_all_join_at_once_or_are_declared() -> None:
    """A run whose blocks all join before the first step, and one that declares them, meet no refusal."""
    for membership, start in (("late", 0), ("declared", 1)):
        net = Net(1)
        optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
        if membership == "late":
            schedulers = CASES["chain"][0](optimizer)
        preset = RatePreset(unfreeze_start_epoch=start)
        schedule = UnfreezeSchedule(preset=preset, total_blocks=1, total_epochs=3)
        own: Any = {"membership": membership, "lr_schedulers": schedulers if membership == "late" else ()}
        ProgressiveUnfreezer(net.make_blocks(), optimizer, schedule, **own).apply(0)
