"""From a model to its blocks, the ordered pieces of the encoder that are unfrozen one after another."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from unfreeze_sched.partition import Members, Piece, join, pieces_by_structure
from unfreeze_sched.tracing import unwrap, walk

_ADAPTERS = r"pass patterns=[r'layer\.0\..*lora_', ...] to encoder_blocks, one a block"


@dataclass(frozen=True, eq=False)
class Block:
    """A named piece of an encoder: modules, or bare parameters such as a ViT's `cls_token`.

    Args:
        name: Unique among the blocks of one model; tags the block's param group.
        members: Modules and parameters, in any number, at least one parameter in all.
        member_names: Qualified names of the members in the model, one each, or nothing where the model is not known.

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
    member_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"`name` must be a string, got {self.name!r}; pass Block('layer1', (model.layer1,))")
        if not self.name:
            raise ValueError("`name` must not be empty, got ''; name the block after what it holds, such as 'layer1'")
        object.__setattr__(self, "members", tuple(self.members))
        for member in self.members:
            if not isinstance(member, (nn.Module, nn.Parameter)):
                raise TypeError(
                    f"`members` of block {self.name!r} must be modules or parameters, got {type(member).__name__}; "
                    "pass the modules themselves, not their names"
                )
        if self.member_names and len(self.member_names) != len(self.members):
            raise ValueError(
                f"`member_names` of block {self.name!r} must name each of its {len(self.members)} members, "
                f"got {len(self.member_names)} names; leave them out where the model is not known"
            )
        if not any(True for _ in self.parameters()):
            raise ValueError(
                f"`members` of block {self.name!r} must hold a parameter, got {len(self.members)} members without any; "
                "leave the block out"
            )

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Each parameter once, with its qualified name where it is known, else `block/name`."""
        seen: set[int] = set()
        for prefix, member in zip(self._prefixes(), self.members, strict=True):
            if isinstance(member, nn.Parameter):
                named: Iterable[tuple[str, nn.Parameter]] = ((prefix.rstrip("."), member),)
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

    def modules(self) -> Iterator[nn.Module]:
        """Each module of the block, submodules included; none for bare parameters."""
        for member in self.members:
            if isinstance(member, nn.Module):
                yield from member.modules()

    def _prefixes(self) -> tuple[str, ...]:
        if self.member_names:
            return tuple(f"{name}." if name else "" for name in self.member_names)
        if len(self.members) == 1 and isinstance(self.members[0], nn.Module):
            return (f"{self.name}/",)
        return tuple(f"{self.name}/{index}." for index in range(len(self.members)))


def encoder_blocks(
    model: nn.Module, patterns: Sequence[str] | None = None, *, example_input: Any = None
) -> tuple[Block, ...]:
    r"""The blocks of a model's encoder, shallow to deep.

    Every parameter that the forward pass uses is in exactly one block; one that never receives a gradient, and the
    head or decoder, are in none. The model is not changed, not run on data, and none of its memory is copied.

    Args:
        model: An smp, timm, torchvision or transformers model, whole or its encoder alone, or any module whose stages
            repeat under one name. DDP and `torch.compile` wrappers are looked through.
        patterns: One regular expression a block, shallow to deep, searched for in the qualified names of the
            parameters. The model is not run then, and parameters that no pattern matches are in no block.
        example_input: What the forward pass takes, where it cannot be guessed: a tensor, a tuple of positional or a
            dict of keyword arguments. Only shapes, types and devices matter.

    Returns:
        The blocks; `[0]` is the shallowest and holds the stem, `[-1]` is next to the head.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: The model has no blocks or does not run, or a pattern is broken, empty-handed or overlaps another;
            or PEFT adapted the model, and no patterns name the adapters.

    Example:
        >>> stage = lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        >>> model = nn.ModuleDict({"encoder": nn.Sequential(nn.Conv2d(3, 8, 1), stage(), stage())})
        >>> [(block.name, block.member_names) for block in encoder_blocks(model["encoder"])]
        [('1', ('0', '1')), ('2', ('2',))]
        >>> [block.name for block in encoder_blocks(model, patterns=[r"encoder\.1\.", r"encoder\.2\."])]
        ['encoder.1', 'encoder.2']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch module, got {type(model).__name__}; pass the model itself")
    if isinstance(unwrap(model), torch.jit.ScriptModule):
        raise TypeError("`model` must be an eager module, got a TorchScript one; find its blocks before scripting it")
    names = _parameter_names(model)
    for parameter, name in names.items():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(  # noqa: TRY004  # the type is right, its state is not
                f"`model` must be initialized, got the lazy parameter {name!r}; run one forward pass first"
            )
    if not names:
        raise ValueError("`model` must have parameters, got none; pass the network that is to be fine-tuned")
    if patterns is None and _is_peft(unwrap(model)):
        raise ValueError(
            f"`patterns` must name the adapters of a {type(unwrap(model)).__name__}, got none: blocks found by "
            f"structure would unfreeze the base weights that PEFT froze; {_ADAPTERS}"
        )
    if patterns is None:
        return validate_blocks(_block(piece) for piece in pieces_by_structure(unwrap(model), example_input))
    if example_input is not None:
        raise ValueError(
            "`example_input` must be left out where patterns are given, got both; patterns need no forward pass"
        )
    return validate_blocks(_block(piece) for piece in _pieces_by_patterns(model, names, patterns))


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


