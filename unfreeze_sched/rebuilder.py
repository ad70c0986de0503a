"""`OptimizerRebuilder`: brings a live optimizer in step with `requires_grad`, in place."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, NamedTuple

from torch.optim import Optimizer

from unfreeze_sched import lr_schedulers as rows
from unfreeze_sched import optimizers
from unfreeze_sched._fields import as_count
from unfreeze_sched.accumulation import Accumulation
from unfreeze_sched.blocks import Block, validate_blocks
from unfreeze_sched.ownership import Owners, refuse_members
from unfreeze_sched.parallel import refuse_engine
from unfreeze_sched.parts import Overrides, Part, divide
from unfreeze_sched.probe import FirstStep, Probe
from unfreeze_sched.warmup import Warmup

BLOCK_KEY = "unfreeze_block"
"""The key under which a block's param group carries the block's name; a string, so it survives save and load."""

PART_KEY = "unfreeze_part"
"""The key that tells the further groups of one block apart: 1, 2, ...; the first has none."""

OnRefreeze = Literal["keep", "drop"]
Membership = Literal["late", "declared"]


@dataclass(frozen=True)
class GroupChange:
    """What a sync did to the optimizer; falsy where it did nothing.

    Args:
        added: Names of the parameters that joined, qualified where `encoder_blocks` knows them, else `block/name`.
        dropped: Names of the parameters that left.
    """

    added: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.dropped)


UNCHANGED = GroupChange()


class _Add(NamedTuple):
    group: dict[str, Any]
    template: int  # its index
    ratio: float  # of the group's learning rate to the template's
    rate: rows.RateMap


class OptimizerRebuilder:
    """Diffs `requires_grad` against a live optimizer, and lets parameters join it in place.

    The optimizer object, its groups and its state stay the same objects; a block that became trainable gets a group of
    its own, a clone of the template's with

        lr = template lr * learning_rate_scale * layer_decay ** (len(blocks) - 1 - i)

    for block i (0-based, shallow to deep, so that the deepest has exponent 0), and each LR scheduler gets the group's
    row. The run is then the one in which the parameters had been in the optimizer from the start, frozen.

    Args:
        optimizer: The live optimizer; it holds the head's parameters, and none of the blocks'.
        blocks: The encoder's blocks, shallow to deep.
        lr_schedulers: All the LR schedulers of the optimizer; None says that there is none.
        learning_rate_scale: In (0, 1].
        layer_decay: In (0, 1]; 1 gives all blocks the same rate.
        template: 0-based index of the group that joining groups clone.
        on_refreeze: What becomes of a parameter that is frozen again: `"keep"` leaves it in the optimizer with its
            state, where no step moves it, `"drop"` takes it out and frees the state.
        membership: `"late"` adds a block's group when the block joins, `"declared"` adds all groups now, empty, and
            fills them later.
        no_decay: True puts a block's norm and bias parameters into a second group with `weight_decay=0`; a function of
            name and parameter returns the keys to override, and parameters with equal ones share a group. Such a group
            is like your own first one that has these values already, else like the template.
        warmup_steps: Optimizer steps over which a joining group's learning rate rises linearly, step i (0-based) at
            `(i + 1) / warmup_steps` of its own; no LR scheduler sees it.
        probe: Before the first step after parameters joined, `"ranks"` and `"local"` warn of those that no gradient
            reached, and `"ranks"` also raises where their gradients differ across the ranks of a process group, as
            under a DDP that does not cover them; `"off"` does neither.

    Raises:
        TypeError: An argument of the wrong type, or a scheduler of an unknown class.
        ValueError: An argument out of range, a block's parameter that is in the optimizer already, an optimizer that
            takes no further group, or an LR scheduler that was not passed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> optimizer = torch.optim.AdamW(net[1].parameters(), lr=1.0)
        >>> rebuilder = OptimizerRebuilder(optimizer, [Block("first", (net[0],))], learning_rate_scale=0.1)
        >>> rebuilder.sync()
        GroupChange(added=('first/weight', 'first/bias'), dropped=())
        >>> optimizer.param_groups[1]["lr"], bool(rebuilder.sync())
        (0.1, False)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        blocks: Iterable[Block],
        lr_schedulers: Sequence[Any] | None = (),
        learning_rate_scale: float = 0.1,
        layer_decay: float = 1.0,
        template: int = 0,
        on_refreeze: OnRefreeze = "keep",
        membership: Membership = "late",
        no_decay: bool | Overrides = False,
        warmup_steps: int = 0,
        probe: Probe = "ranks",
    ) -> None:
        self.blocks = validate_blocks(blocks)
        refuse_engine(optimizer, self.blocks)  # whose optimizers need not be torch's
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"`optimizer` must be a torch optimizer, got {type(optimizer).__name__}; pass the live one")
        if lr_schedulers is not None and not isinstance(lr_schedulers, (list, tuple)):
            raise TypeError(
                f"`lr_schedulers` must be a sequence or None, got {type(lr_schedulers).__name__}; put it into a list"
            )
        self.optimizer = optimizer
        self.lr_schedulers = lr_schedulers
        self.on_refreeze = _one_of(on_refreeze, "on_refreeze", ("keep", "drop"))
        self.membership = _one_of(membership, "membership", ("late", "declared"))
        scale = _ratio(learning_rate_scale, "learning_rate_scale")
        decay = _ratio(layer_decay, "layer_decay")
        self._ratios = [scale * decay**depth for depth in reversed(range(len(self.blocks)))]
        self._template = self._checked_template(template)
        optimizers.refuse(
            optimizer, self._template, self._ratios, late=membership == "late", drops=on_refreeze == "drop"
        )
        self.named = tuple(tuple(block.named_parameters()) for block in self.blocks)
        own = optimizer.param_groups[self._template].keys()
        self.parts = [divide(index, block, no_decay, own) for index, block in enumerate(self.blocks)]
        refuse_members(optimizer, self.blocks, BLOCK_KEY)
        self.owners = Owners(self.blocks)
        self._fit: set[Hashable] = set()
        for part in chain.from_iterable(self.parts):
            with suppress(ValueError):  # what does not fit is refused when it joins, if it ever does
                self._refuse_unfit(part, self._template_of(part))
        as_count(warmup_steps, "warmup_steps", minimum=0, fix="it is a number of optimizer steps")
        stepping = optimizers.innermost(optimizer)
        self.first_step = FirstStep(stepping, probe)
        self.accumulation = Accumulation(stepping, self._template)
        self._warmup = Warmup(stepping, warmup_steps) if warmup_steps else None
        if self.membership == "late":
            self._checked_schedulers()
        else:
            self._change([replace(part, named=()) for index in self._from_deep() for part in self.parts[index]], [])

    def sync(self) -> GroupChange:
        """Bring the optimizer in step with every block's `requires_grad`; twice is as good as once.

        Returns:
            What joined, deepest block first, and what left.

        Raises:
            ValueError: The change would go wrong; optimizer, schedulers and model are as they were.
            RuntimeError: The model no longer holds a block's parameter, or an accumulation is not over; likewise.
        """
        return self.sync_blocks(self._from_deep())

    def sync_blocks(self, indices: Sequence[int], met: int = 0) -> GroupChange:
        """As `sync`, for some of the blocks.

        Args:
            indices: 0-based indices of the blocks, deepest first.
            met: Number of blocks, from the deep end, that get their group even where they are frozen now, since they
                were trainable before.
        """
        self.owners.refuse_orphans(indices)
        joins: list[Part] = []  # of each what joins
        leaves: list[tuple[Part, set[int]]] = []
        drop = self.on_refreeze == "drop"
        for part in (part for index in indices for part in self.parts[index]):
            groups = self._groups(part)
            # By identity: a comparison by value would take a fresh layer for its twin.
            inside = {id(parameter) for group in groups for parameter in group["params"]}
            was_met = part.block >= len(self.blocks) - met
            joining = part
            if inside or drop or not was_met:
                named = tuple(
                    (name, parameter)
                    for name, parameter in part.named
                    if id(parameter) not in inside and (parameter.requires_grad or (was_met and not drop))
                )
                joining = part if len(named) == len(part.named) else replace(part, named=named)
            if joining.named or (was_met and not groups):
                joins.append(joining)
            if drop and inside:
                leaving = {id(parameter) for _, parameter in part.named if not parameter.requires_grad} & inside
                if leaving:
                    leaves.append((part, leaving))
        return self._change(joins, leaves) if joins or leaves else UNCHANGED

    def learning_rates(self) -> dict[str, float]:
        """The learning rate of each block's group now, by the block's name."""
        names = {block.name for block in self.blocks}
        return {
            group[BLOCK_KEY]: float(group["lr"])
            for group in self.optimizer.param_groups
            if group.get(BLOCK_KEY) in names and PART_KEY not in group and group.get("lr") is not None
        }

    def _from_deep(self) -> range:
        return range(len(self.blocks) - 1, -1, -1)

    def _groups(self, part: Part) -> list[dict[str, Any]]:
        """The live groups of a part, found by their tags, since loading a state dict replaces them."""
        name = self.blocks[part.block].name
        return [
            group
            for group in self.optimizer.param_groups
            if group.get(BLOCK_KEY) == name and group.get(PART_KEY, 0) == part.number
        ]

    def _change(self, joins: list[Part], leaves: list[tuple[Part, set[int]]]) -> GroupChange:
        """Carry out a diff: everything that can be refused is refused before anything is changed."""
        self.accumulation.refuse_pending()
        fills: list[tuple[dict[str, Any], int, Part]] = []
        adds: list[_Add] = []
        for joining in joins:
            template = self._template_of(joining)
            self._refuse_unfit(joining, template)
            empty = [group for group in self._groups(joining) if not group["params"]]
            if empty:
                fills.append((empty[0], template, joining))
            else:
                adds.append(self._plan(joining))
        self._carry_out(adds, fills)
        if self._warmup:
            for group in [*(add[0] for add in adds), *(fill[0] for fill in fills)]:
                if group["params"]:
                    self._warmup.begin(group)
        for joining in joins:
            self.first_step.watch(joining.named)
        dropped = [name for part, leaving in leaves for name in self._drop(part, leaving)]
        added = joins[0].names if len(joins) == 1 else tuple(chain.from_iterable(part.names for part in joins))
        return GroupChange(added, tuple(dropped))

    def _refuse_unfit(self, part: Part, template: int) -> None:
        optimizers.refuse_unfit(self.optimizer, self.optimizer.param_groups[template], part.specimens, self._fit)

    def _carry_out(self, adds: list[_Add], fills: list[tuple[dict[str, Any], int, Part]]) -> None:
        """Let groups join optimizer and schedulers, and parameters join empty groups: all or none."""
        size, schedulers = len(self.optimizer.param_groups), self.lr_schedulers or ()
        try:
            for group, template, ratio, rate in adds:
                optimizers.add(self.optimizer, group, template, ratio)
                for scheduler in schedulers:
                    rows.join(scheduler, len(self.optimizer.param_groups), template, ratio, rate)
            for group, template, joining in fills:
                optimizers.fill(self.optimizer, group, template, joining.parameters, joining.names)
        except Exception:
            for group, _, _ in fills:
                group["params"].clear()
                group.get("param_names", []).clear()
            optimizers.leave(self.optimizer, size)
            for scheduler in schedulers:
                rows.leave(scheduler, size)
            raise

    def _plan(self, part: Part) -> _Add:
        """A clone of the live template: `add_param_group` alone would fill in the constructor's defaults instead."""
        schedulers, ratio = self._checked_schedulers(), self._ratios[part.block]
        index = self._template_of(part)
        template = self.optimizer.param_groups[index]
        rate = rows.plan_rate(schedulers, template, index, ratio)
        group = optimizers.group_like(self.optimizer, template)
        for key in rows.scaled_keys(schedulers):
            if key in group:
                group[key] = group[key] * ratio
        if template.get("lr") is not None:
            group["lr"] = rate(template["lr"])
        group |= copy.deepcopy(part.overrides)
        group[BLOCK_KEY] = self.blocks[part.block].name
        if part.number:
            group[PART_KEY] = part.number
        if "name" in group:  # loggers tell groups apart by it
            group["name"] = self.blocks[part.block].name + (f".{part.number}" if part.number else "")
        if "param_names" in template:
            group["param_names"] = list(part.names)
        group["params"] = list(part.parameters)
        return _Add(group, index, ratio, rate)

    def _template_of(self, part: Part) -> int:
        """The user's own group that has the overrides already, as a head without decay may; else the template."""
        if part.overrides:
            for index, group in enumerate(self.optimizer.param_groups):
                if BLOCK_KEY not in group and all(group.get(key) == value for key, value in part.overrides.items()):
                    return index
        return self._template

    def _drop(self, part: Part, leaving: set[int]) -> list[str]:
        """Take parameters out of a part's groups: the lists in place, since others may hold them, and the state."""
        for group in self._groups(part):
            if "param_names" in group:
                pairs = zip(group["param_names"], group["params"], strict=True)
                group["param_names"][:] = [name for name, parameter in pairs if id(parameter) not in leaving]
            group["params"][:] = [parameter for parameter in group["params"] if id(parameter) not in leaving]
        left = [named for named in part.named if id(named[1]) in leaving]
        for layer in optimizers.layers(self.optimizer):  # a wrapper's state need not be that of what it wraps
            for _, parameter in left:
                layer.state.pop(parameter, None)
        return [name for name, _ in left]

    def _checked_template(self, template: int) -> int:
        index = as_count(template, "template", minimum=0, fix="0 is the head's group")
        groups = self.optimizer.param_groups
        if index >= len(groups) or BLOCK_KEY in groups[index]:
            own = sum(BLOCK_KEY not in group for group in groups)
            raise ValueError(
                f"`template` must be below {own}, the number of your own groups, got {index}; 0 is the head's"
            )
        return index

    def _checked_schedulers(self) -> Sequence[Any]:
        if self.lr_schedulers is None:
            return ()
        if not self.lr_schedulers and rows.is_driven(self.optimizer):
            raise ValueError(
                "`lr_schedulers` must hold the LR scheduler that drives this optimizer, got none; "
                "pass lr_schedulers=[scheduler], or None if it is no longer in use"
            )
        rows.refuse_unknown(self.lr_schedulers, list(optimizers.layers(self.optimizer)))
        return self.lr_schedulers


def _one_of(value: Any, name: str, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}; {allowed[0]!r} is the default")
    return value


def _ratio(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number in (0, 1], got {value!r}; 1 keeps the template's learning rate")
    if not 0 < value <= 1:
        raise ValueError(f"`{name}` must be a number in (0, 1], got {value!r}; 1 keeps the template's learning rate")
    return float(value)
