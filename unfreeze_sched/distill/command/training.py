"""What is trained in the reference run and how it is measured, the loop, and how an interrupted one goes on."""

from __future__ import annotations

import reprlib
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from segmentation_models_pytorch.metrics import get_stats
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader

from unfreeze_sched import Block, ProgressiveUnfreezer, UnfreezeSchedule
from unfreeze_sched._checks import listed
from unfreeze_sched.distill.checkpoints import CheckpointError, read_checkpoint, save_atomically
from unfreeze_sched.distill.command.data import SegmentationData, epoch_generator
from unfreeze_sched.distill.command.ranks import ALONE, Ranks
from unfreeze_sched.distill.command.runlog import EpochRecord, RunLog
from unfreeze_sched.distill.loss import IGNORE_INDEX, DistillationLoss
from unfreeze_sched.guards import OverfitGuard
from unfreeze_sched.model.freezing import Norms
from unfreeze_sched.optimizer.groups import BLOCK_KEY
from unfreeze_sched.parallel import speaks
from unfreeze_sched.plan.memory import saved_for_backward

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


@dataclass(frozen=True)
class Arm:
    """One network to train, and how."""

    name: str  # of its folder, and in its metrics
    unet: Any
    forward: nn.Module  # images -> the network's logits, and those that it is to imitate
    blocks: tuple[Block, ...]  # of its encoder, shallow to deep
    schedule: UnfreezeSchedule
    norms: Norms
    loss: DistillationLoss
    guard: OverfitGuard | None = None


class Imitating(nn.Sequential):
    """A forward pass for a network without a teacher: it is its own, which leaves the task's loss."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the same without graph."""
        logits = self[0](images)
        return logits, logits.detach()


@torch.no_grad()
def evaluate(arm: Arm, data: SegmentationData, settings: Settings, ranks: Ranks = ALONE) -> tuple[float, float]:
    """Loss, by image, and mean IoU of a network, left in evaluation mode; ranks share the batches and get the same."""
    arm.unet.eval()
    classes = max(data.classes, 2)  # one channel tells two apart
    total, pixels = torch.zeros(1, dtype=torch.float64), torch.zeros(3, classes, dtype=torch.float64)
    batches = [*BatchSampler(range(len(data)), settings.batch_size, drop_last=False)]
    for images, masks in loaded(data, batches[ranks.rank :: ranks.world], settings):
        with settings.autocast():
            logits, targets = arm.forward(images)
        total += float(arm.loss(logits, targets, masks)) * len(images)
        pixels += pixel_counts(logits, masks, classes)
    sums = ranks.summed(torch.cat([total, pixels.flatten()]))
    return float(sums[0]) / len(data), mean_iou(sums[1:].view(3, classes))


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


