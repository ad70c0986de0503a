"""What unfreezing buys: frozen, full and progressive fine-tuning, paired by seed.

    python benchmarks/study/unfreezing.py [--quick] [--seeds 8] [--until HH:MM] [--processes 2] [--cells FOLDER] [--output FOLDER]

Learning rates and scales are chosen first, on validation images of seeds that the table does not use. Then each cell
(arm, seed, LR schedule, length) is trained once and kept in a file of its own; a run that is started
again skips what is there or in the published `unfreezing.json`, so a cut-off run is a smaller, balanced table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch

import unfreeze_sched

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "speed"))

import unfreezing_report  # noqa: E402  # its tables are made by the timing scripts' own function
from unfreezing_arms import ARMS, LONG_ARMS, SHORT_ARMS, Run, Setting, long, short, train  # noqa: E402  # likewise

LRS = (1e-3, 3e-3, 1e-2)
SCALES = (0.1, 0.3)  # of the guide's presets for medium and large data
TUNING_SEEDS = (1000, 1001)
SEEDS_AT_ONCE = 4
QUICK = Setting(image_size=32, epoch_images=24, test_images=24)
QUICK_CHOICES = {"lr": 1e-3, "full_lr": 1e-3, "scale": 0.3}

LRSchedule = Literal["constant", "cosine"]


class Cells:
    """Finished cells: one file each, written atomically, and those that were published."""

    def __init__(self, folder: Path, published: Path, setting: Setting) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._setting = asdict(setting)
        self.found: dict[str, dict[str, Any]] = {}
        earlier = json.loads(published.read_text()) if published.exists() else {"tuning": [], "cells": []}
        for cell in [
            *earlier["tuning"],
            *earlier["cells"],
            *(json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))),
        ]:
            if cell["setting"] == self._setting:
                self.found[key(Run(**cell["run"]))] = cell

    def add(self, cell: dict[str, Any]) -> None:
        """Keep a cell."""
        name = key(Run(**cell["run"]))
        self.found[name] = cell
        partial = self.folder / f"{name}.partial"
        partial.write_text(json.dumps(cell))
        partial.replace(self.folder / f"{name}.json")

    def of(self, runs: Iterable[Run]) -> list[dict[str, Any]]:
        """The finished ones of these."""
        return [self.found[key(run)] for run in runs if key(run) in self.found]


def key(run: Run) -> str:
    """A file name that says all of a run."""
    return f"{run.arm}-{run.lr_schedule}-{run.epochs}-{run.lr:g}-{run.scale:g}-{run.seed}"


def compute(run: Run, setting: Setting, until: float) -> dict[str, Any] | None:
    """Train a cell in this process, or None where it is too late to begin, or the main process was killed."""
    parent = parent_process()
    if time.time() > until or (parent is not None and not parent.is_alive()):
        return None
    begin = time.perf_counter()
    found, _ = train(run, setting)
    return {
        "run": asdict(run),
        "setting": asdict(setting),
        **found,
        "wall_seconds": round(time.perf_counter() - begin, 1),
        "commit": commit(),
    }


def compute_all(runs: Iterable[Run], cells: Cells, setting: Setting, until: float, processes: int) -> bool:
    """Train those cells that are not there yet, in order; False where time ran out."""
    left = [run for run in runs if key(run) not in cells.found]
    complete = True
    for cell in _computed(left, setting, until, processes):
        if cell is None:
            complete = False
        else:
            cells.add(cell)
            last = list(cell["test"].values())[-1]
            print(
                f"{time.strftime('%H:%M:%S')} {key(Run(**cell['run']))}: test mIoU {100 * last:.1f} %, "
                f"{cell['wall_seconds']:.0f} s",
                flush=True,
            )
    return complete


def _computed(runs: list[Run], setting: Setting, until: float, processes: int) -> Iterator[dict[str, Any] | None]:
    if processes == 0:
        yield from (compute(run, setting, until) for run in runs)
    elif runs:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            yield from pool.map(compute, runs, [setting] * len(runs), [until] * len(runs))


def tuning(cells: Cells, setting: Setting, until: float, processes: int) -> dict[str, Any] | None:
    """Choose rates and scales by the mean validation mIoU at the end of short runs under cosine.

    Returns:
        The choices with the tables they were read off, or None where time ran out.
    """

    def best(candidates: dict[float, list[Run]]) -> tuple[float, dict[str, float]] | None:
        if not compute_all([run for runs in candidates.values() for run in runs], cells, setting, until, processes):
            return None
        scores = {
            value: mean(list(cell["validation"].values())[-1] for cell in cells.of(runs))
            for value, runs in candidates.items()
        }
        return max(scores, key=scores.__getitem__), {f"{value:g}": round(score, 4) for value, score in scores.items()}

    def runs(arm: str, lr: float, scale: float) -> list[Run]:
        return [short(arm, seed, "cosine", lr, scale) for seed in TUNING_SEEDS]

    first = best({lr: runs("frozen", lr, 1.0) for lr in LRS})
    if first is None:
        return None
    lr = first[0]
    later = {
        "full_lr": {value: runs("full", value, 1.0) for value in LRS},
        # For both at once, so that the choice favours neither.
        "scale": {scale: runs("kept", lr, scale) + runs("cleared", lr, scale) for scale in SCALES},
    }
    # All of them first, so that no process waits between the choices.
    compute_all(
        [run for table in later.values() for some in table.values() for run in some], cells, setting, until, processes
    )
    choices: dict[str, Any] = {"lr": lr, "tables": {"lr": first[1]}}
    for name, table in later.items():
        found = best(table)
        if found is None:
            return None
        choices[name], choices["tables"][name] = found
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


def commit() -> str:
    """Of the tree that the library was imported from."""
    folder = Path(unfreeze_sched.__file__).parent
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)  # noqa: S607
    return found.stdout.strip() or "unknown"


def main(argv: list[str] | None = None) -> None:
    """Choose, train what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two seeds of a tiny subset, to see that it runs")
    parser.add_argument("--seeds", type=int, default=None, help="number of seeds (default 8; quick 2)")
    parser.add_argument("--arms", nargs="+", choices=SHORT_ARMS, default=list(SHORT_ARMS), help="only these")
    parser.add_argument("--until", default=None, metavar="HH:MM", help="begin no cell after this local time of today")
    parser.add_argument("--processes", type=int, default=2, help="at once, one thread each; 0 is this process")
    parser.add_argument("--cells", type=Path, default=Path("runs/unfreezing"), help="folder of the finished cells")
    parser.add_argument(
        "--output", type=Path, default=None, help="folder for the tables (default: results; quick: that of the cells)"
    )
    parser.add_argument("--render", action="store_true", help="train nothing, write the tables of what is there")
    args = parser.parse_args(argv)
    arms = [arm for arm in SHORT_ARMS if arm in {"frozen", *args.arms}]  # the baseline of all tables
    today = time.strftime("%Y-%m-%d ")
    until = time.mktime(time.strptime(today + args.until, "%Y-%m-%d %H:%M")) if args.until else float("inf")
    until = 0.0 if args.render else until
    setting = QUICK if args.quick else Setting()
    seeds = args.seeds or (2 if args.quick else 8)
    # A look must not overwrite the published cells.
    output = args.output or (args.cells / "tables" if args.quick else HERE.parent / "results")
    cells = Cells(args.cells / ("quick" if args.quick else "full"), output / "unfreezing.json", setting)
    choices = dict(QUICK_CHOICES) if args.quick else tuning(cells, setting, until, args.processes)
    if choices is None:
        raise SystemExit(
            "unfreezing: too little time for the choice of learning rates; start again with a later --until"
        )
    runs = table_runs(arms, seeds, choices, quick=args.quick)
    compute_all(runs, cells, setting, until, args.processes)
    result = {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "segmentation-models-pytorch", "timm", "unfreeze-sched")},
            "cores": os.cpu_count(),
            "processes": args.processes,
            "threads a process": 1,
        },
        "setting": asdict(setting),
        "choices": choices,
        "planned_seeds": seeds,
        "arms": arms,
        "tuning": [cell for cell in cells.found.values() if cell["run"]["seed"] in TUNING_SEEDS],
        "cells": cells.of(runs),
    }
    output.mkdir(parents=True, exist_ok=True)
    unfreezing_report.write(result, output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
