"""What is trained in the reference run, on which batches, and how it is measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from segmentation_models_pytorch.metrics import get_stats
from torch import Tensor, nn
from torch.utils.data import DataLoader

from unfreeze_sched import Block, UnfreezeSchedule
from unfreeze_sched.distill.command.data import SegmentationData
from unfreeze_sched.distill.command.ranks import ALONE, Ranks
from unfreeze_sched.distill.loss import IGNORE_INDEX, DistillationLoss
from unfreeze_sched.guards import OverfitGuard
from unfreeze_sched.model.freezing import Norms

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """What is the same for every arm of a run."""

    lr: float  # of decoder and head; it follows one cosine to 0 over all steps
    batch_size: int  # images, of all ranks together
    seed: int  # of the data order, the augmentation, the first weights and what a network draws
    device: str
    precision: str = "fp32"  # of the forward passes, or bf16, fp16; weights and losses are fp32
    accumulate: int = 1  # batches whose gradients add up to one step
    gradient_clip: float | None = None  # the largest norm of a step's gradients, all parameters together
    num_workers: int = 0  # processes that read images ahead

    def autocast(self) -> torch.autocast:
        """Within it, forward passes are computed in the precision."""
        dtype = _DTYPES.get(self.precision)
        return torch.autocast(torch.device(self.device).type, dtype, enabled=dtype is not None)

    def scaler(self) -> torch.amp.GradScaler:
        """Keeps the gradients of fp16 from vanishing; does nothing in another precision."""
        return torch.amp.GradScaler(torch.device(self.device).type, enabled=self.precision == "fp16")

    def check(self) -> None:
        """See that the device computes in the precision."""
        if self.precision == "fp32":
            return
        try:
            with self.autocast():
                nn.Conv2d(1, 1, 1, device=self.device)(torch.ones(1, 1, 1, 1, device=self.device)).sum().backward()
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"`--precision` must be one that {self.device} computes in, got {self.precision} ({error}); "
                "leave it out"
            ) from error


@dataclass(frozen=True)
class Arm:
    """One network to train, and how."""

    name: str  # of its folder, and in its metrics
    unet: Any
    forward: nn.Module  # images -> the network's logits, and those that it is to imitate
    blocks: tuple[Block, ...]  # of its encoder, shallow to deep
    schedule: UnfreezeSchedule
    learning_rate_scale: float  # of the blocks' learning rates to the head's
    norms: Norms
    loss: DistillationLoss
    guard: OverfitGuard | None = None


class Imitating(nn.Sequential):
    """A forward pass for a network without a teacher: it is its own, which leaves the task's loss."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the same without graph."""
        logits = self[0](images)
        return logits, logits.detach()


@dataclass(frozen=True)
class Evaluation:
    """Of one data set."""

    loss: float
    miou: float  # mean intersection over union


@torch.no_grad()
def evaluate(arm: Arm, data: SegmentationData, settings: Settings, ranks: Ranks = ALONE) -> Evaluation:
    """Loss, by image, and mean IoU of a network, left in evaluation mode; ranks share the batches and get the same."""
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
    """Mean over classes of hits / (hits + false alarms + misses), of which those that are 0 / 0 are left out."""
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
    """
    batches = batches_of(number, size)
    if len(batches) > 1 and len(batches[-1]) < 2 * ranks.world:
        batches.pop()
    return [batch[ranks.rank : len(batch) // ranks.world * ranks.world : ranks.world] for batch in batches]


def loaded(data: Any, batches: Iterable[range], settings: Settings) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and masks of each batch, on the device."""
    loader = DataLoader(data, batch_sampler=batches, num_workers=settings.num_workers)  # type: ignore[arg-type]  # any iterable of places
    for images, masks in loader:
        yield images.to(settings.device), masks.to(settings.device)
