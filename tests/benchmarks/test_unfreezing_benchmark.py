"""The unfreezing study: its statistics, arms that have to agree, and a quick run."""

import json
import math
from functools import cache
from pathlib import Path

import pairing
import pytest
import studying
import torch
import unfreezing
import unfreezing_arms
import unfreezing_report
import unfreezing_statistics as statistics
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor
from unfreezing_arms import ARMS, Arm, Run, Setting, train

TINY = Setting(image_size=32, batch_size=4, epoch_images=8, test_images=4)


@cache
def trained(arm: str, lr_schedule: str) -> tuple[dict, Tensor]:
    """What a tiny run of an arm gives, and all its weights and statistics."""
    found, unet = train(Run(arm, 0, lr_schedule, 10, 2, 1, 1e-3, 0.3), TINY)
    return found, torch.cat([value.flatten().double() for value in unet.state_dict().values()])


def test_intervals_are_students() -> None:
    """Mean and half width of 1, 2, 3 by hand; the p value is that of SciPy's paired test."""
    assert pairing.interval([1.0, 2.0, 3.0])[:2] == pytest.approx((2.0, 4.30265 / math.sqrt(3)), rel=1e-5)
    first, second = [1.0, 4.0, 2.5, 7.0], [0.5, 2.0, 2.0, 6.5]
    found = pairing.paired(first, second)
    assert found.mean == pytest.approx(0.875)
    assert found.p == pytest.approx(stats.ttest_rel(first, second).pvalue)


def test_an_interval_of_one_value_is_infinite() -> None:
    """One seed says nothing about the next, and is never significant."""
    found = pairing.interval([1.0])
    assert found.half == math.inf
    assert math.isnan(found.p)
    assert pairing.holm({"a": found.p, "b": 0.03})["b"] == 0.03


def test_equal_arms_have_no_difference() -> None:
    """All differences 0 is p = 1; all differences equal, and not 0, is p = 0."""
    assert pairing.paired([1.0, 2.0], [1.0, 2.0]) == (0.0, 0.0, 1.0)
    assert pairing.paired([2.0, 3.0], [1.0, 2.0]) == (1.0, 0.0, 0.0)


def test_holm_steps_down() -> None:
    """The textbook's correction: p times the number left, never below an earlier one, at most 1."""
    found = pairing.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.9})
    assert found == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.9})


def test_only_complete_seeds_count() -> None:
    """A seed that one arm lacks is left out of the table for all arms."""
    cells = [
        {"run": {"arm": arm, "seed": seed, "epochs": 10, "lr_schedule": "cosine"}}
        for arm, seeds in (("frozen", (0, 1, 2)), ("kept", (0, 2, 3)))
        for seed in seeds
    ]
    (table,) = statistics.tables(cells, ["frozen", "kept"]).values()
    assert {arm: [cell["run"]["seed"] for cell in found] for arm, found in table.items()} == {
        "frozen": [0, 2],
        "kept": [0, 2],
    }
    assert statistics.tables(cells, ["frozen", "kept", "guide"]) == {}


def test_reaching_counts_steps_up_to_the_first_time() -> None:
    """Steps and seconds until the target was first met; infinite if it never was."""
    cell = {"validation": {"1": 0.2, "3": 0.5, "5": 0.4}, "seconds": [1.0] * 6, "steps_per_epoch": 7}
    assert statistics.reach(cell, 50.0) == (28, 4.0)
    assert statistics.reach(cell, 51.0) == (math.inf, math.inf)


