"""`unfreeze-sched distill`: a whole small run, what it leaves, and what it says to wrong input."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("segmentation_models_pytorch")
Image = pytest.importorskip("PIL.Image")

from images import write_images  # noqa: E402  # after the skips

from unfreeze_sched import LARGE, MEDIUM, SMALL, Block, MilestonePreset, UnfreezeSchedule  # noqa: E402  # after the skips
from unfreeze_sched.arguments import preset_from  # noqa: E402
from unfreeze_sched.cli import main, make_parser  # noqa: E402
from unfreeze_sched.distill.command import run, runlog, training  # noqa: E402
from unfreeze_sched.distill.command.runlog import RunLog, warnings_in_one_line  # noqa: E402
from unfreeze_sched.distill.command.training import Settings  # noqa: E402
from unfreeze_sched.distill.loss import DistillationLoss  # noqa: E402
from unfreeze_sched.guards import OverfitGuard  # noqa: E402
from unfreeze_sched.plan.memory import saved_for_backward  # noqa: E402

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
        [sys.executable, "-m", "unfreeze_sched", *words, "--unfreeze_rate", "1", "--compare-frozen", "--tensorboard"],
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
    events = {file for file in files if "/events.out.tfevents." in file}
    assert len(events) == 3
    assert files - events == {
        *("arguments.json", "metrics.jsonl", "result.json", "report.png", "teacher.pth", "student.pth", "frozen.pth"),
        *("teacher/last.pth", "student/last.pth", "frozen/last.pth"),
    }
    last = torch.load(output / "student" / "last.pth", weights_only=True)
    assert set(last) == {"model", "optimizer", "scheduler", "scaler", "unfreezer", "records"}
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
    losses = [record["validation_loss"] for record in records(output)["student"]]
    for epoch, name in ((1, "layer4"), (2, "layer3")):
        before, after = losses[epoch - 1], losses[epoch]
        line = f"student, epoch {epoch}: validation loss {before:.3f} before {name} joined, {after:.3f} after an epoch"
        assert text.count(line) == 1
        assert f" {before:.3f}>{after:.3f} " in text  # in the table, too
    assert "MiB kept" in text
    result = json.loads((output / "result.json").read_text())
    for name in ("student", "frozen"):
        assert f"{name}: loss {result[name]['test_loss']:.3f}, mIoU {100 * result[name]['test_miou']:.1f} %" in text
    assert [
        (each["epoch"], each["blocks"], list(each["learning_rates"]), each["reason"])
        for each in result["student"]["transitions"]
    ] == [(0, 0, [], "schedule"), (1, 1, ["layer4"], "schedule"), (2, 2, ["layer4", "layer3"], "schedule")]
    assert [each["validation_loss_before"] for each in result["student"]["transitions"]] == [None, *losses[:2]]
    assert [each["validation_loss_after"] for each in result["student"]["transitions"]] == [None, *losses[1:]]


def test_tensorboard(finished: tuple[Path, str]) -> None:
    """Read back, the events are the epochs' losses, mIoU, number of blocks and learning rates, each once."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for arm, epochs in records(finished[0]).items():
        events = reading.EventAccumulator(str(finished[0] / arm)).Reload()
        names = {name for record in epochs for name in record["learning_rates"]}
        tags = {"loss/training", "loss/validation", "mIoU/validation", "blocks/unfrozen"}
        assert set(events.Tags()["scalars"]) == tags | {f"learning_rate/{name}" for name in names}
        for tag, key in (
            ("loss/training", "train_loss"),
            ("loss/validation", "validation_loss"),
            ("mIoU/validation", "validation_miou"),
            ("blocks/unfrozen", "blocks"),
        ):
            assert [(each.step, each.value) for each in events.Scalars(tag)] == [
                (record["epoch"], pytest.approx(record[key], rel=1e-6)) for record in epochs
            ]
        for name in names:
            assert [(each.step, each.value) for each in events.Scalars(f"learning_rate/{name}")] == [
                (record["epoch"], pytest.approx(record["learning_rates"][name], rel=1e-6))
                for record in epochs
                if name in record["learning_rates"]
            ]


