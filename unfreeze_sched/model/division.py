"""An encoder divided into blocks by its structure, never by a model's name.

One forward pass on a copy without data (`tracing`) tells which parameters receive a gradient and what feeds what. The
stages are the repeated children (`layer1`, `layer2`, ...) of the node that holds most of the encoder, or of each of
several towers, in the order of how many stages follow. Every other parameter that is no head's goes to the last
stage that feeds the operation that consumes it; what no stage feeds, the stem, goes to the first stage that it feeds.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from unfreeze_sched.model.admission import is_peft
from unfreeze_sched.model.block import Block
from unfreeze_sched.model.head import Encoder, known_encoder, layers, refuse_inner_head
from unfreeze_sched.model.tracing import Trace, TraceError, children, join, trace

log = logging.getLogger("unfreeze_sched")

# A node is passed over for its child where that child holds more than this share of the encoder's parameter tensors.
# Tensors are counted, not elements: elements follow width, and a small model's embedding table or last stage would
# outweigh all else.
_DOMINANT = 2 / 3
_REPEATED = 1 / 2  # the share that a group of alike children must hold to be the encoder's stages
_TOWER = 1 / 4  # and that of a child which, among others, is divided into stages of its own

_held_fixed = WeakIdKeyDictionary()
"""Parameters that were not trainable when their block was made, while the rest of it was: they look like the rest
once the schedule has frozen all of it."""


class _Stage(NamedTuple):
    name: str  # qualified in the model
    own: set[nn.Parameter]  # those that no other stage shares


def divided(model: nn.Module, head: frozenset[nn.Parameter] | None, example_input: Any) -> tuple[Block, ...]:
    """The blocks of a model's encoder, shallow to deep.

    Args:
        model: The model, unwrapped.
        head: What is in no block; `None` where the model's conventions say it.
        example_input: As for `encoder_blocks`, and so are the errors.
    """
    encoder = known_encoder(model) if head is None else Encoder("", model, head)
    traced = _trace(model, head, example_input)
    if head is None:
        refuse_inner_head(model, traced)
    outside = encoder.head_of(model, traced)
    uses = {parameter: use for parameter, use in traced.uses.items() if parameter not in outside}
    if not uses or (head and not any(layers(model, uses))):  # a token alone is no encoder
        what, fix = (
            ("model", "name the blocks with patterns=") if head is None else ("head", "leave the encoder out of it")
        )
        raise ValueError(
            f"`{what}` must leave an encoder below the head, got {type(model).__name__} without one; {fix}"
        )
    found = _find_stages(encoder.name, encoder.top, uses)
    stages = _in_order(_as_stages(found, uses) or _as_stages(found, uses, least_dim=0), uses, traced)
    places = _Places(stages, uses, traced, {traced.uses[p] for p in outside})
    owner = {parameter: places.of(use) for parameter, use in uses.items()}
    owner |= {parameter: index for index, stage in enumerate(stages) for parameter in stage.own}
    owner = without_fixed(model, owner)
    at_run = {module: places.of_run(run) for module, run in traced.runs.items()}
    members = Members(owner, at_run, set(encoder.scope(traced).modules()))
    members.visit("", model)
    return tuple(members.block(index, _label(stage.name, encoder)) for index, stage in enumerate(stages))


def _label(name: str, encoder: Encoder) -> str:
    """The name relative to the encoder, except where only a number would be left of it."""
    relative = name.removeprefix(encoder.name).removeprefix(".") or type(encoder.top).__name__
    return name if relative.split(".")[0].isdigit() and name else relative


def _trace(model: nn.Module, head: frozenset[nn.Parameter] | None, example_input: Any) -> Trace:
    try:
        return trace(model, example_input)
    except TraceError:
        # A detector computes its boxes from data; what it reads of its backbone is all of the backbone's outputs.
        backbone = dict(children(model)).get("backbone")
        detector = type(model).__module__.startswith("torchvision.models.detection")
        if backbone is None or not detector or example_input is not None:
            raise  # elsewhere something may run before the backbone
        if head is not None and not head >= set(model.parameters()) - set(backbone.parameters()):
            raise
        return trace(backbone)


def without_fixed(model: nn.Module, owner: Mapping[nn.Parameter, int]) -> dict[nn.Parameter, int]:
    """Leave out what is held fixed: not trainable, in a block of which other parameters are.

    A block that is frozen as a whole is the schedule's, except for what was held fixed before.
    """
    if any(is_peft(module) for module in model.modules()):
        return dict(owner)  # what PEFT froze is refused where a block would hold it
    trainable = {index for parameter, index in owner.items() if parameter.requires_grad}
    fixed = {p for p, index in owner.items() if not p.requires_grad and (index in trainable or p in _held_fixed)}
    left = {p: index for p, index in owner.items() if p not in fixed}
    if set(left.values()) != set(owner.values()):
        return dict(owner)
    if fixed:
        _held_fixed.update(dict.fromkeys(fixed, True))
        names = [name for name, parameter in model.named_parameters() if parameter in fixed]
        log.info("held fixed, and so in no block: %s", ", ".join(names))
    return left


class _Places:
    """Which stage an operation outside of all stages belongs to."""

    def __init__(
        self, stages: list[_Stage], uses: Mapping[nn.Parameter, int], traced: Trace, head: Collection[int]
    ) -> None:
        self._last = len(stages) - 1
        at = _positions(stages, uses)
        count = len(traced.inputs)
        self._before = [-1] * count  # the last stage that feeds it
        self._after = [at.get(i, len(stages)) for i in range(count)]  # the first stage that it is part of, or feeds
        self._behind = [False] * count  # whether the head feeds it
        for i, sources in enumerate(traced.inputs):
            self._before[i] = max((max(self._before[s], at.get(s, -1)) for s in sources), default=-1)
            self._behind[i] = any(self._behind[s] or s in head for s in sources)
        for i in reversed(range(count)):
            for source in traced.inputs[i]:
                self._after[source] = min(self._after[source], self._after[i])
        self._headed = bool(head)

    def of(self, operation: int) -> int:
        before, after = self._before[operation], self._after[operation]
        return before if before >= 0 else min(after, self._last)

    def of_run(self, operation: int) -> int | None:
        """The same for a module that runs there, which may run on the head's results."""
        if operation == len(self._before):
            return None if self._headed else self._last
        return None if self._behind[operation] else self.of(operation)


