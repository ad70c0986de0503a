"""`unfreeze-sched distill` on several ranks: one model, that of one process, one set of files, one voice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import joint_worker
import pytest
import torch
from processes import environment

pytest.importorskip("segmentation_models_pytorch")
pytest.importorskip("PIL.Image")

from images import write_images  # after the skips

from unfreeze_sched.cli import main  # after the skips
from unfreeze_sched.distill.command.joint import share_of
from unfreeze_sched.distill.command.ranks import Ranks, first_to_fail

HERE = Path(__file__).parent
ENVIRONMENT = environment() | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GLOO_SOCKET_IFNAME": "lo"}
WORDS = [
    *("--image-size", "32", "--batch-size", "5", "--epochs", "3", "--teacher-epochs", "1", "--device", "cpu"),
    *("--teacher-encoder", "resnet18", "--student-weights", "none", "--unfreeze-start", "1", "--unfreeze-rate", "1"),
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
        timeout=240,
    )


def held(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / f"{name}.{rank}.pt", weights_only=True)
    return state


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Equal to the bit."""
    assert torch.equal(ours["random"], theirs["random"])
    assert ours["weights"].keys() == theirs["weights"].keys()
    assert all(torch.equal(ours["weights"][key], value) for key, value in theirs["weights"].items())


