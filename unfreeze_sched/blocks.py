"""From a model to its blocks, the ordered pieces of the encoder that are unfrozen one after another.

The blocks are found by structure, never by a model's name. One forward pass on a copy without data (`tracing`) tells
which parameters receive a gradient and in which order they are used. The stages are the repeated children (`layer1`,
`layer2`, ...) of the node that holds most of the encoder; every other parameter goes to the stage that ran last before
it, and what comes before the first stage, the stem, goes to the first.
"""

from __future__ import annotations

import difflib
import re
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from unfreeze_sched.tracing import Trace, TraceError, children, trace, unwrap, walk

# A node is passed over for its child where that child holds more than this share of the encoder's parameter tensors.
# Tensors are counted, not elements: elements follow width, and a small model's embedding table or last stage would
# outweigh all else.
_DOMINANT = 2 / 3
_REPEATED = 1 / 2  # the share that a group of alike children must hold to be the encoder's stages


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
        ValueError: The model has no blocks or does not run, or a pattern is broken, empty-handed or overlaps another.

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
    if patterns is None:
        return validate_blocks(_blocks_by_structure(unwrap(model), example_input))
    if example_input is not None:
        raise ValueError(
            "`example_input` must be left out where patterns are given, got both; patterns need no forward pass"
        )
    return validate_blocks(_blocks_by_patterns(model, names, patterns))


