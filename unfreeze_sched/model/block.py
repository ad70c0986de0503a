"""`Block`: a named piece of an encoder, the unit that is unfrozen."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

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
        root: The model that the members are parts of, so that one which is replaced is noticed. `encoder_blocks` and
            `ProgressiveUnfreezer.from_model` set it; else None.
        fixed: Parameters of the members that never train; none of those that the block lists.

    Raises:
        TypeError: `name` is no string, or a member neither a module nor a parameter.
        ValueError: `name` is empty, no parameter is there, or the two tuples differ in length.

    Example:
        >>> stem = Block("stem", (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)))
        >>> [name for name, _ in stem.named_parameters()]
        ['stem/0.weight', 'stem/1.weight', 'stem/1.bias']
    """

    name: str
    members: tuple[nn.Module | nn.Parameter, ...]
    member_names: tuple[str, ...]
    root: nn.Module | None = field(default=None, repr=False)
    fixed: frozenset[nn.Parameter] = field(default=frozenset(), repr=False)

    def __init__(
        self,
        name: str,
        members: Iterable[nn.Module | nn.Parameter] | nn.Module | nn.Parameter,
        member_names: Iterable[str] = (),
    ) -> None:
        if not isinstance(name, str):
            raise TypeError(f"`name` must be a string, got {name!r}; pass Block('layer1', model.layer1)")
        if not name:
            raise ValueError("`name` must not be empty, got ''; name the block after what it holds, such as 'layer1'")
        held = (members,) if isinstance(members, (nn.Module, nn.Parameter)) else tuple(members)
        for member in held:
            if not isinstance(member, (nn.Module, nn.Parameter)):
                kind = type(member).__name__
                raise TypeError(f"`members` of {name!r} must be modules or parameters, got {kind}; pass model.layer1")
        named = tuple(member_names)
        if named and len(named) != len(held):
            got = f"{len(named)} names for {len(held)} members"
            raise ValueError(f"`member_names` of {name!r} must name each member, got {got}; name all of them, or none")
        vars(self).update(name=name, members=held, member_names=named)  # past what keeps others from writing
        if not any(True for _ in self.parameters()):
            raise ValueError(
                f"`members` of {name!r} must hold a parameter, got {len(held)} members without any; leave the block out"
            )

    def named_parameters(self) -> Iterator[Named]:
        """Each parameter once, with its qualified name where it is known, else `block/name`."""
        return (named for named in self.all_parameters() if named[1] not in self.fixed)

    def all_parameters(self) -> Iterator[Named]:
        """The same, with those that are held fixed."""
        seen: set[int] = set()
        for prefix, member in self.prefixed():
            if isinstance(member, nn.Parameter):
                named: Iterable[Named] = ((prefix.rstrip("."), member),)
            else:
                named = ((prefix + name, parameter) for name, parameter in member.named_parameters())
            for name, parameter in named:
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield name, parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Each parameter once, in the order of the members."""
        return (parameter for _, parameter in self.named_parameters())

    def is_frozen(self) -> bool:
        """Whether none of its parameters is trainable."""
        return not any(parameter.requires_grad for parameter in self.parameters())

    def modules(self) -> Iterator[nn.Module]:
        """Each module of the block, submodules included; none for bare parameters."""
        for member in self.members:
            if isinstance(member, nn.Module):
                yield from member.modules()

    def module_prefixes(self) -> Iterator[tuple[str, nn.Module]]:
        """Each module of the block, behind what its children's qualified names begin with."""
        for prefix, member in self.prefixed():
            if isinstance(member, nn.Module):
                yield from ((prefix + name + "." * bool(name), module) for name, module in member.named_modules())

    def prefixed(self) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
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
