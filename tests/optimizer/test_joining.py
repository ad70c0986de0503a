"""What a joining group holds: the live template's values as copies of its own, and counters that start afresh."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from unfreeze_sched import Block, OptimizerRebuilder
from unfreeze_sched.optimizer import groups

po = pytest.importorskip("pytorch_optimizer")
pytest.importorskip("schedulefree")


def parts(make: Any = torch.optim.SGD, **keywords: Any) -> tuple[nn.Module, Any, Any]:
    """A network of a block and a head, an optimizer of the head, and a function that gives the rebuilder."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = make(list(net[1].parameters()), **keywords)
    block = Block("block", (net[0],))
    return net, optimizer, functools.partial(OptimizerRebuilder, optimizer, [block])


def step(net: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    net(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()


def test_a_tensor_rate_is_cloned() -> None:
    """Neither the template's tensor nor the constructor's is the joining group's (trap 4)."""
    rate = torch.tensor(0.1)
    _, optimizer, make = parts(lr=rate)
    make(learning_rate_scale=1.0).sync()
    joined = optimizer.param_groups[1]["lr"]
    assert torch.equal(joined, rate)
    assert joined is not rate
    assert joined is not optimizer.param_groups[0]["lr"]


def test_the_live_template_is_copied() -> None:
    """What the user wrote into the template since is copied, the user's own keys too, and copied deeply (trap 14)."""
    _, optimizer, make = parts(lr=0.1, momentum=0.5)
    optimizer.param_groups[0].update(momentum=0.25, mine={"a": [1]})
    make().sync()
    head, group = optimizer.param_groups
    assert (group["momentum"], group["mine"]) == (0.25, {"a": [1]})
    assert group["mine"]["a"] is not head["mine"]["a"]


def test_counters_start_fresh_and_the_mode_is_shared() -> None:
    """The counters of schedulefree are those of a new optimizer, and its mode is the head's (traps 6, 7)."""
    import schedulefree  # noqa: PLC0415

    net, optimizer, make = parts(schedulefree.AdamWScheduleFree)
    optimizer.train()
    for _ in range(3):
        step(net, optimizer)
    make().sync()
    head, group = optimizer.param_groups
    assert (head["k"], group["k"], group["weight_sum"], group["lr_max"]) == (3, 0, 0.0, -1.0)
    assert head["train_mode"] is group["train_mode"] is True
    before = [p.detach().clone() for p in net[0].parameters()]  # type: ignore[index]
    optimizer.eval()
    optimizer.train()
    assert all(map(torch.equal, before, net[0].parameters()))  # type: ignore[index]


@pytest.mark.parametrize("membership", ["declared", "late"])
def test_a_refilled_group_starts_again(membership: Any) -> None:
    """A group that was emptied counted on; filled again it starts as a new one, and stays the same object."""
    net, optimizer, make = parts(po.LaProp)
    rebuilder = make(on_refreeze="drop", membership=membership)
    rebuilder.sync()
    group = optimizer.param_groups[1]
    inside = group["params"]
    step(net, optimizer)
    for trainable in (False, True):
        for parameter in net[0].parameters():  # type: ignore[index]
            parameter.requires_grad_(trainable)
            parameter.grad = None
        rebuilder.sync()
        if not trainable:
            step(net, optimizer)
    assert group is optimizer.param_groups[1]
    assert group["params"] is inside
    assert len(inside) == 2
    assert "step" not in group
    assert optimizer.param_groups[0]["step"] == 2


def test_names_are_kept_in_step() -> None:
    """A named optimizer knows the names of what joined, late and declared (trap 16)."""
    for membership in ("late", "declared"):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        optimizer = torch.optim.SGD(net[1].named_parameters(), lr=0.1)
        OptimizerRebuilder(optimizer, [Block("block", (net[0],))], membership=membership).sync()  # type: ignore[arg-type]
        assert optimizer.param_groups[1]["param_names"] == ["block/weight", "block/bias"]
        assert len(optimizer.param_groups[1]["params"]) == 2


def test_the_optimizers_own_rates_grow_and_shrink() -> None:
    """AdaBound's `base_lrs` get the group's rate, and lose it when the join fails (trap 13)."""
    _, optimizer, make = parts(po.AdaBound, lr=0.1)
    restore = groups.snapshot(optimizer)
    groups.add(optimizer, {"params": [nn.Parameter(torch.ones(2))], "lr": 0.01}, 0, 0.1)
    assert optimizer.base_lrs == [0.1, 0.1 * 0.1]
    restore()
    assert (optimizer.base_lrs, len(optimizer.param_groups)) == ([0.1], 1)
    make(learning_rate_scale=0.5).sync()
    assert optimizer.base_lrs == [0.1, 0.05]


def test_a_failing_fill_is_undone() -> None:
    """When the optimizer refuses the parameters of a declared group, the group stands empty in its place."""

    class Fussy(torch.optim.SGD):
        def add_param_group(self, param_group: dict[str, Any]) -> None:
            if len(getattr(self, "param_groups", [])) == 1 and param_group["params"]:
                raise RuntimeError("no more")
            super().add_param_group(param_group)

    net, optimizer, make = parts(Fussy, lr=0.1)
    for parameter in net[0].parameters():  # type: ignore[index]
        parameter.requires_grad_(requires_grad=False)
    rebuilder = make(membership="declared")
    group = optimizer.param_groups[1]
    for parameter in net[0].parameters():  # type: ignore[index]
        parameter.requires_grad_(requires_grad=True)
    with pytest.raises(RuntimeError, match="no more"):
        rebuilder.sync()
    assert optimizer.param_groups[1] is group
    assert group["params"] == []
