"""Images with class-index masks: the embedded sample, or a folder of one's own; the order is a function of a generator.

Files are decoded when asked for, so a folder may be large; the embedded sample is kept decoded, as uint8.
"""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from unfreeze_sched.distill.command.files import DataError, File, Pair, mask_indices, pairs_of, read_pair
from unfreeze_sched.distill.loss import IGNORE_INDEX

CLASS_NAMES = ("background", "animal", "food", "vehicle", "face")
"""The embedded sample's classes, by index."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Triple = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class SegmentationData(Dataset[tuple[Tensor, Tensor]]):
    """Images and masks in a fixed order; an item is ``(image, mask)``, normalised, without augmentation.

    An image is cut to its central square and scaled to ``image_size`` (bilinear, antialiased); the mask goes the same
    way, nearest. EXIF rotation is applied to the image. The normalised value is ``(v / 255 - mean) / std``, by band.

    Attributes:
        pairs: the files, in order.
        class_names: the classes' names, by index.
        image_size: side of the square that items have, in pixels.
        mean: by band, R, G, B, for values from 0 to 1.
        std: likewise.
        cache: keeps decoded items when it is a dict; parts of one `split` share it.

    Example:
        >>> data = load_sample("test", image_size=64)
        >>> image, mask = data[0]
        >>> image.shape, image.dtype, mask.shape, mask.dtype
        (torch.Size([3, 64, 64]), torch.float32, torch.Size([64, 64]), torch.int64)
    """

    pairs: tuple[Pair, ...]
    class_names: tuple[str, ...]
    image_size: int
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    cache: dict[str, tuple[Tensor, Tensor]] | None = field(default=None, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The files' stems, in order."""
        return tuple(pair.name for pair in self.pairs)

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.raw(index)
        return self.normalised(image.float() / 255), mask.long()

    def raw(self, index: int) -> tuple[Tensor, Tensor]:
        """Read an item as it is kept.

        Args:
            index: 0-based position.

        Returns:
            The image, uint8 of shape (3, image_size, image_size), and the mask, uint8 of shape (image_size,
            image_size), its values class indices or 255. They are not to be written to.

        Raises:
            DataError: a file is unreadable, or the mask does not fit the image or the classes.
        """
        pair = self.pairs[index]
        if self.cache is None:
            return self._decoded(pair)
        if pair.name not in self.cache:
            self.cache[pair.name] = self._decoded(pair)
        return self.cache[pair.name]

    def normalised(self, image: Tensor) -> Tensor:
        """``(image - mean) / std`` for an image of shape (..., 3, H, W) with values from 0 to 1."""
        mean, std = (torch.tensor(triple, device=image.device).view(3, 1, 1) for triple in (self.mean, self.std))
        return (image - mean) / std

    def check(self) -> None:
        """Read every file once, so that a broken one shows before training.

        Raises:
            DataError: as `raw` does.
        """
        for index in range(len(self)):
            self.raw(index)

    def split(self, validation_fraction: float, seed: int) -> tuple["SegmentationData", "SegmentationData"]:
        """Part the data in two at random, ``round(validation_fraction * N)`` images going to the second.

        Args:
            validation_fraction: between 0 and 1, both exclusive; neither part may come out empty.
            seed: 0 or more; the same seed gives the same parts.

        Returns:
            The training and the validation part; each keeps the order of the whole.

        Raises:
            DataError: a part would be empty.

        Example:
            >>> train, validation = load_sample("train").split(0.1, seed=0)
            >>> len(train), len(validation)
            (360, 40)
        """
        held = round(validation_fraction * len(self)) if 0 < validation_fraction < 1 else 0
        if not 0 < held < len(self):
            raise DataError(
                f"`validation_fraction` must leave images in both parts of {len(self)}, got {validation_fraction}; "
                "choose one between 0 and 1, or add images",
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        parts = sorted(order[held:]), sorted(order[:held])
        train, validation = (replace(self, pairs=tuple(self.pairs[i] for i in part)) for part in parts)
        return train, validation

    def epoch(self, generator: torch.Generator, *, flip: bool = True, jitter: float = 0.0) -> "EpochView":
        """One epoch's order and augmentation, all drawn here from the generator.

        So a loader over the view needs no shuffling, and its workers, however many, draw nothing.

        Args:
            generator: a CPU generator, such as `epoch_generator` makes.
            flip: mirrors half of the images left to right, with their masks.
            jitter: brightness and contrast are each scaled by a factor from ``1 - jitter`` to ``1 + jitter``; 0 to 1.

        Returns:
            A dataset of the same length and kind of item.

        Raises:
            DataError: ``jitter`` is out of range.

        Example:
            >>> data = load_sample("test")
            >>> view = data.epoch(epoch_generator(seed=0, epoch=3), jitter=0.2)
            >>> loader = torch.utils.data.DataLoader(view, batch_size=16)
            >>> view.order == data.epoch(epoch_generator(seed=0, epoch=3), jitter=0.2).order
            True
        """
        if not 0 <= jitter <= 1:
            raise DataError(f"`jitter` must be from 0 to 1, got {jitter}; 0 turns it off")
        order = torch.randperm(len(self), generator=generator)
        flips = torch.rand(len(self), generator=generator) < 0.5 * flip
        factors = 1 + jitter * (2 * torch.rand(len(self), 2, generator=generator) - 1)
        return EpochView(self, tuple(order.tolist()), tuple(flips.tolist()), tuple(map(tuple, factors.tolist())))

    def _decoded(self, pair: Pair) -> tuple[Tensor, Tensor]:
        image, indices = read_pair(pair, self.classes)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box, size = (left, top, left + side, top + side), (self.image_size, self.image_size)
        pixels = np.array(image.convert("RGB").resize(size, Image.Resampling.BILINEAR, box))
        mask = np.array(Image.fromarray(indices.astype(np.uint8)).resize(size, Image.Resampling.NEAREST, box))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), torch.from_numpy(mask)