def shares_of(number: int, size: int, ranks: Ranks) -> list[list[int]]:
    """A rank's places of each training batch: as many as any other rank's, since DDP takes the plain mean over ranks.

    What does not divide by the number of ranks is left for another epoch's order, and so is a last batch of one image a
    rank: a batch norm cannot train on one value a channel, which one small image may come to.
    """
    batches = [*BatchSampler(range(number), size, drop_last=False)]
    if len(batches) > 1 and len(batches[-1]) < 2 * ranks.world:
        batches.pop()
    return [batch[ranks.rank : len(batch) // ranks.world * ranks.world : ranks.world] for batch in batches]


def loaded(data: Any, batches: list[list[int]], settings: Settings) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and masks of each batch, on the device."""
    for images, masks in DataLoader(data, batch_sampler=batches, num_workers=settings.num_workers):
        yield images.to(settings.device), masks.to(settings.device)


@dataclass
class Training:
    """An arm and all that trains it, brought to where its checkpoint left it; nothing is written before `run`.

    An interrupted arm goes on to the same weights, to the bit: order, augmentation and the network's own draws follow
    from seed, epoch and rank, and the checkpoint, which need not be there, holds the rest. It says nothing of the
    number of ranks, all of which make and run this.
    """

    arm: Arm
    data: SegmentationData
    validation: SegmentationData
    settings: Settings
    ranks: Ranks = ALONE
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        arm, settings = self.arm, self.settings
        self._device = torch.device(settings.device)
        self._batches = shares_of(len(self.data), settings.batch_size, self.ranks)
        self.epochs = arm.schedule.total_epochs
        self.steps = self.epochs * -(-len(self._batches) // settings.accumulate)
        self._optimizer = torch.optim.AdamW(arm.unet.get_decoder_parameters(), lr=settings.lr)
        self._scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, self.steps)
        self._scaler = settings.scaler()
        caps = [] if arm.guard is None else [arm.guard]
        self._unfreezer = ProgressiveUnfreezer(
            arm.blocks, self._optimizer, arm.schedule, [self._scheduler], norms=arm.norms, caps=caps
        )
        self.history = self._unfreezer.history
        self.parts = {  # what a checkpoint has the states of; the unfreezer makes the groups that the others' are of
            "unfreezer": self._unfreezer,
            "model": arm.unet,
            "scheduler": self._scheduler,
            "scaler": self._scaler,
            "optimizer": self._optimizer,
        }
        checkpoint = self.checkpoint
        self.records = restore(self.parts, checkpoint) if checkpoint and checkpoint.exists() else []
        self.done = len(self.records) * self.steps // self.epochs  # steps of an interrupted process

    @property
    def held(self) -> str:
        """Why a guard holds further blocks back, with the figures; empty where none does."""
        return self.arm.guard.reason if self.arm.guard else ""

    def run(self, folder: Path, log: RunLog) -> None:
        """Train; the folder, made where it is not there, has `last.pth` after each epoch, and the log hears of all."""
        arm, records, seed = self.arm, self.records, self.settings.seed
        if speaks():
            folder.mkdir(exist_ok=True)
        for record in records:
            log.epoch(record)
        module = arm.forward
        for epoch in range(len(records), self.epochs):
            draws = np.random.SeedSequence([seed, epoch, 1 + self.ranks.rank])
            torch.manual_seed(int(draws.generate_state(1, np.uint64)[0]))
            head = self._optimizer.state.get(self._optimizer.param_groups[0]["params"][0], {})
            kept = int(head.get("step", 0))  # a re-created optimizer would begin at 0 again
            change = self._unfreezer.apply(epoch)
            module = self.ranks.wrapped(module, self._device, changed=bool(change))
            number, before = self.history[-1].number, records[-1].blocks if records else 0
            rates = {group.get(BLOCK_KEY, "head"): float(group["lr"]) for group in self._optimizer.param_groups}
            joined = tuple(block.name for block in arm.blocks[::-1][before:number])
            if change:
                log.tell(
                    f"{arm.name}, epoch {epoch}: {listed(joined)} {'joins' if len(joined) == 1 else 'join'} at "
                    f"learning rate {rates[joined[0]]:.2e} ({len(change.added)} tensors; head at {rates['head']:.2e}, "
                    f"its AdamW moments kept from step {kept})"
                )
            trained = self._epoch(epoch, module, records[-1].saved_bytes if records and not change else None, log)
            self.ranks.follow(arm.unet)
            loss, miou = evaluate(arm, self.validation, self.settings, self.ranks)
            records.append(
                EpochRecord(
                    arm=arm.name,
                    epoch=epoch,
                    blocks=number,
                    joined=joined,
                    learning_rates=rates,
                    optimizer_step=kept,
                    validation_loss=loss,
                    validation_miou=miou,
                    **trained,
                )
            )
            held = self.held
            if arm.guard is not None and not held:
                arm.guard.step(loss)
            if speaks():
                states = {name: part.state_dict() for name, part in self.parts.items()}
                save_atomically({**states, "records": [each.model_dump() for each in records]}, folder / "last.pth")
            log.epoch(records[-1])
            if epoch and joined:
                log.tell(
                    f"{arm.name}, epoch {epoch}: validation loss {records[-2].validation_loss:.3f} before "
                    f"{listed(joined)} joined, {loss:.3f} after an epoch"
                )
            if self.held != held:
                log.tell(f"{arm.name}, epoch {epoch}: {self.held}")

    def _epoch(self, epoch: int, module: Any, saved_bytes: int | None, log: RunLog) -> dict[str, Any]:
        """Train an epoch; what its record tells of it. Without `saved_bytes` the first batch counts them."""
        settings, device, accumulate = self.settings, self._device, self.settings.accumulate
        self.arm.unet.train()
        begin, losses = time.perf_counter(), []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        view = self.data.epoch(epoch_generator(settings.seed, epoch), jitter=0.2)
        for place, (images, masks) in enumerate(loaded(view, self._batches, settings)):
            # The batches of a step; an epoch ends with one, so that no transition falls between them.
            window = self._batches[place // accumulate * accumulate :][:accumulate]
            last = place % accumulate == len(window) - 1
            counting: Any = saved_for_backward(self.arm.unet) if saved_bytes is None else nullcontext([])
            with nullcontext() if last or self.ranks.world == 1 else module.no_sync():
                with counting as saved:
                    with settings.autocast():
                        logits, targets = module(images)
                    loss = self.arm.loss(logits, targets, masks)
                if saved_bytes is None:
                    saved_bytes = sum(storage.nbytes() for storage in saved)
                    saved.clear()
                self._scaler.scale(loss * (len(images) / sum(map(len, window)))).backward()
            losses.append(loss.detach())
            if last:
                self._step()
                log.step()
        sizes = torch.tensor([float(len(batch)) for batch in self._batches], dtype=torch.float64)
        own = torch.stack(losses).cpu().double() * sizes  # the one wait for the device
        total, images_seen = self.ranks.summed(torch.stack([own.sum(), sizes.sum()])).tolist()
        return {
            "train_loss": total / images_seen,
            "seconds": time.perf_counter() - begin,
            "saved_bytes": saved_bytes,
            "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        }

    def _step(self) -> None:
        if self.settings.gradient_clip is not None:
            self._scaler.unscale_(self._optimizer)
            torch.nn.utils.clip_grad_norm_(self.arm.unet.parameters(), self.settings.gradient_clip)
        scale = self._scaler.get_scale()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        if self._scaler.get_scale() >= scale:  # else gradients had overflowed, and no step was taken
            self._scheduler.step()


def restore(parts: Mapping[str, Any], path: Path) -> list[EpochRecord]:
    """Load a checkpoint's states into a run's parts, which after a CheckpointError are of no more use."""
    saved = read_checkpoint(path)
    if not isinstance(saved, dict) or set(saved) != {*parts, "records"}:
        raise CheckpointError(
            f"{path}: must be a checkpoint of this command, got another file; remove it to begin anew"
        )
    try:
        records = [EpochRecord.model_validate(record) for record in saved["records"]]
        _refuse_others({"epochs": [record.epoch for record in records]}, {"epochs": list(range(len(records)))})
        for name, part in parts.items():
            if name != "unfreezer":  # which looks at all of its state itself
                own = part.state_dict()
                if name == "optimizer":  # an AdamW: a parameter that has trained has these, another has none
                    parameters = [parameter for group in part.param_groups for parameter in group["params"]]
                    own["state"] = {
                        index: {"step": torch.zeros(()), "exp_avg": tensor.detach(), "exp_avg_sq": tensor.detach()}
                        for index, tensor in enumerate(parameters)
                        if index in saved[name]["state"]
                    }
                _refuse_others(dict(_common(name, saved[name])), dict(_common(name, own)))
            part.load_state_dict(saved[name])
        rates = [group["lr"] for group in parts["optimizer"].param_groups]
        _refuse_others({"learning rates": rates}, {"learning rates": parts["scheduler"].get_last_lr()})
    except Exception as error:  # a state that does not fit makes torch raise nearly anything
        text = " ".join(str(error).split())[:400] or type(error).__name__
        raise CheckpointError(
            f"{path}: must be a checkpoint of this run, got one that does not fit ({text}); resume with its own folder"
        ) from error
    return records


def _refuse_others(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    for where in {**saved, **own}:
        if saved.get(where) != own.get(where):
            raise ValueError(f"{where} is {reprlib.repr(saved.get(where))}, not {reprlib.repr(own.get(where))}")


def _common(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What all states of a run have in common, by place: types, shapes, names, and which parameters a group has."""
    if isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _common(f"{where}[{key!r}]", inner)
    common: Any = None
    if isinstance(value, Tensor):
        common = tuple(value.shape), value.stride(), value.dtype, value.layout, value.is_meta
    elif where.endswith("['T_max']"):
        common = value > 0  # other ranks may share an epoch into other steps
    elif isinstance(value, str) or "['params']" in where:
        common = value
    yield where, (type(value), common)
