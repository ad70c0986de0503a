"""The unfreezing flags on anyone's parser, and the unfreezer that they make."""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from unfreeze_sched import LARGE, MEDIUM, SMALL, Block, ProgressiveUnfreezer, encoder_blocks
from unfreeze_sched.arguments import add_unfreeze_arguments, preset_from, unfreezer_from_args
from unfreeze_sched.model.freezing import norms_of

FLAGS = [
    *("progressive_unfreeze", "preset", "unfreeze_start", "unfreeze_rate", "learning_rate_scale"),
    *("unfreeze_layer_decay", "unfreeze_no_decay", "unfreeze_warmup_steps", "unfreeze_norms", "unfreeze_on_refreeze"),
    "unfreeze_membership",
]


def parse(*words: str, auto: bool = False) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_unfreeze_arguments(parser, auto=auto)
    return parser.parse_args(words)


class Net(nn.Module):
    """Three blocks with a norm each, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(3)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def blocks(self) -> list[Block]:
        return [Block(f"layer{i}", (layer,)) for i, layer in enumerate(self.layers)]


def make(*words: str, total_epochs: int = 30, **keywords: Any) -> tuple[ProgressiveUnfreezer, torch.optim.Optimizer]:
    net = Net()
    optimizer = torch.optim.AdamW(net.head.parameters(), lr=1.0, weight_decay=0.5)
    return unfreezer_from_args(parse(*words), net.blocks(), optimizer, total_epochs=total_epochs, **keywords), optimizer


def test_both_spellings() -> None:
    """Every flag is there with underscores, as the guide has it, and with dashes."""
    parser = argparse.ArgumentParser()
    add_unfreeze_arguments(parser)
    text = parser.format_help()
    for name in FLAGS:
        assert f"--{name}" in text
        assert f"--{name.replace('_', '-')}" in text
    words = ["--progressive-unfreeze", "--unfreeze-start", "1", "--unfreeze-rate", "2", "--unfreeze-no-decay"]
    assert vars(parse(*words)) == vars(parse(*(word.replace("-", "_").replace("__", "--", 1) for word in words)))


@pytest.mark.parametrize(
    ("words", "preset"),
    [
        ([], None),
        (["--learning_rate_scale", "0.5"], None),
        (["--progressive_unfreeze"], MEDIUM),
        (["--preset", "small"], SMALL),
        (["--unfreeze_start", "0"], MEDIUM.replace(unfreeze_start_epoch=0)),
        (["--unfreeze_rate", "2"], MEDIUM.replace(unfreeze_rate=2)),
        (["--unfreeze_layer_decay", "0.9"], MEDIUM),
        (["--unfreeze_no_decay"], MEDIUM),
        (["--unfreeze_warmup_steps", "0"], MEDIUM),
        (["--unfreeze_norms", "frozen"], MEDIUM),
        (["--unfreeze_on_refreeze", "drop"], MEDIUM),
        (["--unfreeze_membership", "declared"], MEDIUM),
        (["--preset", "large", "--unfreeze_rate", "9", "--learning_rate_scale", "0.5"],
         LARGE.replace(unfreeze_rate=9, learning_rate_scale=0.5)),
    ],
)  # fmt: skip
def test_what_implies_progressive_unfreezing(words: list[str], preset: Any) -> None:
    """Any `--preset` or `--unfreeze_*` flag does, a zero included; a flag overrides the preset's value."""
    assert preset_from(parse(*words)) == preset


def test_auto() -> None:
    """`auto` is offered on request alone, goes by the number of images, and says what it needs."""
    assert preset_from(parse("--preset", "auto", auto=True), n_images=20_000) == LARGE
    with pytest.raises(ValueError, match="`n_images` must be given for --preset auto, got None; pass the number of"):
        preset_from(parse("--preset", "auto", auto=True))
    with pytest.raises(SystemExit):
        parse("--preset", "auto")


def test_without_flags_all_blocks_train_from_epoch_0() -> None:
    """The same loop then trains the whole network, at the head's rate, or at a scale that is asked for.

    No warning tells of a rate that nobody asked for; one that is asked for has it.
    """
    unfreezer, optimizer = make()
    assert len(unfreezer.apply(0).added) == 12
    assert [group["lr"] for group in optimizer.param_groups] == [1.0] * 4
    assert not unfreezer.apply(1)
    with pytest.warns(UserWarning, match="`learning_rate_scale` should be below 1"):
        make("--preset", "small", "--learning_rate_scale", "1")
    unfreezer, optimizer = make("--learning_rate_scale", "0.5")
    unfreezer.apply(0)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.5, 0.5, 0.5]


def test_every_flag_arrives() -> None:
    """What is parsed is what the unfreezer does: rates, decay, warm-up, norms, membership."""
    unfreezer, optimizer = make(
        *("--preset", "large", "--unfreeze_start", "2", "--unfreeze_rate", "1", "--learning_rate_scale", "0.5"),
        *("--unfreeze_layer_decay", "0.5", "--unfreeze_no_decay", "--unfreeze_norms", "frozen"),
        *("--unfreeze_on_refreeze", "drop", "--unfreeze_membership", "declared", "--unfreeze_warmup_steps", "7"),
    )
    assert len(optimizer.param_groups) == 7  # declared: two groups a block are there, empty
    assert [unfreezer.schedule.blocks_at(epoch) for epoch in range(6)] == [0, 0, 1, 2, 3, 3]
    unfreezer.apply(4)
    assert [group["lr"] for group in optimizer.param_groups] == [1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5, 0, 0.5, 0, 0.5, 0]
    assert not any(norm.training for block in unfreezer.blocks for norm in norms_of(block))
    assert unfreezer.rebuilder.on_refreeze == "drop"
    # By gradients of one, the first of seven steps moves a joining weight by a seventh of its own rate.
    optimizer.param_groups[1]["weight_decay"] = 0.0
    weight = optimizer.param_groups[1]["params"][0]
    before = weight.detach().clone()
    for parameter in [parameter for group in optimizer.param_groups for parameter in group["params"]]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.allclose(before - weight, torch.full_like(weight, 0.5 / 7), rtol=1e-4)


