"""Guards and triggers as caps on a schedule, the history of a run, and what the library says."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from oracle import Net

from unfreeze_sched import MilestonePreset, ProgressiveUnfreezer, RatePreset, UnfreezeSchedule
from unfreeze_sched.guards import OverfitGuard, PlateauTrigger

RATE = UnfreezeSchedule(preset=RatePreset(unfreeze_start_epoch=1, unfreeze_rate=1), total_blocks=4, total_epochs=9)
ALL = UnfreezeSchedule(preset=MilestonePreset(milestones={0: 4}), total_blocks=4, total_epochs=9)


def make(schedule: UnfreezeSchedule = RATE, **keywords: Any) -> ProgressiveUnfreezer:
    net = Net(schedule.total_blocks)
    optimizer = torch.optim.AdamW(net.head.parameters(), lr=0.5)
    return ProgressiveUnfreezer(net.make_blocks(), optimizer, schedule, **keywords)


def trainable(unfreezer: ProgressiveUnfreezer) -> int:
    return sum(all(p.requires_grad for p in block.parameters()) for block in unfreezer.blocks)


def test_a_guard_holds_the_schedule_back() -> None:
    """What is unfrozen is the lesser of the schedule and the cap, and the optimizer's groups follow it."""
    guard = OverfitGuard(patience=1)
    unfreezer = make(caps=[guard])
    numbers = []
    for epoch, loss in enumerate([1.0, 0.9, 0.8, 0.9, 0.7, 0.6]):  # worse after the third block
        unfreezer.apply(epoch)
        numbers.append(trainable(unfreezer))
        assert len(unfreezer.rebuilder.optimizer.param_groups) == 1 + numbers[-1]
        guard.step(loss)
    assert numbers == [0, 1, 2, 3, 3, 3]
    last = unfreezer.history[-1]
    assert (last.epoch, last.number) == (4, 3)
    assert last.reason == f"OverfitGuard: {guard.reason}"
    assert "1 check in a row worse than 0.8" in last.reason
    assert [(item.epoch, item.number, item.reason) for item in unfreezer.history][:4] == [
        (0, 0, "schedule"), (1, 1, "schedule"), (2, 2, "schedule"), (3, 3, "schedule")
    ]  # fmt: skip


def test_a_trigger_decides_alone_where_the_schedule_allows_all() -> None:
    """The next block joins when the metric has stopped improving, and the history says so."""
    trigger = PlateauTrigger(patience=1)
    unfreezer = make(ALL, caps=[trigger])
    numbers = []
    for epoch, loss in enumerate([1.0, 1.0, 0.5, 0.5, 0.5]):
        unfreezer.apply(epoch)
        numbers.append(trainable(unfreezer))
        trigger.step(loss)
    assert numbers == [0, 0, 1, 1, 2]
    assert [(item.epoch, item.number) for item in unfreezer.history] == [(0, 0), (2, 1), (4, 2)]
    assert unfreezer.history[0].reason.startswith("PlateauTrigger: held at 0 of 4 blocks until 1 check")
    assert unfreezer.history[1].reason == "PlateauTrigger: the next block may join"


def test_the_least_of_several_caps_binds() -> None:
    """The schedule, a guard and a trigger together: the least of them."""
    trigger, guard = PlateauTrigger(patience=1, start=4), OverfitGuard(patience=1)
    unfreezer = make(caps=[trigger, guard])
    for epoch, loss in enumerate([1.0, 0.9, 1.0, 1.0, 1.0]):
        unfreezer.apply(epoch)
        guard.step(loss)
    assert trainable(unfreezer) == 2


@pytest.mark.parametrize("moment", range(8))
def test_a_run_with_caps_resumes(moment: int) -> None:
    """At every epoch boundary a saved run goes on as the uninterrupted one, by way of JSON."""
    losses = [1.0, 1.0, 0.9, 0.9, 0.9, 0.95, 0.95, 0.95]

    def caps() -> tuple[Any, Any]:
        return PlateauTrigger(patience=1), OverfitGuard(patience=1)

    def go(unfreezer: ProgressiveUnfreezer, start: int) -> list[int]:
        numbers = []
        for epoch in range(start, len(losses)):
            if epoch == moment:
                saved.append(json.dumps(unfreezer.state_dict()))
            unfreezer.apply(epoch)
            numbers.append(trainable(unfreezer))
            for cap in unfreezer.caps:
                cap.step(losses[epoch])
        return numbers

    saved: list[str] = []
    whole = make(ALL, caps=caps())
    numbers = go(whole, 0)
    assert numbers == [0, 0, 1, 1, 2, 3, 3, 3]  # the guard trips in epoch 5, when the trigger would go on
    again = make(ALL, caps=caps())
    again.load_state_dict(json.loads(saved[0]))
    assert go(again, moment) == numbers[moment:]
    assert again.state_dict() == whole.state_dict()
    assert list(again.history) == list(whole.history)


