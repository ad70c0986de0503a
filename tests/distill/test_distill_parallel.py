"""`unfreeze-sched distill` on several ranks: equal weights, sums over all of them, one set of files, one voice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import environment

pytest.importorskip("segmentation_models_pytorch")
pytest.importorskip("PIL.Image")

from images import write_images  # after the skips

from unfreeze_sched.cli import main  # after the skips
from unfreeze_sched.distill.command.data import data_of
from unfreeze_sched.distill.command.ranks import Ranks, first_to_fail
from unfreeze_sched.distill.command.run import _refuse_many_ranks, _settings, _student
from unfreeze_sched.distill.command.runfolder import saved_run
from unfreeze_sched.distill.command.training import evaluate

HERE = Path(__file__).parent
ENVIRONMENT = environment() | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GLOO_SOCKET_IFNAME": "lo"}
WORDS = [
    *("--image-size", "32", "--batch-size", "4", "--epochs", "3", "--teacher-epochs", "1", "--device", "cpu"),
    *("--teacher-encoder", "resnet18", "--student-weights", "none", "--unfreeze-start", "1", "--unfreeze-rate", "1"),
    *("--accumulate", "2", "--gradient-clip", "1"),
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]


def run(folder: Path, words: list[str], *, ranks: int = 1, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command on so many ranks; what they hold lies in the folder."""
    folder.mkdir(exist_ok=True)
    start = [sys.executable] if ranks == 1 else [*TORCHRUN, str(ranks)]
    return subprocess.run(
        [*start, str(HERE / "distill_worker.py"), str(folder), "distill", *words],
        check=False,
        capture_output=True,
        text=True,
        env=ENVIRONMENT | environment,
        timeout=600,
    )


def held(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / f"{name}.{rank}.pt", weights_only=True)
    return state


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Weights and statistics are equal to the bit."""
    assert ours["weights"].keys() == theirs["weights"].keys()
    assert all(torch.equal(ours["weights"][key], value) for key, value in theirs["weights"].items())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images: 14 to train on, in batches of 4, 4 and 4; four for validation, five for the test."""
    return write_images(tmp_path_factory.mktemp("data"), 23)


def whole_run(folder: Path, data: Path, encoder: str = "resnet18") -> str:
    words = [*WORDS, "--data", str(data), "--student-encoder", encoder, "--output", str(folder / "run")]
    result = run(folder, words, ranks=2)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("two")
    return folder, whole_run(folder, data)


def records(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["arm"] == "student"]


def test_two_ranks_are_equal(two: tuple[Path, str]) -> None:
    """Over transitions and accumulated batches, teacher included, two ranks are equal to the bit, statistics too."""
    for name in ("teacher", "student"):
        assert_same(held(two[0], name, 1), held(two[0], name, 0))
    assert [record["optimizer_step"] for record in records(two[0])] == [0, 2, 4]  # 3 batches are two steps


def test_figures_are_those_of_all_ranks(two: tuple[Path, str]) -> None:
    """Training losses are sums over all images; validation figures are what one process gets with the same weights."""
    folder, _ = two
    ours, theirs = (held(folder, "student", rank)["sums"] for rank in range(2))
    args, _ = saved_run(folder / "run")
    settings = _settings(args, Ranks())
    _, validation, _ = data_of(args, print)
    args.teacher = str(folder / "run" / "teacher.pth")
    _, arm = _student(args, 3, settings, 18)
    for epoch, record in enumerate(records(folder)):
        own, other = ours[2 * epoch], theirs[2 * epoch]  # of training, then of validation
        assert own[1] == other[1] == 6
        assert own[0] != other[0]
        assert record["train_loss"] == (own[0] + other[0]) / 12
        arm.unet.load_state_dict(torch.load(folder / f"student.{epoch}.last.pth", weights_only=True)["model"])
        loss, miou = evaluate(arm, validation, settings)
        assert record["validation_loss"] == pytest.approx(loss, rel=1e-12)
        assert record["validation_miou"] == pytest.approx(miou, rel=1e-12)


def test_rank_0_alone_writes_and_tells(two: tuple[Path, str]) -> None:
    """Two ranks leave the files of one process, and each line is there once."""
    folder, text = two
    files = {str(path.relative_to(folder / "run")) for path in (folder / "run").rglob("*") if path.is_file()}
    assert files == {
        *("arguments.json", "metrics.jsonl", "result.json", "report.png", "teacher.pth", "student.pth"),
        *("teacher/last.pth", "student/last.pth"),
    }
    assert len(records(folder)) == 3
    for line in ("; cpu, 2 ranks; into", "student, epoch 1: layer4 joins", "student, epoch 2: layer3 joins", "in all"):
        assert text.count(line) == 1


def interrupted(folder: Path, source: Path) -> Path:
    """A run that was cut off after the student's first epoch."""
    output = shutil.copytree(source / "run", folder / "run")
    shutil.copy(source / "student.0.last.pth", output / "student" / "last.pth")
    for name in ("student.pth", "result.json", "report.png"):
        (output / name).unlink()
    return output


def test_resumed_on_two_ranks(two: tuple[Path, str], tmp_path: Path) -> None:
    """Two ranks that were interrupted before a transition go on to the same weights, to the bit."""
    output = interrupted(tmp_path, two[0])
    result = run(tmp_path, ["--resume", str(output)], ranks=2)
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        assert_same(held(tmp_path, "student", rank), held(two[0], "student"))


