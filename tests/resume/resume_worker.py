"""Trains small runs of many kinds, in a process of its own: `test_resume_process.py` starts it twice.

    python resume_worker.py write all DIR     trains each run in one go, and leaves a checkpoint for each epoch boundary
    python resume_worker.py verify all DIR    resumes each run at each boundary; what differs goes to DIR/report.json

With `some` instead of `all`, a part of the runs.
"""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import schedulefree
import torch
from bits import differences
from torch import Tensor, nn
from torch.optim import lr_scheduler

from unfreeze_sched import Block, MilestonePreset, ProgressiveUnfreezer, RatePreset, UnfreezeSchedule

EPOCHS, STEPS, LR = 6, 2, 0.01
DOWN = MilestonePreset(milestones={1: 1, 2: 3, 3: 1, 4: 2}, learning_rate_scale=0.5)
UP = RatePreset(unfreeze_start_epoch=1, unfreeze_rate=2, learning_rate_scale=0.5)

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "SGD": functools.partial(torch.optim.SGD, momentum=0.9, weight_decay=0.01),
    "Adafactor": torch.optim.Adafactor,
    "ScheduleFree": functools.partial(schedulefree.AdamWScheduleFree, warmup_steps=3),
}
CYCLES_MOMENTUM = {"AdamW", "SGD"}  # Adafactor has none to cycle, and schedule-free averages by it


def one_cycle(optimizer: torch.optim.Optimizer, name: str) -> Any:
    return lr_scheduler.OneCycleLR(
        optimizer, max_lr=LR, total_steps=EPOCHS * STEPS, cycle_momentum=name in CYCLES_MOMENTUM
    )


def sequential(optimizer: torch.optim.Optimizer, _: str) -> Any:
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(optimizer, 9)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer, str], Any] | None] = {
    "OneCycle": one_cycle,
    "cosine": lambda optimizer, _: lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * STEPS),
    "plateau": lambda optimizer, _: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5),
    "sequential": sequential,
    "no scheduler": None,
}
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "late": (UP, {}),
    "declared": (UP, {"membership": "declared"}),
    "refreezing, keep": (DOWN, {"on_refreeze": "keep"}),
    "refreezing, drop": (DOWN, {"on_refreeze": "drop"}),
    "refreezing, declared, drop": (DOWN, {"on_refreeze": "drop", "membership": "declared"}),
    "warm-up": (UP, {"warmup_steps": 3}),
    "warm-up, refreezing, drop": (DOWN, {"warmup_steps": 3, "on_refreeze": "drop"}),
}


PAIRS = [pair for pair in product(OPTIMIZERS, SCHEDULERS) if pair[1] != "no scheduler" or pair[0] == "ScheduleFree"]
RUNS = {"all": {" / ".join((*pair, variant)): (*pair, variant) for pair in PAIRS for variant in VARIANTS}}
# Every pair of optimizer and scheduler, with two variants in turn, so that every optimizer meets every variant.
RUNS["some"] = {
    name: kinds
    for name, kinds in RUNS["all"].items()
    if (list(VARIANTS).index(kinds[2]) - 2 * PAIRS.index((kinds[0], kinds[1]))) % len(VARIANTS) in {0, 1}
}


