"""What the studies share: two ways to unfreeze, cells that are kept and resumed, and their command line."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
from torch import nn

import unfreeze_sched
from unfreeze_sched import Block, ProgressiveUnfreezer, UnfreezeSchedule
from unfreeze_sched.model.freezing import Norms, freeze, unfreeze

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Way:
    """How blocks join the optimizer.

    Attributes:
        text: For the table.
        moments: What becomes of AdamW's state at a transition; "recreated" makes a new AdamW and carries the LR
            schedule over, "printed" is the guide's loop, whose LR scheduler stays with the first optimizer.
        norms: As for `ProgressiveUnfreezer`.
        warmup: Steps.
        layer_decay: As for `ProgressiveUnfreezer`.
        beta2: AdamW's.
    """

    text: str
    moments: Literal["kept", "cleared", "recreated", "printed"] = "kept"
    norms: Norms = "eval"
    warmup: int = 0
    layer_decay: float = 1.0
    beta2: float = 0.999


class InPlace:
    """This library: groups join the live optimizer."""

    def __init__(
        self,
        way: Way,
        head: Iterable[nn.Parameter],
        blocks: Sequence[Block],
        schedule: UnfreezeSchedule,
        factor: Callable[[int], float],
        lr: float,
        scale: float,
    ) -> None:
        self.optimizer = _adamw([{"params": list(head), "lr": lr}], way)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self._clears = way.moments == "cleared"
        with warnings.catch_warnings():
            # One learning rate is what some arms are about.
            warnings.filterwarnings("ignore", "`learning_rate_scale` should be below 1")
            self._unfreezer = ProgressiveUnfreezer(
                blocks,
                self.optimizer,
                schedule,
                [self.scheduler],
                learning_rate_scale=scale,
                layer_decay=way.layer_decay,
                warmup_steps=way.warmup,
                norms=way.norms,
            )

    def begin(self, epoch: int) -> None:
        """Before an epoch, or a step where the schedule counts those."""
        if self._unfreezer.apply(epoch) and self._clears:
            self.optimizer.state.clear()


class Recreated:
    """A new AdamW at each transition, as in the guide's loop."""

    def __init__(
        self,
        way: Way,
        head: Iterable[nn.Parameter],
        blocks: Sequence[Block],
        schedule: UnfreezeSchedule,
        factor: Callable[[int], float],
        lr: float,
        scale: float,
    ) -> None:
        self._way, self._blocks, self._schedule, self._factor = way, blocks, schedule, factor
        self._head, self._lr, self._scale = list(head), lr, scale
        self._set(0)
        self.optimizer = _adamw([{"params": self._head, "lr": lr}], way)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def begin(self, epoch: int) -> None:
        """Likewise."""
        number = self._schedule[epoch]
        if not (epoch > 0 and number != self._schedule[epoch - 1]):
            return
        self._set(number)
        encoder = [parameter for block in self._blocks[::-1][:number] for parameter in block.parameters()]
        low = self._lr * self._scale
        groups = [
            {"params": self._head, "lr": self._lr, "initial_lr": self._lr},
            {"params": encoder, "lr": low, "initial_lr": low},
        ]
        self.optimizer = _adamw(groups, self._way)
        if self._way.moments == "recreated":  # in the guide's loop the scheduler goes on driving the first optimizer
            self.scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer, self._factor, self.scheduler.last_epoch - 1
            )

    def _set(self, number: int) -> None:
        for depth, block in enumerate(self._blocks[::-1]):
            if self._way.norms == "train":
                for parameter in block.parameters():
                    parameter.requires_grad_(depth < number)
            else:
                (unfreeze if depth < number else freeze)(block)


def driver_of(way: Way) -> type[InPlace | Recreated]:
    return Recreated if way.moments in ("recreated", "printed") else InPlace


def _adamw(groups: list[dict[str, Any]], way: Way) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, betas=(0.9, way.beta2), fused=True)


Cell = dict[str, Any]
Run = Any
"""What tells a cell from the others: a frozen dataclass of each study's own, with at least `arm` and `seed`."""
Train = Callable[[Run, Any], tuple[Cell, nn.Module]]


def key(run: Run) -> str:
    """A file name that says all of a run, or of its fields in a dict."""
    values = (run if isinstance(run, dict) else asdict(run)).values()
    return "-".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


