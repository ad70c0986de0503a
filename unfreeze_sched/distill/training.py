"""The training loop of the reference run: one for the teacher, the student, and the student that stays frozen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.utils.data import DataLoader

from unfreeze_sched import Block, ProgressiveUnfreezer, UnfreezeSchedule
from unfreeze_sched.distill.checkpoints import CheckpointError, read_checkpoint, save_atomically
from unfreeze_sched.distill.data import SegmentationData, epoch_generator
from unfreeze_sched.distill.loss import DistillationLoss
from unfreeze_sched.distill.memory import saved_for_backward
from unfreeze_sched.distill.metrics import confusion_matrix, mean_iou
from unfreeze_sched.distill.restore import restore
from unfreeze_sched.freezing import Norms
from unfreeze_sched.rebuilder import BLOCK_KEY

Forward = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Settings:
    """What is the same for every arm of a run.

    Attributes:
        epochs: Number of epochs.
        lr: Learning rate of decoder and head; it follows one cosine to 0 over all steps.
        batch_size: Images a step.
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
        forward: Images -> its logits and those that it is to imitate.
        blocks: Of its encoder, shallow to deep.
        schedule: When they are unfrozen.
        learning_rate_scale: Of the blocks' learning rates to the head's.
        norms: As for `ProgressiveUnfreezer`.
        loss: Of logits, logits to imitate, and masks.
    """

    name: str
    unet: Any
    forward: Forward
    blocks: tuple[Block, ...]
    schedule: UnfreezeSchedule
    learning_rate_scale: float
    norms: Norms
    loss: DistillationLoss


@dataclass(frozen=True)
class EpochRecord:
    """One line of `metrics.jsonl`.

    Attributes:
        arm: Name of the arm.
        epoch: 0-based.
        blocks: Number of unfrozen blocks, counted from the deep end.
        joined: Names of the blocks that joined before this epoch, deepest first.
        learning_rates: By group, at the epoch's first step: `head`, then the blocks.
        optimizer_step: Steps that the optimizer had taken of the head before the epoch, by its own count.
        train_loss: Mean over the epoch's steps.
        validation_loss: Mean over the validation images.
        validation_miou: In [0, 1].
        seconds: Of the training steps alone.
        saved_bytes: Activations that the first step of this number of blocks kept for backward.
        peak_bytes: The device's peak of memory in the epoch, where it reports one.
    """

    arm: str
    epoch: int
    blocks: int
    joined: tuple[str, ...]
    learning_rates: dict[str, float]
    optimizer_step: int
    train_loss: float
    validation_loss: float
    validation_miou: float
    seconds: float
    saved_bytes: int
    peak_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        """The record in JSON's types."""
        return asdict(self)


class Progress(Protocol):
    """What the loop tells about itself."""

    def step(self) -> None:
        """One optimizer step was taken."""

    def transition(self, record_so_far: str) -> None:
        """Blocks joined; one line of text."""

    def epoch(self, record: EpochRecord) -> None:
        """An epoch is over."""


@dataclass(frozen=True)
class Evaluation:
    """Loss and mean intersection over union of one data set."""

    loss: float
    miou: float


def train(
    arm: Arm,
    training: SegmentationData,
    validation: SegmentationData,
    settings: Settings,
    folder: Path,
    progress: Progress,
) -> list[EpochRecord]:
    """Train one arm, and leave `last.pth` in its folder after each epoch; go on from it where it is there.

    An interrupted arm goes on to the same weights, to the bit: the order of the data follows from seed and epoch, and
    the checkpoint holds the states of model, optimizer, scheduler, unfreezer and random numbers.

    Args:
        arm: What is trained.
        training: Of this part the order and augmentation follow from seed and epoch.
        validation: Looked at after each epoch.
        settings: The rest.
        folder: It exists; the checkpoint is written there, atomically.
        progress: Told of steps, transitions and epochs, also of those before an interruption.

    Returns:
        A record for each epoch.

    Raises:
        CheckpointError: The folder's checkpoint is damaged, or of another run.
    """
    device = torch.device(settings.device)
    # A batch norm cannot train on one value a channel, which a last batch of one small image may come to.
    lone = len(training) > settings.batch_size and len(training) % settings.batch_size == 1
    steps = len(training) // settings.batch_size if lone else -(-len(training) // settings.batch_size)
    optimizer = torch.optim.AdamW(arm.unet.get_decoder_parameters(), lr=settings.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * steps)
    unfreezer = ProgressiveUnfreezer(
        arm.blocks,
        optimizer,
        arm.schedule,
        [scheduler],
        learning_rate_scale=arm.learning_rate_scale,
        norms=arm.norms,
    )
    parts = {"model": arm.unet, "optimizer": optimizer, "scheduler": scheduler, "unfreezer": unfreezer}
    records = _go_on(parts, folder / "last.pth", device) if (folder / "last.pth").exists() else []
    for record in records:
        progress.epoch(record)
    for epoch in range(len(records), settings.epochs):
        kept = _steps_taken(optimizer)
        change = unfreezer.apply(epoch)
        number = arm.schedule.blocks_at(epoch)
        rates = {group.get(BLOCK_KEY, "head"): float(group["lr"]) for group in optimizer.param_groups}
        before = arm.schedule.blocks_at(epoch - 1) if epoch else 0
        joined = tuple(block.name for block in arm.blocks[len(arm.blocks) - number : len(arm.blocks) - before][::-1])
        if change:
            progress.transition(_joined(arm, epoch, joined, rates, len(change.added), kept))
        arm.unet.train()
        begin, losses = time.perf_counter(), []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        saved_bytes = records[-1].saved_bytes if records else 0
        view = training.epoch(epoch_generator(settings.seed, epoch), jitter=0.2)
        loader = DataLoader(view, batch_size=settings.batch_size, drop_last=lone)
        for step, (images, masks) in enumerate(_on(device, loader)):
            if step == 0 and (change or epoch == 0):
                with saved_for_backward(arm.unet) as saved:
                    loss = arm.loss(*arm.forward(images), masks)
                saved_bytes = saved.total
            else:
                loss = arm.loss(*arm.forward(images), masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.detach())
            progress.step()
        train_loss = float(torch.stack(losses).mean())  # the one wait for the device
        seconds = time.perf_counter() - begin
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        evaluation = evaluate(arm, validation, settings)
        records.append(
            EpochRecord(
                arm=arm.name,
                epoch=epoch,
                blocks=number,
                joined=joined,
                learning_rates=rates,
                optimizer_step=kept,
                train_loss=train_loss,
                validation_loss=evaluation.loss,
                validation_miou=evaluation.miou,
                seconds=seconds,
                saved_bytes=saved_bytes,
                peak_bytes=peak,
            )
        )
        save_atomically(
            {
                **{name: part.state_dict() for name, part in parts.items()},
                "records": [record.as_dict() for record in records],
                "random": _random_state(device),
            },
            folder / "last.pth",
        )
        progress.epoch(records[-1])
    return records


