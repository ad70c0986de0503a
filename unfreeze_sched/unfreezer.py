"""`ProgressiveUnfreezer`: schedule, blocks and optimizer, in one line an epoch."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, get_args

from torch import nn
from torch.optim import Optimizer

from unfreeze_sched._saved import differences, short
from unfreeze_sched.blocks import Block, validate_blocks
from unfreeze_sched.freezing import Norms, drop_gradients, hold_in_eval, norms_of, release, set_requires_grad
from unfreeze_sched.guards import Cap
from unfreeze_sched.history import History, Transition
from unfreeze_sched.optimizers import why_no_rate
from unfreeze_sched.parts import Overrides
from unfreeze_sched.probe import Probe
from unfreeze_sched.rebuilder import UNCHANGED, GroupChange, Membership, OnRefreeze, OptimizerRebuilder
from unfreeze_sched.schedule import UnfreezeSchedule

log = logging.getLogger("unfreeze_sched")


class ProgressiveUnfreezer:
    """Unfreezes an encoder's blocks by a schedule, and lets them join the live optimizer.

    `apply(epoch)` is three idempotent steps: the schedule's number of blocks; their `requires_grad` and norm modes; the
    optimizer's groups and the LR schedulers' rows. It needs no earlier call.

    Args:
        blocks: The encoder's blocks, shallow to deep.
        optimizer: The live optimizer; it holds the head's parameters, and none of the blocks'.
        schedule: Its `total_blocks` is the number of blocks.
        lr_schedulers: All the LR schedulers of the optimizer; None says that there is none.
        learning_rate_scale: In (0, 1]; None takes the preset's.
        layer_decay: As for `OptimizerRebuilder`, like the rest.
        template: 0-based index of the group that joining groups clone.
        on_refreeze: `"keep"` or `"drop"`.
        membership: `"late"` or `"declared"`.
        no_decay: False, True, or a function of name and parameter.
        warmup_steps: At least 0.
        norms: `"eval"` holds the norm layers of frozen blocks in evaluation mode, even after `model.train()`;
            `"frozen"` holds them there after their block joined, too, so that the pretrained statistics stay, which
            suits small batches; `"train"` leaves their mode alone.
        probe: `"ranks"`, `"local"` or `"off"`, as for `OptimizerRebuilder`.
        caps: Guards and triggers, such as `unfreeze_sched.guards.OverfitGuard`: no more blocks are unfrozen than the
            schedule and each cap allow.

    Attributes:
        history: What was unfrozen when, at what learning rates, and why.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of range, or a schedule for another number of blocks.

    Warns:
        UserWarning: The blocks' learning rate is not below the head's.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from unfreeze_sched import RatePreset
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> optimizer = torch.optim.AdamW(net[2].parameters(), lr=1e-3)
        >>> blocks = [Block("first", (net[0],)), Block("second", (net[1],))]
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
        learning_rate_scale: float | None = None,
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
        if norms not in get_args(Norms):
            raise ValueError(
                f"`norms` must be one of {', '.join(get_args(Norms))}, got {norms!r}; 'eval' is the default"
            )
        scale = schedule.preset.learning_rate_scale if learning_rate_scale is None else learning_rate_scale
        blocks = validate_blocks(blocks)
        if len(blocks) != schedule.total_blocks:
            raise ValueError(
                f"`schedule` must be for the {len(blocks)} blocks given, got total_blocks={schedule.total_blocks}; "
                "pass total_blocks=len(blocks)"
            )
        given = caps if isinstance(caps, (list, tuple)) else [caps]
        strange = [type(cap).__name__ for cap in given if not isinstance(cap, Cap)]
        if strange or given is not caps:
            raise TypeError(
                "`caps` must be a sequence of guards and triggers, got "
                f"{(strange or [type(caps).__name__])[0]}; pass caps=[OverfitGuard()]"
            )
        self.schedule = schedule
        self.norms = norms
        self.caps = tuple(caps)
        self.history = History()
        self.rebuilder = OptimizerRebuilder(
            optimizer,
            blocks,
            lr_schedulers,
            scale,
            layer_decay,
            template,
            on_refreeze,
            membership,
            no_decay,
            warmup_steps,
            probe,
        )
        if scale == 1 and why_no_rate(optimizer, optimizer.param_groups[template]) is None:
            warnings.warn(
                "`learning_rate_scale` should be below 1, got 1: at the head's learning rate the encoder's pretrained "
                "features are overwritten before the head can use them; pass 0.1",
                UserWarning,
                stacklevel=2,
            )
        self._norms = tuple(norms_of(block) for block in blocks)
        self._applied: tuple[int, int] | None = None
        self._seen_groups: list[dict[str, Any]] | None = None
        self._seen_length = 0

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks, shallow to deep."""
        return self.rebuilder.blocks

    def apply(self, epoch: int) -> GroupChange:
        """Bring model, optimizer and LR schedulers to the state of an epoch; call it before the epoch is trained.

        Args:
            epoch: 0-based; any from 0 on, in any order.

        Returns:
            What joined the optimizer, and what left.

        Raises:
            TypeError: `epoch` is no integer.
            ValueError: `epoch` is negative, or the change is refused; then nothing has changed.
            RuntimeError: The model no longer holds a block's parameter, or an accumulation is not over; likewise.
        """
        number, peak = self.schedule.progress_at(epoch)
        if self.caps:
            # What the caps held back in the past, the schedule cannot tell.
            number = min(number, *(cap.cap for cap in self.caps if cap.cap is not None), len(self.blocks))
            peak = max(number, self._applied[1] if self._applied else 0)
        if (number, peak) == self._applied and self._is_as_left() and self.rebuilder.owners.look_whole():
            if not self.caps:
                return UNCHANGED
            change = UNCHANGED
        else:
            change = self._bring_to(number, peak)
        for cap in self.caps:
            cap.follow(number, len(self.blocks))
        self._record(int(epoch), number)
        return change

    def state_dict(self) -> dict[str, Any]:
        """What is needed to replay the groups in a new process: small, of JSON's types alone.

        Returns:
            The schedule, each block's parameter names and shapes, the numbers of blocks last applied, the history, and
            the caps' states; a guard that restores weights adds those, and only then it is neither small nor JSON.
        """
        return {
            "schedule": self.schedule.model_dump(mode="json"),
            "blocks": self._layout(),
            "applied": None if self._applied is None else list(self._applied),
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
        numbers = self._checked(state_dict, strict)
        before = self.history.state_dict(), [cap.state_dict() for cap in self.caps]
        try:
            self.history.load_state_dict(state_dict["history"])
            self._refuse_other_history()
            for cap, saved in zip(self.caps, state_dict["caps"], strict=True):
                cap.load_state_dict(saved)
                if numbers:
                    cap.follow(numbers[0], len(self.blocks))  # as it did when it was saved; refuses other blocks
            if numbers:
                self._bring_to(*numbers)
        except Exception:
            self.history.load_state_dict(before[0])
            for cap, own in zip(self.caps, before[1], strict=True):
                cap.load_state_dict(own)
            raise

    def _checked(self, state_dict: Mapping[str, Any], strict: bool) -> list[int]:
        """Refuse the state of another run; the numbers of blocks to replay, none where `apply` was never called."""
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"`state_dict` must be a mapping, got {type(state_dict).__name__}; pass a saved state_dict()"
            )
        keys = self.state_dict().keys()
        if set(state_dict) != keys:
            got = ", ".join(map(short, state_dict)) or "none"
            raise ValueError(
                f"`state_dict` must have the keys {', '.join(keys)}, got {got}; "
                "pass a saved state_dict() of an unfreezer"
            )
        found = list(differences("blocks", state_dict["blocks"], self._layout()))
        if strict:
            found += differences("schedule", state_dict["schedule"], self.schedule.model_dump(mode="json"))
        if found:
            raise ValueError(
                "`state_dict` must be of this schedule and these blocks, got "
                + "; ".join(found[:5])
                + (f"; and {len(found) - 5} more" if len(found) > 5 else "")  # noqa: PLR2004  # enough to see what it is
                + "; rebuild what was saved"
            )
        applied = state_dict["applied"]
        total = len(self.blocks)
        numbers = list(applied) if isinstance(applied, (list, tuple)) else []
        if applied is not None and (
            [type(number) for number in numbers] != [int, int] or not 0 <= numbers[0] <= numbers[1] <= total
        ):
            raise ValueError(
                f"`state_dict['applied']` must be two numbers of blocks from 0 to {total}, in ascending order, got "
                f"{short(applied)}; pass a saved state_dict() as it is"
            )
        caps = state_dict["caps"]
        if not isinstance(caps, (list, tuple)) or len(caps) != len(self.caps):
            raise ValueError(
                f"`state_dict['caps']` must be the states of {len(self.caps)} caps, got {short(caps)}; "
                "pass the caps of the saved run"
            )
        return numbers

    def _refuse_other_history(self) -> None:
        """Refuse a history that the next transition could not go on from."""
        names = [block.name for block in self.blocks[::-1]]
        for past in self.history:
            if past.total != len(names) or list(past.learning_rates) not in ([], names[: past.number]):
                raise ValueError(
                    f"`state_dict['history']` must be of these blocks, got {past.number} of {past.total} at epoch "
                    f"{past.epoch}, {short(list(past.learning_rates))}; pass a saved state_dict() as it is"
                )

    def _layout(self) -> dict[str, dict[str, list[int]]]:
        # In the order of the groups, since an optimizer's state is loaded by place: equal shapes would not tell.
        return {
            block.name: {name: list(p.shape) for part in parts for name, p in part.named}
            for block, parts in zip(self.blocks, self.rebuilder.parts, strict=True)
        }

    def _is_as_left(self) -> bool:
        """Whether the optimizer's groups are those that the last call left, and none was added or loaded since."""
        groups = self.rebuilder.optimizer.param_groups
        return groups is self._seen_groups and len(groups) == self._seen_length

    def _bring_to(self, number: int, peak: int) -> GroupChange:
        """Unfreeze the deepest `number` blocks and freeze the others; the deepest `peak` blocks get a group."""
        rebuilder = self.rebuilder
        total = len(self.blocks)
        depths = range(total)  # 0 is the deepest block
        if self._applied is not None and self._is_as_left() and rebuilder.owners.look_whole():
            # All other blocks are as the last call left them.
            before, peak_before = self._applied
            depths = range(min(number, before), max(number, before, peak if peak > peak_before else 0))
        indices = [total - 1 - depth for depth in depths]
        thawing = [index for depth, index in zip(depths, indices, strict=True) if depth < number]
        freezing = indices[len(thawing) :]
        flipped: dict[int, list[nn.Parameter]] = {}
        with_gradient: list[nn.Parameter] = []
        for index in indices:
            parameters = chain.from_iterable(part.parameters for part in rebuilder.parts[index])
            changed, stale = set_requires_grad(parameters, requires_grad=index in thawing)
            if changed:
                flipped[index] = changed
            with_gradient += stale
        try:
            if flipped:
                rebuilder.accumulation.refuse_pending()
            change = rebuilder.sync_blocks(indices, met=peak)
        except Exception:
            for parameter in chain(*flipped.values()):
                parameter.requires_grad = not parameter.requires_grad
            raise
        drop_gradients(with_gradient)
        for index in thawing:
            if index in flipped:
                rebuilder.first_step.watch(rebuilder.named[index])
            (hold_in_eval if self.norms == "frozen" else release)(self._norms[index])
        for index in freezing:
            (release if self.norms == "train" else hold_in_eval)(self._norms[index])
        groups = rebuilder.optimizer.param_groups
        self._applied, self._seen_groups, self._seen_length = (number, peak), groups, len(groups)
        return change

    def _record(self, epoch: int, number: int) -> None:
        """Note a change of the number, and the moment at which a cap begins to hold blocks back."""
        last = self.history[-1] if self.history else None
        scheduled = self.schedule.blocks_at(epoch)
        binding = next((cap for cap in self.caps if cap.cap == number < scheduled), None)
        holder = "" if binding is None else type(binding).__name__
        if last is not None and last.number == number and (not holder or last.reason.startswith(holder)):
            return
        reason = "schedule"
        if binding is not None:
            rises = number > (last.number if last else 0)
            reason = f"{holder}: " + ("the next block may join" if rises else binding.reason)
        rates = self.rebuilder.learning_rates()
        unfrozen = {block.name: rates.get(block.name, math.nan) for block in self.blocks[::-1][:number]}
        if not all(map(math.isfinite, unfrozen.values())):
            unfrozen = {}  # an optimizer without learning rates, or one gone astray, is no reason to stop here
        self.history.add(Transition(epoch, number, len(self.blocks), unfrozen, reason))
        log.info("epoch %d: %d of %d blocks are trainable (%s)", epoch, number, len(self.blocks), reason)
