"""What a transition costs: re-creating AdamW, a bare `add_param_group`, `OptimizerRebuilder.sync` and `apply`.

    python benchmarks/transition.py [--quick] [--output FOLDER]

Each arm lets the same parameters join an AdamW that has a state for half of them, with a cosine scheduler attached. The
arms' groups are asserted equal before anything is timed; of the bare `add_param_group` and of re-creating only the
groups are right: the first leaves the scheduler behind, the second also forgets every moment.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unfreeze_sched import Block, MilestonePreset, OptimizerRebuilder, ProgressiveUnfreezer, UnfreezeSchedule
from unfreeze_sched.rebuilder import BLOCK_KEY

HERE = Path(__file__).parent
SCALE = 0.1
NO_OPS = 1_000


@dataclass
class Setting:
    """A head in the optimizer, with moments, and one frozen block of as many tensors that is to join."""

    head: list[nn.Parameter]
    block: Block
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler

    @classmethod
    def of(cls, tensors: int) -> Setting:
        """Half of the tensors in the head, half in the block."""
        head, body = ([nn.Parameter(torch.zeros(16)) for _ in range(tensors // 2)] for _ in range(2))
        optimizer = torch.optim.AdamW(head, lr=1e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        for parameter in head:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        return cls(head, Block("body", (nn.ParameterList(body),)), optimizer, scheduler)

    def unfreezer(self) -> ProgressiveUnfreezer:
        """At epoch 0, the block frozen; epoch 1 lets it join."""
        schedule = UnfreezeSchedule(preset=MilestonePreset(milestones={1: 1}), total_blocks=1, total_epochs=2)
        unfreezer = ProgressiveUnfreezer([self.block], self.optimizer, schedule, [self.scheduler], SCALE)
        unfreezer.apply(0)
        return unfreezer


def recreate(setting: Setting) -> Callable[[], torch.optim.Optimizer]:
    """The common recipe: a new AdamW over everything that trains."""
    lr = setting.optimizer.param_groups[0]["lr"]

    def transition() -> torch.optim.Optimizer:
        body = list(setting.block.parameters())
        return torch.optim.AdamW([{"params": setting.head, "lr": lr}, {"params": body, "lr": lr * SCALE}])

    return transition


def add_group(setting: Setting) -> Callable[[], torch.optim.Optimizer]:
    """The floor: torch's own method, at the right learning rate, with no eye on the scheduler."""
    body, lr = list(setting.block.parameters()), setting.optimizer.param_groups[0]["lr"]

    def transition() -> torch.optim.Optimizer:
        setting.optimizer.add_param_group({"params": body, "lr": lr * SCALE})
        return setting.optimizer

    return transition


def sync(setting: Setting) -> Callable[[], torch.optim.Optimizer]:
    """A full diff; the flags are set already."""
    rebuilder = OptimizerRebuilder(setting.optimizer, [setting.block], [setting.scheduler], SCALE)

    def transition() -> torch.optim.Optimizer:
        rebuilder.sync()
        return setting.optimizer

    return transition


def apply(setting: Setting) -> Callable[[], torch.optim.Optimizer]:
    """Schedule, flags and norm modes, and the diff of the blocks that changed."""
    unfreezer = setting.unfreezer()

    def transition() -> torch.optim.Optimizer:
        unfreezer.apply(1)
        return setting.optimizer

    return transition


def no_op(setting: Setting) -> Callable[[], torch.optim.Optimizer]:
    """`apply` where nothing changes, as in most epochs; too short to be timed singly."""
    unfreezer = setting.unfreezer()
    unfreezer.apply(1)

    def transition() -> torch.optim.Optimizer:
        for _ in range(NO_OPS):
            unfreezer.apply(1)
        return setting.optimizer

    return transition


ARMS = {
    "add_param_group, the floor": add_group,
    "apply": apply,
    "sync": sync,
    "re-creating AdamW": recreate,
    "apply, nothing to do": no_op,
}


def groups_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    """What arms must agree on: sizes and hyperparameters by group, the library's tag and the scheduler's key aside."""
    left_out = {"params", BLOCK_KEY, "initial_lr"}
    return [
        (len(group["params"]), {key: value for key, value in group.items() if key not in left_out})
        for group in optimizer.param_groups
    ]


def measure(make: Callable[[Setting], Callable[[], torch.optim.Optimizer]], tensors: int, repeats: int) -> list[float]:
    """Seconds of single transitions, each in a setting of its own."""
    seconds = []
    for _ in range(repeats):
        transition = make(Setting.of(tensors))
        begin = time.perf_counter()
        transition()
        seconds.append(time.perf_counter() - begin)
    return seconds


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder for transition.json and .md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes, repeats = ((200, 2_000), 5) if args.quick else ((200, 2_000, 20_000), 15)

    for tensors in sizes[:2]:
        found = [groups_of(make(Setting.of(tensors))()) for make in ARMS.values()]
        assert all(groups == found[0] for groups in found), "arms differ"

    rows = []
    for tensors in sizes:
        floor = 0.0
        for name, make in ARMS.items():
            seconds = [one / (NO_OPS if make is no_op else 1) for one in measure(make, tensors, repeats)]
            low, median, high = statistics.quantiles(seconds, n=4)
            floor = floor or median
            rows.append(
                {
                    "tensors": tensors,
                    "arm": name,
                    "median_ms": 1e3 * median,
                    "iqr_ms": 1e3 * (high - low),
                    "ratio": median / floor,
                }
            )
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "unfreeze-sched": version("unfreeze-sched"),
        "threads": torch.get_num_threads(),
        "repeats": repeats,
    }
    lines = ["| tensors | arm | median, ms | IQR, ms | over the floor |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {r['tensors']:,} | {r['arm']} | {r['median_ms']:.4f} | {r['iqr_ms']:.4f} | {r['ratio']:.3f} |" for r in rows
    ]
    text = "\n".join([*lines, "", ", ".join(f"{name} {value}" for name, value in versions.items()), ""])
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "transition.json").write_text(json.dumps({"versions": versions, "rows": rows}, indent=2) + "\n")
    (args.output / "transition.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
