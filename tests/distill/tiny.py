"""An arm of the training command that is as small as can be, and a way to interrupt it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from unfreeze_sched import Block, RatePreset, UnfreezeSchedule
from unfreeze_sched.distill.command.runlog import EpochRecord
from unfreeze_sched.distill.command.training import Arm, Imitating
from unfreeze_sched.distill.loss import DistillationLoss


class Tiny(nn.Module):
    """As small as a network of the training command can be: two blocks with a batch norm each, and a head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(2))
        self.head = nn.Conv2d(3, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.encoder:
            x = x + block(x).relu()
        out: torch.Tensor = self.head(x)
        return out

    def get_decoder_parameters(self) -> Iterator[nn.Parameter]:
        return self.head.parameters()


class InterruptedRunError(Exception):
    pass


class Interrupting:
    """Ends a run after its second epoch, or never."""

    def __init__(self, last: int = 1) -> None:
        self.last = last

    def step(self) -> None:
        pass

    def tell(self, line: str) -> None:
        pass

    def epoch(self, record: EpochRecord) -> None:
        if record.epoch == self.last:
            raise InterruptedRunError


def arm(seed: int, norms: Any = "eval", classes: int = 3) -> Arm:
    """Two blocks, of which one unfreezes at epoch 1 and one at epoch 2, of 3."""
    torch.manual_seed(seed)
    net = Tiny(classes)
    blocks = tuple(Block(f"stage{i}", (module,), (f"encoder.{i}",)) for i, module in enumerate(net.encoder))
    schedule = UnfreezeSchedule(
        preset=RatePreset(unfreeze_start_epoch=1, unfreeze_rate=1), total_blocks=2, total_epochs=3
    )
    loss = DistillationLoss(alpha=0.0)
    return Arm("student", net, Imitating(net), blocks, schedule, norms, loss)
