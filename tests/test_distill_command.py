"""`unfreeze-sched distill`: a whole small run, what it leaves, and what it says to wrong input."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("segmentation_models_pytorch")
Image = pytest.importorskip("PIL.Image")

from images import write_images  # noqa: E402  # after the skips

from unfreeze_sched import LARGE, MEDIUM, SMALL  # noqa: E402  # after the skips
from unfreeze_sched.cli import main, make_parser  # noqa: E402
from unfreeze_sched.distill import command  # noqa: E402
from unfreeze_sched.distill.arguments import preset_from  # noqa: E402
from unfreeze_sched.distill.memory import saved_for_backward  # noqa: E402

SMALL_RUN = [
    *("--image-size", "32", "--batch-size", "4", "--epochs", "3", "--teacher-epochs", "1"),
    *("--student-encoder", "resnet18", "--teacher-encoder", "resnet18", "--student-weights", "none"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images of 40 x 36 pixels in three classes."""
    return write_images(tmp_path_factory.mktemp("data"), 16)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a whole run with a teacher of its own and a frozen twin."""
    output = tmp_path_factory.mktemp("run") / "new"
    words = ["distill", "--data", str(data), "--output", str(output), *SMALL_RUN, "--unfreeze_start", "1"]
    result = subprocess.run(
        [sys.executable, "-m", "unfreeze_sched", *words, "--unfreeze_rate", "1", "--compare-frozen"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return output, result.stdout


def records(output: Path) -> dict[str, list[dict[str, Any]]]:
    arms: dict[str, list[dict[str, Any]]] = {}
    for line in (output / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        arms.setdefault(record["arm"], []).append(record)
    return arms


def test_metrics_of_every_epoch(finished: tuple[Path, str]) -> None:
    """One JSON line an epoch and arm: blocks by the schedule, losses and mIoU in range, rates along the cosine."""
    arms = records(finished[0])
    assert {name: [r["blocks"] for r in arm] for name, arm in arms.items()} == {
        "teacher": [4],
        "student": [0, 1, 2],
        "frozen": [0, 0, 0],
    }
    for arm in arms.values():
        for record in arm:
            assert math.isfinite(record["train_loss"])
            assert math.isfinite(record["validation_loss"])
            assert 0 <= record["validation_miou"] <= 1
            assert record["seconds"] > 0
    steps = 3  # 10 training images in batches of 4
    for epoch, record in enumerate(arms["student"]):
        head = 1e-3 * (1 + math.cos(math.pi * epoch * steps / (3 * steps))) / 2
        expected = {"head": head, **dict.fromkeys(["layer4", "layer3"][:epoch], head * MEDIUM.learning_rate_scale)}
        assert record["learning_rates"] == pytest.approx(expected, rel=1e-9)


def test_moments_are_kept_at_every_transition(finished: tuple[Path, str]) -> None:
    """AdamW's own step count of the head goes on through the transitions, where re-creating it would begin at 0."""
    assert [record["optimizer_step"] for record in records(finished[0])["student"]] == [0, 3, 6]


def test_unfreezing_costs_memory(finished: tuple[Path, str]) -> None:
    """Each further block makes the first step keep more for backward; the frozen run stays where it began."""
    arms = records(finished[0])
    kept = [record["saved_bytes"] for record in arms["student"]]
    assert kept[0] < kept[1] < kept[2]
    assert {record["saved_bytes"] for record in arms["frozen"]} == {kept[0]}


def test_frozen_and_student_begin_alike(finished: tuple[Path, str]) -> None:
    """Up to the first transition both arms are one and the same run."""
    arms = records(finished[0])
    keys = ("train_loss", "validation_loss", "validation_miou", "learning_rates")
    assert [arms["student"][0][key] for key in keys] == [arms["frozen"][0][key] for key in keys]
    assert arms["student"][2]["train_loss"] != arms["frozen"][2]["train_loss"]


def test_checkpoints(finished: tuple[Path, str]) -> None:
    """Checkpoints open with `weights_only=True`, hold no teacher, and no temporary file is left."""
    output, _ = finished
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert files == {
        *("arguments.json", "metrics.jsonl", "result.json", "report.png", "teacher.pth", "student.pth", "frozen.pth"),
        *("teacher/last.pth", "student/last.pth", "frozen/last.pth"),
    }
    last = torch.load(output / "student" / "last.pth", weights_only=True)
    assert set(last) == {"model", "optimizer", "scheduler", "unfreezer", "records", "random"}
    assert [record["epoch"] for record in last["records"]] == [0, 1, 2]
    weights = torch.load(output / "student.pth", weights_only=True)
    assert all(torch.equal(weights[key], value) for key, value in last["model"].items())
    assert set(weights) == set(
        torch.load(output / "teacher.pth", weights_only=True)
    )  # one architecture, no teacher in it
    assert len(last["optimizer"]["param_groups"]) == 3


