"""An accumulation that is not over is told from used gradients, whatever parameters the optimizer holds."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from counting import work_of
from torch import Tensor, nn
from torch.optim import Optimizer

from unfreeze_sched import Block, OptimizerRebuilder

PENDING = "`optimizer` must have used its gradients before blocks join, got an accumulation that is not over; call"
FLOAT8 = torch.float8_e4m3fn


class Descent(Optimizer):
    """Gradient descent on what no optimizer of torch's takes, such as float8."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        del closure
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.copy_(p.float() - group["lr"] * p.grad.float())

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None if set_to_none or p.grad is None else torch.zeros_like(p)


class Net(nn.Module):
    """Two blocks, and a head with one parameter more, smaller than the others, which the loss may use."""

    def __init__(self, odd: nn.Parameter | None = None, *, uses: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2)).requires_grad_(False)
        self.odd, self.uses = odd, uses
        self.head = nn.Linear(4, 2)

    def head_parameters(self) -> list[nn.Parameter]:
        return [*([] if self.odd is None else [self.odd]), *self.head.parameters()]

    def loss(self) -> Tensor:
        if self.odd is not None and self.odd.dtype == FLOAT8:
            self.odd.grad = None  # torch cannot add to it
        x = torch.randn(8, 4)
        for block in self.blocks:
            x = torch.tanh(block(x))
        loss = self.head(x).square().mean()
        return loss + self.odd.float().sum() if self.odd is not None and self.uses else loss

    def rebuilder(self, optimizer: Optimizer) -> OptimizerRebuilder:
        return OptimizerRebuilder(optimizer, [Block(f"block{i}", (block,)) for i, block in enumerate(self.blocks)])


