"""Groups as users need them: without decay, warming up, dropped and declared."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Net, Run, differences, train_in_lockstep, twins
from torch import nn
from torch.optim import lr_scheduler
from torch.torch_version import TorchVersion

from unfreeze_sched import MilestonePreset, OptimizerRebuilder, ProgressiveUnfreezer, RatePreset, UnfreezeSchedule
from unfreeze_sched.optimizer.groups import BLOCK_KEY, SUBSET_KEY
from unfreeze_sched.optimizer.warmup import WARMUP_KEY

RATE = UnfreezeSchedule(preset=RatePreset(unfreeze_start_epoch=1, unfreeze_rate=2), total_blocks=3, total_epochs=8)


def names_by_group(net: Net, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {id(p): name for name, p in net.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


# No decay.


@pytest.mark.parametrize("membership", ["late", "declared"])
def test_norms_and_biases_do_not_decay(membership: Any) -> None:
    """A block's matrices join with the template's decay, its norm and bias parameters in a second group without."""
    net = Net(2)
    optimizer = torch.optim.AdamW(net.head.parameters(), lr=0.5, weight_decay=0.1)
    OptimizerRebuilder(
        optimizer, net.make_blocks(), learning_rate_scale=0.5, membership=membership, no_decay=True
    ).sync()
    groups = [(g.get(BLOCK_KEY), g.get(SUBSET_KEY), g["weight_decay"], g["lr"]) for g in optimizer.param_groups]
    assert groups == [
        (None, None, 0.1, 0.5),
        ("block1", None, 0.1, 0.25),
        ("block1", 1, 0.0, 0.25),
        ("block0", None, 0.1, 0.25),
        ("block0", 1, 0.0, 0.25),
    ]
    assert names_by_group(net, optimizer)[1:3] == [
        ["blocks.1.0.weight"],
        ["blocks.1.0.bias", "blocks.1.1.weight", "blocks.1.1.bias"],
    ]


def test_the_matching_template() -> None:
    """Where the head has a group without decay of its own, the block's is like that one, its learning rate included."""
    net = Net(1)
    optimizer = torch.optim.AdamW(
        [
            {"params": [net.head.weight], "lr": 0.5, "weight_decay": 0.1},
            {"params": [net.head.bias], "lr": 0.25, "weight_decay": 0.0, "eps": 1e-5},
        ]
    )
    scheduler = lr_scheduler.LambdaLR(optimizer, [lambda e: 0.5**e, lambda e: 0.9**e])
    OptimizerRebuilder(optimizer, net.make_blocks(), [scheduler], learning_rate_scale=0.5, no_decay=True).sync()
    assert [(g["lr"], g["eps"]) for g in optimizer.param_groups[2:]] == [(0.25, 1e-8), (0.125, 1e-5)]
    optimizer.step()
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.25, 0.225, 0.125, 0.1125], rel=1e-12)


def test_a_function_of_ones_own() -> None:
    """A function from name and parameter to overrides divides a block; parameters with equal overrides share a group."""

    def overrides(name: str, parameter: nn.Parameter) -> dict[str, Any]:
        if name.endswith("1.weight"):
            return {"betas": (0.5, 0.5)}
        return {"weight_decay": 0.3} if parameter.ndim == 1 else {}

    net = Net(1)
    optimizer = torch.optim.AdamW(net.head.parameters(), lr=0.5)
    rebuilder = OptimizerRebuilder(optimizer, net.make_blocks(), no_decay=overrides)
    rebuilder.sync()
    assert not rebuilder.sync()
    assert names_by_group(net, optimizer)[1:] == [
        ["blocks.0.0.weight"],
        ["blocks.0.0.bias", "blocks.0.1.bias"],
        ["blocks.0.1.weight"],
    ]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.01, 0.3, 0.01]
    assert optimizer.param_groups[3]["betas"] == (0.5, 0.5)


@pytest.mark.parametrize("key", ["lr", "params", "colour"])
def test_what_cannot_be_overridden(key: str) -> None:
    """A learning rate, the parameters themselves, or a key that the template lacks, is refused by name."""
    net = Net(1)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.5)
    with pytest.raises(
        ValueError,
        match=rf"`no_decay` must override keys of the template's group, .* got '{key}' for 'blocks.0.0.weight'; it has",
    ):
        OptimizerRebuilder(optimizer, net.make_blocks(), no_decay=lambda *_: {key: 1})


