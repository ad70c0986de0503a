"""The training loop of the reference run: one for the teacher, the student, and the student that stays frozen."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unfreeze_sched import ProgressiveUnfreezer
from unfreeze_sched.distill.checkpoints import save_atomically
from unfreeze_sched.distill.command.arms import Arm, Settings
from unfreeze_sched.distill.command.data import SegmentationData, epoch_generator
from unfreeze_sched.distill.command.evaluation import evaluate, loaded, shares_of
from unfreeze_sched.distill.command.ranks import ALONE, Ranks
from unfreeze_sched.distill.command.records import EpochRecord
from unfreeze_sched.distill.command.restore import restore
from unfreeze_sched.distill.command.runlog import RunLog
from unfreeze_sched.history import Transition
from unfreeze_sched.optimizer.groups import BLOCK_KEY
from unfreeze_sched.plan.memory import saved_for_backward


class Training:
    """An arm and all that trains it, brought to where its checkpoint left it; nothing is written before `run`.

    An interrupted arm goes on to the same weights, to the bit: order, augmentation and the network's own draws follow
    from seed, epoch and rank, and the checkpoint holds the rest. It says nothing of the number of ranks.

    Args:
        arm: What is trained.
        data: The training images.
        validation: Looked at after each epoch.
        settings: The rest.
        ranks: Those that train together, all of them making and running this; rank 0 alone writes.
        checkpoint: Of an interrupted run; it need not be there.

    Attributes:
        arm: What is trained.
        parts: What a checkpoint has the states of.
        records: One an epoch, in order.
        steps: Number of optimizer steps.
        done: Those of an interrupted process.

    Raises:
        CheckpointError: The checkpoint is damaged, or of another run.
    """

    def __init__(
        self,
        arm: Arm,
        data: SegmentationData,
        validation: SegmentationData,
        settings: Settings,
        ranks: Ranks = ALONE,
        checkpoint: Path | None = None,
    ) -> None:
        self.arm, self._settings, self._ranks = arm, settings, ranks
        self._data, self._validation = data, validation
        self._device = torch.device(settings.device)
        self._batches = shares_of(len(data), settings.batch_size, ranks)
        self.steps = settings.epochs * -(-len(self._batches) // settings.accumulate)
        self._optimizer = torch.optim.AdamW(arm.unet.get_decoder_parameters(), lr=settings.lr)
        self._scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, self.steps)
        self._unfreezer = ProgressiveUnfreezer(
            arm.blocks,
            self._optimizer,
            arm.schedule,
            [self._scheduler],
            learning_rate_scale=arm.learning_rate_scale,
            norms=arm.norms,
            caps=[] if arm.guard is None else [arm.guard],
        )
        self._scaler = settings.scaler()
        self.parts = {
            "unfreezer": self._unfreezer,
            "model": arm.unet,
            "scheduler": self._scheduler,
            "scaler": self._scaler,
            "optimizer": self._optimizer,
        }
        self.records = restore(self.parts, checkpoint) if checkpoint and checkpoint.exists() else []
        self.done = len(self.records) * self.steps // settings.epochs

    @property
    def history(self) -> tuple[Transition, ...]:
        """The transitions, the first state included."""
        return tuple(self._unfreezer.history)

    @property
    def held(self) -> str:
        """Why a guard holds further blocks back, with the figures; empty where none does."""
        return self.arm.guard.reason if self.arm.guard else ""

    def run(self, folder: Path, log: RunLog) -> None:
        """Train.

        Args:
            folder: Where `last.pth` is written after each epoch; made where it is not there.
            log: Told of steps, transitions and epochs, also of those before an interruption.
        """
        arm, records, seed = self.arm, self.records, self._settings.seed
        if self._ranks.leads:
            folder.mkdir(exist_ok=True)
        for record in records:
            log.epoch(record)
        module = arm.forward
        for epoch in range(len(records), self._settings.epochs):
            draws = np.random.SeedSequence([seed, epoch, 1 + self._ranks.rank])
            torch.manual_seed(int(draws.generate_state(1, np.uint64)[0]))
            kept = self._head_steps()
            change = self._unfreezer.apply(epoch)
            module = self._ranks.wrapped(module, self._device, changed=bool(change))
            number, before = self._unfreezer.history[-1].number, records[-1].blocks if records else 0
            rates = {group.get(BLOCK_KEY, "head"): float(group["lr"]) for group in self._optimizer.param_groups}
            joined = tuple(block.name for block in arm.blocks[::-1][before:number])
            if change:
                log.tell(_joined(arm, epoch, joined, rates, len(change.added), kept))
            trained = self._epoch(epoch, module, records[-1].saved_bytes if records and not change else None, log)
            self._ranks.follow(arm.unet)
            evaluation = evaluate(arm, self._validation, self._settings, self._ranks)
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
            before_check = self.held
            if arm.guard is not None and not before_check:
                arm.guard.step(evaluation.loss)
            held = "" if before_check else self.held
            if self._ranks.leads:
                states = {name: part.state_dict() for name, part in self.parts.items()}
                save_atomically({**states, "records": [each.model_dump() for each in records]}, folder / "last.pth")
            log.epoch(records[-1])
            for line in _lines(arm, records, held):
                log.tell(line)

    def _epoch(self, epoch: int, module: Any, saved_bytes: int | None, log: RunLog) -> dict[str, Any]:
        """Train an epoch; what its record tells of it. Without `saved_bytes` the first batch counts them."""
        settings, device, accumulate = self._settings, self._device, self._settings.accumulate
        self.arm.unet.train()
        begin, losses = time.perf_counter(), []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        view = self._data.epoch(epoch_generator(settings.seed, epoch), jitter=0.2)
        for place, (images, masks) in enumerate(loaded(view, self._batches, settings)):
            # The batches of a step; an epoch ends with one, so that no transition falls between them.
            window = self._batches[place // accumulate * accumulate :][:accumulate]
            last = place % accumulate == len(window) - 1
            counting: Any = saved_for_backward(self.arm.unet) if saved_bytes is None else nullcontext([])
            with nullcontext() if last or self._ranks.world == 1 else module.no_sync():
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
        total, images_seen = self._ranks.summed(torch.stack([own.sum(), sizes.sum()])).tolist()
        return {
            "train_loss": total / images_seen,
            "seconds": time.perf_counter() - begin,
            "saved_bytes": saved_bytes,
            "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        }

    def _step(self) -> None:
        if self._settings.gradient_clip is not None:
            self._scaler.unscale_(self._optimizer)
            torch.nn.utils.clip_grad_norm_(self.arm.unet.parameters(), self._settings.gradient_clip)
        scale = self._scaler.get_scale()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        if self._scaler.get_scale() >= scale:  # else gradients had overflowed, and no step was taken
            self._scheduler.step()

    def _head_steps(self) -> int:
        """The head's step count as AdamW keeps it: a re-created optimizer would begin at 0 again."""
        state = self._optimizer.state.get(self._optimizer.param_groups[0]["params"][0], {})
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
