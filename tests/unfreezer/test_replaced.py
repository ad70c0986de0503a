"""A part of the model that was replaced after the unfreezer was made: the blocks' own parts are all as they were."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Net as Plain
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations
from torch.optim import Optimizer

from unfreeze_sched import Block, ProgressiveUnfreezer, RatePreset, UnfreezeSchedule, encoder_blocks
from unfreeze_sched.model.block import gone
from unfreeze_sched.optimizer.watch import Owners

PRESET = RatePreset(unfreeze_start_epoch=1, unfreeze_rate=1, learning_rate_scale=0.5)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(4, 4))
        self.norm = nn.BatchNorm1d(4)
        self.layer1, self.layer2, self.layer3 = (nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        return self.layer3(self.layer2(self.layer1(self.norm(x @ self.token))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = Body()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.encoder(x))


def make() -> tuple[Any, Optimizer, ProgressiveUnfreezer]:
    model = Net()
    optimizer = torch.optim.AdamW(model.fc.parameters(), lr=0.1)
    blocks = encoder_blocks(model, head=[model.fc], example_input=torch.zeros(2, 4))
    schedule = UnfreezeSchedule(preset=PRESET, total_blocks=len(blocks), total_epochs=5)
    return model, optimizer, ProgressiveUnfreezer(blocks, optimizer, schedule)


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh())


def replace_layer(model: Any) -> None:
    model.encoder.layer3 = layer()


def replace_next_layer(model: Any) -> None:
    model.encoder.layer2 = layer()


def take_away(model: Any) -> None:
    del model.encoder.layer3


def replace_all(model: Any) -> None:
    model.encoder = copy.deepcopy(model.encoder)


def replace_token(model: Any) -> None:
    model.encoder.token = nn.Parameter(torch.zeros(4, 4))


def convert(model: Any) -> None:
    nn.SyncBatchNorm.convert_sync_batchnorm(model)


REPLACED = [
    (replace_layer, "encoder.layer3"),
    (replace_next_layer, "encoder.layer2"),
    (take_away, "encoder.layer3"),
    (replace_all, "encoder.token and 4 more"),
    (replace_token, "encoder.token"),
    (convert, "encoder.norm"),
]


@pytest.mark.parametrize(("change", "name"), REPLACED)
@pytest.mark.parametrize("by", ["constructor", "from_model"])
def test_a_replaced_member_is_named(change: Callable[[Any], None], name: str, by: str) -> None:
    """Whatever its block's turn is, the next transition is refused, and nothing has changed; a no-op does not look."""
    model, optimizer, unfreezer = make()
    if by == "from_model":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        blocks = [Block(block.name, block.members, block.member_names) for block in unfreezer.blocks]
        unfreezer = ProgressiveUnfreezer.from_model(model, optimizer, 5, preset=PRESET, blocks=blocks)
    unfreezer.apply(1)  # layer3
    change(model)
    assert not unfreezer.apply(1)
    before = [p.requires_grad for p in model.parameters()]
    for call in (lambda: unfreezer.apply(2), unfreezer.rebuilder.sync):
        with pytest.raises(RuntimeError, match="`blocks` must hold the parts that they were given with, got ") as error:
            call()
        assert f"got {name} replaced (as by assigning a layer, convert_sync_batchnorm" in str(error.value)
    assert [p.requires_grad for p in model.parameters()] == before
    assert len(optimizer.param_groups) == 2


def test_a_member_replaced_before_the_unfreezer_is_named() -> None:
    """Between blocks and unfreezer, too; the first `apply` says so, and `from_model` at once."""
    model = Net()
    blocks = encoder_blocks(model, head=[model.fc], example_input=torch.zeros(2, 4))
    model.encoder.layer2 = layer()
    optimizer = torch.optim.AdamW(model.fc.parameters())
    schedule = UnfreezeSchedule(preset=PRESET, total_blocks=3, total_epochs=5)
    with pytest.raises(RuntimeError, match=r"got encoder\.layer2 replaced"):
        ProgressiveUnfreezer(blocks, optimizer, schedule).apply(1)
    with pytest.raises(ValueError, match="`blocks` must be parts of the model, got ") as error:
        ProgressiveUnfreezer.from_model(model, optimizer, 5, blocks=blocks)
    assert str(error.value) == (
        "`blocks` must be parts of the model, got encoder.layer2, which is not in it; make them from this model"
    )
    with pytest.raises(ValueError, match="got first, which is not in it"):
        ProgressiveUnfreezer.from_model(model, optimizer, 5, blocks=[Block("first", nn.Linear(4, 4))])


