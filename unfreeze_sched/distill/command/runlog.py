"""What a run says: lines and a bar on the console, `metrics.jsonl`, TensorBoard's events, warnings in one line each."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from unfreeze_sched._checks import FrozenModel, plain
from unfreeze_sched.parallel import speaks


class EpochRecord(FrozenModel):
    """One line of `metrics.jsonl`."""

    arm: str
    epoch: int  # 0-based
    blocks: int  # unfrozen ones, counted from the deep end
    joined: tuple[str, ...]  # before this epoch, deepest first
    learning_rates: dict[str, float]  # at the epoch's first step: of the `head`, then of the blocks
    optimizer_step: int  # steps of the head before the epoch, by the optimizer's own count
    train_loss: float  # mean over images, each batch as it was trained on
    validation_loss: float  # mean over images
    validation_miou: float  # in [0, 1]
    seconds: float  # of the training steps alone
    saved_bytes: int  # that the first batch of this number of blocks kept for backward, on rank 0
    peak_bytes: int | None  # of the device's memory, where it reports one; likewise


def say(text: str) -> None:
    """Text on standard output, above the bar; rank 0 alone says it."""
    if speaks():
        tqdm.write("\n".join(map(plain, text.split("\n"))))
        sys.stdout.flush()


def tensorboard_writer() -> Any:
    """TensorBoard's writer of events; asked for before anything is trained, too."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # an extra, on use alone
    except ImportError:
        raise ModuleNotFoundError(
            "`--tensorboard` needs tensorboard, which is not installed; pip install 'unfreeze-sched[tensorboard]'",
            name="tensorboard",
        ) from None
    return SummaryWriter


class RunLog(ExitStack):
    """Tells the console of the run, and files of its epochs; on other ranks than the first it is silent.

    A resumed run tells its past anew, from the checkpoints' records, so each epoch stands in the files once.
    """

    tell = staticmethod(say)

    def __init__(self, output: Path, *, events: bool) -> None:
        super().__init__()
        self._output, self._events = output, events and speaks()
        metrics = output / "metrics.jsonl" if speaks() else Path(os.devnull)
        self._metrics = self.enter_context(metrics.open("w", encoding="utf-8"))
        self._arm = self.enter_context(ExitStack())

    def begin(self, name: str, steps: int, done: int) -> None:
        """A new arm, of so many steps, some of which an interrupted process has done."""
        self._arm.close()
        silent = None if speaks() else True  # None shows it on a terminal alone
        bar = tqdm(desc=name, total=steps, initial=done, leave=False, disable=silent)
        self._bar, self._board = self._arm.enter_context(bar), None
        if self._events:
            for old in (self._output / name).glob("events.out.tfevents.*"):
                old.unlink()
            self._board = self._arm.enter_context(tensorboard_writer()(str(self._output / name)))

    def step(self) -> None:
        """One optimizer step was taken."""
        self._bar.update()

    def epoch(self, record: EpochRecord) -> None:
        """An epoch is over."""
        self._metrics.write(record.model_dump_json() + "\n")
        self._metrics.flush()
        if self._board:
            scalars = {
                "loss/training": record.train_loss,
                "loss/validation": record.validation_loss,
                "mIoU/validation": record.validation_miou,
                "blocks/unfrozen": record.blocks,
                **{f"learning_rate/{name}": rate for name, rate in record.learning_rates.items()},
            }
            for tag, value in scalars.items():
                self._board.add_scalar(tag, value, record.epoch)
            self._board.flush()
        figures = f"loss {record.train_loss:.3f}, mIoU {100 * record.validation_miou:.1f} %"
        self._bar.set_description(f"{record.arm}, epoch {record.epoch}: {figures}")


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Within it, each text that Python's warnings have is told once, by rank 0, without a place in the code."""
    told: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        text = plain(" ".join(str(message).split()))
        if speaks() and text not in told:
            told.add(text)
            tqdm.write(f"unfreeze-sched: warning: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
