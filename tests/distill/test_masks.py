"""What the values of masks are taken to mean, and when they are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("segmentation_models_pytorch")
from folders import SIDE, blocks, read, refused, save
from PIL import Image, ImageDraw

BINARY = "the masks are binary: 0 is class 0, 255 is class 1"


def shown(data: Any, place: int = 0) -> set[int]:
    """What an item's mask holds."""
    return set(data[place][1].unique().tolist())


# Class indices


def test_indices_are_classes(tmp_path: Path) -> None:
    """Masks of 0 to K-1 are class indices, and nothing is said of it."""
    save(tmp_path, "a.png", blocks(0, 1))
    save(tmp_path, "b.png", blocks(2, 0))
    data, told = read(tmp_path)
    assert (data.classes, told) == (3, [])
    assert [pair.classes for pair in data.pairs] == [{0, 1}, {0, 2}]


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".TIFF", ".gif"])
def test_indices_of_each_kind_of_file(tmp_path: Path, suffix: str) -> None:
    """Every kind that keeps values is read, in either case."""
    save(tmp_path, f"a{suffix}", Image.fromarray(blocks(0, 1, 2)).convert("P" if suffix == ".gif" else "L"))
    data, told = read(tmp_path, size=SIDE)
    assert (data.classes, told) == (3, [])
    assert shown(data) == {0, 1, 2}


def test_255_beside_indices_is_ignored_and_its_share_said(tmp_path: Path) -> None:
    """A mask that holds 255 beside an index says what it is for."""
    save(tmp_path, "a.png", blocks(0, 255, 255, 1))
    save(tmp_path, "b.png", blocks(0, 1, 0, 1))
    data, told = read(tmp_path)
    assert data.classes == 2
    assert shown(data) == {0, 1, 255}
    assert told == ["255 in the masks is ignored: 25 % of their pixels"]
    assert data.pairs[0].classes == {0, 1}


def test_255_beside_0_alone_is_in_doubt_among_indices(tmp_path: Path) -> None:
    """One half of the masks 0 and 255, the other 0 and 1: as likely a foreground as pixels to ignore."""
    save(tmp_path, "a.png", blocks(0, 255))
    save(tmp_path, "b.png", blocks(0, 1))
    text = refused(tmp_path)
    assert text == (
        "255 must stand beside class indices to be ignored, got it in masks/a.png with nothing but 0, and indices "
        "elsewhere; save masks alike, or give --classes 2 if it is to be ignored"
    )
    assert read(tmp_path, classes=2)[1] == ["255 in the masks is ignored: 25 % of their pixels"]


@pytest.mark.parametrize("values", [(0, 2, 1, 255), (0, 0, 3, 3)])
def test_the_number_of_classes_may_be_given(tmp_path: Path, values: tuple[int, ...]) -> None:
    """With `--classes` values are indices, gaps between them included."""
    save(tmp_path, "a.png", blocks(*values))
    assert read(tmp_path, classes=5)[0].classes == 5


def test_an_index_beyond_the_classes_is_refused(tmp_path: Path) -> None:
    """A value that `--classes` does not cover is named, with the number that does."""
    save(tmp_path, "a.png", blocks(0, 1))
    save(tmp_path, "b.png", blocks(0, 9, 255))
    assert refused(tmp_path, classes=2) == (
        "the masks must hold class indices 0, 1, 2, ... and 255 to ignore, or 0 and 255, got 0, 1, 9, 255 "
        "(masks/b.png); save masks without smoothing, or give --mask-values 0,1,9,255 if each is a class, --classes 10 "
        "if each is an index"
    )
    assert read(tmp_path, classes=10)[0].classes == 10


@pytest.mark.parametrize(
    ("values", "classes", "got"),
    [
        ((0, 0), None, "0 alone; add masks that do"),
        ((255, 255), None, "255 alone; add masks that do"),
        ((3, 3), None, "3 alone; add masks that do"),
        ((0, 255), 3, "0, 255 of which 255 is ignored; leave --classes and --mask-values out if it is a class"),
    ],
)
def test_a_single_class_is_refused(tmp_path: Path, values: tuple[int, ...], classes: int | None, got: str) -> None:
    """With one class there is nothing to learn, and the score would be 100 %."""
    save(tmp_path, "a.png", blocks(*values))
    text = refused(tmp_path, classes=classes)
    assert text == f"the masks must hold two classes or more, got {got}"


