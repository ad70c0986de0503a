"""One optimizer, several hands: a second unfreezer, the user's own later groups, groups sorted, deleted and resumed."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from bits import differences
from oracle import Net
from torch import nn
from torch.optim import lr_scheduler

from unfreeze_sched import Block, OptimizerRebuilder, ProgressiveUnfreezer, RatePreset, UnfreezeSchedule

MAKE_SCHEDULERS = {
    "none": lambda _: None,
    "lambda": lambda optimizer: [lr_scheduler.LambdaLR(optimizer, [lambda e: 0.9**e, lambda e: 0.8**e])],
    "one cycle": lambda optimizer: [lr_scheduler.OneCycleLR(optimizer, [0.1, 0.3], total_steps=20)],
    "sequence": lambda optimizer: [
        lr_scheduler.SequentialLR(
            optimizer, [lr_scheduler.LinearLR(optimizer), lr_scheduler.StepLR(optimizer, 2)], milestones=[3]
        )
    ],
}


class Towers:
    """Two networks with an unfreezer each, one optimizer, and a layer that gets a group of its own at epoch 4."""

    def __init__(self, schedulers: str, *, later: bool) -> None:
        torch.manual_seed(0)
        self.nets = Net(3), Net(3)
        self.layer = nn.Linear(2, 2).double()
        self.later = later
        heads = [
            {"params": list(net.head.parameters()), "lr": lr} for net, lr in zip(self.nets, (0.1, 0.3), strict=True)
        ]
        self.optimizer = torch.optim.AdamW(heads)
        self.schedulers = MAKE_SCHEDULERS[schedulers](self.optimizer)
        self.unfreezers = []
        for index, (net, start, rate) in enumerate(zip(self.nets, (1, 2), (3, 1), strict=True)):
            blocks = [Block(f"{'ab'[index]}.{block.name}", block.members) for block in net.make_blocks()]
            preset = RatePreset(unfreeze_start_epoch=start, unfreeze_rate=rate)
            schedule = UnfreezeSchedule(preset=preset, total_blocks=3, total_epochs=10)
            self.unfreezers.append(
                ProgressiveUnfreezer(blocks, self.optimizer, schedule, self.schedulers, template=index)
            )

    def add_later_group(self) -> None:
        self.optimizer.add_param_group({"params": list(self.layer.parameters()), "lr": 0.01})

    def train(self, epoch: int) -> None:
        for unfreezer in self.unfreezers:
            unfreezer.apply(epoch)
        if self.later and epoch == 4:
            self.add_later_group()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(epoch)).double()
        self.optimizer.zero_grad()
        sum(self.layer(net(x)).square().mean() for net in self.nets).backward()
        self.optimizer.step()
        for scheduler in self.schedulers or ():
            scheduler.step()

    def state(self) -> Any:
        parts = (*self.unfreezers, *(self.schedulers or ()), self.optimizer, *self.nets, self.layer)
        return copy.deepcopy([part.state_dict() for part in parts])

    def load(self, saved: Any) -> None:
        parts = (*self.unfreezers, *(self.schedulers or ()), self.optimizer, *self.nets, self.layer)
        for part, state in zip(parts, saved, strict=True):
            part.load_state_dict(state)


@pytest.mark.parametrize(
    ("schedulers", "later"),
    [("none", False), ("none", True), ("lambda", False), ("one cycle", False), ("sequence", False), ("sequence", True)],
)
@pytest.mark.parametrize("interrupted", [3, 5, 8])
def test_two_unfreezers_resume_to_the_bit(schedulers: str, later: bool, interrupted: int) -> None:
    """Groups of both come to their saved places among each other, so that each gets its own state, rate and row."""
    whole = Towers(schedulers, later=later)
    for epoch in range(interrupted):
        whole.train(epoch)
    saved = whole.state()
    resumed = Towers(schedulers, later=later)
    if later and interrupted > 4:
        resumed.add_later_group()
    resumed.load(saved)
    assert [group.get("unfreeze_block") for group in resumed.optimizer.param_groups] == [
        group.get("unfreeze_block") for group in whole.optimizer.param_groups
    ]
    for run in (whole, resumed):
        for epoch in range(interrupted, 10):
            run.train(epoch)
    assert differences(whole.state(), resumed.state()) == []
    assert len(whole.optimizer.param_groups) == 8 + later


def test_groups_are_interleaved_without_this() -> None:
    """The runs above are the case in question: the blocks of both alternate, which no order of loading gives."""
    run = Towers("none", later=True)
    for epoch in range(8):
        run.train(epoch)
    order = [group.get("unfreeze_block", "-")[0] for group in run.optimizer.param_groups]
    assert "".join(order) == "--abbab-a"


def test_a_later_group_that_is_missing_at_a_resume() -> None:
    """A block's group stands behind it, so the order cannot be had: an error, and nothing has changed."""
    whole = Towers("none", later=True)
    for epoch in range(8):
        whole.train(epoch)
    resumed = Towers("none", later=True)
    before = resumed.state()
    with pytest.raises(ValueError, match="an optimizer with 2 groups of its own, as this, got one with 3; add them"):
        resumed.load(whole.state())
    assert differences(before, resumed.state()) == []