def test_without_decay_equals_the_oracle() -> None:
    """With the second groups the run is the one in which those groups had been there from the start."""
    make = functools.partial(torch.optim.AdamW, weight_decay=0.1)
    run, _ = twins(RATE, make, scale=0.5, no_decay=True)
    twin = copy.deepcopy(run.model)
    groups: list[dict[str, Any]] = [{"params": list(twin.head.parameters()), "lr": 0.01}]
    for block in reversed(twin.blocks):
        parameters = list(block.parameters())
        groups += [{"params": [p for p in parameters if (p.ndim > 1) is decays], "lr": 0.005,
                    "weight_decay": 0.1 if decays else 0.0} for decays in (True, False)]  # fmt: skip
    optimizer = make(groups)

    def apply(epoch: int) -> None:
        for index, block in enumerate(reversed(twin.blocks)):
            block.requires_grad_(index < RATE.blocks_at(epoch))

    assert train_in_lockstep(run, Run(twin, optimizer, [], apply), range(8)) == []


# Warm-up.


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


# Declared, dropped.


def test_declared_groups_serve_a_scheduler_that_is_not_known() -> None:
    """Groups declared before the scheduler is made need no row of ours, whatever the scheduler computes."""

    class Mine(lr_scheduler.StepLR):
        pass

    net = Net(3)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=1.0)
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, RATE, learning_rate_scale=0.5, membership="declared")
    scheduler = Mine(optimizer, 1, gamma=0.5)
    for epoch in range(4):
        unfreezer.apply(epoch)
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0625, 0.03125, 0.03125, 0.03125]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 4, 4, 0]


def test_dropping_and_joining_again_starts_afresh() -> None:
    """A dropped block that joins again has a fresh state in its old group, at the group's live rate."""
    schedule = RATE.replace(preset=MilestonePreset(milestones={0: 1, 2: 0, 4: 1}))
    net = Net(3)
    optimizer = torch.optim.AdamW(net.head.parameters(), lr=1.0)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, schedule, [scheduler], 0.5, on_refreeze="drop")
    for epoch in range(6):
        change = unfreezer.apply(epoch)
        assert bool(change.dropped) is (epoch == 2)
        net(torch.ones(2, 4).double()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    group = optimizer.param_groups[1]
    assert {int(optimizer.state[p]["step"]) for p in group["params"]} == {2}
    assert group["lr"] == optimizer.param_groups[0]["lr"] / 2
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("drives", ["outer", "inner"])
def test_a_scheduler_may_drive_what_is_wrapped(drives: str) -> None:
    """A wrapper's groups are those of the optimizer within, and a scheduler of either is one of both."""
    package = pytest.importorskip("pytorch_optimizer")
    net = Net(1)
    inner = torch.optim.AdamW(net.head.parameters(), lr=1.0)
    outer = package.Lookahead(inner)
    scheduler = lr_scheduler.ExponentialLR(inner if drives == "inner" else outer, 0.5)
    OptimizerRebuilder(outer, net.make_blocks(), [scheduler], learning_rate_scale=0.5).sync()
    outer.step()
    scheduler.step()
    assert [group["lr"] for group in inner.param_groups] == [0.5, 0.25]


def test_dropping_frees_the_state_within_a_wrapper() -> None:
    """A dropped block leaves no state in the optimizer that a wrapper wraps, and starts afresh when it joins again."""
    package = pytest.importorskip("pytorch_optimizer")
    net = Net(1)
    inner = torch.optim.AdamW(net.head.parameters(), lr=0.1)
    schedule = RATE.replace(preset=MilestonePreset(milestones={0: 1, 1: 0, 2: 1}), total_blocks=1)
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), package.Lookahead(inner), schedule, on_refreeze="drop")
    parameter = net.blocks[0][0].weight  # type: ignore[index]
    steps = []
    for epoch in range(3):
        unfreezer.apply(epoch)
        steps.append(parameter in inner.state)
        net(torch.ones(2, 4).double()).sum().backward()
        unfreezer.rebuilder.optimizer.step()
    assert steps == [False, False, False]
    assert int(inner.state[parameter]["step"]) == 1  # type: ignore[index]


