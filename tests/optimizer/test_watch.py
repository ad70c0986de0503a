"""What goes silently wrong otherwise: no gradient, another hand's tensors, half an accumulation, gradients not reduced."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from unfreeze_sched import Block, MilestonePreset, OptimizerRebuilder, ProgressiveUnfreezer, UnfreezeSchedule


class Net(nn.Module):
    """Three blocks and a head; the first block may be left out of the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(4, 2)
        self.dead = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks[self.dead :]:
            x = block(x)
        return self.head(x)


def make(
    counts: dict[int, int] | None = None, **keywords: Any
) -> tuple[Net, torch.optim.Optimizer, ProgressiveUnfreezer]:
    net = Net()
    optimizer = torch.optim.AdamW(net.head.parameters(), lr=0.1)
    preset = MilestonePreset(milestones=counts or {1: 1, 2: 2, 3: 3}, learning_rate_scale=0.5)
    schedule = UnfreezeSchedule(preset=preset, total_blocks=3, total_epochs=10)
    blocks = [Block(f"block{i}", (block,)) for i, block in enumerate(net.blocks)]
    return net, optimizer, ProgressiveUnfreezer(blocks, optimizer, schedule, **keywords)


def backward(net: nn.Module, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    loss = net(torch.randn(8, 4, generator=generator)).square().mean()
    loss.backward()
    return loss


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    backward(net)
    optimizer.step()
    optimizer.zero_grad()


# The probe


def test_a_parameter_without_a_gradient_is_reported_once() -> None:
    """The first step after unfreezing warns of parameters that no gradient reached, by name, and later ones do not."""
    net, optimizer, unfreezer = make()
    net.dead = True
    unfreezer.apply(2)
    step(net, optimizer)
    unfreezer.apply(3)
    backward(net)
    with pytest.warns(
        UserWarning, match="no gradient reached block0/0.weight, block0/0.bias in the first step"
    ) as caught:
        optimizer.step()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    optimizer.zero_grad()
    step(net, optimizer)  # warnings are errors


def test_the_probe_looks_once() -> None:
    """From a transition to the next step there is something to look at, and at no other time."""
    net, optimizer, unfreezer = make()
    watched = unfreezer.rebuilder.first_step._watched
    unfreezer.apply(0)
    assert not watched
    unfreezer.apply(1)
    assert len(watched) == 1
    step(net, optimizer)
    assert not watched


def test_the_probe_goes_while_other_hooks_stay() -> None:
    """A step hook registered after the transition runs at each step, the one at which the probe leaves included."""
    net, optimizer, unfreezer = make()
    unfreezer.apply(1)
    calls: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(len(calls)))
    step(net, optimizer)
    step(net, optimizer)
    assert calls == [0, 1]
    assert len(optimizer._optimizer_step_pre_hooks) == 2


def test_the_probe_waits_for_a_backward_pass() -> None:
    """A step without any gradient, as some loops take to please a scheduler, tells nothing."""
    net, optimizer, unfreezer = make()
    unfreezer.apply(1)
    optimizer.step()
    net.head.requires_grad_(False)
    with torch.no_grad():
        net(torch.randn(1, 4))
    net.head.requires_grad_(True)
    net.head(torch.randn(8, 4)).sum().backward()
    with pytest.warns(UserWarning, match="no gradient reached block2/0.weight"):
        optimizer.step()


@pytest.mark.parametrize("call", [lambda opt, f: opt.step(f), lambda opt, f: opt.step(closure=f)])
def test_the_probe_looks_within_a_closure(call: Callable[..., Any]) -> None:
    """Where the step calls the backward pass, the gradients are looked at after it, and the loss is passed on."""
    net, optimizer, unfreezer = make()
    unfreezer.apply(1)
    loss = call(optimizer, lambda: backward(net))
    assert loss.item() > 0
    net.dead = True
    optimizer.zero_grad()
    unfreezer.apply(3)
    with pytest.warns(UserWarning, match="no gradient reached block0/0.weight, block0/0.bias in"):
        call(optimizer, lambda: backward(net))


def test_the_probe_can_be_switched_off() -> None:
    """With `probe="off"` nothing is looked at."""
    net, optimizer, unfreezer = make(probe="off")
    net.dead = True
    unfreezer.apply(3)
    step(net, optimizer)


def test_a_long_list_is_cut() -> None:
    """Ten names are enough to see what it is."""
    net = Net()
    optimizer = torch.optim.AdamW(net.head.parameters())
    block = Block("many", tuple(nn.Parameter(torch.zeros(1)) for _ in range(12)))
    rebuilder = OptimizerRebuilder(optimizer, [block])
    rebuilder.sync()
    backward(net)
    with pytest.warns(UserWarning, match=r"many/0, many/1, .*many/9 and 2 more in the first step"):
        optimizer.step()


def test_a_wrong_probe_is_refused() -> None:
    """The value is one of three."""
    with pytest.raises(ValueError, match="`probe` must be one of ranks, local, off, got 'on'; 'ranks' is the default"):
        make(probe="on")


# Orphans


def replace_weights(net: Net) -> None:
    net.load_state_dict({key: value.clone() for key, value in net.state_dict().items()}, assign=True)


def to_empty(net: Net) -> None:
    net.to(device="meta")
    net.to_empty(device="cpu")


def weight_norm(net: Net) -> None:
    for block in net.blocks:
        parametrizations.weight_norm(block[0])


