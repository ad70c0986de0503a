"""`OptimizerRebuilder`: brings a live optimizer in step with `requires_grad`, in place."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import LBFGS, Optimizer

from unfreeze_sched import lr_schedulers as rows
from unfreeze_sched._fields import as_count
from unfreeze_sched.blocks import Block, validate_blocks

BLOCK_KEY = "unfreeze_block"
"""The key under which a block's param group carries the block's name; a string, so it survives save and load."""

OnRefreeze = Literal["keep", "drop"]
Membership = Literal["late", "declared"]
Named = tuple[str, nn.Parameter]


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

    Raises:
        TypeError: An argument of the wrong type, or a scheduler of an unknown class.
        ValueError: An argument out of range, a block's parameter that is in the optimizer already, an optimizer that
            takes no further group, or an LR scheduler that was not passed.

    Example:
        >>> import torch
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
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"`optimizer` must be a torch optimizer, got {type(optimizer).__name__}; pass the live one")
        if isinstance(optimizer, LBFGS):
            raise ValueError("`optimizer` must take further param groups, got LBFGS, which holds one; use another")  # noqa: TRY004  # its type is right
        if lr_schedulers is not None and not isinstance(lr_schedulers, (list, tuple)):
            raise TypeError(
                f"`lr_schedulers` must be a sequence or None, got {type(lr_schedulers).__name__}; put it into a list"
            )
        self.optimizer = optimizer
        self.blocks = validate_blocks(blocks)
        self.lr_schedulers = lr_schedulers
        self.on_refreeze = _one_of(on_refreeze, "on_refreeze", ("keep", "drop"))
        self.membership = _one_of(membership, "membership", ("late", "declared"))
        scale = _ratio(learning_rate_scale, "learning_rate_scale")
        decay = _ratio(layer_decay, "layer_decay")
        self._ratios = [scale * decay**depth for depth in reversed(range(len(self.blocks)))]
        self._template = self._checked_template(template)
        self._named = [tuple(block.named_parameters()) for block in self.blocks]
        self.parameters = tuple(tuple(parameter for _, parameter in named) for named in self._named)
        self._refuse_members()
        self._checked_schedulers()
        if self.membership == "declared":
            self._change({index: [] for index in self._from_deep() if not self._groups(index)}, {})

    def sync(self) -> GroupChange:
        """Bring the optimizer in step with every block's `requires_grad`; twice is as good as once.

        Returns:
            What joined, deepest block first, and what left.

        Raises:
            ValueError: The change would go wrong; optimizer, schedulers and model are as they were.
        """
        return self.sync_blocks(self._from_deep())

    def sync_blocks(self, indices: Iterable[int], met: int = 0) -> GroupChange:
        """As `sync`, for some of the blocks.

        Args:
            indices: 0-based indices of the blocks, deepest first.
            met: Number of blocks, from the deep end, that get their group even where they are frozen now, since they
                were trainable before.
        """
        joins: dict[int, list[Named]] = {}
        leaves: dict[int, set[int]] = {}
        for index in indices:
            groups = self._groups(index)
            # By identity: a comparison by value would take a fresh layer for its twin.
            inside = {id(parameter) for group in groups for parameter in group["params"]}
            was_met = index >= len(self.blocks) - met
            takes_frozen = was_met and self.on_refreeze == "keep"
            joining = [
                named
                for named in self._named[index]
                if id(named[1]) not in inside and (named[1].requires_grad or takes_frozen)
            ]
            if joining or (was_met and not groups):
                joins[index] = joining
            if self.on_refreeze == "drop" and inside:
                leaving = {id(parameter) for _, parameter in self._named[index] if not parameter.requires_grad} & inside
                if leaving:
                    leaves[index] = leaving
        return self._change(joins, leaves) if joins or leaves else UNCHANGED

    def _from_deep(self) -> range:
        return range(len(self.blocks) - 1, -1, -1)

    def _groups(self, index: int) -> list[dict[str, Any]]:
        """The live groups of a block, found by their tag, since loading a state dict replaces them."""
        name = self.blocks[index].name
        return [group for group in self.optimizer.param_groups if group.get(BLOCK_KEY) == name]

    def _change(self, joins: dict[int, list[Named]], leaves: dict[int, set[int]]) -> GroupChange:
        """Carry out a diff: everything that can be refused is refused before anything is changed."""
        optimizer, schedulers = self.optimizer, self._checked_schedulers()
        template = optimizer.param_groups[self._template]
        size = len(optimizer.param_groups)
        fills: list[tuple[dict[str, Any], list[Named]]] = []
        adds: list[tuple[dict[str, Any], float, rows.RateMap]] = []
        for index, joining in joins.items():
            self._refuse_unfit(joining)
            empty = [group for group in self._groups(index) if not group["params"]]
            if empty:
                fills.append((empty[0], joining))
            else:
                rate = rows.plan_rate(schedulers, self._template, self._ratios[index])
                adds.append((self._new_group(template, index, joining, rate), self._ratios[index], rate))
        try:
            for group, ratio, rate in adds:
                optimizer.add_param_group(group)
                for scheduler in schedulers:
                    rows.join(scheduler, len(optimizer.param_groups), self._template, ratio, rate)
        except Exception:
            del optimizer.param_groups[size:]
            for scheduler in schedulers:
                rows.leave(scheduler, size)
            raise
        for group, joining in fills:
            group["params"].extend(parameter for _, parameter in joining)
            if "param_names" in group:
                group["param_names"].extend(name for name, _ in joining)
        dropped = [name for index, leaving in leaves.items() for name in self._drop(index, leaving)]
        return GroupChange(tuple(name for joining in joins.values() for name, _ in joining), tuple(dropped))

    def _new_group(
        self, template: dict[str, Any], index: int, joining: list[Named], rate: rows.RateMap
    ) -> dict[str, Any]:
        """A clone of the live template: `add_param_group` alone would fill in the constructor's defaults instead."""
        group = {key: copy.deepcopy(value) for key, value in template.items() if key not in {"params", "param_names"}}
        for key in rows.scaled_keys(self.lr_schedulers or ()):
            if key in group:
                group[key] = group[key] * self._ratios[index]
        group["lr"] = rate(template["lr"])
        group[BLOCK_KEY] = self.blocks[index].name
        if "name" in group:  # loggers tell groups apart by it
            group["name"] = self.blocks[index].name
        if "param_names" in template:
            group["param_names"] = [name for name, _ in joining]
        group["params"] = [parameter for _, parameter in joining]
        return group

    def _drop(self, index: int, leaving: set[int]) -> list[str]:
        """Take parameters out of the block's groups: the lists in place, since others may hold them, and the state."""
        for group in self._groups(index):
            if "param_names" in group:
                pairs = zip(group["param_names"], group["params"], strict=True)
                group["param_names"][:] = [name for name, parameter in pairs if id(parameter) not in leaving]
            group["params"][:] = [parameter for parameter in group["params"] if id(parameter) not in leaving]
        left = [named for named in self._named[index] if id(named[1]) in leaving]
        for _, parameter in left:
            self.optimizer.state.pop(parameter, None)
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
        rows.refuse_unknown(self.lr_schedulers, self.optimizer)
        return self.lr_schedulers

    def _refuse_members(self) -> None:
        """Refuse block parameters in groups that are not their block's: they would be trained twice, or as the head."""
        homes = {
            id(parameter): (name, block.name)
            for block, named in zip(self.blocks, self._named, strict=True)
            for name, parameter in named
        }
        strangers = [
            homes[id(parameter)][0]
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in homes and group.get(BLOCK_KEY) != homes[id(parameter)][1]
        ]
        if strangers:
            more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
            raise ValueError(
                f"`optimizer` must not hold parameters of the blocks yet, got {strangers[0]}{more}; "
                "build it from the other parameters alone, such as the head's"
            )

    def _refuse_unfit(self, joining: list[Named]) -> None:
        """Refuse what torch's optimizers check in their constructor alone, and otherwise in the middle of a step."""
        optimizer_class: Any = type(self.optimizer)
        if not optimizer_class.__module__.startswith("torch.optim"):
            return
        template = self.optimizer.param_groups[self._template]
        hyperparameters = {key: value for key, value in template.items() if key not in {"params", "param_names"}}
        # They check the number of dimensions, so one parameter of each stands for the rest.
        for name, parameter in {parameter.ndim: (name, parameter) for name, parameter in joining}.values():
            stand_in = nn.Parameter(parameter.detach().new_empty(()).expand(parameter.shape))  # holds one number
            try:
                optimizer_class([{**hyperparameters, "params": [stand_in]}])
            except (ValueError, RuntimeError, TypeError) as error:
                raise ValueError(
                    f"`{name}` must fit {optimizer_class.__name__}, got shape {tuple(parameter.shape)}: {error}; "
                    "leave it out of the block"
                ) from error


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
