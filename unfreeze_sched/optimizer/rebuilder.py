"""`OptimizerRebuilder`: brings a live optimizer in step with `requires_grad`, in place.

What a sync does with a parameter of a block; *reached* are the deepest blocks that were unfrozen at some time:

| in its group | trainable | reached | on_refreeze | what happens                                             |
| ------------ | --------- | ------- | ----------- | -------------------------------------------------------- |
| yes          | yes       |         |             | it stays                                                 |
| yes          | no        |         | keep        | it stays: without a gradient no step moves it            |
| yes          | no        |         | drop        | it leaves, with its state                                |
| no           | yes       |         |             | it joins                                                 |
| no           | no        | yes     | keep        | it joins: a jump passed over the epoch at which it would |
| no           | no        | yes     | drop        | it stays outside, and its group is made, empty           |
| no           | no        | no      |             | it stays outside                                         |
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple, get_args

from torch.optim import Optimizer

from unfreeze_sched._checks import as_count, as_ratio, listed, one_of, warn
from unfreeze_sched.model.block import Block, validate_blocks
from unfreeze_sched.optimizer import admission, groups, rates
from unfreeze_sched.optimizer.groups import BLOCK_KEY, SUBSET_KEY, Group
from unfreeze_sched.optimizer.subsets import Overrides, Subset, subsets_of
from unfreeze_sched.optimizer.watch import Accumulation, Claim, FirstStep, Owners, Probe, StepHooks, Warmup

OnRefreeze = Literal["keep", "drop"]
Membership = Literal["late", "declared"]
Scale = float | Mapping[str, float]


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


class _Join(NamedTuple):
    subset: Subset  # what joins of it
    template: int  # 0-based index of the group that it is like
    group: Group  # a new one, or an empty live one that is filled
    rate: rates.RateMap | None  # from the template's learning rate to the new group's; None where one is filled


class OptimizerRebuilder:
    """Diffs `requires_grad` against a live optimizer, and lets parameters join it in place.

    The optimizer, its groups and its state stay the same objects; block i (0-based, shallow to deep) gets a group of
    its own, a clone of the template's with

        lr = template lr * learning_rate_scale * layer_decay ** (len(blocks) - 1 - i)

    and each LR scheduler the group's row, as if the parameters had been in the optimizer from the start, frozen. All
    that can be refused is refused before anything is changed.

    Args:
        optimizer: The live optimizer; it holds the head's parameters, and none of the blocks'.
        blocks: The encoder's blocks, shallow to deep.
        lr_schedulers: All the LR schedulers of the optimizer; None says that there is none.
        learning_rate_scale: In (0, 1], or one for each block, by its name.
        layer_decay: In (0, 1]; 1 gives all blocks the same rate.
        template: 0-based index of the group that joining groups clone.
        on_refreeze: `"keep"` leaves what is frozen again in the optimizer, where no step moves it; `"drop"` takes it
            out, with its state.
        membership: `"late"` adds a block's group when the block joins; `"declared"` adds all now, to be filled later.
        no_decay: True puts a block's norms and biases into a second group with `weight_decay=0`; a function of name and
            parameter returns the keys to override. Such a group is like your own first one that has them, if there is.
        warmup_steps: Optimizer steps over which a joining group's learning rate rises linearly, step i (0-based) at
            `(i + 1) / warmup_steps` of its own; no LR scheduler sees it.
        probe: At the first step after a join, `"local"` warns of what got no gradient; `"ranks"` also raises where
            gradients differ across a process group, as under a DDP that does not cover them; `"off"` does neither.

    Raises:
        TypeError: An argument of the wrong type, or a scheduler of an unknown class.
        ValueError: An argument out of range, or an optimizer, block or LR scheduler that does not let blocks join.

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
        learning_rate_scale: Scale = 0.1,
        layer_decay: float = 1.0,
        template: int = 0,
        on_refreeze: OnRefreeze = "keep",
        membership: Membership = "late",
        no_decay: bool | Overrides = False,
        warmup_steps: int = 0,
        probe: Probe = "ranks",
    ) -> None:
        self.blocks = validate_blocks(blocks)
        admission.refuse_engine(optimizer, self.blocks)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"`optimizer` must be a torch optimizer, got {type(optimizer).__name__}; pass the live one")
        if lr_schedulers is not None and not isinstance(lr_schedulers, (list, tuple)):
            raise TypeError(
                f"`lr_schedulers` must be a sequence or None, got {type(lr_schedulers).__name__}; put it into a list"
            )
        self.optimizer = optimizer
        self.lr_schedulers = lr_schedulers
        self.on_refreeze: OnRefreeze = one_of(on_refreeze, "on_refreeze", get_args(OnRefreeze))
        self.membership: Membership = one_of(membership, "membership", get_args(Membership))
        late = membership == "late"
        self._first_schedulers = lr_schedulers if late else None
        keeps = "1 keeps the template's learning rate"
        self.scales = _scales(learning_rate_scale, [block.name for block in self.blocks], keeps)
        decay = as_ratio(layer_decay, "layer_decay", fix=keeps)
        ratios = [scale * decay**depth for depth, scale in enumerate(reversed(self.scales))][::-1]
        template = as_count(template, "template", minimum=0, fix="0 is the head's group")
        admission.refuse_optimizer(optimizer, template, ratios, late=late, drops=on_refreeze == "drop")
        self._template = optimizer.param_groups[template]["params"]  # the list, which stays when groups are loaded
        keys = optimizer.param_groups[template].keys()
        self.subsets = [subsets_of(i, block, ratios[i], no_decay, keys) for i, block in enumerate(self.blocks)]
        stepping = groups.innermost(optimizer)
        claims = StepHooks.on(stepping).of_kind(Claim)
        admission.refuse_members(optimizer, self.blocks, [block for claim in claims for block in claim.blocks])
        self._admitted: set[Hashable] = set()
        self._warned = False
        for subset in self._subsets():
            with suppress(ValueError):  # what does not fit is refused when it joins, if it ever does
                like = optimizer.param_groups[self._template_of(subset)]
                admission.refuse_unfit(optimizer, like, subset.samples, self._admitted)
        warmup_steps = as_count(warmup_steps, "warmup_steps", minimum=0, fix="it is a number of optimizer steps")
        admission.refuse_warmup(optimizer, warmup_steps, template)
        one_of(probe, "probe", get_args(Probe))
        admission.refuse_schedulers(optimizer, lr_schedulers)
        if not late:
            self._carry_out([self._join(subset.only(()), None) for subset in self._subsets()])
        # Nothing is refused from here on, so that no hook of a refused rebuilder stays behind.
        self.claim = Claim(stepping, self.blocks)
        self.owners = Owners(self.blocks)
        self.accumulation = Accumulation.on(stepping)
        self.first_step = FirstStep(stepping, probe)
        self._warmup = Warmup(stepping, warmup_steps) if warmup_steps else None

    def sync(self) -> GroupChange:
        """Bring the optimizer in step with every block's `requires_grad`; twice is as good as once.

        Returns:
            What joined, deepest block first, and what left.

        Raises:
            ValueError: The change would go wrong; here and below nothing has changed then.
            RuntimeError: A part of a block or the template's group has gone, or an accumulation is not over.
        """
        return self.sync_blocks(range(len(self.blocks))[::-1])

    def sync_blocks(self, indices: Sequence[int], reached: int = 0, flipped: Iterable[int] = ()) -> GroupChange:
        """As `sync`, for the blocks of these 0-based indices, deepest first.

        `reached` is the number of blocks, from the deep end, that were unfrozen at some time; `flipped` are those whose
        `requires_grad` has just changed: the next step is to find gradients for what is trainable of them.
        """
        if not self.owners.are_whole(indices):
            self.owners.refuse_changes(indices)
        joining, leaving = self._diff(indices, reached)
        changed = {*flipped, *(subset.block for subset, _ in joining)}
        if not changed and not leaving:
            return UNCHANGED
        if self.accumulation.is_pending():
            raise RuntimeError(
                "`optimizer` must have used its gradients before blocks join, got an accumulation that is not over; "
                "call optimizer.step() and zero_grad() first, or zero_grad() alone, as for a GAN's discriminator, in "
                "which the generator's loss leaves gradients"
            )
        if any(empty is None for _, empty in joining):
            admission.refuse_schedulers(self.optimizer, self.lr_schedulers)
        joins = [self._join(subset, empty) for subset, empty in joining]
        self._carry_out(joins)
        if self._warmup:
            self._warmup.begin(join.group for join in joins if join.group["params"])
        for left, own in leaving:
            for group in own:
                groups.leave(self.optimizer, group, left.parameters)
        for subset in self._subsets(sorted(changed)):  # in the same order on all ranks
            self.first_step.watch(subset.named)
        added = chain.from_iterable(subset.names for subset, _ in joining)
        return GroupChange(tuple(added), tuple(chain.from_iterable(left.names for left, _ in leaving)))

    def warn_of_lost_ratios(self) -> None:
        """Warn once where a block's rate is not its share of the template's."""
        # Schedulers that were there when the blocks joined keep it; one that took over may have given all one peak.
        if self._warned or (self.lr_schedulers and self.lr_schedulers is self._first_schedulers):
            return
        by_peaks = bool(self.lr_schedulers) or self.membership == "declared"
        for group, template, ratio in self.shares():
            if group["params"] and rates.has_lost(group, template, ratio, by_peaks=by_peaks):
                self._warned = True
                warn(
                    f"`learning_rate_scale` should hold, {ratio:g} of the template's rate, got {group[BLOCK_KEY]} at "
                    f"{float(group['lr']):g} beside {float(template['lr']):g}: a loop or scheduler gives all groups "
                    "one rate; multiply by group['lr_scale'], or give the scheduler a list with one max_lr, base_lr or "
                    "swa_lr for each group"
                )
                return

    def warn_of_floors(self) -> None:
        """Warn once of an LR scheduler under which a join will be refused when training is under way."""
        if self.membership == "declared" or self._warned or not self.lr_schedulers:
            return
        for subset in self._subsets():
            index = self._template_of(subset)
            if found := rates.foreseen(self.lr_schedulers, self.optimizer.param_groups[index], index, subset.ratio):
                self._warned = True
                scheduler, floor = found
                warn(
                    f"`lr_schedulers` should have no floor where blocks join late, got a {type(scheduler).__name__} "
                    f"with one, or a least step, of {floor:g}: once it has played a part, a transition is refused; set "
                    "it to 0, pass learning_rate_scale=1.0, or membership='declared' before the scheduler's first step"
                )
                return

    def shares(self) -> Iterator[tuple[Group, Group, float]]:
        """Each live group of a block, its template's, and the ratio of their learning rates."""
        subsets: dict[groups.Tag, Subset] = {subset.tag: subset for subset in self._subsets()}
        for group in self.optimizer.param_groups:
            if subset := subsets.get(groups.tag(group)):
                yield group, self.optimizer.param_groups[self._template_of(subset)], subset.ratio

    def learning_rates(self) -> dict[str, float]:
        """The learning rate of each block's group now, by the block's name."""
        names = {block.name for block in self.blocks}
        return {
            group[BLOCK_KEY]: float(group["lr"])
            for group in self.optimizer.param_groups
            if group.get(BLOCK_KEY) in names and SUBSET_KEY not in group and group.get("lr") is not None
        }

    def order(self) -> list[groups.Tag]:
        """The tags of all the optimizer's groups, None for the user's own."""
        return [groups.tag(group) for group in self.optimizer.param_groups]

    def restore_order(self, saved: Sequence[groups.Tag]) -> None:
        """Bring groups and rows into a saved run's order, of which `order` told; an optimizer's state goes by place."""
        order = groups.reorder(self.optimizer, saved)
        if order != sorted(order):  # else no row moves, and one that lacks the entry of a later group is left alone
            rates.select(self.lr_schedulers, order)

    def _subsets(self, indices: Iterable[int] | None = None) -> Iterable[Subset]:
        """Those of some blocks, or of all, deepest first."""
        chosen = self.subsets[::-1] if indices is None else [self.subsets[index] for index in indices]
        return chain.from_iterable(chosen)

    def _diff(
        self, indices: Sequence[int], reached: int
    ) -> tuple[list[tuple[Subset, Group | None]], list[tuple[Subset, list[Group]]]]:
        """What joins, each with the empty group that waits for it, and what leaves which groups: the table above."""
        joining: list[tuple[Subset, Group | None]] = []
        leaving: list[tuple[Subset, list[Group]]] = []
        keep = self.on_refreeze == "keep"
        live: dict[Any, list[Group]] = {}  # by their tags, since loading a state dict replaces the groups
        for group in self.optimizer.param_groups:
            live.setdefault((group.get(BLOCK_KEY), group.get(SUBSET_KEY, 0)), []).append(group)
        for subset in self._subsets(indices):
            own = live.get(subset.tag, [])
            # By identity: a comparison by value would take a fresh layer for its twin.
            inside = {id(parameter) for group in own for parameter in group["params"]}
            was_reached = subset.block >= len(self.blocks) - reached
            any_joins, joins = keep and was_reached, subset
            if inside or not any_joins:  # else all of it joins, and nobody has to look
                joins = subset.only(
                    (n, p) for n, p in subset.named if id(p) not in inside and (p.requires_grad or any_joins)
                )
            if joins.named or (was_reached and not own):
                joining.append((joins, next((group for group in own if not group["params"]), None)))
            if inside and not keep:
                left = subset.only((n, p) for n, p in subset.named if not p.requires_grad and id(p) in inside)
                if left.named:
                    leaving.append((left, own))
        return joining, leaving

    def _template_of(self, subset: Subset) -> int:
        """The user's own group that has the overrides already, as a head without decay may; else the template."""
        for index, group in enumerate(self.optimizer.param_groups if subset.overrides else ()):
            if BLOCK_KEY not in group and all(group.get(key) == value for key, value in subset.overrides.items()):
                return index
        for index, group in enumerate(self.optimizer.param_groups):
            if group["params"] is self._template:
                return index
        raise RuntimeError(
            "`template` must be a group of the optimizer, got one that was taken out; make the unfreezer after that"
        )

    def _join(self, subset: Subset, empty: Group | None) -> _Join:
        """How a subset joins: into the empty group that waits for it, else in a group like the live template.

        `add_param_group` alone would fill in the constructor's defaults instead.
        """
        index = self._template_of(subset)
        template, ratio = self.optimizer.param_groups[index], subset.ratio
        admission.refuse_unfit(self.optimizer, template, subset.samples, self._admitted)
        if empty is not None:
            return _Join(subset, index, empty, None)
        rate = rates.joining_rate(self.lr_schedulers, template, index, ratio)
        group = groups.group_like(self.optimizer, template)
        keys = {key for leaf in rates.leaves(self.lr_schedulers) for key in rates.row_of(leaf.__class__).scaled_keys}
        if self.lr_schedulers is None:
            keys = {"lr_scale"}  # by which a loop that sets the rates itself multiplies, as MAE's and BEiT's
        group |= {key: group[key] * ratio for key in keys if key in group}
        if template.get("lr") is not None:
            group["lr"] = rate(template["lr"])
        name, number = subset.tag
        group |= {**copy.deepcopy(subset.overrides), BLOCK_KEY: name, **({SUBSET_KEY: number} if number else {})}
        if "name" in group:  # loggers tell groups apart by it
            group["name"] = f"{name}.{number}" if number else name
        if "param_names" in template:
            group["param_names"] = list(subset.names)
        group["params"] = list(subset.parameters)
        return _Join(subset, index, group, rate)

    def _carry_out(self, joins: Sequence[_Join]) -> None:
        """Let groups join optimizer and schedulers, and parameters join empty groups: all or none."""
        optimizer, restore = self.optimizer, groups.snapshot(self.optimizer)
        try:
            for subset, template, group, rate in joins:
                if rate is None:
                    groups.fill(optimizer, group, template, subset.parameters, subset.names)
                    continue
                groups.add(optimizer, group, template, subset.ratio)
                rates.join(self.lr_schedulers, optimizer.param_groups, template, subset.ratio, rate)
        except BaseException:  # an interrupt would leave the schedulers a row short for good
            restore()
            rates.select(self.lr_schedulers, range(len(optimizer.param_groups)))
            raise


