"""What is trained in the reference run: the arms, and what they have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from unfreeze_sched import Block, UnfreezeSchedule
from unfreeze_sched.distill.loss import DistillationLoss
from unfreeze_sched.guards import OverfitGuard
from unfreeze_sched.model.freezing import Norms


@dataclass(frozen=True)
class Settings:
    """What is the same for every arm of a run.

    Attributes:
        epochs: Number of epochs.
        lr: Learning rate of decoder and head; it follows one cosine to 0 over all steps.
        batch_size: Images a step, of all ranks together.
        seed: Of the data order, the augmentation and the first weights.
        device: A torch device.
    """

    epochs: int
    lr: float
    batch_size: int
    seed: int
    device: str


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


def imitating(unet: nn.Module) -> nn.Module:
    """A forward pass for a network without a teacher: it is its own, which leaves the task's loss."""
    return _Imitating(unet)


class _Imitating(nn.Module):
    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.unet(images)
        return logits, logits.detach()