def test_equal_names_are_refused_at_construction() -> None:
    """Groups go by name: two unfreezers of one optimizer need names of their own, and the error shows how."""
    nets = Net(2), Net(2)
    optimizer = torch.optim.SGD([p for net in nets for p in net.head.parameters()], lr=0.1)
    first = OptimizerRebuilder(optimizer, nets[0].make_blocks())
    message = (
        r"got 'block0', under which another .* holds other parameters; rename it: Block\('second.block0', block.mem"
    )
    with pytest.raises(ValueError, match=message):
        OptimizerRebuilder(optimizer, nets[1].make_blocks())
    again = OptimizerRebuilder(optimizer, nets[0].make_blocks())
    del first
    assert again.sync()


def test_the_state_of_an_optimizer_loaded_first() -> None:
    """Torch loads by place: without the groups that is refused by name, in the order that works; then it works."""
    net = Net(2)
    schedule = UnfreezeSchedule(preset=RatePreset(unfreeze_start_epoch=0), total_blocks=2, total_epochs=8)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, schedule, None)
    unfreezer.apply(5)
    saved = unfreezer.state_dict(), optimizer.state_dict()
    fresh = torch.optim.SGD(net.head.parameters(), lr=0.1)
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), fresh, schedule, None)
    message = (
        "got block1 and 1 more in another place or in none; load the unfreezer first, then the LR schedulers, then"
    )
    with pytest.raises(ValueError, match=message):
        fresh.load_state_dict(saved[1])
    unfreezer.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    swapped = copy.deepcopy(saved[1])
    swapped["param_groups"][1]["unfreeze_block"] = "block0"  # as many groups, of other blocks: torch would take it
    swapped["param_groups"][2]["unfreeze_block"] = "block1"
    with pytest.raises(ValueError, match="got block0 and 1 more in another place"):
        fresh.load_state_dict(swapped)


@pytest.mark.parametrize("what", ["sorted", "one deleted"])
def test_the_template_is_a_group_and_no_place(what: str) -> None:
    """Sorted groups, or a deleted one before it, leave the template what it was."""
    net, other = Net(2), nn.Linear(2, 2)
    groups = [{"params": list(other.parameters()), "lr": 5.0}, {"params": list(net.head.parameters()), "lr": 0.5}]
    optimizer = torch.optim.SGD(groups)
    rebuilder = OptimizerRebuilder(optimizer, net.make_blocks(), None, template=1)
    if what == "sorted":
        optimizer.param_groups.sort(key=lambda group: group["lr"])
    else:
        del optimizer.param_groups[0]
    rebuilder.sync()
    assert [group["lr"] for group in optimizer.param_groups[-2:]] == pytest.approx([0.05, 0.05])


