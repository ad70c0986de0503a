"""A block's parameters in groups that differ: without decay, or by a function of one's own."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from oracle import Net, Run, train_in_lockstep, twins
from torch import nn
from torch.optim import lr_scheduler

from unfreeze_sched import OptimizerRebuilder, RatePreset, UnfreezeSchedule
from unfreeze_sched.optimizer.groups import BLOCK_KEY, SUBSET_KEY

RATE = UnfreezeSchedule(preset=RatePreset(unfreeze_start_epoch=1, unfreeze_rate=2), total_blocks=3, total_epochs=8)


def names_by_group(net: Net, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {id(p): name for name, p in net.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


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


@pytest.mark.parametrize("value", ["yes", 3])
def test_no_decay_is_a_flag_or_a_function(value: Any) -> None:
    """Anything else is a TypeError that says what is taken."""
    net = Net(1)
    with pytest.raises(TypeError, match="`no_decay` must be True, False or a function of name and parameter, got"):
        OptimizerRebuilder(torch.optim.SGD(net.head.parameters()), net.make_blocks(), no_decay=value)
