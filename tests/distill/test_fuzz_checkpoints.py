"""Thousands of broken checkpoints: each is refused in one line, or loads as what it holds and trains on."""

from __future__ import annotations

import collections
import copy
import functools
import io
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bits import JUNK, broken, differences, flat, seeded
from torch import nn

from unfreeze_sched import ProgressiveUnfreezer

pytest.importorskip("segmentation_models_pytorch")
Image = pytest.importorskip("PIL.Image")

from images import write_images  # noqa: E402  # after the skips
from tiny import InterruptedRunError, Interrupting, arm  # noqa: E402  # likewise

from unfreeze_sched.cli import main  # noqa: E402  # likewise
from unfreeze_sched.distill import checkpoints  # noqa: E402  # likewise
from unfreeze_sched.distill.checkpoints import CheckpointError, load_segmentation_state, read_checkpoint  # noqa: E402  # likewise
from unfreeze_sched.distill.command import training  # noqa: E402  # likewise
from unfreeze_sched.distill.command.data import load_folders  # noqa: E402  # likewise
from unfreeze_sched.distill.command.training import Settings, Training  # noqa: E402  # likewise

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.serialization")
Parts = dict[str, Any]


def parts_of(seed: int) -> Parts:
    """The live objects of a new run, as the training loop makes them."""
    new = arm(seed)
    optimizer = torch.optim.AdamW(new.unet.get_decoder_parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    unfreezer = ProgressiveUnfreezer(new.blocks, optimizer, new.schedule, [scheduler])
    scaler = Settings(0.01, 2, 0, "cpu").scaler()
    return {
        "unfreezer": unfreezer,
        "model": new.unet,
        "scheduler": scheduler,
        "scaler": scaler,
        "optimizer": optimizer,
    }


def states_of(parts: Parts) -> dict[str, Any]:
    return {name: part.state_dict() for name, part in parts.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The checkpoint of a run of the training loop, interrupted after its second epoch."""
    folder = tmp_path_factory.mktemp("run")
    (data,) = load_folders(write_images(folder, 4), image_size=16)
    settings = Settings(lr=0.01, batch_size=2, seed=0, device="cpu")
    with pytest.raises(InterruptedRunError):
        Training(arm(0), data, data, settings).run(folder, Interrupting())
    return (folder / "last.pth").read_bytes()


class Trial:
    """Tries files on the live objects of a new run, and counts what became of them."""

    def __init__(self, saved: bytes, path: Path) -> None:
        self.path = path
        self.content = torch.load(io.BytesIO(saved), weights_only=True)
        self.counts: collections.Counter[str] = collections.Counter()
        self.parts = parts_of(1)

    def resume(self, file: bytes, what: str) -> dict[str, Any] | None:
        """The states that were loaded, None where the file was refused as it has to be."""
        self.path.write_bytes(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                training.restore(self.parts, self.path)
            except (CheckpointError, OSError) as error:
                text = str(error)
                assert re.fullmatch(re.escape(f"{self.path}: must ") + ".{,900}", text), (what, text)
                self.counts["refused"] += 1
                self.parts = parts_of(1)
                return None
        self.counts["loaded"] += 1
        states = copy.deepcopy(states_of(self.parts))
        try:
            self._train_on()
        except Exception as error:
            raise AssertionError(f"{what} was loaded, and does not go on") from error
        self.parts = parts_of(1)
        return states

    def _train_on(self) -> None:
        """What was loaded is a run that goes on."""
        self.parts["unfreezer"].apply(2)
        for _ in range(2):
            loss = self.parts["model"](torch.ones(2, 3, 4, 4)).square().mean()
            self.parts["optimizer"].zero_grad()
            loss.backward()
            self.parts["optimizer"].step()
            self.parts["scheduler"].step()


@pytest.fixture
def trial(saved: bytes, tmp_path: Path) -> Trial:
    return Trial(saved, tmp_path / "last.pth")


# Files that are broken as bytes. A file that loads has to be the one that was saved.


def truncated(saved: bytes, draw: random.Random) -> bytes:
    return saved[: draw.randrange(len(saved))]


def flipped(saved: bytes, draw: random.Random) -> bytes:
    file = bytearray(saved)
    for _ in range(draw.choice((1, 1, 2, 8))):
        file[draw.randrange(len(file))] ^= 1 << draw.randrange(8)
    return bytes(file)


def overwritten(saved: bytes, draw: random.Random) -> bytes:
    """Part of it is zeros, noise, missing, or there twice."""
    begin = draw.randrange(len(saved))
    length = draw.choice((1, 16, 512, 4096))
    part = saved[begin : begin + length]
    middle = draw.choice((bytes(len(part)), draw.randbytes(len(part)), b"", part + part))
    return saved[:begin] + middle + saved[begin + length :]


def zip_of(records: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return file.getvalue()


def saved_as(content: Any, **keywords: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **keywords)
    return file.getvalue()


def foreign(saved: bytes, draw: random.Random) -> bytes:
    """A file of another kind, of any length."""
    noise, size = draw.randbytes(draw.randrange(1, 2000)), draw.randrange(1, 30)
    values = [draw.random() for _ in range(size)]
    array, picture, tar = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez(array, values=np.array(values))
    Image.fromarray(np.full((size, size), 7, np.uint8)).save(picture, draw.choice(("PNG", "JPEG", "GIF", "BMP")))
    with tarfile.open(fileobj=tar, mode=draw.choice(("w", "w:gz"))) as archive:
        member = tarfile.TarInfo("data.pkl")
        member.size = len(noise)
        archive.addfile(member, io.BytesIO(noise))
    header = json.dumps({"weight": {"dtype": "F64", "shape": [size], "data_offsets": [0, 8 * size]}}).encode()
    plain = draw.choice((values, {"model": values}, {"student": {}}, size, "words", None, noise))
    old = torch.tensor(values)
    return draw.choice(
        (
            b"",
            bytes(size),
            noise,
            noise.hex().encode(),
            json.dumps(values).encode(),
            b"<!DOCTYPE html><html>" + noise.hex().encode(),
            b"%PDF-1.7\n" + noise,
            b"\x7fELF" + noise,
            b"\x89HDF\r\n\x1a\n" + noise,
            b"PK\3\4" + noise,
            saved[:60] + noise,
            array.getvalue(),
            picture.getvalue(),
            tar.getvalue(),
            len(header).to_bytes(8, "little") + header + np.array(values).tobytes(),
            zip_of({"words.txt": noise.hex().encode()}),
            zip_of({"archive/data.pkl": noise, "archive/version": b"3\n"}),
            zip_of(
                {"archive/data.pkl": pickle.dumps(plain, 2), "archive/version": b"3\n", "archive/byteorder": b"little"}
            ),
            pickle.dumps(plain, draw.randrange(6)),
            pickle.dumps(np.array(values), draw.randrange(6)),
            saved_as(plain),
            saved_as({"weight": old}),
            saved_as({"weight": old}, _use_new_zipfile_serialization=False),
            saved_as({"weight": old}, _use_new_zipfile_serialization=False)[: draw.randrange(1, 300)],
            saved_as(old.to_sparse()),
        )
    )


@pytest.mark.parametrize(
    ("break_file", "number"), [(truncated, 300), (flipped, 700), (overwritten, 300), (foreign, 400)]
)
def test_broken_bytes(
    break_file: Callable[[bytes, random.Random], bytes], number: int, trial: Trial, saved: bytes
) -> None:
    """A damaged or foreign file is refused in one line, or it is as good as the whole one."""
    draw = seeded(break_file.__name__)
    whole = {key: value for key, value in trial.content.items() if key != "records"}
    for attempt in range(number):
        states = trial.resume(break_file(saved, draw), f"{break_file.__name__} {attempt}")
        assert states is None or differences(states, whole) == []
    print(f"{break_file.__name__}: {number} files, {dict(trial.counts)}")  # noqa: T201  # pytest -rP shows it
    assert trial.counts["refused"] > number / 2


def test_torch_itself_loads_flipped_bits(saved: bytes, tmp_path: Path) -> None:
    """The checksums are looked at here, since torch.load gives other weights for a flipped bit."""
    whole = torch.load(io.BytesIO(saved), weights_only=True)
    weight = whole["model"]["head.weight"].numpy().tobytes()
    place = saved.index(weight)
    file = saved[: place + 2] + bytes([saved[place + 2] ^ 1]) + saved[place + 3 :]
    assert differences(torch.load(io.BytesIO(file), weights_only=True), whole) == ["['model']['head.weight']"]
    (tmp_path / "weights.pth").write_bytes(file)
    with pytest.raises(CheckpointError, match=r"got a damaged or different file \(BadZipFile\); copy or download it"):
        read_checkpoint(tmp_path / "weights.pth")


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    """Checksums can be switched off in torch, and such a file is a checkpoint too."""
    path = tmp_path / "weights.pth"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.ones(3)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is not None
    assert torch.equal(read_checkpoint(path)["weight"], torch.ones(3))


# Whole files with other contents: each loads as what it holds, or not at all.


def holds(states: dict[str, Any], content: dict[str, Any]) -> bool:
    """Whether states are those that a file holds; AdamW itself sets `decoupled_weight_decay`, and no order counts.

    Nor does it count whether a whole number stands as an integer, where a float does as well.
    """
    content = {key: value for key, value in content.items() if key != "records"}
    ours, theirs = dict(flat(states)), dict(flat(content))

    def is_same_number(path: str) -> bool:
        mine, other = ours.get(path), theirs.get(path)
        return str(mine).startswith("0x") and str(other).isdigit() and float.fromhex(str(mine)) == int(str(other))

    found = differences(states, content)
    return all(path.endswith((" keys", "['decoupled_weight_decay']")) or is_same_number(path) for path in found)


def test_broken_contents(trial: Trial) -> None:
    """Values that are missing, moved, or of another type are refused, or all that is there is loaded."""
    draw, number = seeded("contents"), 200
    for _ in range(number):
        content, done = broken(trial.content, draw, JUNK)
        states = trial.resume(saved_as(content), "; ".join(done))
        assert states is None or holds(states, content), done
    print(f"broken contents: {number} files, {dict(trial.counts)}")  # noqa: T201  # pytest -rP shows it
    assert trial.counts["refused"] > number / 2


def test_broken_pickles_with_right_checksums(trial: Trial, saved: bytes) -> None:
    """A flipped bit in the pickle of a file whose checksums are right is refused, or all that is there is loaded."""
    draw, number = seeded("pickles"), 200
    with zipfile.ZipFile(io.BytesIO(saved)) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in records if name.endswith("data.pkl"))
    for attempt in range(number):
        file = zip_of({**records, name: flipped(records[name], draw)})
        states = trial.resume(file, f"pickle {attempt}")
        assert states is None or holds(states, torch.load(io.BytesIO(file), "cpu", weights_only=True))
    print(f"broken pickles: {number} files, {dict(trial.counts)}")  # noqa: T201  # pytest -rP shows it
    assert trial.counts["refused"] > number / 2


@pytest.mark.parametrize(
    ("module", "name", "instead", "found_by"),
    [
        (checkpoints, "_check_sums", lambda _: None, lambda *a: test_broken_bytes(flipped, 50, *a)),
        (training, "_refuse_others", lambda *_: None, lambda trial, _: test_broken_contents(trial)),
    ],
    ids=["no checksums", "no look at shapes"],
)
def test_the_trials_can_fail(
    module: Any, name: str, instead: Any, found_by: Any, trial: Trial, saved: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a look at the checksums, and without one at names and shapes, the trials above fail."""
    monkeypatch.setattr(module, name, instead)
    with pytest.raises(AssertionError):
        found_by(trial, saved)


@pytest.mark.parametrize(
    "odd", [torch.eye(3).to_sparse(), torch.ones(3, device="meta"), torch.ones(3, dtype=torch.complex64)]
)
def test_weights_that_no_parameter_takes(odd: torch.Tensor, tmp_path: Path) -> None:
    """Tensors that torch refuses in the middle of loading weights, or bends to fit, are named before it begins."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before, state = copy.deepcopy(model.state_dict()), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).state_dict()
    state["1.bias" if odd.ndim == 1 else "0.weight"] = odd
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(
        CheckpointError, match=r"must hold plain tensors of real numbers, got others \([01]\.\w+\); save"
    ):
        load_segmentation_state(model, tmp_path / "weights.pth")
    assert differences(dict(model.state_dict()), dict(before)) == []


# Files that would run code.


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call

    def __deepcopy__(self, _: Any) -> Call:
        return self  # else the test itself would call


def attacks(canary: Path) -> list[Call]:
    text = f"open({str(canary)!r}, 'w').close()"
    return [
        Call(os.system, f"touch '{canary}'"),
        Call(os.mkdir, str(canary)),
        Call(exec, text),
        Call(eval, text),
        Call(open, str(canary), "w"),
        Call(Path.touch, canary),
        Call(subprocess.call, ["touch", str(canary)]),
        Call(functools.partial(exec, text)),
        Call(map, exec, [text]),  # runs when something goes through it
        Call(list, Call(map, exec, [text])),
        Call(torch.save, 1, str(canary)),
        Call(shutil.copy, __file__, str(canary)),
    ]


def files_with(attack: Call, content: dict[str, Any], saved: bytes, draw: random.Random) -> Iterator[bytes]:
    """Files of every kind that torch.load takes, with a call in them."""
    for _ in range(6):
        victim, _done = broken(content, draw, [attack])
        place = draw.choice(list(victim))
        victim = {**victim, place: attack} if draw.random() < 0.5 else {**victim, "unfreezer": [attack]}
        yield saved_as(victim)
        yield saved_as(victim, _use_new_zipfile_serialization=False)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield pickle.dumps(attack, protocol)
    with zipfile.ZipFile(io.BytesIO(saved)) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in records if name.endswith("data.pkl"))
    yield zip_of({**records, name: pickle.dumps(attack, 2)})
    yield zip_of({**records, name: pickle.dumps(attack, 2)[:-1] + records[name]})  # first the call, then the states


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_malicious_files(trial: Trial, saved: bytes, tmp_path: Path) -> None:
    """A file that would run code is refused in one line and runs none."""
    draw, number, canary = seeded("attacks"), 0, tmp_path / "canary"
    for index, attack in enumerate(attacks(canary)):
        for file in files_with(attack, trial.content, saved, draw):
            number += 1
            assert trial.resume(file, f"attack {index}, file {number}") is None
            assert not canary.exists()
    print(f"malicious: {number} files, {dict(trial.counts)}")  # noqa: T201  # pytest -rP shows it
    assert number >= 200


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("index", range(len(attacks(Path()))))
def test_the_attacks_are_real(index: int, tmp_path: Path) -> None:
    """Loaded carelessly, each of them does what it is there for."""
    canary = tmp_path / "canary"
    found = torch.load(io.BytesIO(saved_as(attacks(canary)[index])), weights_only=False)
    if isinstance(found, functools.partial):
        found()
    elif isinstance(found, map):
        list(found)
    assert canary.exists()


# The arguments that a run keeps beside its checkpoints.


def test_broken_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Saved arguments that no command line gives are one line and exit code 2, and nothing is changed."""
    words = ["--data", str(tmp_path / "none"), "--preset", "small", "--teacher", "t.pth", "--compare-frozen"]
    good: dict[str, Any] = {"words": words, "folder": str(tmp_path), "inputs": {"--data images/a.png": "3 a1"}}
    file = tmp_path / "arguments.json"
    cases = [json.dumps({**good, key: thing}) for key in good for thing in ([1], {"a": 1}, 1.5, None, "words")]
    cases.remove(json.dumps({**good, "folder": "words"}))  # a folder that is no longer there says nothing of the data
    cases += [
        json.dumps({**good, "words": [*words, *more]})
        for more in (
            *(["--epochs", value] for value in ("0", "-1", "many", "1.5", "")),
            *([flag] for flag in ("--lr", "--nonesuch", "--lr=nan", "--seed=x", "--norms=y", "--preset=huge", "word")),
            ["--image-size", "50"],
            ["--batch-size", "1"],
            ["--help"],
        )
    ]
    cases += ["", "[]", "[" * 100_000, "{}", json.dumps(good)[:-3], json.dumps({**good, "more": 1})]
    for case in cases:
        file.write_text(case)
        assert main(["distill", "--resume", str(tmp_path)]) == 2, case[:500]
        error = capsys.readouterr().err
        assert re.fullmatch(
            r"unfreeze-sched: `--resume` must be .* arguments.json cannot be read \(.*\); .*\n", error
        ), (case, error)
        assert file.read_text() == case
    file.write_text(json.dumps(good))
    assert main(["distill", "--resume", str(tmp_path)]) == 2
    assert "got files gone: --data images/a.png; put" in capsys.readouterr().err  # but for the data, these are right
    assert [item.name for item in tmp_path.iterdir()] == ["arguments.json"]
