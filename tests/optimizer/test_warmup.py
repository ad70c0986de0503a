"""A joining group warms up, by itself, and no scheduler sees it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Net, Run, differences, twins
from torch.optim import lr_scheduler

from unfreeze_sched import OptimizerRebuilder, RatePreset, UnfreezeSchedule
from unfreeze_sched.optimizer.watch import WARMUP_KEY

RATE = UnfreezeSchedule(preset=RatePreset(unfreeze_start_epoch=1, unfreeze_rate=2), total_blocks=3, total_epochs=8)


def ramp(optimizer: torch.optim.Optimizer, joined: dict[int, int], step: int, k: int) -> list[Any]:
    """The oracle's warm-up by hand: lower the rates of groups in their first k steps, and say what they were."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for index, since in joined.items():
        if step - since < k:
            optimizer.param_groups[index]["lr"] = rates[index] * ((step - since + 1) / k)
    return rates


@settings(max_examples=20)
@given(k=st.integers(1, 7), name=st.sampled_from(["AdamW", "SGD", "RMSprop"]), cosine=st.booleans())
def test_warmup_equals_a_ramp_by_hand(k: int, name: str, cosine: bool) -> None:
    """Step i of a block's first k runs at (i + 1) / k of its rate, to the bit, and the scheduler's rates are its own."""

    def schedulers(optimizer: torch.optim.Optimizer) -> list[Any]:
        return [lr_scheduler.CosineAnnealingLR(optimizer, 16)] if cosine else []

    run, oracle = twins(RATE, getattr(torch.optim, name), schedulers, warmup_steps=k)
    generator, step, joined = torch.Generator().manual_seed(0), 0, dict[int, int]()
    for epoch in range(8):
        if run.apply(epoch):
            joined[len(run.optimizer.param_groups) - 1] = step
        oracle.apply(epoch)
        for _ in range(2):
            x, y = torch.randn(8, 4, generator=generator).double(), torch.randn(8, 2, generator=generator).double()
            loss = (oracle.model(x) - y).square().mean()
            oracle.optimizer.zero_grad()
            loss.backward()
            rates = ramp(oracle.optimizer, joined, step, k)
            oracle.optimizer.step()
            for group, rate in zip(oracle.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            for scheduler in oracle.schedulers:
                scheduler.step()
            run.step(x, y)
            step += 1
            assert differences(run, oracle) == []
    taken = {index: run.optimizer.param_groups[index][WARMUP_KEY] for index in joined}
    assert taken == {index: [min(step - start, k), k] for index, start in joined.items()}


def test_a_tensor_rate_warms_up_in_place() -> None:
    """A tensor learning rate keeps its identity, and has its own value again after the step."""
    net = Net(1)
    optimizer = torch.optim.AdamW(net.head.parameters(), lr=torch.tensor(0.1))
    OptimizerRebuilder(optimizer, net.make_blocks(), learning_rate_scale=1.0, warmup_steps=4).sync()
    rate = optimizer.param_groups[1]["lr"]
    before = net.blocks[0][0].weight.detach().clone()  # type: ignore[index]
    net(torch.ones(2, 4).double()).sum().backward()
    optimizer.step()
    assert optimizer.param_groups[1]["lr"] is rate
    assert float(rate) == float(torch.tensor(0.1))
    moved = (net.blocks[0][0].weight.detach() - before).abs().max()  # type: ignore[index]
    assert 0 < float(moved) < 0.03  # Adam's first step is of the size of the rate, here a quarter of it
    assert optimizer.param_groups[1][WARMUP_KEY] == [1, 4]


@pytest.mark.parametrize("at", range(1, 8))
def test_warmup_survives_a_resume(at: int) -> None:
    """Interrupted in the middle of a warm-up and resumed in new objects, the run equals the uninterrupted one."""
    keywords: dict[str, Any] = {"warmup_steps": 5, "scale": 0.5}
    run, _ = twins(RATE, torch.optim.AdamW, **keywords)
    generator = torch.Generator().manual_seed(0)

    def train(which: list[Run], epochs: range) -> None:
        for epoch in epochs:
            for one in which:
                one.apply(epoch)
            x, y = torch.randn(8, 4, generator=generator).double(), torch.randn(8, 2, generator=generator).double()
            for one in which:
                one.step(x, y)

    train([run], range(at))
    saved = copy.deepcopy((run.apply.__self__.state_dict(), run.model.state_dict(), run.optimizer.state_dict()))  # type: ignore[attr-defined]
    resumed, _ = twins(RATE, torch.optim.AdamW, seed=5, **keywords)
    resumed.apply.__self__.load_state_dict(saved[0])  # type: ignore[attr-defined]
    resumed.model.load_state_dict(saved[1])
    resumed.optimizer.load_state_dict(saved[2])
    train([run, resumed], range(at, 8))
    assert differences(resumed, run) == []


def test_two_rebuilders_warm_up_once() -> None:
    """A second rebuilder on the same optimizer does not lower the rate twice."""
    net = Net(1)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=1.0)
    OptimizerRebuilder(optimizer, net.make_blocks(), learning_rate_scale=1.0, warmup_steps=4)
    OptimizerRebuilder(optimizer, net.make_blocks(), learning_rate_scale=1.0, warmup_steps=4).sync()
    before = net.blocks[0][0].bias.clone()  # type: ignore[index]
    net(torch.ones(2, 4).double()).sum().backward()
    optimizer.step()
    grad = net.blocks[0][0].bias.grad  # type: ignore[index]
    assert torch.equal(net.blocks[0][0].bias, before - 0.25 * grad)  # type: ignore[index,operator]


