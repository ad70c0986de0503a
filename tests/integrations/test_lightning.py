"""Lightning's Trainer with the callback, beside the plain loop over the same batches."""

from __future__ import annotations

import copy
import csv
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import differences
from processes import environment
from snippets import added, side, snippets
from snippets import run as run_guide
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

L = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.loggers import CSVLogger  # noqa: E402  # after the skip
from lightning.pytorch.utilities.exceptions import MisconfigurationException  # noqa: E402

from unfreeze_sched import (  # noqa: E402
    MEDIUM,
    Block,
    MilestonePreset,
    ProgressiveUnfreezer,
    RatePreset,
    UnfreezeSchedule,
    encoder_blocks,
)
from unfreeze_sched.guards import OverfitGuard, PlateauTrigger  # noqa: E402
from unfreeze_sched.integrations.lightning import UnfreezeCallback  # noqa: E402
from unfreeze_sched.model.freezing import freeze  # noqa: E402
from unfreeze_sched.optimizer import rates  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),  # the saver is not resumed
    pytest.mark.filterwarnings("ignore:.*LeafSpec.. is deprecated:FutureWarning"),  # Lightning's own use of torch
    # Norms of frozen blocks stay in evaluation, which Lightning remarks upon when a run is resumed.
    pytest.mark.filterwarnings("ignore:.*module.s. in eval mode at the start of training:UserWarning"),
]
EPOCHS = 5
PRESET = RatePreset(unfreeze_start_epoch=1, unfreeze_rate=1, learning_rate_scale=0.5)


class Net(nn.Module):
    """Three blocks with batch statistics, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)

    def make_blocks(self) -> tuple[Block, ...]:
        return tuple(Block(f"block{i}", (module,), (f"blocks.{i}",)) for i, module in enumerate(self.blocks))


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(24, 4, generator=generator).double(), torch.randn(24, 2, generator=generator).double()
    return DataLoader(TensorDataset(x, y), batch_size=4)


def cosine(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)


class Automatic(L.LightningModule):
    """As a user writes it, the whole model in one optimizer."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.net(x), y), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.01)
        return [optimizer], [cosine(optimizer)]


class Manual(Automatic):
    """Two optimizers of which the second is unfrozen into, the first with a scheduler of its own."""

    def __init__(self, net: Net) -> None:
        super().__init__(net)
        self.automatic_optimization = False
        self.scale = nn.Parameter(torch.ones(2).double())

    def training_step(self, batch: Any, _: int) -> None:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x) * self.scale, y)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        if self.trainer.is_last_batch:
            for scheduler in self.lr_schedulers():
                scheduler.step()

    def configure_optimizers(self) -> Any:
        first = torch.optim.SGD([self.scale], lr=0.1, momentum=0.9)
        second = torch.optim.AdamW(self.net.parameters(), lr=0.01)
        return [first, second], [torch.optim.lr_scheduler.StepLR(first, 2), cosine(second)]


def twins() -> tuple[Net, Net]:
    torch.manual_seed(0)
    net = Net()
    return net, copy.deepcopy(net)


def blocks_of(module: Automatic) -> tuple[Block, ...]:
    return module.net.make_blocks()


def trainer(root: Path, callback: Any, epochs: int = EPOCHS, **keywords: Any) -> Any:
    settings = {"logger": False, "enable_checkpointing": False} | keywords
    return L.Trainer(
        max_epochs=epochs,
        default_root_dir=root,
        callbacks=[*settings.pop("callbacks", ()), callback],
        accelerator="cpu",
        devices=settings.pop("devices", 1),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **settings,
    )


def plain_loop(
    net: Net,
    schedule: UnfreezeSchedule,
    batches: Callable[[int], Any] = lambda _: loader(),
    optimizer: Any = None,
    scheduler: Any = None,
    **keywords: Any,
) -> tuple[Any, Any]:
    """What the callback has to equal: the library in a loop of one's own."""
    if optimizer is None:
        optimizer = torch.optim.AdamW(net.head.parameters(), lr=0.01)
        scheduler = cosine(optimizer)
    schedulers = [] if scheduler is None else [scheduler]
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, schedule, lr_schedulers=schedulers, **keywords)
    for epoch in range(EPOCHS):
        net.train()
        unfreezer.apply(epoch)
        for x, y in batches(epoch):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
        for each in schedulers:
            each.step()
    return optimizer, scheduler


def schedule_of(epochs: int = EPOCHS) -> UnfreezeSchedule:
    return UnfreezeSchedule(preset=PRESET, total_blocks=3, total_epochs=epochs)


def assert_equal(net: Net, optimizer: Any, other: Net, other_optimizer: Any) -> None:
    """Weights, buffers, states and rates, to the bit."""
    ours, theirs = net.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    ours, theirs = optimizer.state_dict(), other_optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, state in ours["state"].items():
        assert all(torch.equal(value, theirs["state"][index][key]) for key, value in state.items())


def fit(root: Path, module: Any, epochs: int = EPOCHS, callback: Any = None, ckpt: Any = None, **keywords: Any) -> Any:
    run = trainer(root, callback or UnfreezeCallback(PRESET, blocks_of), epochs, **keywords)
    torch.manual_seed(1)
    # With validation, after which Lightning restores the modes of all modules in its own way.
    run.fit(module, loader(), loader(), ckpt_path=ckpt)
    return run


def test_a_fit_equals_the_plain_loop(tmp_path: Path) -> None:
    """Through three transitions weights, norm statistics, moments and rates are those of the plain loop, to the bit."""
    net, twin = twins()
    run = fit(tmp_path, Automatic(net))
    optimizer, scheduler = plain_loop(twin, schedule_of())
    assert_equal(net, run.optimizers[0], twin, optimizer)
    assert run.lr_scheduler_configs[0].scheduler.state_dict() == scheduler.state_dict()
    assert len(run.optimizers[0].param_groups) == 4


