"""Images with masks: the embedded sample, which is kept decoded, or folders of one's own, which may be large."""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from zipfile import ZipFile

import numpy as np
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor
from torch.utils.data import Dataset

from unfreeze_sched._checks import listed
from unfreeze_sched.distill.checkpoints import classes_of
from unfreeze_sched.distill.command.files import DataError, File, Pair, Values, look, pairs_of, settle, square_of
from unfreeze_sched.distill.loss import IGNORE_INDEX

CLASS_NAMES = ("background", "animal", "food", "vehicle", "face")  # of the embedded sample, by index
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET_NORMALISATION = (IMAGENET_MEAN, IMAGENET_STD)  # of most ImageNet weights, torchvision's among them

_MANY = 1_000  # images that take a while
_LARGE = 178_956_970  # pixels: where Pillow warns
_HELD_OUT = 0.2  # of the images for the test, and of the rest for validation
_NAMED = 10  # classes in one line

Triple = tuple[float, float, float]  # by band, R, G, B, for values from 0 to 1


@dataclass(frozen=True, eq=False)
class SegmentationData(Dataset[tuple[Tensor, Tensor]]):
    """Images and masks in a fixed order; an item is ``(image, mask)``, float32 (3, side, side) and int64 (side, side).

    An image is cut to its central square and scaled to ``image_size`` (bilinear, antialiased); the mask goes the same
    way, nearest. EXIF rotation is applied. Values are ``(v / 255 - mean) / std``, by band, without augmentation.
    """

    pairs: tuple[Pair, ...]
    class_names: tuple[str, ...]
    image_size: int  # side of the square that items have, in pixels
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    meaning: Values | None = None  # class index, 255, or -1 for none, by value of the masks; None: these are indices
    white: int = 2**16 - 1  # the value of a 16-bit image that becomes 255
    cache: dict[str, tuple[Tensor, Tensor]] | None = field(default=None, repr=False)  # decoded items, for all parts

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
        """An item as it is kept, as uint8: the image (3, side, side), and the mask's classes or 255 (side, side)."""
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

    def split(self, fraction: float, seed: int) -> tuple["SegmentationData", "SegmentationData"]:
        """Part the data in two, each in the order of the whole: ``round(fraction * N)`` random images are second."""
        held = round(fraction * len(self))
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        parts = sorted(order[held:]), sorted(order[:held])
        train, validation = (replace(self, pairs=tuple(self.pairs[i] for i in part)) for part in parts)
        return train, validation

    def epoch(self, generator: torch.Generator, *, flip: bool = True, jitter: float = 0.0) -> "EpochView":
        """One epoch's order and augmentation, all drawn here, so that a loader over it shuffles and draws nothing.

        `flip` mirrors half of the images left to right, with their masks; brightness and contrast are each scaled by a
        factor from ``1 - jitter`` to ``1 + jitter``. The generator is a CPU's, such as `epoch_generator` makes.
        """
        order = torch.randperm(len(self), generator=generator)
        flips = torch.rand(len(self), generator=generator) < 0.5 * flip
        factors = 1 + jitter * (2 * torch.rand(len(self), 2, generator=generator) - 1)
        return EpochView(self, tuple(order.tolist()), tuple(flips.tolist()), tuple(map(tuple, factors.tolist())))

    def _decoded(self, pair: Pair) -> tuple[Tensor, Tensor]:
        pixels, values = square_of(pair, self.image_size, self.white)
        indices = values if self.meaning is None else self.meaning[values]
        if indices.min() < 0:
            raise DataError(f"{pair.mask.label} must stay as it was at the start, got other values; start a new run")
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), torch.from_numpy(indices.astype(np.uint8))


@dataclass(frozen=True, eq=False)
class EpochView(Dataset[tuple[Tensor, Tensor]]):
    """One epoch of the data, by place: all is settled, so that an item depends on nothing but its index."""

    data: SegmentationData
    order: tuple[int, ...]  # 0-based, into the data
    flips: tuple[bool, ...]  # whether it is mirrored left to right
    factors: tuple[tuple[float, ...], ...]  # of brightness and contrast

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
    """The CPU generator of a seed and a 0-based epoch, whatever was drawn before."""
    state = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def load_sample(
    split: Literal["train", "test"], *, image_size: int = 128, mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD
) -> SegmentationData:
    """A part of the embedded sample: 400 training or 200 test images of 128 x 128 pixels in five classes.

    The two share no object and no background. `mean` and `std` are the encoder's.
    """
    with ZipFile(Path(__file__).parent / "sample" / "sample.zip") as archive:
        files = [File(name, archive.read(name)) for name in archive.namelist() if name.startswith(f"{split}/")]
    half = len(files) // 2  # sorted: first the images, then the masks, in the same order
    pairs = tuple(Pair(Path(i.label).stem, i, m) for i, m in zip(files[:half], files[half:], strict=True))
    return SegmentationData(pairs, CLASS_NAMES, image_size, mean, std, cache={})