def test_the_report_and_the_console(finished: tuple[Path, str]) -> None:
    """The picture is there; the console says what joins at which rate, what never joins, the phases and both results."""
    output, text = finished
    with Image.open(output / "report.png") as picture:
        assert picture.size > (800, 800)
    assert "student, epoch 1: layer4 joins at learning rate 7.50e-05 (15 tensors; head at 7.50e-04" in text
    assert "its AdamW moments kept from step 3)" in text
    assert "never within 3 epochs: layer2, layer1; train longer" in text
    assert "MiB kept" in text
    result = json.loads((output / "result.json").read_text())
    for name in ("student", "frozen"):
        assert f"{name}: loss {result[name]['test_loss']:.3f}, mIoU {100 * result[name]['test_miou']:.1f} %" in text


def test_a_run_is_reproducible(finished: tuple[Path, str], data: Path, tmp_path: Path) -> None:
    """The same arguments, with the kept teacher, give the same student to the bit; without flags the encoder trains."""
    output, _ = finished
    words = ["distill", "--data", str(data), *SMALL_RUN, "--teacher", str(output / "teacher.pth")]
    assert main([*words, "--unfreeze-start", "1", "--unfreeze-rate", "1", "--output", str(tmp_path / "again")]) == 0
    first, again = (torch.load(folder / "student.pth", weights_only=True) for folder in (output, tmp_path / "again"))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert main([*words, "--output", str(tmp_path / "full")]) == 0
    full = records(tmp_path / "full")["student"]
    assert [record["blocks"] for record in full] == [4, 4, 4]
    assert set(full[0]["learning_rates"].values()) == {1e-3}


def test_a_binary_teacher(data: Path, tmp_path: Path) -> None:
    """With masks of two classes and a teacher of one channel, as the guide's, the student has one channel too."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    binary = tmp_path / "binary"
    for part in ("images", "masks"):
        (binary / part).mkdir(parents=True)
    for path in (data / "masks").iterdir():
        Image.fromarray(np.minimum(np.asarray(Image.open(path)), 1)).save(binary / "masks" / path.name)
        (binary / "images" / path.name).write_bytes((data / "images" / path.name).read_bytes())
    torch.save({"state_dict": smp.Unet("resnet18", encoder_weights=None).state_dict()}, tmp_path / "one.pth")
    words = ["--teacher", str(tmp_path / "one.pth"), "--preset", "large", "--unfreeze-start", "0"]
    assert main(["distill", "--data", str(binary), *SMALL_RUN, *words, "--output", str(tmp_path / "out")]) == 0
    assert torch.load(tmp_path / "out" / "student.pth", weights_only=True)["segmentation_head.0.weight"].shape[0] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "0"], "argument --epochs: must be an integer of at least 1, got '0'"),
        (["--epochs", "many"], "argument --epochs: must be an integer of at least 1, got 'many'"),
        (["--image-size", "50"], "--image-size: must be an integer of at least 32 and a multiple of 32, got '50'"),
        (["--batch-size", "1"], "argument --batch-size: must be an integer of at least 2, got '1'"),
        (
            ["--seed", "9" * 30],
            "argument --seed: must be an integer of at least 0 and at most 9223372036854775807, got '999",
        ),
        (["--device", "meta"], "`--device` must be a device of this machine, got 'meta'; leave it out or say cpu"),
        (["--lr", "nan"], "argument --lr: must be a number above 0, got 'nan'"),
        (["--learning-rate-scale", "2"], "--learning-rate-scale: must be a number above 0 and at most 1, got '2'"),
        (["--preset", "huge"], "argument --preset: invalid choice: 'huge'"),
        (["--unfreeze_strat", "1"], "unrecognized arguments: --unfreeze_strat 1"),
        (
            ["--preset", "small", "--epochs", "10"],
            "`unfreeze_start_epoch` must start before `total_epochs`, 10, got 20; no",
        ),
        (["--data", "/nowhere"], "/nowhere/images must be a folder, got none; the data is DIR with images/ and masks/"),
        (["--teacher", "/nowhere.pth"], "/nowhere.pth: must be a checkpoint, got no such file; check the path"),
        (["--student-encoder", "resnet19"], "`encoder` must be a name that smp knows, got 'resnet19'; see smp"),
        (["--device", "abacus"], "`--device` must be a device of this machine, got 'abacus'; leave it out or say cpu"),
        (["--student-weights", "/nowhere.pth"], "/nowhere.pth: must be a checkpoint, got no such file; check the path"),
    ],
)
def test_wrong_input(
    words: list[str], message: str, finished: tuple[Path, str], data: Path, tmp_path: Path, capsys: Any
) -> None:
    """Wrong input is one line on standard error, with what and why, and exit code 2."""
    base = [
        "--data",
        str(data),
        *SMALL_RUN,
        "--teacher",
        str(finished[0] / "teacher.pth"),
        "--output",
        str(tmp_path / "o"),
    ]
    try:
        code = main(["distill", *base, *words])
    except SystemExit as stop:  # argparse's own way out
        code = int(stop.code or 0)
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [["--unfreeze_start", "9"], ["--student-encoder", "resnet19"], ["--student-weights", "/nowhere.pth"]],
)
def test_no_teacher_is_trained_for_nothing(words: list[str], data: Path, tmp_path: Path, capsys: Any) -> None:
    """What the student would refuse is refused before a teacher is trained, and the folder can be used again."""
    assert main(["distill", "--data", str(data), *SMALL_RUN, *words, "--output", str(tmp_path)]) == 2
    assert "teacher, epoch" not in capsys.readouterr().out
    assert not any(tmp_path.iterdir())


def test_a_last_batch_of_one(data: Path, finished: tuple[Path, str], tmp_path: Path) -> None:
    """A last batch of one image, on which a batch norm cannot train, is left for another epoch's order."""
    words = ["distill", "--data", str(data), *SMALL_RUN, "--teacher", str(finished[0] / "teacher.pth")]
    assert main([*words, "--batch-size", "9", "--output", str(tmp_path / "run")]) == 0
    assert [record["optimizer_step"] for record in records(tmp_path / "run")["student"]] == [0, 1, 2]


