"""`Block`: a named piece of an encoder, the unit that is unfrozen; and each refusal of several of them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from unfreeze_sched._checks import listed

ADAPTERS = r"pass patterns=[r'layer\.0\..*lora_', ...] to encoder_blocks, one a block"
"""The way out where PEFT adapted the model."""

Member = nn.Module | nn.Parameter
Named = tuple[str, nn.Parameter]
"""A parameter behind its name."""


@dataclass(frozen=True, eq=False, init=False)
class Block:
    """A named piece of an encoder: modules, or bare parameters such as a ViT's `cls_token`.

    Args:
        name: Unique among the blocks of one model; tags the block's param group.
        members: Modules and parameters, in any number, at least one parameter in all; one may stand alone.
        member_names: Qualified names of the members in the model, one each, or nothing where the model is not known.

    Attributes:
        root: The model, where it is known, so that a member which is replaced there is noticed.
        fixed: Parameters of the members that never train; none of those that the block lists.

    Raises:
        ValueError: `name` is empty, no parameter is there, or the two tuples differ in length.

    Example:
        >>> stem = Block("stem", (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)))
        >>> [name for name, _ in stem.named_parameters()]
        ['stem/0.weight', 'stem/1.weight', 'stem/1.bias']
    """

    name: str
    members: tuple[Member, ...]
    member_names: tuple[str, ...]
    root: nn.Module | None = field(default=None, repr=False)
    fixed: frozenset[nn.Parameter] = field(default=frozenset(), repr=False)

    def __init__(self, name: str, members: Iterable[Member] | Member, member_names: Iterable[str] = ()) -> None:
        if not isinstance(name, str):
            raise TypeError(f"`name` must be a string, got {name!r}; pass Block('layer1', model.layer1)")
        if not name:
            raise ValueError("`name` must not be empty, got ''; name the block after what it holds, such as 'layer1'")
        held = (members,) if isinstance(members, Member) else tuple(members)
        for member in held:
            if not isinstance(member, Member):
                kind = type(member).__name__
                raise TypeError(f"`members` of {name!r} must be modules or parameters, got {kind}; pass model.layer1")
        named = tuple(member_names)
        if named and len(named) != len(held):
            got = f"{len(named)} names for {len(held)} members"
            raise ValueError(f"`member_names` of {name!r} must name each member, got {got}; name all of them, or none")
        vars(self).update(name=name, members=held, member_names=named)  # past what keeps others from writing
        if not any(True for _ in self.parameters()):
            got = f"{len(held)} members without any"
            raise ValueError(f"`members` of {name!r} must hold a parameter, got {got}; leave the block out")

    def named_parameters(self) -> Iterator[Named]:
        """Each parameter once, with its qualified name where it is known, else `block/name`."""
        return (named for named in self.all_parameters() if named[1] not in self.fixed)

    def all_parameters(self) -> Iterator[Named]:
        """The same, with those that are held fixed."""
        seen: set[nn.Parameter] = set()
        for prefix, member in self.prefixed():
            own: Iterable[Named] = [("", member)] if isinstance(member, nn.Parameter) else member.named_parameters()
            for name, parameter in own:
                if parameter not in seen:
                    seen.add(parameter)
                    yield (prefix + name).rstrip("."), parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Each parameter once, in the order of the members."""
        return (parameter for _, parameter in self.named_parameters())

    def is_frozen(self) -> bool:
        """Whether none of its parameters is trainable."""
        return not any(parameter.requires_grad for parameter in self.parameters())

    def modules(self) -> Iterator[nn.Module]:
        """Each module of the block, submodules included; none for bare parameters."""
        return (module for _, module in self.module_prefixes())

    def module_prefixes(self) -> Iterator[tuple[str, nn.Module]]:
        """Each module of the block, behind what its children's qualified names begin with."""
        for prefix, member in self.prefixed():
            if isinstance(member, nn.Module):
                yield from ((prefix + name + "." * bool(name), module) for name, module in member.named_modules())

    def prefixed(self) -> Iterator[tuple[str, Member]]:
        """Each member, behind what the names of its own parts begin with."""
        if self.member_names:
            prefixes = [f"{name}." if name else "" for name in self.member_names]
        elif len(self.members) == 1 and isinstance(self.members[0], nn.Module):
            prefixes = [f"{self.name}/"]
        else:
            prefixes = [f"{self.name}/{index}." for index in range(len(self.members))]
        return zip(prefixes, self.members, strict=True)

    def within(self, root: nn.Module) -> Block:
        """The same block, which knows the model that its members are parts of."""
        return self._changed(root=root)

    def holding(self, fixed: Iterable[nn.Parameter]) -> Block:
        """The same block, with some of its parameters held fixed."""
        return self._changed(fixed=frozenset(fixed))

    def _changed(self, **fields: Any) -> Block:
        block = copy.copy(self)
        vars(block).update(fields)
        return block


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
        adapted = [m for m in block.modules() if root_of(m) == "peft" and hasattr(m, "get_base_layer")]
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


def root_of(module: nn.Module) -> str:
    """The package in which a module's class is defined, such as `peft`; it is not imported for it."""
    return type(module).__module__.split(".")[0]


def _why_untrainable(parameter: nn.Parameter) -> str:
    if isinstance(parameter, UninitializedParameter):
        return "is not initialized; run one forward pass first"
    if not (parameter.is_floating_point() or parameter.is_complex()):
        return f"is of {parameter.dtype}; list the block's other members one by one"
    if parameter.is_inference():
        return "was made in inference mode; build the model outside of torch.inference_mode()"
    return "" if parameter.is_leaf else "is computed from others; list the parameter that it is computed from"