def _scales(scale: Scale, names: Sequence[str], fix: str) -> list[float]:
    """The scale of each block, shallow to deep."""
    if not isinstance(scale, Mapping):
        return [as_ratio(scale, "learning_rate_scale", fix=fix)] * len(names)
    if strange := [*(name for name in scale if name not in names), *(name for name in names if name not in scale)]:
        what = "an unknown block" if strange[0] in scale else "none for"
        raise ValueError(
            f"`learning_rate_scale` must have one number for each block, got {what} {strange[0]!r}; the blocks are "
            f"{listed(names, most=10)}"
        )
    return [as_ratio(scale[name], f"learning_rate_scale[{name!r}]", fix=fix) for name in names]


@contextmanager
def taken_out(optimizer: Any, blocks: Iterable[Block]) -> Iterator[None]:
    """Take the blocks' parameters out of the user's own groups, in place, and back in if what follows is refused."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"`optimizer` must be a torch optimizer, got {type(optimizer).__name__}; pass the live one")
    out = {parameter for block in blocks for parameter in block.parameters()}
    admission.refuse_loss(optimizer, out)
    restore = groups.snapshot(optimizer)
    for group in optimizer.param_groups:
        if BLOCK_KEY not in group:
            groups.leave(optimizer, group, out.intersection(group["params"]))
    try:
        yield
    except BaseException:
        restore()
        raise
