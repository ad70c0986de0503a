"""What a run wrote stays: one folder a run, the same inputs at a resume, refusals that change no byte, full disks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

smp = pytest.importorskip("segmentation_models_pytorch")
pytest.importorskip("tensorboard")
Image = pytest.importorskip("PIL.Image")

from images import write_images  # noqa: E402  # after the skips

from unfreeze_sched.cli import main  # noqa: E402  # likewise
from unfreeze_sched.distill.command import runfolder  # noqa: E402  # likewise
from unfreeze_sched.distill.command.runfolder import check_output, claim, in_words  # noqa: E402  # likewise

WORDS = [
    *("--image-size", "32", "--batch-size", "4", "--epochs", "2", "--unfreeze-start", "1", "--unfreeze-rate", "1"),
    *("--student-encoder", "mobilenet_v2", "--teacher-encoder", "mobilenet_v2", "--student-weights", "none"),
    *("--data", "data", "--teacher", "teacher.pth"),
]
COMMAND = [sys.executable, "-m", "unfreeze_sched", "distill"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a teacher, and a finished run of both, begun with paths that are relative to it."""
    root = tmp_path_factory.mktemp("world")
    (root / "data").mkdir()
    write_images(root / "data", 16)
    torch.manual_seed(0)
    torch.save(smp.Unet("mobilenet_v2", encoder_weights=None, classes=3).state_dict(), root / "teacher.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["distill", *WORDS, "--output", "run", "--tensorboard"]) == 0
    return root


@pytest.fixture
def copy(world: Path, tmp_path: Path) -> Path:
    """The same, of whose files each has to be replaced and not written into."""
    root = Path(shutil.copytree(world, tmp_path / "world", copy_function=os.link))
    begun = json.loads((root / "run" / "arguments.json").read_text())
    renew(root / "run" / "arguments.json", json.dumps({**begun, "folder": str(root)}).encode())
    return root


def renew(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def bytes_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


# One folder a run


def test_runs_of_one_second_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight runs at once, in one second, by the time's name each get another; of eight with one name one does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runfolder.time, "strftime", lambda _: "20200101-000000")
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: claim(None, ["--epochs", "3"], {}), range(8)))
    assert sorted(map(str, folders)) == [
        "runs/20200101-000000",
        *(f"runs/20200101-000000-{number}" for number in range(2, 9)),
    ]

    def attempt(number: int) -> str:
        try:
            return str(claim("own", [str(number)], {}))
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(attempt, range(8)))
    assert outcomes.count("own") == 1
    refused = "`--output` must be a new or empty folder, got own, which another run took; name another"
    assert outcomes.count(refused) == 7
    for folder in (*folders, Path("own")):
        assert [path.name for path in folder.iterdir()] == ["arguments.json"]
    words = json.loads(Path("own/arguments.json").read_text())["words"]
    assert words == [str(outcomes.index("own"))]


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system has no hard links a folder is claimed all the same, and once."""

    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    claim(str(tmp_path / "run"), [], {})
    with pytest.raises(ValueError, match="which another run took"):
        claim(str(tmp_path / "run"), [], {})
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["arguments.json"]


@pytest.mark.slow
def test_two_runs_with_one_output(copy: Path) -> None:
    """Of two processes with the same --output one is refused in one line, and the other's log is whole."""
    command = [*COMMAND, *WORDS, "--output", "both"]
    runs = [
        subprocess.Popen(command, cwd=copy, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    told = [run.communicate()[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2]
    assert sorted(len(text.splitlines()) for text in told) == [0, 1]
    assert [json.loads(line)["epoch"] for line in (copy / "both" / "metrics.jsonl").read_text().splitlines()] == [0, 1]


def test_what_a_killed_process_left_locks_no_folder(copy: Path, capsys: Any) -> None:
    """A folder that holds nothing but unfinished files is free; a resume removes those of its run."""
    left = copy / "left"
    left.mkdir()
    for name in (".arguments.json.0123.tmp", ".student.pth.4567.tmp"):
        (left / name).write_text('{"words"')
    check_output(str(left))
    assert claim(str(left), [], {}) == left
    (copy / "run" / "student" / ".last.pth.0123.tmp").write_text("cut off")
    assert main(["distill", "--resume", str(copy / "run")]) == 0
    assert not (copy / "run" / "student" / ".last.pth.0123.tmp").exists()
    capsys.readouterr()


# The same inputs, and refusals that change nothing


def add_an_image(root: Path) -> None:
    for part in ("images", "masks"):
        shutil.copy(root / "data" / part / "00.png", root / "data" / part / "99.png")


def remove_an_image(root: Path) -> None:
    for part in ("images", "masks"):
        (root / "data" / part / "03.png").unlink()


def change_a_mask(root: Path) -> None:
    renew(root / "data" / "masks" / "03.png", mirrored(root / "data" / "masks" / "03.png"))


def mirrored(path: Path) -> bytes:
    with Image.open(path) as image:
        turned = path.with_name("turned.png")
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(turned)
    content = turned.read_bytes()
    turned.unlink()
    return content


def swap_two_images(root: Path) -> None:
    first, second = (root / "data" / "images" / name for name in ("01.png", "02.png"))
    contents = first.read_bytes(), second.read_bytes()
    renew(first, contents[1])
    renew(second, contents[0])


def take_another_teacher(root: Path) -> None:
    state = torch.load(root / "teacher.pth", weights_only=True)
    (root / "teacher.pth").unlink()
    torch.save({key: value + 1 for key, value in state.items()}, root / "teacher.pth")


def flip_a_bit(root: Path) -> None:
    path = root / "run" / "student" / "last.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    renew(path, bytes(content))


def put_a_foreign_checkpoint(root: Path) -> None:
    renew(root / "run" / "student" / "last.pth", (root / "teacher.pth").read_bytes())


def tear_the_arguments(root: Path) -> None:
    path = root / "run" / "arguments.json"
    renew(path, path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (add_an_image, "got files added: --data images/99.png, --data masks/99.png; put them back, or begin a new run"),
        (
            remove_an_image,
            "got files gone: --data images/03.png, --data masks/03.png; put them back, or begin a new run",
        ),
        (change_a_mask, "got files changed: --data masks/03.png; put them back"),
        (swap_two_images, "got files changed: --data images/01.png, --data images/02.png; put them back"),
        (take_another_teacher, "got files changed: --teacher; put them back"),
        (
            lambda root: (root / "teacher.pth").unlink(),
            "got files gone: --teacher; put them back",
        ),
        (
            lambda root: shutil.rmtree(root / "data"),
            "--data images/01.png, --data images/02.png and 29 more; put them back",
        ),
        (flip_a_bit, "student/last.pth: must be a checkpoint of torch.save, got a damaged or different file"),
        (put_a_foreign_checkpoint, "student/last.pth: must be a checkpoint of this command, got another file; remove"),
        (tear_the_arguments, "whose arguments.json cannot be read (ValidationError); give the folder that the run"),
    ],
)
def test_a_refused_resume_changes_no_byte(change: Callable[[Path], object], said: str, copy: Path, capsys: Any) -> None:
    """Other inputs, and a run that cannot go on, are one line that says what differs; every byte of the folder stays."""
    change(copy)
    before = bytes_of(copy / "run")
    assert main(["distill", "--resume", str(copy / "run")]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""
    assert bytes_of(copy / "run") == before
    assert len([name for name in before if "tfevents" in name]) == 1


def test_a_resume_is_of_one_run(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A flag that differs from the run's is refused, its own are not; nor is a folder shared with a process at work."""
    before = bytes_of(copy / "run")
    assert main(["distill", "--resume", str(copy / "run"), "--epochs", "9"]) == 2
    assert (
        "`--epochs` must be as the run was begun with, 2, got 9; leave it out beside --resume"
        in capsys.readouterr().err
    )
    code = "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    arguments = str(copy / "run" / "arguments.json")
    with subprocess.Popen(
        [sys.executable, "-c", code, arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert main(["distill", "--resume", str(copy / "run")]) == 2
        other.communicate("\n")
    assert "must be a folder that no process is at work in, got " in capsys.readouterr().err
    assert bytes_of(copy / "run") == before
    monkeypatch.chdir(copy)
    assert main(["distill", *WORDS, "--tensorboard", "--resume", "run"]) == 0


def test_a_moved_folder_of_data_is_the_same(copy: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is names, sizes and contents: the run goes on from another folder, with a copy of its inputs."""
    monkeypatch.chdir("/")
    assert main(["distill", "--resume", str(copy / "run")]) == 0
    ours, theirs = (torch.load(root / "run" / "student.pth", weights_only=True) for root in (copy, world))
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


# Full disks, and folders that cannot be written


def test_a_full_disk(copy: Path, world: Path) -> None:
    """A disk without room for a checkpoint is one line, leaves the last whole one, and with room the run goes on."""
    whole = {name: (world / "run" / name).stat().st_size for name in ("student.pth", "student/last.pth")}
    most = whole["student/last.pth"] - 100_000  # room for that of the first epoch, in which fewer parameters trained
    done = subprocess.run(
        [*COMMAND, *WORDS, "--output", "full"],
        cwd=copy,
        check=False,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
    )
    assert done.returncode == 2
    line = "unfreeze-sched: full must have room, got a full disk (File too large); make some, and go on with --resume full\n"
    assert done.stderr == line
    last = torch.load(copy / "full" / "student" / "last.pth", weights_only=True)
    assert [record["epoch"] for record in last["records"]] == [0]
    assert not list(copy.rglob("*.tmp"))
    assert main(["distill", "--resume", str(copy / "full")]) == 0
    ours, theirs = (torch.load(path / "student.pth", weights_only=True) for path in (copy / "full", world / "run"))
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A read-only place is named before anything is read, with the way out; so is one that became read-only."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert main(["distill", "--output", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        f"unfreeze-sched: `--output` must be a folder that can be written, got {tmp_path / 'run'}, for which {tmp_path} "
        "is not; name another\n"
    )
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").touch()
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=r"must be a folder that can be written, got .*file/run, for which .*file is not"
    ):
        check_output(str(tmp_path / "file" / "run"))
    read_only = OSError(errno.EROFS, "Read-only file system", str(tmp_path / "run" / "x"))
    with (
        pytest.raises(OSError, match=r"must be .* written, got .*x \(Read-only.*--output$"),
        in_words(tmp_path / "run"),
    ):
        raise read_only
    with pytest.raises(BrokenPipeError), in_words(tmp_path):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


# No traceback


def test_a_path_that_looks_like_markup_and_no_columns(copy: Path) -> None:
    """A path in brackets is told as it is, and a terminal that says it has no width is written to."""
    output = copy / "mk[" / "b]"
    output.parent.mkdir()
    (copy / "run").rename(output)
    done = subprocess.run(
        [*COMMAND, "--resume", "mk[/b]"],
        cwd=copy,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "0"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "; into mk[/b]\n" in done.stdout
    assert "mk[/b]/report.png shows the run;" in done.stdout


def test_a_closed_output(copy: Path) -> None:
    """With its output closed the run is carried out, and no file takes the place of the output."""
    before = bytes_of(copy / "run")
    closed = ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, "--resume", "run"]
    done = subprocess.run(closed, cwd=copy, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    after = bytes_of(copy / "run")
    assert {name for name in before if "tfevents" not in name} == {name for name in after if "tfevents" not in name}
    same = ("metrics.jsonl", "result.json", "arguments.json")
    assert [after[name] for name in same] == [before[name] for name in same]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data=--"], "argument --data: must have a value, got '--'; write ./-- for a path of that name; see"),
        (["--output=--"], "argument --output: must have a value, got '--'; write ./-- for a path of that name; see"),
        (["--lr=--"], "argument --lr: must have a value, got '--'"),
        (["--teacher", "pipe"], "pipe: must be a file, got a pipe or device; save its content as one"),
        (["--student-weights", "pipe"], "pipe: must be a file, got a pipe or device; save its content as one"),
        (["--output", "pipe"], "`--output` must be a new or empty folder, got pipe; name another, nothing is"),
        (["--data", "no\x1b[2Jwhere\n"], "no\\x1b[2Jwhere"),
        (["--device", "\x1b[2J"], "'\\x1b[2J'"),
        (["--seed", "\x1b[2J"], "\\x1b[2J"),
        (
            ["--sync-batchnorm", "--device", "cpu"],
            "`--sync-batchnorm` must run on CUDA, which alone has such norms, got",
        ),
        (["--precision", "fp8"], "argument --precision: invalid choice: 'fp8' (choose from"),
        (["--accumulate", "0"], "argument --accumulate: must be an integer of at least 1, got '0'"),
        (["--gradient-clip", "0"], "argument --gradient-clip: must be a number above 0, got '0'"),
        (["--num-workers", "-1"], "argument --num-workers: must be an integer of at least 0"),
    ],
)
def test_one_line(words: list[str], message: str, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Words, pipes and escapes that libraries stumble over are one line that no terminal obeys, and exit code 2."""
    monkeypatch.chdir(copy)
    os.mkfifo("pipe")
    try:
        code = main(["distill", *WORDS, *words])
    except SystemExit as stop:  # argparse's own way out
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    assert code == 2
    assert message in captured.err
    assert "\x1b" not in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not (copy / "runs").exists()


def test_escapes_in_a_files_name(copy: Path, capsys: Any) -> None:
    """A file's name that a terminal would obey is told with its escapes written out."""
    (copy / "data" / "images" / "a\x1b[2J.png").write_bytes(b"no image")
    assert main(["distill", "--resume", str(copy / "run")]) == 2
    error = capsys.readouterr().err
    assert "a\\x1b[2J.png" in error
    assert "\x1b" not in error
