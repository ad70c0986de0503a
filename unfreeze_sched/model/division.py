"""An encoder divided into blocks by its structure, never by a model's name: its stages, and what lies between them."""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from itertools import chain
from typing import Any, NamedTuple

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from unfreeze_sched.model.block import Block, Member, root_of
from unfreeze_sched.model.tracing import Trace, children, join

log = logging.getLogger("unfreeze_sched")

Uses = Mapping[nn.Parameter, int]
Parts = list[tuple[str, nn.Module]]  # modules behind their qualified names
Stages = dict[str, set[nn.Parameter]]  # under such a name, the parameters that no other stage shares

# A node is passed over for its child where that child holds more than this share of the encoder's parameter tensors.
# Tensors are counted, not elements: elements follow width, and a small model's embedding table or last stage would
# outweigh all else.
_DOMINANT = 2 / 3
_REPEATED = 1 / 2  # the share that a group of alike children must hold to be the encoder's stages
_TOWER = 1 / 4  # and that of a child which, among others, is divided into stages of its own

_held_fixed = WeakIdKeyDictionary()
"""Parameters that were not trainable when their block was made, while the rest of it was: they look like the rest
once the schedule has frozen all of it."""


class Encoder(NamedTuple):
    """Where a model's encoder is."""

    name: str  # qualified, of the module that holds it; '' for the model
    top: nn.Module  # that module; what is outside of it is head, except for what feeds it
    head: frozenset[nn.Parameter] = frozenset()  # parameters inside of it that are head
    around: nn.Module | None = None  # the module above it, where that calls it its base model

    def scope(self, traced: Trace) -> nn.Module:
        """The module that is all encoder: `around` where `top` is a middle part of it, with embeddings before it."""
        if self.around is None or root_of(self.around) != "transformers":
            return self.top
        inside = set(self.top.parameters())
        feeding = traced.feeding(inside)
        middle = any(traced.uses.get(p) in feeding for p in self.around.parameters() if p not in inside)
        return self.around if middle else self.top

    def head_of(self, traced: Trace) -> set[nn.Parameter]:
        """The parameters of the whole model that the forward pass uses and that are in no block."""
        inside = set(self.scope(traced).parameters())
        feeding = traced.feeding(inside)
        return {p for p, use in traced.uses.items() if p in self.head or (p not in inside and use not in feeding)}


def divided(model: nn.Module, encoder: Encoder, traced: Trace, head: Collection[nn.Parameter]) -> list[Block]:
    """The blocks of an unwrapped model's encoder, of all that the forward pass uses outside of the head."""
    uses = {parameter: use for parameter, use in traced.uses.items() if parameter not in head}
    found = _find_stages(encoder.name, encoder.top, uses)
    stages = _in_order(_as_stages(found, uses) or _as_stages(found, uses, least_dim=0), traced)
    places, at_run = _places(stages, traced, {traced.uses[p] for p in head})
    owner = {parameter: places[use] for parameter, use in uses.items()}
    owner |= {parameter: index for index, own in enumerate(stages.values()) for parameter in own}
    beside = set(model.modules()) - set(encoder.scope(traced).modules())
    ran = {module: at_run[run] for module, run in traced.runs.items()} | dict.fromkeys(beside)
    labels = [_label(name, encoder) for name in stages]
    return collected(model, labels, without_fixed(model, owner), ran)


def _label(name: str, encoder: Encoder) -> str:
    """The name relative to the encoder, except where only a number would be left of it."""
    relative = name.removeprefix(encoder.name).removeprefix(".") or type(encoder.top).__name__
    return name if relative.split(".")[0].isdigit() and name else relative


def without_fixed(model: nn.Module, owner: Mapping[nn.Parameter, int]) -> dict[nn.Parameter, int]:
    """Leave out what is held fixed: not trainable, in a block of which other parameters are.

    A block that is frozen as a whole is the schedule's, except for what was held fixed before.
    """
    trainable = {index for parameter, index in owner.items() if parameter.requires_grad}
    fixed = {p for p, index in owner.items() if not p.requires_grad and (index in trainable or p in _held_fixed)}
    left = {p: index for p, index in owner.items() if p not in fixed}
    # What PEFT froze is refused where a block would hold it.
    if not fixed or "peft" in map(root_of, model.modules()) or {*left.values()} != {*owner.values()}:
        return dict(owner)
    _held_fixed.update(dict.fromkeys(fixed, True))
    names = [name for name, parameter in model.named_parameters() if parameter in fixed]
    log.info("held fixed, and so in no block: %s", ", ".join(names))
    return left


def _places(stages: Stages, traced: Trace, head: Collection[int]) -> tuple[list[int], list[int | None]]:
    """The stage of each operation, the last that feeds it, else the first that it feeds; and of what runs there.

    The latter is `None` behind the operations of the head.
    """
    at = _positions(stages, traced)
    last = len(stages) - 1
    before: list[int] = []  # the last stage that feeds it, or -1
    behind: list[bool] = []  # whether the head feeds it
    for sources in traced.inputs:
        before.append(max((max(before[source], at.get(source, -1)) for source in sources), default=-1))
        behind.append(any(behind[source] or source in head for source in sources))
    operations = range(len(traced.inputs))
    after = [at.get(operation, last) for operation in operations]  # the first stage that it is part of, or feeds
    for operation in reversed(operations):
        for source in traced.inputs[operation]:
            after[source] = min(after[source], after[operation])
    places = [fed if fed >= 0 else feeds for fed, feeds in zip(before, after, strict=True)]
    at_run = [None if headed else place for headed, place in zip(behind, places, strict=True)]
    return places, [*at_run, None if head else last]


