"""What a model's phases keep in memory, counted on fake tensors: nothing of its size is allocated.

The model is built by its name on the meta device, and run on tensors that have a shape and no data.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # the only part of torch that shares autograd but no data
from torch.overrides import TorchFunctionMode

from unfreeze_sched._checks import short
from unfreeze_sched.model import Block, encoder_blocks
from unfreeze_sched.model.freezing import (
    Norms,
    freeze,
    hold_in_eval,
    norms_of,
    release,
    set_requires_grad,
    unfreeze,
    with_fixed_norms,
)
from unfreeze_sched.model.tracing import trace
from unfreeze_sched.plan.phases import STATES, Encoder, Measured

Size = tuple[int, int]

_USUAL_SIZES = ((224, 224), (256, 256), (384, 384))


# --- counting


def measure(name: str, image_size: Size | None, batch_size: int, optimizer: str, norms: Norms) -> Measured:
    """What is known of a model by its name, before anything is allocated.

    Args:
        name: smp's or timm's.
        image_size: Height and width in pixels; None takes the model's own.
        batch_size: Images a batch.
        optimizer: A key of `STATES`.
        norms: As for `ProgressiveUnfreezer`.

    Raises:
        ModuleNotFoundError: Neither smp nor timm is installed.
        ValueError: The model cannot be had or does not run.
    """
    fake = fake_model(name, image_size, batch_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        blocks = encoder_blocks(fake.model, example_input=fake.batch)
        used = trace(fake.model, fake.batch).uses
    names = {parameter: key for key, parameter in fake.model.named_parameters()}
    in_blocks = {parameter for block in blocks for parameter in block.parameters()}
    if norms == "fixed":
        blocks = with_fixed_norms(blocks)
        set_requires_grad(chain.from_iterable(block.fixed for block in blocks), requires_grad=False, flipped=[])
    outside = {parameter: key for parameter, key in names.items() if parameter not in in_blocks}
    head = [parameter for parameter in outside if parameter in used and parameter.requires_grad]
    unused = [key for parameter, key in outside.items() if parameter not in set(head)]
    encoder = Encoder(
        name=name,
        model=fake.kind,
        parameters=_count(names),
        head_parameters=_count(head),
        unused=tuple(unused),
        image_size=tuple(fake.batch.shape[-2:]),
        batch_size=batch_size,
        optimizer=optimizer,
    )
    per_block = [list(block.parameters()) for block in blocks]
    return Measured(
        encoder=encoder,
        names=tuple(block.name for block in blocks),
        parameters=tuple(map(_count, per_block)),
        head_bytes=_bytes(head),
        gradient_bytes=tuple(map(_bytes, per_block)),
        head_state=_state(optimizer, head),
        state_bytes=tuple(_state(optimizer, parameters) for parameters in per_block),
        weights=_stored(chain(fake.model.parameters(), fake.model.buffers())),
        activations=cache(lambda number: saved_activations(fake, blocks, number, norms)),
    )


def saved_activations(fake: FakeModel, blocks: tuple[Block, ...], number: int, norms: Norms) -> int:
    """Bytes that a forward pass in training mode saves for backward, with the deepest blocks unfrozen.

    Every storage counts once, whole and whichever views of it are saved.

    Args:
        fake: The model and its batch.
        blocks: Its blocks, shallow to deep.
        number: How many of them are unfrozen, from the deep end.
        norms: As for `ProgressiveUnfreezer`, which treats the blocks in the same way.
    """
    fake.model.train()
    for depth, block in enumerate(reversed(blocks)):
        (unfreeze if depth < number else freeze)(block)
        if norms != "eval":
            (release if norms == "train" else hold_in_eval)(norms_of(block))
    with warnings.catch_warnings(), fake.mode, torch.enable_grad(), saved_for_backward(fake.model) as kept:
        warnings.simplefilter("ignore")
        fake.model(fake.batch)
    return sum(storage.nbytes() for storage in kept)


@contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[list[torch.UntypedStorage]]:
    """The storages that a forward pass within the context saves for its backward pass, each once.

    Args:
        model: Its parameters and buffers are there anyway, and are not counted.

    Example:
        >>> layer = nn.Linear(8, 8)
        >>> with saved_for_backward(layer) as kept:
        ...     loss = layer(torch.zeros(4, 8)).tanh().sum()
        >>> sum(storage.nbytes() for storage in kept)  # the weight's gradient takes the input, tanh's its own output
        256
    """
    seen = {_key(tensor) for tensor in chain(model.parameters(), model.buffers())}
    kept: list[torch.UntypedStorage] = []  # alive, so that no key is used twice

    def pack(tensor: Tensor) -> Tensor:
        if _key(tensor) not in seen:
            seen.add(_key(tensor))
            kept.append(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def _key(tensor: Tensor) -> int:
    """Tells storages apart by their object, since a fake one has no address."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001  # torch's own fake mode keys its memos by it


def _stored(tensors: Iterable[Tensor]) -> int:
    storages = {_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _state(optimizer: str, parameters: Iterable[nn.Parameter]) -> int:
    return sum(STATES[optimizer](parameter.shape, parameter.element_size()) for parameter in parameters)


# --- a model without data


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
    bare = re.sub(r"^(hf[_-]hub:)?timm/", "", name)  # as model cards spell it; the hub has the weights alone
    prefix, _, rest = name.partition("-")  # `tu-` stands before timm's name; `timm-` did, and smp still maps most of it
    try:
        # A KeyError is smp's word for a name that it does not know, with all that it knows.
        with suppress(KeyError), torch.device("meta"), _RealRanges():
            if name in smp_names or (smp and prefix in {"tu", "timm"} and (is_model(rest) or is_model(f"tf_{rest}"))):
                return smp.Unet(name, encoder_weights=None), "smp.Unet"
            if is_model(bare) and ":" not in bare:  # such a prefix asks a hub
                return _timm_model(timm, bare, image_size), "timm"
    except Exception as error:
        raise ValueError(
            f"`--encoder` must be one that can be built without weights, got {name} ({_first_line(error)}); "
            "take another, or plan with --blocks"
        ) from error
    known = sorted(smp_names | set(timm.list_models() if timm else ()))
    near = difflib.get_close_matches(bare, known, 3)
    hint = (
        f"did you mean {' or '.join(near)}" if near else "see smp.encoders.get_encoder_names() and timm.list_models()"
    )
    raise ValueError(f"`--encoder` must be a name that smp or timm knows, got {short(name)}; {hint}")


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