def _go_on(parts: dict[str, Any], path: Path, device: torch.device) -> list[EpochRecord]:
    """Bring a new arm to where a checkpoint left it, and return the records of the epochs before."""
    saved = read_checkpoint(path)
    if not isinstance(saved, dict) or set(saved) != {*parts, "records", "random"}:
        raise CheckpointError(
            f"{path}: must be a checkpoint of this command, got another file; remove it to begin anew"
        )
    try:
        records = _records_of(saved["records"])
        for kind in _random_state(device):
            torch.Generator(kind).set_state(saved["random"][kind])
        restore(parts, saved)
    except Exception as error:  # a state that does not fit makes torch raise nearly anything
        text = " ".join(str(error).split())[:400] or type(error).__name__
        raise CheckpointError(
            f"{path}: must be a checkpoint of this run, got one that does not fit ({text}); resume with its own folder"
        ) from error
    torch.set_rng_state(saved["random"]["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(saved["random"]["cuda"], device)
    return records


def _records_of(saved: Any) -> list[EpochRecord]:
    records = [EpochRecord(**{**record, "joined": tuple(record["joined"])}) for record in saved]
    TypeAdapter(list[EpochRecord]).validate_python([record.as_dict() for record in records])
    if [record.epoch for record in records] != list(range(len(records))):
        raise ValueError("records of other epochs")
    return records


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """States of the generators that stochastic depth draws from, as tensors."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


@torch.no_grad()
def evaluate(arm: Arm, data: SegmentationData, settings: Settings) -> Evaluation:
    """Loss, by image, and mean intersection over union on a data set; leaves the network in evaluation mode."""
    device = torch.device(settings.device)
    arm.unet.eval()
    total, matrix = 0.0, torch.zeros(data.classes, data.classes, dtype=torch.int64)
    for images, masks in _on(device, DataLoader(data, batch_size=settings.batch_size)):
        logits, targets = arm.forward(images)
        total += float(arm.loss(logits, targets, masks)) * len(images)
        matrix += confusion_matrix(predicted_classes(logits), masks, data.classes).cpu()
    return Evaluation(total / len(data), mean_iou(matrix))


def predicted_classes(logits: Tensor) -> Tensor:
    """Class indices (B, H, W) of logits (B, C, H, W); with one channel, class 1 is where the logit is positive."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


def imitating(unet: nn.Module) -> Forward:
    """A forward pass for a network without a teacher: it is its own, which leaves the task's loss."""

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        logits = unet(images)
        return logits, logits.detach()

    return forward


def _on(device: torch.device, loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    for images, masks in loader:
        yield images.to(device), masks.to(device)


def _steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """The head's step count as AdamW keeps it: a re-created optimizer would begin at 0 again."""
    state = optimizer.state.get(optimizer.param_groups[0]["params"][0], {})
    return int(state.get("step", 0))


def _joined(arm: Arm, epoch: int, joined: tuple[str, ...], rates: dict[str, float], tensors: int, kept: int) -> str:
    names = joined[0] if len(joined) == 1 else f"{len(joined)} blocks, {joined[0]} to {joined[-1]},"
    verb = "joins" if len(joined) == 1 else "join"
    lowest, highest = min(rates[name] for name in joined), max(rates[name] for name in joined)
    at = f"{highest:.2e}" if lowest == highest else f"{lowest:.2e} to {highest:.2e}"
    return (
        f"{arm.name}, epoch {epoch}: {names} {verb} at learning rate {at} ({tensors} tensors; "
        f"head at {rates['head']:.2e}, its AdamW moments kept from step {kept})"
    )