class Cells:
    """Finished cells: one file each, written atomically, and those that were published.

    Args:
        train: Trains a cell; gets its run and the setting, and gives what is kept of it.
        setting: What is the same for all cells; those of another are passed over.
        folder: Of the files.
        published: The JSON of an earlier call.
        until: Time after which no cell is begun.
        processes: At once; 0 is this process.
    """

    def __init__(self, train: Train, setting: Any, folder: Path, published: Path, until: float, processes: int) -> None:
        self._train, self._setting, self._folder, self._until, self._processes = (
            train,
            setting,
            folder,
            until,
            processes,
        )
        folder.mkdir(parents=True, exist_ok=True)
        earlier = json.loads(published.read_text()) if published.exists() else {"tuning": [], "cells": []}
        kept = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
        self.found: dict[str, Cell] = {
            key(cell["run"]): cell
            for cell in [*earlier["tuning"], *earlier["cells"], *kept]
            if cell["setting"] == asdict(setting)
        }

    def of(self, runs: Iterable[Run]) -> list[Cell]:
        """The finished ones of these."""
        return [self.found[key(run)] for run in runs if key(run) in self.found]

    def compute(self, runs: Iterable[Run], score: Callable[[Cell], float]) -> bool:
        """Train those that are not there yet, in order, and print a line each; False where time ran out."""
        complete = True
        for cell in self._computed([run for run in runs if key(run) not in self.found]):
            if cell is None:
                complete = False
                continue
            name = key(cell["run"])
            self.found[name] = cell
            partial = self._folder / f"{name}.partial"
            partial.write_text(json.dumps(cell))
            partial.replace(self._folder / f"{name}.json")
            print(
                f"{time.strftime('%H:%M:%S')} {name}: {score(cell):.1f} %, {cell['wall_seconds']:.0f} s",
                flush=True,
            )
        return complete

    def _computed(self, runs: list[Run]) -> Iterator[Cell | None]:
        rest = self._train, self._setting, self._until
        if self._processes == 0:
            yield from (_compute(run, *rest) for run in runs)
        elif runs:
            with ProcessPoolExecutor(self._processes, mp_context=get_context("spawn")) as pool:
                yield from pool.map(_compute, runs, *([one] * len(runs) for one in rest))

    def choose(
        self, choices: dict[str, Any], tables: Mapping[str, Mapping[float, list[Run]]], score: Callable[[Cell], float]
    ) -> None:
        """Add to the choices the candidates with the highest mean scores, and what they were read off.

        Args:
            choices: By name, and in "tables" the mean score by candidate.
            tables: Runs by name of the choice and candidate.
            score: Of a cell, in percent.
        """
        # All of them first, so that no process waits between the choices.
        if not self.compute([run for table in tables.values() for some in table.values() for run in some], score):
            raise SystemExit("too little time for the choice of learning rates; start again with a later --until")
        for name, table in tables.items():
            scores = {value: mean(score(cell) for cell in self.of(runs)) / 100 for value, runs in table.items()}
            choices[name] = max(scores, key=scores.__getitem__)
            choices.setdefault("tables", {})[name] = {f"{value:g}": round(one, 4) for value, one in scores.items()}


def _compute(run: Run, train: Train, setting: Any, until: float) -> Cell | None:
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


def commit() -> str:
    """Of the tree that the library was imported from."""
    folder = Path(unfreeze_sched.__file__).parent
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)  # noqa: S607
    return found.stdout.strip() or "unknown"


def arguments(doc: str | None, name: str) -> argparse.ArgumentParser:
    """The command line of a study."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two seeds of a tiny subset, to see that it runs")
    parser.add_argument("--seeds", type=int, default=None, help="number of seeds (default 8; quick 2)")
    parser.add_argument("--until", default=None, metavar="HH:MM", help="begin no cell after this local time of today")
    parser.add_argument("--processes", type=int, default=2, help="at once, one thread each; 0 is this process")
    parser.add_argument("--cells", type=Path, default=Path("runs") / name, help="folder of the finished cells")
    parser.add_argument(
        "--output", type=Path, default=None, help="folder for the tables (default: results; quick: that of the cells)"
    )
    parser.add_argument("--render", action="store_true", help="train nothing, write the tables of what is there")
    return parser


def begun(args: argparse.Namespace, name: str, train: Train, setting: Any) -> Cells:
    """What is there already, with `seeds` and `output` of the arguments settled."""
    today = time.strftime("%Y-%m-%d ")
    until = time.mktime(time.strptime(today + args.until, "%Y-%m-%d %H:%M")) if args.until else float("inf")
    args.seeds = args.seeds or (2 if args.quick else 8)
    # A look must not overwrite the published cells.
    args.output = args.output or (args.cells / "tables" if args.quick else RESULTS)
    folder = args.cells / ("quick" if args.quick else "full")
    return Cells(train, setting, folder, args.output / f"{name}.json", 0.0 if args.render else until, args.processes)


def versions(processes: int, *packages: str) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", *packages, "unfreeze-sched")},
        "cores": os.cpu_count(),
        "processes": processes,
        "threads a process": 1,
    }


def write_json(result: Mapping[str, Any], path: Path) -> None:
    """Write the result, one cell a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [
        json.dumps({key: value for key, value in result.items() if key not in ("tuning", "cells")}, indent=1)[1:-2]
    ]
    for name in ("tuning", "cells"):
        lines = ",\n".join(json.dumps(cell) for cell in result[name])
        parts.append(f'\n "{name}": [\n{lines}\n ]')
    path.write_text("{" + ",".join(parts) + "\n}\n")
