"""Inductor on a card, over transitions: a compiled model and a compiled step, whose fused kernels round otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import Run, train_in_lockstep, twins
from torch import Tensor
from torch._dynamo import config
from torch.optim import Optimizer, lr_scheduler

from unfreeze_sched import MilestonePreset, UnfreezeSchedule

# Three transitions, a refreezing among them.
SCHEDULE = UnfreezeSchedule(preset=MilestonePreset(milestones={1: 1, 2: 3, 3: 2}), total_blocks=3, total_epochs=4)


class Counted:
    """Inductor, and the graphs that it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """No test finds what another compiled, and going beyond the limit is an error."""
    torch.compiler.reset()
    with config.patch(recompile_limit=32, fail_on_recompile_limit_hit=True):
        yield
    torch.compiler.reset()


def make_optimizer(groups: list[dict[str, Any]]) -> Optimizer:
    """With rates that a compiled step takes as inputs, and counts that it keeps on the card in any case."""
    for group in groups:
        group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)
    return torch.optim.AdamW(groups, foreach=True, capturable=True)


def cosine(optimizer: Optimizer) -> list[Any]:
    return [lr_scheduler.CosineAnnealingLR(optimizer, 20)]


def test_a_compiled_model(card: str) -> None:
    """Each phase has a graph of its own, and trains as the eager oracle does, up to the rounding of doubles."""
    run, oracle = twins(SCHEDULE, make_optimizer, cosine, device=card)
    backend, applied = Counted(), run.apply
    forward = torch.compile(run.model, backend=backend, fullgraph=True)

    def apply(epoch: int) -> None:
        applied(epoch)
        if torch.__version__ < "2.12":  # which does not look whether a parameter trains
            torch.compiler.reset()

    run.apply = apply

    def step(each: Run, x: Tensor, y: Tensor) -> None:
        if each is not run:
            each.step(x, y)
            return
        each.optimizer.zero_grad()
        (forward(x) - y).square().mean().backward()
        trained = {name for name, p in each.model.named_parameters() if p.grad is not None}
        assert trained == {name for name, p in each.model.named_parameters() if p.requires_grad}
        each.optimizer.step()
        each.schedulers[0].step()

    assert train_in_lockstep(run, oracle, range(4), step=step, relative=1e-9) == []
    assert backend.graphs == 4


def test_a_compiled_step(card: str) -> None:
    """A step compiles anew when a group joins, a few times, and moves what the eager oracle's moves, by as much.

    The counts are in single precision, and so is what is computed from them: 1 - 0.999 loses three digits.
    """
    run, oracle = twins(SCHEDULE, make_optimizer, cosine, device=card, scale=0.5)
    backend = Counted()
    compiled = torch.compile(run.optimizer.step, backend=backend)

    def step(each: Run, x: Tensor, y: Tensor) -> None:
        if each is not run:
            each.step(x, y)
            return
        each.optimizer.zero_grad()
        (each.model(x) - y).square().mean().backward()
        compiled()
        each.schedulers[0].step()

    assert train_in_lockstep(run, oracle, range(4), steps=4, step=step, relative=1e-5) == []
    assert 4 <= backend.graphs <= 12, backend.graphs
