"""What moves between devices: models after their blocks were found, checkpoints, and the weights that a guard keeps."""

from __future__ import annotations

import io
from typing import Any

import bits
import pytest
import torch
from oracle import Net, Run, differences, train_in_lockstep, twins
from torch import Tensor, nn
from torch.optim import lr_scheduler

from unfreeze_sched import MilestonePreset, ProgressiveUnfreezer, UnfreezeSchedule, encoder_blocks
from unfreeze_sched.guards import OverfitGuard

# A refreezing among them.
SCHEDULE = UnfreezeSchedule(preset=MilestonePreset(milestones={1: 2, 3: 1, 5: 3}), total_blocks=3, total_epochs=6)
OPTIMIZERS: dict[str, Any] = {
    "AdamW, foreach": lambda groups: torch.optim.AdamW(groups, foreach=True),
    "AdamW, fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "SGD": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "Adafactor": torch.optim.Adafactor,
}


def make(name: str, device: str, seed: int = 0) -> Run:
    """A run of the library, other weights with another seed."""
    schedulers = lambda optimizer: [lr_scheduler.CosineAnnealingLR(optimizer, 20)]  # noqa: E731
    return twins(SCHEDULE, OPTIMIZERS[name], schedulers, scale=0.5, seed=seed, device=device)[0]


def unfreezer_of(run: Run) -> ProgressiveUnfreezer:
    return run.apply.__self__  # type: ignore[attr-defined]


def saved(run: Run) -> io.BytesIO:
    """A checkpoint file."""
    parts = (unfreezer_of(run), run.model, run.schedulers[0], run.optimizer)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    return file


def resumed(name: str, file: io.BytesIO, device: str, map_location: str) -> Run:
    """A run in new objects that goes on from a checkpoint file."""
    run = make(name, device, seed=5)
    states = torch.load(file, map_location=map_location, weights_only=True)
    for part, state in zip((unfreezer_of(run), run.model, run.schedulers[0], run.optimizer), states, strict=True):
        part.load_state_dict(state)
    return run


@pytest.mark.parametrize("map_location", ["cpu", "device"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resume(name: str, map_location: str, device: str) -> None:
    """From a checkpoint that was read into the CPU's memory, or the card's, the run goes on to the same bits."""
    whole, other = make(name, device), make(name, device)
    assert train_in_lockstep(whole, other, range(4)) == []  # to where one block is frozen again
    again = resumed(name, saved(other), device, device if map_location == "device" else "cpu")
    assert differences(again, whole) == []
    assert train_in_lockstep(again, whole, range(4, 6), seed=2) == []
    moments = [value for state in again.optimizer.state.values() for key, value in state.items() if key != "step"]
    assert {value.device.type for value in moments if isinstance(value, Tensor)} == {device}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_from_the_card_to_the_cpu(name: str, card: str) -> None:
    """A checkpoint of a card goes on where there is none, with the same states at first."""
    run = make(name, card)
    train_in_lockstep(run, make(name, card), range(4))
    again = resumed(name, saved(run), "cpu", "cpu")
    assert bits.differences(again.model.state_dict(), run.model.state_dict()) == []
    assert bits.differences(again.optimizer.state_dict(), run.optimizer.state_dict()) == []
    assert train_in_lockstep(again, resumed(name, saved(run), "cpu", "cpu"), range(4, 6)) == []
    assert {p.device.type for group in again.optimizer.param_groups for p in group["params"]} == {"cpu"}


@pytest.mark.parametrize("before", ["blocks", "unfreezer"])
def test_a_model_that_moves(before: str, device: str) -> None:
    """`to` keeps the parameters, so blocks, optimizer and unfreezer may be made before: the same bits."""

    def build(moves: bool) -> Run:
        torch.manual_seed(0)
        net = Net(3)
        if not moves:
            net.to(device)
        blocks = net.make_blocks()
        if before == "blocks":
            net.to(device)
        optimizer = torch.optim.AdamW(net.head.parameters(), fused=True)
        run = Run(net, optimizer, [], ProgressiveUnfreezer(blocks, optimizer, SCHEDULE, None).apply)
        net.to(device)
        return run

    run, other = build(moves=True), build(moves=False)
    assert train_in_lockstep(run, other, range(6)) == []
    assert {p.device.type for group in run.optimizer.param_groups for p in group["params"]} == {device}


def test_a_guard_restores_where_the_model_is(device: str) -> None:
    """The best weights are kept on the CPU, go through a checkpoint, and come back to the model's device to the bit."""
    run = make("AdamW, fused", device)
    net = run.model
    guard, again = (OverfitGuard(patience=2, model=net) for _ in range(2))
    for number, loss in [(0, 0.9), (1, 0.5)]:
        guard.follow(number, total=3)
        guard.step(torch.tensor(loss, device=device))  # type: ignore[arg-type]  # a tensor will do
    best = {name: value.clone() for name, value in net.state_dict().items()}
    state = guard.state_dict()
    assert {value.device.type for value in state["weights"].values()} == {"cpu"}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    again.load_state_dict(torch.load(file, map_location=device, weights_only=True))
    train_in_lockstep(run, make("AdamW, fused", device), range(2))
    places = [value.data_ptr() for value in net.state_dict().values()]
    assert bits.differences(net.state_dict(), best) != []
    for loss in (0.6, 0.7):
        again.step(loss)
    assert again.cap == 1
    assert bits.differences(net.state_dict(), best) == []
    assert [value.data_ptr() for value in net.state_dict().values()] == places
    assert {value.device.type for value in net.state_dict().values()} == {device}


def smp_unet() -> nn.Module:
    return pytest.importorskip("segmentation_models_pytorch").Unet("resnet18", encoder_weights=None)  # type: ignore[no-any-return]


def timm_vit() -> nn.Module:
    keywords = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 2}
    return pytest.importorskip("timm").create_model("vit_tiny_patch16_224", **keywords)  # type: ignore[no-any-return]


@pytest.mark.parametrize("build", [smp_unet, timm_vit])
def test_blocks_of_a_model_on_the_card(build: Any, card: str) -> None:
    """They are those of the model on the CPU, and finding them takes no random number and no memory of the card."""
    model = build()
    on_cpu = [(block.name, [name for name, _ in block.named_parameters()]) for block in encoder_blocks(model)]
    model.to(card)
    random, memory = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    blocks = encoder_blocks(model)
    assert [(block.name, [name for name, _ in block.named_parameters()]) for block in blocks] == on_cpu
    assert torch.equal(torch.cuda.get_rng_state(), random)
    assert torch.cuda.memory_allocated() == memory
    own = dict(model.named_parameters())
    assert all(own[name] is parameter for block in blocks for name, parameter in block.named_parameters())
