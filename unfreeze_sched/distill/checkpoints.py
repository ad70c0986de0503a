"""Checkpoints of teacher and student: read without running code, refused unless they fit, written atomically."""

from __future__ import annotations

import os
import re
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from unfreeze_sched._checks import listed

PathLike = str | os.PathLike[str]
State = Mapping[str, Tensor]

# What Lightning modules, plain wrappers, DataParallel and torch.compile put before a model's own names.
_WRAPPERS = ("module.", "model.", "unet.", "_orig_mod.")
_HEAD = "segmentation_head.0.weight"
_SHOWN = 5


class CheckpointError(ValueError):
    """A file that is no checkpoint, or none of this model; names the file, what is wrong and one fix."""


def load_segmentation_state(model: nn.Module, path: PathLike, *, what: str = "teacher") -> None:
    """Load a segmentation model's weights from a file, all of them or none; errors call the model by `what` it is.

    The file holds a state dict, or one under `state_dict` (Lightning) or `model_state_dict`; keys may stand behind
    `module.`, `model.`, `unet.` or `_orig_mod.`, nested in any order. Weights are cast to the model's dtype.

    Raises:
        CheckpointError: The file cannot be read, or does not fit in every key and shape; `model` is unchanged.
    """
    _load(model, path, what, _WRAPPERS)


def load_encoder_weights(encoder: nn.Module, path: PathLike) -> None:
    """Load the weights of an smp encoder from its own file, or from a whole model's, as `load_segmentation_state` does.

    The ImageNet classifier that smp's encoder class itself discards is left out. All else has to fit, parts that the
    encoder's forward never uses included: a file without them was made for another class of encoder.
    """
    _load(encoder, path, "encoder", (*_WRAPPERS, "encoder."))


def _load(model: nn.Module, path: PathLike, what: str, parts: tuple[str, ...]) -> None:
    state, own = _read_state(path), model.state_dict()
    prefix = _prefix(state, own, parts)
    if prefix.endswith("encoder."):  # of a whole model
        state = {key: value for key, value in state.items() if key.startswith(prefix)}
    # A key outside the prefix keeps its full name, and so shows up as one that does not fit.
    state = {key.removeprefix(prefix): value for key, value in state.items()}
    more = {key: value.to("meta") for key, value in state.items() if key not in own}
    with suppress(RuntimeError):  # its class drops what it discards, as smp's encoders do with their classifier
        model.load_state_dict(more)
    state = {key: value for key, value in state.items() if key in own or key in more}
    refuse_misfits(state, own, source=str(path), what=what)
    model.load_state_dict(state)


def classes_of(path: PathLike) -> int:
    """The number of classes, the output channels of the segmentation head, that a whole model's file has."""
    heads = [value for key, value in _read_state(path).items() if f".{key}".endswith(f".{_HEAD}")]
    if len(heads) != 1 or heads[0].ndim == 0:
        raise CheckpointError(
            f"{path}: must hold one `{_HEAD}`, got {len(heads)}; give the file of one whole smp segmentation model"
        )
    return int(heads[0].shape[0])


def save_atomically(obj: Any, path: PathLike) -> None:
    """`torch.save` that leaves either the old file or the new one, whole, whenever it is cut off."""
    with replacing(path) as file:
        torch.save(obj, file)


