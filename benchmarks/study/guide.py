"""The guide's own run: the README's first command with eight seeds, beside what the guide expects.

    python benchmarks/study/guide.py [--seeds 8] [--runs FOLDER] [--output FOLDER] [--render] [-- OPTION ...]

Each seed is a run of the command, with a folder of its own; one that was cut off goes on. Options after `--` are the
command's own, for a look. Needs scipy and the extra `demo`.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "speed"))

from measuring import as_markdown  # noqa: E402  # the timing scripts' own table
from pairing import interval, paired  # noqa: E402  # likewise
from studying import RESULTS, commit, versions, write_json  # noqa: E402  # likewise
from unfreezing_report import GUIDE  # noqa: E402  # likewise

README = HERE.parents[1] / "README.md"
ARMS = ("student", "frozen")
PHASES = {"0 blocks": 0, "1-2": 2, "3-4": 4, "5-6": 6, "7": 7}  # the most blocks of each of the guide's phases


def command() -> list[str]:
    """The words after `unfreeze-sched` of the README's first command."""
    found = re.search(r"unfreeze-sched (distill .*--compare-frozen)$", README.read_text(), re.MULTILINE)
    assert found
    return shlex.split(found[1])


def run(seed: int, folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """The run of a seed, made or gone on with where it is not whole."""
    if not (folder / "result.json").exists():
        begun = (folder / "arguments.json").exists()
        words = (
            ["distill", "--resume", str(folder)]
            if begun
            else [*command(), *options, "--seed", str(seed), "--output", str(folder)]
        )
        subprocess.run([sys.executable, "-m", "unfreeze_sched", *words], check=True)  # noqa: S603  # this project's own
        (folder / "commit").write_text(commit())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "seed": seed,
        "commit": (folder / "commit").read_text(),
        "test": {arm: one["test_miou"] for arm, one in json.loads((folder / "result.json").read_text()).items()},
        "epochs": [
            {key: record[key] for key in ("arm", "epoch", "blocks", "train_loss", "validation_loss", "validation_miou")}
            for record in records
        ],
    }


def ends(cell: dict[str, Any], arm: str) -> list[float]:
    """Validation mIoU, in percent, at the end of each phase of the student, of one arm."""
    epochs = {name: [one for one in cell["epochs"] if one["arm"] == name] for name in ARMS}
    finals = [max(one["epoch"] for one in epochs["student"] if one["blocks"] <= most) for most in PHASES.values()]
    return [100 * next(one["validation_miou"] for one in epochs[arm] if one["epoch"] == epoch) for epoch in finals]


def phase_table(cells: Sequence[dict[str, Any]]) -> str:
    """The gain in each phase beside the expected one; of the frozen arm, over the same epochs."""
    names = list(PHASES)[1:]
    rows: list[dict[str, object]] = [{"arm": "the guide expects", **GUIDE}]
    for arm in ARMS:
        by_seed = [ends(cell, arm) for cell in cells]
        row: dict[str, object] = {"arm": arm, "0 blocks": f"(at {interval([one[0] for one in by_seed])})"}
        for place, name in enumerate(names, start=1):
            row[name] = interval([one[place] - one[place - 1] for one in by_seed]).signed
        rows.append(row | {"in all": interval([one[-1] - one[0] for one in by_seed]).signed})
    return as_markdown(rows)


def seed_table(cells: Sequence[dict[str, Any]]) -> str:
    """Test mIoU by seed, and the paired difference."""
    test = {arm: [100 * cell["test"][arm] for cell in cells] for arm in ARMS}
    rows: list[dict[str, object]] = [
        {
            "seed": cell["seed"],
            **{arm: f"{values[place]:.1f}" for arm, values in test.items()},
            "student - frozen": f"{test['student'][place] - test['frozen'][place]:+.1f}",
        }
        for place, cell in enumerate(cells)
    ]
    means = {arm: interval(values) for arm, values in test.items()}
    return as_markdown([*rows, {"seed": "mean", **means, "student - frozen": paired(*test.values()).signed}])


def last(cell: dict[str, Any], arm: str) -> dict[str, Any]:
    """The record of an arm's last epoch."""
    return next(one for one in reversed(cell["epochs"]) if one["arm"] == arm)


def fit_table(cells: Sequence[dict[str, Any]]) -> str:
    """Losses and validation mIoU at the end of each arm, the teacher's too."""
    rows = []
    for arm in ("teacher", *ARMS):
        records = [last(cell, arm) for cell in cells]
        row: dict[str, object] = {"arm": arm}
        for key, name, scale, digits in (
            ("train_loss", "training loss", 1, 3),
            ("validation_loss", "validation loss", 1, 3),
            ("validation_miou", "validation mIoU, %", 100, 1),
        ):
            one = interval([scale * record[key] for record in records])
            row[name] = f"{one.mean:.{digits}f} ± {one.half:.{digits}f}"
        rows.append(row)
    return as_markdown(rows)


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--runs", type=Path, default=Path("runs/guide"), help="folder of the runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the tables")
    parser.add_argument("--render", action="store_true", help="run nothing, write the tables of what is there")
    parser.add_argument("options", nargs="*", help="of the command, after --")
    args = parser.parse_args(argv)
    cells = [
        run(seed, args.runs / f"seed-{seed}", args.options)
        for seed in range(args.seeds)
        if not args.render or (args.runs / f"seed-{seed}" / "result.json").exists()
    ]
    used = versions(1, "segmentation-models-pytorch", "timm")
    result = {"versions": used, "command": shlex.join([*command(), *args.options]), "tuning": [], "cells": cells}
    write_json(result, args.output / "guide.json")
    text = TEXT.format(
        command=result["command"],
        seeds=len(cells),
        versions=", ".join(f"{name} {value}" for name, value in used.items()),
        commits=", ".join(sorted({cell["commit"][:12] for cell in cells})),
        phases=phase_table(cells),
        by_seed=seed_table(cells),
        fit=fit_table(cells),
        room=paired(
            *([last(cell, arm)["validation_miou"] * 100 for cell in cells] for arm in ("teacher", "frozen"))
        ).signed,
    )
    (args.output / "guide.md").write_text(text)
    print(text)


TEXT = """# The guide's own run

`python benchmarks/study/guide.py`, written by the script: the README's first command with {seeds} seeds,

`unfreeze-sched {command} --seed N`

Each run trains a teacher, then the student with its encoder unfreezing one block an epoch, then the same student with the
encoder frozen, on the same batches. Means with 95 % intervals (Student's t over seeds, ± half the width).

{versions}; library at {commits}.

## By phase, beside what the guide expects

Validation mIoU, gains in points; the guide that the library's presets are from expects the first line, in all over the
frozen baseline. Its five phases are read as these numbers of blocks. The frozen arm has the same epochs.

{phases}

## Test part, mIoU in percent

{by_seed}

## What limits the sample

{fit}

The larger teacher, every layer trained from the start, is {room} points of validation mIoU above the frozen student: there
is about as much to be gained, and training losses so far below the validation losses say that the few images limit it.
"""


if __name__ == "__main__":
    main()
