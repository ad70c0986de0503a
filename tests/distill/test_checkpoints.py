from __future__ import annotations

import argparse
import io
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unfreeze_sched.distill.checkpoints import (
    CheckpointError,
    classes_of,
    load_encoder_weights,
    load_segmentation_state,
    save_atomically,
)

smp = pytest.importorskip("segmentation_models_pytorch")


def unet(encoder: str = "mobilenet_v2", classes: int = 1, **kwargs: Any) -> nn.Module:
    """A small Unet with weights drawn at random, and statistics that are not those of a new model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`timm-` encoders are deprecated", category=DeprecationWarning)
        kwargs = {"encoder_weights": None, "decoder_channels": (32, 16, 16, 16, 16), **kwargs}
        made: nn.Module = smp.Unet(encoder, classes=classes, **kwargs)
    for buffer in made.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return made


def state(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}{key}": value.clone() for key, value in model.state_dict().items()}


def same(model: nn.Module, wanted: dict[str, Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "2020-09-23a.pth"


@pytest.fixture(scope="module")
def donor() -> nn.Module:
    return unet()


def refused(path: Path, model: nn.Module | None = None) -> str:
    """The error's text, after a check that the model is as it was."""
    model = unet() if model is None else model
    before = state(model)
    with pytest.raises(CheckpointError) as caught:
        load_segmentation_state(model, path)
    assert same(model, before)
    text = str(caught.value)
    assert text.startswith(f"{path}: must ")
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


def lightning(model: nn.Module) -> dict[str, Any]:
    """What PyTorch Lightning of 2020 wrote."""
    return {
        "epoch": 49,
        "global_step": 12_345,
        "pytorch-lightning_version": "0.9.0",
        "checkpoint_callback_best_model_path": "epoch=49.ckpt",
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 1e-4, "params": [0, 1]}]}],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": 1e-4},
        "state_dict": state(model, "model."),
    }


def test_a_lightning_teacher_loads(file: Path) -> None:
    """A Lightning file, one class, Unet of timm-efficientnet-b3, gives the same outputs as the model it came from."""
    trained, teacher = unet("timm-efficientnet-b3").eval(), unet("timm-efficientnet-b3").eval()
    torch.save(lightning(trained), file)
    load_segmentation_state(teacher, file)
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(teacher(images), trained(images))
    assert classes_of(file) == 1


