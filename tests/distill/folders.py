"""Folders of images and masks as people have them, read as the command reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unfreeze_sched.distill.command.data import DataError, SegmentationData, load_folders

SIDE = 16  # of a stripe, a multiple of JPEG's blocks


def blocks(*values: int, dtype: type = np.uint8) -> np.ndarray[Any, Any]:
    """A square of stripes of one value each."""
    return np.repeat(np.repeat(np.array([values], dtype), SIDE * len(values), 0), SIDE, 1)


def stems(data: SegmentationData) -> tuple[str, ...]:
    """The names of its pairs, in order."""
    return tuple(pair.name for pair in data.pairs)


def save(folder: Path, name: str, mask: Any, image: Any = None, image_name: str = "", **options: Any) -> None:
    """A mask under its name, and an image of its size, a PNG by default, of the mask's stem."""
    mask = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
    image = Image.new("RGB", mask.size, "gray") if image is None else image
    for part, picture, file in (("images", image, image_name or f"{Path(name).stem}.png"), ("masks", mask, name)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        picture.save(folder / part / file, **(options if part == "masks" else {}))


def read(*folders: Path, size: int = SIDE, **keywords: Any) -> tuple[SegmentationData, list[str]]:
    """The first folder's data, and what was said of all."""
    told: list[str] = []
    data, *_ = load_folders(*folders, image_size=size, tell=told.append, **keywords)
    return data, told


def refused(*folders: Path, **keywords: Any) -> str:
    """What the folders are refused with, in one line."""
    with pytest.raises(DataError) as caught:
        read(*folders, **keywords)
    text = str(caught.value)
    assert "\n" not in text
    return text
