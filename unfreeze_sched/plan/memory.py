"""What a model's phases keep in memory, counted on tensors that have a shape and no data: nothing is allocated."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # the only part of torch that shares autograd but no data
from torch.overrides import TorchFunctionMode

from unfreeze_sched._checks import short
from unfreeze_sched.model import Block, encoder_blocks, freezing
from unfreeze_sched.model.tracing import trace
from unfreeze_sched.plan.phases import STATES, Encoder, Measured, Part

Size = tuple[int, int]  # height and width in pixels


def measure(name: str, image_size: Size | None, batch_size: int, optimizer: str, norms: freezing.Norms) -> Measured:
    """What is known of smp's or timm's model, by the batches and the optimizer that it would train with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated names, and of what a model says of itself
        fake = fake_model(name, image_size, batch_size)
        blocks = encoder_blocks(fake.model, example_input=fake.batch)
        used = trace(fake.model, fake.batch).uses
    within = {parameter for block in blocks for parameter in block.parameters()}
    outside = {parameter: key for key, parameter in fake.model.named_parameters() if parameter not in within}
    head = [parameter for parameter in outside if parameter in used and parameter.requires_grad]
    unused = [outside[parameter] for parameter in outside if parameter not in used or not parameter.requires_grad]
    if norms == "fixed":
        blocks = freezing.with_fixed_norms(blocks)
        fixed = chain.from_iterable(block.fixed for block in blocks)
        freezing.set_requires_grad(fixed, requires_grad=False, flipped=[])

    def part(name: str, tensors: Sequence[Tensor]) -> Part:
        return Part(
            name,
            parameters=sum(each.numel() for each in tensors),
            gradients=sum(each.nbytes for each in tensors),
            state=sum(STATES[optimizer](each.shape, each.element_size()) for each in tensors),
        )

    parts = [part("head", head), *(part(block.name, [*block.parameters()]) for block in reversed(blocks))]
    stored = {_key(tensor): tensor for tensor in chain(fake.model.parameters(), fake.model.buffers())}
    return Measured(
        encoder=Encoder(
            name=name,
            model=fake.kind,
            parameters=sum(each.numel() for each in fake.model.parameters()),
            head_parameters=parts[0].parameters,
            unused=tuple(unused),
            image_size=tuple(fake.batch.shape[-2:]),
            batch_size=batch_size,
            optimizer=optimizer,
        ),
        parts=parts,
        weights=sum(tensor.untyped_storage().nbytes() for tensor in stored.values()),
        activations=cache(lambda number: saved_activations(fake, blocks, number, norms)),
    )


def saved_activations(fake: FakeModel, blocks: tuple[Block, ...], number: int, norms: freezing.Norms) -> int:
    """Bytes that a forward pass in training mode saves for backward, with so many of the deepest blocks unfrozen."""
    fake.model.train()
    for depth, block in enumerate(reversed(blocks)):
        (freezing.unfreeze if depth < number else freezing.freeze)(block)
        if norms == "train":
            freezing.release(freezing.norms_of(block))
        elif norms != "eval":
            freezing.hold_in_eval(freezing.norms_of(block))
    with warnings.catch_warnings(), fake.mode, torch.enable_grad(), saved_for_backward(fake.model) as kept:
        warnings.simplefilter("ignore")
        fake.model(fake.batch)
    return sum(storage.nbytes() for storage in kept)


@contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[list[torch.UntypedStorage]]:
    """The storages that a forward pass within the context saves for backward, each once, the model's own aside."""
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


# --- a model without data


class FakeModel(NamedTuple):
    """A model in training mode on tensors that have shapes, types and devices, and no data."""

    model: nn.Module
    kind: str  # what was built, such as `smp.Unet`
    batch: Tensor  # images that it runs on
    mode: FakeTensorMode  # under which it runs


class _RealRanges(TorchFunctionMode):
    """Keeps `linspace` real where all else is on the meta device: constructors read their depth rates from it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **({**kwargs, "device": "cpu"} if func is torch.linspace else kwargs))


def fake_model(name: str, image_size: Size | None, batch_size: int) -> FakeModel:
    """Build `smp.Unet` of an encoder's name, or timm's model; without a size it runs on its own, or on 224 pixels."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # a model may hold small tensors that are not its buffers
    model, kind = _built(name, image_size)
    _to_fake(model, mode)
    model.train()
    height, width = image_size or getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[-2:]
    try:
        with mode, torch.no_grad():
            batch = torch.zeros(batch_size, 3, height, width)
            model(batch)
    except Exception as error:  # whatever a model raises says that this input does not fit
        said = _first_line(error)
        if "more than 1 value per channel" in said:
            what, fix = f"`--batch-size` must suit batch norms in training, got {batch_size}", "raise it to 2"
        elif image_size:
            what = f"`--image-size` must be one that {name} runs on, got {height}x{width}"
            fix = "leave it out for the model's own size"
        else:
            what = f"`--encoder` must run on a batch of images without data, got {name}"
            fix = "plan with --blocks, or pass --image-size"
        raise ValueError(f"{what} ({said}); {fix}") from error
    return FakeModel(model, kind, batch, mode)


def _built(name: str, image_size: Size | None) -> tuple[nn.Module, str]:
    try:
        timm = import_module("timm")  # which smp needs as well
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "`--encoder` needs segmentation_models_pytorch or timm, of which none is installed; "
            "pip install 'unfreeze-sched[plan]'"
        ) from error
    smp: Any = None
    with suppress(ModuleNotFoundError):
        smp = import_module("segmentation_models_pytorch")
    smp_names = set(smp.encoders.get_encoder_names()) if smp else set()
    bare = re.sub(r"^(hf[_-]hub:)?timm/", "", name)  # as model cards spell it; the hub has the weights alone
    prefix, _, rest = name.partition("-")  # `tu-` stands before timm's name; `timm-` did, and smp still maps most of it
    try:
        # A KeyError is smp's word for a name that it does not know, with all that it knows.
        with suppress(KeyError), torch.device("meta"), _RealRanges():
            if name in smp_names or (
                smp and prefix in {"tu", "timm"} and any(map(timm.is_model, (rest, f"tf_{rest}")))
            ):
                return smp.Unet(name, encoder_weights=None), "smp.Unet"
            if timm.is_model(bare) and ":" not in bare:  # such a prefix asks a hub
                with suppress(TypeError):  # most have no positions, and do not take the keyword
                    return timm.create_model(bare, img_size=image_size), "timm"
                return timm.create_model(bare), "timm"
    except Exception as error:
        raise ValueError(
            f"`--encoder` must be one that can be built without weights, got {name} ({_first_line(error)}); "
            "take another, or plan with --blocks"
        ) from error
    near = " or ".join(difflib.get_close_matches(bare, sorted({*smp_names, *timm.list_models()}), 3))
    hint = f"did you mean {near}" if near else "see smp.encoders.get_encoder_names() and timm.list_models()"
    raise ValueError(f"`--encoder` must be a name that smp or timm knows, got {short(name)}; {hint}")


def _to_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace each tensor by a fake one on the CPU, also one that has data."""

    @cache  # so that what is shared stays shared
    def fake(tensor: Tensor) -> Tensor:
        with mode:
            twin = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
        return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin

    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))  # noqa: SLF001  # no setattr does all three
        for table in tables:
            table.update({key: fake(tensor) for key, tensor in table.items() if isinstance(tensor, Tensor)})


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(" .:")
