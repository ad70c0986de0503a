"""Lightning's command line sets the callback from YAML: every preset, and what else it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Net
from snippets import snippets
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from unfreeze_sched import FractionPreset, MilestonePreset, RatePreset, UnfreezeSchedule

L = pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")
cli = pytest.importorskip("lightning.pytorch.cli")
from unfreeze_sched.integrations.lightning import UnfreezeCallback  # noqa: E402  # after the skips

PRESETS = {
    "RatePreset": ("unfreeze_start_epoch: 1, unfreeze_rate: 1", RatePreset(unfreeze_start_epoch=1, unfreeze_rate=1)),
    "MilestonePreset": ("milestones: {1: 1, 2: 2}", MilestonePreset(milestones={1: 1, 2: 2})),
    "FractionPreset": ("start: 0.25, end: 0.75", FractionPreset(start=0.25, end=0.75)),
}


class Module(L.LightningModule):
    """An encoder that is called so, and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*Net(2, dtype=torch.float32).blocks)
        self.decoder = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.ones(4, 4)), batch_size=2)


def trainer_of(tmp_path: Path, callback: str) -> Any:
    """What the command line makes of a configuration with one callback."""
    config = tmp_path / "config.yaml"
    quiet = "logger: false, enable_checkpointing: false, enable_progress_bar: false, enable_model_summary: false"
    config.write_text(f"trainer: {{max_epochs: 4, {quiet}, accelerator: cpu, callbacks: [{callback}]}}")
    arguments = ["--config", str(config)]
    return cli.LightningCLI(Module, run=False, save_config_callback=None, seed_everything_default=0, args=arguments)


def callback_of(run: Any) -> UnfreezeCallback:
    (callback,) = (each for each in run.trainer.callbacks if isinstance(each, UnfreezeCallback))
    return callback


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.filterwarnings("ignore")  # Lightning's own, of a run as small as this
def test_presets_from_yaml(tmp_path: Path, name: str) -> None:
    """Each preset is set from YAML, beside named options and a guard; the fit unfreezes by it."""
    fields, preset = PRESETS[name]
    run = trainer_of(
        tmp_path,
        "{class_path: unfreeze_sched.integrations.lightning.UnfreezeCallback, init_args: {"
        f"schedule: {{class_path: unfreeze_sched.{name}, init_args: {{{fields}}}}}, layer_decay: 0.5, norms: frozen, "
        "caps: [{class_path: unfreeze_sched.guards.OverfitGuard, init_args: {patience: 2}}]}}",
    )
    run.trainer.fit(run.model)
    unfreezer = callback_of(run).unfreezer
    assert unfreezer is not None
    assert unfreezer.schedule == UnfreezeSchedule(preset=preset, total_blocks=2, total_epochs=4)
    assert (unfreezer.norms, unfreezer.caps[0].patience) == ("frozen", 2)  # type: ignore[attr-defined]
    assert unfreezer.rebuilder.learning_rates() == pytest.approx({"encoder.1": 0.01, "encoder.0": 0.005})
    assert [transition.number for transition in unfreezer.history] == [0, 1, 2]


@pytest.mark.filterwarnings("ignore")
def test_the_guide(tmp_path: Path) -> None:
    """The guide's YAML is one that the command line takes."""
    (text,) = snippets("lightning.md", "yaml")
    config = tmp_path / "config.yaml"
    config.write_text(text)
    run = cli.LightningCLI(
        Module, run=False, save_config_callback=None, seed_everything_default=0, args=["--config", str(config)]
    )
    assert callback_of(run)._schedule == MilestonePreset(milestones={10: 1, 20: 4})
