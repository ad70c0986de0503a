"""Image files and their masks, read as they are stored and the right way up; a mask's values get no meaning here."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

from unfreeze_sched._checks import listed, plain

_MOST_PIXELS = 2**30
# By content, whatever the names say. Pillow reads more: for some, such as EPS, it starts a program.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I", "I;16", "I;16B")
# By EXIF orientation, from 2 to 8.
_TURNS = (
    *(Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM),
    *(Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90),
)

Values = np.ndarray[tuple[int, ...], np.dtype[np.integer[Any]]]


class DataError(ValueError):
    """The images or masks cannot be used; one line says what, and one fix."""

    def __init__(self, text: str) -> None:
        super().__init__(plain(text))


@dataclass(frozen=True)
class File:
    """An image file: its name in error texts, and its path or its bytes."""

    label: str
    source: Path | bytes


@dataclass(frozen=True)
class Pair:
    """An image and its mask, by the image's stem, and the class indices found in the mask's central square."""

    name: str
    image: File
    mask: File
    classes: frozenset[int] = frozenset()


def read_pair(pair: Pair) -> tuple[Image.Image, Image.Image, bool]:
    """An image and its mask in RGB or one band of up to 16 bits, and whether the mask's format changes values.

    Raises:
        DataError: a file is unreadable, the sizes differ, or it is not known whether the mask turns with its image.
    """
    stored, turn, _ = _opened(pair.image)
    mask, own, lossy = _opened(pair.mask)
    image = _turned(stored, turn)
    if own == 1 != turn and mask.size == stored.size:  # a mask without a tag: its size may tell how it lies
        if stored.size == image.size:
            raise DataError(
                f"{pair.image.label} must say whether its mask turns with it, got EXIF orientation {turn}, and a mask "
                "that fits both ways; remove the tag if the mask lies as the stored pixels do, else turn the pixels"
            )
        own = turn
    mask = _turned(mask, own)
    if image.size != mask.size:
        raise DataError(
            f"{pair.mask.label} must have its image's size {_by(image)}, got {_by(mask)}; "
            "export the mask at the image's resolution",
        )
    return image, mask, lossy


def central(image: Image.Image) -> tuple[int, int, int, int]:
    """The box of the central square, of which items are made."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return left, top, left + side, top + side


def as_rgb(image: Image.Image, white: int) -> Image.Image:
    """The image in RGB of 8 bits; of more bits, `white` becomes 255."""
    if image.mode[0] == "I":
        values = np.asarray(image).astype(np.int64).clip(0, white)
        image = Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))
    return image.convert("RGB")


def values_of(mask: Image.Image, label: str) -> Values:
    """A mask's values, of shape (H, W), uint8 or int32: a palette's indices, 0 and 255 of 1 bit, grey in any mode.

    Raises:
        DataError: it has colours, or is transparent in part.
    """
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


def _opened(file: File) -> tuple[Image.Image, int, bool]:
    """The file, decoded to the end, with its EXIF orientation, and whether its format changes values."""
    Image.MAX_IMAGE_PIXELS = None  # Pillow stops at 179 megapixels, which satellite images have
    try:
        source = io.BytesIO(file.source) if isinstance(file.source, bytes) else file.source
        with Image.open(source, formats=_FORMATS) as image:
            if image.mode not in _MODES:
                raise ValueError(f"mode {image.mode}, not of 8 or 16 bits")  # noqa: TRY301  # as a decoder's own
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError(f"{_by(image)} pixels, more than {_MOST_PIXELS}")  # noqa: TRY301
            if (pages := _pages(image)) > 1:
                raise ValueError(f"{pages} pages")  # noqa: TRY301
            turn = _orientation(image) if image.format == "TIFF" else 1  # which Pillow turns when it loads it
            image.load()
            if image.mode == "I" and (np.asarray(image) >> 16).any():
                raise ValueError("values beyond 16 bits")  # noqa: TRY301
            turn = max(turn, _orientation(image))
            packing = str(image.info.get("compression"))
            lossy = image.format in ("JPEG", "MPO", "WEBP") or "jpeg" in packing or "webp" in packing
            if turn != _orientation(image):
                return _turned(image, {6: 8, 8: 6}.get(turn, turn)), turn, lossy
            return image, turn, lossy
    except UnidentifiedImageError:
        reason = "an unknown format"
    except Exception as error:  # noqa: BLE001  # decoders raise anything on broken bytes
        reason = str(error) or type(error).__name__
    raise DataError(f"{file.label} must be a readable image, got: {reason}; export it anew, or remove it with its pair")


def _orientation(image: Image.Image) -> int:
    turn = image.getexif().get(0x0112, 1)
    return int(turn) if turn in range(2, 9) else 1


def _pages(image: Image.Image) -> int:
    """How many pictures the file holds: a phone's preview is none, nor are a TIFF's reduced copies and masks."""
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if image.format == "TIFF" and frames > 1:
        frames = sum(not page.tag_v2.get(254, 0) & 0b101 for page in ImageSequence.Iterator(image))  # type: ignore[attr-defined]  # of a TIFF
        image.seek(0)
    return frames


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image if orientation == 1 else image.transpose(_TURNS[orientation - 2])


def _by(image: Image.Image) -> str:
    return f"{image.width} x {image.height}"
