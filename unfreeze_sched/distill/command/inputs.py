"""The data of a run in its three parts, and what follows from it."""

from __future__ import annotations

import argparse

from unfreeze_sched.distill.checkpoints import classes_of
from unfreeze_sched.distill.command.data import SegmentationData, load_folder, load_sample
from unfreeze_sched.distill.command.imagenet import IMAGENET_NORMALISATION, Normalisation, normalisation

# A fifth of the training images validates; of a folder a fifth is set aside as the test part first.
_HELD_OUT = 0.2


def data_of(args: argparse.Namespace) -> tuple[SegmentationData, SegmentationData, SegmentationData]:
    """Training, validation and test part."""
    mean, std = _normalisation(args.student_encoder)
    if args.data is None:
        whole, test = (load_sample(part, image_size=args.image_size, mean=mean, std=std) for part in ("train", "test"))
    else:
        folder = load_folder(args.data, image_size=args.image_size, mean=mean, std=std)
        whole, test = folder.split(_HELD_OUT, seed=args.seed)
    training, validation = whole.split(_HELD_OUT, seed=args.seed)
    for part in (training, validation, test):
        part.check()
    return training, validation, test


def _normalisation(encoder: str) -> Normalisation:
    try:
        return normalisation(encoder)
    except ValueError:  # a name that timm does not know; most of these weights were trained with the usual constants
        return IMAGENET_NORMALISATION


def classes_for(teacher: str | None, data: SegmentationData) -> int:
    """Output channels: one for a binary teacher, else one a class."""
    return 1 if teacher is not None and data.classes == 2 and classes_of(teacher) == 1 else data.classes  # noqa: PLR2004  # two classes are a binary mask
