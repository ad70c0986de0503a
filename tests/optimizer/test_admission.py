"""What is refused before anything changes, by name, with the reason and a fix."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.optim import Optimizer

from unfreeze_sched import Block, OptimizerRebuilder, ProgressiveUnfreezer
from unfreeze_sched.optimizer.groups import layers

po = pytest.importorskip("pytorch_optimizer")


def parts(make: Any = torch.optim.SGD, **keywords: Any) -> tuple[nn.Module, Any, Any]:
    """A network of a block and a head, an optimizer of the head, and a function that gives the rebuilder."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = make(list(net[1].parameters()), **keywords)
    block = Block("block", (net[0],))
    return net, optimizer, functools.partial(OptimizerRebuilder, optimizer, [block])


def refused(make: Any, **keywords: Any) -> str:
    with pytest.raises(ValueError, match=r"^`") as caught:
        make(**keywords)
    return str(caught.value)


def test_groups_that_diverged_are_refused() -> None:
    """A wrapper whose groups are no longer those of the wrapped would train half of them (trap 13)."""
    net, _, _ = parts()
    optimizer = po.SAM(net[1].parameters(), torch.optim.SGD, lr=0.1)  # type: ignore[index]
    optimizer.param_groups = list(optimizer.param_groups)
    assert refused(functools.partial(OptimizerRebuilder, optimizer, [Block("block", (net[0],))])) == (  # type: ignore[index]
        "`optimizer` must share its param groups with the SGD that it wraps, got a SAM with others; "
        "set the inner one's param_groups to the outer's"
    )


def test_vectors_do_not_join_a_muon_group() -> None:
    """pytorch-optimizer's Muon fails on them in the middle of a step (trap 9)."""
    _, optimizer, make = parts(lambda params, **_: po.Muon([{"params": [params[0]], "use_muon": True}]))
    assert refused(make().sync) == (
        "`block/bias` must fit Muon, got shape (4,): a use_muon group takes matrices; leave it out of the block"
    )
    assert len(optimizer.param_groups) == 1


def test_complex_parameters_are_checked_before_anything_changes() -> None:
    """Fused optimizers check dtypes in the middle of a step (trap 9)."""
    block = nn.Module()
    block.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    head = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(head.parameters(), fused=True)
    assert refused(OptimizerRebuilder(optimizer, [Block("block", (block,))]).sync) == (
        "`block/weight` must fit AdamW, got shape (2, 2): a fused group takes floating point, not torch.complex64; "
        "leave it out of the block"
    )
    assert len(optimizer.param_groups) == 1


class Forwarding(Optimizer):
    """As Opacus' DPOptimizer: all that it has is another's, under a name of its own, and torch's hooks are not there."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.original_optimizer = optimizer

    param_groups = property(lambda self: self.original_optimizer.param_groups)  # type: ignore[assignment]
    defaults = property(lambda self: self.original_optimizer.defaults)  # type: ignore[assignment]
    state = property(lambda self: self.original_optimizer.state)  # type: ignore[assignment]

    def step(self, closure: Any = None) -> Any:
        return self.original_optimizer.step(closure)


class Hiding(Forwarding):
    """What it forwards to is no attribute."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.hidden = [optimizer]

    original_optimizer = property(lambda self: self.hidden[0])  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("wrap", "which"),
    [
        (Forwarding, "got Forwarding, which forwards to those of another; pass its `original_optimizer`"),
        (Hiding, "got Hiding, which forwards to those of another; pass the optimizer that it wraps"),
        (
            lambda optimizer: PostLocalSGDOptimizer(optimizer, None),  # type: ignore[arg-type]
            "got PostLocalSGDOptimizer, which forwards to those of another; pass its `optim`",
        ),
    ],
    ids=["forwarding", "hiding", "post-local"],
)
def test_a_layer_that_forwards_to_what_is_not_known_is_refused(wrap: Any, which: str) -> None:
    """By name, with what to pass, and nothing has changed; what is said to be passed is taken."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    make = functools.partial(ProgressiveUnfreezer.from_model, net, total_epochs=20, blocks=[Block("block", net[0])])
    assert refused(make, optimizer=wrap(optimizer)) == f"`optimizer` must hold its param groups itself, {which}"
    assert len(optimizer.param_groups[0]["params"]) == 4
    assert make(optimizer=optimizer).apply(10).added == ("block/weight", "block/bias")


def test_layers_that_are_known() -> None:
    """Wrappers of torch's kin are looked through; another optimizer that is no layer is not taken for one."""
    net = nn.Linear(4, 4)
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    lookahead = pytest.importorskip("timm.optim").Lookahead(inner)
    lightning = pytest.importorskip("lightning.pytorch.core.optimizer").LightningOptimizer(inner)
    assert list(layers(lookahead)) == [lookahead, inner]
    assert list(layers(lightning)) == [lightning, inner]
    inner.other = torch.optim.SGD(nn.Linear(2, 2).parameters())  # type: ignore[attr-defined]
    inner.outer = lookahead  # type: ignore[attr-defined]
    for optimizer in (inner, lookahead, lightning):
        block = nn.Linear(4, 4)
        OptimizerRebuilder(optimizer, [Block("block", block)]).sync()
        assert optimizer.param_groups is inner.param_groups
        assert inner.param_groups.pop()["params"] == list(block.parameters())
