"""A block's share of the head's rate, where a loop or an unseen scheduler writes the rates: kept, or warned of once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from oracle import Net
from torch.optim import lr_scheduler

from unfreeze_sched import ProgressiveUnfreezer, RatePreset, UnfreezeSchedule

SCHEDULE = UnfreezeSchedule(preset=RatePreset(unfreeze_start_epoch=1, unfreeze_rate=2), total_blocks=2, total_epochs=8)


def run(keyword: str, *, head_scale: float | None = None, membership: Any = "late") -> tuple[Any, list[str]]:
    """A loop that sets each group's rate at each epoch, and what it was warned of."""
    net = Net(2)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=1.0)
    if head_scale is not None:
        optimizer.param_groups[0]["lr_scale"] = head_scale
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, SCHEDULE, None, membership=membership)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch in range(SCHEDULE.total_epochs):
            unfreezer.apply(epoch)
            for group in optimizer.param_groups:
                group["lr"] = 0.5**epoch * (group.get("lr_scale", 1.0) if keyword == "scaled" else 1.0)
            optimizer.step()
    return optimizer, [str(each.message) for each in caught]


def test_lr_scale_is_scaled() -> None:
    """A joining group's `lr_scale` is the template's times the ratio, so the loop of MAE and BEiT keeps it; no warning."""
    optimizer, caught = run("scaled", head_scale=0.5)
    assert [group["lr_scale"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.05, 0.05])
    assert caught == []


def test_one_rate_for_all_is_warned_of_once() -> None:
    """A loop that writes one rate into all groups loses the ratio: one warning, with the block and both rates."""
    _, caught = run("one", head_scale=1.0)
    assert len(caught) == 1
    assert caught[0].startswith(
        "`learning_rate_scale` should hold, 0.1 of the template's rate, got block1 at 0.5 beside 0.5: a loop or scheduler "
        "gives all groups one rate; multiply by group['lr_scale'], or give"
    )


def test_it_is_noticed_without_another_transition() -> None:
    """The epoch after the last transition tells, too."""
    net = Net(1)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=1.0)
    schedule = SCHEDULE.replace(total_blocks=1)
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, schedule, None)
    unfreezer.apply(1)
    optimizer.param_groups[1]["lr"] = 1.0
    with pytest.warns(UserWarning, match="should hold, 0.1 of the template's rate, got block0 at 1 beside 1"):
        unfreezer.apply(2)
    unfreezer.apply(3)


@pytest.mark.parametrize(
    ("make", "loses"),
    [
        (lambda o: lr_scheduler.OneCycleLR(o, 0.4, total_steps=40), True),
        (lambda o: lr_scheduler.OneCycleLR(o, [0.4, 0.04, 0.04], total_steps=40), False),
        (lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.4), True),
        (lambda o: lr_scheduler.CyclicLR(o, [0.1, 0.01, 0.01], [0.4, 0.04, 0.04]), False),
        (lambda o: lr_scheduler.CosineAnnealingLR(o, 8, eta_min=0.05), False),
        (lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, min_lr=0.01), False),
    ],
    ids=["OneCycle", "OneCycle by group", "Cyclic", "Cyclic by group", "cosine with a floor", "plateau with a floor"],
)
def test_declared_groups_under_one_peak(make: Any, loses: bool) -> None:
    """A scalar `max_lr` gives all groups one peak, which is warned of with the fix; a list, or a floor, is no loss."""
    net = Net(2)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1, momentum=0.9)
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, SCHEDULE, None, membership="declared")
    scheduler = make(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch in range(SCHEDULE.total_epochs):
            unfreezer.apply(epoch)
            optimizer.step()
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    texts = [str(each.message) for each in caught]
    assert len(texts) == loses
    assert all("give the scheduler a list with one max_lr, base_lr or swa_lr for each group" in text for text in texts)


def test_one_swa_peak_for_all_groups_is_warned_of() -> None:
    """SWALR made in mid-run of one number sends blocks to the head's peak; a list keeps their share."""
    for peaks, warned in ((0.05, 1), ([0.05, 0.005], 0)):
        net = Net(2)
        optimizer = torch.optim.SGD(net.head.parameters(), lr=1.0)
        first = lr_scheduler.StepLR(optimizer, 3)
        unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, SCHEDULE, [first])
        unfreezer.apply(1)
        unfreezer.rebuilder.lr_schedulers = [torch.optim.swa_utils.SWALR(optimizer, peaks, anneal_epochs=2)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            unfreezer.apply(2)
        assert sum("`learning_rate_scale` should hold" in str(each.message) for each in caught) == warned
