"""Image files and their class-index masks: found by name, read, and checked."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from unfreeze_sched.distill.loss import IGNORE_INDEX

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_MASK_MODES = ("L", "P", "1", "I;16", "I")
_NAMED = 5  # file names in one error text

Indices = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


class DataError(ValueError):
    """The images or masks cannot be used; one line says what, and one fix."""


@dataclass(frozen=True)
class File:
    """An image file.

    Attributes:
        label: its name in error texts.
        source: its path, or its bytes.
    """

    label: str
    source: Path | bytes


@dataclass(frozen=True)
class Pair:
    """An image and its mask.

    Attributes:
        name: the stem both share.
        image: the image's file.
        mask: the mask's file.
    """

    name: str
    image: File
    mask: File


def pairs_of(folder: Path) -> tuple[Pair, ...]:
    """The images of `folder/images/` with their masks in `folder/masks/`, sorted by stem; no file is opened.

    Raises:
        DataError: a folder is missing or empty, or an image or mask is without its other half.
    """
    for part in ("images", "masks"):
        if not (folder / part).is_dir():
            raise DataError(f"{folder / part} must be a folder, got none; the data is DIR with images/ and masks/")
    images = _by_stem(folder / "images", _IMAGE_SUFFIXES)
    masks = _by_stem(folder / "masks", (".png",))
    if not images:
        raise DataError(f"{folder / 'images'} must hold an image, got none; {', '.join(_IMAGE_SUFFIXES)} are read")
    if bare := [file.name for stem, file in images.items() if stem not in masks]:
        raise DataError(f"each image must have a mask, got none for {_listed(bare)}; add masks/STEM.png")
    if lone := [file.name for stem, file in masks.items() if stem not in images]:
        raise DataError(
            f"each mask must have an image, got none for {_listed(lone)}; add the images or remove the masks"
        )
    return tuple(
        Pair(stem, File(f"images/{images[stem].name}", images[stem]), File(f"masks/{masks[stem].name}", masks[stem]))
        for stem in sorted(images)
    )


def read_pair(pair: Pair, classes: int) -> tuple[Image.Image, Indices]:
    """Read an image, and its mask's indices, of shape (H, W).

    Raises:
        DataError: a file is unreadable, or the mask does not fit the image or the classes.
    """
    image = _opened(pair.image)
    indices = mask_indices(pair.mask)
    if image.size != indices.shape[::-1]:
        raise DataError(
            f"{pair.mask.label} must have its image's size {_by(*image.size)}, got {_by(*indices.shape[::-1])}; "
            "export the mask at the image's resolution",
        )
    _check_indices(pair.mask, indices, classes)
    return image, indices


def _opened(file: File) -> Image.Image:
    """The file, decoded to the end, the right way up."""
    try:
        with Image.open(io.BytesIO(file.source) if isinstance(file.source, bytes) else file.source) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        reason = "an unknown format"
    except (OSError, SyntaxError, ValueError) as error:
        reason = str(error)
    raise DataError(f"{file.label} must be a readable image, got: {reason}; export it anew, or remove it with its pair")


def mask_indices(file: File) -> Indices:
    """A mask's values, of shape (H, W)."""
    mask = _opened(file)
    if mask.mode not in _MASK_MODES:
        raise DataError(
            f"{file.label} must be a class-index mask of one band, got mode {mask.mode}; "
            "map its colours to indices 0, 1, ... and save it in mode L",
        )
    return np.asarray(mask).astype(np.int64)


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """The folder's files of these kinds; two of one stem would make the pairing a guess."""
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in suffixes or file.name.startswith("."):
            continue
        if file.stem in files:
            raise DataError(
                f"{folder} must hold one file per stem, got {files[file.stem].name} and {file.name}; rename one",
            )
        files[file.stem] = file
    return files


def _check_indices(file: File, indices: Indices, classes: int) -> None:
    wrong = indices[(indices >= classes) & (indices != IGNORE_INDEX) | (indices < 0)]
    if wrong.size:
        raise DataError(
            f"{file.label} must hold class indices 0 to {classes - 1}, or 255 to ignore, got {int(wrong.max())}; "
            "set `classes` to cover it, or map it",
        )


def _by(width: int, height: int) -> str:
    return f"{width} x {height}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
