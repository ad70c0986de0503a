"""`Block`: a named piece of an encoder, the unit that is unfrozen."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

Named = tuple[str, nn.Parameter]
"""A parameter behind its name."""

ADAPTERS = r"pass patterns=[r'layer\.0\..*lora_', ...] to encoder_blocks, one a block"
"""The way out where PEFT adapted the model."""


@dataclass(frozen=True, eq=False, init=False)
class Block:
    """A named piece of an encoder: modules, or bare parameters such as a ViT's `cls_token`.

    Args:
        name: Unique among the blocks of one model; tags the block's param group.
        members: Modules and parameters, in any number, at least one parameter in all; one may stand alone.
        member_names: Qualified names of the members in the model, one each, or nothing where the model is not known.

    Attributes:
        root: The model that the members are parts of; None where it is not known, as it is by `encoder_blocks` and by
            `ProgressiveUnfreezer.from_model`. Without it nobody can tell that a member was replaced in the model.
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
                raise TypeError(
                    f"`members` of block {name!r} must be modules or parameters, got {type(member).__name__}; "
                    "pass the modules themselves, not their names"
                )
        named = tuple(member_names)
        if named and len(named) != len(held):
            raise ValueError(
                f"`member_names` of block {name!r} must name each of its {len(held)} members, got {len(named)} names; "
                "leave them out where the model is not known"
            )
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "members", held)
        object.__setattr__(self, "member_names", named)
        if not any(True for _ in self.parameters()):
            raise ValueError(
                f"`members` of block {name!r} must hold a parameter, got {len(held)} members without any; "
                "leave the block out"
            )

    def named_parameters(self) -> Iterator[Named]:
        """Each parameter once, with its qualified name where it is known, else `block/name`."""
        return (named for named in self.all_parameters() if named[1] not in self.fixed)

    def all_parameters(self) -> Iterator[Named]:
        """The same, with those that are held fixed."""
        seen: set[int] = set()
        for prefix, member in zip(self._prefixes(), self.members, strict=True):
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
        for _, parameter in self.named_parameters():
            yield parameter

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
        for prefix, member in zip(self._prefixes(), self.members, strict=True):
            if isinstance(member, nn.Module):
                yield from ((prefix + name + "." * bool(name), module) for name, module in member.named_modules())

    def within(self, root: nn.Module) -> Block:
        """The same block, which knows the model that its members are parts of."""
        return self._changed("root", root)

    def holding(self, fixed: Iterable[nn.Parameter]) -> Block:
        """The same block, with some of its parameters held fixed."""
        return self._changed("fixed", frozenset(fixed))

    def _changed(self, name: str, value: Any) -> Block:
        block = copy.copy(self)
        object.__setattr__(block, name, value)
        return block

    def _prefixes(self) -> tuple[str, ...]:
        if self.member_names:
            return tuple(f"{name}." if name else "" for name in self.member_names)
        if len(self.members) == 1 and isinstance(self.members[0], nn.Module):
            return (f"{self.name}/",)
        return tuple(f"{self.name}/{index}." for index in range(len(self.members)))


def gone(blocks: Iterable[Block]) -> list[str]:
    """The names of members that the blocks' model, where it is known, does not hold, be it within a wrapper.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> blocks = [Block("first", model[0], ["0"]).within(model)]
        >>> model[0] = nn.Sequential(model[0], nn.ReLU())
        >>> gone(blocks)
        []
        >>> model[0] = nn.Linear(2, 2)
        >>> gone(blocks)
        ['0']
    """
    known = [(block.root, block) for block in blocks if block.root is not None]
    held = {root: {*root.modules(), *root.parameters()} for root in dict(known)}
    return [
        prefix.rstrip("./")
        for root, block in known
        for prefix, member in zip(block._prefixes(), block.members, strict=True)  # noqa: SLF001  # its own module
        if member not in held[root]
    ]


def validate_blocks(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """Check that blocks can be unfrozen one by one: distinct names, no shared parameter, nothing that cannot train.

    Args:
        blocks: The blocks, shallow to deep.

    Returns:
        The same blocks as a tuple.

    Raises:
        TypeError: An item is not a `Block`.
        ValueError: There is no block, a name or a parameter occurs twice, a parameter cannot be trained, or a block
            holds a layer that PEFT adapted, base weight and all.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> validate_blocks([Block("a", (layer,)), Block("b", (layer.bias,))])
        Traceback (most recent call last):
        ...
        ValueError: `blocks` must not share a parameter, got 'a/bias' in 'a' and 'b'; leave it in one of them
    """
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
        _refuse_adapted(block)
        for name, parameter in block.named_parameters():
            if parameter in owners:
                first, owner = owners[parameter]
                raise ValueError(
                    f"`blocks` must not share a parameter, got {first!r} in {owner!r} and {block.name!r}; "
                    "leave it in one of them"
                )
            owners[parameter] = name, block.name
            reason, fix = _why_untrainable(parameter)
            if reason:
                raise ValueError(f"`blocks` must hold trainable parameters, got {name!r}, which {reason}; {fix}")
    return blocks


def _refuse_adapted(block: Block) -> None:
    for module in block.modules():
        if is_peft(module) and hasattr(module, "get_base_layer"):
            raise ValueError(
                f"`blocks` must not hold a whole PEFT layer, got a {type(module).__name__} in {block.name!r}: "
                f"the base weight that PEFT froze would be unfrozen with it; {ADAPTERS}"
            )


def is_peft(module: nn.Module) -> bool:
    """Whether PEFT made this module."""
    return type(module).__module__.split(".")[0] == "peft"  # by name, since it is not imported for it


def _why_untrainable(parameter: nn.Parameter) -> tuple[str, str]:
    if isinstance(parameter, UninitializedParameter):
        return "is not initialized", "run one forward pass first"
    if not (parameter.is_floating_point() or parameter.is_complex()):
        return f"is of {parameter.dtype}", "list the block's other members one by one"
    if parameter.is_inference():
        return "was made in inference mode", "build the model outside of torch.inference_mode()"
    if not parameter.is_leaf:
        return "is computed from others", "list the parameter that it is computed from"
    return "", ""