class Net(nn.Module):
    """Convolutions with batch norms, and a head with dropout, so that buffers and random numbers count."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(3)
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(12, 2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        output: Tensor = self.head(x)
        return output


@dataclass
class Run:
    """A model under training with all that belongs to it."""

    model: Net
    optimizer: Any
    schedulers: list[Any]
    unfreezer: ProgressiveUnfreezer
    rates: list[list[float]] = field(default_factory=list)

    @classmethod
    def begin(cls, optimizer_name: str, scheduler_name: str, variant: str, seed: int) -> Run:
        torch.manual_seed(seed)
        model = Net()
        optimizer = OPTIMIZERS[optimizer_name](model.head.parameters(), lr=LR)
        make = SCHEDULERS[scheduler_name]
        schedulers = [] if make is None else [make(optimizer, optimizer_name)]
        preset, keywords = VARIANTS[variant]
        blocks = [Block(f"block{i}", (module,), (f"blocks.{i}",)) for i, module in enumerate(model.blocks)]
        schedule = UnfreezeSchedule(preset=preset, total_blocks=3, total_epochs=EPOCHS)
        return cls(
            model, optimizer, schedulers, ProgressiveUnfreezer(blocks, optimizer, schedule, schedulers, **keywords)
        )

    def train_epoch(self, epoch: int) -> None:
        self.unfreezer.apply(epoch)
        self.model.train()
        getattr(self.optimizer, "train", int)()
        for step in range(STEPS):
            data = torch.Generator().manual_seed(1000 * epoch + step)
            x, y = torch.randn(4, 3, 6, 6, generator=data), torch.randn(4, 2, generator=data)
            loss = (self.model(x) - y).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            for scheduler in self.schedulers:
                if not isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                    scheduler.step()
            self.rates.append([float(group["lr"]) for group in self.optimizer.param_groups])
        self.model.eval()
        getattr(self.optimizer, "eval", int)()
        for scheduler in self.schedulers:
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                scheduler.step(loss.detach())

    def state(self) -> dict[str, Any]:
        """What a user saves."""
        return {
            "unfreezer": self.unfreezer.state_dict(),
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }

    def load(self, state: dict[str, Any], skip: str = "") -> None:
        """Load it in the documented order, but for one part where a mutation asks for it."""
        if skip != "unfreezer":
            self.unfreezer.load_state_dict(state["unfreezer"])
        if skip != "schedulers":
            for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
                scheduler.load_state_dict(saved)
        if skip != "model":
            self.model.load_state_dict(state["model"])
        if skip != "optimizer":
            self.optimizer.load_state_dict(state["optimizer"])
        if skip != "random":
            torch.set_rng_state(state["random"])

    def outcome(self) -> dict[str, Any]:
        """All that an interruption must not change."""
        state = self.state()
        if isinstance(self.optimizer, (torch.optim.Adafactor, schedulefree.AdamWScheduleFree)):
            # They know no such key; after any load, torch gives it to the groups that are added from then on.
            for group in state["optimizer"]["param_groups"]:
                assert group.pop("differentiable", False) is False
        return {
            **state,
            "rates": self.rates,
            "trainable": {name: p.requires_grad for name, p in self.model.named_parameters()},
            "modes": {name: module.training for name, module in self.model.train().named_modules()},
        }


def file_of(name: str, moment: object) -> str:
    return f"{name.replace(' / ', '_')}_{moment}.pth"


def write(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        run = Run.begin(*RUNS["all"][name], seed=0)
        for epoch in range(EPOCHS):
            torch.save(run.state(), folder / file_of(name, epoch))
            run.train_epoch(epoch)
        torch.save(run.state(), folder / file_of(name, EPOCHS))
        torch.save(run.outcome(), folder / file_of(name, "end"))


def resumed(folder: Path, name: str, boundary: int, skip: str = "") -> list[str]:
    """What differs at the end of a run that was resumed at a boundary: paths, or an error."""
    whole = torch.load(folder / file_of(name, "end"), weights_only=True)
    try:
        run = Run.begin(*RUNS["all"][name], seed=7 + boundary)
        run.load(torch.load(folder / file_of(name, boundary), weights_only=True), skip)
        for epoch in range(boundary, EPOCHS):
            run.train_epoch(epoch)
    except Exception as error:  # noqa: BLE001  # the report carries it to the test
        return ["".join(traceback.format_exception(error)[-2:])]
    whole["rates"] = whole["rates"][STEPS * boundary :]
    return differences(run.outcome(), whole)


MUTATED = "AdamW / OneCycle / late"
PARTS = ("unfreezer", "schedulers", "model", "optimizer", "random")


def verify(folder: Path, names: Iterable[str]) -> None:
    boundaries = range(EPOCHS + 1)
    report = {
        "runs": {name: {at: resumed(folder, name, at) for at in boundaries} for name in names},
        "mutations": {part: {at: resumed(folder, MUTATED, at, skip=part) for at in boundaries} for part in PARTS},
    }
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"write": write, "verify": verify}[sys.argv[1]](Path(sys.argv[3]), RUNS[sys.argv[2]])