def _used(module: nn.Module, uses: Collection[nn.Parameter]) -> set[nn.Parameter]:
    return {parameter for parameter in module.parameters() if parameter in uses}


def _used_children(module: nn.Module, uses: Collection[nn.Parameter]) -> list[tuple[str, nn.Module]]:
    return [(key, child) for key, child in children(module) if _used(child, uses)]


def _find_stages(path: str, top: nn.Module, uses: Mapping[nn.Parameter, int]) -> list[tuple[str, nn.Module]]:
    """The stages: alike children, or those of each tower, or failing that all children that hold a matrix."""
    total = len(_used(top, uses))
    name, node = path, top
    while True:
        inside = [(join(name, key), child) for key, child in _used_children(node, uses)]
        groups: dict[str, list[tuple[str, nn.Module]]] = defaultdict(list)
        for item in inside:
            groups[_without_number(item[0])].append(item)
        for group in groups.values():
            stages = _equally_nested(group, uses)
            if len(_as_stages(stages, uses)) > 1 and sum(len(_used(c, uses)) for _, c in group) > _REPEATED * total:
                return stages
        dominant = [item for item in inside if len(_used(item[1], uses)) > _DOMINANT * total]
        if not dominant:
            break
        name, node = dominant[0]
    parts = [(join(path, key), child) for key, child in _used_children(top, uses)]
    heavy = [item for item in parts if len(_used(item[1], uses)) > _TOWER * total]
    towers = [tower for item in heavy if len(_as_stages(tower := _find_stages(*item, uses), uses)) > 1]
    if towers:
        return [item for tower in towers for item in tower]
    return parts if _as_stages(parts, uses) else [(path, top)]


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
    candidates: list[tuple[str, nn.Module]], uses: Collection[nn.Parameter], least_dim: int = 2
) -> list[_Stage]:
    """Those candidates that hold a matrix or kernel of their own; norms alone are no stage."""
    holders = Counter(parameter for _, child in candidates for parameter in _used(child, uses))
    owned = [(name, {p for p in _used(child, uses) if holders[p] == 1}) for name, child in candidates]
    return [_Stage(name, own) for name, own in owned if any(parameter.dim() >= least_dim for parameter in own)]


