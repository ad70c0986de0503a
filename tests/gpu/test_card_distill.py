"""The reference run on a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bits
import pytest
import torch

for name in ("segmentation_models_pytorch", "PIL", "matplotlib", "rich"):
    pytest.importorskip(name)

from images import write_images  # noqa: E402  # after the skips

from unfreeze_sched.cli import main  # noqa: E402  # likewise

WORDS = [
    *("--image-size", "32", "--batch-size", "2", "--epochs", "3", "--teacher-epochs", "1", "--norms", "frozen"),
    *("--student-encoder", "resnet18", "--teacher-encoder", "resnet18", "--student-weights", "none"),
    *("--unfreeze-start", "1", "--unfreeze-rate", "1"),
]


def test_interrupted_and_resumed(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is interrupted as it writes the checkpoint of its last epoch ends with the bits of one that is not."""
    data = write_images(tmp_path, 8)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = ["distill", *WORDS, "--device", device, "--data", str(data)]
    writes: list[int] = []
    save = torch.save

    def counting(value: Any, file: Any) -> None:
        writes.append(len(writes))
        save(value, file)

    def cutting(value: Any, file: Any) -> None:
        counting(value, file)
        if len(writes) == total - 1:  # the last is the student itself
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", counting)
    assert main([*words, "--output", str(whole)]) == 0
    total = len(writes)
    writes.clear()
    monkeypatch.setattr(torch, "save", cutting)
    assert main([*words, "--output", str(cut)]) == 130
    assert not (cut / "student.pth").exists()
    monkeypatch.setattr(torch, "save", save)
    assert main(["distill", "--resume", str(cut)]) == 0
    ours, theirs = (torch.load(folder / "student.pth", weights_only=True) for folder in (cut, whole))
    assert bits.differences(ours, theirs) == []