def test_blocks_by_hand_know_no_model() -> None:
    """The constructor alone cannot tell for them."""
    model, optimizer, unfreezer = make()
    blocks = [Block(block.name, block.members, block.member_names) for block in unfreezer.blocks]
    unfreezer = ProgressiveUnfreezer(blocks, optimizer, unfreezer.schedule)
    replace_layer(model)
    assert unfreezer.apply(3)


def compile_member(model: Any) -> None:
    model.encoder.layer3 = torch.compile(model.encoder.layer3, backend="eager")


def compile_all(model: Any) -> None:
    model.encoder = torch.compile(model.encoder, backend="eager")


def compile_inside(model: Any) -> None:
    model.encoder.layer3[0] = torch.compile(model.encoder.layer3[0], backend="eager")


def checkpoint_member(model: Any) -> None:
    model.encoder.layer3 = checkpoint_wrapper(model.encoder.layer3)


def add_adapter(model: Any) -> None:
    model.encoder.layer3 = nn.Sequential(model.encoder.layer3, nn.Tanh())


def parametrize_token(model: Any) -> None:
    parametrizations.orthogonal(model.encoder, "token")


def replace_head(model: Any) -> None:
    model.fc = nn.Sequential(model.fc, nn.Tanh())


WRAPPED = [compile_member, compile_all, compile_inside, checkpoint_member, add_adapter, parametrize_token, replace_head]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of dynamo itself
@pytest.mark.parametrize("change", WRAPPED)
def test_a_wrapped_member_is_still_the_models(change: Callable[[Any], None]) -> None:
    """What lies within something else now, parameters and all, joins as ever and trains."""
    model, optimizer, unfreezer = make()
    unfreezer.apply(1)
    change(model)
    for epoch in range(1, 5):
        unfreezer.apply(epoch)
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(parameter in optimizer.state for parameter in model.parameters())


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("wrap", [nn.parallel.DistributedDataParallel, torch.compile])
def test_a_wrapped_model_holds_its_members(wrap: Callable[[Any], Any]) -> None:
    """A wrapper around the whole model, before or after the blocks are found, replaces nothing in it."""
    model, _, unfreezer = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gloo's notices about the local host
        wrapped = wrap(model)
    blocks = encoder_blocks(wrapped, head=[model.fc], example_input=torch.zeros(2, 4))
    assert all(block.root is model for block in blocks)
    assert unfreezer.apply(3)
    replace_layer(model)
    with pytest.raises(RuntimeError, match=r"got encoder\.layer3 replaced"):
        unfreezer.apply(1)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))])  # noqa: S301
def test_copies_look_at_their_own_model(way: Callable[[Any], Any]) -> None:
    """A copy of model, optimizer and unfreezer goes on, and notices what is replaced in its own model alone."""
    parts = make()
    parts[2].apply(1)
    model, optimizer, unfreezer = way(parts)
    assert all(block.root is model for block in unfreezer.blocks)
    assert unfreezer.apply(2)
    replace_layer(parts[0])
    assert unfreezer.apply(3)
    assert len(optimizer.param_groups) == 4
    replace_next_layer(model)
    with pytest.raises(RuntimeError, match=r"got encoder\.layer2 replaced"):
        unfreezer.apply(1)
    with pytest.raises(RuntimeError, match=r"got encoder\.layer3 replaced"):
        parts[2].apply(2)


def test_a_model_that_leads_back_to_itself() -> None:
    """Modules that hold each other, and one that lies in two places, are walked once."""
    model = Net()
    model.encoder.layer1.add_module("parent", model.encoder)
    model.again = model.encoder.layer2
    blocks = [Block("layer2", model.encoder.layer2).within(model)]
    owners = Owners(blocks)
    assert owners.are_whole([0])
    model.encoder.layer2 = layer()
    assert not gone(blocks)
    del model.again
    assert gone(blocks) == ["layer2"]


def test_norms_are_looked_up_when_they_are_held() -> None:
    """A wrapper that came since, around a layer that is the same, may bring a norm without parameters: it is held, too."""
    net = Plain(2)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    schedule = UnfreezeSchedule(preset=RatePreset(unfreeze_start_epoch=1), total_blocks=2, total_epochs=2)
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, schedule, None)
    norm = nn.BatchNorm1d(4, affine=False).double()
    net.blocks[0][0] = nn.Sequential(net.blocks[0][0], norm)
    unfreezer.apply(0)
    net.train()
    assert not norm.training
    before = copy.deepcopy(norm.state_dict())
    net(torch.randn(8, 4).double())
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())