def test_the_comparison_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms left as Lightning's validation leaves them make another run: the comparison sees it."""
    net, twin = twins()
    monkeypatch.setattr("unfreeze_sched.integrations.lightning.norms_of", lambda block: ())
    run = fit(tmp_path, Automatic(net))
    optimizer, _ = plain_loop(twin, schedule_of())
    with pytest.raises(AssertionError, match=r"blocks\.0\.0\.weight"):
        assert_equal(net, run.optimizers[0], twin, optimizer)


@pytest.mark.parametrize("keywords", [{"norms": "frozen", "layer_decay": 0.7}, {"norms": "train", "warmup_steps": 4}])
def test_keywords_reach_the_unfreezer(tmp_path: Path, keywords: dict[str, Any]) -> None:
    """The unfreezer's own keywords do in a fit what they do in the plain loop."""
    net, twin = twins()
    run = fit(tmp_path, Automatic(net), callback=UnfreezeCallback(schedule_of(), net.make_blocks(), **keywords))
    optimizer, _ = plain_loop(twin, schedule_of(), **keywords)
    assert_equal(net, run.optimizers[0], twin, optimizer)


def test_manual_optimization_with_two_optimizers(tmp_path: Path) -> None:
    """The blocks join the optimizer that was named, beside its scheduler; the other optimizer is left alone."""
    net, twin = twins()
    module = Manual(net)
    run = fit(tmp_path, module, callback=UnfreezeCallback(PRESET, blocks_of, optimizer=1))
    assert [len(optimizer.param_groups) for optimizer in run.optimizers] == [1, 4]

    scale = nn.Parameter(torch.ones(2).double())
    first = torch.optim.SGD([scale], lr=0.1, momentum=0.9)
    optimizer = torch.optim.AdamW(twin.head.parameters(), lr=0.01)
    schedulers = [torch.optim.lr_scheduler.StepLR(first, 2), cosine(optimizer)]
    unfreezer = ProgressiveUnfreezer(twin.make_blocks(), optimizer, schedule_of(), lr_schedulers=schedulers[1:])
    for epoch in range(EPOCHS):
        unfreezer.apply(epoch)
        for x, y in loader():
            for each in (first, optimizer):
                each.zero_grad()
            nn.functional.mse_loss(twin(x) * scale, y).backward()
            for each in (first, optimizer):
                each.step()
        for scheduler in schedulers:
            scheduler.step()
    assert_equal(net, run.optimizers[1], twin, optimizer)
    assert torch.equal(module.scale, scale)


class Steps(Automatic):
    """A scheduler that steps with each batch, and the optimizer as BackboneFinetuning has it."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            filter(lambda p: p.requires_grad, self.net.parameters()), lr=0.05, momentum=0.9, nesterov=True
        )
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=EPOCHS * 6)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize(("make", "optimizer"), [(Automatic, 0), (Manual, 1), (Steps, 0)])
@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
def test_resume_from_its_own_checkpoint(tmp_path: Path, make: Any, optimizer: int, epoch: int) -> None:
    """`fit(ckpt_path=...)` after any epoch, into new objects, ends where the uninterrupted fit ends, to the bit."""
    whole_net, _ = twins()
    whole = fit(tmp_path, make(whole_net), callback=UnfreezeCallback(PRESET, blocks_of, optimizer))
    saver = L.callbacks.ModelCheckpoint(tmp_path / "kept", "{epoch}-{step}", every_n_epochs=1, save_top_k=-1)
    keywords = {"enable_checkpointing": True, "callbacks": [saver]}
    callback = UnfreezeCallback(schedule_of(), blocks_of, optimizer)
    fit(tmp_path, make(twins()[0]), epoch + 1, callback=callback, **keywords)
    saved = max((tmp_path / "kept").iterdir(), key=lambda path: path.stat().st_mtime)

    net = Net()
    run = fit(tmp_path, make(net), ckpt=saved, callback=UnfreezeCallback(PRESET, blocks_of, optimizer))
    assert_equal(net, run.optimizers[optimizer], whole_net, whole.optimizers[optimizer])


class Resumable(DataLoader[Any]):
    """Goes on from the batch at which its state was saved, as torchdata's StatefulDataLoader does."""

    done = 0

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(super().__iter__()):
            if index >= self.done:
                self.done = (index + 1) % len(self)
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.done = state_dict["done"]


def test_resume_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """A checkpoint of some batch of an epoch, which then has no start of its own, resumes to the bit."""
    whole_net, _ = twins()
    whole = fit(tmp_path, Automatic(whole_net))
    saver = L.callbacks.ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=16, save_top_k=-1)
    dataset = loader().dataset
    interrupted = trainer(
        tmp_path, UnfreezeCallback(PRESET, blocks_of), 3, enable_checkpointing=True, callbacks=[saver]
    )
    interrupted.fit(Automatic(twins()[0]), Resumable(dataset, batch_size=4), loader())
    net = Net()
    run = trainer(tmp_path, UnfreezeCallback(PRESET, blocks_of))
    resumed = Resumable(dataset, batch_size=4)
    run.fit(Automatic(net), resumed, loader(), ckpt_path=tmp_path / "kept" / "step=16.ckpt")
    assert_equal(net, run.optimizers[0], whole_net, whole.optimizers[0])


