"""What is trained in the reference run: the arms, and what they have in common."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unfreeze_sched import Block, UnfreezeSchedule
from unfreeze_sched.distill.loss import DistillationLoss
from unfreeze_sched.guards import OverfitGuard
from unfreeze_sched.model.freezing import Norms

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """What is the same for every arm of a run.

    Attributes:
        epochs: Number of epochs.
        lr: Learning rate of decoder and head; it follows one cosine to 0 over all steps.
        batch_size: Images a batch, of all ranks together.
        seed: Of the data order, the augmentation, the first weights and what a network draws.
        device: A torch device.
        precision: Of the forward passes: fp32, bf16 or fp16; weights and losses are fp32.
        accumulate: Batches whose gradients add up to one step.
        gradient_clip: The largest norm of a step's gradients, all parameters together; None clips nothing.
        workers: Processes that read images ahead.
    """

    epochs: int
    lr: float
    batch_size: int
    seed: int
    device: str
    precision: str = "fp32"
    accumulate: int = 1
    gradient_clip: float | None = None
    workers: int = 0

    def autocast(self) -> AbstractContextManager[Any]:
        """Within it, forward passes are computed in the precision."""
        kind = torch.device(self.device).type
        return nullcontext() if self.precision == "fp32" else torch.autocast(kind, _DTYPES[self.precision])

    def scaler(self) -> torch.amp.GradScaler:
        """Keeps the gradients of fp16 from vanishing; does nothing in another precision."""
        return torch.amp.GradScaler(torch.device(self.device).type, enabled=self.precision == "fp16")

    def check(self) -> None:
        """See that the device computes in the precision."""
        if self.precision == "fp32":
            return
        layer, scaler = nn.Conv2d(1, 1, 3, device=self.device), self.scaler()
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        try:
            with self.autocast():
                loss = layer(torch.ones(1, 1, 4, 4, device=self.device)).float().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"`--precision` must be one that {self.device} computes in, got {self.precision} ({error}); "
                "leave it out"
            ) from error


@dataclass(frozen=True)
class Arm:
    """One network to train, and how.

    Attributes:
        name: Of its folder and in its metrics.
        unet: The network.
        forward: A module, images -> the network's logits and those that it is to imitate.
        blocks: Of its encoder, shallow to deep.
        schedule: When they are unfrozen.
        learning_rate_scale: Of the blocks' learning rates to the head's.
        norms: As for `ProgressiveUnfreezer`.
        loss: Of logits, logits to imitate, and masks.
        guard: Holds further blocks back once the validation loss has got worse; None lets the schedule alone decide.
    """

    name: str
    unet: Any
    forward: nn.Module
    blocks: tuple[Block, ...]
    schedule: UnfreezeSchedule
    learning_rate_scale: float
    norms: Norms
    loss: DistillationLoss
    guard: OverfitGuard | None = None


class Imitating(nn.Module):
    """A forward pass for a network without a teacher: it is its own, which leaves the task's loss."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the same without graph."""
        logits = self.unet(images)
        return logits, logits.detach()
