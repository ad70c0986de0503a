"""Loss and mean intersection over union of an arm, and the batches that ranks share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from unfreeze_sched.distill.command.arms import Arm, Settings
from unfreeze_sched.distill.command.data import SegmentationData
from unfreeze_sched.distill.command.joint import Share, joint_forward, share_of
from unfreeze_sched.distill.command.metrics import confusion_matrix, mean_iou
from unfreeze_sched.distill.command.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Evaluation:
    """Loss and mean intersection over union of one data set."""

    loss: float
    miou: float


@torch.no_grad()
def evaluate(arm: Arm, data: SegmentationData, settings: Settings, ranks: Ranks = ALONE) -> Evaluation:
    """Loss, by image, and mean intersection over union on a data set; leaves the network in evaluation mode.

    Several ranks, all calling this, take a share of the images each, and get the same figures.
    """
    device = torch.device(settings.device)
    arm.unet.eval()
    total, matrix = 0.0, torch.zeros(data.classes, data.classes, dtype=torch.int64)
    batches = batches_of(len(data), settings.batch_size)
    for own_images, own_masks, share in loaded(data, batches, ranks, device):
        logits, targets, masks = joint_forward(arm.forward, own_images, own_masks, share)
        total += float(arm.loss(logits, targets, masks)) * share.total
        matrix += confusion_matrix(predicted_classes(logits), masks, data.classes).cpu()
    return Evaluation(total / len(data), mean_iou(matrix))


def predicted_classes(logits: Tensor) -> Tensor:
    """Class indices (B, H, W) of logits (B, C, H, W); with one channel, class 1 is where the logit is positive."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


def batches_of(number: int, size: int) -> list[range]:
    """Places of the joint batches, in order; the last may be smaller."""
    return [range(start, min(start + size, number)) for start in range(0, number, size)]


def loaded(
    data: Dataset[tuple[Tensor, Tensor]], batches: list[range], ranks: Ranks, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Share]]:
    """This rank's images and masks of each joint batch, and which part of it they are."""
    shares = [share_of(len(batch), ranks) for batch in batches]
    own = [batch[share.places] for batch, share in zip(batches, shares, strict=True)]
    # A loader draws from the global generator once, so every rank's does.
    for (images, masks), share in zip(DataLoader(data, batch_sampler=own), shares, strict=True):  # type: ignore[arg-type]  # any iterable of places
        yield images.to(device), masks.to(device), share