def assert_close(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Equal within float error, which AdamW magnifies where a gradient is nothing but error."""
    assert torch.equal(ours["random"], theirs["random"])
    assert ours["weights"].keys() == theirs["weights"].keys()
    for key, value in theirs["weights"].items():
        torch.testing.assert_close(ours["weights"][key], value, atol=1e-6, rtol=1e-6, msg=key)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images: 14 to train on, in batches of 5, 5 and 4; four for validation, five for the test.

    None of two: at 32 pixels the deepest norms see a value an image, and of two they leave a sign, whose gradient is
    nothing but rounding, which AdamW makes a step of.
    """
    return write_images(tmp_path_factory.mktemp("data"), 23)


def whole_run(folder: Path, data: Path, ranks: int, encoder: str = "resnet18") -> str:
    words = [*WORDS, "--data", str(data), "--student-encoder", encoder, "--output", str(folder / "run")]
    result = run(folder, words, ranks=ranks, DOUBLE="1")
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    whole_run(folder, data, 1)
    return folder


@pytest.fixture(scope="module")
def two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("two")
    return folder, whole_run(folder, data, 2)


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_joint_batch_by_hand(world: int, tmp_path: Path) -> None:
    """Gradients, statistics and draws of shares are those of the joint batch; without the joint forward they are not."""
    processes = [
        subprocess.Popen([sys.executable, HERE / "joint_worker.py", tmp_path, str(rank), str(world)], env=ENVIRONMENT)
        for rank in range(world)
    ]
    code = (
        "import joint_worker, sys, torch; from unfreeze_sched.distill.command.ranks import Ranks;"
        "torch.save(joint_worker.train(Ranks()), sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "alone.pt"], check=True, cwd=HERE, env=ENVIRONMENT)
    assert [process.wait(timeout=120) for process in processes] == [0] * world
    alone = torch.load(tmp_path / "alone.pt", weights_only=True)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    assert len(alone["gradients"]) == 2 * len(joint_worker.SIZES)
    for rank in ranks:
        torch.testing.assert_close(rank["joint"], alone, atol=1e-12, rtol=1e-9)
        for name, value in rank["joint"]["state"].items():
            assert torch.equal(value, ranks[0]["joint"]["state"][name])
        assert torch.equal(rank["joint"]["random"], alone["random"])
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(ranks[0]["by share"]["gradients"], alone["gradients"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_shares(world: int) -> None:
    """Shares of a batch are disjoint, whole and even; a batch smaller than the ranks goes to each of them."""
    for total in range(1, 12):
        shares = [share_of(total, Ranks(rank, world)) for rank in range(world)]
        places = [list(range(total))[share.places] for share in shares]
        if world == 1 or total < world:
            assert places == [list(range(total))] * world
        else:
            assert [*chain(*places)] == list(range(total))
            assert max(map(len, places)) - min(map(len, places)) <= 1
            assert all(share.sizes == tuple(map(len, places)) for share in shares)


def test_two_ranks_equal_one_process(alone: Path, two: tuple[Path, str]) -> None:
    """Over transitions and uneven batches, teacher included, two ranks are equal to the bit, and to one process."""
    folder, _ = two
    for name in ("teacher", "student"):
        assert_same(held(folder, name, 1), held(folder, name, 0))
        assert_close(held(folder, name), held(alone, name))
    lines = [
        [json.loads(line) for line in (each / "run" / "metrics.jsonl").read_text().splitlines()]
        for each in (folder, alone)
    ]
    assert len(lines[0]) == len(lines[1]) == 4
    for ours, theirs in zip(*lines, strict=True):
        for key in ("train_loss", "validation_loss", "validation_miou"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6)
        for key in ("blocks", "joined", "learning_rates", "optimizer_step"):
            assert ours[key] == theirs[key]
    results = [json.loads((each / "run" / "result.json").read_text())["student"] for each in (folder, alone)]
    for key in ("test_loss", "test_miou"):
        assert results[0][key] == pytest.approx(results[1][key], rel=1e-6)


def test_rank_0_alone_writes_and_tells(alone: Path, two: tuple[Path, str]) -> None:
    """Two ranks leave the files of one process, and each line is there once."""
    folder, text = two
    files = [
        {str(path.relative_to(each)) for path in (each / "run").rglob("*") if path.is_file()}
        for each in (folder, alone)
    ]
    assert files[0] == files[1]
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
    result = run(tmp_path, ["--resume", str(output)], ranks=2, DOUBLE="1")
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        assert_same(held(tmp_path, "student", rank), held(two[0], "student"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_resumed_on_another_number_of_ranks(ranks: int, alone: Path, two: tuple[Path, str], tmp_path: Path) -> None:
    """A run of one process goes on with two ranks, and the other way round, to the same weights."""
    output = interrupted(tmp_path, alone if ranks == 2 else two[0])
    result = run(tmp_path, ["--resume", str(output)], ranks=ranks, DOUBLE="1")
    assert result.returncode == 0, result.stderr
    for rank in range(ranks):
        assert_close(held(tmp_path, "student", rank), held(alone, "student"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`timm-` encoders are deprecated:DeprecationWarning")
@pytest.mark.parametrize("encoder", ["timm-efficientnet-b0", "efficientnet-b0", "mit_b0"])
def test_stochastic_depth_of_real_encoders(encoder: str, data: Path, tmp_path: Path) -> None:
    """Encoders that draw in training, each library in its own way, draw on two ranks as in one process."""
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        whole_run(tmp_path / str(ranks), data, ranks, encoder)
    assert_same(held(tmp_path / "2", "student", 1), held(tmp_path / "2", "student", 0))
    assert_close(held(tmp_path / "2", "student"), held(tmp_path / "1", "student"))


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


def test_more_ranks_than_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that cannot be shared is refused, and so is a GPU for all ranks, or fewer GPUs than ranks."""
    from unfreeze_sched.distill.command.run import _refuse_many_ranks  # noqa: PLC0415

    _refuse_many_ranks(4, Ranks(1, 4))
    with pytest.raises(
        ValueError, match="`--batch-size` must be at least the number of ranks, 4, got 3; it is that of"
    ):
        _refuse_many_ranks(3, Ranks(1, 4))
    with pytest.raises(ValueError, match="must be cpu or cuda with several ranks, got 'cuda:0'; with cuda each takes"):
        Ranks(1, 2, 1).device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="`--nproc-per-node` must be at most the number of GPUs, 1, got more; start"):
        Ranks(1, 2, 1).device("cuda")
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
