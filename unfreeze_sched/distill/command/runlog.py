"""What a run says: lines and a bar on the console, `metrics.jsonl`, TensorBoard's events, warnings in one line each."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from unfreeze_sched._checks import plain
from unfreeze_sched.distill.command.ranks import Ranks
from unfreeze_sched.distill.command.records import EpochRecord


def check_tensorboard() -> None:
    """See that TensorBoard is there, before anything is trained."""
    try:
        import torch.utils.tensorboard  # noqa: F401, PLC0415  # an extra, on use alone
    except ImportError:
        raise ModuleNotFoundError(
            "`--tensorboard` needs tensorboard, which is not installed; pip install 'unfreeze-sched[tensorboard]'",
            name="tensorboard",
        ) from None


class RunLog:
    """Tells the console of the run, and files of its epochs; on other ranks than the first it is silent.

    A resumed run tells its past anew, from the checkpoints' records, so each epoch stands in the files once.

    Args:
        output: The run's folder.
        ranks: Those that train together.
        events: Whether to write for TensorBoard, too.
    """

    def __init__(self, output: Path, ranks: Ranks, *, events: bool) -> None:
        self._output, self._ranks, self._events = output, ranks, events and ranks.leads
        self._metrics = (output / "metrics.jsonl").open("w", encoding="utf-8") if ranks.leads else None
        self._board: Any = None
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._bar, self._board, self._metrics):
            if each is not None:
                each.close()

    def begin(self, name: str, steps: int, done: int) -> None:
        """A new arm, of so many steps, some of which an interrupted process has done."""
        for each in (self._bar, self._board):
            if each is not None:
                each.close()
        # On a terminal alone, and gone when it is through.
        self._bar = tqdm(desc=name, total=steps, initial=done, leave=False, disable=None if self._ranks.leads else True)
        if self._events:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # an extra, on use alone

            for old in (self._output / name).glob("events.out.tfevents.*"):
                old.unlink()
            self._board = SummaryWriter(str(self._output / name))

    def step(self) -> None:
        """One optimizer step was taken."""
        self._bar.update()

    def tell(self, line: str) -> None:
        """Something about the run, in one line."""
        say(line, self._ranks)

    def epoch(self, record: EpochRecord) -> None:
        """An epoch is over."""
        if self._metrics:
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


def say(text: str, ranks: Ranks) -> None:
    """Text on standard output, above the bar; rank 0 alone says it."""
    if ranks.leads:
        with tqdm.external_write_mode():
            print("\n".join(map(plain, text.split("\n"))), flush=True)  # noqa: T201  # a command's voice


def warn(text: str) -> None:
    """A warning, as a line on standard error."""
    with tqdm.external_write_mode():
        print(f"unfreeze-sched: warning: {plain(' '.join(text.split()))}", file=sys.stderr, flush=True)  # noqa: T201  # a command's voice


@contextmanager
def warnings_in_one_line(ranks: Ranks) -> Iterator[None]:
    """Within it, each text that Python's warnings have is told once, by rank 0, without a place in the code."""
    told: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        text = str(message)
        if ranks.leads and text not in told:
            told.add(text)
            warn(text)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
