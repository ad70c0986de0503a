"""Loss and mean intersection over union of an arm, and the batches that ranks share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from segmentation_models_pytorch.metrics import get_stats
from torch import Tensor
from torch.utils.data import DataLoader

from unfreeze_sched.distill.command.arms import Arm, Settings
from unfreeze_sched.distill.command.data import SegmentationData
from unfreeze_sched.distill.command.ranks import ALONE, Ranks
from unfreeze_sched.distill.loss import IGNORE_INDEX


@dataclass(frozen=True)
class Evaluation:
    """Loss and mean intersection over union of one data set."""

    loss: float
    miou: float


@torch.no_grad()
def evaluate(arm: Arm, data: SegmentationData, settings: Settings, ranks: Ranks = ALONE) -> Evaluation:
    """Loss, by image, and mean intersection over union on a data set; leaves the network in evaluation mode.

    Each of several ranks, all calling this, takes some of the batches; sums and counts are added up, so all get what
    one process gets.
    """
    arm.unet.eval()
    classes = max(data.classes, 2)  # one channel tells two apart
    total, pixels = torch.zeros(1, dtype=torch.float64), torch.zeros(3, classes, dtype=torch.float64)
    batches = batches_of(len(data), settings.batch_size)[ranks.rank :: ranks.world]
    for images, masks in loaded(data, batches, settings):
        with settings.autocast():
            logits, targets = arm.forward(images)
        total += float(arm.loss(logits, targets, masks)) * len(images)
        pixels += pixel_counts(logits, masks, classes)
    sums = ranks.summed(torch.cat([total, pixels.flatten()]))
    return Evaluation(float(sums[0]) / len(data), mean_iou(sums[1:].view(3, classes)))


def pixel_counts(logits: Tensor, masks: Tensor, classes: int) -> Tensor:
    """Hits, false alarms and misses, (3, classes), of logits (B, C, H, W); counts of several batches add up."""
    found = get_stats(predicted_classes(logits), masks, "multiclass", ignore_index=IGNORE_INDEX, num_classes=classes)
    return torch.stack(found[:3]).sum(1)


def mean_iou(counts: Tensor) -> float:
    """Mean over classes of hits / (hits + false alarms + misses).

    A class that is neither there nor predicted is left out, one that is only predicted counts as 0; NaN where no pixel
    has a truth.

    Example:
        >>> mean_iou(torch.tensor([[1, 2, 0], [1, 0, 0], [0, 1, 0]]))
        0.5833333333333333
    """
    hits, alarms, misses = counts.double()
    return float((hits / (hits + alarms + misses)).nanmean())


def predicted_classes(logits: Tensor) -> Tensor:
    """Class indices (B, H, W) of logits (B, C, H, W); with one channel, class 1 is where the logit is positive."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


def batches_of(number: int, size: int) -> list[range]:
    """Places of the batches, in order; the last may be smaller."""
    return [range(start, min(start + size, number)) for start in range(0, number, size)]


def shares_of(number: int, size: int, ranks: Ranks) -> list[range]:
    """A rank's places of each training batch: as many as any other rank's, since DDP takes the plain mean over ranks.

    What does not divide by the number of ranks is left for another epoch's order, and so is a last batch of one image a
    rank: a batch norm cannot train on one value a channel, which one small image may come to.

    Example:
        >>> shares_of(7, 4, Ranks(1, 2)), shares_of(9, 4, Ranks())
        ([range(1, 4, 2)], [range(0, 4), range(4, 8)])
    """
    batches = batches_of(number, size)
    if len(batches) > 1 and len(batches[-1]) < 2 * ranks.world:
        batches.pop()
    return [batch[ranks.rank : len(batch) // ranks.world * ranks.world : ranks.world] for batch in batches]


def loaded(data: Any, batches: Iterable[range], settings: Settings) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and masks of each batch, on the device."""
    loader = DataLoader(data, batch_sampler=batches, num_workers=settings.workers)  # type: ignore[arg-type]  # any iterable of places
    for images, masks in loader:
        yield images.to(settings.device), masks.to(settings.device)