@contextmanager
def replacing(path: PathLike, place: Callable[[Path, Path], object] = Path.replace) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of another in one step, once it is whole and on the disk.

    A link stays, and the file that it points to is replaced. Only a killed process leaves `.NAME.*.tmp` behind.
    """
    target = Path(path).resolve()
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        # Not tempfile's, which no one else may read: a checkpoint has the permissions of any new file.
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        place(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None  # what torch's writer hides: a full disk
        raise


def refuse_misfits(state: State, expected: State, *, source: str, what: str) -> None:
    """Refuse a state dict that does not fit the model's own in every key and shape.

    Raises:
        CheckpointError: Names the `source`, the first few keys of each kind, both shapes, and one fix for `what`.
    """
    shapes = [
        f"{key}: file {tuple(state[key].shape)}, model {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    if found := ", ".join(f"{len(items)} {kind} ({listed(items, _SHOWN)})" for kind, items in kinds if items):
        fix = f"build the {what} as the file's model was built"
        if len(missing) == len(expected):
            fix = f"none of the {what}'s keys is in it, so give another file"
        elif not missing and not shapes:
            fix = f"save the {what}'s own `state_dict()` alone"
        raise CheckpointError(f"{source}: must fit the {what}, got {found}; {fix}")


def read_checkpoint(path: PathLike) -> Any:
    """What `torch.load` finds in a file, without running any of its code.

    Raises:
        CheckpointError: The file is missing, damaged (to a single bit, where it has the checksums that `torch.save`
            writes), no checkpoint, or holds objects that would run code.
    """
    file = Path(path)
    if file.is_dir():
        raise CheckpointError(f"{path}: must be a file, got a folder; give the checkpoint inside it")
    if not file.exists():
        raise CheckpointError(f"{path}: must be a checkpoint, got no such file; check the path")
    if not file.is_file():  # to read a pipe is to wait for its writer
        raise CheckpointError(f"{path}: must be a file, got a pipe or device; save its content as one")
    if file.stat().st_size == 0:
        raise CheckpointError(f"{path}: must be a checkpoint, got an empty file; copy or download it again")
    try:
        with warnings.catch_warnings():
            # Any pickle at all makes torch warn of its protocol; the error below says what matters.
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            _check_sums(file)
            return torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise CheckpointError(f"{path}: must be readable, got {error.strerror}; change its permissions") from None
    except Exception as error:  # noqa: BLE001  # bytes that are no checkpoint make an unpickler raise nearly anything
        text = (
            f"must be a checkpoint of torch.save, got a damaged or different file ({type(error).__name__}); "
            "copy or download it again"
        )
        # A pickle's text that begins with c looks like a global, too.
        if refused := re.search(r"GLOBAL ([a-zA-Z_][\w.]{,99})(?![\w.])", str(error)):
            text = (
                f"must hold tensors and plain values only, got {refused[1]}, which could run code; if you trust the "
                'file, save torch.load(path, weights_only=False)["state_dict"], or the whole model\'s state_dict(), '
                "to a new file"
            )
        raise CheckpointError(f"{path}: {text}") from None


def _check_sums(path: Path) -> None:
    """Raise nearly anything for a zip whose records do not match their checksums: `torch.load` looks at none."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":  # how torch tells a zip from its older format, which has no checksums
            return
        with zipfile.ZipFile(file) as records:
            infos = records.infolist()
            if sum(record.file_size for record in infos) > path.stat().st_size:  # torch.save compresses nothing
                raise zipfile.BadZipFile("records that are larger than the file")
            # torch.serialization.set_crc32_options(False) writes 0 for all of them.
            summed = any(record.CRC for record in infos)
            if summed and (name := records.testzip()) is not None:
                raise zipfile.BadZipFile(f"{name} does not match its checksum")


def _read_state(path: PathLike) -> State:
    """The state dict in what a file holds."""
    state = content = read_checkpoint(path)
    if isinstance(content, Mapping):
        state = next((content[key] for key in ("state_dict", "model_state_dict") if key in content), content)
    if not isinstance(state, Mapping) or not state:
        found = "an empty one" if isinstance(state, Mapping) else type(state).__name__
        raise CheckpointError(f"{path}: must hold a state dict, got {found}; save `model.state_dict()`")
    if others := [str(key) for key in state if not isinstance(key, str) or not isinstance(state[key], Tensor)]:
        raise CheckpointError(
            f"{path}: must hold a state dict, got values that are no tensors ({listed(others, _SHOWN)}); "
            'save `model.state_dict()`, alone or under "state_dict"'
        )
    odd = [k for k, v in state.items() if v.layout != torch.strided or v.is_meta or v.is_quantized or v.is_complex()]
    if odd:  # a parameter could not take them, and the others would be loaded by then
        raise CheckpointError(
            f"{path}: must hold plain tensors of real numbers, got others ({listed(odd, _SHOWN)}); "
            "save the model's own `state_dict()`"
        )
    return state


def _prefix(state: State, own: State, parts: tuple[str, ...]) -> str:
    """The prefix, made of `parts`, without which the most keys are the model's; the shortest of equals."""
    prefixes = {""}
    for key in state:
        prefix = ""
        while part := next((part for part in parts if key.startswith(part, len(prefix))), ""):
            prefix += part
            prefixes.add(prefix)

    def fitting(prefix: str) -> int:
        return sum(key.startswith(prefix) and key[len(prefix) :] in own for key in state)

    return max(sorted(prefixes, key=len), key=fitting)