class Looked(nn.Module):
    """A head that looks its output up, by sparse gradients, and two blocks behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Embedding(6, 2, sparse=True) for _ in range(2)).requires_grad_(False)
        self.head = nn.Embedding(6, 2, sparse=True)

    head_parameters, rebuilder = nn.Module.parameters, Net.rebuilder

    def loss(self) -> Tensor:
        index = torch.tensor([1, 1, 2])
        total = self.head(index) + sum(block(index) for block in self.blocks)
        return torch.as_tensor(total).square().mean()


def odd_ones() -> dict[str, Callable[[], Any]]:
    """Networks whose smallest own parameter tells nothing, or not in the common way."""
    return {
        "plain": Net,
        "frozen": lambda: Net(nn.Parameter(torch.zeros(1), requires_grad=False)),
        "empty": lambda: Net(nn.Parameter(torch.zeros(0)), uses=True),
        "unused": lambda: Net(nn.Parameter(torch.zeros(1))),
        "meta": lambda: Net(nn.Parameter(torch.zeros(1, device="meta"))),
        "lazy": lambda: Net(nn.UninitializedParameter()),
        "float8": lambda: Net(nn.Parameter(torch.ones(1).to(FLOAT8)), uses=True),
        "bfloat16": lambda: Net(nn.Parameter(torch.ones(1, dtype=torch.bfloat16)), uses=True),
        "sparse": Looked,
    }


def optimizer_of(net: Any) -> Optimizer:
    parameters = net.head.parameters() if isinstance(net, Looked) else net.head_parameters()
    return Descent(parameters) if isinstance(net, Net) else torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize("name", odd_ones())
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_legitimate_loop_is_never_refused(name: str, *, set_to_none: bool, first: bool) -> None:
    """Gradients cleared before the backward pass or after the step, to None or to zero: each block joins in its turn."""
    net = odd_ones()[name]()
    optimizer = optimizer_of(net)
    rebuilder = net.rebuilder(optimizer)
    for number in range(3):
        if number:
            net.blocks[-number].requires_grad_(True)
        assert bool(rebuilder.sync()) == bool(number)
        for _ in range(2):
            if first:
                optimizer.zero_grad(set_to_none=set_to_none)
            net.loss().backward()
            optimizer.step()
            if not first:
                optimizer.zero_grad(set_to_none=set_to_none)
    assert len(optimizer.param_groups) == 3


@pytest.mark.parametrize("name", odd_ones())
@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("clears", [True, False])
def test_an_accumulation_is_noticed(name: str, steps: int, *, clears: bool) -> None:
    """Before the first step and after some, whether or not the gradients were cleared after it; given up, none is left."""
    net = odd_ones()[name]()
    optimizer = optimizer_of(net)
    rebuilder = net.rebuilder(optimizer)
    for _ in range(steps):
        net.loss().backward()
        optimizer.step()
        if clears:
            optimizer.zero_grad()
    net.loss().backward()
    net.blocks[1].requires_grad_(True)
    with pytest.raises(RuntimeError, match=PENDING):
        rebuilder.sync()
    assert len(optimizer.param_groups) == 1
    optimizer.zero_grad()
    assert rebuilder.sync()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize(
    "of_kind",
    [lambda x: x, lambda x: x.to(FLOAT8), Tensor.cfloat, Tensor.bfloat16, Tensor.to_sparse, Tensor.to_sparse_csr],
    ids=["dense", "float8", "complex", "bfloat16", "sparse", "csr"],
)
def test_zero_is_told_from_other_numbers(of_kind: Callable[[Tensor], Tensor]) -> None:
    """Whatever the kind of the gradient: zero is what zero_grad leaves, what is not finite GradScaler leaves."""
    own = nn.Parameter(of_kind(torch.eye(2)))
    rebuilder = OptimizerRebuilder(Descent([own]), [Block("block", (nn.Linear(2, 2).requires_grad_(False),))])
    for number, is_pending in ((0.0, False), (1.0, True), (torch.nan, False)):
        own.grad = of_kind(torch.tensor([[number, 0.0], [0.0, 0.0]]))
        assert rebuilder.accumulation.is_pending() == is_pending


def test_a_gradient_on_meta_is_no_witness() -> None:
    """It holds no number."""
    own = nn.Parameter(torch.ones(2, device="meta"))
    rebuilder = OptimizerRebuilder(Descent([own]), [Block("block", (nn.Linear(2, 2).requires_grad_(False),))])
    own.sum().backward()
    assert not rebuilder.accumulation.is_pending()


@pytest.mark.parametrize("used", range(9))
def test_any_parameter_may_be_the_one_that_the_loss_uses(used: int) -> None:
    """Of many parameters, all but one without a gradient, the one is found: before any step, and after steps."""
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(9)]
    block = nn.Linear(2, 2).requires_grad_(False)
    optimizer = torch.optim.SGD([{"params": parameters[:4]}, {"params": parameters[4:]}], lr=0.1)
    rebuilder = OptimizerRebuilder(optimizer, [Block("block", (block,))])
    parameters[used].sum().backward()
    assert rebuilder.accumulation.is_pending()
    optimizer.step()
    assert not rebuilder.accumulation.is_pending()
    parameters[used].sum().backward()
    assert rebuilder.accumulation.is_pending()


def test_several_witnesses() -> None:
    """A backward pass that reaches one of two heads alone, of one optimizer, is an accumulation as well."""
    heads = [nn.Linear(4, 2), nn.Linear(4, 2)]
    block = nn.Linear(4, 4).requires_grad_(False)
    optimizer = torch.optim.SGD([p for head in heads for p in head.parameters()], lr=0.1)
    rebuilder = OptimizerRebuilder(optimizer, [Block("block", (block,))])
    for number in (0, 1):
        for head in heads:
            head(block(torch.ones(1, 4))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        heads[number](block(torch.ones(1, 4))).sum().backward()
        assert rebuilder.accumulation.is_pending()
        optimizer.zero_grad()


def test_what_trains_may_change() -> None:
    """Own parameters that are frozen and thawed by hand are followed, from the next step on."""
    heads = [nn.Linear(4, 2), nn.Linear(4, 2).requires_grad_(False)]
    block = nn.Linear(4, 4).requires_grad_(False)
    optimizer = torch.optim.SGD([p for head in heads for p in head.parameters()], lr=0.1)
    rebuilder = OptimizerRebuilder(optimizer, [Block("block", (block,))])
    for number in (0, 1, 0, 1):
        for index, head in enumerate(heads):
            head.requires_grad_(index == number)
        for _ in range(2):
            optimizer.zero_grad()
            heads[number](block(torch.ones(1, 4))).sum().backward()
            optimizer.step()
            assert not rebuilder.accumulation.is_pending()
        heads[number](block(torch.ones(1, 4))).sum().backward()
        assert rebuilder.accumulation.is_pending()


def test_joined_groups_are_asked_too() -> None:
    """Where the head has been frozen for good, the blocks that joined tell."""
    net = Net()
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    rebuilder = net.rebuilder(optimizer)
    net.blocks[1].requires_grad_(True)
    rebuilder.sync()
    net.head.requires_grad_(False)
    net.loss().backward()
    optimizer.step()
    assert not rebuilder.accumulation.is_pending()
    net.loss().backward()
    assert rebuilder.accumulation.is_pending()


def test_a_step_looks_at_a_handful() -> None:
    """What a step costs does not grow with the number of parameters, nor does asking."""

    def work(number: int) -> tuple[int, int]:
        parameters = [nn.Parameter(torch.ones(2)) for _ in range(number)]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        rebuilder = OptimizerRebuilder(optimizer, [Block("block", (nn.Linear(2, 2).requires_grad_(False),))])
        torch.cat(parameters).sum().backward()
        optimizer.step()
        accumulation = rebuilder.accumulation
        return work_of(accumulation.after_step), work_of(accumulation.is_pending)

    assert work(8) == work(400)


def test_no_gradient_is_kept() -> None:
    """What tells an accumulation from a used gradient holds none in memory."""
    net = Net()
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    rebuilder = net.rebuilder(optimizer)
    net.loss().backward()
    optimizer.step()
    kept = [weakref.ref(p.grad) for p in net.head.parameters()]
    assert all(reference() is not None for reference in kept)
    optimizer.zero_grad()
    gc.collect()
    assert [reference() for reference in kept] == [None, None]
    assert not rebuilder.accumulation.is_pending()


def test_a_new_gradient_at_an_old_address_is_new() -> None:
    """A gradient that was freed is not taken for the next one, which torch's allocator often puts into its place."""
    net = Net()
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    rebuilder = net.rebuilder(optimizer)
    for _ in range(20):
        net.loss().backward()
        optimizer.step()
        assert not rebuilder.accumulation.is_pending()
        optimizer.zero_grad()
        net.loss().backward()
        assert rebuilder.accumulation.is_pending()
        optimizer.zero_grad()


