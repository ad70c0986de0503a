"""The arms of the unfreezing study, and the training of one cell: one arm, seed, LR schedule and length.

All arms of a seed see the same images in the same order with the same augmentation, start from the same weights, and
take as many steps. Supervised segmentation without a teacher: a teacher's forward pass would double the price of a
frozen phase, and no question asked here needs one.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from studying import Way, driver_of
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # torch's own habit
from torch.utils.data import DataLoader, Subset

from unfreeze_sched import Block, MilestonePreset, RatePreset, UnfreezeSchedule, encoder_blocks
from unfreeze_sched.distill.command.data import SegmentationData, epoch_generator, load_sample, normalisation
from unfreeze_sched.distill.command.imagenet import load_first_weights
from unfreeze_sched.distill.command.training import mean_iou, pixel_counts
from unfreeze_sched.distill.loss import DistillationLoss
from unfreeze_sched.distill.wrapper import StudentUnet

ENCODER = "tu-tf_efficientnet_lite0"
# Narrower than smp's own, which are half of a step's cost and no part of the question. Narrower still, (64, 48, 32, 16,
# 8), left some seeds without whole classes on the validation part.
DECODER_CHANNELS = (96, 64, 32, 16, 16)
WINDOW = 20  # steps before and after a transition
NOISE, BLUR = 0.1, 1.0  # standard deviations: of values in [0, 1], and in pixels; set once, before any run
EVALUATIONS = 10
EVALUATION_BATCH = 40


@dataclass(frozen=True)
class Arm(Way):
    """How the encoder is trained.

    Attributes:
        trains: Which blocks, when.
        one_rate: Whether encoder and decoder share one learning rate, chosen for that; else the encoder's is lower.
    """

    trains: Literal["nothing", "all", "schedule"] = "schedule"
    one_rate: bool = False


ARMS = {
    "frozen": Arm("frozen encoder", trains="nothing"),
    "full": Arm("full fine-tuning, one LR", trains="all", one_rate=True),
    "full_low": Arm("full fine-tuning, low encoder LR", trains="all"),
    "full_low_norms_frozen": Arm("full, low encoder LR, norms frozen", trains="all", norms="frozen"),
    "guide": Arm("the guide's loop as printed (head added)", moments="printed", norms="train"),
    "kept": Arm("schedule, moments kept (this library)"),
    "warmup": Arm("... with warm-up of 20 steps", warmup=20),
    "layer_decay": Arm("... with layer decay 0.8", layer_decay=0.8),
    "norms_frozen": Arm("... with norms frozen", norms="frozen"),
    "norms_train": Arm("... with norms in training mode", norms="train"),
    "cleared": Arm("... with moments cleared in place", moments="cleared"),
    "kept_b99": Arm("... kept, beta2 0.99", beta2=0.99),
    "recreated_b99": Arm("... AdamW re-created, beta2 0.99", moments="recreated", beta2=0.99),
    # The same as "cleared" to the bit (a test holds it), so it is not in the table.
    "recreated": Arm("... AdamW re-created", moments="recreated"),
}
SHORT_ARMS = tuple(name for name in ARMS if name != "recreated")
LONG_ARMS = ("frozen", "guide", "kept", "cleared", "kept_b99", "recreated_b99")


@dataclass(frozen=True)
class Setting:
    """What is the same for all cells of a table."""

    image_size: int = 64
    batch_size: int = 8
    held_out: float = 0.2  # of 400 training images, for validation, as in the training command
    epoch_images: int = 160  # drawn anew at each epoch from the 320 that are left: 20 steps, as many as a window has
    test_images: int | None = None


@dataclass(frozen=True)
class Run:
    """One cell.

    Attributes:
        arm: Key of `ARMS`.
        seed: Of the split, the data order, the augmentation and the decoder's first weights.
        lr_schedule: Of all groups, over all steps.
        epochs: Their number.
        start: 0-based epoch of the first block.
        rate: Epochs from block to block.
        lr: Of decoder and head.
        scale: Of the encoder's to the head's.
    """

    arm: str
    seed: int
    lr_schedule: Literal["constant", "cosine"]
    epochs: int
    start: int
    rate: int
    lr: float
    scale: float


def short(arm: str, seed: int, lr_schedule: Literal["constant", "cosine"], lr: float, scale: float) -> Run:
    """200 steps: the proportions of the guide's start 10 and rate 5 of 50 epochs."""
    return Run(arm, seed, lr_schedule, 10, 2, 1, lr, scale)