def test_a_better_alternative_to_a_default_is_told() -> None:
    """What is significantly better than the default is named with its table and part; what is not, is not."""

    def cells(*finals: float) -> list[dict]:
        return [
            {
                "run": {"epochs": 10, "seed": seed},
                "validation": {"9": 0.5 + seed / 10},
                "test": {"9": value / 100},
                "shifted": {"noise": 0.3 + seed / 100, "blur": 0.4},
                "steps_per_epoch": 20,
            }
            for seed, value in enumerate(finals)
        ]

    table = {"kept": cells(40, 50, 45), "cleared": cells(42, 52.1, 46.9), "warmup": cells(40, 49, 47)}
    moments, *others = unfreezing_report.defaults({(10, "cosine"): table}).splitlines()
    where = "short, 200 steps, cosine, 3 seeds, test (+2.0 ± 0.2)"
    assert moments == f"- moments are kept: the other is significantly better {where}, worse nowhere."
    assert all(line.endswith(": the other is significantly better nowhere, worse nowhere.") for line in others)


def test_clearing_in_place_is_re_creating() -> None:
    """To the bit, with the LR schedule carried over; keeping the moments gives other weights."""
    _, cleared = trained("cleared", "cosine")
    assert torch.equal(cleared, trained("recreated", "cosine")[1])
    assert not torch.equal(cleared, trained("kept", "cosine")[1])


def test_the_guides_loop_differs_by_its_moments_and_its_dead_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a constant rate it is clearing in place with norms in training mode, to the bit; under cosine it is not."""
    monkeypatch.setitem(ARMS, "twin", Arm("", moments="cleared", norms="train"))
    assert torch.equal(trained("guide", "constant")[1], trained("twin", "constant")[1])
    assert not torch.equal(trained("guide", "cosine")[1], trained("twin", "cosine")[1])


def test_arms_agree_until_the_first_block_joins() -> None:
    """Same weights, images and order: what is measured before the first transition is equal, what comes after is not."""
    frozen, kept = trained("frozen", "cosine")[0], trained("kept", "cosine")[0]
    assert [frozen["validation"][epoch] for epoch in "01"] == [kept["validation"][epoch] for epoch in "01"]
    assert frozen["test"]["1"] == kept["test"]["1"]
    assert frozen["loss_profile"] != kept["loss_profile"]


def test_a_cut_off_table_is_balanced() -> None:
    """Cells come seed by seed within a kind of run, each once, and eight seeds of every arm are planned."""
    choices = dict(unfreezing.QUICK_CHOICES)
    runs = unfreezing.table_runs(list(unfreezing_arms.SHORT_ARMS), 8, choices, quick=False)
    assert len({studying.key(run) for run in runs}) == len(runs) == 8 * 2 * (13 + 6)
    assert [run.seed for run in runs[: 4 * 13]] == [seed for seed in range(4) for _ in range(13)]


def test_a_quick_run_writes_its_tables_and_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables, JSON and plot are there; a second call, with the published cells alone, trains nothing."""
    monkeypatch.setattr(unfreezing, "QUICK", TINY)
    arguments = ["--quick", "--arms", "frozen", "kept", "--processes", "0", "--output", str(tmp_path)]
    unfreezing.main([*arguments, "--cells", str(tmp_path / "cells")])
    text = (tmp_path / "unfreezing.md").read_text()
    assert "| schedule, moments kept (this library) |" in text
    assert "20 steps, cosine, 2 seeds" in text
    assert (tmp_path / "unfreezing.png").stat().st_size > 10_000
    result = json.loads((tmp_path / "unfreezing.json").read_text())
    assert len(result["cells"]) == 4
    assert {len(cell["commit"]) for cell in result["cells"]} == {40}
    monkeypatch.setattr(unfreezing, "train", lambda *_: pytest.fail("trained again"))
    unfreezing.main([*arguments, "--cells", str(tmp_path / "other")])
    assert json.loads((tmp_path / "unfreezing.json").read_text()) == result


def test_a_run_without_time_says_so(tmp_path: Path) -> None:
    """Nothing is begun after the given time, and nothing is written in place of a table."""
    with pytest.raises(SystemExit, match="too little time for the choice of learning rates"):
        unfreezing.main(["--until", "00:00", "--cells", str(tmp_path), "--output", str(tmp_path), "--processes", "0"])
    assert not list(tmp_path.glob("*.md"))
