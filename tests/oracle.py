"""The run that late join promises to equal: every parameter in the optimizer from the start, frozen till its turn.

`twins` gives a library run and an oracle run of equal models; `train_in_lockstep` steps both on the same data and
compares them after every step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unfreeze_sched import Block, ProgressiveUnfreezer, UnfreezeSchedule

MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]
MakeSchedulers = Callable[[Optimizer], list[Any]]


class Net(nn.Module):
    """Some blocks with a norm each, and a head."""

    def __init__(self, blocks: int = 3, width: int = 4, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Tanh()) for _ in range(blocks)
        )
        self.head = nn.Linear(width, 2)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)

    def make_blocks(self) -> tuple[Block, ...]:
        return tuple(Block(f"block{i}", (module,), (f"blocks.{i}",)) for i, module in enumerate(self.blocks))


def no_schedulers(_: Optimizer) -> list[Any]:
    return []


@dataclass
class Run:
    """A model under training, with a function that brings it to an epoch."""

    model: Net
    optimizer: Optimizer
    schedulers: list[Any]
    apply: Callable[[int], object]
    rates: list[list[float]] = field(default_factory=list)

    def step(self, x: Tensor, y: Tensor) -> None:
        loss = (self.model(x) - y).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        for scheduler in self.schedulers:
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                scheduler.step(loss.detach())
            else:
                scheduler.step()


def twins(
    schedule: UnfreezeSchedule,
    make_optimizer: MakeOptimizer,
    make_schedulers: MakeSchedulers = no_schedulers,
    *,
    lr: float = 0.01,
    scale: float = 1.0,
    layer_decay: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
    **keywords: Any,
) -> tuple[Run, Run]:
    """A library run and its oracle, from equal weights."""
    torch.manual_seed(seed)
    model = Net(schedule.total_blocks, dtype=dtype).to(device)
    twin = copy.deepcopy(model)

    optimizer = make_optimizer([{"params": list(model.head.parameters()), "lr": lr}])
    schedulers = make_schedulers(optimizer)
    unfreezer = ProgressiveUnfreezer(
        model.make_blocks(),
        optimizer,
        schedule,
        lr_schedulers=schedulers,
        learning_rate_scale=scale,
        layer_decay=layer_decay,
        **keywords,
    )

    deepest_first = [list(block.parameters()) for block in reversed(twin.blocks)]
    groups = [{"params": list(twin.head.parameters()), "lr": lr}]
    groups += [{"params": p, "lr": lr * (scale * layer_decay**depth)} for depth, p in enumerate(deepest_first)]
    twin_optimizer = make_optimizer(groups)

    def apply_to_twin(epoch: int) -> None:
        number = schedule.blocks_at(epoch)
        for depth, parameters in enumerate(deepest_first):
            for parameter in parameters:
                if parameter.requires_grad != (depth < number):
                    parameter.requires_grad_(depth < number)
                    parameter.grad = None

    run = Run(model, optimizer, schedulers, unfreezer.apply)
    return run, Run(twin, twin_optimizer, make_schedulers(twin_optimizer), apply_to_twin)


def differences(run: Run, oracle: Run, *, relative: float = 0.0) -> list[str]:
    """Where the runs differ: weights, states and learning rates, by name; to the bit unless `relative` is given."""

    def close(a: Any, b: Any) -> bool:
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        if relative == 0:
            return a.shape == b.shape and bool((a == b).all())
        return torch.allclose(a, b, rtol=relative, atol=relative)

    def compare(where: str, ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
        lone = [f"{key} of {where} is there in one alone" for key in ours.keys() ^ theirs.keys()]
        common = ours.keys() & theirs.keys()
        return lone + [f"{k} of {where}: {ours[k]} and {theirs[k]}" for k in common if not close(ours[k], theirs[k])]

    twins_by_name = dict(oracle.model.named_parameters())
    joined = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    found = []
    for name, parameter in run.model.named_parameters():
        twin = twins_by_name[name]
        found += compare(name, {"weight": parameter}, {"weight": twin})
        if id(parameter) in joined:  # before, Adagrad's oracle alone has a state
            found += compare(name, run.optimizer.state.get(parameter, {}), oracle.optimizer.state.get(twin, {}))
    keys = ("lr", "momentum", "betas", "initial_lr")
    for index, pair in enumerate(zip(run.optimizer.param_groups, oracle.optimizer.param_groups, strict=False)):
        ours, theirs = ({key: group[key] for key in keys if key in group} for group in pair)
        found += compare(f"group {index}", ours, theirs)
    return found


def train_in_lockstep(
    run: Run,
    oracle: Run,
    epochs: Sequence[int],
    *,
    steps: int = 2,
    relative: float = 0.0,
    seed: int = 1,
    step: Callable[[Run, Tensor, Tensor], object] = Run.step,
) -> list[str]:
    """Train both on the same data, with a step of one's own or `Run`'s; the first differences that appear, or none."""
    generator = torch.Generator().manual_seed(seed)
    for epoch in epochs:
        run.apply(epoch)
        oracle.apply(epoch)
        for index in range(steps):
            x, y = (torch.randn(8, n, generator=generator).to(run.model.head.weight) for n in (4, 2))
            step(run, x, y)
            step(oracle, x, y)
            if found := differences(run, oracle, relative=relative):
                return [f"epoch {epoch}, step {index}: {text}" for text in found]
    return []
