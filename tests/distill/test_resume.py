"""Interrupted anywhere and resumed, a run ends with the weights of the uninterrupted one."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("segmentation_models_pytorch")
Image = pytest.importorskip("PIL.Image")
EventAccumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator

from images import write_images  # noqa: E402  # after the skips

from unfreeze_sched.cli import main  # noqa: E402  # after the skips

pytestmark = pytest.mark.filterwarnings("ignore:`timm-` encoders are deprecated:DeprecationWarning")
WORDS = [
    *("--image-size", "32", "--batch-size", "2", "--epochs", "4", "--teacher-epochs", "1", "--norms", "frozen"),
    *("--student-encoder", "timm-efficientnet-b0", "--teacher-encoder", "resnet18", "--student-weights", "none"),
    *("--unfreeze-start", "1", "--unfreeze-rate", "1", "--compare-frozen", "--tensorboard"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data"), 14)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "unfreeze_sched", "distill", *words]


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run in one go, and how long it took."""
    output = tmp_path_factory.mktemp("whole") / "run"
    begin = time.perf_counter()
    subprocess.run(command(*WORDS, "--data", str(data), "--output", str(output)), check=True, capture_output=True)
    return output, time.perf_counter() - begin


def assert_same_run(run: Path, whole: Path) -> None:
    """Equal weights, states and records to the bit, times aside."""
    for name in ("teacher", "student", "frozen"):
        ours, theirs = (torch.load(folder / f"{name}.pth", weights_only=True) for folder in (run, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        states = [torch.load(folder / name / "last.pth", weights_only=True) for folder in (run, whole)]
        for ours, theirs in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert states[0]["scheduler"] == states[1]["scheduler"]
    lines = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in file.read_text().splitlines()]
        for file in (run / "metrics.jsonl", whole / "metrics.jsonl")
    ]
    assert lines[0] == lines[1]
    assert events_of(run) == events_of(whole)
    assert [step for step, _ in events_of(run)["student/blocks/unfrozen"]] == [0, 1, 2, 3]


def events_of(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows, by arm and tag: steps and values."""
    found = {}
    for arm in ("teacher", "student", "frozen"):
        events = EventAccumulator(str(run / arm)).Reload()
        for tag in events.Tags()["scalars"]:
            found[f"{arm}/{tag}"] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found


def kill_at_random(data: Path, output: Path, takes: float, kills: int, seed: int) -> int:
    """Kill a run at random moments, every third in the middle of a checkpoint's write; how many kills found it there."""
    random, inside = np.random.default_rng(seed), 0
    for kill in range(kills):
        begun = (output / "arguments.json").exists()
        words = ["--resume", str(output)] if begun else [*WORDS, "--data", str(data), "--output", str(output)]
        process = subprocess.Popen(command(*words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        write = kill % 3 == 0
        moment = time.monotonic() + (5 * takes if write else random.uniform(0.2, 1.0) * takes)
        while process.poll() is None and time.monotonic() < moment:
            if write and any(output.rglob(".*.pth.*.tmp")):
                inside += 1
                break
            time.sleep(0.0005 if write else 0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for newest in output.rglob("*.pth"):
            torch.load(newest, weights_only=True)
        if output.exists():  # cut off within its claim, too, a folder is either a run's or free
            (output / ".arguments.json.cut.tmp").write_text("{")
    return inside


def resumed_after(data: Path, output: Path, whole: tuple[Path, float], kills: int) -> int:
    inside = kill_at_random(data, output, whole[1], kills, seed=kills)
    assert (output / "arguments.json").exists()  # the first kill waited for a checkpoint
    last = subprocess.run(command("--resume", str(output)), check=False, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    assert_same_run(output, whole[0])
    return inside


def test_killed_a_few_times(data: Path, uninterrupted: tuple[Path, float], tmp_path: Path) -> None:
    """Killed three times, the first time in a checkpoint's write, the run still ends as the uninterrupted one."""
    assert resumed_after(data, tmp_path / "run", uninterrupted, 3) >= 1


@pytest.mark.slow
def test_killed_at_twenty_moments(data: Path, uninterrupted: tuple[Path, float], tmp_path: Path) -> None:
    """Killed at twenty random moments, among them inside checkpoint writes, and resumed each time: the same weights."""
    assert resumed_after(data, tmp_path / "run", uninterrupted, 20) >= 3


def test_a_finished_run_resumes_to_itself(uninterrupted: tuple[Path, float], tmp_path: Path) -> None:
    """Resuming what is finished trains nothing and leaves the same."""
    copy = shutil.copytree(uninterrupted[0], tmp_path / "copy")
    assert main(["distill", "--resume", str(copy)]) == 0
    assert_same_run(copy, uninterrupted[0])


@pytest.mark.parametrize("damage", ["truncate", "flip", "foreign", "other run"])
def test_a_damaged_checkpoint(damage: str, uninterrupted: tuple[Path, float], tmp_path: Path, capsys: Any) -> None:
    """A checkpoint that is cut off, damaged, or of something else is one line and exit code 2, and is left as it is."""
    copy = shutil.copytree(uninterrupted[0], tmp_path / "copy")
    path = copy / "student" / "last.pth"
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        path.write_bytes(content[:100] + bytes(255 - byte for byte in content[100:300]) + content[300:])
    elif damage == "foreign":
        torch.save({"weights": torch.ones(2)}, path)
    else:
        shutil.copy(copy / "teacher" / "last.pth", path)
    broken = path.read_bytes()
    assert main(["distill", "--resume", str(copy)]) == 2
    error = capsys.readouterr().err
    assert f"{path}: must be a checkpoint" in error
    assert len(error.strip().splitlines()) == 1
    assert path.read_bytes() == broken


def test_arguments_of_another_version(tmp_path: Path, capsys: Any) -> None:
    """Arguments that this version does not know are one line, not a traceback."""
    begun = {"words": ["--epochs", "3", "--an-older-flag"], "folder": str(tmp_path), "inputs": {}}
    for saved, reason in (({"a": 1}, "ValidationError"), (begun, "unrecognized arguments: --an-older-flag")):
        (tmp_path / "arguments.json").write_text(json.dumps(saved))
        assert main(["distill", "--resume", str(tmp_path)]) == 2
        assert f"cannot be read ({reason}); give the folder" in capsys.readouterr().err


def test_nothing_to_resume(tmp_path: Path, capsys: Any) -> None:
    """A folder that holds no run is one line that says what is expected."""
    assert main(["distill", "--resume", str(tmp_path)]) == 2
    assert f"`--resume` must be the folder of a run of this command, got {tmp_path}, whose" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
