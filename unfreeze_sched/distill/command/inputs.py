"""The data of a run in its three parts, and what follows from it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unfreeze_sched._checks import listed
from unfreeze_sched.distill.checkpoints import classes_of
from unfreeze_sched.distill.command.data import SegmentationData, load_folders, load_sample
from unfreeze_sched.distill.command.files import DataError
from unfreeze_sched.distill.command.imagenet import IMAGENET_NORMALISATION, normalisation

_HELD_OUT = 0.2  # of the images for the test, and of the rest for validation
_NAMED = 10  # classes in one line

Parts = tuple[SegmentationData, SegmentationData, SegmentationData]


def data_of(args: argparse.Namespace, tell: Callable[[str], object]) -> Parts:
    """Training, validation and test part; what there is to say of the files is told, line by line."""
    if args.data is not None:
        return _own(args, tell)
    for flag in ("classes", "mask_values", "val", "test"):
        if (value := getattr(args, flag)) is not None:
            raise DataError(f"`--{flag.replace('_', '-')}` must come with --data, got {value} alone; add --data DIR")
    whole, test = (load_sample(part, **_items(args)) for part in ("train", "test"))
    return *whole.split(_HELD_OUT, seed=args.seed), test


def _own(args: argparse.Namespace, tell: Callable[[str], object]) -> Parts:
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


def _parts(whole: SegmentationData, parts: dict[str, SegmentationData], seed: int) -> Parts:
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
    try:
        mean, std = normalisation(args.student_encoder)
    except ValueError:  # a name that timm does not know; most of these weights were trained with the usual constants
        mean, std = IMAGENET_NORMALISATION
    return {"image_size": args.image_size, "mean": mean, "std": std}


def classes_for(teacher: str | None, data: SegmentationData) -> int:
    """Output channels: one for a binary teacher, else one a class."""
    return 1 if teacher is not None and data.classes == 2 and classes_of(teacher) == 1 else data.classes  # noqa: PLR2004  # two classes are a binary mask
