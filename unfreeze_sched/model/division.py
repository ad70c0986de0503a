"""An encoder divided into blocks by its structure, never by a model's name.

One forward pass on a copy without data (`tracing`) tells which parameters receive a gradient and in which order they
are used. The stages are the repeated children (`layer1`, `layer2`, ...) of the node that holds most of the encoder;
every other parameter goes to the stage that ran last before it, and what comes before the first stage, the stem, goes
to the first.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from unfreeze_sched.model.block import Block
from unfreeze_sched.model.tracing import Trace, TraceError, children, trace

# A node is passed over for its child where that child holds more than this share of the encoder's parameter tensors.
# Tensors are counted, not elements: elements follow width, and a small model's embedding table or last stage would
# outweigh all else.
_DOMINANT = 2 / 3
_REPEATED = 1 / 2  # the share that a group of alike children must hold to be the encoder's stages


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


def divided(model: nn.Module, example_input: Any) -> tuple[Block, ...]:
    """The blocks of a model's encoder, shallow to deep; arguments and errors are `encoder_blocks`'s."""
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
    members = Members(owner, encoder.head, at_run)
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
            base = name = join(name, key)
            top = node = inside[key]
            continue
        if len(inside) != 1 or any(parameter in traced.uses for parameter in node.parameters(recurse=False)):
            break
        ((key, child),) = inside.items()  # a plain wrapper, perhaps around a model with a head of its own
        if not _used_children(child, traced.uses):
            break
        name, node = join(name, key), child
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
        inside = [(join(path, key), child) for key, child in _used_children(node, uses)]
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
    parts = [(join(encoder.name, key), child) for key, child in _used_children(encoder.node, uses)]
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


class Members:
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
        """Place a module of this qualified name, and what is in it."""
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
                    self._add(self._owner.get(parameter), join(name, key), parameter)
            for key, child in children(module):
                self.visit(join(name, key), child)

    def _note(self, index: int | None) -> None:
        if index is not None or self._at_run is None:
            self._current = index

    def _add(self, index: int | None, name: str, member: nn.Module | nn.Parameter) -> None:
        if index is not None:
            self.of_block[index].append((name, member))

    def block(self, index: int, name: str) -> Block:
        """What was collected for a block."""
        names, members = zip(*self.of_block[index], strict=True)
        return Block(name, members, names)


def join(prefix: str, key: str) -> str:
    """The qualified name of a child."""
    return f"{prefix}.{key}" if prefix else key
