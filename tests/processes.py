"""Scripts on real ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import distributed

from unfreeze_sched import __main__


def environment() -> dict[str, str]:
    """That of a process which finds the modules that this one finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def two_ranks(folder: Path, code: str) -> dict[str, Any]:
    """Run a script under torchrun on two processes, given the folder; what it saved, by name."""
    script = folder / "script.py"
    script.write_text(code)
    command = [*(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")]
    done = subprocess.run(
        [*command, str(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**environment(), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}


def leave() -> NoReturn:
    """End a rank that has saved all, as the command does."""
    if torch.__version__ >= "2.8":  # on 2.6 gloo waits in it for good now and then
        distributed.destroy_process_group()
    __main__.leave(0)