def test_all_unfreezers_of_an_optimizer_share_the_watch() -> None:
    """One that is made within an accumulation knows of the steps before, if another was there."""
    net = Net()
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    first = net.rebuilder(optimizer)
    net.loss().backward()
    optimizer.step()
    assert not net.rebuilder(optimizer).accumulation.is_pending()
    net.loss().backward()
    later = net.rebuilder(optimizer)
    assert later.accumulation is first.accumulation
    net.blocks[1].requires_grad_(True)
    with pytest.raises(RuntimeError, match=PENDING):
        later.sync()


def test_a_watch_that_stays() -> None:
    """It looks on when its unfreezer has gone, past the end of a warm-up."""
    net = Net()
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    rebuilder = OptimizerRebuilder(optimizer, [Block("block", (net.blocks[1].requires_grad_(True),))], warmup_steps=1)
    rebuilder.accumulation.stay()
    rebuilder.sync()
    for _ in range(3):
        net.loss().backward()
        optimizer.step()
    del rebuilder
    gc.collect()
    net.loss().backward()
    later = OptimizerRebuilder(optimizer, [Block("other", (net.blocks[0],))])
    assert later.accumulation.is_pending()


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["plain", "sparse"])
def test_copies_go_on(way: str, name: str) -> None:
    """A copied run notices an accumulation of its own, and its legitimate loop goes on."""
    net = odd_ones()[name]()
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    rebuilder = net.rebuilder(optimizer)
    net.loss().backward()
    optimizer.step()
    run = net, optimizer, rebuilder
    net, optimizer, rebuilder = (
        copy.deepcopy(run) if way == "deepcopy" else pickle.loads(pickle.dumps(run))  # noqa: S301  # its own
    )
    optimizer.zero_grad()
    net.loss().backward()
    net.blocks[1].requires_grad_(True)
    with pytest.raises(RuntimeError, match=PENDING):
        rebuilder.sync()
    optimizer.step()
    assert rebuilder.sync()