def _block(piece: Piece) -> Block:
    names, members = zip(*piece.members, strict=True)
    return Block(piece.name, members, names)


def _refuse_adapted(block: Block) -> None:
    for module in block.modules():
        if _is_peft(module) and hasattr(module, "get_base_layer"):
            raise ValueError(
                f"`blocks` must not hold a whole PEFT layer, got a {type(module).__name__} in {block.name!r}: "
                f"the base weight that PEFT froze would be unfrozen with it; {_ADAPTERS}"
            )


def _is_peft(module: nn.Module) -> bool:
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


def _parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Each parameter with its qualified name, wrappers' prefixes left out; tied ones by their first name."""
    names: dict[nn.Parameter, str] = {}
    for prefix, module in walk(model):
        for key, parameter in module.named_parameters(recurse=False):
            names.setdefault(parameter, join(prefix, key))
    return names


def _trains(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


def _pieces_by_patterns(model: nn.Module, names: Mapping[nn.Parameter, str], patterns: Any) -> list[Piece]:
    compiled = [_compile(pattern) for pattern in _check_patterns(patterns)]
    owner: dict[nn.Parameter, int] = {}
    for index, pattern in enumerate(compiled):
        matched = [p for p, name in names.items() if pattern.search(name) and _trains(p)]
        if not matched:
            raise ValueError(
                f"`patterns` must each match a parameter, got {pattern.pattern!r}, which matches none; "
                f"the nearest names are {_nearest(pattern.pattern, names.values())}"
            )
        for parameter in matched:
            if parameter in owner:
                raise ValueError(
                    f"`patterns` must not overlap, got {names[parameter]!r} matched by "
                    f"{compiled[owner[parameter]].pattern!r} and {pattern.pattern!r}; make one of them narrower"
                )
            owner[parameter] = index
    members = Members(owner)
    members.visit("", unwrap(model))
    prefixes = [_common_module([names[p] for p in owner if owner[p] == index]) for index in range(len(compiled))]
    distinct = all(prefixes) and len(set(prefixes)) == len(prefixes)
    labels = prefixes if distinct else [pattern.pattern for pattern in compiled]
    return [members.piece(index, label) for index, label in enumerate(labels)]


def _check_patterns(patterns: Any) -> list[str]:
    if isinstance(patterns, (str, bytes)) or not isinstance(patterns, Iterable):
        raise TypeError(
            f"`patterns` must be a list of regular expressions, got {patterns!r}; put a single one in a list"
        )
    listed = list(patterns)
    if not listed:
        raise ValueError("`patterns` must hold at least one regular expression, got none; leave it out to find blocks")
    for pattern in listed:
        if not isinstance(pattern, str):
            raise TypeError(f"`patterns` must hold strings, got {pattern!r}; write each block's regex as a string")
    return listed


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"`patterns` must be valid regular expressions, got {pattern!r} ({error}); escape special characters"
        ) from error


def _nearest(pattern: str, names: Iterable[str]) -> str:
    """The three parameter or module names that look most like the pattern."""
    known = {".".join(parts[:end]) for parts in (name.split(".") for name in names) for end in range(1, len(parts) + 1)}
    plain = re.sub(r"[\\^$]", "", pattern).strip(".*")
    return ", ".join(repr(name) for name in difflib.get_close_matches(plain, sorted(known), n=3, cutoff=0))


def _common_module(names: Sequence[str]) -> str:
    """The innermost module that holds all the named parameters, '' for the model itself."""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))
