"""What the values of masks mean, settled over all of them at once: class indices, 0 and 255, or what a list says."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from unfreeze_sched._checks import listed
from unfreeze_sched.distill.command.files import DataError, Pair, central, read_pair, values_of
from unfreeze_sched.distill.loss import IGNORE_INDEX

_WHITE = {255, 2**16 - 1}  # of 8 and of 16 bits
_FAR = 32  # JPEG changes values by less, if classes' values lie so far apart
_MOST_COUNTED = 250  # more values than these are greys
_NAMED = 10  # values in one text


class Look(NamedTuple):
    """What was found in a pair."""

    label: str  # the mask's, in error texts
    counts: Mapping[int, int]  # the mask's pixels by value
    seen: Sequence[int]  # its values in the central square
    lossy: bool  # whether its format changes values
    one_bit: bool
    colours: Mapping[int, tuple[int, ...]]  # by value, where it has a palette
    pixels: int
    peak: int  # of an image of 16 bits, else 0


def look(pair: Pair) -> Look:
    """Read a pair whole."""
    image, mask, lossy = read_pair(pair)
    label = pair.mask.label
    values, counts = (each.tolist() for each in np.unique(values_of(mask, label), return_counts=True))
    seen = np.unique(values_of(mask.crop(central(mask)), label)).tolist()
    palette = mask.getpalette() if mask.mode == "P" else None
    colours = {value: tuple(palette[3 * value : 3 * value + 3]) for value in values} if palette else {}
    peak = int(np.asarray(image).max()) if image.mode[0] == "I" else 0
    held = dict(zip(values, counts, strict=True))
    return Look(label, held, seen, lossy, mask.mode == "1", colours, image.width * image.height, peak)


def settle(
    looks: Sequence[Look], classes: int | None = None, listing: Sequence[int] | None = None
) -> tuple[dict[int, int], int, str]:
    """What the masks' values mean, as `load_folders` is asked for it.

    Class index, or 255, by value; the number of classes; and a line on it where it is not plain, else none.
    """
    _refuse_other_palettes(looks)
    counts: Counter[int] = Counter()
    for each in looks:
        counts.update(each.counts)
    found = sorted(counts)
    index = _classes(found, classes, listing)
    number, is_plain = len(set(index.values())), all(value == place for value, place in index.items())
    other = [value for value in found if value not in index]
    is_ignored = is_plain and other == [IGNORE_INDEX]
    if len(found) - is_ignored < 2:  # noqa: PLR2004  # nothing to tell apart
        told = "of which 255 is ignored; leave --classes and --mask-values out if it is a class"
        told = told if len(found) > 1 else "alone; add masks that do"
        raise DataError(f"the masks must hold two classes or more, got {_shown(found)} {told}")
    line = ""
    if is_ignored:
        _refuse_doubt(looks, number, is_said=bool(classes or listing))
        index[IGNORE_INDEX] = IGNORE_INDEX
        line = f"255 in the masks is ignored: {100 * counts[IGNORE_INDEX] / counts.total():.2g} % of their pixels"
    elif other:
        raise DataError(_unknown(looks, found, other, listing))
    elif not is_plain:
        meant = ", ".join(f"{value} is class {place}" for value, place in index.items() if value in counts)
        line = f"the masks are {'binary' if listing is None else 'mapped'}: {meant}"
    lossy = next((each.label for each in looks if each.lossy), "")
    if lossy and any(after - before < _FAR for before, after in pairwise(sorted(index))):
        raise DataError(f"{lossy} must keep values that lie so near, got a format that changes them; save masks as PNG")
    return index, number, line


def _classes(found: Sequence[int], classes: int | None, listing: Sequence[int] | None) -> dict[int, int]:
    """The class of each value that has one."""
    if listing is not None:
        return {value: place for place, value in enumerate(listing)}
    if found[0] == 0 and set(found[1:]) <= _WHITE and classes in (None, 2):
        return {value: int(value > 0) for value in found}
    # Indices that nobody counted leave no gap.
    return {value: value for value in range(classes or min(len({*found} - {IGNORE_INDEX}), _MOST_COUNTED))}


def _refuse_doubt(looks: Sequence[Look], number: int, *, is_said: bool) -> None:
    """255 beside indices is to be ignored; but where it stands beside 0 alone it may be a class."""
    white = [each for each in looks if IGNORE_INDEX in each.counts]
    if one_bit := [each.label for each in white if each.one_bit]:
        raise DataError(
            f"a mask of 1 bit holds two classes, got {listed(one_bit)} beside class indices; save all masks in mode L"
        )
    if not is_said and all(each.counts.keys() <= {0, IGNORE_INDEX} for each in white):
        raise DataError(
            f"255 must stand beside class indices to be ignored, got it in {white[0].label} with nothing but 0, and "
            f"indices elsewhere; save masks alike, or give --classes {number} if it is to be ignored"
        )


def _unknown(looks: Iterable[Look], found: Sequence[int], other: Sequence[int], listing: object) -> str:
    """What values without a meaning are refused with: what was found, where, and what can be done."""
    first = next(each for each in looks if each.counts.keys() & {*other})
    if listing is not None:
        return (
            f"`--mask-values` must list each value of the masks, got none for {_shown(other)} ({first.label}); add it"
        )
    ways = [f"--mask-values {','.join(map(str, found))} if each is a class"] if len(found) <= _NAMED else []
    if (number := 1 + max({*found} - {IGNORE_INDEX})) <= IGNORE_INDEX:
        ways.append(f"--classes {number} if each is an index")
    fix = "save masks without smoothing" + (f", or give {', '.join(ways)}" if ways else "")
    if first.lossy:
        fix = "save masks as PNG, since the format of these changes values"
    return (
        "the masks must hold class indices 0, 1, 2, ... and 255 to ignore, or 0 and 255, "
        f"got {_shown(found)} ({first.label}); {fix}"
    )


def _refuse_other_palettes(looks: Iterable[Look]) -> None:
    """An index with two colours, or a colour with two indices, says that the files count classes differently."""
    known: dict[Any, tuple[Any, str]] = {}  # by value and by colour, which is a tuple
    for each in looks:
        tells_apart = len(set(each.colours.values())) == len(each.colours)
        for value, colour in each.colours.items():
            for key, meant in ((value, colour), (colour, value))[: 1 + tells_apart]:
                first, label = known.setdefault(key, (meant, each.label))
                if first != meant:
                    got = f"{key} as {first} in {label} and as {meant} in {each.label}"
                    raise DataError(f"the masks' palettes must agree, got {got}; save masks with one, or in mode L")


def _shown(values: Sequence[int]) -> str:
    return listed([str(value) for value in values], _NAMED)
