"""The schedule: epoch -> number of unfrozen blocks. Pure; no torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import accumulate
from typing import Any, Self

from pydantic import Field, model_validator

from unfreeze_sched._checks import FrozenModel, as_count, checked, short
from unfreeze_sched.schedule.presets import Preset

_KINDS = ("rate", "milestones", "fraction")


def _known_kind(value: Any, name: str) -> Any:
    if isinstance(value, Preset):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"`{name}` must be a preset or its dict, got {short(value)}; pass MEDIUM or a RatePreset")
    if value.get("kind") not in _KINDS:
        kinds, got = ", ".join(_KINDS), short(value.get("kind"))
        raise ValueError(f"`{name}` must have a `kind` among {kinds}, got {got}; add 'kind': 'rate'")
    return value


class UnfreezeSchedule(FrozenModel):
    """How many of an encoder's blocks are unfrozen at each epoch, counted from the deep end.

    A sequence of `total_epochs` numbers; `blocks_at` goes on past the end with the last of them.

    Args:
        preset: When blocks are unfrozen: a RatePreset, MilestonePreset or FractionPreset, or its dict.
        total_blocks: Number of blocks of the encoder, at least 1.
        total_epochs: Number of epochs of the run, at least 1.

    Raises:
        pydantic.ValidationError: A ValueError that names the field, the value and one fix; also for a preset that
            starts past the end of the run or asks for more blocks than there are.

    Example:
        >>> from unfreeze_sched import MEDIUM
        >>> schedule = UnfreezeSchedule(preset=MEDIUM, total_blocks=7, total_epochs=50)
        >>> schedule[9], schedule[10], schedule[49], len(schedule)
        (0, 1, 7, 50)
        >>> UnfreezeSchedule.model_validate_json(schedule.model_dump_json()) == schedule
        True
    """

    preset: Preset = Field(discriminator="kind")
    total_blocks: int
    total_epochs: int

    _preset = checked("preset", _known_kind)
    _blocks = checked("total_blocks", as_count, minimum=1, fix="count the encoder's blocks: len(blocks)")
    _epochs = checked("total_epochs", as_count, minimum=1, fix="it is the number of epochs of the run, such as 50")

    @model_validator(mode="after")
    def _refuse_what_does_not_fit(self) -> Self:
        field = {"rate": "unfreeze_start_epoch", "milestones": "milestones"}.get(self.preset.kind)
        if field is None:
            return self  # a share lies within the run; where it rounds up to its end, the formula stands
        changes = dict(self.preset.changes(self.total_blocks, self.total_epochs))
        for epoch, number in changes.items():
            if number > self.total_blocks:
                raise ValueError(
                    f"`milestones[{epoch}]` must be at most `total_blocks`, {self.total_blocks}, got {number}; "
                    "lower it or drop the milestone"
                )
        if min(changes) >= self.total_epochs:
            raise ValueError(
                f"`{field}` must start before `total_epochs`, {self.total_epochs}, got {min(changes)}; "
                "no block would ever be unfrozen: start earlier or train longer"
            )
        return self

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Refuse a subclass that would be asked in vain: an unfreezer reads the table that the preset makes."""
        super().__init_subclass__(**keywords)
        if own := {"blocks_at", "progress_at", "transitions", "__getitem__", "__iter__"} & vars(cls).keys():
            raise TypeError(
                f"`{min(own)}` must not be overridden by {cls.__name__}, which unfreezers do not call; state your "
                "numbers as MilestonePreset(milestones={epoch: number, ...})"
            )

    @cached_property
    def _changes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The epochs of changes, the numbers from then on, and the largest so far: a look-up is a bisection."""
        epochs, blocks = [-1], [0]
        for epoch, number in dict(self.preset.changes(self.total_blocks, self.total_epochs)).items():
            if number != blocks[-1] and epoch < self.total_epochs:
                epochs.append(epoch)
                blocks.append(number)
        return tuple(epochs), tuple(blocks), tuple(accumulate(blocks, max))

    def blocks_at(self, epoch: int) -> int:
        """The number of unfrozen blocks at an epoch, from 0 to `total_blocks`, both inclusive.

        Args:
            epoch: 0-based; any from 0 on, past the end the last number stays.

        Raises:
            TypeError, ValueError: `epoch` is no integer, or negative.
        """
        return self.progress_at(epoch)[0]

    def transitions(self) -> tuple[tuple[int, int], ...]:
        """Each epoch at which the number changes, with the new number; the run begins from 0 blocks.

        Example:
            >>> from unfreeze_sched import LARGE
            >>> UnfreezeSchedule(preset=LARGE, total_blocks=3, total_epochs=20).transitions()
            ((5, 1), (8, 2), (11, 3))
        """
        epochs, blocks, _ = self._changes
        return tuple(zip(epochs[1:], blocks[1:], strict=True))

    def progress_at(self, epoch: int) -> tuple[int, int]:
        """The number at an epoch, and the largest at any epoch up to it: the blocks that the optimizer has met."""
        if type(epoch) is not int or epoch < 0:  # the common case is not worth a call
            epoch = as_count(epoch, "epoch", minimum=0, fix="epochs are 0-based whole numbers")
        epochs, blocks, peaks = self._changes
        place = bisect_right(epochs, epoch) - 1
        return blocks[place], peaks[place]

    def __getitem__(self, epoch: int) -> int:
        number = self.blocks_at(epoch)
        if epoch >= self.total_epochs:
            raise IndexError(
                f"`epoch` must be below `total_epochs`, {self.total_epochs}, got {epoch}; use blocks_at past the end"
            )
        return number

    def __len__(self) -> int:
        return self.total_epochs

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]  # a sequence of numbers, where pydantic has its fields
        return map(self.blocks_at, range(self.total_epochs))
