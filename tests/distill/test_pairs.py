"""Which mask belongs to which image, by their names, and what is said of the other files."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

pytest.importorskip("segmentation_models_pytorch")
from folders import blocks, read, refused, save, stems
from PIL import Image

KINDS = ".png, .bmp, .tif, .tiff, .gif, .jpg, .jpeg are read, and .webp as an image"


def folder(path: Path, pairs: dict[str, str]) -> Path:
    """Images by name, each with its mask's name, of which each holds another width."""
    for place, (image, mask) in enumerate(pairs.items()):
        save(path, mask, blocks(0, *[1] * (place + 1)), image_name=image)
    return path


@pytest.mark.parametrize(
    "pairs",
    [
        {"a.png": "a_mask.png", "b.jpg": "b_mask.png"},
        {"a.png": "mask_a.png", "b.png": "mask_b.png"},
        {"a.png": "a_segmentation.png", "b.png": "b_segmentation.png"},
        {"a.jpg": "a.jpg.png", "b.png": "b.png.png"},
        {"a.png": "a-gt.png", "a_1.png": "a_1-gt.png", "a_1_2.png": "a_1_2-gt.png"},
        {"a.png": "A.png", "b.png": "b.PNG"},
        {"a.png": "a_mask.png", "b.png": "mask_b.png", "c.png": "c.png"},
        {unicodedata.normalize("NFC", "é.png"): unicodedata.normalize("NFD", "é.png"), "b.png": "b.png"},
        {unicodedata.normalize("NFD", "ß ü.png"): unicodedata.normalize("NFC", "ß ü (mask).png"), "b.png": "b.png"},
        {"1.png": "1_mask.png", "11.png": "11_mask.png"},
    ],
)
def test_masks_are_found_by_the_name_they_hold(tmp_path: Path, pairs: dict[str, str]) -> None:
    """Where every image has one candidate, it is its mask, and one line says so."""
    data, told = read(folder(tmp_path, pairs))
    assert {Path(pair.image.label).name: Path(pair.mask.label).name for pair in data.pairs} == pairs
    other = [(image, mask) for image, mask in pairs.items() if Path(image).stem != Path(mask).stem]
    (line,) = told
    assert line.startswith("masks belong to the images whose names theirs hold: ")
    assert any(f"{mask} to {image}" in line for image, mask in other)


def test_equal_stems_and_upper_case_suffixes_need_no_word(tmp_path: Path) -> None:
    """The usual folder is read in silence."""
    data, told = read(folder(tmp_path, {"a.JPG": "a.PNG", "b.Jpeg": "b.png"}))
    assert (stems(data), told) == (("a", "b"), [])


@pytest.mark.parametrize(
    ("pairs", "text"),
    [
        ({"b.png": "b.png", "a.png": "a1.png"}, "a.png (near the first: a1.png)"),
        ({"scene_01.png": "scene_1.png", "b.png": "b.png"}, "scene_01.png (near the first: scene_1.png)"),
        ({"a_image.png": "a_mask.png", "b_image.png": "b_mask.png"}, "a_image.png, b_image.png"),
        ({"cat.png": "dog.png"}, "cat.png"),
        ({"1.png": "1_2.png", "2.png": "2_1.png"}, "1.png, 2.png"),
    ],
)
def test_a_near_match_is_named(tmp_path: Path, pairs: dict[str, str], text: str) -> None:
    """A mask that may be the one, and may be not, is named and not taken."""
    got = refused(folder(tmp_path, pairs))
    assert got.startswith(f"each image must have a mask, got none for {text}")
    assert got.endswith("; add masks/STEM.png")


def test_two_candidates_are_named(tmp_path: Path) -> None:
    """Two masks whose names hold an image's are both named; beside a mask of its own stem, the other is lone."""
    path = folder(tmp_path, {"a.png": "a_mask.png", "b.png": "b_mask.png"})
    save(path, "mask_a.png", blocks(0, 1), image_name="a.png")
    assert refused(path) == (
        "each image must have a mask, got none for a.png (near the first: a_mask.png, mask_a.png); add masks/STEM.png"
    )
    save(path, "a.png", blocks(0, 1))
    assert refused(path) == (
        "each mask must have an image, got none for a_mask.png, mask_a.png; add the images or remove the masks"
    )


