"""A plain loop under accelerate, with prepared model, optimizer and scheduler, beside the loop without."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import differences
from oracle import Net
from processes import two_ranks
from snippets import added, run, side, snippets
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

accelerate = pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState, GradientState  # noqa: E402  # after the skip

from unfreeze_sched import ProgressiveUnfreezer, RatePreset, UnfreezeSchedule  # noqa: E402

EPOCHS, BATCHES = 5, 6
PRESET = RatePreset(unfreeze_start_epoch=1, unfreeze_rate=1, learning_rate_scale=0.5)
SCHEDULE = UnfreezeSchedule(preset=PRESET, total_blocks=3, total_epochs=EPOCHS)
# The last has an absolute floor, so that a joining group's rate is no mere multiple of the head's.
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.01, total_steps=EPOCHS * BATCHES + 1),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=4),
            torch.optim.lr_scheduler.CosineAnnealingLR(o, EPOCHS * BATCHES, eta_min=1e-3),
        ],
        [4],
    ),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.97**step),
}


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """Accelerate keeps its state in singletons."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def loader(batch_size: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(24, 4, generator=generator).double(), torch.randn(24, 2, generator=generator).double()
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def twins() -> tuple[Net, Net]:
    torch.manual_seed(0)
    net = Net()
    return net, copy.deepcopy(net)


class Accelerated:
    """The loop that a user of accelerate writes."""

    def __init__(self, net: Net, make: Callable[[Any], Any], accumulate: int = 1, **settings: Any) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **settings)
        optimizer = torch.optim.AdamW(net.head.parameters(), lr=0.01)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            net, optimizer, loader(), make(optimizer)
        )
        self.unfreezer = ProgressiveUnfreezer(
            net.make_blocks(), self.optimizer, SCHEDULE, lr_schedulers=[self.scheduler], warmup_steps=3
        )

    def train(self, epochs: range) -> None:
        for epoch in epochs:
            self.unfreezer.apply(epoch)
            for x, y in self.loader:
                with self.accelerator.accumulate(self.model):
                    loss = nn.functional.mse_loss(self.model(x), y)
                    self.accelerator.backward(loss)
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()


def plain_loop(
    net: Net, make: Callable[[Any], Any], accumulate: int = 1, batch_size: int = 4, scheduler_steps: int = 1
) -> Any:
    optimizer = torch.optim.AdamW(net.head.parameters(), lr=0.01)
    scheduler = make(optimizer)
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, SCHEDULE, lr_schedulers=[scheduler], warmup_steps=3)
    for epoch in range(EPOCHS):
        unfreezer.apply(epoch)
        for index, (x, y) in enumerate(loader(batch_size)):
            (nn.functional.mse_loss(net(x), y) / accumulate).backward()
            if (index + 1) % accumulate == 0:
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                for _ in range(scheduler_steps):
                    scheduler.step()
                optimizer.zero_grad()
    return optimizer


