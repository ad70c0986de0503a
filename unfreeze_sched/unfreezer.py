"""`ProgressiveUnfreezer`: schedule, blocks and optimizer, in one line an epoch."""

from __future__ import annotations

import inspect
import logging
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Self, TypedDict, Unpack, get_args

from pydantic import BaseModel, Field
from torch import nn
from torch.optim import Optimizer

from unfreeze_sched._checks import as_state, differences, listed, one_of, short, warn
from unfreeze_sched.guards import Cap, checked_caps
from unfreeze_sched.history import History, Transition
from unfreeze_sched.model import Block, encoder_blocks, freezing
from unfreeze_sched.model.block import parts_of, validate_blocks
from unfreeze_sched.model.freezing import Norms
from unfreeze_sched.model.tracing import unwrap
from unfreeze_sched.optimizer import GroupChange, OptimizerRebuilder
from unfreeze_sched.optimizer.groups import innermost, why_no_rate
from unfreeze_sched.optimizer.rebuilder import UNCHANGED, Membership, OnRefreeze, Scale, taken_out
from unfreeze_sched.optimizer.subsets import Overrides
from unfreeze_sched.optimizer.watch import Probe, Unapplied
from unfreeze_sched.schedule import MEDIUM, Preset, UnfreezeSchedule

log = logging.getLogger("unfreeze_sched")

_ONE_AT_A_TIME = threading.RLock()  # of the module, since a lock goes into no copy and no pickle


class Options(TypedDict, total=False):
    """The keywords of `ProgressiveUnfreezer` that whatever makes one passes on."""

    learning_rate_scale: Scale | None
    layer_decay: float
    template: int
    on_refreeze: OnRefreeze
    membership: Membership
    no_decay: bool | Overrides
    warmup_steps: int
    norms: Norms
    probe: Probe
    caps: Sequence[Cap]


