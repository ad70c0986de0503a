"""LR schedulers of a user's own: a subclass that computes nothing is its parent, and one that computes is registered."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import Net, train_in_lockstep, twins
from torch.optim import lr_scheduler

from unfreeze_sched import OptimizerRebuilder, RatePreset, UnfreezeSchedule
from unfreeze_sched.optimizer import rates

RISING = UnfreezeSchedule(preset=RatePreset(unfreeze_start_epoch=1, unfreeze_rate=2), total_blocks=3, total_epochs=8)


class Named(lr_scheduler.LambdaLR):
    """With a constructor and a helper of its own, and another way to be saved."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer, lambda epoch: 0.9**epoch)

    def describe(self) -> str:
        return "exponential"

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict()


class Floored(lr_scheduler.CosineAnnealingLR):
    """Whose floor has to be seen through its parent."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer, T_max=12, eta_min=0.001)


class InSequence(lr_scheduler.SequentialLR):
    """A sequence by another name."""

    def __init__(self, optimizer: Any) -> None:
        first = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
        super().__init__(optimizer, [first, lr_scheduler.ExponentialLR(optimizer, 0.9)], milestones=[3])


class Halving(lr_scheduler.LRScheduler):
    """Computes itself, over a list of its own for each group."""

    def __init__(self, optimizer: Any) -> None:
        self.peaks = [2 * group["lr"] for group in optimizer.param_groups]
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [peak * 0.5**self.last_epoch for peak in self.peaks]


class Overriding(lr_scheduler.StepLR):
    """Computes something else than its parent."""

    def get_lr(self) -> list[float]:
        return [0.5 for _ in self.base_lrs]


@pytest.fixture
def registered() -> Iterator[None]:
    """The table as it was."""
    before = dict(rates._ROWS)
    yield
    rates._ROWS.clear()
    rates._ROWS.update(before)
    rates._kind.cache_clear()
    rates.row_of.cache_clear()


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # older torch's own sequence
@pytest.mark.parametrize("cls", [Named, Floored, InSequence])
def test_a_subclass_that_computes_nothing_is_its_parent(cls: type) -> None:
    """Its groups join as under the parent, equal to the oracle."""
    runs = twins(RISING, torch.optim.AdamW, lambda optimizer: [cls(optimizer)], scale=0.5)
    assert train_in_lockstep(*runs, range(RISING.total_epochs), relative=1e-12) == []


def test_one_that_computes_is_refused_until_it_is_registered(registered: None) -> None:
    """The refusal names the call; after it the class's own lists get their entries, to the oracle's rates."""

    def make() -> Any:
        return twins(RISING, torch.optim.AdamW, lambda optimizer: [Halving(optimizer)], scale=0.5)

    with pytest.raises(
        TypeError,
        match=r"must be of known classes, got .*Halving; say what it keeps for each group, by unfreeze_sched\.",
    ):
        make()
    rates.register(Halving, scaled_lists=["peaks"])
    assert train_in_lockstep(*make(), range(RISING.total_epochs)) == []


def test_a_registration_that_forgets_a_list_is_noticed(registered: None) -> None:
    """The comparison above can fail: without its list the class has no rate for the new group."""
    rates.register(Halving)
    run, oracle = twins(RISING, torch.optim.AdamW, lambda optimizer: [Halving(optimizer)], scale=0.5)
    try:
        noticed = train_in_lockstep(run, oracle, range(RISING.total_epochs))
    except ValueError as error:  # newer torch counts the rates that a scheduler computes
        noticed = re.findall("zip", str(error))
    assert noticed


def test_a_subclass_that_overrides_is_not_guessed() -> None:
    """It may compute anything: it is an error that names it and both ways out."""
    net = Net()
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"got .*Overriding; say what it keeps .*, or pass membership='declared'"):
        OptimizerRebuilder(optimizer, net.make_blocks(), lr_schedulers=[Overriding(optimizer, 1)])


def test_no_class() -> None:
    """A scheduler instead of its class is refused."""
    with pytest.raises(TypeError, match="`cls` must be a class, got int; pass the scheduler's class itself"):
        rates.register(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("argument", ["scaled_lists", "copied_lists", "scaled_keys", "floors"])
@pytest.mark.parametrize("names", ["base_lrs", ["peaks", 3], 3, None])
def test_names_are_lists_of_strings(registered: None, argument: str, names: Any) -> None:
    """A string in the place of a list would be taken for names of one letter each; it is refused by name."""
    shown = re.escape(repr(names))
    with pytest.raises(TypeError, match=rf"`{argument}` must be a list of names, got {shown}; write \['base_lrs'\]"):
        rates.register(Halving, **{argument: names})
    assert rates.row_of(Halving) is rates.UNKNOWN
    rates.register(Halving, **{argument: ["peaks"]})
    assert getattr(rates.row_of(Halving), argument) == ("peaks",)
