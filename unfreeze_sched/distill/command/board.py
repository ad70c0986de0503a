"""An arm's curves for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unfreeze_sched.distill.command.records import EpochRecord


def check() -> None:
    """See that TensorBoard is there, before anything is trained.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401, PLC0415  # an extra, on use alone
    except ImportError:
        raise ModuleNotFoundError(
            "`--tensorboard` needs tensorboard, which is not installed; pip install 'unfreeze-sched[tensorboard]'",
            name="tensorboard",
        ) from None


class Board:
    """Writes an arm's epochs as TensorBoard's events; a step is an epoch, 0-based.

    A resumed run tells its past anew, from the checkpoint's records. So the events of its interrupted process, which
    may end earlier or within an epoch's, give way: each epoch stands there once.

    Args:
        folder: Of the arm; it exists.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # an extra, on use alone

        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer: Any = SummaryWriter(str(folder))

    def add(self, record: EpochRecord) -> None:
        """An epoch is over."""
        scalars = {
            "loss/training": record.train_loss,
            "loss/validation": record.validation_loss,
            "mIoU/validation": record.validation_miou,
            "blocks/unfrozen": record.blocks,
            **{f"learning_rate/{name}": rate for name, rate in record.learning_rates.items()},
        }
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, record.epoch)
        self._writer.flush()

    def close(self) -> None:
        """No more epochs."""
        self._writer.close()
