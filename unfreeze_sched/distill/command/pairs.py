"""Images and masks found by their names: by equal stems, else by the one mask whose name holds the image's."""

import difflib
import re
import unicodedata
from collections import defaultdict
from itertools import combinations
from pathlib import Path

from unfreeze_sched._checks import listed
from unfreeze_sched.distill.command.files import DataError, File, Pair

_MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif", ".jpg", ".jpeg")
_IMAGE_SUFFIXES = (*_MASK_SUFFIXES, ".webp")  # which may be lossy or not, and nothing tells
_READ = f"{', '.join(_MASK_SUFFIXES)} are read, and .webp as an image"
_NAMED = 5  # file names in one text

Files = dict[str, Path]


def pairs_of(folder: Path, prefix: str = "") -> tuple[list[Pair], list[str]]:
    """The images of `folder/images/` with their masks in `folder/masks/`, sorted by stem; no file is opened.

    Returns:
        The pairs, their labels behind the prefix, and lines on what is not read and on how masks were found.

    Raises:
        DataError: a folder is missing or empty, or an image or mask is without its other half.
    """
    images, other = _by_stem(folder / "images", _IMAGE_SUFFIXES)
    masks, more = _by_stem(folder / "masks", _MASK_SUFFIXES)
    unread = [*(f"{prefix}images/{name}" for name in other), *(f"{prefix}masks/{name}" for name in more)]
    lines = [f"not read: {listed(unread, _NAMED)}; {_READ}"] if unread else []
    if not images:
        raise DataError(f"{folder / 'images'} must hold an image, got {listed(other, _NAMED) or 'none'}; {_READ}")
    found = _found(images, masks, more)
    if changed := [f"{found[stem].name} to {images[stem].name}" for stem in images if found[stem].stem != stem]:
        lines.append(f"masks belong to the images whose names theirs hold: {listed(changed)}")
    pairs = [
        Pair(stem, _file(f"{prefix}images/", images[stem]), _file(f"{prefix}masks/", found[stem]))
        for stem in sorted(images)
    ]
    return pairs, lines


def _file(prefix: str, path: Path) -> File:
    return File(prefix + path.name, path)


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
        elif file.stem in files:
            raise DataError(
                f"{folder} must hold one file per stem, got {files[file.stem].name} and {file.name}; rename one",
            )
        else:
            files[file.stem] = file
    return files, others


def _found(images: Files, masks: Files, unread: list[str]) -> Files:
    """Each image's mask."""
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