@pytest.mark.parametrize("prefix", ["", "model.", "unet.", "module.", "module.model.", "_orig_mod.module."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict"])
def test_every_wrapping_loads(file: Path, donor: nn.Module, prefix: str, wrapper: str | None) -> None:
    """Bare or wrapped, behind any prefix, the weights arrive bit for bit."""
    content: Any = state(donor, prefix)
    if wrapper:
        content = {wrapper: content, "epoch": 3}
    torch.save(content, file)
    model = unet()
    load_segmentation_state(model, file)
    assert same(model, state(donor))
    assert classes_of(file) == 1


def test_a_file_in_torchs_older_format_loads(file: Path, donor: nn.Module) -> None:
    """Files from before torch 1.6, which are no zip, are read as well."""
    torch.save(lightning(donor), file, _use_new_zipfile_serialization=False)
    model = unet()
    load_segmentation_state(model, file)
    assert same(model, state(donor))


def test_an_encoder_that_is_itself_called_model_loads(file: Path) -> None:
    """The keys of a `tu-` encoder stand under `encoder.model.`, which is not taken for a wrapper's prefix."""
    trained, model, student = unet("tu-resnet18"), unet("tu-resnet18"), unet("tu-resnet18")
    torch.save(lightning(trained), file)
    load_segmentation_state(model, file)
    assert same(model, state(trained))
    load_encoder_weights(student.encoder, file)  # type: ignore[arg-type]
    assert same(student.encoder, state(trained.encoder))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_cast_to_the_models_dtype(file: Path, donor: nn.Module, dtype: torch.dtype) -> None:
    """A half or bfloat16 file fills a float32 model with the same numbers."""
    half = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state(donor).items()}
    torch.save(half, file)
    model = unet()
    load_segmentation_state(model, file)
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert same(model, {key: value.to(donor.state_dict()[key].dtype) for key, value in half.items()})


def test_misfits_are_named(file: Path, donor: nn.Module) -> None:
    """Another head, encoder or decoder is named by keys and both shapes, five of each kind, and their number."""
    torch.save(state(donor), file)
    assert refused(file, unet(classes=5)) == (
        "must fit the teacher, got 2 of another shape (segmentation_head.0.weight: file (1, 16, 3, 3), model "
        "(5, 16, 3, 3), segmentation_head.0.bias: file (1,), model (5,)); build the teacher as the file's model was built"
    )
    assert refused(file, unet(in_channels=4)) == (
        "must fit the teacher, got 1 of another shape (encoder.features.0.0.weight: file (32, 3, 3, 3), "
        "model (32, 4, 3, 3)); build the teacher as the file's model was built"
    )
    torch.save(lightning(unet("timm-efficientnet-b0", classes=3)), file)
    text = refused(file, unet("timm-efficientnet-b3"))
    assert text.count(": file (") == 5
    assert re.search(r"got \d+ missing \(encoder\.\S+, .* and \d+ more\), \d+ of another shape \(", text)
    torch.save({"state_dict": {**state(donor, "model."), "loss.weight": torch.ones(1), "mean": torch.ones(3)}}, file)
    assert refused(file) == (
        "must fit the teacher, got 2 unexpected (loss.weight, mean); save the teacher's own `state_dict()` alone"
    )
    torch.save({**state(donor), "encoder.features.0.0.weight": torch.ones(())}, file)
    assert "(encoder.features.0.0.weight: file (), model (32, 3, 3, 3))" in refused(file)
    torch.save(nn.Linear(2, 2).state_dict(), file)
    assert refused(file).endswith("none of the teacher's keys is in it, so give another file")


def test_a_lacking_key_is_named(file: Path, donor: nn.Module) -> None:
    """Not one key may be missing, and `what` is the model's name in the text."""
    content = state(donor)
    del content["segmentation_head.0.bias"]
    torch.save(content, file)
    with pytest.raises(CheckpointError) as caught:
        load_segmentation_state(unet(), file, what="student")
    assert str(caught.value) == (
        f"{file}: must fit the student, got 1 missing (segmentation_head.0.bias); "
        "build the student as the file's model was built"
    )


class Evil:
    """Runs a command when unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.proof}",)


def zipped(path: Path, content: Any) -> None:
    torch.save(content, path)


def older(path: Path, content: Any) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def pickled(path: Path, content: Any) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("write", [zipped, older, pickled])
def test_code_in_a_file_is_refused_and_does_not_run(
    file: Path, tmp_path: Path, write: Callable[[Path, Any], None]
) -> None:
    """A reducer that calls os.system is named and not called, in all three formats."""
    proof = tmp_path / "ran"
    write(file, {"state_dict": {"model.a": Evil(proof)}})
    assert refused(file) == (
        "must hold tensors and plain values only, got posix.system, which could run code; if you trust the file, save "
        'torch.load(path, weights_only=False)["state_dict"], or the whole model\'s state_dict(), to a new file'
    )
    assert not proof.exists()
    torch.load(file, weights_only=False) if write is not pickled else pickle.loads(file.read_bytes())  # noqa: S301
    assert proof.exists(), "the file is as bad as it claims"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_pickle_protocol_runs_code(file: Path, tmp_path: Path, protocol: int) -> None:
    """A bare pickle with code in it is refused in each protocol, without a warning on the way."""
    file.write_bytes(pickle.dumps(Evil(tmp_path / "ran"), protocol=protocol))
    refused(file)
    assert not (tmp_path / "ran").exists()


def test_a_lightning_file_with_a_namespace_says_how_to_convert_it(file: Path, donor: nn.Module) -> None:
    """The global that was refused is named, and the fix that the error gives works."""
    torch.save({**lightning(donor), "hyper_parameters": argparse.Namespace(lr=1e-4)}, file)
    assert "got argparse.Namespace, which could run code" in refused(file)
    converted = file.with_name("converted.pth")
    torch.save(torch.load(file, weights_only=False)["state_dict"], converted)
    model = unet()
    load_segmentation_state(model, converted)
    assert same(model, state(donor))


def test_a_whole_pickled_model_is_refused(file: Path, donor: nn.Module) -> None:
    """torch.save(model) names the model's class, which could run code."""
    torch.save(donor, file)
    assert "got segmentation_models_pytorch.decoders.unet.model.Unet, which could run code" in refused(file)


@pytest.mark.parametrize("write", [zipped, older])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
def test_a_truncated_file_is_refused(
    file: Path, donor: nn.Module, write: Callable[[Path, Any], None], share: float
) -> None:
    """Cut off anywhere, a file is called damaged."""
    write(file, state(donor))
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    assert re.fullmatch(
        r"must be a checkpoint of torch.save, got a damaged or different file \(\w+\); copy or download it again",
        refused(file),
    )


@pytest.mark.parametrize(
    "content",
    [b"hello world\n", b"# epoch 1\n0.5\n", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"<html></html>", b"\0" * 100, b"PK\3\4"],
)
def test_a_file_of_another_kind_is_refused(file: Path, content: bytes) -> None:
    """Text, a picture, a web page and zeros are no checkpoints."""
    file.write_bytes(content)
    assert "got a damaged or different file" in refused(file)


def test_a_path_without_a_file_is_refused(file: Path, tmp_path: Path) -> None:
    """A missing file, a folder, an empty file and an unreadable one each say so."""
    assert refused(file) == "must be a checkpoint, got no such file; check the path"
    assert refused(tmp_path) == "must be a file, got a folder; give the checkpoint inside it"
    file.touch()
    assert refused(file) == "must be a checkpoint, got an empty file; copy or download it again"


def test_an_unreadable_file_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without read permission says so (root reads all, so the refusal is played)."""

    def load(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    file.write_bytes(b"x")
    monkeypatch.setattr(torch, "load", load)
    assert refused(file) == "must be readable, got Permission denied; change its permissions"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([1, 2], "must hold a state dict, got list; save `model.state_dict()`"),
        (torch.ones(3), "must hold a state dict, got Tensor; save `model.state_dict()`"),
        ({}, "must hold a state dict, got an empty one; save `model.state_dict()`"),
        ({"state_dict": None}, "must hold a state dict, got NoneType; save `model.state_dict()`"),
        (
            {"epoch": 3, "weights": {}},
            (
                "must hold a state dict, got values that are no tensors (epoch, weights); "
                'save `model.state_dict()`, alone or under "state_dict"'
            ),
        ),
        (
            {0: torch.ones(1)},
            (
                "must hold a state dict, got values that are no tensors (0); "
                'save `model.state_dict()`, alone or under "state_dict"'
            ),
        ),
    ],
)
def test_a_file_without_a_state_dict_is_refused(file: Path, content: Any, text: str) -> None:
    """A readable file that holds something else says what it holds."""
    torch.save(content, file)
    assert refused(file) == text


def test_classes_need_one_segmentation_head(file: Path, donor: nn.Module) -> None:
    """The number of classes is the head's, and a file with none or two heads has no answer."""
    torch.save(state(unet(classes=4), "module.model."), file)
    assert classes_of(file) == 4
    for content, heads in (
        (state(donor.encoder), 0),  # type: ignore[arg-type]
        ({**state(donor, "student."), **state(donor, "teacher.")}, 2),
    ):
        torch.save(content, file)
        with pytest.raises(CheckpointError) as caught:
            classes_of(file)
        assert str(caught.value) == (
            f"{file}: must hold one `segmentation_head.0.weight`, got {heads}; "
            "give the file of one whole smp segmentation model"
        )


@pytest.mark.parametrize("name", ["resnet18", "timm-efficientnet-b0"])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("prefix", ["", "model.", "module.unet."])
def test_an_encoder_loads_from_its_own_file_or_a_whole_models(
    file: Path, name: str, prefix: str, *, whole: bool
) -> None:
    """Both kinds of file fill the encoder bit for bit, whatever the classes of the whole model."""
    trained: Any = unet(name, classes=7)
    student: Any = unet(name)
    torch.save({"state_dict": state(trained if whole else trained.encoder, prefix)}, file)
    decoder = state(student.decoder)
    load_encoder_weights(student.encoder, file)
    assert same(student.encoder, state(trained.encoder))
    assert same(student.decoder, decoder)


@pytest.mark.parametrize(
    ("name", "dropped", "kept"),
    [
        ("resnet18", "fc", "classifier"),
        ("timm-efficientnet-b0", "classifier", "fc"),
        ("densenet121", "classifier", "fc"),
    ],
)
def test_only_the_classifier_that_smp_discards_may_be_left_out(file: Path, name: str, dropped: str, kept: str) -> None:
    """A classification file loads where smp itself drops its classifier; another extra layer is refused."""
    trained: Any = unet(name)
    student: Any = unet(name)
    classifier = {"weight": torch.ones(10, 4), "bias": torch.ones(10)}
    torch.save({**state(trained.encoder), **{f"{dropped}.{key}": value for key, value in classifier.items()}}, file)
    load_encoder_weights(student.encoder, file)
    assert same(student.encoder, state(trained.encoder))
    torch.save({**state(trained.encoder), **{f"{kept}.{key}": value for key, value in classifier.items()}}, file)
    with pytest.raises(CheckpointError, match=re.escape(f"got 2 unexpected ({kept}.weight, {kept}.bias)")):
        load_encoder_weights(student.encoder, file)


def test_an_encoder_file_that_does_not_fit_is_refused(file: Path) -> None:
    """Another encoder, or one without its unused head, names the keys and changes nothing."""
    student: Any = unet("timm-efficientnet-b0").encoder
    lacking = {key: value for key, value in state(student).items() if not key.startswith(("conv_head", "bn2"))}
    before = state(student)
    for content, said in (
        (state(unet("timm-efficientnet-b3")), "; build the encoder as the file's model was built"),
        (state(unet("timm-efficientnet-b3").encoder), "of another shape (conv_stem.weight: file (40,"),  # type: ignore[arg-type]
        (state(unet("resnet18")), "must fit the encoder, got"),
        (
            lacking,
            "got 6 missing (conv_head.weight, bn2.weight, bn2.bias, bn2.running_mean, bn2.running_var and 1 more)",
        ),
    ):
        torch.save(content, file)
        with pytest.raises(CheckpointError) as caught:
            load_encoder_weights(student, file)
        assert said in str(caught.value)
        assert same(student, before)


def test_a_saved_file_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    """The new content is there, with a new file's permissions, and a link still points to it."""
    target, link = tmp_path / "last.pth", tmp_path / "link.pth"
    save_atomically({"n": 1}, target)
    link.symlink_to(target)
    save_atomically({"n": 2}, link)
    (tmp_path / "plain").touch()
    assert torch.load(target, weights_only=True) == {"n": 2}
    assert link.is_symlink()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(item.name for item in tmp_path.iterdir()) == ["last.pth", "link.pth", "plain"]


@pytest.mark.parametrize("how", ["half written", "unpicklable", "interrupted"])
def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Whatever stops torch.save, the old file loads, the error arrives, and no temporary file stays."""
    target = tmp_path / "last.pth"
    save_atomically({"n": 1}, target)
    content: Any = {"n": 2, "x": torch.ones(1000)}
    kind: type[BaseException] = {"half written": OSError, "interrupted": KeyboardInterrupt}.get(how, Exception)
    if how == "unpicklable":
        content["f"] = lambda: 0
    else:

        def save(obj: Any, file: Any) -> None:
            file.write(b"PK\3\4 half of it")
            raise kind(28, "No space left on device")

        monkeypatch.setattr(torch, "save", save)
    with pytest.raises(kind):
        save_atomically(content, target)
    assert torch.load(target, weights_only=True) == {"n": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["last.pth"]


def test_a_full_disk_is_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch's writer hides a full disk behind an error of its own, the OSError arrives."""
    with pytest.raises(RuntimeError, match="unexpected pos") as caught:
        torch.save({"x": torch.ones(100_000)}, FullDisk())
    assert isinstance(caught.value.__context__, OSError)
    target = tmp_path / "last.pth"
    save_atomically({"n": 1}, target)
    monkeypatch.setattr(torch, "save", lambda obj, _, save=torch.save: save(obj, FullDisk()))
    with pytest.raises(OSError, match="No space left on device"):
        save_atomically({"x": torch.ones(100_000)}, target)
    assert torch.load(target, weights_only=True) == {"n": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["last.pth"]


class FullDisk(io.RawIOBase):
    """A file on a disk that has room for 10 kB."""

    room = 10_000

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(28, "No space left on device")
        return len(data)


def test_a_pipe_and_a_bomb_are_refused(file: Path) -> None:
    """A pipe is not waited for, and records that would unfold to more than the file are not unfolded."""
    os.mkfifo(file)
    assert refused(file) == "must be a file, got a pipe or device; save its content as one"
    file.unlink()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        archive.writestr("archive/data/0", bytes(100_000_000))
    assert file.stat().st_size < 200_000
    assert "got a damaged or different file (BadZipFile); copy" in refused(file)


def test_plain_torch_save_would_lose_the_old_file(tmp_path: Path) -> None:
    """The failure above is real: torch.save itself leaves an unreadable file behind."""
    target = tmp_path / "last.pth"
    torch.save({"n": 1}, target)
    with pytest.raises(Exception, match="lambda"):
        torch.save({"n": 2, "f": lambda: 0}, target)
    with pytest.raises(Exception):  # noqa: B017, PT011  # whatever torch makes of it
        torch.load(target, weights_only=True)


SAVES_FOREVER = """
import os, sys, torch
from unfreeze_sched.distill.checkpoints import save_atomically
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        n = 0
        while True:
            n += 1
            save_atomically({"n": n, "x": torch.full((300_000,), float(n))}, sys.argv[1])
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the saving process, so that torch is imported once")
def test_a_killed_process_leaves_a_file_that_loads(tmp_path: Path) -> None:
    """A process that saves in a loop is killed ten times; each time the newest file is whole."""
    target = tmp_path / "last.pth"
    save_atomically({"n": 0, "x": torch.zeros(300_000)}, target)
    command = [sys.executable, "-c", SAVES_FOREVER, str(target)]
    seen = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin
        assert parent.stdout
        for round_ in range(10):
            before = target.stat().st_mtime_ns
            parent.stdin.write("\n")
            parent.stdin.flush()
            child = int(parent.stdout.readline())
            deadline = time.monotonic() + 20
            while target.stat().st_mtime_ns == before and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.003 * round_)  # at another place in the saving each time
            os.kill(child, signal.SIGKILL)
            assert parent.stdout.readline() == "gone\n"
            content = torch.load(target, weights_only=True)
            assert torch.equal(content["x"], torch.full((300_000,), float(content["n"])))
            seen.append(content["n"])
        parent.stdin.close()
    assert parent.returncode == 0
    assert min(seen) >= 1