def test_a_step_that_fails_keeps_the_rate() -> None:
    """A rate that a failing step left lowered is its own again in the next one, and the warm-up does not go on."""
    net = Net(1)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=1.0)
    OptimizerRebuilder(optimizer, net.make_blocks(), learning_rate_scale=1.0, warmup_steps=4).sync()

    def fails() -> float:
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        optimizer.step(fails)
    optimizer.step()
    assert (optimizer.param_groups[1]["lr"], optimizer.param_groups[1][WARMUP_KEY]) == (1.0, [1, 4])


@pytest.mark.parametrize(
    ("module", "name", "reason"),
    [
        ("transformers.optimization", "Adafactor", "whose groups have no `lr`"),
        ("timm.optim", "Adafactor", "whose groups have no `lr`"),
        ("prodigyopt", "Prodigy", "whose groups share one learning rate"),
    ],
)
def test_warmup_is_refused_where_a_group_has_no_rate_of_its_own(module: str, name: str, reason: str) -> None:
    """There is nothing to lower; it was an error in the middle of a step."""
    net = Net(1)
    optimizer = getattr(pytest.importorskip(module), name)(net.head.parameters())
    keywords: dict[str, Any] = {"learning_rate_scale": 1.0}
    OptimizerRebuilder(optimizer, net.make_blocks(), **keywords)
    with pytest.raises(ValueError, match=rf"`warmup_steps` must be 0 for {name}, {reason}, got 3; leave it out"):
        OptimizerRebuilder(optimizer, net.make_blocks(), warmup_steps=3, **keywords)


@pytest.mark.parametrize("name", ["Rprop", "ASGD"])
def test_warmup_is_refused_where_the_rate_becomes_state(name: str) -> None:
    """Optimizers that build their state from the learning rate refuse a warm-up by name."""
    net = Net(1)
    optimizer = getattr(torch.optim, name)(net.head.parameters())
    with pytest.raises(
        ValueError, match=rf"`warmup_steps` must be 0 for {name}, which builds its state from the learning rate, got 3"
    ):
        OptimizerRebuilder(optimizer, net.make_blocks(), warmup_steps=3)


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_warmup_steps_are_a_count(value: Any, error: type[Exception]) -> None:
    """Steps are a non-negative integer."""
    net = Net(1)
    with pytest.raises(error, match="`warmup_steps` must be an integer of at least 0, got"):
        OptimizerRebuilder(torch.optim.SGD(net.head.parameters()), net.make_blocks(), warmup_steps=value)


def test_a_warm_up_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph would replay the lowered rate for good: refused by the steps that are left, and no rate is changed."""
    net = Net(1)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=1.0)
    OptimizerRebuilder(optimizer, net.make_blocks(), warmup_steps=3, learning_rate_scale=0.5).sync()
    optimizer.step()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="must be over before a step is captured in a CUDA graph, got 2 left, at"):
        optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.5]
    monkeypatch.undo()
    for _ in range(2):
        optimizer.step()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    optimizer.step()
