"""The data of a run in its three parts, and what follows from it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from unfreeze_sched._checks import listed
from unfreeze_sched.distill.checkpoints import classes_of
from unfreeze_sched.distill.command.data import SegmentationData, load_folders, load_sample
from unfreeze_sched.distill.command.files import DataError
from unfreeze_sched.distill.command.imagenet import IMAGENET_NORMALISATION, Normalisation, normalisation

# A fifth of the training images validates; of a folder a fifth is set aside as the test part first.
_HELD_OUT = 0.2
_NAMED = 10  # classes in one line

Parts = tuple[SegmentationData, SegmentationData, SegmentationData]


def data_of(args: argparse.Namespace, tell: Callable[[str], object]) -> Parts:
    """Training, validation and test part; what there is to say of the files is told, line by line."""
    if args.data is not None:
        return _own(args, tell)
    for flag in ("classes", "mask_values", "val", "test"):
        if (value := getattr(args, flag)) is not None:
            raise DataError(f"`--{flag.replace('_', '-')}` must come with --data, got {value} alone; add --data DIR")
    mean, std = _normalisation(args.student_encoder)
    whole, test = (load_sample(part, image_size=args.image_size, mean=mean, std=std) for part in ("train", "test"))
    return *whole.split(_HELD_OUT, seed=args.seed), test


def _own(args: argparse.Namespace, tell: Callable[[str], object]) -> Parts:
    values = None if args.mask_values is None else tuple(map(int, args.mask_values.split(",")))
    if values is not None and args.classes not in (None, len(values)):
        raise DataError(
            f"`--classes` must be the number of --mask-values, {len(values)}, got {args.classes}; leave it out"
        )
    stated = {flag: getattr(args, flag) for flag in ("val", "test") if getattr(args, flag) is not None}
    for flag, folder in stated.items():
        if Path(folder).resolve() == Path(args.data).resolve():
            raise DataError(f"`--{flag}` must be another folder than --data, got {folder} for both; leave it out")
    mean, std = _normalisation(args.student_encoder)
    whole, *others = load_folders(
        args.data,
        *stated.values(),
        classes=args.classes,
        mask_values=values,
        image_size=args.image_size,
        mean=mean,
        std=std,
        tell=tell,
    )
    parts = dict(zip(stated, others, strict=True))
    missing = [name for flag, name in (("val", "to validate"), ("test", "to test")) if flag not in parts]
    if len(whole) < 2 + len(missing):
        also = "".join(f", one {name}" for name in missing)
        ways = " or give --val DIR and --test DIR" if missing else ""
        raise DataError(
            f"`--data` must hold {2 + len(missing)} images or more: two to train on{also}, got {len(whole)}; "
            f"add images{ways and ','}{ways}"
        )
    if "test" not in parts:
        whole, parts["test"] = whole.split(_HELD_OUT, seed=args.seed)
    if "val" not in parts:
        whole, parts["val"] = whole.split(_HELD_OUT, seed=args.seed)
    result = whole, parts["val"], parts["test"]
    shown = [{place for pair in part.pairs for place in pair.classes} for part in result]
    for name, classes in zip(("training", "validation", "test"), shown, strict=True):
        if not classes:
            raise DataError(
                f"the {name} images must show a class in their central squares, got 255 alone, which is ignored; "
                "add images that do"
            )
    if absent := [str(place) for place in range(whole.classes) if place not in shown[0]]:
        tell(f"no training image has class {listed(absent, _NAMED)}")
    return result


def _normalisation(encoder: str) -> Normalisation:
    try:
        return normalisation(encoder)
    except ValueError:  # a name that timm does not know; most of these weights were trained with the usual constants
        return IMAGENET_NORMALISATION


def classes_for(teacher: str | None, data: SegmentationData) -> int:
    """Output channels: one for a binary teacher, else one a class."""
    return 1 if teacher is not None and data.classes == 2 and classes_of(teacher) == 1 else data.classes  # noqa: PLR2004  # two classes are a binary mask