def test_a_refused_state_changes_nothing() -> None:
    """Where one part of a state does not fit, the caps, the history and the blocks are as they were."""
    guard = OverfitGuard(patience=1)
    unfreezer = make(caps=[PlateauTrigger(start=4), guard])
    for epoch, loss in enumerate([1.0, 0.9, 1.0]):
        unfreezer.apply(epoch)
        guard.step(loss)
    saved = unfreezer.state_dict()
    again = make(caps=[PlateauTrigger(start=4), OverfitGuard(patience=1)])
    again.apply(0)
    before = again.state_dict()
    for broken in (
        {**saved, "caps": saved["caps"][:1]},
        {**saved, "caps": saved["caps"][::-1]},
        {**saved, "caps": None},
        {**saved, "caps": [saved["caps"][0], {**saved["caps"][1], "count": -1}]},
        {**saved, "history": [{}]},
        {**saved, "history": 3},
    ):
        with pytest.raises((TypeError, ValueError), match="`"):
            again.load_state_dict(broken)
        assert again.state_dict() == before
        assert trainable(again) == 0
    with pytest.raises(
        ValueError, match=r"`state_dict\['caps'\]` must be the states of 0 caps, got .*; pass the caps of"
    ):
        make().load_state_dict(saved)


def test_caps_of_a_wrong_type() -> None:
    """A cap that is none, or a single one that is not in a list, is named."""
    with pytest.raises(TypeError, match=r"`caps` must be a sequence of guards and triggers, got int; pass caps="):
        make(caps=[3])
    with pytest.raises(
        TypeError, match="`caps` must be a sequence of guards and triggers, got OverfitGuard; pass caps="
    ):
        make(caps=OverfitGuard())


def test_history_has_the_learning_rates() -> None:
    """At each change: the unfrozen blocks, deepest first, at the learning rates of that moment."""
    unfreezer = make(layer_decay=0.5, learning_rate_scale=0.5)
    unfreezer.apply(0)
    unfreezer.rebuilder.optimizer.param_groups[0]["lr"] = 0.1  # as a scheduler would
    for epoch in (2, 2, 3):
        unfreezer.apply(epoch)
    assert [(item.epoch, item.number, item.total) for item in unfreezer.history] == [(0, 0, 4), (2, 2, 4), (3, 3, 4)]
    names = [block.name for block in unfreezer.blocks]
    assert unfreezer.history[1].learning_rates == {names[3]: 0.05, names[2]: 0.025}
    assert list(unfreezer.history[2].learning_rates) == [names[3], names[2], names[1]]


def test_the_library_logs(caplog: pytest.LogCaptureFixture) -> None:
    """Each change is one line at INFO under the library's name."""
    unfreezer = make()
    with caplog.at_level(logging.INFO, logger="unfreeze_sched"):
        for epoch in range(3):
            unfreezer.apply(epoch)
            unfreezer.apply(epoch)
    assert caplog.messages == [
        "epoch 0: 0 of 4 blocks are trainable (schedule)",
        "epoch 1: 1 of 4 blocks are trainable (schedule)",
        "epoch 2: 2 of 4 blocks are trainable (schedule)",
    ]


def test_the_library_is_silent_by_default(capfd: pytest.CaptureFixture[str]) -> None:
    """Without a handler of the user's nothing is printed, warnings of a guard included."""
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("unfreeze_sched").handlers)
    guard = OverfitGuard(patience=1)
    unfreezer = make(caps=[guard])
    for epoch, loss in enumerate([1.0, 0.9, 1.0]):
        unfreezer.apply(epoch)
        guard.step(loss)
    assert guard.reason
    assert capfd.readouterr() == ("", "")


def test_a_rate_that_is_not_below_the_heads_warns() -> None:
    """At the head's rate the encoder's features are overwritten, which is the guide's caution."""
    with pytest.warns(
        UserWarning,
        match="`learning_rate_scale` should be below 1, got 1: at the head's learning rate the encoder's pretrained "
        "features are overwritten before the head can use them; pass 0.1",
    ) as caught:
        make(learning_rate_scale=1.0)
    assert caught[0].filename == __file__