def test_a_cap_is_heard_at_the_next_epoch_after_a_resume_too(tmp_path: Path) -> None:
    """A block that a validation in mid-epoch freed joins when the next epoch starts, not at the resume in between."""

    def run(net: Net, ckpt: Any = None) -> tuple[Any, Any]:
        caps = [PlateauTrigger(patience=1, min_delta=10.0)]
        callback = UnfreezeCallback(MilestonePreset(milestones={0: 3}), blocks_of, monitor="val_loss", caps=caps)
        saver = L.callbacks.ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=5, save_top_k=-1)
        run = trainer(tmp_path, callback, callbacks=[saver], enable_checkpointing=True, val_check_interval=2)
        run.fit(Automatic(net), Resumable(loader().dataset, batch_size=4), loader(), ckpt_path=ckpt)
        return run, callback.unfreezer

    whole_net, _ = twins()
    whole, unfreezer = run(whole_net)
    net = Net()
    resumed, again = run(net, tmp_path / "kept" / "step=5.ckpt")
    assert [(past.epoch, past.number) for past in again.history] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert list(again.history) == list(unfreezer.history)
    assert_equal(net, resumed.optimizers[0], whole_net, whole.optimizers[0])


def test_resume_refuses_another_schedule(tmp_path: Path) -> None:
    """A checkpoint of another preset is refused with the difference, and so is one of another length, if it is given."""
    saver = L.callbacks.ModelCheckpoint(tmp_path / "kept")
    fit(tmp_path, Automatic(Net()), 2, enable_checkpointing=True, callbacks=[saver])
    (saved,) = (tmp_path / "kept").iterdir()
    for schedule, difference in (
        (PRESET.replace(unfreeze_rate=2), r"schedule\['preset'\]\['unfreeze_rate'\] saved as 1, now 2"),
        (schedule_of(7), r"schedule\['total_epochs'\] saved as 2, now 7"),
    ):
        with pytest.raises(ValueError, match=difference):
            fit(tmp_path, Automatic(Net()), 7, callback=UnfreezeCallback(schedule, blocks_of), ckpt=saved)


@pytest.mark.parametrize("unit", ["epochs", "steps"])
def test_a_resume_into_more_blocks(tmp_path: Path, unit: Any) -> None:
    """With `strict=False` a run goes on with a schedule that unfreezes more of the blocks, or later; without, never."""
    each = 1 if unit == "epochs" else 6
    fewer = MilestonePreset(milestones={each: 1}, learning_rate_scale=0.5)
    more = MilestonePreset(milestones={each: 1, 3 * each: 3}, learning_rate_scale=0.5)
    whole_net, _ = twins()
    whole = fit(tmp_path, Automatic(whole_net), callback=UnfreezeCallback(more, blocks_of, unit=unit))
    saver = L.callbacks.ModelCheckpoint(tmp_path / "kept")
    keywords = {"enable_checkpointing": True, "callbacks": [saver]}
    fit(tmp_path, Automatic(twins()[0]), 2, callback=UnfreezeCallback(fewer, blocks_of, unit=unit), **keywords)
    (saved,) = (tmp_path / "kept").iterdir()

    with pytest.raises(ValueError, match=r"; pass strict=False to go on with another schedule$"):
        fit(tmp_path, Automatic(Net()), callback=UnfreezeCallback(more, blocks_of, unit=unit), ckpt=saved)
    net, callback = Net(), UnfreezeCallback(more, blocks_of, unit=unit, strict=False)
    resumed = fit(tmp_path, Automatic(net), callback=callback, ckpt=saved)
    assert_equal(net, resumed.optimizers[0], whole_net, whole.optimizers[0])
    assert [(past.epoch, past.number) for past in callback.unfreezer.history] == [(0, 0), (each, 1), (3 * each, 3)]


class Frozen(Automatic):
    """Whose blocks were frozen before the fit, as DistillationUNetWrapper does; one norm is the user's to hold."""

    def __init__(self, net: Net, when: str) -> None:
        super().__init__(net)
        if when == "before":
            net.blocks[2][1].eval()
        for block in net.make_blocks():
            freeze(block)
        if when == "after":
            net.blocks[2][1].eval()


def tracked(net: Net) -> list[int]:
    return [int(block[1].num_batches_tracked) for block in net.blocks]


def test_norms_that_the_library_held_before_the_fit(tmp_path: Path) -> None:
    """They train once their block has joined, as in the plain loop."""
    net, twin = twins()
    run = fit(tmp_path, Frozen(net, "never"))
    optimizer, _ = plain_loop(twin, schedule_of())
    assert_equal(net, run.optimizers[0], twin, optimizer)
    assert tracked(net) == [12, 18, 24]  # six batches an epoch, from epochs 3, 2 and 1 on


def test_the_norms_of_the_wrapper(tmp_path: Path) -> None:
    """DistillationUNetWrapper freezes in its constructor; each block's norms train from the epoch at which it joins."""
    pytest.importorskip("segmentation_models_pytorch")
    from unfreeze_sched.distill import DistillationUNetWrapper  # noqa: PLC0415  # after the skip
    from unfreeze_sched.distill.wrapper import LATER  # noqa: PLC0415

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.wrapper = DistillationUNetWrapper(
                student_encoder="resnet18",
                student_weights=None,
                teacher_encoder="resnet18",
                teacher_checkpoint_path=LATER,
                progressive_unfreeze=True,
            )

        def training_step(self, batch: Any, _: int) -> Tensor:
            student, teacher = self.wrapper(batch[0])
            return nn.functional.mse_loss(student, teacher)

        def validation_step(self, batch: Any, _: int) -> None:
            self.wrapper(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.wrapper.student.parameters(), lr=1e-3)

    module, batches = Module(), DataLoader(TensorDataset(torch.randn(4, 3, 64, 64)), 2)
    preset = RatePreset(unfreeze_start_epoch=1, unfreeze_rate=1)
    callback = UnfreezeCallback(preset, lambda module: module.wrapper.blocks)
    trainer(tmp_path, callback, 3).fit(module, batches, batches)
    tracked = [
        {int(norm.num_batches_tracked) for norm in block.modules() if isinstance(norm, nn.BatchNorm2d)}
        for block in callback.unfreezer.blocks
    ]
    assert tracked == [{0}] * (len(tracked) - 2) + [{2}, {4}]