# 0 and 255


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "RGBA", "LA", "I;16", "I;16 65535", "I", "CMYK", "JPEG", "GIF"])
def test_0_and_255_are_a_binary_mask_in_any_mode(tmp_path: Path, mode: str) -> None:
    """The commonest masks there are: the foreground is class 1, and it is said."""
    grey, name = Image.fromarray(blocks(255, 0, 255)), "a.png"
    white = 65535 if "65535" in mode else 255
    if mode.startswith("I"):
        mask = Image.fromarray(blocks(white, 0, white, dtype=np.int32 if mode == "I" else np.uint16))
        name = "a.tif"
    elif mode in ("JPEG", "GIF"):
        mask, name = grey, f"a.{mode.lower()}"
    elif mode == "P":
        mask = Image.fromarray(blocks(255, 0, 255))
        mask.putpalette([value for value in range(256) for _ in range(3)])
    else:
        mask = grey.convert(mode)
        name = "a.tif" if mode == "CMYK" else name
    save(tmp_path, name, mask, **({"optimize": False} if mode == "GIF" else {}))
    data, told = read(tmp_path)
    assert data.classes == 2
    assert told == [BINARY.replace("255", str(white))]
    assert shown(data) == {0, 1}
    assert data.raw(0)[1].tolist() == [[1] * 5 + [0] * 6 + [1] * 5] * 16
    assert data.pairs[0].classes == {0, 1}


def test_binary_masks_of_several_modes_are_one_kind(tmp_path: Path) -> None:
    """One bit, eight and sixteen, empty masks and full ones: one meaning."""
    save(tmp_path, "a.png", Image.fromarray(blocks(0, 255)).convert("1"))
    save(tmp_path, "b.png", blocks(255, 0))
    save(tmp_path, "c.png", blocks(0, 65535, dtype=np.uint16))
    save(tmp_path, "d.png", blocks(0, 0))
    save(tmp_path, "e.png", blocks(255, 255))
    data, told = read(tmp_path)
    assert told == ["the masks are binary: 0 is class 0, 255 is class 1, 65535 is class 1"]
    assert [pair.classes for pair in data.pairs] == [{0, 1}, {0, 1}, {0, 1}, {0}, {1}]
    assert shown(data, 4) == {1}
    assert read(tmp_path, classes=2)[1] == told


def test_one_bit_beside_indices_is_refused(tmp_path: Path) -> None:
    """A mask of one bit has no 255 to ignore."""
    save(tmp_path, "a.png", blocks(0, 1, 255))
    save(tmp_path, "b.png", Image.fromarray(blocks(0, 255, 0)).convert("1"))
    text = "a mask of 1 bit holds two classes, got masks/b.png beside class indices; save all masks in mode L"
    assert refused(tmp_path) == refused(tmp_path, classes=2) == text


# Other values


def suggested(text: str) -> dict[str, Any]:
    """The ways out that an error names, as keywords."""
    values = re.search(r"--mask-values ([\d,]+)", text)
    return {"mask_values": tuple(map(int, values[1].split(",")))} if values else {}


@pytest.mark.parametrize(
    ("values", "number"),
    [((0, 127, 255), 128), ((0, 85, 170), 171), ((0, 100, 250), 251), ((1, 2, 3), 4), ((0, 1, 3), 4), ((0, 2), 3)],
)
def test_greys_are_refused_and_can_be_mapped(tmp_path: Path, values: tuple[int, ...], number: int) -> None:
    """Values with gaps are refused, listed, and either way out that is named then works."""
    save(tmp_path, "a.png", blocks(*values))
    listed = ", ".join(map(str, values))
    text = refused(tmp_path)
    assert text == (
        f"the masks must hold class indices 0, 1, 2, ... and 255 to ignore, or 0 and 255, got {listed} (masks/a.png); "
        f"save masks without smoothing, or give --mask-values {','.join(map(str, values))} if each is a class, "
        f"--classes {number} if each is an index"
    )
    data, told = read(tmp_path, size=SIDE, **suggested(text))
    assert data.classes == len(values)
    assert told == [f"the masks are mapped: {', '.join(f'{v} is class {i}' for i, v in enumerate(values))}"]
    assert data.pairs[0].classes == set(range(len(values)))
    assert shown(data) == set(range(len(values)))
    assert read(tmp_path, classes=number)[0].classes == number