def test_timms_lookahead() -> None:
    """It has hooks of its own, which its step does not call until its `zero_grad` was called once."""
    net = Net()
    inner = torch.optim.SGD(net.head.parameters(), lr=0.1)
    optimizer = pytest.importorskip("timm.optim").Lookahead(inner)
    rebuilder = net.rebuilder(optimizer)
    for _ in range(2):
        net.zero_grad()
        net.loss().backward()
        optimizer.step()
    assert not rebuilder.accumulation.is_pending()
    net.loss().backward()
    assert rebuilder.accumulation.is_pending()


# Two losses, two optimizers.


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, z: Tensor) -> Tensor:
        return torch.as_tensor(self.net(z))


def gan() -> tuple[Generator, Net, Optimizer, Optimizer, OptimizerRebuilder]:
    torch.manual_seed(0)
    generator, critic = Generator(), Net()
    of_generator = torch.optim.Adam(generator.parameters(), lr=0.01)
    of_critic = torch.optim.Adam(critic.head.parameters(), lr=0.01)
    return generator, critic, of_generator, of_critic, critic.rebuilder(of_critic)


def rate(critic: Net, x: Tensor) -> Tensor:
    for block in critic.blocks:
        x = torch.tanh(block(x))
    return torch.as_tensor(critic.head(x)[:, 0])


@pytest.mark.parametrize("clears", [True, False])
def test_a_gan(*, clears: bool) -> None:
    """The generator's loss leaves gradients in the discriminator; its optimizer's zero_grad before `sync` is the cure."""
    generator, critic, of_generator, of_critic, rebuilder = gan()
    entropy = nn.functional.binary_cross_entropy_with_logits
    for epoch in range(3):
        if epoch:
            critic.blocks[-epoch].requires_grad_(True)
        if clears:
            of_critic.zero_grad()
        if epoch and not clears:
            with pytest.raises(RuntimeError) as caught:
                rebuilder.sync()
            assert str(caught.value) == (
                "`optimizer` must have used its gradients before blocks join, got an accumulation that is not over; "
                "call optimizer.step() and zero_grad() first, or zero_grad() alone, as for a GAN's discriminator, in "
                "which the generator's loss leaves gradients"
            )
            of_critic.zero_grad()
        assert bool(rebuilder.sync()) == bool(epoch)
        for _ in range(2):
            fake = generator(torch.randn(8, 2))
            real = torch.randn(8, 4) + 1
            of_critic.zero_grad()
            (
                entropy(rate(critic, real), torch.ones(8)) + entropy(rate(critic, fake.detach()), torch.zeros(8))
            ).backward()
            of_critic.step()
            of_generator.zero_grad()
            entropy(rate(critic, fake), torch.ones(8)).backward()
            of_generator.step()
    assert len(of_critic.param_groups) == 3
    assert all(p in of_critic.state for p in critic.parameters())
