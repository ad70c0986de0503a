"""Hooks on the optimizer: one pair for all, gone with the last unfreezer, and there again in a copy of the run."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from bits import differences
from oracle import Net

from unfreeze_sched import OptimizerRebuilder, ProgressiveUnfreezer, RatePreset, UnfreezeSchedule
from unfreeze_sched.optimizer.watch import WARMUP_KEY


def hooks_of(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    return len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)


def test_one_pair_of_hooks_however_many_unfreezers() -> None:
    """All that look on share the hooks, none of a refused unfreezer is left, and they go with the last unfreezer."""
    net = Net(2)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    kept = [OptimizerRebuilder(optimizer, net.make_blocks(), warmup_steps=3) for _ in range(20)]
    assert hooks_of(optimizer) == (1, 1)
    refused: tuple[dict[str, Any], ...] = (
        {"probe": "none"},
        {"warmup_steps": -1},
        {"membership": "lte"},
        {"lr_schedulers": [3]},
    )
    for wrong in refused:
        with pytest.raises((ValueError, TypeError)):
            OptimizerRebuilder(optimizer, net.make_blocks(), **wrong)
    kept = kept[:1]
    gc.collect()
    assert hooks_of(optimizer) == (1, 1)
    kept.clear()
    gc.collect()
    assert hooks_of(optimizer) == (0, 0)
    OptimizerRebuilder(optimizer, net.make_blocks())
    gc.collect()
    assert hooks_of(optimizer) == (0, 0)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_of_a_run_works_on(way: str) -> None:
    """Model, optimizer and unfreezer copied together train on as the originals, in the midst of a warm-up."""
    schedule = UnfreezeSchedule(
        preset=RatePreset(unfreeze_start_epoch=1, unfreeze_rate=2), total_blocks=3, total_epochs=8
    )
    torch.manual_seed(0)
    net = Net(3)
    optimizer = torch.optim.AdamW(net.head.parameters(), lr=0.1)
    run = net, optimizer, ProgressiveUnfreezer(net.make_blocks(), optimizer, schedule, None, warmup_steps=5)
    x = torch.randn(4, 4).double()

    def train(run: tuple[Net, torch.optim.Optimizer, ProgressiveUnfreezer], epochs: range) -> None:
        for epoch in epochs:
            run[2].apply(epoch)
            for _ in range(2):
                run[1].zero_grad()
                run[0](x).square().mean().backward()
                run[1].step()

    train(run, range(3))
    copied = copy.deepcopy(run) if way == "deepcopy" else pickle.loads(pickle.dumps(run))  # noqa: S301  # its own
    for each in (run, copied):
        each[1].zero_grad()
        train(each, range(3, 8))
    assert differences(run[1].state_dict(), copied[1].state_dict()) == []
    assert differences(run[0].state_dict(), copied[0].state_dict()) == []
    assert copied[1].param_groups[1][WARMUP_KEY] == [5, 5]
    assert hooks_of(copied[1]) == (1, 1)


def test_a_run_that_is_dropped_in_a_warm_up_is_freed() -> None:
    """The warm-up outlives its unfreezer, and not its optimizer: nothing of this package keeps a model in memory."""
    net = Net(2)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    OptimizerRebuilder(optimizer, net.make_blocks(), warmup_steps=9).sync()
    optimizer.step()
    assert hooks_of(optimizer) == (1, 1)
    gone = weakref.ref(optimizer), weakref.ref(net)
    del net, optimizer
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_a_warm_up_that_ends_without_its_unfreezer_leaves_other_hooks_alone() -> None:
    """Its last watcher goes within a step, while torch walks the hooks; those of others that follow run at each step."""
    net = Net(1)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    OptimizerRebuilder(optimizer, net.make_blocks(), warmup_steps=2).sync()
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    for _ in range(5):
        optimizer.step()
    assert calls == ["before", "after"] * 5
    assert optimizer.param_groups[1][WARMUP_KEY] == [2, 2]
    kept = OptimizerRebuilder(optimizer, net.make_blocks())
    assert hooks_of(optimizer) == (2, 2)
    del kept
    gc.collect()
    assert hooks_of(optimizer) == (1, 1)