def _used(module: nn.Module, uses: Collection[nn.Parameter]) -> set[nn.Parameter]:
    return {parameter for parameter in module.parameters() if parameter in uses}


def parts(path: str, module: nn.Module, uses: Collection[nn.Parameter]) -> Parts:
    """The children of a module at a path that hold some of these parameters."""
    return [(join(path, key), child) for key, child in children(module) if _used(child, uses)]


def _find_stages(path: str, top: nn.Module, uses: Uses) -> Parts:
    """The stages: alike children of the node that holds most, or those of each tower, or else all with a matrix."""
    total = len(_used(top, uses))
    name, node = path, top
    while True:
        inside = parts(name, node, uses)
        groups: dict[str, Parts] = defaultdict(list)
        for item in inside:
            groups[_without_number(item[0])].append(item)
        for group in groups.values():
            stages = _equally_nested(group, uses)
            if len(_as_stages(stages, uses)) > 1 and _weight(group, uses) > _REPEATED * total:
                return stages
        dominant = [item for item in inside if _weight([item], uses) > _DOMINANT * total]
        if not dominant:
            break
        name, node = dominant[0]
    first = parts(path, top, uses)
    towers = [_find_stages(*item, uses) for item in first if _weight([item], uses) > _TOWER * total]
    several = [tower for tower in towers if len(_as_stages(tower, uses)) > 1]
    return [*chain(*several)] or (first if _as_stages(first, uses) else [(path, top)])


def _weight(parts: Parts, uses: Uses) -> int:
    return sum(len(_used(module, uses)) for _, module in parts)


def _without_number(name: str) -> str:
    """`layer1` -> `layer`, `stages_0` -> `stages`, `Mixed_5b` -> `Mixed`, `repeat` and `repeat_1` -> `repeat`."""
    return re.sub(r"\d+[a-z]?(?![a-z])", "", name.rpartition(".")[2]).rstrip("_")


def _equally_nested(group: Parts, uses: Uses) -> Parts:
    """The group without stems and transitions: layers among blocks of layers, or either among stages of blocks."""
    levels = [_nesting(child, uses) for _, child in group]
    for level in (2, 1):
        nested = [item for item, its in zip(group, levels, strict=True) if its >= level]
        if 2 * _weight(nested, uses) > _weight(group, uses):
            return nested
    return group


def _nesting(module: nn.Module, uses: Uses) -> int:
    """0 for a layer, 1 for a block of layers, 2 for anything above; what holds no parameter does not count."""
    return min(2, max((1 + _nesting(child, uses) for _, child in parts("", module, uses)), default=0))


def _as_stages(candidates: Parts, uses: Uses, least_dim: int = 2) -> Stages:
    """Those candidates that hold a matrix or kernel of their own; norms alone are no stage."""
    holders = Counter(parameter for _, child in candidates for parameter in _used(child, uses))
    owned = {name: {p for p in _used(child, uses) if holders[p] == 1} for name, child in candidates}
    return {name: own for name, own in owned.items() if any(parameter.dim() >= least_dim for parameter in own)}


def _in_order(stages: Stages, traced: Trace) -> Stages:
    """From the input to the output: the more stages follow one after another, the shallower; of equals, the first."""
    run = sorted(stages.items(), key=lambda stage: min(traced.uses[parameter] for parameter in stage[1]))
    at = _positions(dict(run), traced)
    following = [0] * len(run)
    for later in reversed(range(len(run))):
        for earlier in {at[operation] for operation in traced.feeding(run[later][1]) if operation in at}:
            if earlier < later:
                following[earlier] = max(following[earlier], following[later] + 1)
    return dict(run[index] for index in sorted(range(len(run)), key=lambda index: -following[index]))


def _positions(stages: Stages, traced: Trace) -> dict[int, int]:
    """The stage of each operation that consumes one of its own parameters first."""
    return {traced.uses[parameter]: index for index, own in enumerate(stages.values()) for parameter in own}


def collected(
    model: nn.Module,
    labels: list[str],
    owner: Mapping[nn.Parameter, int],
    ran: Mapping[nn.Module, int | None] | None = None,
) -> list[Block]:
    """The blocks, of the largest modules that lie in one, and bare parameters where a module is divided.

    A module without parameters is in one block too, as far as it is no part of several members: one activation object
    that serves every stage stays in each. It is the block during which it `ran` first, `None` above the encoder; where
    it did not run, that of what is registered before it.
    """
    members: list[dict[str, Member]] = [{} for _ in labels]
    seen: set[Member] = set()
    at_run = ran or {}
    # The block of what was registered last. Where the model ran there is always one; patterns may leave gaps.
    current = 0 if at_run else None

    def place(name: str, part: Any) -> None:
        nonlocal current
        own = {part} if isinstance(part, nn.Parameter) else set(part.parameters())
        if part in seen or (own and own <= seen):
            return
        seen.add(part)
        owners = {owner.get(parameter) for parameter in own}
        if len(owners) == 1:
            (index,) = owners
            seen.update(own)
            if index is not None or not at_run:
                current = index
        elif not owners and part in at_run:
            index = at_run[part]
        elif not owners and at_run.keys().isdisjoint(part.modules()):
            index = current
        else:  # divided, or a container that never runs itself, whose parts may lie in different blocks
            for key, inner in chain(part.named_parameters(recurse=False), children(part)):
                place(join(name, key), inner)
            return
        if index is not None:
            members[index][name] = part

    place("", model)
    return [Block(label, own.values(), own) for label, own in zip(labels, members, strict=True)]
