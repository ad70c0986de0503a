"""A small folder of images and masks, for runs of the training command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_images(folder: Path, number: int) -> Path:
    """Images of 40 x 36 pixels in three classes, with noise; the same ones for the same number."""
    generator = np.random.default_rng(0)
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for index in range(number):
        mask = np.zeros((36, 40), np.uint8)
        mask[4:20, 4:20], mask[20:32, 10:36] = 1, 2
        pixels = (80 * mask[..., None] + generator.integers(0, 60, (36, 40, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index:02}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{index:02}.png")
    return folder
