"""The training loop of the reference run: one for the teacher, the student, and the student that stays frozen."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from unfreeze_sched import ProgressiveUnfreezer
from unfreeze_sched.distill.checkpoints import CheckpointError, read_checkpoint, save_atomically
from unfreeze_sched.distill.command.arms import Arm, Settings, imitating
from unfreeze_sched.distill.command.data import SegmentationData, epoch_generator
from unfreeze_sched.distill.command.evaluation import batches_of, evaluate, loaded
from unfreeze_sched.distill.command.joint import joint_forward, wrap
from unfreeze_sched.distill.command.memory import saved_for_backward
from unfreeze_sched.distill.command.ranks import ALONE, Ranks
from unfreeze_sched.distill.command.records import EpochRecord, Outcome, records_of
from unfreeze_sched.distill.command.restore import restore
from unfreeze_sched.guards import OverfitGuard
from unfreeze_sched.optimizer.groups import BLOCK_KEY
from unfreeze_sched.parallel import rewrap_ddp

__all__ = ["Arm", "EpochRecord", "Progress", "Settings", "imitating", "train"]


class Progress(Protocol):
    """What the loop tells about itself."""

    def step(self) -> None:
        """One optimizer step was taken."""

    def transition(self, line: str) -> None:
        """Blocks joined, or are held back, or have trained for an epoch; one line of text."""

    def epoch(self, record: EpochRecord) -> None:
        """An epoch is over."""


def train(
    arm: Arm,
    training: SegmentationData,
    validation: SegmentationData,
    settings: Settings,
    folder: Path,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Train one arm, and leave `last.pth` in its folder after each epoch; go on from it where it is there.

    An interrupted arm goes on to the same weights, to the bit: the order of the data follows from seed and epoch, and
    the checkpoint holds the states of model, optimizer, scheduler, unfreezer and random numbers. It says nothing of the
    number of ranks: another number goes on, to the same weights within float error.

    Args:
        arm: What is trained.
        training: Of this part the order and augmentation follow from seed and epoch.
        validation: Looked at after each epoch.
        settings: The rest.
        folder: It exists; the checkpoint is written there, atomically.
        progress: Told of steps, transitions and epochs, also of those before an interruption.
        ranks: Those that train together, all of them calling this; rank 0 alone writes.

    Returns:
        Its epochs and transitions.

    Raises:
        CheckpointError: The folder's checkpoint is damaged, or of another run.
    """
    device = torch.device(settings.device)
    batches = batches_of(len(training), settings.batch_size)
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches.pop()  # a batch norm cannot train on one value a channel, which one small image may come to
    optimizer = torch.optim.AdamW(arm.unet.get_decoder_parameters(), lr=settings.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * len(batches))
    unfreezer = ProgressiveUnfreezer(
        arm.blocks,
        optimizer,
        arm.schedule,
        [scheduler],
        learning_rate_scale=arm.learning_rate_scale,
        norms=arm.norms,
        caps=[] if arm.guard is None else [arm.guard],
    )
    parts = {"model": arm.unet, "optimizer": optimizer, "scheduler": scheduler, "unfreezer": unfreezer}
    records = _go_on(parts, folder / "last.pth", device) if (folder / "last.pth").exists() else []
    for record in records:
        progress.epoch(record)
    module = arm.forward
    for epoch in range(len(records), settings.epochs):
        kept = _steps_taken(optimizer)
        change = unfreezer.apply(epoch)
        if isinstance(module, DistributedDataParallel):
            # Rather than find_unused_parameters, which walks the graph at every step: what is frozen is not reduced.
            module = rewrap_ddp(module) if change else module
        else:
            module = wrap(module, ranks, device)
        number = unfreezer.history[-1].number
        rates = {group.get(BLOCK_KEY, "head"): float(group["lr"]) for group in optimizer.param_groups}
        before = records[-1].blocks if records else 0
        joined = tuple(block.name for block in arm.blocks[len(arm.blocks) - number : len(arm.blocks) - before][::-1])
        if change:
            progress.transition(_joined(arm, epoch, joined, rates, len(change.added), kept))
        saved_bytes = records[-1].saved_bytes if records and not change else None
        trained = _epoch(arm, module, training, batches, epoch, saved_bytes, parts, settings, progress, ranks)
        evaluation = evaluate(arm, validation, settings, ranks)
        records.append(
            EpochRecord(
                arm=arm.name,
                epoch=epoch,
                blocks=number,
                joined=joined,
                learning_rates=rates,
                optimizer_step=kept,
                validation_loss=evaluation.loss,
                validation_miou=evaluation.miou,
                **trained,
            )
        )
        held = _check(arm.guard, evaluation.loss)
        if ranks.leads:
            save_atomically(
                {
                    **{name: part.state_dict() for name, part in parts.items()},
                    "records": [record.as_dict() for record in records],
                    "random": _random_state(device),
                },
                folder / "last.pth",
            )
        progress.epoch(records[-1])
        for line in _lines(arm, records, held):
            progress.transition(line)
    return Outcome(tuple(records), tuple(unfreezer.history), arm.guard.reason if arm.guard else "")


