"""A run that is resumed in a new process ends as the uninterrupted one: weights, states and rates, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("schedulefree")

import resume_worker  # after the skip
from processes import environment
from resume_worker import EPOCHS, MUTATED, PARTS, RUNS  # likewise

Report = dict[str, Any]


def report_of(folder: Path, which: str) -> Report:
    """Let one process train the runs, and another one resume them."""
    for mode in ("write", "verify"):
        words = [sys.executable, resume_worker.__file__, mode, which, str(folder)]
        done = subprocess.run(words, check=False, capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stderr
    report: Report = json.loads((folder / "report.json").read_text())
    return report


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return report_of(tmp_path_factory.mktemp("some"), "some")


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return report_of(tmp_path_factory.mktemp("all"), "all")


def differing(found: dict[str, list[str]]) -> dict[str, list[str]]:
    """The first differences by boundary, the number of epochs trained before the interruption."""
    assert list(found) == [str(boundary) for boundary in range(EPOCHS + 1)]
    return {boundary: paths[:5] for boundary, paths in found.items() if paths}


@pytest.mark.parametrize("name", RUNS["some"])
def test_resumed_in_a_new_process(name: str, some: Report) -> None:
    """Interrupted at any epoch boundary, the run ends as the uninterrupted one did."""
    assert differing(some["runs"][name]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS["all"])
def test_each_combination_resumed_in_a_new_process(name: str, every: Report) -> None:
    """As above, for every optimizer with every scheduler and every variant."""
    assert differing(every["runs"][name]) == {}


@pytest.mark.parametrize("part", PARTS)
def test_the_comparison_can_fail(part: str, some: Report) -> None:
    """One part that is not loaded is found at every boundary at which it has something to say."""
    found = differing(some["mutations"][part])
    first = 0 if part in {"model", "random"} else 1  # the others are those of a new run before the first epoch
    assert list(found) == [str(boundary) for boundary in range(first, EPOCHS + 1)]
    if part == "unfreezer":
        joined = [found[str(boundary)] for boundary in range(2, EPOCHS + 1)]  # from there on there are groups to replay
        assert all(
            "`optimizer` must have the saved run's groups when its state is loaded" in text
            for paths in joined
            for text in paths
        )


def test_some_of_the_runs_are_enough_of_them() -> None:
    """The default run has every pair of optimizer and scheduler, and every optimizer in every variant."""
    some, every = RUNS["some"].values(), RUNS["all"].values()
    assert MUTATED in RUNS["some"]
    for left, right in ((0, 1), (0, 2)):
        assert {(kinds[left], kinds[right]) for kinds in some} == {(kinds[left], kinds[right]) for kinds in every}
