"""Every refusal of blocks, in words: what cannot be unfrozen one by one, and what is not in the model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.parameter import UninitializedParameter

from unfreeze_sched._checks import listed
from unfreeze_sched.model.block import Block

ADAPTERS = r"pass patterns=[r'layer\.0\..*lora_', ...] to encoder_blocks, one a block"
"""The way out where PEFT adapted the model."""


def validate_blocks(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """The same blocks as a tuple; a TypeError or ValueError says what cannot be unfrozen one by one."""
    if not isinstance(blocks, Iterable):
        raise TypeError(
            f"`blocks` must be a sequence of blocks, got {type(blocks).__name__}; put a single one in a list"
        )
    blocks = tuple(blocks)
    if not blocks:
        raise ValueError("`blocks` must hold at least one block, got none; make them with encoder_blocks(model)")
    names: set[str] = set()
    owners: dict[nn.Parameter, tuple[str, str]] = {}
    for block in blocks:
        if not isinstance(block, Block):
            raise TypeError(
                f"`blocks` must hold Block objects, got {type(block).__name__}; wrap it: Block(name, (module,))"
            )
        if block.name in names:
            raise ValueError(f"`blocks` must have distinct names, got {block.name!r} twice; rename one")
        names.add(block.name)
        adapted = [module for module in block.modules() if is_peft(module) and hasattr(module, "get_base_layer")]
        if adapted:
            raise ValueError(
                f"`blocks` must not hold a whole PEFT layer, got a {type(adapted[0]).__name__} in {block.name!r}: "
                f"the base weight that PEFT froze would be unfrozen with it; {ADAPTERS}"
            )
        for name, parameter in block.named_parameters():
            first, owner = owners.setdefault(parameter, (name, block.name))
            if owner != block.name:
                raise ValueError(
                    f"`blocks` must not share a parameter, got {first!r} in {owner!r} and {block.name!r}; "
                    "leave it in one of them"
                )
            if reason := _why_untrainable(parameter):
                raise ValueError(f"`blocks` must hold trainable parameters, got {name!r}, which {reason}")
    return blocks


def parts_of(model: nn.Module, blocks: Iterable[Block]) -> tuple[Block, ...]:
    """Blocks that know the model; a ValueError names what is not in it."""
    blocks = tuple(block.within(model) for block in validate_blocks(blocks))
    if names := gone(blocks):
        raise ValueError(
            f"`blocks` must be parts of the model, got {listed(names)}, which is not in it; make them from this model"
        )
    return blocks


def gone(blocks: Iterable[Block]) -> list[str]:
    """The names of members that the blocks' model, where it is known, does not hold, be it within a wrapper."""
    known = [(block.root, block) for block in blocks if block.root is not None]
    held = {root: {*root.modules(), *root.parameters()} for root in dict(known)}
    return [
        prefix.rstrip("./") for root, block in known for prefix, member in block.prefixed() if member not in held[root]
    ]


def is_peft(module: nn.Module) -> bool:
    """Whether PEFT made this module."""
    return type(module).__module__.split(".")[0] == "peft"  # by name, since it is not imported for it


def _why_untrainable(parameter: nn.Parameter) -> str:
    if isinstance(parameter, UninitializedParameter):
        return "is not initialized; run one forward pass first"
    if not (parameter.is_floating_point() or parameter.is_complex()):
        return f"is of {parameter.dtype}; list the block's other members one by one"
    if parameter.is_inference():
        return "was made in inference mode; build the model outside of torch.inference_mode()"
    return "" if parameter.is_leaf else "is computed from others; list the parameter that it is computed from"