@pytest.mark.parametrize("version", [None, "2.6.0"])
def test_adagrads_sums_are_there_for_the_first_step(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch 2.12 the constructor alone makes them: a block that joins, again too, gets them as it would there."""
    if version:
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    net = Net(1)
    keywords: dict[str, Any] = {"lr": 0.1, "initial_accumulator_value": 0.5}
    optimizer = torch.optim.Adagrad(net.head.parameters(), **keywords)
    schedule = RATE.replace(preset=MilestonePreset(milestones={0: 1, 1: 0, 2: 1}), total_blocks=1)
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, schedule, on_refreeze="drop")
    parameter = net.blocks[0][0].weight
    for epoch in range(3):
        unfreezer.apply(epoch)
        if version and epoch != 1:
            own, fresh = (made.state[parameter] for made in (optimizer, torch.optim.Adagrad([parameter], **keywords)))
            assert own.keys() == fresh.keys()
            assert all(torch.equal(own[key], fresh[key]) for key in own)
        net(torch.ones(2, 4).double()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert int(optimizer.state[parameter]["step"]) == 1


def test_block_names_are_one_rebuilders() -> None:
    """Another encoder's blocks of the same names on the same optimizer are refused rather than mixed up."""
    net, other = Net(1), Net(1)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    OptimizerRebuilder(optimizer, net.make_blocks()).sync()
    with pytest.raises(
        ValueError, match=r"`blocks` must have names of their own, got 'block0', under which the optimizer"
    ):
        OptimizerRebuilder(optimizer, other.make_blocks())


@pytest.mark.parametrize("value", ["yes", 3])
def test_no_decay_is_a_flag_or_a_function(value: Any) -> None:
    """Anything else is a TypeError that says what is taken."""
    net = Net(1)
    with pytest.raises(TypeError, match="`no_decay` must be True, False or a function of name and parameter, got"):
        OptimizerRebuilder(torch.optim.SGD(net.head.parameters()), net.make_blocks(), no_decay=value)


def test_a_single_block_is_no_sequence() -> None:
    """A block outside of a list is named for what it is."""
    net = Net(1)
    with pytest.raises(
        TypeError, match=r"`blocks` must be a sequence of blocks, got Block; put a single one in a list"
    ):
        OptimizerRebuilder(torch.optim.SGD(net.head.parameters()), net.make_blocks()[0])  # type: ignore[arg-type]


# A rate of its own for each block.


def test_a_scale_for_each_block() -> None:
    """Each block's group has its own share of the template's rate, layer decay on top, at every step of a scheduler."""
    net = Net(3)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=1.0)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    scale = {"block2": 0.5, "block0": 0.125, "block1": 0.25}
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, RATE, [scheduler], scale, layer_decay=0.5)
    for epoch in range(RATE.total_epochs):
        unfreezer.apply(epoch)
        optimizer.step()
        scheduler.step()
    now = 0.5**RATE.total_epochs
    assert unfreezer.rebuilder.learning_rates() == {"block2": 0.5 * now, "block1": 0.125 * now, "block0": 0.03125 * now}


@pytest.mark.parametrize(
    ("scale", "error", "text"),
    [
        (
            {"block0": 0.1},
            ValueError,
            "one number for each block, got none for 'block1'; the blocks are block0, block1",
        ),
        (
            {"block0": 0.1, "block1": 0.1, "layer4": 0.1},
            ValueError,
            "one number for each block, got an unknown block 'layer4'; the blocks are block0, block1",
        ),
        (
            {"block0": 0.1, "block1": 2},
            ValueError,
            r"`learning_rate_scale\['block1'\]` must be a number in \(0, 1\], got 2",
        ),
        ({"block0": 0.1, "block1": "a"}, TypeError, r"`learning_rate_scale\['block1'\]` must be a number in \(0, 1\]"),
    ],
)
def test_scales_refused(scale: Any, error: type[Exception], text: str) -> None:
    """A block without a scale, a scale without a block and a scale out of range are named."""
    net = Net(2)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=1.0)
    with pytest.raises(error, match=text):
        OptimizerRebuilder(optimizer, net.make_blocks(), learning_rate_scale=scale)
    assert not optimizer._optimizer_step_post_hooks


def test_a_scale_of_one_for_one_block_warns() -> None:
    """One block at the head's rate is as suspicious as all."""
    net = Net(2)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=1.0)
    schedule = RATE.replace(total_blocks=2)
    with pytest.warns(UserWarning, match="`learning_rate_scale` should be below 1, got 1"):
        ProgressiveUnfreezer(net.make_blocks(), optimizer, schedule, None, {"block0": 0.1, "block1": 1})
