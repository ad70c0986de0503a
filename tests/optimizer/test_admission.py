"""What is refused before anything changes, by name, with the reason and a fix."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from unfreeze_sched import Block, OptimizerRebuilder

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
