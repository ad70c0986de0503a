"""What someone does who meets the library for the first time: noticed, and said once."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from oracle import Net
from torch import nn

from unfreeze_sched import Block, ProgressiveUnfreezer, RatePreset, UnfreezeSchedule

SCHEDULE = UnfreezeSchedule(preset=RatePreset(unfreeze_start_epoch=1, unfreeze_rate=1), total_blocks=2, total_epochs=4)


def test_a_step_before_any_apply_is_warned_of_once() -> None:
    """Who applies after the epoch, or never, hears of it at the first step, at the line of the step."""
    net = Net(2)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, SCHEDULE, None)
    with pytest.warns(UserWarning, match="`apply` should be called before the epoch is trained, got a step") as caught:
        optimizer.step()
    assert [each.filename for each in caught] == [__file__]
    optimizer.step()  # warnings are errors
    copied = copy.deepcopy((net, optimizer, unfreezer))
    copied[1].step()


def test_who_applies_or_resumes_first_hears_nothing() -> None:
    """Neither does a loop whose unfreezer was let go."""
    net = Net(2)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, SCHEDULE, None)
    unfreezer.apply(0)
    optimizer.step()
    other = Net(2)
    fresh = torch.optim.SGD(other.head.parameters(), lr=0.1)
    resumed = ProgressiveUnfreezer(other.make_blocks(), fresh, SCHEDULE, None)
    resumed.load_state_dict(unfreezer.state_dict())
    fresh.step()
    last = torch.optim.SGD(Net(2).head.parameters(), lr=0.1)
    ProgressiveUnfreezer(Net(2).make_blocks(), last, SCHEDULE, None)
    last.step()


def test_the_last_blocks_alone_leave_the_rest_without_an_owner() -> None:
    """`blocks[-2:]` leaves the shallow ones trainable, in no block and no optimizer; frozen first, all is well."""
    for freezes in (False, True):
        net = Net(3)
        optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
        if freezes:
            net.blocks[0].requires_grad_(False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ProgressiveUnfreezer.from_model(net, optimizer, 20, None, blocks=net.make_blocks()[-2:])
        texts = [str(each.message) for each in caught]
        assert len(texts) == (not freezes)
        assert all(
            "got blocks.0.0.weight, blocks.0.0.bias, blocks.0.1.weight and 1 more in neither" in t for t in texts
        )


def test_a_single_member_needs_no_tuple() -> None:
    """`Block("x", module)` is the block of that module, a container included, and so with a bare parameter."""
    stage = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    block = Block("stage", stage)
    assert block.members == (stage,)
    assert [name for name, _ in block.named_parameters()] == [
        "stage/0.weight",
        "stage/0.bias",
        "stage/1.weight",
        "stage/1.bias",
    ]
    token = nn.Parameter(torch.zeros(2))
    assert [id(p) for p in Block("token", token).parameters()] == [id(token)]
