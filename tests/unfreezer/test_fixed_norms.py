"""`norms="fixed"`: batch norms as they came, statistics, weights and biases, while all else of their blocks trains."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from unfreeze_sched import Block, MilestonePreset, ProgressiveUnfreezer, RatePreset, UnfreezeSchedule
from unfreeze_sched import arguments as flags
from unfreeze_sched.model.freezing import Norms

PRESET = RatePreset(unfreeze_start_epoch=1, unfreeze_rate=1, learning_rate_scale=0.5)
DOWN = MilestonePreset(milestones={1: 1, 2: 3, 3: 1, 4: 2, 5: 3}, learning_rate_scale=0.5)


class Net(nn.Module):
    """Blocks with a norm of each sort, and a batch norm in the head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.Tanh()) for _ in range(3)
        )
        self.head = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
        for norm in self.norms():
            nn.init.uniform_(norm.weight)
            nn.init.uniform_(norm.running_mean)
        self.double()

    def norms(self) -> list[Any]:
        return [block[1] for block in self.blocks]

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)

    def make_blocks(self) -> list[Block]:
        return [Block(f"block{i}", block, [f"blocks.{i}"]) for i, block in enumerate(self.blocks)]


def make(
    preset: Any = PRESET, optimizer_of: Callable[..., Any] = torch.optim.AdamW, **keywords: Any
) -> tuple[Net, Any, ProgressiveUnfreezer]:
    net = Net()
    optimizer = optimizer_of(net.head.parameters(), lr=0.1)
    schedule = UnfreezeSchedule(preset=preset, total_blocks=3, total_epochs=8)
    return net, optimizer, ProgressiveUnfreezer(net.make_blocks(), optimizer, schedule, norms="fixed", **keywords)