def test_nothing_is_overwritten(finished: tuple[Path, str], data: Path, capsys: Any) -> None:
    """An output folder that holds something is refused."""
    assert main(["distill", "--data", str(data), *SMALL_RUN, "--output", str(finished[0])]) == 2
    assert "`--output` must be a new or empty folder, got " in capsys.readouterr().err


def test_an_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Ctrl-C ends with the shell's code for it and one line."""

    def interrupted(_: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupted)
    assert main(["distill"]) == 130
    assert capsys.readouterr().err == "unfreeze-sched: interrupted; what was written is whole\n"


def test_a_missing_extra(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Without the extra's packages the command says what to install."""
    monkeypatch.delitem(sys.modules, "unfreeze_sched.distill.command")
    monkeypatch.delattr("unfreeze_sched.distill.command")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["distill"]) == 2
    error = capsys.readouterr().err
    assert (
        error
        == "unfreeze-sched: `distill` needs rich.console, which is not installed; pip install 'unfreeze-sched[distill]'\n"
    )


def test_help_needs_no_torch() -> None:
    """The parser, with all its help, is there without torch."""
    code = (
        "import sys; from unfreeze_sched.cli import make_parser; make_parser().format_help();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "preset"),
    [
        ([], None),
        (["--learning-rate-scale", "0.5"], None),
        (["--progressive_unfreeze"], MEDIUM),
        (["--progressive-unfreeze", "--unfreeze_start", "10", "--unfreeze_rate", "5"], MEDIUM),
        (["--unfreeze_start", "0"], MEDIUM.replace(unfreeze_start_epoch=0)),
        (["--unfreeze-rate", "2"], MEDIUM.replace(unfreeze_rate=2)),
        (["--preset", "large"], LARGE),
        (["--preset", "auto"], SMALL),
        (["--preset", "large", "--unfreeze-start", "3", "--learning-rate-scale", "0.5"],
         LARGE.replace(unfreeze_start_epoch=3, learning_rate_scale=0.5)),
    ],
)  # fmt: skip
def test_flags(words: list[str], preset: Any) -> None:
    """A preset or any unfreezing flag implies progressive unfreezing, and a flag overrides the preset's value."""
    assert preset_from(make_parser().parse_args(["distill", *words]), n_images=400) == preset


def test_saved_bytes_by_hand() -> None:
    """Distinct storages are counted once, the model's own not at all, and a frozen layer needs no input kept."""
    layers = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False), nn.Tanh())
    x = torch.zeros(2, 8)

    def count() -> int:
        with saved_for_backward(layers) as saved:
            layers(x)
        return saved.total

    # Input, first tanh (also the second layer's input), second tanh; 4 bytes a number.
    assert count() == 4 * (16 + 16 + 8)
    layers[0].requires_grad_(False)
    assert count() == 4 * (16 + 8)
    layers[2].requires_grad_(False)
    assert count() == 0
