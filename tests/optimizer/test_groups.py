"""Groups that are declared, dropped, filled again, or another optimizer's within a wrapper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bits import differences
from oracle import Net
from torch.optim import lr_scheduler
from torch.torch_version import TorchVersion

from unfreeze_sched import MilestonePreset, OptimizerRebuilder, ProgressiveUnfreezer, RatePreset, UnfreezeSchedule
from unfreeze_sched.optimizer import groups

RATE = UnfreezeSchedule(preset=RatePreset(unfreeze_start_epoch=1, unfreeze_rate=2), total_blocks=3, total_epochs=8)


def test_declared_groups_serve_a_scheduler_that_is_not_known() -> None:
    """Groups declared before the scheduler is made need no row of ours, whatever the scheduler computes."""

    class Mine(lr_scheduler.StepLR):
        pass

    net = Net(3)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=1.0)
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, RATE, learning_rate_scale=0.5, membership="declared")
    scheduler = Mine(optimizer, 1, gamma=0.5)
    for epoch in range(4):
        unfreezer.apply(epoch)
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0625, 0.03125, 0.03125, 0.03125]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 4, 4, 0]


def test_dropping_and_joining_again_starts_afresh() -> None:
    """A dropped block that joins again has a fresh state in its old group, at the group's live rate."""
    schedule = RATE.replace(preset=MilestonePreset(milestones={0: 1, 2: 0, 4: 1}))
    net = Net(3)
    optimizer = torch.optim.AdamW(net.head.parameters(), lr=1.0)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, schedule, [scheduler], 0.5, on_refreeze="drop")
    for epoch in range(6):
        change = unfreezer.apply(epoch)
        assert bool(change.dropped) is (epoch == 2)
        net(torch.ones(2, 4).double()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    group = optimizer.param_groups[1]
    assert {int(optimizer.state[p]["step"]) for p in group["params"]} == {2}
    assert group["lr"] == optimizer.param_groups[0]["lr"] / 2
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("drives", ["outer", "inner"])
def test_a_scheduler_may_drive_what_is_wrapped(drives: str) -> None:
    """A wrapper's groups are those of the optimizer within, and a scheduler of either is one of both."""
    package = pytest.importorskip("pytorch_optimizer")
    net = Net(1)
    inner = torch.optim.AdamW(net.head.parameters(), lr=1.0)
    outer = package.Lookahead(inner)
    scheduler = lr_scheduler.ExponentialLR(inner if drives == "inner" else outer, 0.5)
    OptimizerRebuilder(outer, net.make_blocks(), [scheduler], learning_rate_scale=0.5).sync()
    outer.step()
    scheduler.step()
    assert [group["lr"] for group in inner.param_groups] == [0.5, 0.25]


def test_dropping_frees_the_state_within_a_wrapper() -> None:
    """A dropped block leaves no state in the optimizer that a wrapper wraps, and starts afresh when it joins again."""
    package = pytest.importorskip("pytorch_optimizer")
    net = Net(1)
    inner = torch.optim.AdamW(net.head.parameters(), lr=0.1)
    schedule = RATE.replace(preset=MilestonePreset(milestones={0: 1, 1: 0, 2: 1}), total_blocks=1)
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), package.Lookahead(inner), schedule, on_refreeze="drop")
    parameter = net.blocks[0][0].weight  # type: ignore[index]
    steps = []
    for epoch in range(3):
        unfreezer.apply(epoch)
        steps.append(parameter in inner.state)
        net(torch.ones(2, 4).double()).sum().backward()
        unfreezer.rebuilder.optimizer.step()
    assert steps == [False, False, False]
    assert int(inner.state[parameter]["step"]) == 1  # type: ignore[index]