@dataclass(frozen=True, eq=False)
class EpochView(Dataset[tuple[Tensor, Tensor]]):
    """One epoch of the data: its order and augmentation are settled, so an item depends on nothing but its index.

    Attributes:
        data: what is viewed.
        order: for each place in the epoch, the 0-based index into ``data``.
        flips: for each place, whether it is mirrored left to right.
        factors: for each place, the factors of brightness and contrast.
    """

    data: SegmentationData
    order: tuple[int, ...]
    flips: tuple[bool, ...]
    factors: tuple[tuple[float, ...], ...]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels, mask = self.data.raw(self.order[index])
        brightness, contrast = self.factors[index]
        image = pixels.float() / 255
        if (brightness, contrast) != (1.0, 1.0):
            middle = int(pixels.sum()) / pixels.numel() / 255  # summed as integers: no order of summation to depend on
            image = (((image - middle) * contrast + middle) * brightness).clamp(0, 1)
        if self.flips[index]:
            image, mask = image.flip(-1), mask.flip(-1)
        return self.data.normalised(image), mask.long()


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Make the CPU generator that belongs to a seed and an epoch, whatever was drawn before.

    Args:
        seed: the run's seed, 0 or more.
        epoch: 0-based.

    Returns:
        A new generator.

    Example:
        >>> epoch_generator(0, 7).initial_seed() == epoch_generator(0, 7).initial_seed()
        True
        >>> epoch_generator(0, 7).initial_seed() == epoch_generator(7, 0).initial_seed()
        False
    """
    state = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def load_sample(
    split: Literal["train", "test"],
    *,
    image_size: int = 128,
    mean: Triple = IMAGENET_MEAN,
    std: Triple = IMAGENET_STD,
) -> SegmentationData:
    """Load a part of the embedded sample: 400 training or 200 test images of 128 x 128 pixels in five classes.

    Args:
        split: ``"train"`` or ``"test"``; they share no object and no background.
        image_size: side of an item in pixels, 1 or more.
        mean: the encoder's mean by band, for values from 0 to 1.
        std: the encoder's deviation by band.

    Returns:
        The data; items are kept decoded once read.

    Raises:
        DataError: an argument is out of range.

    Example:
        >>> data = load_sample("train", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        >>> len(data), data.class_names
        (400, ('background', 'animal', 'food', 'vehicle', 'face'))
    """
    if split not in ("train", "test"):
        raise DataError(f"`split` must be 'train' or 'test', got {split!r}; take 'train' and its .split() to validate")
    _check_size(image_size)
    stored = (resources.files("unfreeze_sched.distill.command") / "sample" / "sample.zip").read_bytes()
    with zipfile.ZipFile(io.BytesIO(stored)) as archive:
        files = [File(name, archive.read(name)) for name in archive.namelist() if name.startswith(f"{split}/")]
    half = len(files) // 2  # sorted: first the images, then the masks, in the same order
    pairs = tuple(Pair(Path(i.label).stem, i, m) for i, m in zip(files[:half], files[half:], strict=True))
    return SegmentationData(pairs, CLASS_NAMES, image_size, mean, std, cache={})


def load_folder(
    path: str | Path,
    *,
    classes: int | Sequence[str] | None = None,
    image_size: int = 256,
    mean: Triple = IMAGENET_MEAN,
    std: Triple = IMAGENET_STD,
    cache: bool = False,
) -> SegmentationData:
    """Load ``path/images/`` with ``path/masks/``: an image and its mask share their stem.

    Images are .jpg, .jpeg, .png, .webp or .bmp, in any mode; masks are .png of one band (mode L, P, 1 or I;16) holding
    0-based class indices, or 255 for pixels to ignore. Names are checked here, files when they are read (`check`).

    Args:
        path: the folder.
        classes: their number, 1 to 255, background included, or their names by index; None reads every mask once and
            takes the largest index + 1.
        image_size: side of an item in pixels, 1 or more; see `SegmentationData` for how images are cut and scaled.
        mean: the encoder's mean by band, for values from 0 to 1.
        std: the encoder's deviation by band.
        cache: keeps items decoded once read: ``4 * image_size ** 2`` bytes each.

    Returns:
        The data, sorted by stem.

    Raises:
        DataError: a folder is missing or empty, an image has no mask or a mask no image, or there is no class.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for part, mode in (("images", "RGB"), ("masks", "L")):
        ...         (Path(folder) / part).mkdir()
        ...         Image.new(mode, (40, 30)).save(Path(folder) / part / "a.png")
        ...     data = load_folder(folder, classes=["background", "road"], image_size=32)
        >>> data.names, data.classes
        (('a',), 2)
    """
    _check_size(image_size)
    pairs = pairs_of(Path(path))
    return SegmentationData(pairs, _class_names(classes, pairs), image_size, mean, std, {} if cache else None)


def _check_size(image_size: int) -> None:
    if image_size < 1:
        raise DataError(f"`image_size` must be 1 or more, got {image_size}; encoders mostly want a multiple of 32")


def _class_names(classes: int | Sequence[str] | None, pairs: tuple[Pair, ...]) -> tuple[str, ...]:
    if classes is None:
        found = (indices[indices != IGNORE_INDEX] for indices in map(mask_indices, (pair.mask for pair in pairs)))
        classes = max((int(indices.max()) + 1 for indices in found if indices.size), default=0)
        if not classes:
            raise DataError("the masks must hold a class, got only 255, which is ignored; write indices 0, 1, ...")
    names = tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(classes)
    if not 1 <= len(names) <= IGNORE_INDEX:
        count = classes if isinstance(classes, int) else len(names)
        raise DataError(f"`classes` must be from 1 to 255, got {count}; the background counts as one")
    return names
