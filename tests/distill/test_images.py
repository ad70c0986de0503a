"""How image files are read: 16 bits, TIFF, EXIF, and what no decoder should be trusted with."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("segmentation_models_pytorch")
from folders import SIDE, blocks, read, refused, save
from PIL import Image, ImageOps, TiffImagePlugin

from unfreeze_sched.distill.command import data as data_module

MASK = blocks(0, 1, 0)[:SIDE]


# 16 bits


@pytest.mark.parametrize("dtype", ["uint16", ">u2", "int32"])
@pytest.mark.parametrize(("peak", "white"), [(65535, 65535), (40000, 65535), (4095, 4095), (1000, 1023), (200, 255)])
def test_16_bits_are_scaled(tmp_path: Path, peak: int, white: int, dtype: str) -> None:
    """The range of bits that the images use becomes 0 to 255, the same in all of them, and it is said."""
    values = np.tile(np.linspace(0, peak, SIDE).astype(int), (SIDE, 3))
    save(tmp_path, "a.png", MASK, Image.fromarray(values.astype(dtype)), image_name="a.tif")
    save(tmp_path, "b.png", MASK, Image.fromarray((values // 2).astype(np.uint16)))
    data, told = read(tmp_path)
    assert told == [f"images of 16 bits hold values up to {peak}: 0 to {white} are scaled to 0 to 255"]
    for place, divisor in enumerate((1, 2)):
        expected = np.floor((values // divisor)[:, SIDE:-SIDE] * 255 / white + 0.5)
        assert all(np.array_equal(band, expected) for band in data.raw(place)[0].numpy())


def test_8_bits_beside_16_stay(tmp_path: Path) -> None:
    """An image of 8 bits is not scaled for the sake of others."""
    save(tmp_path, "a.png", MASK, Image.fromarray(np.full((SIDE, 3 * SIDE), 60000, np.uint16)))
    save(tmp_path, "b.png", MASK, Image.new("L", (3 * SIDE, SIDE), 100))
    data, _ = read(tmp_path)
    assert [set(data.raw(place)[0].flatten().tolist()) for place in (0, 1)] == [{233}, {100}]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_each_mode_is_read_as_rgb(tmp_path: Path, mode: str) -> None:
    """White is white in every mode."""
    image = Image.new("RGB", (3 * SIDE, SIDE), "white").convert(mode)
    save(tmp_path, "a.png", MASK, image, image_name="a.tif")
    data, told = read(tmp_path)
    assert (set(data.raw(0)[0].flatten().tolist()), told) == ({255}, [])


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (blocks(0, 1, dtype=np.float32), "mode F, not of 8 or 16 bits"),
        (blocks(0, 70000, dtype=np.int32), "values beyond 16 bits"),
        (blocks(0, -1, dtype=np.int32), "values beyond 16 bits"),
    ],
)
def test_more_bits_are_refused(tmp_path: Path, image: Any, reason: str) -> None:
    """Of values without a known range nothing says what is white."""
    save(tmp_path, "a.png", blocks(0, 1), Image.fromarray(image), image_name="a.tif")
    assert refused(tmp_path) == (
        f"images/a.tif must be a readable image, got: {reason}; export it anew, or remove it with its pair"
    )


# EXIF


def turned(orientation: int, size: tuple[int, int]) -> tuple[Image.Image, bytes]:
    """A picture as stored, its first pixel white, and its EXIF."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.new("RGB", size)
    picture.paste("white", (0, 0, size[0] // 2, size[1] // 2))
    return picture, exif.tobytes()


def photograph(folder: Path, orientation: int, size: tuple[int, int], mask: Image.Image, suffix: str = ".png") -> None:
    """A file with an orientation, whose mask is given."""
    picture, exif = turned(orientation, size)
    save(folder, "a.png", mask, picture, image_name=f"a{suffix}")
    picture.save(folder / "images" / f"a{suffix}", exif=exif)


def white_of(picture: Image.Image) -> Image.Image:
    """The mask of the white quarter."""
    return picture.convert("L").point(lambda value: value // 255)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("is_upright", [True, False])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_a_mask_turns_with_its_photograph(tmp_path: Path, orientation: int, is_upright: bool, suffix: str) -> None:
    """A turn by 90 degrees shows in the sizes: a mask as stored turns, one that is upright does not."""
    picture, exif = turned(orientation, (48, 32))
    picture.save(tmp_path / "p.png", exif=exif)
    with Image.open(tmp_path / "p.png") as stored:
        upright = ImageOps.exif_transpose(stored)
    photograph(tmp_path, orientation, (48, 32), white_of(upright if is_upright else picture), suffix)
    data, _ = read(tmp_path, size=32)
    image, mask = data.raw(0)
    assert np.array_equal(image[0].numpy() // 255, mask.numpy())
    expected = np.asarray(white_of(upright))[8:40]
    assert np.array_equal(mask.numpy(), expected)


@pytest.mark.parametrize(
    ("orientation", "size"), [(6, (32, 32)), (8, (32, 32)), (2, (48, 32)), (3, (48, 32)), (4, (32, 32))]
)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_a_turn_that_sizes_do_not_show_is_refused(
    tmp_path: Path, orientation: int, size: tuple[int, int], suffix: str
) -> None:
    """Of a square, or turned by 180 degrees, nothing says how the mask lies; with a tag of its own it does."""
    picture, exif = turned(orientation, size)
    photograph(tmp_path, orientation, size, white_of(picture), suffix)
    assert refused(tmp_path) == (
        f"images/a{suffix} must say whether its mask turns with it, got EXIF orientation {orientation}, and a mask that fits "
        "both ways; remove the tag if the mask lies as the stored pixels do, else turn the pixels"
    )
    white_of(picture).save(tmp_path / "masks" / "a.png", exif=exif)
    data, _ = read(tmp_path, size=32)
    image, mask = data.raw(0)
    assert np.array_equal(image[0].numpy() // 255, mask.numpy())
    assert not np.array_equal(
        mask.numpy(), np.asarray(white_of(picture).crop((8, 0, 40, 32) if size[0] == 48 else None))
    )


@pytest.mark.parametrize("orientation", [0, 1, 9])
def test_an_orientation_that_turns_nothing(tmp_path: Path, orientation: int) -> None:
    """Upright, or a number that EXIF does not know, turns nothing."""
    picture, _ = turned(1, (32, 32))
    photograph(tmp_path, orientation, (32, 32), white_of(picture))
    assert np.array_equal(read(tmp_path, size=32)[0].raw(0)[1].numpy(), np.asarray(white_of(picture)))


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    """A mask that has not its image's size is refused with both sizes, width first."""
    save(tmp_path, "a.png", Image.new("L", (8, 12)), Image.new("RGB", (12, 8)))
    assert refused(tmp_path) == (
        "masks/a.png must have its image's size 12 x 8, got 8 x 12; export the mask at the image's resolution"
    )


# Files


@pytest.mark.parametrize("suffix", [".tif", ".gif"])
def test_several_pages_are_refused(tmp_path: Path, suffix: str) -> None:
    """Of several pictures in a file nothing says which is meant."""
    pages = [Image.new("L", (SIDE, SIDE), value) for value in (0, 99)]
    save(tmp_path, f"a{suffix}", pages[0], save_all=True, append_images=pages[1:])
    assert f"masks/a{suffix} must be a readable image, got: 2 pages; export" in refused(tmp_path)


def test_a_pyramid_is_one_picture(tmp_path: Path) -> None:
    """A TIFF may hold smaller copies of its picture, as maps do."""
    copy = Image.new("RGB", (8, 8))
    save(tmp_path, "a.png", MASK)
    image = Image.new("RGB", (3 * SIDE, SIDE), "white")
    with TiffImagePlugin.AppendingTiffWriter(tmp_path / "images" / "a.tif", new=True) as out:
        image.save(out, format="TIFF")
        out.newFrame()
        copy.save(out, format="TIFF", tiffinfo={254: 1})
    (tmp_path / "images" / "a.png").unlink()
    with Image.open(tmp_path / "images" / "a.tif") as saved:
        assert saved.n_frames == 2
    data, _ = read(tmp_path)
    assert set(data.raw(0)[0].flatten().tolist()) == {255}


def png(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and has no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """A gigapixel and more is no image to train on."""
    save(tmp_path, "a.png", MASK)
    (tmp_path / "images" / "a.png").write_bytes(png(60000, 60000))
    assert refused(tmp_path) == (
        "images/a.png must be a readable image, got: 60000 x 60000 pixels, more than 1073741824; "
        "export it anew, or remove it with its pair"
    )


def test_a_large_image_is_taken_with_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond Pillow's own bound an image is read, and told of."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(data_module, "_LARGE", 100)
    save(tmp_path, "a.png", blocks(0, 1))
    _, told = read(tmp_path)
    assert told == ["the largest image has 0 megapixels; images cut into tiles are read faster"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<svg/>", "an unknown format"),
        (b"", "an unknown format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 16\n%%EndComments\n", "an unknown format"),
        (png(48, 16), "image file is truncated"),
    ],
)
def test_a_file_that_is_no_image_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    """Whatever calls itself an image is looked at for what it is; no program is started for it."""
    save(tmp_path, "a.png", MASK)
    (tmp_path / "images" / "a.png").write_bytes(content)
    assert refused(tmp_path).startswith(f"images/a.png must be a readable image, got: {reason}")


def test_any_error_of_a_decoder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoders raise whatever they like."""

    def broken(*_: Any) -> None:
        raise struct.error

    save(tmp_path, "a.png", MASK)
    monkeypatch.setattr(Image.Image, "getexif", broken)
    assert refused(tmp_path).startswith("images/a.png must be a readable image, got: error; export it anew")