@pytest.mark.parametrize("version", [None, "2.6.0"])
def test_adagrads_sums_are_there_for_the_first_step(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch 2.12 the constructor alone makes them: a block that joins, again too, gets them as it would there."""
    if version:
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    net = Net(1)
    keywords: dict[str, Any] = {"lr": 0.1, "initial_accumulator_value": 0.5}
    optimizer = torch.optim.Adagrad(net.head.parameters(), **keywords)
    schedule = RATE.replace(preset=MilestonePreset(milestones={0: 1, 1: 0, 2: 1}), total_blocks=1)
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, schedule, on_refreeze="drop")
    parameter = net.blocks[0][0].weight
    for epoch in range(3):
        unfreezer.apply(epoch)
        if version and epoch != 1:
            own, fresh = (made.state[parameter] for made in (optimizer, torch.optim.Adagrad([parameter], **keywords)))
            assert own.keys() == fresh.keys()
            assert all(torch.equal(own[key], fresh[key]) for key in own)
        net(torch.ones(2, 4).double()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert int(optimizer.state[parameter]["step"]) == 1


@pytest.mark.parametrize("membership", ["late", "declared"])
def test_a_refused_join_leaves_no_state(membership: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was prepared for a parameter goes with it, or the optimizer could not be saved any more."""
    optim = pytest.importorskip("timm.optim.adahessian")
    net = Net(2)
    optimizer = optim.Adahessian(net.head.parameters())
    rebuilder = OptimizerRebuilder(optimizer, net.make_blocks(), membership=membership)
    before = optimizer.state_dict()
    prepare, calls = groups._prepare, []

    def fails_at_the_second(*args: Any) -> None:
        prepare(*args)
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(groups, "_prepare", fails_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        rebuilder.sync()
    assert differences(optimizer.state_dict(), before) == []
    rebuilder.sync()
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 4, 4]
    assert len(optimizer.state_dict()["state"]) == 10


def test_block_names_are_one_rebuilders() -> None:
    """Another encoder's blocks of the same names on the same optimizer are refused rather than mixed up."""
    net, other = Net(1), Net(1)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    OptimizerRebuilder(optimizer, net.make_blocks()).sync()
    with pytest.raises(
        ValueError, match=r"`blocks` must have names of their own, got 'block0', under which the optimizer"
    ):
        OptimizerRebuilder(optimizer, other.make_blocks())


def test_a_single_block_is_no_sequence() -> None:
    """A block outside of a list is named for what it is."""
    net = Net(1)
    with pytest.raises(
        TypeError, match=r"`blocks` must be a sequence of blocks, got Block; put a single one in a list"
    ):
        OptimizerRebuilder(torch.optim.SGD(net.head.parameters()), net.make_blocks()[0])  # type: ignore[arg-type]


# A rate of its own for each block.


def test_a_scale_for_each_block() -> None:
    """Each block's group has its own share of the template's rate, layer decay on top, at every step of a scheduler."""
    net = Net(3)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=1.0)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    scale = {"block2": 0.5, "block0": 0.125, "block1": 0.25}
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, RATE, [scheduler], scale, layer_decay=0.5)
    for epoch in range(RATE.total_epochs):
        unfreezer.apply(epoch)
        optimizer.step()
        scheduler.step()
    now = 0.5**RATE.total_epochs
    assert unfreezer.rebuilder.learning_rates() == {"block2": 0.5 * now, "block1": 0.125 * now, "block0": 0.03125 * now}


@pytest.mark.parametrize(
    ("scale", "error", "text"),
    [
        (
            {"block0": 0.1},
            ValueError,
            "one number for each block, got none for 'block1'; the blocks are block0, block1",
        ),
        (
            {"block0": 0.1, "block1": 0.1, "layer4": 0.1},
            ValueError,
            "one number for each block, got an unknown block 'layer4'; the blocks are block0, block1",
        ),
        (
            {"block0": 0.1, "block1": 2},
            ValueError,
            r"`learning_rate_scale\['block1'\]` must be a number in \(0, 1\], got 2",
        ),
        ({"block0": 0.1, "block1": "a"}, TypeError, r"`learning_rate_scale\['block1'\]` must be a number in \(0, 1\]"),
    ],
)
def test_scales_refused(scale: Any, error: type[Exception], text: str) -> None:
    """A block without a scale, a scale without a block and a scale out of range are named."""
    net = Net(2)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=1.0)
    with pytest.raises(error, match=text):
        OptimizerRebuilder(optimizer, net.make_blocks(), learning_rate_scale=scale)
    assert not optimizer._optimizer_step_post_hooks


def test_a_scale_of_one_for_one_block_warns() -> None:
    """One block at the head's rate is as suspicious as all."""
    net = Net(2)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=1.0)
    schedule = RATE.replace(total_blocks=2)
    with pytest.warns(UserWarning, match="`learning_rate_scale` should be below 1, got 1"):
        ProgressiveUnfreezer(net.make_blocks(), optimizer, schedule, None, {"block0": 0.1, "block1": 1})