def test_values_that_no_listing_names_are_refused(tmp_path: Path) -> None:
    """A listing has to be whole; 255 is ignored only where the listed values are indices."""
    save(tmp_path, "a.png", blocks(0, 127, 255))
    assert refused(tmp_path, mask_values=(0, 127)) == (
        "`--mask-values` must list each value of the masks, got none for 255 (masks/a.png); add it"
    )
    save(tmp_path, "a.png", blocks(0, 1, 255))
    data, told = read(tmp_path, mask_values=(0, 1))
    assert (data.classes, told) == (2, ["255 in the masks is ignored: 33 % of their pixels"])
    assert read(tmp_path, mask_values=(255, 1, 0))[1] == [
        "the masks are mapped: 255 is class 0, 1 is class 1, 0 is class 2"
    ]


def test_antialiased_masks_are_refused(tmp_path: Path) -> None:
    """Greys along the edges are no classes."""
    large = Image.new("L", (256, 256))
    ImageDraw.Draw(large).ellipse((20, 20, 230, 200), fill=255)
    save(tmp_path, "a.png", large.resize((64, 64), Image.Resampling.BICUBIC))
    text = refused(tmp_path)
    assert "got 0, " in text
    assert " more (masks/a.png); save masks without smoothing" in text


def test_masks_of_every_grey_are_refused(tmp_path: Path) -> None:
    """All of 8 bits' values leave no gap, and are no classes."""
    save(tmp_path, "a.png", np.arange(256, dtype=np.uint8).reshape(16, 16))
    text = refused(tmp_path)
    assert "got 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 246 more (masks/a.png); save masks without smoothing, or give" in text
    assert read(tmp_path, classes=255)[0].classes == 255  # who says so is believed


def test_instance_masks_are_refused(tmp_path: Path) -> None:
    """Values of 16 bits and beyond are no classes, and no number of classes makes them so."""
    save(tmp_path, "a.png", blocks(0, 24001, 24002, dtype=np.uint16))
    text = refused(tmp_path)
    assert "got 0, 24001, 24002 (masks/a.png)" in text
    assert "--classes" not in text
    assert read(tmp_path, **suggested(text))[0].classes == 3
    save(tmp_path, "a.tif", blocks(0, 70000, dtype=np.int32))
    (tmp_path / "masks" / "a.png").unlink()
    assert "masks/a.tif must be a readable image, got: values beyond 16 bits" in refused(tmp_path)


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_jpeg_is_read_where_its_values_are_clean(tmp_path: Path, name: str) -> None:
    """Clean blocks are; with noise the values are refused, whatever the suffix says; so are indices, where noise hides."""
    save(tmp_path, name, blocks(255, 0, 255), format="JPEG")
    assert read(tmp_path)[1] == [BINARY]
    ring = Image.new("L", (40, 40))
    ImageDraw.Draw(ring).ellipse((5, 5, 31, 33), fill=255)
    save(tmp_path, name, ring, format="JPEG")
    text = refused(tmp_path)
    assert "got 0, 1, 2, " in text
    assert f"(masks/{name}); save masks as PNG, since the format of these changes values" in text
    save(tmp_path, name, blocks(0, 1, 2), format="JPEG", quality=100)
    assert refused(tmp_path) == (
        f"masks/{name} must keep values that lie so near, got a format that changes them; save masks as PNG"
    )
    save(tmp_path, name, blocks(0, 128, 255), format="JPEG", quality=100)
    assert read(tmp_path, mask_values=(0, 128, 255))[0].classes == 3


def test_lossy_bytes_in_a_tiff_are_lossy(tmp_path: Path) -> None:
    """A TIFF may hold JPEG."""
    save(tmp_path, "a.tif", blocks(0, 1, 2), compression="jpeg")
    assert refused(tmp_path).startswith("masks/a.tif must keep values that lie so near")