def long(arm: str, seed: int, lr_schedule: Literal["constant", "cosine"], lr: float, scale: float) -> Run:
    """1,600 steps, in the same proportions."""
    return Run(arm, seed, lr_schedule, 80, 16, 8, lr, scale)


class Parts(NamedTuple):
    """The data of one seed; the last three as whole tensors, normalised."""

    training: SegmentationData
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    shifted: dict[str, Tensor]


@cache
def _sample(size: int) -> tuple[SegmentationData, SegmentationData]:
    mean, std = normalisation(ENCODER)
    return load_sample("train", image_size=size, mean=mean, std=std), load_sample(
        "test", image_size=size, mean=mean, std=std
    )


@cache
def parts(setting: Setting, seed: int) -> Parts:
    """Training and validation part as the training command makes them, and the test part with two shifts of it."""
    whole, test = _sample(setting.image_size)
    training, validation = whole.split(setting.held_out, seed)
    images, masks = _stacked(test, setting.test_images)
    shifted = {name: test.normalised(shift(images)) for name, shift in (("noise", _noisy), ("blur", _blurred))}
    held, held_masks = _stacked(validation, setting.test_images)
    return Parts(training, (whole.normalised(held), held_masks), (test.normalised(images), masks), shifted)


def _stacked(data: SegmentationData, number: int | None) -> tuple[Tensor, Tensor]:
    raw = [data.raw(index) for index in range(len(data))[:number]]
    return torch.stack([image for image, _ in raw]).float() / 255, torch.stack([mask for _, mask in raw]).long()


def _noisy(images: Tensor) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + NOISE * noise).clamp(0, 1)


def _blurred(images: Tensor) -> Tensor:
    offsets = torch.arange(-3, 4)
    weights = torch.exp(-(offsets**2) / (2 * BLUR**2))
    kernel = torch.outer(weights, weights) / weights.sum() ** 2
    padded = F.pad(images, (3, 3, 3, 3), mode="reflect")
    return F.conv2d(padded, kernel.expand(3, 1, 7, 7), groups=3)


def schedule_of(run: Run, blocks: int) -> UnfreezeSchedule:
    """The number of blocks by epoch."""
    trains = ARMS[run.arm].trains
    preset = (
        RatePreset(unfreeze_start_epoch=run.start, unfreeze_rate=run.rate)
        if trains == "schedule"
        else MilestonePreset(milestones={0: blocks if trains == "all" else 0})
    )
    return UnfreezeSchedule(preset=preset, total_blocks=blocks, total_epochs=run.epochs)


def network(seed: int) -> tuple[StudentUnet, tuple[Block, ...]]:
    """The Unet with ImageNet's encoder and a decoder drawn from the seed, and its blocks, all frozen."""
    torch.manual_seed(seed)
    unet = StudentUnet(ENCODER, encoder_weights=None, classes=5, decoder_channels=DECODER_CHANNELS)
    load_first_weights(unet.encoder, ENCODER, "imagenet")
    unet.to(memory_format=torch.channels_last)  # a third faster, in all arms
    unet.encoder.requires_grad_(False)
    blocks = encoder_blocks(unet.requires_grad_())
    unet.encoder.requires_grad_(False)
    return unet, blocks


