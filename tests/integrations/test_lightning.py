"""Lightning's Trainer with the callback, beside the plain loop over the same batches."""

from __future__ import annotations

import copy
import csv
import math
import re
import subprocess
import sys
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

from unfreeze_sched import MEDIUM, Block, ProgressiveUnfreezer, RatePreset, UnfreezeSchedule  # noqa: E402
from unfreeze_sched.integrations.lightning import UnfreezeCallback  # noqa: E402

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
    net: Net, schedule: UnfreezeSchedule, batches: Callable[[int], Any] = lambda _: loader(), **keywords: Any
) -> tuple[Any, Any]:
    """What the callback has to equal: the library in a loop of one's own."""
    optimizer = torch.optim.AdamW(net.head.parameters(), lr=0.01)
    scheduler = cosine(optimizer)
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, schedule, lr_schedulers=[scheduler], **keywords)
    for epoch in range(EPOCHS):
        net.train()
        unfreezer.apply(epoch)
        for x, y in batches(epoch):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
        scheduler.step()
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


def test_a_preset_needs_an_end(tmp_path: Path) -> None:
    """A preset is laid over `max_epochs`, so a run without one needs a schedule."""
    text = "`schedule` must be an UnfreezeSchedule where the run has no end, got a RatePreset; pass UnfreezeSchedule(preset=..., total_blocks=..., total_epochs=...)"
    with pytest.raises(ValueError, match=re.escape(text)):
        fit(tmp_path, Automatic(Net()), -1, max_steps=3)
    fit(tmp_path, Automatic(Net()), -1, max_steps=3, callback=UnfreezeCallback(schedule_of(), blocks_of))


def test_a_trial_run(tmp_path: Path) -> None:
    """`fast_dev_run`, one epoch by nature, does not find fault with a preset that begins later."""
    run = fit(tmp_path, Automatic(Net()), callback=UnfreezeCallback(MEDIUM, blocks_of), fast_dev_run=True)
    assert len(run.optimizers[0].param_groups) == 1


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
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


@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true"])
def test_ddp_on_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    """The quick variant of the next: DDP as such changes nothing, and misses no gradient that it waits for."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.setenv(name, "")  # Lightning's own come and go with the test
        monkeypatch.delenv(name)
    net, twin = twins()
    optimizer, _ = plain_loop(twin, schedule_of())
    try:
        run = fit(tmp_path, Automatic(net), strategy=strategy, use_distributed_sampler=False)
    finally:
        torch.distributed.destroy_process_group()
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
    from unfreeze_sched.guards import OverfitGuard  # noqa: PLC0415  # where it is used

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
    guard, trigger, explicit = snippets("lightning.md")
    for code in (guard, trigger, explicit):
        run_guide(code, names)
        module = names["Classifier"]()
        run = trainer(Path(), names["unfreeze"], 12)
        module.validation_step = lambda batch, index, module=module: module.log("val_loss", 1.0)
        run.fit(module, images(), images())
    assert [block.name for block in names["unfreeze"].unfreezer.blocks]
    assert [transition.number for transition in names["unfreeze"].unfreezer.history] == [0, 1, 2]


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