def load_folders(
    *folders: str | Path,
    classes: int | None = None,
    mask_values: Sequence[int] | None = None,
    image_size: int = 256,
    mean: Triple = IMAGENET_MEAN,
    std: Triple = IMAGENET_STD,
    tell: Callable[[str], object] = lambda _: None,
) -> list[SegmentationData]:
    """The data of folders with `images/` and `masks/` each, sorted by stem, as the guide `your_data.md` has it.

    Every file is read once, here, before a value gets a meaning, which is the same in all the folders. How they are
    read is told, line by line; what cannot be read, or could be in more than one way, is a `DataError`. `classes` is
    their number, background included, or None to count them; `mask_values` the value of each class in the masks, by
    index, or None for class indices, or 0 and 255.
    """
    parts = [pairs_of(Path(folder), f"{folder}/" if place else "", tell) for place, folder in enumerate(folders)]
    if (number := sum(map(len, parts))) >= _MANY:
        tell(f"{number} images and masks are looked at first")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        looks = [list(pool.map(look, pairs)) for pairs in parts]
    every = [each for part in looks for each in part]
    index, number, line = settle(every, classes, mask_values)
    if line:
        tell(line)
    white = 255
    if peak := max(each.peak for each in every):
        white = next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if peak < 2**bits)
        tell(f"images of 16 bits hold values up to {peak}: 0 to {white} are scaled to 0 to 255")
    if (most := max(each.pixels for each in every)) > _LARGE:
        tell(f"the largest image has {most // 10**6} megapixels; images cut into tiles are read faster")
    meaning = np.full(2**16, -1, np.int16)
    meaning[list(index)] = list(index.values())
    names = tuple(map(str, range(number)))
    data = []
    for pairs, part in zip(parts, looks, strict=True):
        shown = (frozenset(index[value] for value in each.seen) - {IGNORE_INDEX} for each in part)
        told = tuple(pair._replace(classes=classes) for pair, classes in zip(pairs, shown, strict=True))
        data.append(SegmentationData(told, names, image_size, mean, std, meaning, white))
    return data


# --- a run's parts


def data_of(args: argparse.Namespace, tell: Callable[[str], object]) -> tuple[SegmentationData, ...]:
    """Training, validation and test part; what there is to say of the files is told, line by line."""
    if args.data is not None:
        return _own(args, tell)
    for flag in ("classes", "mask_values", "val", "test"):
        if (value := getattr(args, flag)) is not None:
            raise DataError(f"`--{flag.replace('_', '-')}` must come with --data, got {value} alone; add --data DIR")
    whole, test = (load_sample(part, **_items(args)) for part in ("train", "test"))
    return *whole.split(_HELD_OUT, seed=args.seed), test


def _own(args: argparse.Namespace, tell: Callable[[str], object]) -> tuple[SegmentationData, ...]:
    values = None if args.mask_values is None else tuple(map(int, args.mask_values.split(",")))
    if values is not None and args.classes not in (None, len(values)):
        raise DataError(
            f"`--classes` must be the number of --mask-values, {len(values)}, got {args.classes}; leave it out"
        )
    given = {flag: folder for flag in ("val", "test") if (folder := getattr(args, flag)) is not None}
    for flag, folder in given.items():
        if Path(folder).resolve() == Path(args.data).resolve():
            raise DataError(f"`--{flag}` must be another folder than --data, got {folder} for both; leave it out")
    folders = args.data, *given.values()
    whole, *others = load_folders(*folders, classes=args.classes, mask_values=values, tell=tell, **_items(args))
    parts = _parts(whole, dict(zip(given, others, strict=True)), args.seed)
    shown = [{place for pair in part.pairs for place in pair.classes} for part in parts]
    for name, classes in zip(("training", "validation", "test"), shown, strict=True):
        if not classes:
            raise DataError(
                f"the {name} images must show a class in their central squares, got 255 alone, which is ignored; "
                "add images that do"
            )
    if absent := [str(place) for place in range(whole.classes) if place not in shown[0]]:
        tell(f"no training image has class {listed(absent, _NAMED)}")
    return parts


def _parts(whole: SegmentationData, parts: dict[str, SegmentationData], seed: int) -> tuple[SegmentationData, ...]:
    """All three, where some may be given: what is not is held out of the whole."""
    missing = [purpose for flag, purpose in (("val", "to validate"), ("test", "to test")) if flag not in parts]
    if len(whole) < 2 + len(missing):
        also = "".join(f", one {purpose}" for purpose in missing)
        ways = ", or give --val DIR and --test DIR" if missing else ""
        raise DataError(
            f"`--data` must hold {2 + len(missing)} images or more: two to train on{also}, got {len(whole)}; "
            f"add images{ways}"
        )
    for flag in ("test", "val"):
        if flag not in parts:
            whole, parts[flag] = whole.split(_HELD_OUT, seed=seed)
    return whole, parts["val"], parts["test"]


def _items(args: argparse.Namespace) -> dict[str, Any]:
    """The items' side, and the normalisation that the student's weights want."""
    mean, std = normalisation(args.student_encoder)
    return {"image_size": args.image_size, "mean": mean, "std": std}


def classes_for(teacher: str | None, data: SegmentationData) -> int:
    """Output channels: one for a binary teacher, else one a class."""
    return 1 if teacher is not None and data.classes == 2 and classes_of(teacher) == 1 else data.classes  # noqa: PLR2004  # two classes are a binary mask


def normalisation(encoder_name: str) -> tuple[Triple, Triple]:
    """Mean and standard deviation that an encoder's ImageNet weights want, of RGB in [0, 1]; from timm's records.

    Most weights that it does not know were trained with the usual constants. smp's own `get_preprocessing_params` says
    the same, but asks a model hub.
    """
    try:
        record = get_pretrained_cfg(timm_name(encoder_name), allow_unregistered=False)
    except RuntimeError:
        return IMAGENET_NORMALISATION
    return tuple(record.mean), tuple(record.std)


def timm_name(encoder_name: str) -> str:
    """Name in timm of the model whose weights smp gives the encoder."""
    # smp's `timm-efficientnet-b0` is the TensorFlow port, in timm `tf_efficientnet_b0`.
    name = re.sub(r"^timm-efficientnet-", "tf_efficientnet_", encoder_name)
    return re.sub(r"^(timm|tu)-", "", name)
