"""What an epoch of the reference run leaves to show."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from unfreeze_sched._checks import FrozenModel


class EpochRecord(FrozenModel):
    """One line of `metrics.jsonl`.

    Attributes:
        arm: Name of the arm.
        epoch: 0-based.
        blocks: Number of unfrozen blocks, counted from the deep end.
        joined: Names of the blocks that joined before this epoch, deepest first.
        learning_rates: By group, at the epoch's first step: `head`, then the blocks.
        optimizer_step: Steps that the optimizer had taken of the head before the epoch, by its own count.
        train_loss: Mean over the training images, each batch as it was trained on.
        validation_loss: Mean over the validation images.
        validation_miou: In [0, 1].
        seconds: Of the training steps alone.
        saved_bytes: Activations that the first batch of this number of blocks kept for backward, on rank 0.
        peak_bytes: The device's peak of memory in the epoch, where it reports one; likewise.
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


def around_transitions(records: Sequence[EpochRecord]) -> dict[int, tuple[float, float]]:
    """The validation loss before and after each transition, by its 0-based epoch.

    Before is that of the epoch before; after that of the first epoch in which the new blocks trained.
    """
    return {
        now.epoch: (before.validation_loss, now.validation_loss)
        for before, now in pairwise(records)
        if now.blocks != before.blocks
    }