def test_a_coloured_mask_is_refused_with_its_colours(tmp_path: Path) -> None:
    """Colours are no indices, nor is transparency."""
    mask = Image.new("RGB", (SIDE, SIDE))
    mask.paste((0, 128, 255), (0, 0, 4, 4))
    save(tmp_path, "a.png", mask)
    assert refused(tmp_path) == (
        "masks/a.png must be a class-index mask of one band, got the colours (0, 0, 0), (0, 128, 255); "
        "map them to indices 0, 1, ... and save it in mode L"
    )
    clear = Image.new("RGBA", (SIDE, SIDE), (255, 255, 255, 255))
    clear.paste((255, 255, 255, 0), (0, 0, 4, 4))
    save(tmp_path, "a.png", clear)
    assert "got the colours (255, 255, 255, 0), (255, 255, 255, 255); map them" in refused(tmp_path)


def test_a_mask_of_fractions_is_refused(tmp_path: Path) -> None:
    """Values that are no integers are no classes."""
    save(tmp_path, "a.tif", blocks(0, 1, dtype=np.float32))
    assert refused(tmp_path) == (
        "masks/a.tif must be a readable image, got: mode F, not of 8 or 16 bits; export it anew, or remove it with its "
        "pair"
    )


# Palettes


def palette(*colours: tuple[int, int, int], values: tuple[int, ...] = (0, 1)) -> Image.Image:
    mask = Image.fromarray(blocks(*values), "L")
    mask.putpalette([band for colour in colours for band in colour])
    return mask


BLACK, RED, GREEN = (0, 0, 0), (255, 0, 0), (0, 255, 0)


def test_a_palettes_indices_are_the_values(tmp_path: Path) -> None:
    """As in VOC; entries that no pixel uses may differ."""
    save(tmp_path, "a.png", palette(BLACK, RED, GREEN))
    save(tmp_path, "b.png", palette(BLACK, GREEN, GREEN, values=(0, 0)))
    data, told = read(tmp_path)
    assert (data.classes, told) == (2, [])


@pytest.mark.parametrize(
    ("second", "got"),
    [
        (palette(RED, BLACK), "0 as (0, 0, 0) in masks/a.png and as (255, 0, 0) in masks/b.png"),
        (palette(BLACK, GREEN), "1 as (255, 0, 0) in masks/a.png and as (0, 255, 0) in masks/b.png"),
        (palette(BLACK, GREEN, RED, values=(0, 2)), "(255, 0, 0) as 1 in masks/a.png and as 2 in masks/b.png"),
    ],
)
def test_palettes_that_differ_are_refused(tmp_path: Path, second: Image.Image, got: str) -> None:
    """An index of two colours, or a colour of two indices, is refused with both files."""
    save(tmp_path, "a.png", palette(BLACK, RED))
    save(tmp_path, "b.png", second)
    assert refused(tmp_path) == (f"the masks' palettes must agree, got {got}; save masks with one, or in mode L")


def test_a_palette_of_one_colour_tells_nothing(tmp_path: Path) -> None:
    """Some tools write indices with an empty palette."""
    save(tmp_path, "a.png", palette(BLACK, BLACK, BLACK))
    save(tmp_path, "b.png", palette(BLACK, BLACK, BLACK, values=(2, 0)))
    assert read(tmp_path)[0].classes == 3


# Several folders


def test_folders_share_one_meaning(tmp_path: Path) -> None:
    """What a value means is settled over all folders, whose files are named by their folder."""
    save(tmp_path / "data", "a.png", blocks(0, 1))
    save(tmp_path / "val", "a.png", blocks(0, 2, 255))
    data, told = read(tmp_path / "data", tmp_path / "val")
    assert (data.classes, told) == (3, ["255 in the masks is ignored: 23 % of their pixels"])
    save(tmp_path / "val", "a.png", blocks(0, 7))
    assert f"got 0, 1, 7 ({tmp_path}/val/masks/a.png)" in refused(tmp_path / "data", tmp_path / "val")