def validate_blocks(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """Check that blocks can be unfrozen one by one: distinct names, no shared parameter, nothing that cannot train.

    Args:
        blocks: The blocks, shallow to deep.

    Returns:
        The same blocks as a tuple.

    Raises:
        TypeError: An item is not a `Block`.
        ValueError: There is no block, a name or a parameter occurs twice, or a parameter cannot be trained.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> validate_blocks([Block("a", (layer,)), Block("b", (layer.bias,))])
        Traceback (most recent call last):
        ...
        ValueError: `blocks` must not share a parameter, got 'a/bias' in 'a' and 'b'; leave it in one of them
    """
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
            names.setdefault(parameter, _join(prefix, key))
    return names


def _trains(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


# --- by structure


class _Encoder(NamedTuple):
    base: str  # what the names of the blocks are relative to
    top: nn.Module  # the module of that name
    name: str  # of the node below it
    node: nn.Module  # the module that branches, past plain wrappers
    head: list[nn.Module]  # modules inside of it that are none of the encoder's


class _Stage(NamedTuple):
    start: int  # the position of the first use of one of its parameters
    name: str  # qualified in the model
    own: set[nn.Parameter]  # those that no other stage shares


def _blocks_by_structure(model: nn.Module, example_input: Any) -> tuple[Block, ...]:
    traced = _trace(model, example_input)
    encoder = _find_encoder(model, traced)
    outside = {parameter for module in encoder.head for parameter in module.parameters()}
    uses = {p: traced.uses[p] for p in encoder.top.parameters() if p in traced.uses and p not in outside}
    if not uses:
        raise ValueError(
            f"`model` must have an encoder below its head, got {type(model).__name__} without one; "
            "name the blocks with patterns="
        )
    stages = _find_stages(encoder, uses)
    starts = [stage.start for stage in stages]

    owner = {parameter: max(bisect_right(starts, use) - 1, 0) for parameter, use in uses.items()}
    owner |= {parameter: index for index, stage in enumerate(stages) for parameter in stage.own}
    # A run's position is that of the operation to come: where a stage begins with it, the module ran before the stage.
    at_run = {module: max(bisect_left(starts, run) - 1, 0) for module, run in traced.runs.items()}
    members = _Members(owner, encoder.head, at_run)
    members.visit(encoder.base, encoder.top)
    return tuple(members.block(index, _label(stage.name, encoder)) for index, stage in enumerate(stages))


def _label(name: str, encoder: _Encoder) -> str:
    """The name relative to the encoder, except where only a number would be left of it."""
    relative = name.removeprefix(encoder.base).removeprefix(".") or type(encoder.top).__name__
    return name if relative.split(".")[0].isdigit() else relative


def _trace(model: nn.Module, example_input: Any) -> Trace:
    try:
        return trace(model, example_input)
    except TraceError:
        # A detector computes its boxes from data; what it reads of its backbone is all of the backbone's outputs.
        backbone = dict(children(model)).get("backbone")
        if backbone is None or example_input is not None:
            raise
        return trace(backbone)


def _find_encoder(model: nn.Module, traced: Trace) -> _Encoder:
    base, top, name, node = "", model, "", model
    while True:
        inside = dict(_used_children(node, traced.uses))
        key = _encoder_key(node, inside, traced.uses)
        if key is not None:
            base = name = _join(name, key)
            top = node = inside[key]
            continue
        if len(inside) != 1 or any(parameter in traced.uses for parameter in node.parameters(recurse=False)):
            break
        ((key, child),) = inside.items()  # a plain wrapper, perhaps around a model with a head of its own
        if not _used_children(child, traced.uses):
            break
        name, node = _join(name, key), child
    head = _stated_head(node)
    if head is None:
        head = _plain_head(node, traced) if top is model else []
    return _Encoder(base, top, name, node, head)


def _encoder_key(node: nn.Module, inside: Mapping[str, nn.Module], uses: Mapping[nn.Parameter, int]) -> str | None:
    """The child that is the encoder by one of the libraries' conventions."""
    prefix = getattr(node, "base_model_prefix", None)  # transformers: the model below a head
    if isinstance(prefix, str) and prefix in inside:
        return prefix
    if "backbone" in inside:
        return "backbone"
    if "body" in inside and "fpn" in inside:  # torchvision's detection backbones
        return "body"
    if "encoder" in inside and ("decoder" in inside or prefix is None):
        # Elsewhere `encoder` is a middle part, with embeddings or a stem before it that belong to the whole.
        within = set(inside["encoder"].parameters())
        start = min(uses[p] for p in within if p in uses)
        outside = [uses[p] for p in node.parameters() if p in uses and p not in within]
        if outside and min(outside) > start:
            return "encoder"
    return None


def _stated_head(node: nn.Module) -> list[nn.Module] | None:
    """What timm's own method says is the classifier; `None` where there is no such method."""
    get_classifier = getattr(node, "get_classifier", None)
    if not callable(get_classifier):
        return None
    try:
        found = get_classifier()
    except AttributeError:  # smp deletes the classifier and leaves the method
        return None
    return [
        module for module in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(module, nn.Module)
    ]


def _plain_head(node: nn.Module, traced: Trace) -> list[nn.Module]:
    """The last child, where it ends in a linear map to the model's flat output and is not one of alike stages."""
    inside = [child for _, child in _used_children(node, traced.uses)]
    last = max(_used(node, traced.uses), key=traced.uses.__getitem__)
    head = next((child for child in inside if last in set(child.parameters())), None)
    if not traced.flat or head is None or 2 * len(_used(head, traced.uses)) > len(_used(node, traced.uses)):
        return []
    owner = next(module for module in head.modules() if last in set(module.parameters(recurse=False)))
    linear = isinstance(owner, nn.Linear) or (isinstance(owner, nn.Conv2d) and owner.kernel_size == (1, 1))
    alike = owner is not head and any(_shape(child) == _shape(head) for child in inside if child is not head)
    return [head] if linear and not alike else []


def _shape(module: nn.Module) -> tuple[type, ...]:
    return tuple(type(part) for part in module.modules())


def _used(module: nn.Module, uses: Collection[nn.Parameter]) -> set[nn.Parameter]:
    return {parameter for parameter in module.parameters() if parameter in uses}


def _used_children(module: nn.Module, uses: Collection[nn.Parameter]) -> list[tuple[str, nn.Module]]:
    return [(key, child) for key, child in children(module) if _used(child, uses)]


def _find_stages(encoder: _Encoder, uses: Mapping[nn.Parameter, int]) -> list[_Stage]:
    """The stages in the order of their first use: alike children, or failing that all children that hold a matrix."""
    path, node = encoder.name, encoder.node
    while True:
        inside = [(_join(path, key), child) for key, child in _used_children(node, uses)]
        groups: dict[str, list[tuple[str, nn.Module]]] = defaultdict(list)
        for key, child in inside:
            groups[_without_number(key)].append((key, child))
        for group in groups.values():
            stages = _as_stages(_equally_nested(group, uses), uses)
            if len(stages) > 1 and sum(len(_used(child, uses)) for _, child in group) > _REPEATED * len(uses):
                return stages
        dominant = [item for item in inside if len(_used(item[1], uses)) > _DOMINANT * len(uses)]
        if not dominant:
            break
        path, node = dominant[0]
    parts = [(_join(encoder.name, key), child) for key, child in _used_children(encoder.node, uses)]
    return _as_stages(parts, uses) or _as_stages([(encoder.base, encoder.top)], uses, least_dim=0)


def _without_number(name: str) -> str:
    """`layer1` -> `layer`, `stages_0` -> `stages`, `Mixed_5b` -> `Mixed`, `repeat` and `repeat_1` -> `repeat`."""
    return re.sub(r"\d+[a-z]?(?![a-z])", "", name.rpartition(".")[2]).rstrip("_")


def _equally_nested(group: list[tuple[str, nn.Module]], uses: Collection[nn.Parameter]) -> list[tuple[str, nn.Module]]:
    """The group without stems and transitions: layers among blocks of layers, or either among stages of blocks."""
    weights = [len(_used(child, uses)) for _, child in group]
    levels = [_nesting(child, uses) for _, child in group]
    level = max(
        (
            low
            for low in (1, 2)
            if 2 * sum(w for w, lv in zip(weights, levels, strict=True) if lv >= low) > sum(weights)
        ),
        default=0,
    )
    return [item for item, its in zip(group, levels, strict=True) if its >= level]


def _nesting(module: nn.Module, uses: Collection[nn.Parameter]) -> int:
    """0 for a layer, 1 for a block of layers, 2 for anything above; what holds no parameter does not count."""
    inside = [child for _, child in children(module) if _used(child, uses)]
    return min(2, 1 + max(_nesting(child, uses) for child in inside)) if inside else 0


def _as_stages(
    candidates: list[tuple[str, nn.Module]], uses: Mapping[nn.Parameter, int], least_dim: int = 2
) -> list[_Stage]:
    """Those candidates that hold a matrix or kernel of their own; norms alone are no stage."""
    holders = Counter(parameter for _, child in candidates for parameter in _used(child, uses))
    stages = []
    for name, child in candidates:
        own = {parameter for parameter in _used(child, uses) if holders[parameter] == 1}
        if any(parameter.dim() >= least_dim for parameter in own):
            stages.append(_Stage(min(uses[parameter] for parameter in own), name, own))
    return sorted(stages, key=lambda stage: stage.start)


# --- by patterns


def _blocks_by_patterns(model: nn.Module, names: Mapping[nn.Parameter, str], patterns: Any) -> tuple[Block, ...]:
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
    members = _Members(owner)
    members.visit("", unwrap(model))
    prefixes = [_common_module([names[p] for p in owner if owner[p] == index]) for index in range(len(compiled))]
    distinct = all(prefixes) and len(set(prefixes)) == len(prefixes)
    labels = prefixes if distinct else [pattern.pattern for pattern in compiled]
    return tuple(members.block(index, label) for index, label in enumerate(labels))


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
    parts = [name.split(".")[:-1] for name in names]
    shared = [column[0] for column in zip(*parts, strict=False) if len(set(column)) == 1]
    return ".".join(shared)


# --- from the parameters' owners to members


class _Members:
    """Collects the largest modules that lie in one block, and bare parameters where a module is divided.

    A module without parameters is in one block too, as far as it is no part of several members: one activation object
    that serves every stage stays in each.

    Args:
        owner: The index of the block of each parameter that has one.
        skipped: Modules that are in no block.
        at_run: The index of the block during which each module first ran. It places the modules without parameters;
            those that did not run go with what is registered before them. `None` where nothing was run.
    """

    def __init__(
        self,
        owner: Mapping[nn.Parameter, int],
        skipped: Iterable[nn.Module] = (),
        at_run: Mapping[nn.Module, int] | None = None,
    ) -> None:
        self.of_block: dict[int, list[tuple[str, nn.Module | nn.Parameter]]] = defaultdict(list)
        self._owner = owner
        self._seen: set[nn.Module | nn.Parameter] = set(skipped)
        self._at_run = at_run
        # The block of what was registered last. Where the model ran there is always one; patterns may leave gaps.
        self._current: int | None = None if at_run is None else 0

    def visit(self, name: str, module: nn.Module) -> None:
        if module in self._seen:
            return
        self._seen.add(module)
        owners = {self._owner.get(parameter) for parameter in module.parameters()}
        ran = self._at_run or {}
        if not owners and module in ran:
            self._add(ran[module], name, module)
        elif not owners and ran.keys().isdisjoint(module.modules()):
            self._add(self._current, name, module)
        elif len(owners) == 1:
            (index,) = owners
            self._note(index)
            self._add(index, name, module)
            self._seen.update(module.parameters())
        else:  # divided, or a container that never runs itself, whose parts may lie in different blocks
            for key, parameter in module.named_parameters(recurse=False):
                if parameter not in self._seen:
                    self._seen.add(parameter)
                    self._note(self._owner.get(parameter))
                    self._add(self._owner.get(parameter), _join(name, key), parameter)
            for key, child in children(module):
                self.visit(_join(name, key), child)

    def _note(self, index: int | None) -> None:
        if index is not None or self._at_run is None:
            self._current = index

    def _add(self, index: int | None, name: str, member: nn.Module | nn.Parameter) -> None:
        if index is not None:
            self.of_block[index].append((name, member))

    def block(self, index: int, label: str) -> Block:
        names, members = zip(*self.of_block[index], strict=True)
        return Block(label, members, names)


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key