def assert_equal(net: Net, optimizer: Any, other: Net, other_optimizer: Any, **tolerances: float) -> None:
    """Weights, states and groups: to the bit, unless tolerances are given."""
    tolerances = tolerances or {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(net.state_dict(), other.state_dict(), **tolerances)
    ours, theirs = optimizer.state_dict(), other_optimizer.state_dict()
    torch.testing.assert_close(ours["state"], theirs["state"], **tolerances)
    assert ours["param_groups"] == theirs["param_groups"]
    assert len(ours["param_groups"]) == 4


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_prepared_objects_equal_plain_ones(name: str, accumulate: int) -> None:
    """Through three transitions the prepared run is the plain one to the bit, accumulation of gradients included."""
    net, twin = twins()
    run = Accelerated(net, SCHEDULERS[name], accumulate)
    run.train(range(EPOCHS))
    assert_equal(net, run.optimizer, twin, plain_loop(twin, SCHEDULERS[name], accumulate))


def test_the_comparison_can_fail() -> None:
    """A scheduler that steps once too often makes another run: the comparison sees it."""
    net, twin = twins()
    run = Accelerated(net, SCHEDULERS["lambda"])
    run.train(range(EPOCHS))
    with pytest.raises(AssertionError):
        assert_equal(net, run.optimizer, twin, plain_loop(twin, SCHEDULERS["lambda"], scheduler_steps=2))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_unfreezer_made_before_prepare(name: str) -> None:
    """The unfreezer may be made of the bare objects, too, before they are prepared."""
    net, twin = twins()
    optimizer = torch.optim.AdamW(net.head.parameters(), lr=0.01)
    scheduler = SCHEDULERS[name](optimizer)
    run = Accelerated.__new__(Accelerated)
    run.accelerator = accelerate.Accelerator(cpu=True)
    run.unfreezer = ProgressiveUnfreezer(
        net.make_blocks(), optimizer, SCHEDULE, lr_schedulers=[scheduler], warmup_steps=3
    )
    run.model, run.optimizer, run.loader, run.scheduler = run.accelerator.prepare(net, optimizer, loader(), scheduler)
    run.train(range(EPOCHS))
    assert_equal(net, run.optimizer, twin, plain_loop(twin, SCHEDULERS[name]))


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("epoch", range(1, EPOCHS))
def test_resume_from_its_own_checkpoint(tmp_path: Path, name: str, epoch: int) -> None:
    """`load_state` after the groups were replayed ends where the uninterrupted run ends, to the bit."""
    whole_net, _ = twins()
    whole = Accelerated(whole_net, SCHEDULERS[name])
    whole.train(range(EPOCHS))

    begun = Accelerated(twins()[0], SCHEDULERS[name])
    begun.train(range(epoch))
    begun.accelerator.save_state(tmp_path)
    (tmp_path / "unfreezer.json").write_text(json.dumps(begun.unfreezer.state_dict()))

    net = Net()
    resumed = Accelerated(net, SCHEDULERS[name])
    resumed.unfreezer.load_state_dict(json.loads((tmp_path / "unfreezer.json").read_text()))
    resumed.accelerator.load_state(tmp_path)
    resumed.train(range(epoch, EPOCHS))
    assert_equal(net, resumed.optimizer, whole_net, whole.optimizer)
    assert resumed.scheduler.state_dict().keys() == whole.scheduler.state_dict().keys()
    assert resumed.scheduler.get_last_lr() == whole.scheduler.get_last_lr()


def test_a_wrapped_unknown_scheduler_is_refused() -> None:
    """What accelerate wraps is looked at as if it were bare, and named as such."""

    class Own(torch.optim.lr_scheduler.ExponentialLR):
        def get_lr(self) -> list[float]:
            return super().get_lr()

    with pytest.raises(TypeError, match=r"`lr_schedulers` must be of known classes, got .*Own; say what it keeps"):
        Accelerated(twins()[0], lambda optimizer: Own(optimizer, 0.9))


@pytest.mark.parametrize("which", ["before", "after"])
def test_the_guide(tmp_path: Path, which: str) -> None:
    """Its loop runs before and after, three lines longer, and resumes as the guide says."""
    (diff,) = snippets("accelerate.md", "diff")
    save, load, several = snippets("accelerate.md")
    assert added(diff) <= 3
    tiny = {'"resnet18", pretrained=True, num_classes=10': '"test_resnet", num_classes=10'}

    def names() -> dict[str, Any]:
        images = DataLoader(TensorDataset(torch.randn(2, 3, 32, 32), torch.tensor([0, 1])), 2)
        values = {name: getattr(accelerate, name) for name in ("Accelerator", "DistributedDataParallelKwargs")}
        values |= {"timm": pytest.importorskip("timm"), "torch": torch, "nn": nn, "json": json}
        return values | {"loader": images, "folder": tmp_path}

    first = run(side(diff, which), names(), tiny)
    groups = first["optimizer"].param_groups
    if which == "before":
        assert len(groups) == 1
        return
    assert len(groups) == 1 + len(first["unfreezer"].blocks)
    run(save, first)
    second = run(side(diff, which).split("for epoch")[0], names(), tiny)
    run(load, second)
    # The parameters are others, in the same places.
    assert differences(second["optimizer"].state_dict(), first["optimizer"].state_dict()) == []
    assert isinstance(run(several, names())["accelerator"], accelerate.Accelerator)


SCRIPT = """
import sys

from processes import leave
from test_accelerate import *
from unfreeze_sched.parallel import rewrap_ddp

root, name = Path(sys.argv[1]), "sequence"

def save(way, net, run):
    rank = run.accelerator.process_index
    torch.save([net.state_dict(), run.optimizer.state_dict(), run.scheduler.get_last_lr()], root / f"{way}-{rank}.pt")

def unused():
    handler = accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)
    net = Net()
    return net, Accelerated(net, SCHEDULERS[name], kwargs_handlers=[handler])

torch.manual_seed(0)
net, run = unused()
run.train(range(EPOCHS))
save("unused", net, run)

torch.manual_seed(0)
net, run = unused()
run.train(range(3))
run.accelerator.save_state(root / "state")
saved = run.unfreezer.state_dict()
net, run = unused()
run.unfreezer.load_state_dict(saved)
run.accelerator.load_state(root / "state")
run.train(range(3, EPOCHS))
save("resumed", net, run)

class Rewrapped(Accelerated):
    def train(self, epochs):
        for epoch in epochs:
            before = [p.requires_grad for p in net.parameters()]
            self.unfreezer.apply(epoch)
            if [p.requires_grad for p in net.parameters()] != before:
                self.model = rewrap_ddp(self.model)
            super().train(range(epoch, epoch + 1))

torch.manual_seed(0)
net = Net()
run = Rewrapped(net, SCHEDULERS[name])
run.train(range(EPOCHS))
save("rewrapped", net, run)

# Neither: the library notices before a step is taken with gradients that are not those of all ranks.
torch.manual_seed(0)
net = Net()
for block in net.make_blocks():
    for parameter in block.parameters():
        parameter.requires_grad = False
run = Accelerated(net, SCHEDULERS[name])
try:
    run.train(range(EPOCHS))
except RuntimeError as error:
    (root / f"refused-{run.accelerator.process_index}.txt").write_text(str(error))
run.accelerator.wait_for_everyone()
leave()
"""


def test_two_processes(tmp_path: Path) -> None:
    """Two ranks keep equal to the bit, through a resume too, and equal one run on joint batches; drift is refused."""
    runs = two_ranks(tmp_path, SCRIPT)
    assert len(runs) == 6
    for name in ("unused-1", "resumed-0", "resumed-1"):
        assert differences(runs[name], runs["unused-0"]) == []
    assert differences(runs["rewrapped-1"], runs["rewrapped-0"]) == []

    _, twin = twins()
    # A prepared scheduler steps once a process, as if each rank's batch were a step of its own.
    optimizer = plain_loop(twin, SCHEDULERS["sequence"], batch_size=8, scheduler_steps=2)
    for name in ("unused-0", "rewrapped-0"):
        weights, states, _ = runs[name]
        torch.testing.assert_close(weights, dict(twin.state_dict()), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(states["state"], optimizer.state_dict()["state"], rtol=1e-9, atol=1e-12)
        assert states["param_groups"] == optimizer.state_dict()["param_groups"]
    for rank in range(2):
        assert (
            "gradients of newly trainable parameters must be the same on all ranks"
            in (tmp_path / f"refused-{rank}.txt").read_text()
        )