class ProgressiveUnfreezer:
    """Unfreezes an encoder's blocks by a schedule, and lets them join the live optimizer.

    `apply(epoch)` is three idempotent steps: the schedule's number of blocks; their `requires_grad` and norm modes; the
    optimizer's groups and the LR schedulers' rows. It needs no earlier call.

    Args:
        blocks: The encoder's blocks, shallow to deep. One that is frozen when this is made is the schedule's
            too, and the log says so at the first `apply`; what is to stay frozen is left out.
        optimizer: The live optimizer; it holds the head's parameters, and none of the blocks'.
        schedule: Its `total_blocks` is the number of blocks.
        lr_schedulers: All the LR schedulers of the optimizer; None says that there is none.
        learning_rate_scale: In (0, 1], or one for each block, by its name; None takes the preset's.
        layer_decay: As for `OptimizerRebuilder`, like `template`, `on_refreeze`, `membership`, `no_decay`,
            `warmup_steps` and `probe`.
        norms: `"eval"` holds the norm layers of frozen blocks in evaluation mode, through `model.train()` too;
            `"frozen"` also those of blocks that joined, so that the pretrained statistics stay, which suits small
            batches; `"fixed"` also keeps the weights and biases of batch norms (and of what else has running
            statistics) out of training and optimizer; `"train"` leaves the modes alone.
        caps: Guards and triggers, such as `unfreeze_sched.guards.OverfitGuard`, which the schedule stays below.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of range, or a schedule for another number of blocks.

    Example:
        >>> import torch
        >>> from unfreeze_sched import RatePreset
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> optimizer = torch.optim.AdamW(net[2].parameters(), lr=1e-3)
        >>> blocks = [Block("first", net[0]), Block("second", net[1])]
        >>> preset = RatePreset(unfreeze_start_epoch=1, unfreeze_rate=1)
        >>> schedule = UnfreezeSchedule(preset=preset, total_blocks=2, total_epochs=3)
        >>> unfreezer = ProgressiveUnfreezer(blocks, optimizer, schedule)
        >>> [unfreezer.apply(epoch).added for epoch in range(3)]
        [(), ('second/weight', 'second/bias'), ('first/weight', 'first/bias')]
    """

    def __init__(
        self,
        blocks: Iterable[Block],
        optimizer: Optimizer,
        schedule: UnfreezeSchedule,
        lr_schedulers: Sequence[Any] | None = (),
        learning_rate_scale: Scale | None = None,
        layer_decay: float = 1.0,
        template: int = 0,
        on_refreeze: OnRefreeze = "keep",
        membership: Membership = "late",
        no_decay: bool | Overrides = False,
        warmup_steps: int = 0,
        norms: Norms = "eval",
        probe: Probe = "ranks",
        caps: Sequence[Cap] = (),
    ) -> None:
        if not isinstance(schedule, UnfreezeSchedule):
            raise TypeError(f"`schedule` must be an UnfreezeSchedule, got {type(schedule).__name__}; make one")
        self.schedule = schedule
        self.norms: Norms = one_of(norms, "norms", get_args(Norms))
        self.caps = checked_caps(caps)
        self.history = History()
        blocks = validate_blocks(blocks)
        if len(blocks) != schedule.total_blocks:
            raise ValueError(
                f"`schedule` must be for the {len(blocks)} blocks given, got total_blocks={schedule.total_blocks}; "
                "pass total_blocks=len(blocks)"
            )
        if norms == "fixed":
            blocks = freezing.with_fixed_norms(blocks)
        scale = schedule.preset.learning_rate_scale if learning_rate_scale is None else learning_rate_scale
        more = (layer_decay, template, on_refreeze, membership, no_decay, warmup_steps, probe)
        self.rebuilder = OptimizerRebuilder(optimizer, blocks, lr_schedulers, scale, *more)
        self.blocks = self.rebuilder.blocks
        if 1 in self.rebuilder.scales and why_no_rate(optimizer, optimizer.param_groups[template]) is None:
            warn(
                "`learning_rate_scale` should be below 1, got 1: at the head's learning rate the encoder's pretrained "
                "features are overwritten before the head can use them; pass 0.1"
            )
        self._found_frozen = [block.name for block in self.blocks if block.is_frozen()]
        self._applied: tuple[int, int] | None = None  # the numbers of blocks unfrozen, and reached
        self._seen_groups: list[dict[str, Any]] | None = None
        self._seen_length = 0
        self._has_changed = False
        self._unapplied: Unapplied | None = Unapplied(innermost(optimizer))

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        optimizer: Optimizer,
        total_epochs: int,
        lr_schedulers: Sequence[Any] | None = (),
        preset: Preset = MEDIUM,
        head: Iterable[nn.Module | nn.Parameter] | Optimizer | None = None,
        blocks: Iterable[Block] | None = None,
        **options: Unpack[Options],
    ) -> Self:
        """An unfreezer for a loop that has its model, optimizer and LR schedulers already.

        The optimizer may hold the whole model: the blocks' parameters are taken out, in place, and each block joins
        again in its turn. Call it before training, and before DDP wraps the model; it warns of what is trainable and in
        neither a block nor the optimizer.

        Args:
            model: The bare model, not wrapped.
            optimizer: The live optimizer, of all parameters or of the head's.
            total_epochs: Number of epochs of the run, at least 1.
            lr_schedulers: As for the constructor.
            preset: When blocks are unfrozen.
            head: What trains from the start, as for `encoder_blocks`.
            blocks: The blocks, shallow to deep; None takes `encoder_blocks(model, head=head)`.
            **options: Further ones of the constructor, from `learning_rate_scale` on.

        Raises:
            TypeError: An argument of the wrong type.
            ValueError: An argument out of range, blocks that are no parts of the model, or a group of blocks alone at
                a rate of its own.

        Example:
            >>> import torch
            >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
            >>> optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
            >>> unfreezer = ProgressiveUnfreezer.from_model(net, optimizer, 50, blocks=[Block("first", net[0])])
            >>> unfreezer.apply(10).added
            ('first/weight', 'first/bias')
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be an nn.Module, got {type(model).__name__}; pass the bare model")
        if blocks is not None and head is not None:
            raise ValueError("`head` must be left out where blocks are given, got both; what is in no block is head")
        blocks = encoder_blocks(model, head=head) if blocks is None else parts_of(unwrap(model), blocks)
        schedule = UnfreezeSchedule(preset=preset, total_blocks=len(blocks), total_epochs=total_epochs)
        with taken_out(optimizer, blocks):
            unfreezer = cls(blocks, optimizer, schedule, lr_schedulers, **options)
        held = {id(parameter) for block in blocks for parameter in block.parameters()}
        held.update(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
        if left := [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]:
            warn(
                f"`optimizer` should hold what trains outside of the blocks, got {listed(left, most=3)} in neither: a "
                "clip of gradients counts theirs, and no step uses them; freeze them, or give them to the optimizer"
            )
        return unfreezer

    def apply(self, epoch: int) -> GroupChange:
        """Bring model, optimizer and LR schedulers to the state of an epoch; call it before the epoch is trained.

        Args:
            epoch: 0-based; any from 0 on, in any order.

        Returns:
            What joined the optimizer, and what left.

        Raises:
            TypeError: `epoch` is no integer.
            ValueError: `epoch` is negative, or the change is refused; here and below nothing has changed then.
            RuntimeError: A part of a block or the template's group has gone, or an accumulation is not over.
        """
        with _ONE_AT_A_TIME:
            number, reached = scheduled, _ = self.schedule.progress_at(epoch)
            if self.caps:
                # What the caps held back in the past, the schedule cannot tell.
                number = min(scheduled, *(cap.cap for cap in self.caps if cap.cap is not None), len(self.blocks))
                reached = max(number, self._applied[1] if self._applied else 0)
            is_as_left = (number, reached) == self._applied and self._is_as_left()
            if is_as_left and not self._has_changed and not self.caps:
                return UNCHANGED
            if self._has_changed:  # the loop has trained with that since
                self._has_changed = False
                self.rebuilder.warn_of_lost_ratios()
            is_first = self._applied is None
            change = UNCHANGED if is_as_left else self._bring_to(number, reached)
            if is_first and reached < len(self.blocks):
                self.rebuilder.warn_of_floors()
            for cap in self.caps:
                cap.follow(number, len(self.blocks))
            self._record(int(epoch), number, scheduled)
            return change

    def _is_as_left(self) -> bool:
        """Whether the groups are those that the last call left, none added or loaded, and so are the parameters."""
        groups = self.rebuilder.optimizer.param_groups
        is_same = groups is self._seen_groups and len(groups) == self._seen_length
        return is_same and self.rebuilder.owners.are_in_place()

    def _bring_to(self, number: int, reached: int) -> GroupChange:
        """Unfreeze the deepest `number` blocks and freeze the others; the deepest `reached` blocks get a group."""
        total = len(self.blocks)
        shallowest = total - number  # index of the first block that is to train
        depths = range(total)  # counted from the head, of what may have to change: all, where others were at work
        if self._applied is not None and self._is_as_left():
            before, reached_before = self._applied
            depths = range(min(number, before), max(number, before, reached if reached > reached_before else 0))
        visited = range(total - 1 - depths.start, total - 1 - depths.stop, -1)
        flipped: dict[int, list[nn.Parameter]] = {index: [] for index in visited}
        with_gradient: list[nn.Parameter] = []
        try:
            for index, own in flipped.items():
                for subset in self.rebuilder.subsets[index]:
                    trains = index >= shallowest
                    with_gradient += freezing.set_requires_grad(subset.parameters, requires_grad=trains, flipped=own)
            change = self.rebuilder.sync_blocks(visited, reached, [index for index in visited if flipped[index]])
        except BaseException:
            for index, own in flipped.items():
                for parameter in own:
                    parameter.requires_grad = index < shallowest
            raise
        for index in visited:
            block = self.blocks[index]
            if self.norms in {"frozen", "fixed"} or (self.norms == "eval" and index < shallowest):
                freezing.hold_in_eval(freezing.norms_of(block))
            else:
                freezing.release(list(block.modules()))
            if self.norms == "fixed":
                with_gradient += freezing.set_requires_grad(block.fixed, requires_grad=False, flipped=[])
        freezing.drop_gradients(with_gradient)
        groups = self.rebuilder.optimizer.param_groups
        self._applied, self._seen_groups, self._seen_length = (number, reached), groups, len(groups)
        self._has_changed, self._unapplied = True, None
        return change

    def _record(self, epoch: int, number: int, scheduled: int) -> None:
        """Note a change of the number, and the moment at which a cap begins to hold blocks back."""
        if self._found_frozen:
            log.info("found frozen as a whole, and the schedule's to unfreeze: %s", ", ".join(self._found_frozen))
            self._found_frozen = []
        last = self.history.last
        binding = next((cap for cap in self.caps if cap.cap == number < scheduled), None)
        reason = "schedule" if binding is None else type(binding).__name__
        if last is not None and last.number == number and (binding is None or last.reason.startswith(reason)):
            return
        if binding is not None:
            rises = number > (last.number if last else 0)
            reason += ": " + ("the next block may join" if rises else binding.reason)
        rates = self.rebuilder.learning_rates()
        unfrozen = {block.name: rates.get(block.name, math.nan) for block in self.blocks[::-1][:number]}
        if not all(map(math.isfinite, unfrozen.values())):
            unfrozen = {}  # an optimizer without learning rates, or one gone astray, is no reason to stop here
        self.history.add(Transition(epoch, number, len(self.blocks), unfrozen, reason))
        log.info("epoch %d: %d of %d blocks are trainable (%s)", epoch, number, len(self.blocks), reason)

    def state_dict(self) -> dict[str, Any]:
        """What replays the groups in a new process: small, of JSON's types alone but for weights that a guard keeps."""
        return {
            "schedule": self.schedule.model_dump(mode="json"),
            "blocks": self._layout(),
            "applied": None if self._applied is None else list(self._applied),
            "groups": [known and list(known) for known in self.rebuilder.order()],
            "history": self.history.state_dict(),
            "caps": [cap.state_dict() for cap in self.caps],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Replay the groups of a saved run; load the LR schedulers and the optimizer after it.

        Args:
            state_dict: What `state_dict` gave, possibly by way of JSON.
            strict: False lets another schedule, such as a longer one, go on from here; the blocks have to be the same.

        Raises:
            TypeError: `state_dict` is no mapping.
            ValueError: It belongs to another schedule, model or division into blocks; nothing has changed.
        """
        with _ONE_AT_A_TIME:
            saved = as_state(_Saved, state_dict, "ProgressiveUnfreezer")
            self._refuse_other_run(saved, strict)
            before = self.history.state_dict(), [cap.state_dict() for cap in self.caps]
            try:
                self.history.load_state_dict(saved.history)  # type: ignore[arg-type]  # transitions are as good
                for cap, own in zip(self.caps, saved.caps, strict=True):
                    cap.load_state_dict(own)
                    if saved.applied:
                        cap.follow(saved.applied[0], len(self.blocks))  # as when it was saved; refuses other blocks
                if saved.applied:
                    self._bring_to(*saved.applied)
                    self.rebuilder.restore_order(saved.groups)
            except BaseException:
                self.history.load_state_dict(before[0])
                for cap, own in zip(self.caps, before[1], strict=True):
                    cap.load_state_dict(own)
                raise

    def _refuse_other_run(self, saved: _Saved, strict: bool) -> None:
        found = list(differences("blocks", saved.blocks, self._layout()))
        if strict:
            found += differences("schedule", saved.schedule, self.schedule.model_dump(mode="json"))
        if found:
            raise ValueError(
                "`state_dict` must be of this schedule and these blocks, got "
                f"{listed(found, most=5, separator='; ')}; rebuild what was saved"
            )
        names = [block.name for block in self.blocks[::-1]]
        number, reached = saved.applied or (0, 0)
        strange = [] if number <= reached <= len(names) else [f"applied={[number, reached]}"]
        strange += [
            short(past)
            for past in saved.history
            if past.total != len(names) or list(past.learning_rates) not in ([], names[: past.number])
        ]
        if strange:
            raise ValueError(
                f"`state_dict` must be one that ProgressiveUnfreezer gave, got {strange[0]} of {len(names)} blocks; "
                "pass a saved state_dict() as it is"
            )
        # Blocks' groups stand behind those of the user's own that were there before them.
        before = saved.groups[: max((i for i, known in enumerate(saved.groups) if known), default=0)].count(None)
        if (own := self.rebuilder.order().count(None)) < before:
            raise ValueError(
                f"`state_dict` must be of an optimizer with {own} groups of its own, as this, got one with {before}; "
                "add them, as the saved run did, before the unfreezer is loaded"
            )
        if len(saved.caps) != len(self.caps):
            raise ValueError(
                f"`state_dict['caps']` must be the states of {len(self.caps)} caps, got {short(saved.caps)}; "
                "pass the caps of the saved run"
            )

    def _layout(self) -> dict[str, dict[str, list[int]]]:
        # In the order of the groups, since an optimizer's state is loaded by place: equal shapes would not tell.
        return {
            block.name: {name: list(parameter.shape) for subset in subsets for name, parameter in subset.named}
            for block, subsets in zip(self.blocks, self.rebuilder.subsets, strict=True)
        }


_Number = Annotated[int, Field(strict=True, ge=0)]


class _Saved(BaseModel):
    """What `ProgressiveUnfreezer.state_dict` gives."""

    schedule: Any
    blocks: dict[str, Any]
    applied: tuple[_Number, _Number] | None
    groups: list[tuple[str, _Number] | None]
    history: list[Transition]
    caps: list[Any]


def _show_options(function: Any) -> None:
    """Let `help` and `inspect.signature` name the constructor's keywords in the place of `**options`."""
    signature, constructor = inspect.signature(function), inspect.signature(ProgressiveUnfreezer).parameters
    named = [constructor[name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in Options.__annotations__]
    function.__signature__ = signature.replace(parameters=[*list(signature.parameters.values())[:-1], *named])


_show_options(ProgressiveUnfreezer.from_model.__func__)  # type: ignore[attr-defined]
