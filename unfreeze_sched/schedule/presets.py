"""Presets: when blocks are unfrozen, and how much lower their learning rate is. Pure and validated; no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, Literal, Self

from pydantic import field_serializer, model_validator

from unfreeze_sched._checks import FrozenModel, as_count, as_ratio, checked, short

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
        >>> dict(preset.changes(total_blocks=3, total_epochs=10))
        {2: 1, 5: 2, 8: 3}
    """

    kind: Literal["rate"] = "rate"
    unfreeze_start_epoch: int = 10
    unfreeze_rate: int = 5
    learning_rate_scale: float = 0.1

    _start = checked("unfreeze_start_epoch", as_count, minimum=0, fix="epochs are 0-based whole numbers, such as 10")
    _rate = checked("unfreeze_rate", as_count, minimum=1, fix="it is a whole number of epochs, such as 5")
    _scale = checked("learning_rate_scale", as_ratio, fix=_SCALE)

    def changes(self, total_blocks: int, total_epochs: int) -> Iterator[tuple[int, int]]:
        """Each 0-based epoch at which the number changes, with the number from then on; some may lie past the end."""
        start = self.unfreeze_start_epoch
        epochs = range(start, max(total_epochs, start + 1), self.unfreeze_rate)
        return zip(epochs, range(1, total_blocks + 1), strict=False)


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


def _as_milestones(value: Any, name: str) -> Any:
    if not isinstance(value, Mapping) or not value:
        raise ValueError(
            f"`{name}` must map epochs to numbers of blocks, got {short(value)}; pass a dict such as {{10: 1, 20: 4}}"
        )
    items: dict[int, int] = {}
    last = -1
    for key, number in value.items():
        # JSON has string keys alone, so the decimal form of an epoch is read as that epoch.
        epoch = int(key) if isinstance(key, str) and re.fullmatch(r"0|[1-9][0-9]{0,17}", key) else key
        epoch = as_count(epoch, name, minimum=0, fix="its keys are 0-based epochs, such as 10")
        if epoch <= last:
            raise ValueError(f"`{name}` must have ascending epochs, got {epoch} after {last}; sort them")
        items[epoch] = as_count(number, f"{name}[{epoch}]", minimum=0, fix="it is a number of blocks, such as 1")
        last = epoch
    return Milestones(items)


class MilestonePreset(FrozenModel):
    """The number of unfrozen blocks by epoch; where it goes down, blocks are frozen again. Errors as of a RatePreset.

        n(e) = the number at the last milestone that is <= e, 0 before the first

    Args:
        milestones: 0-based epoch -> number of unfrozen blocks; ascending epochs, of which JSON's strings are read.
        learning_rate_scale: Ratio of a joining block's learning rate to the head's, in (0, 1].

    Example:
        >>> from unfreeze_sched import UnfreezeSchedule
        >>> list(UnfreezeSchedule(preset=MilestonePreset(milestones={1: 1, 3: 4}), total_blocks=7, total_epochs=5))
        [0, 1, 1, 4, 4]
    """

    kind: Literal["milestones"] = "milestones"
    milestones: Mapping[int, int]
    learning_rate_scale: float = 0.1

    # Plain, since pydantic's own validation of a Mapping hands back a dict, which changes and has no hash.
    _epochs = checked("milestones", _as_milestones, mode="plain")
    _scale = checked("learning_rate_scale", as_ratio, fix=_SCALE)

    @field_serializer("milestones")
    def _as_dict(self, milestones: Mapping[int, int]) -> dict[int, int]:
        return dict(milestones)

    def changes(self, total_blocks: int, total_epochs: int) -> Iterator[tuple[int, int]]:
        """As of a RatePreset."""
        del total_blocks, total_epochs
        return iter(self.milestones.items())


class FractionPreset(FrozenModel):
    """Blocks spread evenly over a part of the run, T = total_epochs. Errors as of a RatePreset.

        n(e) = 0                                                                        for e < start * T
        n(e) = min(total_blocks, 1 + floor(total_blocks * (e - start*T) / ((end - start)*T)))   in between
        n(e) = total_blocks                                                             for e >= end * T

    Computed exactly; a float stands for the decimal that it is written as, so `start=0.2` is 1/5.

    Args:
        start: Share of the run after which the first block is unfrozen, in [0, 1), below `end`.
        end: Share of the run after which all blocks are unfrozen, in (0, 1].
        learning_rate_scale: Ratio of a joining block's learning rate to the head's, in (0, 1].

    Example:
        >>> dict(FractionPreset(start=0.2, end=0.8).changes(total_blocks=3, total_epochs=10))
        {2: 1, 4: 2, 6: 3}
    """

    kind: Literal["fraction"] = "fraction"
    start: float = 0.2
    end: float = 0.8
    learning_rate_scale: float = 0.1

    _start = checked("start", as_ratio, fix=_SHARE, zero=True)
    _end = checked("end", as_ratio, fix=_SHARE, zero=True)
    _scale = checked("learning_rate_scale", as_ratio, fix=_SCALE)

    @model_validator(mode="after")
    def _start_before_end(self) -> Self:
        if self.start >= self.end:
            raise ValueError(f"`start` must be below `end`, got {self.start} and {self.end}; lower `start`")
        return self

    def changes(self, total_blocks: int, total_epochs: int) -> Iterator[tuple[int, int]]:
        """As of a RatePreset; of several at one epoch the last counts."""
        start, end = (Fraction(repr(share)) * total_epochs for share in (self.start, self.end))
        # In whole numbers of such parts of an epoch, since fractions of many blocks take their time.
        parts = start.denominator * end.denominator * total_blocks
        first, step = int(start * parts), int((end - start) * parts) // total_blocks
        for number in range(total_blocks):
            yield -(-(first + number * step) // parts), number + 1  # rounded up


# The guide's, for fewer than 1,000, up to 10,000, and more training images.
SMALL = RatePreset(unfreeze_start_epoch=20, unfreeze_rate=10, learning_rate_scale=0.01)
MEDIUM = RatePreset(unfreeze_start_epoch=10, unfreeze_rate=5, learning_rate_scale=0.1)
LARGE = RatePreset(unfreeze_start_epoch=5, unfreeze_rate=3, learning_rate_scale=0.3)
PRESETS = {"small": SMALL, "medium": MEDIUM, "large": LARGE}

Preset = RatePreset | MilestonePreset | FractionPreset  # told apart by `kind`

_MEDIUM_FROM, _MEDIUM_UP_TO = 1_000, 10_000


def preset_for(n_images: int) -> RatePreset:
    """The preset for a training set's size: `SMALL` below 1,000 images, `LARGE` above 10,000, else `MEDIUM`.

    It gives one of the three and nothing else, since in the study on text (benchmarks/results/text.md) no other
    schedule was better than full fine-tuning, or as good and cheaper, in every size; see choosing.md.

    Args:
        n_images: Number of training images, at least 1.

    Raises:
        TypeError, ValueError: `n_images` is no integer, or below 1.

    Example:
        >>> preset_for(1_000) is MEDIUM
        True
    """
    n_images = as_count(n_images, "n_images", minimum=1, fix="count the training images")
    if n_images < _MEDIUM_FROM:
        return SMALL
    return MEDIUM if n_images <= _MEDIUM_UP_TO else LARGE