def test_the_scripts_own_defaults() -> None:
    """Keywords of the unfreezer are defaults that a flag overrides."""
    unfreezer, optimizer = make("--unfreeze_start", "0", "--unfreeze_rate", "1", layer_decay=0.5, norms="train")
    assert unfreezer.norms == "train"
    unfreezer.apply(2)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.1, 0.05, 0.025]
    unfreezer, _ = make("--unfreeze_norms", "eval", norms="train")
    assert unfreezer.norms == "eval"


def test_a_model_and_its_head() -> None:
    """The head is stated where the model does not say it, and left out where blocks are given."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(net[2].parameters(), lr=1.0)
    unfreezer = unfreezer_from_args(parse("--unfreeze_start", "1"), net, optimizer, total_epochs=5, head=optimizer)
    assert [block.name for block in unfreezer.blocks] == ["0", "1"]
    with pytest.raises(ValueError, match="head") as error:
        unfreezer_from_args(parse(), unfreezer.blocks, optimizer, total_epochs=5, head=optimizer)
    assert str(error.value) == "`head` must be left out where blocks are given, got both; what is in no block is head"


def test_a_model_and_its_scheduler() -> None:
    """A model's blocks are found, and the LR scheduler drives them from then on."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet("resnet18", encoder_weights=None)
    optimizer = torch.optim.SGD([*model.decoder.parameters(), *model.segmentation_head.parameters()], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    args = parse("--unfreeze_start", "1", "--unfreeze_rate", "1")
    unfreezer = unfreezer_from_args(args, model, optimizer, [scheduler], total_epochs=5)
    assert [block.name for block in unfreezer.blocks] == [block.name for block in encoder_blocks(model)]
    for epoch in range(3):
        unfreezer.apply(epoch)
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.125, 0.0125, 0.0125])


def test_beside_a_scripts_own_flags() -> None:
    """Common flags stay the script's; where it has a `--preset`, ours is `--unfreeze_preset` alone."""
    parser = argparse.ArgumentParser()
    for name in ("lr", "epochs", "warmup_steps", "warmup-steps", "layer-decay", "no_decay", "norms", "weight_decay"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--preset", default="theirs")
    add_unfreeze_arguments(parser)
    args = parser.parse_args(["--unfreeze_preset", "large", "--warmup_steps", "5", "--learning_rate", "0.1"])
    assert (args.preset, args.warmup_steps, args.learning_rate) == ("theirs", "5", 0.1)
    assert preset_from(args) == LARGE
    assert preset_from(parser.parse_args(["--preset", "small"])) is None


def test_a_flag_that_is_taken() -> None:
    """A parser that has one of our flags already, as after a second call, is refused by name."""
    parser = argparse.ArgumentParser()
    add_unfreeze_arguments(parser)
    text = "`parser` must leave --progressive_unfreeze free, got one that has it; call add_unfreeze_arguments once, or"
    with pytest.raises(ValueError, match=text):
        add_unfreeze_arguments(parser)


def test_arguments_of_another_parser() -> None:
    """Arguments without the flags are refused with the fix."""
    text = "`args` must come from a parser that has the unfreezing flags, got none of 'progressive_unfreeze'; call add_"
    with pytest.raises(ValueError, match=text):
        unfreezer_from_args(argparse.Namespace(epochs=3), [], torch.optim.SGD(Net().head.parameters()), total_epochs=3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--unfreeze_start", "-1"], "--unfreeze-start: must be an integer of at least 0, got '-1'"),
        (["--unfreeze_rate", "0"], "--unfreeze-rate: must be an integer of at least 1, got '0'"),
        (["--unfreeze_rate", "9" * 50], ""),
        (["--unfreeze_start", "1e3"], "--unfreeze-start: must be an integer of at least 0, got '1e3'"),
        (["--learning_rate_scale", "1.5"], "--learning-rate-scale: must be a number above 0 and at most 1, got '1.5'"),
        (
            ["--unfreeze_layer_decay", "nan"],
            "--unfreeze-layer-decay: must be a number above 0 and at most 1, got 'nan'",
        ),
        (["--unfreeze_norms", "batch"], "--unfreeze-norms: invalid choice: 'batch'"),
        (["--unfreeze_warmup_steps", "x" * 90], f"at least 0, got '{'x' * 90}'"),
    ],
)
def test_wrong_values(words: list[str], message: str, capsys: Any) -> None:
    """A wrong value is argparse's own error, which says what was wanted; a number may be as large as it likes."""
    if not message:
        assert preset_from(parse(*words)) is not None
        return
    with pytest.raises(SystemExit, match="2"):
        parse(*words)
    assert message in capsys.readouterr().err


def test_a_schedule_that_does_not_fit() -> None:
    """A start past the end of the run is the schedule's own error."""
    with pytest.raises(ValueError, match="`unfreeze_start_epoch` must start before `total_epochs`, 5, got 10"):
        make("--progressive_unfreeze", total_epochs=5)


def test_parsing_needs_no_torch() -> None:
    """A script may add, parse and show the flags before anything heavy is imported."""
    code = (
        "import argparse, sys; from unfreeze_sched.arguments import add_unfreeze_arguments, preset_from;"
        "p = argparse.ArgumentParser(); add_unfreeze_arguments(p); p.format_help();"
        "assert preset_from(p.parse_args(['--unfreeze_start', '3'])).unfreeze_start_epoch == 3;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