def train(run: Run, setting: Setting) -> tuple[dict[str, Any], nn.Module]:
    """Train one cell.

    Returns:
        What is to be kept of it, in JSON's types, and the network.
    """
    torch.set_num_threads(1)
    data = parts(setting, run.seed)
    unet, blocks = network(run.seed)
    steps = -(-setting.epoch_images // setting.batch_size)
    total = run.epochs * steps
    factor = (
        (lambda step: 1.0)
        if run.lr_schedule == "constant"
        else (lambda step: (1 + math.cos(math.pi * step / total)) / 2)
    )
    arm = ARMS[run.arm]
    # The guide's decoder parameters leave out the segmentation head; it is added, so that moments alone differ.
    head = unet.get_decoder_parameters()
    driver = driver_of(arm)(arm, head, blocks, schedule_of(run, len(blocks)), factor, run.lr, run.scale)
    loss_of = DistillationLoss(alpha=0.0)
    every, ends = run.epochs // EVALUATIONS, phase_ends(run, len(blocks))
    losses: list[float] = []
    seconds: list[float] = []
    validation: dict[int, float] = {}
    test: dict[int, float] = {}
    for epoch in range(run.epochs):
        driver.begin(epoch)
        unet.train()
        view = data.training.epoch(epoch_generator(run.seed, epoch), jitter=0.2)
        loader = DataLoader(Subset(view, range(setting.epoch_images)), setting.batch_size)
        begin = time.process_time()
        for images, masks in loader:
            logits = unet(images.contiguous(memory_format=torch.channels_last))
            loss = loss_of(logits, logits.detach(), masks)
            driver.optimizer.zero_grad()
            loss.backward()
            driver.optimizer.step()
            driver.scheduler.step()
            losses.append(float(loss.detach()))
        seconds.append(time.process_time() - begin)
        if (epoch + 1) % every == 0:
            validation[epoch] = miou(unet, *data.validation)
        if epoch in ends:
            test[epoch] = miou(unet, *data.test)
    starts = [steps * epoch for epoch, _ in schedule_of(_scheduled(run), len(blocks)).transitions()]
    profile = [_around(losses, start, min(WINDOW, steps)) for start in starts]
    ratios = [sum(around[len(around) // 2 :]) / (len(around) // 2) for around in profile]
    found = {
        "validation": {str(epoch): round(value, 5) for epoch, value in validation.items()},
        "test": {str(epoch): round(value, 5) for epoch, value in test.items()},
        "shifted": {name: round(miou(unet, images, data.test[1]), 5) for name, images in data.shifted.items()},
        "loss_ratios": [round(ratio, 5) for ratio in ratios],
        "loss_profile": [round(sum(values) / len(values), 4) for values in zip(*profile, strict=True)],
        "seconds": [round(value, 3) for value in seconds],
        "steps_per_epoch": steps,
    }
    return found, unet


def _scheduled(run: Run) -> Run:
    """The same run with the schedule's transitions, which arms without any are measured at, too."""
    return Run("kept", run.seed, run.lr_schedule, run.epochs, run.start, run.rate, run.lr, run.scale)


def phase_ends(run: Run, blocks: int) -> list[int]:
    """The last epochs with 0, 2, 4, 6 and all 7 blocks: the five phases of the guide's table."""
    ends = {number: epoch - 1 for epoch, number in schedule_of(_scheduled(run), blocks).transitions()}
    return [*(ends[number] for number in (1, 3, 5, 7)), run.epochs - 1]


def _around(losses: list[float], start: int, window: int) -> list[float]:
    """The losses around a transition, over the mean before it."""
    before = sum(losses[start - window : start]) / window
    return [loss / before for loss in losses[start - window : start + window]]


@torch.no_grad()
def miou(unet: nn.Module, images: Tensor, masks: Tensor) -> float:
    """Mean intersection over union, in evaluation mode."""
    unet.eval()
    pixels = torch.zeros(3, 5, dtype=torch.float64)
    for begin in range(0, len(images), EVALUATION_BATCH):
        batch = slice(begin, begin + EVALUATION_BATCH)
        logits = unet(images[batch].contiguous(memory_format=torch.channels_last))
        pixels += pixel_counts(logits, masks[batch], 5)
    return mean_iou(pixels)
