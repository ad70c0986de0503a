"""The guide's own run with several seeds: its command, what is read off a run's folder, and the tables."""

import json
from pathlib import Path

import guide
import pytest

from unfreeze_sched.cli import make_parser


def write_run(folder: Path, gain: float) -> None:
    """A folder as the command leaves it: seven blocks join one an epoch from epoch 1 on, each with the same gain."""
    folder.mkdir(parents=True)
    lines = [
        {"arm": arm, "epoch": epoch, "blocks": min(epoch, 7) * (arm == "student"), "train_loss": 0.5}
        | {"validation_loss": 0.6, "validation_miou": 0.4 + epoch * (gain if arm == "student" else 0.0), "seconds": 1.0}
        for arm in ("teacher", "student", "frozen")
        for epoch in range(9)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "result.json").write_text(
        json.dumps({"student": {"test_miou": 0.5 + gain}, "frozen": {"test_miou": 0.5}})
    )
    (folder / "commit").write_text("0123456789abcdef")


def test_the_command_is_the_readme_s() -> None:
    """Its words are those of the README's first command, which the command line takes with a seed and a folder."""
    args = make_parser().parse_args([*guide.command(), "--seed", "3", "--output", "there"])
    assert (args.unfreeze_start, args.compare_frozen, args.seed) == (1, True, 3)


def test_phases_end_before_further_blocks_join(tmp_path: Path) -> None:
    """Validation mIoU after the last epoch with 0, 2, 4, 6 and 7 blocks; the frozen arm's after the same epochs."""
    write_run(tmp_path / "one", 0.01)
    cell = guide.run(0, tmp_path / "one", [])
    assert guide.ends(cell, "student") == pytest.approx([40, 42, 44, 46, 48])
    assert guide.ends(cell, "frozen") == pytest.approx([40] * 5)


def test_tables_are_of_the_finished_runs(tmp_path: Path) -> None:
    """`--render` runs nothing: it shows the seeds that are there, paired, beside what the guide expects."""
    for seed, gain in ((0, 0.01), (2, 0.03)):
        write_run(tmp_path / "runs" / f"seed-{seed}", gain)
    guide.main(["--render", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path)])
    text = (tmp_path / "guide.md").read_text()
    assert "the README's first command with 2 seeds" in text
    assert "| the guide expects | 0 | +1 to +2 | +2 to +3 | +1 to +2 | 0 to +1 | +3 to +8 |" in text
    assert "| 2 | 53.0 | 50.0 | +3.0 |" in text
    assert "| mean | 52.0 ± 12.7 | 50.0 ± 0.0 | +2.0 ± 12.7 |" in text
    assert [cell["seed"] for cell in json.loads((tmp_path / "guide.json").read_text())["cells"]] == [0, 2]
