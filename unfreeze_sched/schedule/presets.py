"""Presets: when blocks are unfrozen, and how much lower their learning rate is. Pure and validated; no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import count, groupby
from operator import itemgetter
from typing import Any, Literal, Self

from pydantic import Field, field_serializer, field_validator, model_validator

from unfreeze_sched._checks import FrozenModel, as_count, count_field, ratio_field, short

_SCALE = "0.1 gives a joining block a tenth of the head's learning rate"
_SHARE = "it is a share of total_epochs, such as 0.2"


class RatePreset(FrozenModel):
    """One more block every `unfreeze_rate` epochs, from `unfreeze_start_epoch` on.

        n(e) = 0                                              for e < start
        n(e) = min(total_blocks, 1 + (e - start) // rate)     for e >= start

    Args:
        unfreeze_start_epoch: 0-based epoch at which the first block, the deepest, is unfrozen.
        unfreeze_rate: Epochs from one block to the next, at least 1.
        learning_rate_scale: Ratio of a joining block's learning rate to the head's, in (0, 1].

    Raises:
        pydantic.ValidationError: A ValueError that names the field, the value and one fix.

    Example:
        >>> preset = RatePreset(unfreeze_start_epoch=2, unfreeze_rate=3)
        >>> [preset.blocks_at(epoch, total_blocks=3, total_epochs=10) for epoch in range(10)]
        [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    """

    kind: Literal["rate"] = "rate"
    unfreeze_start_epoch: int = 10
    unfreeze_rate: int = 5
    learning_rate_scale: float = 0.1

    _start = count_field("unfreeze_start_epoch", minimum=0, fix="epochs are 0-based whole numbers, such as 10")
    _rate = count_field("unfreeze_rate", minimum=1, fix="it is a whole number of epochs, such as 5")
    _scale = ratio_field("learning_rate_scale", fix=_SCALE)

    def blocks_at(self, epoch: int, total_blocks: int, total_epochs: int) -> int:
        """The number of unfrozen blocks at a 0-based epoch; `total_epochs` plays no part."""
        del total_epochs
        if epoch < self.unfreeze_start_epoch:
            return 0
        return min(total_blocks, 1 + (epoch - self.unfreeze_start_epoch) // self.unfreeze_rate)

    def changes(self, total_blocks: int, total_epochs: int) -> Iterator[tuple[int, int]]:
        """Each epoch before `total_epochs` at which the number may change, ascending, with the number from then on."""
        last = min(self.unfreeze_start_epoch + total_blocks * self.unfreeze_rate, total_epochs)
        yield from zip(range(self.unfreeze_start_epoch, last, self.unfreeze_rate), count(1), strict=False)


class Milestones(dict[int, int]):
    """Epoch -> number of blocks: read-only and hashable; a dict, since configuration tools take no other mapping."""

    __slots__ = ()  # jsonargparse copies a dict's `__dict__` instead of its items, where it has one

    def __new__(cls, items: Mapping[int, int] | None = None) -> Any:
        """A plain dict where there are no items: jsonargparse begins its copies with such a one, and fills them."""
        return super().__new__(cls) if items else {}

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("`milestones` must stay as they are, got a change; use preset.replace(milestones={...})")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]  # a dict has none, since it may change
        return hash(tuple(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return Milestones, (dict(self),)  # a pickled dict is filled item by item too


def _milestones(value: Any) -> Mapping[int, int]:
    if not isinstance(value, Mapping) or not value:
        raise ValueError(
            f"`milestones` must map epochs to numbers of blocks, got {short(value)}; "
            "pass a dict such as {10: 1, 20: 4}"
        )
    items: dict[int, int] = {}
    last = -1
    for key, number in value.items():
        # JSON has string keys alone, so the decimal form of an epoch is read as that epoch.
        epoch = int(key) if isinstance(key, str) and re.fullmatch(r"0|[1-9][0-9]{0,17}", key) else key
        try:
            epoch = as_count(epoch, "milestones", minimum=0, fix="its keys are 0-based epochs, such as 10")
            blocks = as_count(number, f"milestones[{epoch}]", minimum=0, fix="it is a number of blocks, such as 1")
        except TypeError as error:  # pydantic gathers ValueErrors alone
            raise ValueError(str(error)) from None
        if epoch <= last:
            raise ValueError(f"`milestones` must have ascending epochs, got {epoch} after {last}; sort them")
        items[epoch] = blocks
        last = epoch
    milestones: Mapping[int, int] = Milestones(items)
    return milestones


_MILESTONES_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": {"type": "integer", "minimum": 0},
}


class MilestonePreset(FrozenModel):
    """The number of unfrozen blocks, stated by epoch; where it goes down, blocks are frozen again.

        n(e) = the number at the last milestone that is <= e, 0 before the first

    Args:
        milestones: 0-based epoch -> number of unfrozen blocks; ascending epochs, of which JSON's strings are read.
        learning_rate_scale: Ratio of a joining block's learning rate to the head's, in (0, 1].

    Raises:
        pydantic.ValidationError: A ValueError that names the field, the value and one fix.

    Example:
        >>> preset = MilestonePreset(milestones={1: 1, 3: 4})
        >>> [preset.blocks_at(epoch, total_blocks=7, total_epochs=5) for epoch in range(5)]
        [0, 1, 1, 4, 4]
    """

    kind: Literal["milestones"] = "milestones"
    milestones: Mapping[int, int] = Field(json_schema_extra=_MILESTONES_SCHEMA)
    learning_rate_scale: float = 0.1

    # Plain, since pydantic's own validation of a Mapping hands back a dict, which changes and has no hash.
    _epochs = field_validator("milestones", mode="plain")(_milestones)
    _scale = ratio_field("learning_rate_scale", fix=_SCALE)

    @field_serializer("milestones")
    def _as_dict(self, milestones: Mapping[int, int]) -> dict[int, int]:
        return dict(milestones)

    def blocks_at(self, epoch: int, total_blocks: int, total_epochs: int) -> int:
        """The number of unfrozen blocks at a 0-based epoch; the totals play no part."""
        del total_blocks, total_epochs
        return next((number for key, number in [*self.milestones.items()][::-1] if key <= epoch), 0)

    def changes(self, total_blocks: int, total_epochs: int) -> Iterator[tuple[int, int]]:
        """Each epoch before `total_epochs` at which the number may change, ascending, with the number from then on."""
        del total_blocks
        yield from ((epoch, number) for epoch, number in self.milestones.items() if epoch < total_epochs)


class FractionPreset(FrozenModel):
    """Blocks spread evenly over a part of the run, T = total_epochs.

        n(e) = 0                                                                        for e < start * T
        n(e) = min(total_blocks, 1 + floor(total_blocks * (e - start*T) / ((end - start)*T)))   in between
        n(e) = total_blocks                                                             for e >= end * T

    Computed exactly; a float stands for the decimal that it is written as, so `start=0.2` is 1/5.

    Args:
        start: Share of the run after which the first block is unfrozen, in [0, 1), below `end`.
        end: Share of the run after which all blocks are unfrozen, in (0, 1].
        learning_rate_scale: Ratio of a joining block's learning rate to the head's, in (0, 1].

    Raises:
        pydantic.ValidationError: A ValueError that names the field, the value and one fix.

    Example:
        >>> preset = FractionPreset(start=0.2, end=0.8)
        >>> [preset.blocks_at(epoch, total_blocks=3, total_epochs=10) for epoch in range(10)]
        [0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
    """

    kind: Literal["fraction"] = "fraction"
    start: float = 0.2
    end: float = 0.8
    learning_rate_scale: float = 0.1

    _start = ratio_field("start", fix=_SHARE, zero=True)
    _end = ratio_field("end", fix=_SHARE, zero=True)
    _scale = ratio_field("learning_rate_scale", fix=_SCALE)

    @model_validator(mode="after")
    def _start_before_end(self) -> Self:
        if self.start >= self.end:
            raise ValueError(f"`start` must be below `end`, got {self.start} and {self.end}; lower `start`")
        return self

    def blocks_at(self, epoch: int, total_blocks: int, total_epochs: int) -> int:
        """The number of unfrozen blocks at a 0-based epoch."""
        start, end = self._bounds(total_epochs)
        if epoch < start:
            return 0
        if epoch >= end:
            return total_blocks
        return min(total_blocks, 1 + int(total_blocks * (epoch - start) / (end - start)))

    def changes(self, total_blocks: int, total_epochs: int) -> Iterator[tuple[int, int]]:
        """Each epoch before `total_epochs` at which the number may change, ascending, with the number from then on."""
        start, end = self._bounds(total_epochs)
        step = (end - start) / total_blocks
        # In whole numbers over one denominator, since fractions of a long run would take their time.
        below = start.denominator * step.denominator
        first, each = start.numerator * step.denominator, step.numerator * start.denominator
        epochs = (-(-(first + block * each) // below) for block in range(total_blocks))  # rounded up
        for epoch, same in groupby(enumerate(epochs, 1), key=itemgetter(1)):
            if epoch < total_epochs:
                yield epoch, max(number for number, _ in same)

    def _bounds(self, total_epochs: int) -> tuple[Fraction, Fraction]:
        return Fraction(repr(self.start)) * total_epochs, Fraction(repr(self.end)) * total_epochs


SMALL = RatePreset(unfreeze_start_epoch=20, unfreeze_rate=10, learning_rate_scale=0.01)
"""For fewer than 1,000 training images."""

MEDIUM = RatePreset(unfreeze_start_epoch=10, unfreeze_rate=5, learning_rate_scale=0.1)
"""For 1,000 to 10,000 training images."""

LARGE = RatePreset(unfreeze_start_epoch=5, unfreeze_rate=3, learning_rate_scale=0.3)
"""For more than 10,000 training images."""

PRESETS = {"small": SMALL, "medium": MEDIUM, "large": LARGE}
"""The three of the guide, by name."""

Preset = RatePreset | MilestonePreset | FractionPreset
"""Any preset; told apart by `kind`."""

_MEDIUM_FROM = 1_000
_MEDIUM_UP_TO = 10_000


def preset_for(n_images: int) -> RatePreset:
    """The preset for a training set's size: `SMALL` below 1,000 images, `LARGE` above 10,000, else `MEDIUM`.

    Args:
        n_images: Number of training images, at least 1.

    Raises:
        TypeError: `n_images` is no integer.
        ValueError: `n_images` is below 1.

    Example:
        >>> preset_for(1_000) is MEDIUM
        True
    """
    n_images = as_count(n_images, "n_images", minimum=1, fix="count the training images")
    if n_images < _MEDIUM_FROM:
        return SMALL
    return MEDIUM if n_images <= _MEDIUM_UP_TO else LARGE