def _in_order(stages: list[_Stage], uses: Mapping[nn.Parameter, int], traced: Trace) -> list[_Stage]:
    """From the input to the output: the more stages follow one after another, the shallower; of equals, the first."""
    stages = sorted(stages, key=lambda stage: min(uses[parameter] for parameter in stage.own))
    at = _positions(stages, uses)
    feeders = [0] * len(traced.inputs)  # a bit for each stage
    fed_by = [0] * len(stages)
    for operation, sources in enumerate(traced.inputs):
        for source in sources:
            feeders[operation] |= feeders[source] | (1 << at[source] if source in at else 0)
        if operation in at:
            fed_by[at[operation]] |= feeders[operation]
    following = [0] * len(stages)
    for later in reversed(range(len(stages))):
        for earlier in range(later):
            if fed_by[later] >> earlier & 1:
                following[earlier] = max(following[earlier], following[later] + 1)
    return [stages[index] for index in sorted(range(len(stages)), key=lambda index: -following[index])]


def _positions(stages: list[_Stage], uses: Mapping[nn.Parameter, int]) -> dict[int, int]:
    """The stage of each operation that consumes one of its own parameters first."""
    return {uses[parameter]: index for index, stage in enumerate(stages) for parameter in stage.own}


class Members:
    """Collects the largest modules that lie in one block, and bare parameters where a module is divided.

    A module without parameters is in one block too, as far as it is no part of several members: one activation object
    that serves every stage stays in each.

    Args:
        owner: The index of the block of each parameter that has one.
        at_run: The index of the block during which each module first ran, `None` for the head. It places the modules
            without parameters; those that did not run go with what is registered before them. `None` where nothing
            was run.
        scope: The modules without parameters that are placed at all; `None` for all.
    """

    def __init__(
        self,
        owner: Mapping[nn.Parameter, int],
        at_run: Mapping[nn.Module, int | None] | None = None,
        scope: Collection[nn.Module] | None = None,
    ) -> None:
        self.of_block: dict[int, list[tuple[str, nn.Module | nn.Parameter]]] = defaultdict(list)
        self._owner = owner
        self._seen: set[nn.Module | nn.Parameter] = set()
        self._at_run = at_run
        self._scope = scope
        # The block of what was registered last. Where the model ran there is always one; patterns may leave gaps.
        self._current: int | None = None if at_run is None else 0

    def visit(self, name: str, module: nn.Module) -> None:
        """Place a module of this qualified name, and what is in it."""
        own = set(module.parameters())
        placed = own <= self._seen if own else self._scope is not None and module not in self._scope
        if placed or module in self._seen:
            return
        self._seen.add(module)
        owners = {self._owner.get(parameter) for parameter in own}
        ran = self._at_run or {}
        if not owners and module in ran:
            self._add(ran[module], name, module)
        elif not owners and ran.keys().isdisjoint(module.modules()):
            self._add(self._current, name, module)
        elif len(owners) == 1:
            (index,) = owners
            self._note(index)
            self._add(index, name, module)
            self._seen.update(own)
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
