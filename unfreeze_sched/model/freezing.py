"""Freeze and unfreeze a block: flags, no gradient left behind, and norm layers that stay in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from unfreeze_sched.model.block import Block

Norms = Literal["eval", "frozen", "fixed", "train"]

_STATISTICS = frozenset({"running_mean", "running_var"})
# Buffers that a forward pass in training mode writes, whether or not a gradient flows: running statistics, and the
# vectors of spectral norm's power iteration (as a parametrization, and as the older hook).
_WRITTEN_IN_TRAINING = _STATISTICS | {"_u", "weight_u"}


def freeze(block: Block) -> None:
    """Freeze a block, so that no step of any optimizer and no forward pass changes it; idempotent."""
    drop_gradients(set_requires_grad(block.parameters(), requires_grad=False, flipped=[]))
    hold_in_eval(norms_of(block))


def unfreeze(block: Block) -> None:
    """Make a block trainable and give its norm layers back to `model.train()`; idempotent."""
    drop_gradients(set_requires_grad(block.parameters(), requires_grad=True, flipped=[]))
    release(block.modules())


def set_requires_grad(
    parameters: Iterable[nn.Parameter], *, requires_grad: bool, flipped: list[nn.Parameter]
) -> list[nn.Parameter]:
    """Set the flag, and return those with a gradient on which it changed.

    `flipped` gets each parameter before its flag changes, so that an interrupted call can be undone.
    """
    with_gradient = []
    for parameter in parameters:  # once, since the first look at each of many tensors is what costs
        if parameter.requires_grad is not requires_grad:
            flipped.append(parameter)
            parameter.requires_grad = requires_grad
            if parameter.grad is not None:
                with_gradient.append(parameter)
    return with_gradient


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Forget gradients from before a change: a step would still apply them, and clipping count them."""
    for parameter in parameters:
        parameter.grad = None


def norms_of(block: Block) -> tuple[nn.Module, ...]:
    """The block's norm layers, those without parameters included."""
    return tuple(module for module in block.modules() if is_norm(module))


def is_norm(module: nn.Module) -> bool:
    """By torch's classes, or by a buffer of its own that only training writes."""
    kinds = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    return isinstance(module, kinds) or not _WRITTEN_IN_TRAINING.isdisjoint(module._buffers)  # noqa: SLF001


def with_fixed_norms(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """Blocks that hold the weights and biases of their batch norms fixed, as `norms="fixed"` asks for."""
    norms = [(block, [module for module in block.modules() if _is_batch_norm(module)]) for block in blocks]
    if not any(own for _, own in norms):
        raise ValueError(
            "`norms` must find batch norms to hold, got 'fixed' for blocks without any; leave it out, since LayerNorm "
            "and its like keep no statistics, and train with their block"
        )
    held = [block.holding(p for norm in own for p in norm.parameters(recurse=False)) for block, own in norms]
    for block in held:
        if not any(True for _ in block.parameters()):
            raise ValueError(
                f"`norms` must leave each block something to train, got 'fixed' for {block.name!r}, of norms alone; "
                "put them into the block beside it"
            )
    return tuple(held)


def _is_batch_norm(module: nn.Module) -> bool:
    """Whether the module is a batch norm, or another layer that keeps running statistics."""
    own = module._buffers  # noqa: SLF001  # without those of its children; a name may be there for nothing
    return isinstance(module, _BatchNorm) or any(own.get(name) is not None for name in _STATISTICS)


class _EvalHold:
    """Stands in for `module.train` while a norm layer is frozen: remembers the mode asked for, and stays in evaluation.

    An attribute of the instance, to survive a `train()` on any parent, and no closure, which cannot be pickled.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.asked = module.training

    def __call__(self, mode: bool = True) -> nn.Module:
        self.asked = mode
        type(self.module).train(self.module, mode)  # for the children
        self.module.training = False
        return self.module

    def keep_running_stats(self) -> None:
        """For `reset_running_stats`: `update_bn` calls that, and then relies on training mode for new ones."""


def hold_in_eval(norms: Iterable[nn.Module]) -> None:
    """Put norm layers into evaluation mode, whatever `train()` says from now on; idempotent."""
    for module in norms:
        if not is_held(module):
            hold = _EvalHold(module)
            module.__dict__["train"] = hold
            if isinstance(module, _NormBase):
                module.__dict__["reset_running_stats"] = hold.keep_running_stats
            module.training = False


def is_held(module: nn.Module) -> bool:
    """Whether a norm layer is held in evaluation mode."""
    return isinstance(module.__dict__.get("train"), _EvalHold)


def asked_of(module: nn.Module) -> bool:
    """The mode that was asked of a module: that of one which is held is the library's own wish."""
    return bool(module.__dict__["train"].asked if is_held(module) else module.training)


def release(modules: Iterable[nn.Module]) -> None:
    """Let those of these modules that are held follow `train()` again, from the mode last asked of them; idempotent."""
    for module in modules:
        if is_held(module):
            module.training = module.__dict__.pop("train").asked
            module.__dict__.pop("reset_running_stats", None)
