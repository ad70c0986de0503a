"""The public API as a user's type checker sees it: checked by mypy, never run."""

from __future__ import annotations

import argparse
from typing import assert_type

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from unfreeze_sched import (
    MEDIUM,
    Block,
    FractionPreset,
    GroupChange,
    MilestonePreset,
    OptimizerRebuilder,
    ProgressiveUnfreezer,
    RatePreset,
    UnfreezeSchedule,
    encoder_blocks,
    preset_for,
)
from unfreeze_sched.arguments import add_unfreeze_arguments, unfreezer_from_args
from unfreeze_sched.guards import OverfitGuard, PlateauTrigger
from unfreeze_sched.parallel import all_trainable, rewrap_ddp


def use(model: nn.Module) -> None:
    """Every public name, with the types that its documentation promises."""
    assert_type(preset_for(500), RatePreset)
    schedule = UnfreezeSchedule(preset=MEDIUM, total_blocks=7, total_epochs=50)
    assert_type(schedule.replace(preset=FractionPreset(start=0.1)), UnfreezeSchedule)
    UnfreezeSchedule(preset=MilestonePreset(milestones={3: 1}), total_blocks=7, total_epochs=50)
    assert_type(schedule[3], int)
    assert_type(list(schedule), list[int])
    assert_type(schedule.transitions(), tuple[tuple[int, int], ...])

    blocks = encoder_blocks(model)
    assert_type(blocks, tuple[Block, ...])
    assert_type(encoder_blocks(model, patterns=[r"layer1\."]), tuple[Block, ...])
    encoder_blocks(model, head=[nn.Linear(1, 1), nn.Parameter(torch.zeros(1))])
    encoder_blocks(model, head=torch.optim.AdamW(nn.Linear(1, 1).parameters()))
    Block("head", (nn.Linear(1, 1), nn.Parameter(torch.zeros(1))))

    optimizer = torch.optim.AdamW(nn.Linear(1, 1).parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    assert_type(OptimizerRebuilder(optimizer, blocks, lr_schedulers=[scheduler]).sync(), GroupChange)
    unfreezer = ProgressiveUnfreezer(blocks, optimizer, schedule, lr_schedulers=None, on_refreeze="drop")
    change = unfreezer.apply(0)
    assert_type(change.added, tuple[str, ...])
    unfreezer.load_state_dict(unfreezer.state_dict())
    unfreezer.apply("0")  # type: ignore[arg-type]
    ProgressiveUnfreezer(blocks, optimizer, schedule, membership="early")  # type: ignore[arg-type]

    from_model = ProgressiveUnfreezer.from_model(model, optimizer, 50, layer_decay=0.8, norms="frozen")
    assert_type(from_model, ProgressiveUnfreezer)
    ProgressiveUnfreezer.from_model(model, optimizer, 50, norms="cold")  # type: ignore[arg-type]
    ProgressiveUnfreezer.from_model(model, optimizer, 50, layer_dekay=0.8)  # type: ignore[call-arg]

    guard, trigger = OverfitGuard(patience=3, mode="max"), PlateauTrigger()
    guarded = ProgressiveUnfreezer(blocks, optimizer, schedule, caps=[guard, trigger], probe="local")
    guard.step(0.5)
    assert_type(guard.cap, int | None)
    assert_type(guarded.history[-1].learning_rates, dict[str, float])
    assert_type(guarded.history.to_json(), str)
    assert_type(rewrap_ddp(DistributedDataParallel(model)), DistributedDataParallel)
    with all_trainable(optimizer):
        pass
    ProgressiveUnfreezer(blocks, optimizer, schedule, probe="on")  # type: ignore[arg-type]
    ProgressiveUnfreezer(blocks, optimizer, schedule, caps=[3])  # type: ignore[list-item]

    add_unfreeze_arguments(parser := argparse.ArgumentParser())
    from_flags = unfreezer_from_args(parser.parse_args(), blocks, optimizer, total_epochs=50)
    assert_type(from_flags, ProgressiveUnfreezer)