def test_images_without_masks_are_named(tmp_path: Path) -> None:
    """Images without a mask are named, up to five of them."""
    path = folder(tmp_path, {f"{name}.png": f"{name}.png" for name in "abcdefgh"})
    for name in "bcdefgh":
        (path / "masks" / f"{name}.png").unlink()
    assert refused(path) == (
        "each image must have a mask, got none for b.png, c.png, d.png, e.png, f.png and 2 more; add masks/STEM.png"
    )


def test_masks_without_images_are_named(tmp_path: Path) -> None:
    """Masks without an image are named."""
    path = folder(tmp_path, {f"{name}.png": f"{name}.png" for name in "abc"})
    (path / "images" / "b.png").unlink()
    (path / "images" / "c.png").unlink()
    assert refused(path) == (
        "each mask must have an image, got none for b.png, c.png; add the images or remove the masks"
    )


@pytest.mark.parametrize("part", ["images", "masks"])
def test_two_files_of_one_stem_are_refused(tmp_path: Path, part: str) -> None:
    """Two files that could be meant are refused."""
    path = folder(tmp_path, {"a.png": "a.png"})
    Image.new("L", (12, 8)).save(path / part / "a.tif")
    assert refused(path) == f"{path / part} must hold one file per stem, got a.png and a.tif; rename one"


@pytest.mark.parametrize("part", ["images", "masks"])
def test_a_missing_folder_is_refused(tmp_path: Path, part: str) -> None:
    """A folder without images/ or masks/ is refused with the path looked for, and what is there."""
    path = folder(tmp_path, {"a.png": "a.png"})
    (path / part).rename(path / "elsewhere")
    beside = sorted({"images", "masks", "elsewhere"} - {part})
    assert refused(path) == (
        f"{path / part} must be a folder, got {', '.join(beside)} beside it; the data is DIR with images/ and masks/"
    )
    assert refused(path / "no") == (
        f"{path}/no/images must be a folder, got none; the data is DIR with images/ and masks/"
    )


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    """An empty images/ is refused with the suffixes that are read, and one of other files with their names."""
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    assert refused(tmp_path) == f"{tmp_path / 'images'} must hold an image, got none; {KINDS}"
    (tmp_path / "images" / "train").mkdir()
    (tmp_path / "images" / "a.heic").touch()
    assert refused(tmp_path) == f"{tmp_path / 'images'} must hold an image, got a.heic, train/; {KINDS}"


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    """Files of other kinds, subfolders, hidden files and pipes are named in one line; nothing waits for a pipe."""
    path = folder(tmp_path, {"a.png": "a.png", "b.tif": "b.tif", "c.png": "c.png"})
    for part in ("images", "masks"):
        (path / part / "d.npy").touch()
        (path / part / "more").mkdir()
    (path / "images" / ".a.png").touch()
    os.mkfifo(path / "masks" / "pipe.png")
    data, told = read(path)
    assert stems(data) == ("a", "b", "c")
    assert told == [
        f"not read: images/.a.png, images/d.npy, images/more/, masks/d.npy, masks/more/ and 1 more; {KINDS}"
    ]


def test_a_mask_of_a_kind_that_is_not_read_is_the_near_match(tmp_path: Path) -> None:
    """Where an image's mask is there and is not read, it is named."""
    path = folder(tmp_path, {"a.png": "a.png", "b.png": "b.png"})
    (path / "masks" / "b.png").rename(path / "masks" / "b.npy")
    assert refused(path) == (
        "each image must have a mask, got none for b.png (near the first: b.npy); add masks/STEM.png"
    )


def test_names_that_a_terminal_would_obey_are_shown(tmp_path: Path) -> None:
    """Escapes, line ends and bytes of other encodings in names are written out."""
    path = folder(tmp_path, {"a.png": "a.png"})
    (path / "images" / "\x1b[31m\n\udce9.txt").touch()
    assert read(path)[1] == [rf"not read: images/\x1b[31m\n\udce9.txt; {KINDS}"]
    (path / "images" / "a.png").rename(path / "images" / "\x1b\udce9.png")
    assert r"got none for \x1b\udce9.png" in refused(path)
