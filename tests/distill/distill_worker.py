"""`unfreeze-sched`, alone or as one of torchrun's ranks, watched: each rank keeps what it holds.

Called as `distill_worker.py FOLDER ARGUMENTS...`; leaves FOLDER/NAME.RANK.pt for each arm, with its own part of all sums
over ranks, and of rank 0 the checkpoint of each epoch, FOLDER/NAME.EPOCH.last.pth. FAILS=RANK lets a rank fail after its
first epoch of the student.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from unfreeze_sched.__main__ import leave
from unfreeze_sched.cli import main
from unfreeze_sched.distill.command import training
from unfreeze_sched.distill.command.ranks import Ranks

run, evaluate, save, summed = training.Training.run, training.evaluate, training.save_atomically, Ranks.summed


def watch(folder: Path, rank: str) -> None:
    """Let the command's own functions leave what the tests compare."""
    sums: list[list[float]] = []

    def watched_run(self: Any, *rest: Any) -> Any:
        sums.clear()
        outcome = run(self, *rest)
        torch.save({"weights": self.arm.unet.state_dict(), "sums": sums}, folder / f"{self.arm.name}.{rank}.pt")
        return outcome

    def watched_save(state: Any, path: Path) -> None:
        save(state, path)
        shutil.copy(path, folder / f"{path.parent.name}.{len(state['records']) - 1}.last.pth")

    def watched_sum(self: Any, values: torch.Tensor) -> torch.Tensor:
        sums.append(values.tolist())
        return summed(self, values)

    training.Training.run, training.save_atomically, Ranks.summed = watched_run, watched_save, watched_sum  # type: ignore[method-assign]


def failing_evaluate(arm: Any, *rest: Any) -> Any:
    if arm.name == "student":
        raise OSError("the disk must have room, got none; make some")
    return evaluate(arm, *rest)


if __name__ == "__main__":
    own = os.environ.get("RANK", "0")
    watch(Path(sys.argv[1]), own)
    if os.environ.get("FAILS") == own:
        training.evaluate = failing_evaluate
    leave(main(sys.argv[2:]))
