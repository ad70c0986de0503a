"""Frozen blocks are really frozen, and come back to what the user asked for."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

from unfreeze_sched import Block
from unfreeze_sched.model.freezing import freeze, is_norm, set_requires_grad, unfreeze


def make_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.Dropout(0.5)),
        nn.Flatten(),
        nn.LazyLinear(2),
    )


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    net = make_net()
    net(torch.randn(2, 3, 6, 6))
    return net


def block_of(net: nn.Sequential) -> Block:
    return Block("conv", (net[0],))


def statistics(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def train_steps(net: nn.Sequential, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        net.train()
        net(torch.randn(4, 3, 6, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        torch.optim.Adafactor,
    ],
)
def test_a_frozen_block_does_not_move(net: nn.Sequential, make: object) -> None:
    """Weights, running statistics and batch counts stay to the bit over steps of an optimizer that holds them (traps 17, 33)."""
    optimizer = make(net.parameters())  # type: ignore[operator]
    train_steps(net, optimizer)
    net(torch.randn(4, 3, 6, 6)).sum().backward()  # a stale gradient, that must not be applied
    freeze(block_of(net))
    before, head = statistics(net[0]), statistics(net[2])
    train_steps(net, optimizer)
    assert same(before, statistics(net[0]))
    assert not same(head, statistics(net[2]))


def test_the_check_can_fail(net: nn.Sequential) -> None:
    """With the norms left alone the running statistics drift, as the test above would notice."""
    optimizer = torch.optim.AdamW(net.parameters())
    set_requires_grad(block_of(net).parameters(), requires_grad=False, flipped=[])
    before = statistics(net[0])
    train_steps(net, optimizer)
    assert not same(before, statistics(net[0]))


def test_norms_stay_in_evaluation(net: nn.Sequential) -> None:
    """After `train()` on any parent the frozen norms are in evaluation, affine-free ones too; the rest is not."""
    freeze(block_of(net))
    wrapped = nn.ModuleList([net])
    for _ in range(2):
        wrapped.train()
        assert [module.training for module in net[0]] == [True, False, False, True]
        wrapped.eval()
        assert not any(module.training for module in net.modules())


@pytest.mark.parametrize("mode", [True, False])
def test_unfrozen_norms_take_the_mode_last_asked_for(net: nn.Sequential, mode: bool) -> None:
    """A norm that is given back is in the mode that the user asked the model for in the meantime."""
    net.eval()
    freeze(block_of(net))
    net.train(mode)
    unfreeze(block_of(net))
    assert all(module.training is mode for module in net[0])
    assert not any("train" in vars(module) for module in net.modules())
    net.train(not mode)
    assert all(module.training is not mode for module in net[0])


def test_gradients_are_dropped_on_both_transitions(net: nn.Sequential) -> None:
    """No gradient from before a transition is left for a step or for clipping (trap 18)."""
    block = block_of(net)
    net(torch.randn(2, 3, 6, 6)).sum().backward()
    freeze(block)
    assert all(p.grad is None and not p.requires_grad for p in block.parameters())
    for p in block.parameters():
        p.grad = torch.ones_like(p)
    unfreeze(block)
    assert all(p.grad is None and p.requires_grad for p in block.parameters())


def test_unfreezing_what_is_trainable_keeps_its_gradient(net: nn.Sequential) -> None:
    """Idempotent: a block that does not change keeps the gradients that it has."""
    block = block_of(net)
    net(torch.randn(2, 3, 6, 6)).sum().backward()
    grads = [p.grad for p in block.parameters()]
    unfreeze(block)
    assert all(p.grad is grad for p, grad in zip(block.parameters(), grads, strict=True))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_frozen_model_can_be_copied(net: nn.Sequential, way: str) -> None:
    """Copies of a frozen model keep their own norms in evaluation, and share nothing with the original."""
    freeze(block_of(net))
    if way == "deepcopy":
        twin = copy.deepcopy(net)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(net))  # noqa: S301  # made here
    else:
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    twin.train()
    assert [module.training for module in twin[0]] == [True, False, False, True]
    unfreeze(block_of(twin))
    net.train()
    assert all(module.training for module in twin[0])
    assert [module.training for module in net[0]] == [True, False, False, True]


def test_the_state_dict_is_untouched(net: nn.Sequential) -> None:
    """Holding norms adds nothing to a model's state dict."""
    keys = list(net.state_dict())
    freeze(block_of(net))
    assert list(net.state_dict()) == keys


@pytest.mark.parametrize(
    "make",
    [
        lambda: parametrizations.spectral_norm(nn.Linear(6, 6)),
        lambda: spectral_norm(nn.Linear(6, 6)),
    ],
)
def test_spectral_norm_does_not_iterate(make: object) -> None:
    """The power iteration of a frozen spectral norm stands still, by its parametrization and by the older hook."""
    module: nn.Module = make()  # type: ignore[operator]
    outer = nn.Sequential(module)
    freeze(Block("spectral", (module,)))
    outer.train()
    before = statistics(module)
    for _ in range(3):
        outer(torch.randn(2, 6))
    assert same(before, statistics(module))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.BatchNorm1d(2), True),
        (nn.SyncBatchNorm(2), True),
        (nn.InstanceNorm2d(2, track_running_stats=True), True),
        (nn.BatchNorm2d(2, track_running_stats=False), True),
        (nn.LayerNorm(2), True),
        (nn.GroupNorm(1, 2), True),
        (nn.RMSNorm(2), True),
        (nn.Dropout(), False),
        (nn.Linear(2, 2), False),
        (nn.Sequential(nn.BatchNorm1d(2)), False),
    ],
)
def test_is_norm(module: nn.Module, expected: bool) -> None:
    """Norm layers are told by torch's classes, and containers of norms are none."""
    assert is_norm(module) is expected


def test_foreign_norms_are_told_by_their_statistics() -> None:
    """A norm of another library, told by its running statistics, is held as well."""

    class ForeignNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.register_buffer("running_var", torch.ones(1))

    norm = ForeignNorm()
    freeze(Block("norm", (norm,)))
    nn.Sequential(norm).train()
    assert not norm.training


def test_children_of_a_norm_follow_train() -> None:
    """A norm with children of its own, as timm's norm-and-activation layers are, still passes `train()` on to them."""

    class NormAct(nn.BatchNorm2d):
        def __init__(self) -> None:
            super().__init__(2)
            self.drop = nn.Dropout()

    norm = NormAct()
    freeze(Block("norm", (norm,)))
    norm.eval()
    assert not norm.drop.training
    norm.train()
    assert (norm.training, norm.drop.training) == (False, True)
