"""The guides' snippets run, in the order in which they stand."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import differences
from oracle import Net, train_in_lockstep, twins
from snippets import run, snippets
from torch import distributed
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.nn.parallel import DistributedDataParallel

from unfreeze_sched import ProgressiveUnfreezer, RatePreset, UnfreezeSchedule
from unfreeze_sched.optimizer.groups import BLOCK_KEY
from unfreeze_sched.parallel import all_trainable, rewrap_ddp


def make() -> dict[str, Any]:
    """What a guide's reader has already: model, optimizer, scheduler, schedule and unfreezer."""
    model = Net(3)
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    preset = RatePreset(unfreeze_start_epoch=1, unfreeze_rate=2)
    schedule = UnfreezeSchedule(preset=preset, total_blocks=3, total_epochs=8)
    unfreezer = ProgressiveUnfreezer(model.make_blocks(), optimizer, schedule, lr_schedulers=[scheduler])
    return locals()


def train_one_epoch(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(2):
        model(torch.randn(4, 4, dtype=next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_resume(tmp_path: Path) -> None:
    """The guide saves in the middle of a run and goes on in another one to the end."""
    save, load = snippets("resume.md")
    first = make() | {"torch": torch, "path": tmp_path / "last.pth", "epoch": 4}
    for epoch in range(4):
        first["unfreezer"].apply(epoch)
        train_one_epoch(first["model"], first["optimizer"])
        first["scheduler"].step()
    run(save, first)
    second = make() | {"torch": torch, "path": tmp_path / "last.pth"}
    run(load, second)
    assert second["epoch"] == 7
    assert len(second["optimizer"].param_groups) == 4
    head = next(first["model"].head.parameters())
    again = next(second["model"].head.parameters())
    assert torch.equal(second["optimizer"].state[again]["exp_avg"], first["optimizer"].state[head]["exp_avg"])


@pytest.mark.parametrize("way", [0, 1])
def test_schedulers(way: int) -> None:
    """Late under a scheduler that is passed, and declared before one that depends on the past."""
    names = make() | {"torch": torch, "ProgressiveUnfreezer": ProgressiveUnfreezer, "steps": 2}
    names["optimizer"] = torch.optim.AdamW(names["model"].head.parameters(), lr=0.01)
    names["blocks"] = names["model"].make_blocks()
    run(snippets("schedulers.md")[way], names)
    optimizer, scheduler = names["optimizer"], names["scheduler"]
    for epoch in range(8):
        names["unfreezer"].apply(epoch)
        train_one_epoch(names["model"], optimizer)
        scheduler.step(*([] if way == 0 else [1.0]))
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates[1:] == pytest.approx([rates[0] * 0.1] * (len(rates) - 1))
    assert len(rates) == 4


def test_a_scheduler_begins_anew() -> None:
    """The guide's restart in mid-run, against a run whose groups all were there from the start, to the bit."""
    preset = RatePreset(unfreeze_start_epoch=1, unfreeze_rate=2)
    schedule = UnfreezeSchedule(preset=preset, total_blocks=3, total_epochs=8)
    restart = snippets("schedulers.md")[2]
    both = twins(schedule, torch.optim.AdamW, lambda o: [torch.optim.lr_scheduler.StepLR(o, 1, 0.5)], scale=0.1)
    assert train_in_lockstep(*both, range(3)) == []
    unfreezer = both[0].apply.__self__  # type: ignore[attr-defined]
    for each in both:
        names = {"torch": torch, "optimizer": each.optimizer, "unfreezer": unfreezer}
        each.schedulers = [run(restart, names)["scheduler"]]
    unfreezer.rebuilder.lr_schedulers = both[0].schedulers
    assert train_in_lockstep(*both, range(3, 8)) == []
    assert len(both[0].optimizer.param_groups) == 4


def test_a_scheduler_rebuilt_at_a_resume() -> None:
    """Rebuilt with `last_epoch` as the guide says, the run goes on as if it had not stopped, to the bit."""
    whole, resumed = make(), make()
    code = snippets("schedulers.md")[3]
    for names in (whole, resumed):
        names["optimizer"] = torch.optim.AdamW(names["model"].head.parameters(), lr=0.01)
        names["blocks"] = names["model"].make_blocks()
    optimizer = whole["optimizer"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)
    unfreezer = ProgressiveUnfreezer(whole["blocks"], optimizer, whole["schedule"], [scheduler])
    for epoch in range(8):
        if epoch == 4:
            saved = copy.deepcopy(
                {"unfreezer": unfreezer.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 4}
            )
            resumed["model"].load_state_dict(whole["model"].state_dict())
        unfreezer.apply(epoch)
        torch.manual_seed(epoch)
        train_one_epoch(whole["model"], optimizer)
        scheduler.step()
    names = resumed | {"torch": torch, "ProgressiveUnfreezer": ProgressiveUnfreezer, "saved": saved}
    run(code, names)
    for epoch in range(4, 8):
        names["unfreezer"].apply(epoch)
        torch.manual_seed(epoch)
        train_one_epoch(names["model"], names["optimizer"])
        names["scheduler"].step()
    assert differences(optimizer.state_dict(), names["optimizer"].state_dict()) == []
    assert differences(whole["model"].state_dict(), names["model"].state_dict()) == []


def test_tensorboard(tmp_path: Path) -> None:
    """Each block's rate is written under its name from the epoch at which it joined, beside the head's."""
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    *_, code = snippets("recipes.md")
    names = make() | {"writer": tensorboard.SummaryWriter(tmp_path), "epochs": 8, "train_one_epoch": train_one_epoch}
    run(code, names)
    names["writer"].close()
    written = reading.EventAccumulator(str(tmp_path)).Reload()
    steps = {tag: [row.step for row in written.Scalars(tag)] for tag in written.Tags()["scalars"]}
    assert steps == {"lr/head": [*range(8)], **{f"lr/block{3 - n}": [*range(2 * n - 1, 8)] for n in (1, 2, 3)}}
    assert written.Scalars("lr/block2")[0].value == pytest.approx(written.Scalars("lr/head")[1].value / 10)
    assert f"'{BLOCK_KEY}'" in code


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("way", [0, 1])
@pytest.mark.filterwarnings("ignore:.*find_unused_parameters")
def test_parallel(way: int) -> None:
    """Both ways of the guide train all blocks, and the checkpoint holds the state of each."""
    *ways, checkpoint = snippets("parallel.md")
    names = make() | {
        "DistributedDataParallel": DistributedDataParallel,
        "rewrap_ddp": rewrap_ddp,
        "train_one_epoch": train_one_epoch,
        "all_trainable": all_trainable,
        "get_state_dict": get_state_dict,
    }
    before = {name: p.detach().clone() for name, p in names["model"].named_parameters()}
    run(ways[way], names)
    assert all(not torch.equal(p, before[name]) for name, p in names["model"].named_parameters())
    covered = names["ddp"]._get_ddp_logging_data()["num_parameter_tensors"]
    assert covered == len(before)
    names["unfreezer"].apply(0)
    run(checkpoint, names)
    assert names["optimizer_state"]["state"].keys() == before.keys()