@pytest.mark.parametrize("replace", [replace_weights, to_empty, weight_norm])
@pytest.mark.parametrize("epoch", [1, 2])
def test_orphans_are_named(replace: Callable[[Net], None], epoch: int) -> None:
    """Parameters that the model no longer owns are an error at the next call, be it a transition or not."""
    net, optimizer, unfreezer = make()
    unfreezer.apply(1)
    step(net, optimizer)
    replace(net)
    flags = [p.requires_grad for p in net.parameters()]
    with pytest.raises(
        RuntimeError, match=r"got block\d/0.weight.* in none of its modules any more .*; make optimizer"
    ):
        unfreezer.apply(epoch)
    assert [p.requires_grad for p in net.parameters()] == flags
    assert len(optimizer.param_groups) == 2
    with pytest.raises(RuntimeError, match="in none of its modules any more"):
        unfreezer.rebuilder.sync()


def test_one_replaced_parameter_is_noticed_at_its_transition() -> None:
    """Where a single tensor was replaced, the block that it belongs to cannot join."""
    net, _, unfreezer = make()
    unfreezer.apply(1)
    net.blocks[1][0].bias = nn.Parameter(torch.zeros(4))
    assert not unfreezer.apply(1)
    with pytest.raises(RuntimeError, match=r"got block1/0.bias in none of its modules"):
        unfreezer.apply(2)


def test_a_parametrization_is_no_orphan() -> None:
    """A parametrization moves the parameter into a module of its own; it stays the block's."""
    net, optimizer, unfreezer = make()
    unfreezer.apply(1)
    for block in net.blocks:
        parametrizations.orthogonal(block[0])
    for epoch in (1, 2, 3):
        unfreezer.apply(epoch)
        step(net, optimizer)
    assert all(p in optimizer.state for p in net.parameters())


# Accumulation


def test_a_transition_within_an_accumulation_is_refused() -> None:
    """Between a backward pass and its step nothing joins or leaves, and nothing has changed; afterwards it does."""
    net, optimizer, unfreezer = make()
    unfreezer.apply(0)
    step(net, optimizer)
    backward(net)
    with pytest.raises(
        RuntimeError, match=r"`optimizer` must have used its gradients before blocks join, got an accum"
    ):
        unfreezer.apply(1)
    assert not any(p.requires_grad for p in net.blocks.parameters())
    assert not unfreezer.apply(0)
    optimizer.step()
    assert unfreezer.apply(1)
    backward(net)
    backward(net)
    with pytest.raises(RuntimeError, match="an accumulation that is not over"):
        unfreezer.apply(0)  # refreezes
    net.zero_grad()
    unfreezer.apply(0)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_where_a_loop_clears_gradients_does_not_matter(*, set_to_none: bool, first: bool) -> None:
    """Cleared before the backward pass or after the step, to None or to zero: no accumulation is under way."""
    net, optimizer, unfreezer = make()
    for epoch in range(4):
        unfreezer.apply(epoch)
        for _ in range(2):
            if first:
                optimizer.zero_grad(set_to_none=set_to_none)
            backward(net)
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
            if not first:
                optimizer.zero_grad(set_to_none=set_to_none)
    assert len(optimizer.param_groups) == 4


def test_a_step_left_out_by_the_scaler_is_no_accumulation() -> None:
    """GradScaler leaves a step out when a gradient overflows; what is left then is not waited for."""
    net, optimizer, unfreezer = make()
    scaler = torch.amp.GradScaler("cpu")
    unfreezer.apply(0)
    scaler.scale(net(torch.full((1, 4), torch.inf)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert net.head.bias not in optimizer.state
    unfreezer.apply(1)


def test_construction_in_the_middle_of_a_loop() -> None:
    """Gradients that are there when the unfreezer is made count as used."""
    net = Net()
    optimizer = torch.optim.AdamW(net.head.parameters())
    net.blocks.requires_grad_(False)
    backward(net)
    optimizer.step()
    rebuilder = OptimizerRebuilder(optimizer, [Block("last", (net.blocks[2],))])
    net.blocks[2].requires_grad_(True)
    with warnings.catch_warnings():
        assert rebuilder.sync()


# Modules that were replaced.


def replace_layer(net: nn.Module) -> None:
    net.blocks[1][0] = nn.Linear(4, 4)  # type: ignore[index,operator]


def append_layer(net: nn.Module) -> None:
    net.blocks[1].append(nn.Linear(4, 4))  # type: ignore[index,operator,union-attr]


def remove_layer(net: nn.Module) -> None:
    del net.blocks[1][1]  # type: ignore[index,operator,union-attr]


@pytest.mark.parametrize(
    ("change", "name"), [(replace_layer, "block1/0"), (append_layer, "block1/2"), (remove_layer, "block1/1")]
)
def test_a_replaced_module_is_named(change: Callable[[nn.Module], None], name: str) -> None:
    """A layer that was assigned, added or taken away after the unfreezer was made is refused when its block joins."""
    net, optimizer, unfreezer = make()
    unfreezer.apply(1)
    change(net)
    with pytest.raises(RuntimeError, match=rf"got {re.escape(name)} replaced \(as by assigning a layer, convert_sync"):
        unfreezer.apply(2)
    assert len(optimizer.param_groups) == 2


def test_converted_norms_are_noticed() -> None:
    """`convert_sync_batchnorm` keeps the parameters, so only the modules tell."""
    body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    head = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    rebuilder = OptimizerRebuilder(optimizer, [Block("body", (body,))])
    assert nn.SyncBatchNorm.convert_sync_batchnorm(body) is body
    with pytest.raises(RuntimeError, match="got body/1 replaced"):
        rebuilder.sync()
    assert len(optimizer.param_groups) == 1