def test_a_fresh_fit_begins_in_training_mode(tmp_path: Path) -> None:
    """Norms are held once training has begun, after Lightning has looked for modules that are in evaluation mode."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit(tmp_path, Automatic(Net()))
    assert not any("in eval mode at the start" in str(each.message) for each in seen)


@pytest.mark.parametrize("when", ["before", "after"])
def test_norms_that_the_user_put_into_evaluation(tmp_path: Path, when: str) -> None:
    """They stay there, whether that was before the library held them or after."""
    net, _ = twins()
    fit(tmp_path, Frozen(net, when))
    assert tracked(net) == [12, 18, 0]


@pytest.mark.parametrize("first", ["validate", "fit", "interrupted"])
def test_norms_in_a_further_run(tmp_path: Path, first: str) -> None:
    """What evaluations of an earlier run asked of held norms is not the user's wish, neither for the next callback."""
    net, _ = twins()
    module = Frozen(net, "never")
    callback = UnfreezeCallback(PRESET, blocks_of)
    if first == "validate":
        trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    elif first == "fit":
        fit(tmp_path, module, 2, callback=callback)
    else:

        class Stop(L.Callback):
            def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
                if trainer.current_epoch == 1:
                    raise RuntimeError("stop here")

        with pytest.raises(RuntimeError, match="stop here"):
            fit(tmp_path, module, 2, callback=callback, callbacks=[Stop()])
    before = tracked(net)
    fit(tmp_path, module, callback=callback if first == "validate" else UnfreezeCallback(PRESET, blocks_of))
    assert [after - past for after, past in zip(tracked(net), before, strict=True)] == [12, 18, 24]


def test_a_second_fit_begins_anew(tmp_path: Path) -> None:
    """One callback serves several fits, each with the groups of its own start."""
    callback, net = UnfreezeCallback(PRESET, blocks_of), Net()
    first = fit(tmp_path, Automatic(net), callback=callback)
    second = fit(tmp_path, Automatic(net), 2, callback=callback)
    assert [len(run.optimizers[0].param_groups) for run in (first, second)] == [4, 2]
    assert [p.requires_grad for p in net.blocks.parameters()] == [False] * 8 + [True] * 4


def test_blocks_and_rates_are_logged(tmp_path: Path) -> None:
    """The number of blocks, and a rate for each that has joined, reach the user's logger at each epoch."""
    logger = CSVLogger(tmp_path)
    fit(tmp_path, Automatic(twins()[0]), logger=logger, callbacks=[L.callbacks.LearningRateMonitor()])
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["unfreeze/blocks"]]
    assert [(row["step"], row["unfreeze/blocks"]) for row in rows] == [
        ("0", "0"), ("6", "1"), ("12", "2"), ("18", "3"), ("24", "3"),
    ]  # fmt: skip
    for row in rows:
        joined = [name for name in ("block0", "block1", "block2") if row.get(f"unfreeze/lr/{name}")]
        assert joined == ["block0", "block1", "block2"][3 - int(row["unfreeze/blocks"]) :]
        epoch = int(row["step"]) // 6
        rate = 0.01 * 0.5 * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2  # the head's times the scale
        assert all(float(row[f"unfreeze/lr/{name}"]) == pytest.approx(rate) for name in joined)


