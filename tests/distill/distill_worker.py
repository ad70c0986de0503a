"""`unfreeze-sched`, alone or as one of torchrun's ranks, watched: each rank keeps what it holds.

Called as `distill_worker.py FOLDER ARGUMENTS...`; leaves FOLDER/NAME.RANK.pt for each arm, and of rank 0 the
checkpoint of each epoch, FOLDER/NAME.EPOCH.last.pth. DOUBLE=1 computes in double precision, in which the order of sums
hardly shows; FAILS=RANK lets a rank fail after its first epoch of the student.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from unfreeze_sched.__main__ import leave
from unfreeze_sched.cli import main
from unfreeze_sched.distill.command import run, training

train, evaluate, save = training.train, training.evaluate, training.save_atomically


def watch(folder: Path, rank: str) -> None:
    """Let the command's own functions leave what the tests compare."""

    def watched_train(arm: Any, *rest: Any) -> Any:
        outcome = train(arm, *rest)
        state = {"weights": arm.unet.state_dict(), "random": torch.get_rng_state()}
        torch.save(state, folder / f"{arm.name}.{rank}.pt")
        return outcome

    def watched_save(state: Any, path: Path) -> None:
        save(state, path)
        shutil.copy(path, folder / f"{path.parent.name}.{len(state['records']) - 1}.last.pth")

    run.train, training.save_atomically = watched_train, watched_save


def failing_evaluate(arm: Any, *rest: Any) -> Any:
    if arm.name == "student":
        raise OSError("the disk must have room, got none; make some")
    return evaluate(arm, *rest)


if __name__ == "__main__":
    own = os.environ.get("RANK", "0")
    watch(Path(sys.argv[1]), own)
    if os.environ.get("FAILS") == own:
        training.evaluate = failing_evaluate
    if os.environ.get("DOUBLE"):
        torch.set_default_dtype(torch.float64)
    leave(main(sys.argv[2:]))