def _epoch(
    arm: Arm,
    module: Any,
    training: SegmentationData,
    batches: list[range],
    epoch: int,
    saved_bytes: int | None,
    parts: dict[str, Any],
    settings: Settings,
    progress: Progress,
    ranks: Ranks,
) -> dict[str, Any]:
    """Train an epoch; the fields of its record that tell of it. Without `saved_bytes` the first step counts them."""
    device, optimizer, scheduler = torch.device(settings.device), parts["optimizer"], parts["scheduler"]
    arm.unet.train()
    begin, losses = time.perf_counter(), []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    view = training.epoch(epoch_generator(settings.seed, epoch), jitter=0.2)
    for images, masks, share in loaded(view, batches, ranks, device):
        if saved_bytes is None:
            with saved_for_backward(arm.unet) as saved:
                loss = arm.loss(*joint_forward(module, images, masks, share))
            saved_bytes = saved.total
        else:
            loss = arm.loss(*joint_forward(module, images, masks, share))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.detach())
        progress.step()
    train_loss = float(torch.stack(losses).mean())  # the one wait for the device
    return {
        "train_loss": train_loss,
        "seconds": time.perf_counter() - begin,
        "saved_bytes": saved_bytes,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def _check(guard: OverfitGuard | None, loss: float) -> str:
    """Why the guard holds further blocks back from this check on; empty where it does not, or did before."""
    if guard is None or guard.reason:
        return ""
    guard.step(loss)
    return guard.reason


def _go_on(parts: dict[str, Any], path: Path, device: torch.device) -> list[EpochRecord]:
    """Bring a new arm to where a checkpoint left it, and return the records of the epochs before."""
    saved = read_checkpoint(path)
    if not isinstance(saved, dict) or set(saved) != {*parts, "records", "random"}:
        raise CheckpointError(
            f"{path}: must be a checkpoint of this command, got another file; remove it to begin anew"
        )
    try:
        records = records_of(saved["records"])
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


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """States of the generators that stochastic depth draws from, as tensors."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """The head's step count as AdamW keeps it: a re-created optimizer would begin at 0 again."""
    state = optimizer.state.get(optimizer.param_groups[0]["params"][0], {})
    return int(state.get("step", 0))


def _joined(arm: Arm, epoch: int, joined: tuple[str, ...], rates: dict[str, float], tensors: int, kept: int) -> str:
    verb = "joins" if len(joined) == 1 else "join"
    lowest, highest = min(rates[name] for name in joined), max(rates[name] for name in joined)
    at = f"{highest:.2e}" if lowest == highest else f"{lowest:.2e} to {highest:.2e}"
    return (
        f"{arm.name}, epoch {epoch}: {_named(joined)} {verb} at learning rate {at} ({tensors} tensors; "
        f"head at {rates['head']:.2e}, its AdamW moments kept from step {kept})"
    )


def _lines(arm: Arm, records: list[EpochRecord], held: str) -> Iterator[str]:
    """What the last epoch has shown of its transition, and why a guard holds further blocks back from now on."""
    now = records[-1]
    if len(records) > 1 and now.joined:
        yield (
            f"{arm.name}, epoch {now.epoch}: validation loss {records[-2].validation_loss:.3f} before "
            f"{_named(now.joined)} joined, {now.validation_loss:.3f} after an epoch with "
            f"{'it' if len(now.joined) == 1 else 'them'}"
        )
    if held:
        yield f"{arm.name}, epoch {now.epoch}: {held}"


def _named(joined: tuple[str, ...]) -> str:
    return joined[0] if len(joined) == 1 else f"{len(joined)} blocks, {joined[0]} to {joined[-1]},"
