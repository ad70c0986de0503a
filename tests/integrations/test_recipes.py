"""Frameworks that a few lines suffice for: ignite and fastai, beside the plain loop; and the lines themselves."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import differences
from oracle import Net
from snippets import added, run, side, snippets
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from unfreeze_sched import Block, ProgressiveUnfreezer, RatePreset, UnfreezeSchedule

EPOCHS = 5
PRESET = RatePreset(unfreeze_start_epoch=1, unfreeze_rate=1, learning_rate_scale=0.5)


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(24, 4, generator=generator), torch.randn(24, 2, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def make() -> tuple[Net, Any, Any]:
    """A model, an optimizer of all of it, and a scheduler."""
    torch.manual_seed(0)
    net = Net(dtype=torch.float32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    return net, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)


def unfreezer_of(net: Net, optimizer: Any, scheduler: Any) -> ProgressiveUnfreezer:
    return ProgressiveUnfreezer.from_model(net, optimizer, EPOCHS, [scheduler], PRESET, blocks=net.make_blocks())


def plain_loop() -> tuple[Net, Any, Any]:
    """With an optimizer of the head alone, as the core wants it."""
    torch.manual_seed(0)
    net = Net(dtype=torch.float32)
    optimizer = torch.optim.AdamW(net.head.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    schedule = UnfreezeSchedule(preset=PRESET, total_blocks=3, total_epochs=EPOCHS)
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, schedule, lr_schedulers=[scheduler])
    for epoch in range(EPOCHS):
        unfreezer.apply(epoch)
        for x, y in loader():
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
        scheduler.step()
    return net, optimizer, scheduler


def assert_equal(ours: tuple[Net, Any, Any], theirs: tuple[Net, Any, Any]) -> None:
    """Weights, states, groups and the scheduler, to the bit."""
    assert differences(*([each.state_dict() for each in objects] for objects in (ours, theirs))) == []


# --- from_model


def test_parameters_are_taken_out_in_place() -> None:
    """The optimizer, its groups, their lists and the head's state stay the same objects; the blocks' state goes."""
    net = Net()
    optimizer = torch.optim.AdamW([(name, p) for name, p in net.named_parameters()], lr=0.01)
    (group,) = optimizer.param_groups
    params, names = group["params"], group["param_names"]
    net(torch.randn(4, 4).double()).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    moment = optimizer.state[net.head.weight]["exp_avg"]
    ProgressiveUnfreezer.from_model(net, optimizer, 50, blocks=net.make_blocks())
    assert optimizer.param_groups == [group]
    assert group["params"] is params
    assert [id(p) for p in params] == [id(net.head.weight), id(net.head.bias)]
    assert group["param_names"] is names
    assert names == ["head.weight", "head.bias"]
    assert optimizer.state[net.head.weight]["exp_avg"] is moment
    assert len(optimizer.state) == 2


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"model": 3}, TypeError, "`model` must be an nn.Module, got int; pass the bare model"),
        ({"optimizer": 3}, TypeError, "`optimizer` must be a torch optimizer, got int; pass the live one"),
        (
            {"total_epochs": 0},
            ValueError,
            "`total_epochs` must be an integer of at least 1, got 0; it is the number of epochs of the run, such as 50",
        ),
        (
            {"preset": "medium"},
            ValueError,
            "`preset` must be a preset or its dict, got 'medium'; pass MEDIUM or a RatePreset",
        ),
        ({"layer_dekay": 0.8}, TypeError, "unexpected keyword argument 'layer_dekay'"),
        (
            {"norms": "odd"},
            ValueError,
            "`norms` must be one of eval, frozen, fixed, train, got 'odd'; 'eval' is the default",
        ),
        (
            {"lr_schedulers": [torch.optim.lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(torch.ones(1))]), 1)]},
            ValueError,
            "`lr_schedulers` must drive this optimizer, got a StepLR of another one; make the scheduler from the optimizer that is passed here",
        ),
        (
            {"blocks": "all"},
            ValueError,
            "`blocks` must leave parameters to the optimizer, got all that it holds; leave the head out of the blocks",
        ),
    ],
)
def test_what_is_refused_changes_nothing(change: dict[str, Any], error: type[Exception], text: str) -> None:
    """A refusal names the argument and one fix, and leaves model and optimizer as they were."""
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    net(torch.randn(4, 4).double()).sum().backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    arguments = {"model": net, "optimizer": optimizer, "total_epochs": 50, "blocks": net.make_blocks()} | change
    if arguments["blocks"] == "all":
        arguments["blocks"] = [Block("all", (net,))]
    with pytest.raises(error, match=re.escape(text)):
        ProgressiveUnfreezer.from_model(**arguments)
    assert differences(optimizer.state_dict(), before) == []
    assert all(p.requires_grad for p in net.parameters())


# --- ignite


def ignite_trainer(net: Net, optimizer: Any, scheduler: Any, unfreezer: ProgressiveUnfreezer) -> Any:
    engine = pytest.importorskip("ignite.engine")
    trainer = engine.create_supervised_trainer(net, optimizer, nn.functional.mse_loss)
    trainer.add_event_handler(engine.Events.EPOCH_STARTED, lambda: unfreezer.apply(trainer.state.epoch - 1))
    trainer.add_event_handler(engine.Events.EPOCH_COMPLETED, lambda: scheduler.step())  # noqa: PLW0108  # it would take the engine for an epoch
    return trainer


def test_ignite_equals_the_plain_loop() -> None:
    """Through three transitions ignite's run is the plain loop's, to the bit."""
    objects = make()
    ignite_trainer(*objects, unfreezer_of(*objects)).run(loader(), max_epochs=EPOCHS)
    assert_equal(objects, plain_loop())


@pytest.mark.parametrize("epoch", range(1, EPOCHS))
def test_ignite_resumes(tmp_path: Path, epoch: int) -> None:
    """Its own `Checkpoint` saves the unfreezer as it saves the rest, and loads it first, as it stands first."""
    handlers = pytest.importorskip("ignite.handlers")
    engine = pytest.importorskip("ignite.engine")

    def begin() -> tuple[Any, tuple[Net, Any, Any], dict[str, Any]]:
        objects = make()
        unfreezer = unfreezer_of(*objects)
        trainer = ignite_trainer(*objects, unfreezer)
        names = ("model", "scheduler", "optimizer")
        net, optimizer, scheduler = objects
        kept = dict(zip(names, (net, scheduler, optimizer), strict=True))
        return trainer, objects, {"unfreezer": unfreezer, **kept, "trainer": trainer}

    trainer, _, kept = begin()
    saver = handlers.Checkpoint(
        kept, handlers.DiskSaver(str(tmp_path)), global_step_transform=lambda *_: trainer.state.epoch
    )
    trainer.add_event_handler(engine.Events.EPOCH_COMPLETED(every=epoch), saver)
    trainer.run(loader(), max_epochs=epoch)

    trainer, objects, kept = begin()
    (path,) = tmp_path.iterdir()
    handlers.Checkpoint.load_objects(kept, torch.load(path, weights_only=True))
    trainer.run(loader(), max_epochs=EPOCHS)
    assert_equal(objects, plain_loop())


# --- fastai


def learner_of(net: Net, optimizer: Any, scheduler: Any, unfreezer: ProgressiveUnfreezer, path: Path) -> Any:
    core = pytest.importorskip("fastai.callback.core")
    learner = pytest.importorskip("fastai.learner")
    data = pytest.importorskip("fastai.data.core")
    load = pytest.importorskip("fastai.data.load")
    wrap = pytest.importorskip("fastai.optimizer").OptimWrapper
    dataset = loader().dataset
    batches = data.DataLoaders(*(load.DataLoader(dataset, bs=4, num_workers=0, shuffle=False) for _ in range(2)))
    follow = core.Callback(before_train=lambda cb: unfreezer.apply(cb.epoch), after_train=lambda cb: scheduler.step())
    return learner.Learner(
        batches,
        net,
        loss_func=nn.functional.mse_loss,
        opt_func=wrap(opt=optimizer),
        cbs=follow,
        path=path,
        default_cbs=True,
    )


def fit(learner: Any, lr: Any, **keywords: Any) -> None:
    pytest.importorskip("fastai.callback.progress")  # gives a Learner these
    with learner.no_bar(), learner.no_logging():
        learner.fit(EPOCHS, lr=lr, **keywords)


def test_fastai_equals_the_plain_loop(tmp_path: Path) -> None:
    """Through three transitions a Learner with a wrapped torch optimizer is the plain loop, to the bit."""
    objects = make()
    fit(learner_of(*objects, unfreezer_of(*objects), tmp_path), 0.01)
    assert_equal(objects, plain_loop())


@pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")  # fastai's own use of NumPy
@pytest.mark.parametrize("epoch", range(1, EPOCHS))
@pytest.mark.parametrize("own_rates", [True, False])
def test_fastai_resumes(tmp_path: Path, epoch: int, own_rates: bool) -> None:
    """`load` after the unfreezer's own, and `fit` with a rate for each group go on to the bit.

    With one rate for all a block that is still to join is refused, and where none is the run is another one.
    """
    core = pytest.importorskip("fastai.callback.core")
    first = make()
    unfreezer = unfreezer_of(*first)
    learner = learner_of(*first, unfreezer, tmp_path)

    def stop(callback: Any) -> None:
        if callback.epoch + 1 == epoch:
            raise core.CancelFitException

    learner.add_cb(core.Callback(after_epoch=stop))
    fit(learner, 0.01)
    learner.save("last")
    saved = copy.deepcopy([unfreezer.state_dict(), first[2].state_dict()])

    objects = make()
    net, optimizer, scheduler = objects
    unfreezer = unfreezer_of(*objects)
    learner = learner_of(net, optimizer, scheduler, unfreezer, tmp_path)
    unfreezer.load_state_dict(saved[0])
    learner.load("last")
    scheduler.load_state_dict(saved[1])
    if own_rates:
        fit(learner, [group["lr"] for group in optimizer.param_groups], start_epoch=epoch)
        assert_equal(objects, plain_loop())
    elif any(start >= epoch for start, _ in unfreezer.schedule.transitions()):
        with pytest.raises(
            ValueError, match=r"`lr_schedulers` must be what sets the learning rate, got a template at 0.01"
        ):
            fit(learner, 0.01, start_epoch=epoch)
    else:
        fit(learner, 0.01, start_epoch=epoch)
        with pytest.raises(AssertionError):
            assert_equal(objects, plain_loop())


def test_fastai_has_optimizers_of_its_own() -> None:
    """They are no torch optimizers, and are refused as such."""
    own = pytest.importorskip("fastai.optimizer")
    net = Net()
    with pytest.raises(
        TypeError, match=re.escape("`optimizer` must be a torch optimizer, got Optimizer; pass the live one")
    ):
        ProgressiveUnfreezer.from_model(net, own.Adam(list(net.parameters()), lr=0.01), 50, blocks=net.make_blocks())


# --- the guide

TINY = {'"resnet18", pretrained=True, num_classes=10': '"test_resnet", num_classes=10'}


def images() -> Any:
    return TensorDataset(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))


@pytest.mark.parametrize("which", ["before", "after"])
def test_the_guide_to_ignite(tmp_path: Path, which: str) -> None:
    """Its loop runs before and after, three lines longer; its resume goes on to the last epoch."""
    timm, engine = pytest.importorskip("timm"), pytest.importorskip("ignite.engine")
    handlers = pytest.importorskip("ignite.handlers")
    diff, _ = snippets("recipes.md", "diff")
    save, load = snippets("recipes.md")[:2]
    assert added(diff) <= 3

    def names() -> dict[str, Any]:
        values = {"torch": torch, "nn": nn, "timm": timm, "loader": DataLoader(images(), 2), "folder": str(tmp_path)}
        return (
            values
            | {name: getattr(engine, name) for name in ("create_supervised_trainer", "Events")}
            | {name: getattr(handlers, name) for name in ("Checkpoint", "DiskSaver")}
        )

    prepare, last = side(diff, which).rsplit("trainer.run", 1)
    first = run(prepare, names(), TINY)
    if which == "after":
        run(save, first)
    run("trainer.run" + last, first)
    if which == "before":
        assert len(first["optimizer"].param_groups) == 1
        return
    assert len(first["optimizer"].param_groups) == 1 + len(first["unfreezer"].blocks)
    second = run(prepare, names(), TINY)
    (path,) = tmp_path.glob("*.pt")
    kept = ("unfreezer", "model", "scheduler", "optimizer", "trainer")
    second |= {"kept": {name: second[name] for name in kept}, "path": path}
    run(load.replace("max_epochs=50", "max_epochs=51"), second)
    assert second["trainer"].state.epoch == 51
    assert len(second["optimizer"].param_groups) == len(first["optimizer"].param_groups)


@pytest.fixture
def fastai_names(tmp_path: Path) -> dict[str, Any]:
    """What a user of fastai has imported and built."""
    timm, learner = pytest.importorskip("timm"), pytest.importorskip("fastai.learner")
    data, load = pytest.importorskip("fastai.data.core"), pytest.importorskip("fastai.data.load")
    core, wrap = pytest.importorskip("fastai.callback.core"), pytest.importorskip("fastai.optimizer")
    batches = data.DataLoaders(*(load.DataLoader(images(), bs=2, num_workers=0) for _ in range(2)))
    names = {"torch": torch, "nn": nn, "dls": batches, "folder": tmp_path, "Callback": core.Callback}
    names |= {"Learner": learner.Learner, "OptimWrapper": wrap.OptimWrapper}
    return names | {"model": timm.create_model("test_resnet", num_classes=2)}


@pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")
@pytest.mark.parametrize("which", ["before", "after"])
def test_the_guide_to_fastai(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fastai_names: Any, which: str) -> None:
    """Its loop runs before and after, three lines longer; its resume keeps each block's own rate."""
    monkeypatch.chdir(tmp_path)
    _, diff = snippets("recipes.md", "diff")
    save, load = snippets("recipes.md")[2:4]
    assert added(diff) <= 3
    names = run(side(diff, which), fastai_names)
    rates = [group["lr"] for group in names["optimizer"].param_groups]
    if which == "before":
        assert rates == [1e-3]
        return
    assert rates == [1e-3] + [pytest.approx(1e-4)] * len(names["unfreezer"].blocks)
    run(save, names)
    prepare = side(diff, which).replace("learn.fit(50, lr=1e-3)", "")
    again = run(prepare, dict(fastai_names))
    run(load, again | {"start_epoch": 48})
    assert [group["lr"] for group in again["optimizer"].param_groups] == rates


def test_the_guide_from_freeze_to(fastai_names: Any) -> None:
    """Its preset is ULMFiT's: the head, the block next to it, then all, at rates that fall by 2.6 from block to block."""
    net = Net(dtype=torch.float32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    names = fastai_names | {"model": net, "optimizer": optimizer, "blocks": net.make_blocks()}
    batches = fastai_names["dls"]
    names["learn"] = names["Learner"](
        batches, net, nn.functional.mse_loss, opt_func=names["OptimWrapper"](opt=optimizer)
    )
    names["learn"].dls.train.dataset = names["learn"].dls.valid.dataset = loader().dataset
    run(snippets("recipes.md")[4], names)
    assert list(names["unfreezer"].schedule) == [0, 1, 3, 3, 3]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3 / 2.6**depth for depth in range(4)])
