"""What unfreezing buys: frozen, full and progressive fine-tuning, paired by seed.

    python benchmarks/study/unfreezing.py [--quick] [--seeds 8] [--until HH:MM] [--processes 2] [--cells FOLDER] [--output FOLDER]

Learning rates and scales are chosen first, on validation images of seeds that the table does not use. Then each cell
(arm, seed, LR schedule, length) is trained once and kept in a file of its own; a run that is started
again skips what is there or in the published `unfreezing.json`, so a cut-off run is a smaller, balanced table.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "speed"))

import unfreezing_report  # noqa: E402  # its tables are made by the timing scripts' own function
from studying import Cells, arguments, begun, versions  # noqa: E402  # likewise
from unfreezing_arms import ARMS, LONG_ARMS, SHORT_ARMS, Run, Setting, long, short, train  # noqa: E402  # likewise
from unfreezing_statistics import final  # noqa: E402  # likewise

LRS = (1e-3, 3e-3, 1e-2)
SCALES = (0.1, 0.3)  # of the guide's presets for medium and large data
TUNING_SEEDS = (1000, 1001)
SEEDS_AT_ONCE = 4
QUICK = Setting(image_size=32, epoch_images=24, test_images=24)
QUICK_CHOICES = {"lr": 1e-3, "full_lr": 1e-3, "scale": 0.3}

LRSchedule = Literal["constant", "cosine"]


def tuning(cells: Cells) -> dict[str, Any]:
    """Choose rates and scales by the mean validation mIoU at the end of short runs under cosine."""

    def runs(arm: str, lr: float, scale: float) -> list[Run]:
        return [short(arm, seed, "cosine", lr, scale) for seed in TUNING_SEEDS]

    choices: dict[str, Any] = {}
    cells.choose(choices, {"lr": {lr: runs("frozen", lr, 1.0) for lr in LRS}}, final("validation"))
    lr = choices["lr"]
    later = {
        "full_lr": {value: runs("full", value, 1.0) for value in LRS},
        # For both at once, so that the choice favours neither.
        "scale": {scale: runs("kept", lr, scale) + runs("cleared", lr, scale) for scale in SCALES},
    }
    cells.choose(choices, later, final("validation"))
    return choices


def of_arm(arm: str, seed: int, lr_schedule: LRSchedule, choices: dict[str, Any], *, is_long: bool = False) -> Run:
    """A cell at the chosen rates."""
    one_rate = ARMS[arm].one_rate
    lr = choices["full_lr" if one_rate else "lr"]
    scale = 1.0 if one_rate or ARMS[arm].trains == "nothing" else choices["scale"]
    return (long if is_long else short)(arm, seed, lr_schedule, lr, scale)


def table_runs(arms: list[str], seeds: int, choices: dict[str, Any], *, quick: bool) -> list[Run]:
    """All cells: four seeds of one kind of run, of the next kind, and so on; within a kind seed by seed.

    So a cut-off run has the cheaper tables whole, and in each every arm with the same seeds. Last come long runs at a
    constant LR.
    """
    kinds: list[tuple[LRSchedule, bool]] = (
        [("cosine", False)] if quick else [("cosine", False), ("constant", False), ("cosine", True)]
    )
    blocks = [range(first, min(first + SEEDS_AT_ONCE, seeds)) for first in range(0, seeds, SEEDS_AT_ONCE)]
    order = [(block, *kind) for block in blocks for kind in kinds] + (
        [] if quick else [(range(seeds), "constant", True)]
    )
    return [
        of_arm(arm, seed, schedule, choices, is_long=is_long)
        for block, schedule, is_long in order
        for seed in block
        for arm in arms
        if not is_long or arm in LONG_ARMS
    ]


def main(argv: list[str] | None = None) -> None:
    """Choose, train what is missing, and write the tables."""
    parser = arguments(__doc__, "unfreezing")
    parser.add_argument("--arms", nargs="+", choices=SHORT_ARMS, default=list(SHORT_ARMS), help="only these")
    args = parser.parse_args(argv)
    arms = [arm for arm in SHORT_ARMS if arm in {"frozen", *args.arms}]  # the baseline of all tables
    setting = QUICK if args.quick else Setting()
    cells = begun(args, "unfreezing", train, setting)
    choices = dict(QUICK_CHOICES) if args.quick else tuning(cells)
    runs = table_runs(arms, args.seeds, choices, quick=args.quick)
    cells.compute(runs, final("test"))
    result = {
        "versions": versions(args.processes, "segmentation-models-pytorch", "timm"),
        "setting": asdict(setting),
        "choices": choices,
        "planned_seeds": args.seeds,
        "arms": arms,
        "tuning": [cell for cell in cells.found.values() if cell["run"]["seed"] in TUNING_SEEDS],
        "cells": cells.of(runs),
    }
    unfreezing_report.write(result, args.output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
