"""From a name to a model without data: built on the meta device, run on fake tensors."""

from __future__ import annotations

import difflib
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode  # the only part of torch that shares autograd but no data
from torch.overrides import TorchFunctionMode

Size = tuple[int, int]

_USUAL_SIZES = ((224, 224), (256, 256), (384, 384))


@dataclass(frozen=True)
class FakeModel:
    """A model on fake tensors, in training mode, and a batch that it runs on.

    Attributes:
        model: Its tensors have shapes, types and devices, and no data.
        kind: What was built, such as `smp.Unet`.
        batch: Images.
        mode: Under which the model runs.
    """

    model: nn.Module
    kind: str
    batch: torch.Tensor
    mode: FakeTensorMode


class _RealRanges(TorchFunctionMode):
    """Keeps `linspace` real where all else is on the meta device: constructors read their depth rates from it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **({**kwargs, "device": "cpu"} if func is torch.linspace else kwargs))


def fake_model(name: str, image_size: Size | None, batch_size: int) -> FakeModel:
    """Build a model by its name, with no memory for its weights.

    Args:
        name: smp's name of an encoder, of which an `smp.Unet` is made, else timm's of a model.
        image_size: Height and width in pixels; None takes what the model states, else a usual size.
        batch_size: Images a batch.

    Raises:
        ModuleNotFoundError: Neither library is installed.
        ValueError: A name that neither knows, or a model that does not run on images of this size.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # a model may hold small tensors that are not its buffers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated names
        model, kind = _built(name, image_size)
        _to_fake(model, mode)
        model.train()
        stated = getattr(model, "pretrained_cfg", {}).get("input_size", ())[-2:]
        sizes = [image_size] if image_size else dict.fromkeys((*((tuple(stated),) if stated else ()), *_USUAL_SIZES))
        reasons = []
        for size in sizes:
            try:
                with mode, torch.no_grad():
                    batch = torch.zeros(batch_size, 3, *size)
                    model(batch)
            except Exception as error:  # noqa: BLE001  # whatever a model raises says that this input does not fit
                reasons.append(_first_line(error))
            else:
                return FakeModel(model, kind, batch, mode)
    if "more than 1 value per channel" in reasons[0]:
        raise ValueError(
            f"`--batch-size` must suit batch norms in training, got {batch_size} ({reasons[0]}); raise it to 2"
        )
    if image_size:
        given = f"{image_size[0]}x{image_size[1]}"
        raise ValueError(
            f"`--image-size` must be one that {name} runs on, got {given} ({reasons[0]}); "
            "leave it out for the model's own size"
        )
    raise ValueError(
        f"`--encoder` must run on a batch of images without data, got {name} ({reasons[0]}); "
        "plan with --blocks, or pass --image-size"
    )


def _built(name: str, image_size: Size | None) -> tuple[nn.Module, str]:
    smp, timm = _library("segmentation_models_pytorch"), _library("timm")
    if smp is None and timm is None:
        raise ModuleNotFoundError(
            "`--encoder` needs segmentation_models_pytorch or timm, of which none is installed; "
            "pip install segmentation-models-pytorch"
        )
    smp_names = set(smp.encoders.get_encoder_names()) if smp else set()
    is_model = timm.is_model if timm else lambda _: False
    prefix, _, rest = name.partition("-")  # `tu-` stands before timm's name; `timm-` did, and smp still maps most of it
    try:
        # A KeyError is smp's word for a name that it does not know, with all that it knows.
        with suppress(KeyError), torch.device("meta"), _RealRanges():
            if name in smp_names or (smp and prefix in {"tu", "timm"} and (is_model(rest) or is_model(f"tf_{rest}"))):
                return smp.Unet(name, encoder_weights=None), "smp.Unet"
            if is_model(name) and ":" not in name:  # such a prefix asks a hub
                return _timm_model(timm, name, image_size), "timm"
    except Exception as error:
        raise ValueError(
            f"`--encoder` must be one that can be built without weights, got {name} ({_first_line(error)}); "
            "take another, or plan with --blocks"
        ) from error
    known = sorted(smp_names | set(timm.list_models() if timm else ()))
    near = difflib.get_close_matches(name, known, 3)
    hint = (
        f"did you mean {' or '.join(near)}" if near else "see smp.encoders.get_encoder_names() and timm.list_models()"
    )
    shown = repr(name[:80])
    raise ValueError(f"`--encoder` must be a name that smp or timm knows, got {shown}; {hint}")


def _timm_model(timm: Any, name: str, image_size: Size | None) -> nn.Module:
    """With positions for the image size, where the model has any."""
    if image_size:
        try:
            return timm.create_model(name, img_size=image_size)  # type: ignore[no-any-return]
        except TypeError:  # most have none, and do not take the keyword
            pass
    return timm.create_model(name)  # type: ignore[no-any-return]


def _library(name: str) -> Any:
    try:
        return __import__(name)
    except ModuleNotFoundError:
        return None


def _to_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace each tensor by a fake one on the CPU; one that has data, or is shared, is replaced once."""
    fakes: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in fakes:
            with mode:
                twin = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            fakes[id(tensor)] = nn.Parameter(twin, requires_grad=tensor.requires_grad) if is_parameter else twin
        return fakes[id(tensor)]

    replaced = []  # alive until the end, so that no id is used twice
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))  # noqa: SLF001  # no setattr does all three
        for table in tables:
            for key, tensor in table.items():
                if isinstance(tensor, torch.Tensor):
                    replaced.append(tensor)
                    table[key] = fake(tensor)


def _first_line(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return text.rstrip(" .:")
