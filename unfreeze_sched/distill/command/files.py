"""Images and their masks as people have them: found by name, read the right way up, their values given a meaning."""

import difflib
import io
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

from unfreeze_sched._checks import listed, plain
from unfreeze_sched.distill.loss import IGNORE_INDEX

_MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif", ".jpg", ".jpeg")
_IMAGE_SUFFIXES = (*_MASK_SUFFIXES, ".webp")  # which may be lossy or not, and nothing tells
_READ = f"{', '.join(_MASK_SUFFIXES)} are read, and .webp as an image"
_NAMED = 5  # file names in one text
_SHOWN = 10  # values in one text
_MOST_PIXELS = 2**30
# By content, whatever the names say. Pillow reads more: for some, such as EPS, it starts a program.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I", "I;16", "I;16B")
_WHITE = {255, 2**16 - 1}  # of 8 and of 16 bits
_FAR = 32  # JPEG changes values by less, if classes' values lie so far apart
_MOST_COUNTED = 250  # more values than these are greys
_TURNS = {  # by EXIF orientation; from 5 on width and height change places
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Files = dict[str, Path]  # by stem
Values = np.ndarray[tuple[int, ...], np.dtype[np.integer[Any]]]


class DataError(ValueError):
    """The images or masks cannot be used; one line says what, and one fix."""

    def __init__(self, text: str) -> None:
        super().__init__(plain(text))


class File(NamedTuple):
    """An image file: its name in error texts, and its path or its bytes."""

    label: str
    source: Path | bytes


class Pair(NamedTuple):
    """An image and its mask, by the image's stem, and the class indices found in the mask's central square."""

    name: str
    image: File
    mask: File
    classes: frozenset[int] = frozenset()


# --- names


def pairs_of(folder: Path, prefix: str, tell: Callable[[str], object]) -> list[Pair]:
    """The images of `folder/images/` with their masks in `folder/masks/`, sorted by stem; no file is opened.

    What is not read is told, and how masks were found. The prefix stands before the files' labels.
    """
    images, other = _by_stem(folder / "images", _IMAGE_SUFFIXES)
    masks, more = _by_stem(folder / "masks", _MASK_SUFFIXES)
    unread = [*(f"{prefix}images/{name}" for name in other), *(f"{prefix}masks/{name}" for name in more)]
    if unread:
        tell(plain(f"not read: {listed(unread, _NAMED)}; {_READ}"))
    if not images:
        raise DataError(f"{folder / 'images'} must hold an image, got {listed(other, _NAMED) or 'none'}; {_READ}")
    found = _found(images, masks, more)
    if changed := [f"{found[stem].name} to {images[stem].name}" for stem in images if found[stem].stem != stem]:
        tell(plain(f"masks belong to the images whose names theirs hold: {listed(changed)}"))
    pairs = []
    for stem, image in sorted(images.items()):
        mask = File(f"{prefix}masks/{found[stem].name}", found[stem])
        pairs.append(Pair(stem, File(f"{prefix}images/{image.name}", image), mask))
    return pairs


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> tuple[Files, list[str]]:
    """The folder's files of these kinds, and the names of all else; two of one stem would make the pairing a guess."""
    if not folder.is_dir():
        beside = [path.name for path in sorted(folder.parent.glob("*/"))]
        got = f"{listed(beside, _NAMED)} beside it" if beside else "none"
        raise DataError(f"{folder} must be a folder, got {got}; the data is DIR with images/ and masks/")
    files: Files = {}
    others = []
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in suffixes or file.name.startswith(".") or not file.is_file():
            others.append(f"{file.name}/" if file.is_dir() else file.name)
        elif (first := files.setdefault(file.stem, file)) != file:
            raise DataError(f"{folder} must hold one file per stem, got {first.name} and {file.name}; rename one")
    return files, others


def _found(images: Files, masks: Files, unread: list[str]) -> Files:
    """Each image's mask: that of its stem, else the one mask whose name holds it."""
    names: dict[str, set[str]] = defaultdict(set)
    for stem in images:
        names[_plain(stem)].add(stem)
    claims: dict[str, list[Path]] = {stem: [masks[stem]] if stem in masks else [] for stem in images}
    lone = {stem: file for stem, file in masks.items() if stem not in images}
    for stem, file in lone.items():
        if len(owners := _owners(stem, names)) == 1:
            claims[owners.pop()].append(file)
    if bare := [stem for stem, own in claims.items() if len(own) != 1 and stem not in masks]:
        others = {Path(name).stem: name for name in (*unread, *(file.name for file in lone.values()))}
        close = [others[stem] for stem in difflib.get_close_matches(bare[0], others, 1)]
        near = [file.name for file in claims[bare[0]]] or close
        raise DataError(
            f"each image must have a mask, got none for {listed([images[stem].name for stem in bare], _NAMED)}"
            f"{f' (near the first: {listed(near, _NAMED)})' if near else ''}; add masks/STEM.png"
        )
    found = {stem: own[0] for stem, own in claims.items()}
    used = set(found.values())
    if left := [file.name for file in lone.values() if file not in used]:
        raise DataError(
            f"each mask must have an image, got none for {listed(left, _NAMED)}; add the images or remove the masks"
        )
    return found


def _plain(name: str) -> str:
    """A name as it is compared: file systems differ in how they compose accents, and in whether case counts."""
    return unicodedata.normalize("NFC", name).casefold()


def _owners(stem: str, names: dict[str, set[str]]) -> set[str]:
    """The images whose name stands whole in a mask's, the longest such: `a_1_mask` is of `a_1`, not of `a`."""
    text = _plain(stem)
    cuts = sorted({0, len(text), *(cut.start() for cut in re.finditer(r"\b|(?=_)|(?<=_)", text))})
    held = {text[start:end] for start, end in combinations(cuts, 2)} & names.keys()
    longest = max(map(len, held), default=0)
    return {owner for name in held if len(name) == longest for owner in names[name]}


# --- pixels


def read_pair(pair: Pair) -> tuple[Image.Image, Image.Image, bool]:
    """An image and its mask in RGB or one band of up to 16 bits, and whether the mask's format changes values."""
    image, turn, _ = _opened(pair.image)
    mask, own, lossy = _opened(pair.mask)
    stored = image.size[::-1] if turn > 4 else image.size  # noqa: PLR2004  # turned by 90 degrees
    if own == 1 != turn and mask.size == stored:  # a mask without a tag: its size may tell how it lies
        if stored == image.size:
            raise DataError(
                f"{pair.image.label} must say whether its mask turns with it, got EXIF orientation {turn}, and a mask "
                "that fits both ways; remove the tag if the mask lies as the stored pixels do, else turn the pixels"
            )
        mask = mask.transpose(_TURNS[turn])
    if image.size != mask.size:
        raise DataError(
            f"{pair.mask.label} must have its image's size {_by(image)}, got {_by(mask)}; "
            "export the mask at the image's resolution"
        )
    return image, mask, lossy


def _opened(file: File) -> tuple[Image.Image, int, bool]:
    """The file, decoded to the end and upright, its EXIF orientation, and whether its format changes values."""
    Image.MAX_IMAGE_PIXELS = None  # Pillow stops at 179 megapixels, which satellite images have
    try:
        source = io.BytesIO(file.source) if isinstance(file.source, bytes) else file.source
        with Image.open(source, formats=_FORMATS) as image:
            if reason := _reason(image):
                raise ValueError(reason)  # noqa: TRY301  # as a decoder's own
            turn = _orientation(image)
            image.load()
            if image.mode == "I" and (np.asarray(image) >> 16).any():
                raise ValueError("values beyond 16 bits")  # noqa: TRY301  # likewise
            packing = str(image.info.get("compression"))
            lossy = image.format in ("JPEG", "MPO", "WEBP") or "jpeg" in packing or "webp" in packing
            is_upright = _orientation(image) == 1  # from the start, or since Pillow loaded it, as it turns a TIFF
            return image if is_upright else image.transpose(_TURNS[turn]), turn, lossy
    except UnidentifiedImageError:
        reason = "an unknown format"
    except Exception as error:  # noqa: BLE001  # decoders raise anything on broken bytes
        reason = str(error) or type(error).__name__
    raise DataError(f"{file.label} must be a readable image, got: {reason}; export it anew, or remove it with its pair")


def _reason(image: Image.Image) -> str:
    """Why an image is not to be decoded, if it is not."""
    if image.mode not in _MODES:
        return f"mode {image.mode}, not of 8 or 16 bits"
    if image.width * image.height > _MOST_PIXELS:
        return f"{_by(image)} pixels, more than {_MOST_PIXELS}"
    # A phone's preview is no page of its own, nor are a TIFF's reduced copies and masks.
    pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if image.format == "TIFF" and pages > 1:
        pages = sum(not page.tag_v2.get(254, 0) & 0b101 for page in ImageSequence.Iterator(image))  # type: ignore[attr-defined]  # of a TIFF
        image.seek(0)
    return f"{pages} pages" if pages > 1 else ""


def _orientation(image: Image.Image) -> int:
    turn = image.getexif().get(0x0112)
    return int(turn) if turn in _TURNS else 1


def _by(image: Image.Image) -> str:
    return f"{image.width} x {image.height}"


def central(image: Image.Image) -> tuple[int, int, int, int]:
    """The box of the central square, of which items are made."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return left, top, left + side, top + side


def square_of(pair: Pair, side: int, white: int) -> tuple[Values, Values]:
    """The central squares, scaled: the image's bilinear, uint8, (side, side, 3), `white` as 255; the mask's nearest."""
    image, mask, _ = read_pair(pair)
    size, box = (side, side), central(image)
    if image.mode[0] == "I":  # of up to 16 bits
        bright = np.asarray(image).astype(np.int64).clip(0, white)
        image = Image.fromarray(((bright * 255 + white // 2) // white).astype(np.uint8))
    pixels = image.convert("RGB").resize(size, Image.Resampling.BILINEAR, box)
    values = Image.fromarray(values_of(mask, pair.mask.label)).resize(size, Image.Resampling.NEAREST, box)
    return np.array(pixels), np.array(values)


def values_of(mask: Image.Image, label: str) -> Values:
    """A mask's values, of shape (H, W), uint8 or int32: a palette's indices, 0 and 255 of 1 bit, grey in any mode."""
    if mask.mode[0] == "I":
        return np.asarray(mask).astype(np.int32)
    if mask.mode in ("1", "L", "P"):
        return np.asarray(mask.convert("L") if mask.mode == "1" else mask)
    bands = np.asarray(mask.convert("RGBA"))
    bands = bands[..., : 3 + bool(np.ptp(bands[..., 3]))]
    if np.ptp(bands, axis=-1).any():
        colours = [str(tuple(colour)) for colour in np.unique(bands.reshape(-1, bands.shape[-1]), axis=0).tolist()]
        raise DataError(
            f"{label} must be a class-index mask of one band, got the colours {listed(colours, 5)}; "
            "map them to indices 0, 1, ... and save it in mode L"
        )
    return bands[..., 0]


# --- what the masks' values mean


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
    ways = [f"--mask-values {','.join(map(str, found))} if each is a class"] if len(found) <= _SHOWN else []
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
    return listed([str(value) for value in values], _SHOWN)