def test_a_template_that_is_gone() -> None:
    """Its group deleted: an error by name, and nothing has changed."""
    net, other = Net(2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([{"params": list(net.head.parameters())}, {"params": list(other.parameters())}], lr=0.1)
    rebuilder = OptimizerRebuilder(optimizer, net.make_blocks(), None)
    del optimizer.param_groups[0]
    with pytest.raises(RuntimeError, match="`template` must be a group of the optimizer, got one that was taken out"):
        rebuilder.sync()
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("change", ["added", "deleted"])
def test_groups_that_a_scheduler_does_not_know(change: str) -> None:
    """An entry in the wrong place would give one group the other's rate: refused by the list's name, before anything."""
    net, other = Net(2), nn.Linear(2, 2)
    heads = [{"params": list(net.head.parameters())}, {"params": list(other.parameters())}]
    optimizer = torch.optim.SGD(heads, lr=0.1)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    rebuilder = OptimizerRebuilder(optimizer, net.make_blocks(), [scheduler])
    if change == "added":
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    else:
        del optimizer.param_groups[1]
    before = copy.deepcopy(optimizer.state_dict()), [list(scheduler.base_lrs), list(scheduler.lr_lambdas)]
    got = "2 in LambdaLR.lr_lambdas" if change == "added" else "2 in LambdaLR.base_lrs"
    with pytest.raises(
        ValueError, match=f"`lr_schedulers` must have an entry for each of the . groups, got {got}: one"
    ):
        rebuilder.sync()
    assert (optimizer.state_dict(), [scheduler.base_lrs, scheduler.lr_lambdas]) == before
    if change == "added":  # the way out
        scheduler.base_lrs.append(0.1)
        scheduler.lr_lambdas.append(lambda _: 1.0)
        assert rebuilder.sync()
        optimizer.step()
        scheduler.step()
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("plateau", [False, True])
def test_a_later_group_whose_entry_is_plain(plateau: bool) -> None:
    """Where torch goes by the group's own rate, or by one default for all, a later group of the user's is no obstacle."""
    net, other = Net(2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=1.0)
    scheduler: Any = lr_scheduler.ReduceLROnPlateau(optimizer) if plateau else lr_scheduler.StepLR(optimizer, 1, 0.5)
    rebuilder = OptimizerRebuilder(optimizer, net.make_blocks(), [scheduler])
    optimizer.add_param_group({"params": list(other.parameters()), "lr": 3.0})
    rebuilder.sync()
    lists = scheduler.min_lrs if plateau else scheduler.base_lrs
    assert lists == pytest.approx([0.0] * 4 if plateau else [1.0, 3.0, 0.1, 0.1])
    optimizer.step()
    for _ in range(12):
        scheduler.step(*([1.0] if plateau else []))
    factor = 0.1 if plateau else 0.5**12
    assert [group["lr"] / factor for group in optimizer.param_groups] == pytest.approx([1.0, 3.0, 0.1, 0.1])


def test_concurrent_applies_are_one_at_a_time() -> None:
    """Threads that apply the same epoch leave what one would: a group each, one line of history each."""
    net = Net(8)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=1.0)
    preset = RatePreset(unfreeze_start_epoch=0, unfreeze_rate=1)
    schedule = UnfreezeSchedule(preset=preset, total_blocks=8, total_epochs=8)
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, schedule, None)
    inside = []
    sync = unfreezer.rebuilder.sync_blocks

    def slow(*arguments: Any) -> Any:
        inside.append(threading.current_thread())
        threading.Event().wait(0.02)
        assert inside[-1] is threading.current_thread()
        return sync(*arguments)

    unfreezer.rebuilder.sync_blocks = slow  # type: ignore[method-assign]
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for epoch in range(8):
                unfreezer.apply(epoch)
        except BaseException as error:  # noqa: BLE001  # told to the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [group.get("unfreeze_block") for group in optimizer.param_groups[1:]] == [f"block{i}" for i in range(8)][
        ::-1
    ]


def test_a_resume_before_any_join_with_a_later_group() -> None:
    """Where no group changes its place the schedulers' lists stay as they are, one that lacks a later group's entry too."""
    states: list[Any] = []
    for _ in range(2):
        net, other = Net(2), nn.Linear(2, 2)
        optimizer = torch.optim.SGD(net.head.parameters(), lr=1.0)
        scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
        schedule = UnfreezeSchedule(preset=RatePreset(unfreeze_start_epoch=3), total_blocks=2, total_epochs=9)
        unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, schedule, [scheduler])
        optimizer.add_param_group({"params": list(other.parameters()), "lr": 3.0})
        if states:
            unfreezer.load_state_dict(states[0])
        else:
            unfreezer.apply(0)
        states.append(unfreezer.state_dict())
        assert scheduler.base_lrs == [1.0]
    assert states[0] == states[1]
