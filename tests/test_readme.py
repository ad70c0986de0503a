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
    pytest.importorskip("timm")
    assert blocks("python")
    for code in blocks("python"):
        code = code.replace("pretrained=True", "pretrained=False")  # noqa: PLW2901  # no download
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


def test_its_accuracies_are_the_study_s() -> None:
    """The README's table is the one that the study wrote."""
    study = (ROOT / "benchmarks" / "results" / "text.md").read_text().splitlines()
    table = [line for line in README.read_text().splitlines() if line.startswith("|") and line in study]
    assert len(table) == 6


def test_the_readme_is_short() -> None:
    """The README is at most 130 lines."""
    assert len(README.read_text().splitlines()) <= 130


HOSTED = re.compile(r"https://(?:github|raw\.githubusercontent)\.com/unfreeze-sched/unfreeze-sched/(?:blob/)?main/(.*)")


def test_links_lead_somewhere() -> None:
    """Each link to a file of the repository leads to one; those of the README are absolute, for an index has no files."""
    links = [
        (guide, link)
        for guide in [README, *(ROOT / "unfreeze_sched").rglob("*.md")]
        for link in re.findall(r"\]\(([^)#]+)\)", guide.read_text())
    ]
    hosted = [ROOT / found[1] for _, link in links if (found := HOSTED.fullmatch(link))]
    relative = [(guide, link) for guide, link in links if not link.startswith("https:")]
    assert len(hosted) > 10
    assert [path for path in hosted if not path.exists()] == []
    assert len(relative) > 4
    assert [(guide.name, link) for guide, link in relative if not (guide.parent / link).exists()] == []
    assert README not in [guide for guide, _ in relative]