def train(net: Net, optimizer: Any, seed: int = 0, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        net.train()
        net(torch.randn(8, 4, generator=generator).double()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def held(optimizer: Any) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


@pytest.mark.parametrize("preset", [PRESET, DOWN], ids=["rate", "refreezing"])
@pytest.mark.parametrize("on_refreeze", ["keep", "drop"])
@pytest.mark.parametrize("membership", ["late", "declared"])
def test_batch_norms_stay_as_they_came(preset: Any, on_refreeze: str, membership: str) -> None:
    """To the bit, in no group, without a gradient; LayerNorm and the head's own train, and nothing else is missing."""
    net, optimizer, unfreezer = make(preset, on_refreeze=on_refreeze, membership=membership)
    before = [copy.deepcopy(norm.state_dict()) for norm in net.norms()]
    head = copy.deepcopy(net.head.state_dict())
    seen: set[str] = set()
    for epoch in range(8):
        change = unfreezer.apply(epoch)
        seen.update(change.added)
        assert not unfreezer.rebuilder.sync()
        for norm in net.norms():
            assert not any(p.requires_grad or p.grad is not None or id(p) in held(optimizer) for p in norm.parameters())
        train(net, optimizer, epoch)
    for norm, was in zip(net.norms(), before, strict=True):
        assert all(torch.equal(value, was[key]) for key, value in norm.state_dict().items())
    assert not any(torch.equal(value, head[key]) for key, value in net.head.state_dict().items())
    own = {name for name, _ in net.named_parameters() if name.startswith("blocks.") and name.split(".")[2] != "1"}
    assert seen == own
    assert {name for name, p in net.named_parameters() if name in own and id(p) in held(optimizer)} == own
    assert all(past.learning_rates or not past.number for past in unfreezer.history)


def test_equals_a_run_with_batch_norms_frozen_by_hand() -> None:
    """Weights are those of a plain loop whose batch norms are in evaluation and not trainable, to the bit."""
    net, optimizer, unfreezer = make(optimizer_of=torch.optim.SGD)
    twin = Net()
    bodies = [[*block[0].parameters(), *block[2].parameters()] for block in reversed(twin.blocks)]
    groups = [{"params": twin.head.parameters()}, *({"params": body, "lr": 0.05} for body in bodies)]
    theirs = torch.optim.SGD(groups, lr=0.1)
    for epoch in range(5):
        unfreezer.apply(epoch)
        for i, block in enumerate(twin.blocks):
            block.requires_grad_(i >= 3 - epoch)
            block[1].requires_grad_(False)
            block[1].train = lambda _=True: None
            block[1].training = False
        train(net, optimizer, epoch)
        train(twin, theirs, epoch)
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


def test_the_whole_models_optimizer_gives_them_up() -> None:
    """`from_model` takes them out with their blocks, for good, and has nothing to warn of."""
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    unfreezer = ProgressiveUnfreezer.from_model(
        net, optimizer, 5, preset=PRESET, blocks=net.make_blocks(), norms="fixed"
    )
    unfreezer.apply(4)
    norms = {id(p) for norm in net.norms() for p in norm.parameters()}
    assert held(optimizer) == {id(p) for p in net.parameters()} - norms


def test_what_cannot_be_held_is_refused() -> None:
    """Norms that the optimizer trains, blocks without batch norms, a block of norms alone; nothing has changed."""
    net = Net()
    schedule = UnfreezeSchedule(preset=PRESET, total_blocks=3, total_epochs=5)
    optimizer = torch.optim.AdamW([*net.head.parameters(), *net.blocks[1][1].parameters()])
    for membership in ("late", "declared"):
        with pytest.raises(ValueError, match=r"not hold parameters of the blocks yet, got blocks\.1\.1\.weight and"):
            ProgressiveUnfreezer(net.make_blocks(), optimizer, schedule, norms="fixed", membership=membership)  # type: ignore[arg-type]
    assert len(optimizer.param_groups) == 1
    assert all(p.requires_grad for p in net.parameters())

    plain = [Block(str(i), (nn.Linear(2, 2), nn.LayerNorm(2), nn.InstanceNorm1d(2, affine=True))) for i in range(3)]
    with pytest.raises(ValueError, match="`norms` must find") as error:
        ProgressiveUnfreezer(plain, torch.optim.AdamW(net.head.parameters()), schedule, norms="fixed")
    assert str(error.value) == (
        "`norms` must find batch norms to hold, got 'fixed' for blocks without any; leave it out, since LayerNorm and "
        "its like keep no statistics, and train with their block"
    )
    lone = [Block("stem", nn.BatchNorm2d(2)), *net.make_blocks()[1:]]
    with pytest.raises(ValueError, match="`norms` must leave") as error:
        ProgressiveUnfreezer(lone, torch.optim.AdamW(net.head.parameters()), schedule, norms="fixed")
    assert str(error.value) == (
        "`norms` must leave each block something to train, got 'fixed' for 'stem', of norms alone; put them into the "
        "block beside it"
    )


def test_a_refused_transition_leaves_them_alone() -> None:
    """Flags and modes are set once the change is sure."""
    net, optimizer, unfreezer = make()
    net(torch.randn(8, 4).double()).sum().backward()
    with pytest.raises(RuntimeError, match="an accumulation that is not over"):
        unfreezer.apply(1)
    assert all(p.requires_grad and p.grad is not None for norm in net.norms() for p in norm.parameters())
    optimizer.zero_grad()
    unfreezer.apply(1)
    assert not any(p.requires_grad or p.grad is not None for norm in net.norms() for p in norm.parameters())


@pytest.mark.parametrize("way", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))])  # noqa: S301
def test_copies_and_resumes_go_on(way: Callable[[Any], Any]) -> None:
    """A copy and a resumed run end as the run itself does, to the bit."""
    parts = make(DOWN)
    for epoch in range(3):
        parts[2].apply(epoch)
        train(parts[0], parts[1], epoch)
    twin = way(parts)
    again = make(DOWN)
    again[0].load_state_dict(parts[0].state_dict())
    again[2].load_state_dict(json.loads(json.dumps(parts[2].state_dict())))
    again[1].load_state_dict(copy.deepcopy(parts[1].state_dict()))  # torch would share the moments
    for net, optimizer, unfreezer in (parts, twin, again):
        for epoch in range(3, 8):
            unfreezer.apply(epoch)
            train(net, optimizer, epoch)
    for other in (twin, again):
        assert all(torch.equal(p, q) for p, q in zip(parts[0].parameters(), other[0].parameters(), strict=True))
        assert not any(p.requires_grad for norm in other[0].norms() for p in norm.parameters())


def test_another_kind_of_norms_is_another_run() -> None:
    """A state of blocks that train their norms is refused, which would land in the wrong places."""
    net, _, unfreezer = make()
    schedule = unfreezer.schedule
    trained = ProgressiveUnfreezer(net.make_blocks(), torch.optim.AdamW(net.head.parameters()), schedule)
    with pytest.raises(ValueError, match=r"got blocks\['block0'\]\['blocks.0.1.weight'\] saved alone"):
        unfreezer.load_state_dict(trained.state_dict())


def test_what_counts_as_a_batch_norm() -> None:
    """Another library's norm with running statistics does; a layer under spectral norm, which has buffers, does not."""

    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.inner = nn.Linear(2, 2)
            self.register_buffer("running_var", torch.ones(1))

    block = Block("block", (nn.SyncBatchNorm(2), Foreign(), spectral_norm(nn.Linear(2, 2)), nn.GroupNorm(1, 2)))
    head = nn.Linear(2, 2)
    schedule = UnfreezeSchedule(preset=PRESET, total_blocks=1, total_epochs=3)
    unfreezer = ProgressiveUnfreezer([block], torch.optim.AdamW(head.parameters()), schedule, norms="fixed")
    assert unfreezer.apply(1).added == (
        *("block/1.inner.weight", "block/1.inner.bias", "block/2.bias", "block/2.weight_orig"),
        *("block/3.weight", "block/3.bias"),
    )


def test_the_flags_offer_all_kinds() -> None:
    """What a command line offers is what the unfreezer takes."""
    assert tuple(flags._FLAGS["unfreeze_norms"][2]["choices"]) == get_args(Norms)
