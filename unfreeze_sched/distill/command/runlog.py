"""What a run says: lines and a bar on the console, `metrics.jsonl`, TensorBoard's events, warnings in one line each."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unfreeze_sched.distill.command.arms import Settings
from unfreeze_sched.distill.command.board import Board
from unfreeze_sched.distill.command.data import SegmentationData
from unfreeze_sched.distill.command.ranks import Ranks
from unfreeze_sched.distill.command.records import EpochRecord


class RunLog:
    """Tells the console of the run, and files of its epochs; on other ranks than the first it is silent.

    Args:
        console: Where lines go.
        output: The run's folder.
        ranks: Those that train together.
        events: Whether to write for TensorBoard, too.
    """

    def __init__(self, console: Console, output: Path, ranks: Ranks, *, events: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
        )
        self._output = output
        self._metrics = (output / "metrics.jsonl").open("w", encoding="utf-8") if ranks.leads else None
        self._events = events and ranks.leads
        self._board: Board | None = None
        self._task: Any = None
        self._name = ""
        self._steps = 0

    def __enter__(self) -> Self:
        if self._metrics:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._board:
            self._board.close()
        if self._metrics:
            self._metrics.close()

    def begin(self, name: str, epochs: int, training: SegmentationData, settings: Settings) -> None:
        """A new arm, of so many epochs."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        if self._board:
            self._board.close()
        self._board = Board(self._output / name) if self._events else None
        self._name = name
        self._steps = -(-len(training) // settings.batch_size)
        self._task = self._progress.add_task(name, total=epochs * self._steps)

    def step(self) -> None:
        """One optimizer step was taken."""
        self._progress.advance(self._task)

    def transition(self, line: str) -> None:
        """Something about the blocks, in one line."""
        self._progress.console.print(line)

    def epoch(self, record: EpochRecord) -> None:
        """An epoch is over."""
        if self._metrics:
            self._metrics.write(json.dumps(record.as_dict()) + "\n")
            self._metrics.flush()
        if self._board:
            self._board.add(record)
        self._progress.update(
            self._task,
            completed=(record.epoch + 1) * self._steps,
            description=f"{self._name}, epoch {record.epoch}: loss {record.train_loss:.3f}, "
            f"mIoU {100 * record.validation_miou:.1f} %",
        )


def warn(text: str) -> None:
    """A warning, as a line on standard error."""
    print(f"unfreeze-sched: warning: {' '.join(text.split())}", file=sys.stderr, flush=True)  # noqa: T201  # a command's voice


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