def test_a_missing_tensorboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """Without its package TensorBoard is refused before anything is read or trained."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(["distill", "--tensorboard", "--output", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        "unfreeze-sched: `--tensorboard` needs tensorboard, which is not installed; "
        "pip install 'unfreeze-sched[tensorboard]'\n"
    )


def test_a_run_is_reproducible(finished: tuple[Path, str], data: Path, tmp_path: Path, capsys: Any) -> None:
    """The same arguments, with the kept teacher, give the same student to the bit; without flags the encoder trains.

    At the head's rate, which is warned of in one line.
    """
    output, _ = finished
    words = ["distill", "--data", str(data), *SMALL_RUN, "--teacher", str(output / "teacher.pth")]
    assert main([*words, "--unfreeze-start", "1", "--unfreeze-rate", "1", "--output", str(tmp_path / "again")]) == 0
    first, again = (torch.load(folder / "student.pth", weights_only=True) for folder in (output, tmp_path / "again"))
    assert all(torch.equal(first[key], again[key]) for key in first)
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main([*words, "--output", str(tmp_path / "full")]) == 0
    assert capsys.readouterr().err == (
        "unfreeze-sched: warning: `learning_rate_scale` should be below 1, got 1: at the head's learning rate the "
        "encoder's pretrained features are overwritten before the head can use them; pass 0.1\n"
    )
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
        (["--guard-patience", "0"], "argument --guard-patience: must be an integer of at least 1, got '0'"),
        (["--guard-patience", "soon"], "argument --guard-patience: must be an integer of at least 1, got 'soon'"),
        (["--guard-restore", "--preset", "large"], "`--guard-restore` must come with --guard-patience, got none; add"),
        (
            ["--guard-patience", "2"],
            "`--guard-patience` must come with progressive unfreezing, got an encoder that tra",
        ),
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


def scripted(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> dict[int, dict[str, torch.Tensor]]:
    """Validation losses of the student as written here; what its checkpoints hold, by epoch."""
    models: dict[int, dict[str, torch.Tensor]] = {}
    evaluate, save = training.evaluate, training.save_atomically
    coming = iter(losses)

    def evaluated(arm: Any, *rest: Any) -> Any:
        loss, miou = evaluate(arm, *rest)
        return (next(coming) if arm.name == "student" else loss), miou

    def saved(state: Any, path: Path) -> None:
        models[len(state["records"]) - 1] = {key: value.clone() for key, value in state["model"].items()}
        save(state, path)

    monkeypatch.setattr(training, "evaluate", evaluated)
    monkeypatch.setattr(training, "save_atomically", saved)
    return models


def guarded(data: Path, teacher: Path, output: Path, *words: str) -> int:
    """A run with a guard: a block more at each epoch from the second on."""
    more = ["--teacher", str(teacher), "--epochs", "5", "--unfreeze-start", "1", "--unfreeze-rate", "1"]
    return main(["distill", "--data", str(data), *SMALL_RUN, *more, *words, "--output", str(output)])


def test_a_guard(
    finished: tuple[Path, str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A guard that trips holds further blocks back, and says so once; resumed, the run ends as if in one go."""
    teacher, reason = finished[0] / "teacher.pth", "held at 2 of 4 blocks after 1 check in a row worse than 0.8"
    losses = [1.0, 0.8, 0.9, 0.7, 0.95]
    with monkeypatch.context() as patch:
        scripted(patch, losses)
        assert guarded(data, teacher, tmp_path / "whole", "--guard-patience", "1") == 0
    captured = capsys.readouterr()
    assert captured.out.count(f"student, epoch 2: {reason}") == 1
    assert captured.out.count(reason) == 2  # and below the table
    assert captured.err == ""
    whole = records(tmp_path / "whole")["student"]
    assert [record["blocks"] for record in whole] == [0, 1, 2, 2, 2]
    assert [record["joined"] for record in whole] == [[], ["layer4"], ["layer3"], [], []]
    result = json.loads((tmp_path / "whole" / "result.json").read_text())["student"]
    assert result["held"].startswith(reason)
    reasons = [each["reason"] for each in result["transitions"]]
    assert reasons[:3] == ["schedule"] * 3
    assert reasons[3:] == [f"OverfitGuard: {result['held']}"]

    class StopError(RuntimeError):
        pass

    def stopped(self: Any, record: Any) -> None:
        if record.arm == "student" and record.epoch == 2:
            raise StopError

    with monkeypatch.context() as patch:
        scripted(patch, losses)
        patch.setattr(RunLog, "epoch", stopped)
        with pytest.raises(StopError):
            guarded(data, teacher, tmp_path / "run", "--guard-patience", "1")
    scripted(monkeypatch, losses[3:])
    capsys.readouterr()
    assert main(["distill", "--resume", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.count(reason) == 1  # below the table alone: it had tripped before
    last, again = (torch.load(tmp_path / name / "student" / "last.pth", weights_only=True) for name in ("whole", "run"))
    assert all(torch.equal(last["model"][key], value) for key, value in again["model"].items())
    assert last["unfreezer"] == again["unfreezer"]


def test_a_guard_that_restores(
    finished: tuple[Path, str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """With `--guard-restore` the best epoch's weights come back when the guard trips, and train on."""
    models = scripted(monkeypatch, [1.0, 0.8, 0.9, 0.7, 0.6])
    words = ["--guard-patience", "1", "--guard-restore"]
    assert guarded(data, finished[0] / "teacher.pth", tmp_path / "run", *words) == 0
    assert all(torch.equal(models[2][key], value) for key, value in models[1].items())
    assert not all(torch.equal(models[3][key], value) for key, value in models[2].items())
    assert "; the weights of the best check, 0.8, are restored" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("patience", "milestones", "checks"),
    [(5, {0: 0, 10: 1, 15: 2}, None), (6, {0: 0, 10: 1, 15: 2, 19: 3}, 5), (1, {0: 0, 10: 1}, 0)],
)
def test_too_patient(patience: int, milestones: dict[int, int], checks: int | None, capsys: Any) -> None:
    """A guard that cannot trip before the last transition is warned of: as many checks as lie between two still can."""
    schedule = UnfreezeSchedule(preset=MilestonePreset(milestones=milestones), total_blocks=4, total_epochs=30)
    blocks = tuple(Block(name, (nn.Linear(1, 1),)) for name in "abcd")
    guard, nothing, trips = OverfitGuard(patience), nn.Identity(), []
    student = training.Arm("student", nothing, nothing, blocks, schedule, "eval", DistillationLoss(), guard)
    with warnings_in_one_line():
        warnings.simplefilter("always")
        run._forecast(student)
    assert capsys.readouterr().err == (
        ""
        if checks is None
        else f"unfreeze-sched: warning: `--guard-patience` {patience} holds no block back: the count starts afresh at "
        f"each transition, and the next is at most {checks} checks away\n"
    )
    for epoch in range(30):  # the loss gets worse at every check
        guard.follow(min(schedule[epoch], 4 if guard.cap is None else guard.cap), 4)
        guard.step(float(epoch))
        trips += [epoch] if guard.cap is not None and not trips else []
    last = schedule.transitions()[-1][0]
    assert (trips[0] < last) == (checks is None)


def test_a_guard_changes_nothing_before_it_trips(finished: tuple[Path, str], data: Path, tmp_path: Path) -> None:
    """A run whose guard never trips is the run without one, to the bit."""
    words = ["distill", "--data", str(data), *SMALL_RUN, "--teacher", str(finished[0] / "teacher.pth")]
    more = ["--unfreeze-start", "1", "--unfreeze-rate", "1", "--guard-patience", "1", "--guard-restore"]
    assert main([*words, *more, "--output", str(tmp_path / "run")]) == 0
    ours, theirs = (torch.load(each / "student.pth", weights_only=True) for each in (tmp_path / "run", finished[0]))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["student"]["held"] is None
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_warnings_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A warning of any kind is one line on standard error, once, without a place in the code, from rank 0 alone."""
    for rank in (0, 1):
        monkeypatch.setattr(runlog, "speaks", lambda rank=rank: rank == 0)
        with warnings_in_one_line():
            warnings.simplefilter("always")
            for _ in range(2):
                warnings.warn("no gradient reached\n  stem/weight", UserWarning, stacklevel=1)
        told = "unfreeze-sched: warning: no gradient reached stem/weight\n" if rank == 0 else ""
        assert capsys.readouterr().err == told


def test_nothing_is_overwritten(finished: tuple[Path, str], data: Path, capsys: Any) -> None:
    """An output folder that holds something is refused."""
    assert main(["distill", "--data", str(data), *SMALL_RUN, "--output", str(finished[0])]) == 2
    assert "`--output` must be a new or empty folder, got " in capsys.readouterr().err


def test_an_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Ctrl-C ends with the shell's code for it and one line."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", interrupted)
    assert main(["distill"]) == 130
    assert capsys.readouterr().err == "unfreeze-sched: interrupted; what was written is whole\n"


def test_a_missing_extra(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Without the extra's packages the command says what to install."""
    monkeypatch.delitem(sys.modules, "unfreeze_sched.distill.command.run")
    monkeypatch.delattr("unfreeze_sched.distill.command.run")
    monkeypatch.setitem(sys.modules, "timm.layers", None)
    assert main(["distill"]) == 2
    error = capsys.readouterr().err
    assert (
        error
        == "unfreeze-sched: `distill` needs timm.layers, which is not installed; pip install 'unfreeze-sched[distill]'\n"
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


def test_synchronised_norms(data: Path) -> None:
    """With `--sync-batchnorm` student and teacher-to-be are converted before their blocks are found, which hold the norms."""
    words = ["distill", "--data", str(data), *SMALL_RUN, "--preset", "large", "--epochs", "9", "--sync-batchnorm"]
    args = make_parser().parse_args([*words, "--student-encoder", "tu-tf_efficientnet_lite0"])
    settings = Settings(1e-3, 4, 0, "cpu")
    wrapper, student = run._student(args, 3, settings, 16)
    for arm in (student, run._teacher(args, wrapper, settings)):
        norms = {m for m in arm.unet.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        assert norms
        assert {type(norm).__name__ for norm in norms} <= {"SyncBatchNorm", "SyncBatchNormAct"}
        held = {module for block in arm.blocks for member in block.members for module in member.modules()}  # type: ignore[union-attr]
        inside = {m for m in arm.unet.encoder.modules() if m in norms}
        assert inside <= held
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in wrapper.teacher.modules())


def test_saved_bytes_by_hand() -> None:
    """Distinct storages are counted once, the model's own not at all, and a frozen layer needs no input kept."""
    layers = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False), nn.Tanh())
    x = torch.zeros(2, 8)

    def count() -> int:
        with saved_for_backward(layers) as saved:
            layers(x)
        return sum(storage.nbytes() for storage in saved)

    # Input, first tanh (also the second layer's input), second tanh; 4 bytes a number.
    assert count() == 4 * (16 + 16 + 8)
    layers[0].requires_grad_(False)
    assert count() == 4 * (16 + 8)
    layers[2].requires_grad_(False)
    assert count() == 0