def test_the_blocks_are_found(tmp_path: Path) -> None:
    """Without `blocks` those of the LightningModule are found by structure."""
    timm = pytest.importorskip("timm")

    class Classifier(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = timm.create_model("resnet10t", num_classes=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, _: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    callback = UnfreezeCallback(RatePreset(unfreeze_start_epoch=0, unfreeze_rate=1))
    run = trainer(tmp_path, callback, 2)
    run.fit(Classifier(), DataLoader(TensorDataset(torch.randn(2, 3, 32, 32), torch.tensor([0, 1])), 2))
    assert [group.get("unfreeze_block") for group in run.optimizers[0].param_groups] == [
        None,
        "net.layer4",
        "net.layer3",
    ]


class Plain(L.LightningModule):
    """As it is often written: the network in an attribute, which the training step calls, and no forward."""

    def __init__(self, name: str, net: nn.Module, **others: nn.Module) -> None:
        super().__init__()
        for key, module in {name: net, **others}.items():
            setattr(self, key, module)
        self.run = getattr(self, name)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return nn.functional.cross_entropy(self.run(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def convolutions() -> nn.Module:
    """A network that no library made, so that its head has to be said."""
    stem, body = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
    return nn.Sequential(stem, nn.ReLU(), body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def known() -> nn.Module:
    return pytest.importorskip("timm").create_model("test_resnet", num_classes=2)


@pytest.mark.parametrize(
    ("module", "head", "fix"),
    [
        (lambda: Plain("net", known()), None, "module.net"),
        (lambda: Plain("student", known(), loss=nn.Linear(2, 2)), None, "module.student"),
        (lambda: Plain("net", known(), teacher=known()), None, "module.model"),  # which of them, nobody knows
        (lambda: Plain("net", convolutions()), None, "module.net, head=[...]"),
        (lambda: Plain("net", convolutions()), lambda module: [module.net[5]], "module.net, head=[...]"),
    ],
)
def test_where_the_blocks_are_is_asked_for(tmp_path: Path, module: Any, head: Any, fix: str) -> None:
    """What encoder_blocks cannot tell of a LightningModule is asked for with the module's own attribute; that way works."""
    text = f"; pass blocks=lambda module: encoder_blocks({fix})"
    with pytest.raises(ValueError, match=re.escape(text) + "$"):
        trainer(tmp_path, UnfreezeCallback(PRESET, head=head), 3).fit(module(), images())
    code = fix.replace("head=[...]", "head=[module.net[5]]").replace("module.model", "module.net")
    blocks = eval(f"lambda module: encoder_blocks({code})", {"encoder_blocks": encoder_blocks})  # noqa: S307
    run = trainer(tmp_path, UnfreezeCallback(PRESET, blocks), 3)
    run.fit(module(), images())
    assert len(run.optimizers[0].param_groups) > 1


def test_what_is_wrong_with_a_head_is_told_of_the_head(tmp_path: Path) -> None:
    """A head that is not in the module is the callback's own argument, and is named as such."""
    callback = UnfreezeCallback(PRESET, head=[nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"`head` must hold parts of the model, .*; pass the modules that train from"):
        trainer(tmp_path, callback, 3).fit(Plain("net", known()), images())


class Pair(L.LightningModule):
    """Two networks and an optimizer for each, as in a GAN."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.nets = nn.ModuleList(twins())

    def training_step(self, batch: Any, _: int) -> None:
        x, y = batch
        for net, optimizer in zip(self.nets, self.optimizers(), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(net(x), y))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(net.parameters(), lr=0.01) for net in self.nets]


def test_two_callbacks_for_two_optimizers(tmp_path: Path) -> None:
    """Two encoders have a callback each, with states of their own in the checkpoint, also where optimizers toggle."""
    presets = (PRESET, PRESET.replace(unfreeze_start_epoch=2))

    def callbacks() -> list[Any]:
        return [
            UnfreezeCallback(preset, lambda module, place=place: module.nets[place].make_blocks(), optimizer=place)
            for place, preset in enumerate(presets)
        ]

    def run(epochs: int, ckpt: Any = None, **keywords: Any) -> tuple[Any, Any]:
        first, second = callbacks()
        fitted, module = (
            trainer(tmp_path, first, epochs, callbacks=[second, *keywords.pop("savers", ())], **keywords),
            Pair(),
        )
        fitted.fit(module, loader(), ckpt_path=ckpt)
        return fitted, module

    whole, module = run(EPOCHS)
    assert [len(optimizer.param_groups) for optimizer in whole.optimizers] == [4, 4]
    saver = L.callbacks.ModelCheckpoint(tmp_path / "kept")
    begun, _ = run(3, savers=[saver], enable_checkpointing=True)
    assert [len(optimizer.param_groups) for optimizer in begun.optimizers] == [3, 2]
    resumed, again = run(EPOCHS, saver.best_model_path)
    for place in range(2):
        assert_equal(again.nets[place], resumed.optimizers[place], module.nets[place], whole.optimizers[place])


class Uneven(Automatic):
    """A group of block parameters alone, at a rate of its own."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(
            [{"params": self.net.head.parameters()}, {"params": self.net.blocks.parameters(), "lr": 1e-5}], lr=0.01
        )


@pytest.mark.parametrize(
    ("make", "callback", "error"),
    [
        (
            Automatic,
            lambda: UnfreezeCallback(PRESET, blocks_of, optimizer=1),
            "`optimizer` must be below 1, the number of optimizers of configure_optimizers, got 1; 0 is the first",
        ),
        (
            Uneven,
            lambda: UnfreezeCallback(PRESET, blocks_of),
            "`optimizer` must not hold a group of block parameters alone with a rate of its own, got group 1 at lr=1e-05; leave it out, and pass learning_rate_scale",
        ),
        (
            Automatic,
            lambda: UnfreezeCallback(UnfreezeSchedule(preset=PRESET, total_blocks=4, total_epochs=5), blocks_of),
            "`schedule` must be for the 3 blocks given, got total_blocks=4; pass total_blocks=len(blocks)",
        ),
    ],
)
def test_a_fit_is_refused(tmp_path: Path, make: Any, callback: Any, error: str) -> None:
    """What does not fit the module's optimizers or blocks is refused when training starts, with one fix."""
    with pytest.raises(ValueError, match=re.escape(error)):
        fit(tmp_path, make(Net()), callback=callback())


def test_a_fit_that_lightning_refuses(tmp_path: Path) -> None:
    """What is wrong before any callback is set up is told as it is."""
    with pytest.raises(MisconfigurationException, match="training_step"):
        trainer(tmp_path, UnfreezeCallback(PRESET, blocks_of)).fit(L.LightningModule(), loader())


def test_a_preset_needs_an_end(tmp_path: Path) -> None:
    """A preset is laid over `max_epochs`, so a run without one needs a schedule."""
    text = "`schedule` must be an UnfreezeSchedule where the run's number of epochs is not known, got a RatePreset; pass UnfreezeSchedule(preset=..., total_blocks=..., total_epochs=...)"
    with pytest.raises(ValueError, match=re.escape(text)):
        fit(tmp_path, Automatic(Net()), -1, max_steps=3)
    fit(tmp_path, Automatic(Net()), -1, max_steps=3, callback=UnfreezeCallback(schedule_of(), blocks_of))


def test_a_trial_run(tmp_path: Path) -> None:
    """`fast_dev_run`, one epoch by nature, does not find fault with a preset that begins later."""
    run = fit(tmp_path, Automatic(Net()), callback=UnfreezeCallback(MEDIUM, blocks_of), fast_dev_run=True)
    assert len(run.optimizers[0].param_groups) == 1


class Halving(torch.optim.lr_scheduler.LRScheduler):
    """A class that nobody knows."""

    def get_lr(self) -> Any:
        return [base * 0.5**self.last_epoch for base in self.base_lrs]


class Known(Halving):
    """One that the user has made known."""

    def get_lr(self) -> Any:
        return [base * 0.5**self.last_epoch for base in self.base_lrs]


class Scheduled(Automatic):
    """With the scheduler of a test, and perhaps a rate of its own."""

    def __init__(self, net: Net, make: Any, *, returned: bool = True, by_hand: bool = False) -> None:
        super().__init__(net)
        self.make, self.returned, self.by_hand = make, returned, by_hand

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.01)
        self.scheduler = self.make(optimizer)
        config = {"scheduler": self.scheduler, "monitor": "val_loss"}
        return {"optimizer": optimizer, **({"lr_scheduler": config} if self.returned else {})}

    def on_train_epoch_end(self) -> None:
        if self.by_hand:
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] = 0.003 * group.get("lr_scale", 1)


def plateau(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", 0.5, patience=0, min_lr=2e-3)


@pytest.mark.parametrize(
    ("module", "fix", "error"),
    [
        (
            {"make": Halving},
            "say what it keeps for each group, by unfreeze_sched.optimizer.rates.register, or return another from configure_optimizers",
            TypeError,
        ),
        (
            {"make": cosine, "returned": False},
            "return it from configure_optimizers, where the callback finds it",
            ValueError,
        ),
        ({"make": plateau}, "pass membership='declared'", ValueError),
        (
            {"make": cosine, "by_hand": True},
            "leave the rate to the LR scheduler, or, where your own code sets each group's, say callback.unfreezer.rebuilder.lr_schedulers = None when training starts",
            ValueError,
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:`lr_schedulers` should have no floor")
def test_refusals_name_what_works_in_lightning(tmp_path: Path, module: Any, fix: str, error: type[Exception]) -> None:
    """Lightning makes the schedulers before the callback sees anything, so no error says to come before them."""
    with pytest.raises(error, match=re.escape(f"; {fix}") + "$"):
        fit(tmp_path, Scheduled(Net(), **module))


def test_what_the_refusals_name_works(tmp_path: Path) -> None:
    """A class made known, a floor declared, and rates that the module's own code sets."""
    rates.register(Known)
    run = fit(tmp_path, Scheduled(Net(), Known))
    assert [group["lr"] for group in run.optimizers[0].param_groups] == [0.01 / 32] + [0.01 / 64] * 3
    declared = UnfreezeCallback(PRESET, blocks_of, membership="declared")
    run = fit(tmp_path, Scheduled(Net(), plateau), callback=declared)
    assert [group["lr"] for group in run.optimizers[0].param_groups] == [2e-3] * 4

    class Own(L.Callback):
        def on_train_start(self, trainer: Any, *_: Any) -> None:
            callback.unfreezer.rebuilder.lr_schedulers = None
            trainer.optimizers[0].param_groups[0]["lr_scale"] = 1.0

    callback = UnfreezeCallback(PRESET, blocks_of)
    run = fit(tmp_path, Scheduled(Net(), cosine, by_hand=True), callback=callback, callbacks=[Own()])
    assert [group["lr"] for group in run.optimizers[0].param_groups] == [0.003] + [0.0015] * 3


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: UnfreezeCallback(PRESET, unit="batches"),
            ValueError,
            "`unit` must be one of epochs, steps, got 'batches'; 'epochs' is the default",
        ),
        (
            lambda: UnfreezeCallback(PRESET, strict="no"),
            TypeError,
            "`strict` must be True or False, got 'no'; False lets another schedule go on",
        ),
        (
            lambda: UnfreezeCallback(7),
            TypeError,
            "`schedule` must be an UnfreezeSchedule or a preset, got int; pass MEDIUM",
        ),
        (
            lambda: UnfreezeCallback(PRESET, optimizer=-1),
            ValueError,
            "`optimizer` must be an integer of at least 0, got -1; 0 is the first of configure_optimizers",
        ),
        (
            lambda: UnfreezeCallback(PRESET, [nn.Linear(2, 2)]),
            TypeError,
            "`blocks`",
        ),
    ],
)
def test_arguments_are_checked_at_once(call: Any, error: type[Exception], text: str) -> None:
    """What needs no model is refused where the callback is made."""
    with pytest.raises(error, match=re.escape(text)):
        call()


def test_an_unknown_keyword_is_named() -> None:
    """A keyword that the unfreezer does not have is refused where the callback is made, not in the fit."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'layer_dekay'"):
        UnfreezeCallback(PRESET, layer_dekay=0.5)


@pytest.mark.parametrize("alone", [False, True])
def test_pytorch_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
    """The older package name works as well, beside the newer one or alone."""
    other = pytest.importorskip("pytorch_lightning")
    make = UnfreezeCallback
    if alone:
        monkeypatch.delitem(sys.modules, "unfreeze_sched.integrations.lightning")
        monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
        make = import_module("unfreeze_sched.integrations.lightning").UnfreezeCallback
        assert issubclass(make, other.Callback)

    class Module(other.LightningModule):
        training_step, configure_optimizers = Automatic.training_step, Automatic.configure_optimizers

        def __init__(self, net: Net) -> None:
            super().__init__()
            self.net = net

    net, twin = twins()
    monkeypatch.setitem(globals(), "L", other)
    run = trainer(tmp_path, make(PRESET, blocks_of))
    run.fit(Module(net), loader())
    optimizer, _ = plain_loop(twin, schedule_of())
    assert_equal(net, run.optimizers[0], twin, optimizer)


def test_a_missing_framework_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Lightning the import says what to install."""
    monkeypatch.delitem(sys.modules, "unfreeze_sched.integrations.lightning")
    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    text = "`UnfreezeCallback` needs lightning, which is not installed; pip install 'unfreeze-sched[lightning]'"
    with pytest.raises(ModuleNotFoundError, match=re.escape(text)):
        import_module("unfreeze_sched.integrations.lightning")


SCRIPT = """
import sys
from pathlib import Path

from processes import leave
from test_lightning import *

root = Path(sys.argv[1])

def run(name, strategy, epochs=EPOCHS, ckpt=None, **keywords):
    net = Net() if ckpt else twins()[0]
    callback = UnfreezeCallback(PRESET, blocks_of, norms="frozen")
    fit = trainer(root, callback, epochs, strategy=strategy, devices=2, **keywords)
    fit.fit(Automatic(net), loader(), ckpt_path=ckpt)
    torch.save([net.state_dict(), fit.optimizers[0].state_dict()], root / f"{name}-{fit.global_rank}.pt")

run("plain", "ddp")
run("unused", "ddp_find_unused_parameters_true")
saver = L.callbacks.ModelCheckpoint(root / "kept")
run("begun", "ddp", 3, enable_checkpointing=True, callbacks=[saver])
run("resumed", "ddp", ckpt=saver.best_model_path)
torch.distributed.barrier()
leave()
"""


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Room for a process group of Lightning's own, which comes and goes with the test."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true"])
def test_ddp_on_one_process(tmp_path: Path, strategy: str) -> None:
    """The quick variant of the next: DDP as such changes nothing, and misses no gradient that it waits for."""
    net, twin = twins()
    optimizer, _ = plain_loop(twin, schedule_of())
    run = fit(tmp_path, Automatic(net), strategy=strategy, use_distributed_sampler=False)
    assert_equal(net, run.optimizers[0], twin, optimizer)


@pytest.mark.slow
def test_ddp_on_two_processes(tmp_path: Path) -> None:
    """Under both kinds of `ddp` two ranks keep equal to the bit, through a resume too, and equal a run on joint batches."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    runs = {path.stem: torch.load(path, weights_only=True) for path in tmp_path.glob("*.pt")}
    for name in ("plain-1", "resumed-0", "resumed-1"):
        assert differences(runs[name], runs["plain-0"]) == []
    assert differences(runs["unused-1"], runs["unused-0"]) == []

    _, twin = twins()
    optimizer, _ = plain_loop(twin, schedule_of(), joint_batches, norms="frozen")
    for name in ("plain-0", "unused-0"):
        weights, state = runs[name]
        torch.testing.assert_close(weights, twin.state_dict(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(state["state"], optimizer.state_dict()["state"], rtol=1e-9, atol=1e-12)


def joint_batches(epoch: int) -> Iterator[Any]:
    """What the two ranks see together: Lightning shuffles for several processes, also what was not shuffled."""
    dataset = loader().dataset
    samplers = [DistributedSampler(dataset, 2, rank, shuffle=True, seed=0) for rank in range(2)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    first, second = map(list, samplers)
    for begin in range(0, len(first), 4):
        yield dataset[first[begin : begin + 4] + second[begin : begin + 4]]


def test_caps_follow_the_monitored_metric(tmp_path: Path) -> None:
    """A guard that is fed the monitored metric holds the blocks, and goes on to hold them after a resume."""

    def callback() -> UnfreezeCallback:
        return UnfreezeCallback(PRESET, blocks_of, monitor="worse", caps=[OverfitGuard(patience=1)])

    class Worse(Automatic):
        def on_validation_epoch_end(self) -> None:
            self.log("worse", float(self.current_epoch))

    first = callback()
    saver = L.callbacks.ModelCheckpoint(tmp_path / "kept")
    fit(tmp_path, Worse(Net()), 3, callback=first, enable_checkpointing=True, callbacks=[saver])
    assert (first.unfreezer.caps[0].cap, len(first.unfreezer.rebuilder.optimizer.param_groups)) == (1, 2)
    second = callback()
    fit(tmp_path, Worse(Net()), callback=second, ckpt=saver.best_model_path)
    assert (second.unfreezer.caps[0].cap, len(second.unfreezer.rebuilder.optimizer.param_groups)) == (1, 2)

    kept = copy.deepcopy(second.unfreezer.caps[0].state_dict())
    second.unfreezer.caps[0].load_state_dict(kept | {"cap": None, "reason": ""})
    before = second.unfreezer.caps[0].state_dict()
    trainer(tmp_path, second).validate(Worse(Net()), loader(), verbose=False)  # no part of the fit
    assert second.unfreezer.caps[0].state_dict() == before

    missing = UnfreezeCallback(PRESET, blocks_of, monitor="loss_of_sleep", caps=[OverfitGuard()])
    with pytest.raises(
        ValueError, match=r"`monitor` must be a metric of the validation, got 'loss_of_sleep'; pass one of .*val_loss"
    ):
        fit(tmp_path, Automatic(Net()), callback=missing)


WAITING = [PlateauTrigger(patience=1)]


@pytest.mark.parametrize(
    ("loaders", "keywords"),
    [
        ((), {}),
        ((loader(),), {"limit_val_batches": 0}),
        ((loader(),), {"check_val_every_n_epoch": 6}),
    ],
)
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_caps_without_a_validation_are_refused(tmp_path: Path, loaders: Any, keywords: Any) -> None:
    """A fit that never comes to a validation would never unfreeze, or never hold: that is said when it starts."""
    text = "`monitor` must be a metric of a validation that takes place, got 'val_loss' in a run without one, so that no cap would ever hear of it; give the fit a validation loader and its module a validation_step, with limit_val_batches above 0 and check_val_every_n_epoch within the run"
    callback = UnfreezeCallback(PRESET, blocks_of, monitor="val_loss", caps=WAITING)
    with pytest.raises(ValueError, match=re.escape(text) + "$"):
        trainer(tmp_path, callback, **keywords).fit(Automatic(Net()), loader(), *loaders)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_caps_that_the_user_feeds_need_no_validation(tmp_path: Path) -> None:
    """Without `monitor` the metric may come from anywhere, such as from training."""
    trigger = PlateauTrigger(patience=1)

    class Feeding(Automatic):
        def on_train_epoch_end(self) -> None:
            trigger.step(1.0)

    callback = UnfreezeCallback(MilestonePreset(milestones={0: 3}), blocks_of, caps=[trigger])
    trainer(tmp_path, callback).fit(Feeding(Net()), loader())
    assert [past.number for past in callback.unfreezer.history] == [0, 1, 2, 3]


TINY = {'"resnet18", pretrained=True, num_classes=10': '"test_resnet", num_classes=10'}


def images() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(2, 3, 32, 32), torch.tensor([0, 1])), 2)


@pytest.fixture
def guide_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the guide's reader has imported and built, in a folder for the Trainer's own files."""
    monkeypatch.chdir(tmp_path)
    return {"L": L, "timm": pytest.importorskip("timm"), "torch": torch, "nn": nn, "train_loader": images()}


@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed:UserWarning")
@pytest.mark.parametrize("which", ["before", "after"])
def test_the_guide(guide_names: dict[str, Any], which: str) -> None:
    """Its fit runs before and after, three lines longer, and resumes as the guide says."""
    diff, _ = snippets("lightning.md", "diff")
    assert added(diff) <= 3
    names = run_guide(side(diff, which), guide_names, TINY)
    groups = names["trainer"].optimizers[0].param_groups
    if which == "before":
        assert len(groups) == 1
        return
    assert len(groups) == 1 + len(names["unfreeze"].unfreezer.blocks)
    _, guard, trigger, explicit = snippets("lightning.md")
    for code in (guard, trigger, explicit):
        run_guide(code, names)
        module = names["Classifier"]()
        run = trainer(Path(), names["unfreeze"], 12)
        module.validation_step = lambda batch, index, module=module: module.log("val_loss", 1.0)
        run.fit(module, images(), images())
    assert [block.name for block in names["unfreeze"].unfreezer.blocks]
    assert [transition.number for transition in names["unfreeze"].unfreezer.history] == [0, 1, 2]


class Kill(L.Callback):
    """Ends a run in the middle of an epoch."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.at:
            raise RuntimeError("killed")


@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed:UserWarning")
@pytest.mark.filterwarnings('ignore:.fit.ckpt_path="last". is set, but there is no last checkpoint:UserWarning')
@pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before:UserWarning")
@pytest.mark.parametrize("exact", [True, False])
def test_the_guide_to_an_exact_resume(guide_names: dict[str, Any], tmp_path: Path, exact: bool) -> None:
    """A run killed in mid-epoch goes on from its last one to the bit, dropout and order included; unseeded it does not."""
    diff, _ = snippets("lightning.md", "diff")
    code, *_ = snippets("lightning.md")
    if not exact:
        code = code.replace("batch_idx == 0", "False")
    dropping = {old: f"{new}, drop_rate=0.5" for old, new in TINY.items()}
    names = run_guide(side(diff, "before"), guide_names, dropping)
    names |= {"DataLoader": DataLoader, "DistributedSampler": DistributedSampler, "Kill": Kill}
    names |= {"ModelCheckpoint": L.callbacks.ModelCheckpoint}
    names["train_set"] = TensorDataset(torch.randn(6, 3, 32, 32), torch.arange(6))

    def run(folder: str, seed: int, at: int = -1) -> dict[str, Tensor]:
        preset = RatePreset(unfreeze_start_epoch=1, unfreeze_rate=1)
        unfreeze = UnfreezeCallback(preset, lambda module: encoder_blocks(module.net))
        instead = {
            "max_epochs=50, callbacks=[": f"max_epochs=5, callbacks=[Kill({at}), ",
            "batch_size=32": "batch_size=2",
            '"runs"': repr(str(tmp_path / folder)),
        }
        torch.manual_seed(seed)
        done = run_guide(code, names | {"unfreeze": unfreeze}, instead)
        return done["trainer"].lightning_module.state_dict()

    whole = run("whole", 0)
    with pytest.raises(RuntimeError, match="killed"):
        run("cut", 0, at=8)
    resumed = run("cut", 1)
    assert all(torch.equal(value, whole[key]) for key, value in resumed.items()) is exact


@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed:UserWarning")
@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist:UserWarning")  # compared by value
@pytest.mark.parametrize("which", ["before", "after"])
def test_the_guide_from_backbone_finetuning(guide_names: dict[str, Any], which: str) -> None:
    """One module serves both callbacks, and the backbone joins at the same epoch, once."""
    _, diff = snippets("lightning.md", "diff")
    assert added(diff) <= 3

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Linear(4, 2)
            self.sizes: list[int] = []

        def training_step(self, batch: Any, _: int) -> Tensor:
            self.sizes.append(len(self.trainer.optimizers[0].param_groups))
            return nn.functional.cross_entropy(self.head(self.backbone(batch[0]).mean((2, 3))), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(filter(lambda p: p.requires_grad, self.parameters()), lr=0.01)

    names = guide_names | {"BackboneFinetuning": L.callbacks.BackboneFinetuning, "module": Module()}
    run_guide(side(diff, which), names)
    assert names["module"].sizes == [1, 1, 2, 2, 2]


def test_a_member_that_is_replaced_in_mid_run(tmp_path: Path) -> None:
    """Blocks made by hand are looked for in the module, so that a new layer in one's place is named."""

    class Replaces(Automatic):
        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 0:
                self.net.blocks[0] = copy.deepcopy(self.net.blocks[0])

    with pytest.raises(RuntimeError, match=r"`blocks` must .*blocks\.0"):
        fit(tmp_path, Replaces(Net()))