@pytest.mark.slow
def test_resumed_on_another_number_of_ranks(two: tuple[Path, str], tmp_path: Path) -> None:
    """A checkpoint says nothing of the number of ranks: one process goes on from that of two."""
    output = interrupted(tmp_path, two[0])
    result = run(tmp_path, ["--resume", str(output)])
    assert result.returncode == 0, result.stderr
    assert [record["optimizer_step"] for record in records(tmp_path)] == [0, 2, 4]
    assert sum(own[1] for own in held(tmp_path, "student")["sums"][::2]) == 28  # all 14 images of both further epochs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`timm-` encoders are deprecated:DeprecationWarning")
@pytest.mark.parametrize("encoder", ["timm-efficientnet-b0", "mit_b0"])
def test_stochastic_depth_of_real_encoders(encoder: str, data: Path, tmp_path: Path) -> None:
    """Encoders that draw in training leave two ranks equal to the bit, also where the run was interrupted."""
    whole_run(tmp_path, data, encoder)
    assert_same(held(tmp_path, "student", 1), held(tmp_path, "student", 0))
    again = tmp_path / "again"
    again.mkdir()
    assert run(again, ["--resume", str(interrupted(again, tmp_path))], ranks=2).returncode == 0
    assert_same(held(again, "student"), held(tmp_path, "student"))


def own_lines(stderr: str) -> list[str]:
    """What the command said, without torchrun's own report of it."""
    return [line for line in stderr.splitlines() if line.startswith("unfreeze-sched")]


def test_a_rank_that_fails_ends_all(two: tuple[Path, str], data: Path, tmp_path: Path) -> None:
    """A rank that fails in the middle of a run says so in one line, and the other ends without a word."""
    words = [*WORDS, "--data", str(data), "--student-encoder", "resnet18", "--output", str(tmp_path / "run")]
    result = run(tmp_path, [*words, "--teacher", str(two[0] / "run" / "teacher.pth")], ranks=2, FAILS="1")
    assert result.returncode != 0
    assert own_lines(result.stderr) == ["unfreeze-sched: the disk must have room, got none; make some"]
    assert "exitcode  : 2" in result.stderr
    assert "distill_worker.py" not in result.stderr.partition("Root Cause")[0].partition("Traceback")[0]
    assert "gloo" not in result.stderr.lower()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--data", "/nowhere"], "unfreeze-sched: /nowhere/images must be a folder, got none; the data is DIR with im"),
        pytest.param(
            ["--epochs", "0"],
            "unfreeze-sched distill: argument --epochs: must be an integer of at least 1, got '0'; see ",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--device", "cpu:0"],
            "unfreeze-sched: `--device` must be cpu or cuda with several ranks, got 'cpu:0'; with cuda each takes its ",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_wrong_input_is_told_once(words: list[str], line: str, data: Path, tmp_path: Path) -> None:
    """Wrong input is one line, not one a rank, and exit code 2."""
    result = run(tmp_path, [*WORDS, "--data", str(data), *words, "--output", str(tmp_path / "run")], ranks=2)
    told = own_lines(result.stderr)
    assert len(told) == 1
    assert told[0].startswith(line)
    assert "exitcode  : 2" in result.stderr
    assert result.stdout == ""


def no_such_device(*_: object, **__: object) -> torch.Tensor:
    raise RuntimeError("CUDA error: invalid device ordinal")


def test_ranks_that_cannot_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch or data that cannot be shared evenly are refused, and so is a GPU for all ranks, or fewer than ranks."""
    _refuse_many_ranks(8, 8, Ranks(1, 4))
    _refuse_many_ranks(2, 1, Ranks())
    for size, instead in ((3, 8), (4, 8), (15, 12)):
        with pytest.raises(
            ValueError, match=rf"`--batch-size` must be a mul.* 4, and at .* 8, got {size};.* {instead}$"
        ):
            _refuse_many_ranks(size, 99, Ranks(1, 4))
    with pytest.raises(ValueError, match="the training images must be at least 8 for 4 ranks, got 7; start fewer"):
        _refuse_many_ranks(8, 7, Ranks(1, 4))
    with pytest.raises(ValueError, match="must be cpu or cuda with several ranks, got 'cuda:0'; with cuda each takes"):
        Ranks(1, 2, 1).device("cuda:0")
    monkeypatch.setattr(torch, "zeros", no_such_device)
    with pytest.raises(
        ValueError, match="must be a device of this machine, got 'cuda:1'; start one rank a GPU, or say"
    ):
        Ranks(1, 2, 1).device("cuda")
    monkeypatch.undo()
    assert Ranks(1, 2, 1).device("cpu") == "cpu"


def test_half_an_environment(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    """A WORLD_SIZE without the rest of torchrun's environment is one line."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    first_to_fail.cache_clear()
    try:
        assert main(["distill", "--output", str(tmp_path / "run")]) == 2
    finally:
        first_to_fail.cache_clear()
    assert capsys.readouterr().err == (
        "unfreeze-sched: the environment must be torchrun's where WORLD_SIZE is 2, got no RANK; "
        "start with torchrun --nproc-per-node N -m unfreeze_sched, or unset WORLD_SIZE\n"
    )
    assert not (tmp_path / "run").exists()
