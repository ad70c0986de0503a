"""Late join against the oracle on a card: the kernels that are there alone, rates that are tensors, captured steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import Run, no_schedulers, train_in_lockstep, twins
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from unfreeze_sched import MilestonePreset, UnfreezeSchedule

# A refreezing and a jump among them.
SCHEDULE = UnfreezeSchedule(preset=MilestonePreset(milestones={1: 1, 2: 3, 3: 1, 4: 3}), total_blocks=3, total_epochs=6)
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "AdamW, loop": lambda groups: torch.optim.AdamW(groups, foreach=False),
    "AdamW, foreach": lambda groups: torch.optim.AdamW(groups, foreach=True),
    "AdamW, fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "SGD, foreach": lambda groups: torch.optim.SGD(groups, momentum=0.9, foreach=True),
    "SGD, fused": lambda groups: torch.optim.SGD(groups, momentum=0.9, fused=True),
    "Adafactor": torch.optim.Adafactor,
    "Adagrad": torch.optim.Adagrad,
}
SCHEDULERS: dict[str, Callable[[Optimizer], list[Any]]] = {
    "none": no_schedulers,
    "cosine": lambda optimizer: [lr_scheduler.CosineAnnealingLR(optimizer, 20)],
    "OneCycle": lambda optimizer: [
        lr_scheduler.OneCycleLR(
            optimizer,
            [2 * float(group["lr"]) for group in optimizer.param_groups],
            total_steps=20,
            cycle_momentum=not optimizer.defaults.keys().isdisjoint({"momentum", "betas"}),
        )
    ],
}


def with_tensor_rates(**options: Any) -> Callable[[list[dict[str, Any]]], Optimizer]:
    """AdamW whose groups have a learning rate each, as a tensor where the parameters are."""

    def make(groups: list[dict[str, Any]]) -> Optimizer:
        for group in groups:
            group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)
        return torch.optim.AdamW(groups, **options)

    return make


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_late_join(name: str, scheduler: str, device: str) -> None:
    """Weights, states and rates are those of the run in which all had been there from the start, to the bit."""
    run, oracle = twins(SCHEDULE, OPTIMIZERS[name], SCHEDULERS[scheduler], device=device)
    assert train_in_lockstep(run, oracle, range(6)) == []
    assert len(run.optimizer.param_groups) == 4


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_late_join_of_a_capturable_step(options: dict[str, bool], scheduler: str, card: str) -> None:
    """The same where counts and rates live on the card, as a graph needs them."""
    make = with_tensor_rates(capturable=True, **options)
    run, oracle = twins(SCHEDULE, make, SCHEDULERS[scheduler], device=card)
    assert train_in_lockstep(run, oracle, range(6)) == []
    assert {state["step"].device.type for state in run.optimizer.state.values()} == {card}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_tensor_rates(scheduler: str, device: str) -> None:
    """Each group has a rate of its own, where the template's is; at a share of it they are equal up to rounding."""
    run, oracle = twins(SCHEDULE, with_tensor_rates(fused=True), SCHEDULERS[scheduler], scale=0.1, device=device)
    assert train_in_lockstep(run, oracle, range(6), relative=1e-5) == []
    rates = [group["lr"] for group in run.optimizer.param_groups]
    assert {rate.device.type for rate in rates} == {device}
    assert len({rate.data_ptr() for rate in rates}) == 4


def test_the_comparison_can_fail(device: str) -> None:
    """A joining group at a rate one bit higher is noticed in the first step after it joined."""
    run, oracle = twins(SCHEDULE, OPTIMIZERS["AdamW, fused"], device=device)
    oracle.optimizer.param_groups[1]["lr"] *= 1 + 2**-52
    found = train_in_lockstep(run, oracle, range(2))
    assert any(text.startswith("epoch 1, step 0: weight of blocks.2") for text in found)


class Captured:
    """Steps of a run that are replayed from a graph; the first of each phase makes states, and is captured then."""

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        self.phase = -1

    def step(self, run: Run, x: Tensor, y: Tensor) -> None:
        run.optimizer.zero_grad(set_to_none=False)  # a graph reads the gradients that were there when it was captured
        (run.model(x) - y).square().mean().backward()
        phase = sum(parameter.requires_grad for parameter in run.model.parameters())
        if phase == self.phase:
            self.graph.replay()
        else:
            run.optimizer.step()
            self.graph, self.phase = torch.cuda.CUDAGraph(), phase
            with torch.cuda.graph(self.graph):
                run.optimizer.step()
        for scheduler in run.schedulers:
            scheduler.step()
        run.optimizer.zero_grad(set_to_none=False)  # a replay tells nobody that it has used them


def test_a_graph_for_each_phase(card: str) -> None:
    """A step that is captured anew after each transition equals the oracle's, which is no graph's."""
    make = with_tensor_rates(capturable=True, foreach=True)
    run, oracle = twins(SCHEDULE, make, SCHEDULERS["cosine"], device=card)
    graphs = Captured()

    def step(each: Run, x: Tensor, y: Tensor) -> None:
        (graphs.step if each is run else Run.step)(each, x, y)

    assert train_in_lockstep(run, oracle, range(6), steps=4, step=step) == []


def test_a_graph_of_the_phase_before(card: str) -> None:
    """Why it is captured anew: it trains what it was captured with, and not the block that has joined since."""
    run, _ = twins(SCHEDULE, with_tensor_rates(capturable=True, foreach=True), device=card)
    x, y = (torch.randn(8, n).to(run.model.head.weight) for n in (4, 2))
    graphs = Captured()
    run.apply(0)
    graphs.step(run, x, y)
    run.apply(1)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    (run.model(x) - y).square().mean().backward()
    graphs.graph.replay()
    moved = {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"head.weight", "head.bias"}
