"""Mixed precision over transitions: a scaler whose scale overflows at them, and bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import Run, train_in_lockstep, twins
from torch import Tensor
from torch.optim import lr_scheduler

from unfreeze_sched import RatePreset, UnfreezeSchedule
from unfreeze_sched.optimizer.watch import WARMUP_KEY

SCHEDULE = UnfreezeSchedule(preset=RatePreset(unfreeze_start_epoch=1, unfreeze_rate=1), total_blocks=4, total_epochs=6)
OPTIONS: list[dict[str, bool]] = [{"foreach": True}, {"fused": True}]


class Scaled:
    """Steps in float16, of which every fourth overflows by itself: after three good ones the scale grows too far.

    With three steps an epoch it is the first after one transition, and the last before another.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.scaler = torch.amp.GradScaler(
            device, init_scale=2.0**8, growth_factor=2.0**12, backoff_factor=2.0**-12, growth_interval=3
        )
        self.overflows: list[bool] = []

    def backward(self, run: Run, x: Tensor, y: Tensor) -> None:
        with torch.autocast(self.device, dtype=torch.float16):
            loss = (run.model(x).float() - y).square().mean()
        self.scaler.scale(loss).backward()

    def step(self, run: Run, x: Tensor, y: Tensor) -> None:
        run.optimizer.zero_grad()
        self.backward(run, x, y)
        before = self.scaler.get_scale()
        self.scaler.step(run.optimizer)
        self.scaler.update()
        self.overflows.append(self.scaler.get_scale() < before)


def adamw(options: dict[str, bool]) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda groups: torch.optim.AdamW(groups, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_overflows_around_transitions(options: dict[str, bool], device: str) -> None:
    """Steps that a scaler leaves out are none: weights, moments and counts are the oracle's to the bit.

    Nor are their gradients waited for at a transition, while those of an accumulation are.
    """
    run, oracle = twins(SCHEDULE, adamw(options), scale=0.5, device=device, dtype=torch.float32)
    scaled = {id(each): Scaled(device) for each in (run, oracle)}

    def step(each: Run, x: Tensor, y: Tensor) -> None:
        scaled[id(each)].step(each, x, y)

    assert train_in_lockstep(run, oracle, range(6), steps=3, step=step) == []
    for each in scaled.values():
        assert each.overflows == [index % 4 == 3 for index in range(18)]
    x, y = (torch.randn(8, n, device=device) for n in (4, 2))
    scaled[id(run)].backward(run, x, y)
    with pytest.raises(RuntimeError, match="got an accumulation that is not over"):
        run.apply(1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_left_out_is_none_of_the_warm_up(options: dict[str, bool], device: str) -> None:
    """A warm-up counts the steps that were made, where the fused step is called and told to make none, too."""
    run, _ = twins(SCHEDULE, adamw(options), scale=0.5, device=device, dtype=torch.float32, warmup_steps=8)
    scaled, made = Scaled(device), 0
    for epoch in range(4):
        run.apply(epoch)
        for _ in range(3):
            scaled.step(run, *(torch.randn(8, n, device=device) for n in (4, 2)))
            made += epoch > 0 and not scaled.overflows[-1]
    assert sum(scaled.overflows) == 3
    assert run.optimizer.param_groups[1][WARMUP_KEY] == [made, 8]
    assert run.optimizer.param_groups[1]["lr"] == 0.5 * run.optimizer.param_groups[0]["lr"]


def test_bfloat16(device: str) -> None:
    """Under autocast to bfloat16 late join is exact as well."""
    run, oracle = twins(
        SCHEDULE,
        adamw({"fused": True}),
        lambda optimizer: [lr_scheduler.CosineAnnealingLR(optimizer, 20)],
        device=device,
        dtype=torch.float32,
    )

    def step(each: Run, x: Tensor, y: Tensor) -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            each.step(x, y)

    assert train_in_lockstep(run, oracle, range(6), step=step) == []
