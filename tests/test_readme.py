"""What the README shows is run: its code, its loop before and after, and its commands' text."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import unfreeze_sched
from unfreeze_sched.cli import make_parser

ROOT = Path(unfreeze_sched.__file__).parent.parent
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="the README lies in the repository alone")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_python_blocks_run() -> None:
    """Each Python block runs as it stands."""
    pytest.importorskip("segmentation_models_pytorch")
    assert blocks("python")
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), {})  # noqa: S102  # the point


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.filterwarnings("ignore:`timm-` encoders are deprecated:DeprecationWarning")
def test_the_loop_runs_before_and_after(side: str) -> None:
    """The plain loop and the loop with the library both train; with it, the encoder has joined by the end."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    (diff,) = blocks("diff")
    mark = {"before": "+", "after": "-"}[side]
    code = "\n".join(line[1:] for line in diff.splitlines() if not line.startswith(mark))
    # No download, and fifty epochs of one small step.
    code = code.replace('encoder_weights="imagenet"', "encoder_weights=None")
    torch.manual_seed(0)
    loader = [(torch.randn(2, 3, 32, 32), torch.zeros(2, 1, 32, 32))]
    names: dict[str, Any] = {"smp": smp, "torch": torch, "loader": loader, "loss_fn": torch.nn.functional.mse_loss}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102  # the point
    groups = names["optimizer"].param_groups
    assert len(groups) == (8 if side == "after" else 1)
    if side == "after":
        held = [id(parameter) for group in groups for parameter in group["params"]]
        assert sorted(held) == sorted(id(p) for p in names["model"].parameters() if p.requires_grad)


def test_three_lines_more_and_none_changed() -> None:
    """The library costs a user three lines, blank ones aside, and changes none."""
    (diff,) = blocks("diff")
    assert len([line for line in diff.splitlines() if re.match(r"[+-]\s*\S", line)]) == 3
    assert not [line for line in diff.splitlines() if line.startswith("-")]


def test_ci_calls_the_test_command() -> None:
    """`.ci/run` holds the README's second command to the letter."""
    _, second = blocks("sh")
    assert second.strip() in (ROOT / ".ci" / "run").read_text()


def test_the_run_command_parses() -> None:
    """The README's first command has arguments that the command line takes."""
    first, _ = blocks("sh")
    words = shlex.split(first.split("&&")[-1])
    assert words[0] == ".venv/bin/unfreeze-sched"
    args = make_parser().parse_args(words[1:])
    assert (args.unfreeze_start, args.compare_frozen) == (1, True)


def test_the_epoch_row() -> None:
    """The README's row of epochs and blocks is what the schedule says."""
    from unfreeze_sched import MEDIUM, UnfreezeSchedule  # noqa: PLC0415  # as a reader would

    schedule = UnfreezeSchedule(preset=MEDIUM, total_blocks=7, total_epochs=50)
    epochs, numbers = (
        [cell.strip() for cell in line.split("|")[2:-1]]
        for line in README.read_text().splitlines()
        if line.startswith(("| epochs |", "| blocks |"))
    )
    for span, number in zip(epochs, numbers, strict=True):
        low, _, high = span.partition("-")
        assert {schedule[epoch] for epoch in range(int(low), int(high or 49) + 1)} == {int(number)}


def test_the_readme_is_short() -> None:
    """The README is at most 130 lines."""
    assert len(README.read_text().splitlines()) <= 130


def test_links_lead_somewhere() -> None:
    """Each relative link of the README and of the guides beside the code is a file."""
    guides = [README, *(ROOT / "unfreeze_sched").rglob("*.md")]
    links = [(guide, link) for guide in guides for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", guide.read_text())]
    assert len(links) > 10
    assert [(guide.name, link) for guide, link in links if not (guide.parent / link).exists()] == []
