"""What unfreezing buys on real text: a sentence encoder, movie snippets, and three shifted test sets, paired by seed.

    python benchmarks/study/text.py [--quick] [--data FOLDER] [--device NAME] [--seeds 8] [--timed 4] [--until HH:MM] [--processes 2] [--cells FOLDER] [--output FOLDER]

Learning rates are chosen first, on sentences that no table tests on and seeds that none uses. Then each cell (arm, size,
seed) is trained once and kept in a file of its own; a run that is started again skips what is there or in the published
`text.json`, so a cut-off run is a smaller, balanced table. CPU seconds are of the smallest size; beside `--device cuda`
its first seeds are trained on the CPU for them too. Needs scipy and the extras `plot` and `transformers`.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "speed"))

import text_report  # noqa: E402  # its tables are made by the timing scripts' own function
from studying import Cells, arguments, begun, versions  # noqa: E402  # likewise
from text_arms import ARMS, Run, Setting, fetch, train  # noqa: E402  # likewise

LRS = (3e-3, 1e-2, 3e-2)  # of the head
RATES = (5e-5, 1.5e-4, 5e-4)  # of the encoder, and of full fine-tuning at one rate
TUNING_SEEDS = (1000, 1001)
TUNING = (640, 4)  # a size between those of the tables, and its epochs
SIZES = {320: 6, 1280: 3, 5000: 2}  # training sentences, and epochs
QUICK = Setting(batch=8, chunk=16, validation=40, test=40, shifted=20)
QUICK_SIZES = {64: 2}
QUICK_CHOICES = {"head": 1e-2} | {arm.tuned: 1.5e-4 for arm in ARMS.values() if arm.tuned}


def tuning(cells: Cells, device: str = "cpu") -> dict[str, Any]:
    """Choose rates and scales by the mean accuracy on the validation part at the end."""

    def runs(arm: str, rates: dict[str, float]) -> list[Run]:
        return [replace(of_arm(arm, *TUNING, seed, rates, device), tests=False) for seed in TUNING_SEEDS]

    choices: dict[str, Any] = {}
    cells.choose(choices, {"head": {lr: runs("frozen", {"head": lr}) for lr in LRS}}, text_report.validation)
    tuned = {arm.tuned: None for arm in ARMS.values() if arm.tuned}
    rates = {name: {rate: runs(name, choices | {name: rate}) for rate in RATES} for name in tuned}
    cells.choose(choices, rates, text_report.validation)
    return choices


def of_arm(arm: str, size: int, epochs: int, seed: int, choices: dict[str, Any], device: str = "cpu") -> Run:
    """A cell at the chosen rates."""
    tuned = ARMS[arm].tuned
    lr = choices["full" if arm == "full" else "head"]
    return Run(arm, size, epochs, lr, choices[tuned] / lr if tuned else 1.0, seed, device)


def table_runs(sizes: dict[int, int], seeds: int, choices: dict[str, Any], device: str = "cpu") -> list[Run]:
    """All cells, seed by seed, so that a cut-off run has every arm of a size with the same seeds."""
    return [
        of_arm(arm, size, epochs, seed, choices, device)
        for seed in range(seeds)
        for size, epochs in sizes.items()
        for arm in ARMS
    ]


def main(argv: list[str] | None = None) -> None:
    """Choose, train what is missing, and write the tables."""
    parser = arguments(__doc__, "text")
    data = Path("runs/text/data")
    parser.add_argument("--data", type=Path, default=data, help="of the two archives; what is missing is downloaded")
    parser.add_argument("--device", default="cpu", help="that trains and tests (default cpu)")
    parser.add_argument("--timed", type=int, default=4, help="seeds whose CPU seconds are measured (default 4)")
    args = parser.parse_args(argv)
    fetch(args.data)
    setting, sizes = (QUICK, QUICK_SIZES) if args.quick else (Setting(), SIZES)
    cells = begun(args, "text", partial(train, folder=args.data.resolve()), setting)
    choices = dict(QUICK_CHOICES) if args.quick else tuning(cells, args.device)
    runs = table_runs(sizes, args.seeds, choices, args.device)
    timed = [
        replace(run, device="cpu", tests=False)
        for run in runs
        if run.seed < args.timed and run.size == min(sizes) and args.device != "cpu"
    ]
    cells.compute(runs, text_report.movies)
    cells.compute(timed, text_report.validation)
    result = {
        "versions": versions(args.processes, "transformers"),
        "setting": asdict(setting),
        "choices": choices,
        "sizes": sizes,
        "planned_seeds": args.seeds,
        "tuning": [cell for cell in cells.found.values() if cell["run"]["seed"] in TUNING_SEEDS],
        "cells": cells.of([*runs, *timed]),
    }
    text_report.write(result, args.output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
