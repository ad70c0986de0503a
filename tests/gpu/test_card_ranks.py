"""A process group of one rank: gloo on the CPU, NCCL on a card."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from processes import environment


def test_one_rank(device: str, tmp_path: Path) -> None:
    """Under DDP, wrapped anew at each epoch, the run has the bits that it has without.

    What ranks tell each other goes over the backend; torch.distributed.checkpoint carries the moments of blocks that
    are frozen again.
    """
    worker = Path(__file__).with_name("card_worker.py")
    command = [sys.executable, str(worker), str(tmp_path), device]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    assert result["found"] == []
    blocks = [{name.split(".")[1] for name in names} for names in result["compared"]]
    assert blocks == [{"2"}, {"0", "1"}]  # at the first step of each transition that unfreezes
    assert result["devices"] == [None if device == "cpu" else [0]] * 4
    assert result["moments"] == {"saved": [f"blocks.{i}.0.weight" for i in range(3)], "differences": []}
    assert result["last"] == 0.5
