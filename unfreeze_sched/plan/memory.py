"""What a model's phases keep in memory, counted on fake tensors: nothing of its size is allocated."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import cache
from itertools import chain

import torch
from torch import Tensor, nn

from unfreeze_sched.model import Block, encoder_blocks
from unfreeze_sched.model.freezing import Norms, freeze, hold_in_eval, norms_of, release, unfreeze
from unfreeze_sched.model.tracing import trace
from unfreeze_sched.plan.encoders import FakeModel, Size, fake_model
from unfreeze_sched.plan.optimizers import state_bytes
from unfreeze_sched.plan.phases import Encoder, Measured


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

    Every storage counts once, whole and whichever views of it are saved; the model's parameters and buffers are there
    anyway and do not count.

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
            (hold_in_eval if norms == "frozen" else release)(norms_of(block))
    seen = {_key(tensor) for tensor in chain(fake.model.parameters(), fake.model.buffers())}
    kept: list[torch.UntypedStorage] = []  # alive, so that no key is used twice

    def pack(tensor: Tensor) -> Tensor:
        if _key(tensor) not in seen:
            seen.add(_key(tensor))
            kept.append(tensor.untyped_storage())
        return tensor

    with (
        warnings.catch_warnings(),
        fake.mode,
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        warnings.simplefilter("ignore")
        fake.model(fake.batch)
    return sum(storage.nbytes() for storage in kept)


def _key(tensor: Tensor) -> int:
    """A fake storage has no address; its object tells it apart."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001  # torch's own fake mode keys its memos by it


def _stored(tensors: Iterable[Tensor]) -> int:
    storages = {_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _state(optimizer: str, parameters: Iterable[nn.Parameter]) -> int:
    return sum(state_bytes(optimizer, parameter.shape, parameter.element_size()) for parameter in parameters)
