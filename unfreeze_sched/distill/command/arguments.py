"""The arguments of `unfreeze-sched distill`; no torch, so that `--help` and a wrong flag are answered at once."""

from __future__ import annotations

import argparse
from functools import partial

from unfreeze_sched.arguments import NORMS, NORMS_HELP, PRESET_FLAGS, add_flag, add_flags, checked, integer, number

_MOST_CLASSES = 255


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the reference run; the guide's own flags have both spellings, dashed and underscored."""
    parser.epilog = "Your own images and masks: unfreeze_sched/distill/command/your_data.md, in the package."

    add = partial(add_flag, parser.add_argument_group("data"))
    add(
        "--data DIR",
        "folder with images/ and masks/, each mask named as its image, of class indices or of 0 and 255; default: the "
        "embedded sample",
    )
    add("--val DIR", "a folder like it to validate on (default: a fifth of the images)")
    add("--test DIR", "a folder like it to test on at the end (default: a fifth)")
    classes = integer(2, most=_MOST_CLASSES)
    add("--classes N", "their number, background included (default: as the masks have it)", type=classes)
    add("--mask-values A,B,...", "the masks' value of class 0, of class 1 and so on", type=_mask_values)
    add("--image-size N", "side in pixels, a multiple of 32", type=integer(32, of=32), default=128)
    add("--batch-size N", "of all ranks together", type=integer(2), default=16)
    add("--num-workers N", "processes that read images ahead", type=integer(0, most=1024), default=0)

    add = partial(add_flag, parser.add_argument_group("networks"))
    add("--student-encoder NAME", "smp's name", default="timm-efficientnet-b0")
    add("--student-weights W", "imagenet, none, or a file", default="imagenet")
    add("--teacher-encoder NAME", "smp's name", default="timm-efficientnet-b3")
    add("--teacher PATH", "the teacher's weights; default: train one first, and keep it")
    add("--teacher-epochs N", "of a teacher trained first (default: as --epochs)", type=integer(1))

    implied = "any of the first four unfreezes progressively; without them the encoder trains from epoch 0"
    unfreezing = parser.add_argument_group("unfreezing", implied)
    add_flags(unfreezing, *PRESET_FLAGS, auto=True)
    add = partial(add_flag, unfreezing)
    add("--norms", NORMS_HELP, choices=NORMS, default="eval")  # which by itself unfreezes nothing progressively
    add("--compare-frozen", "also train the same student with its encoder frozen, equally long")
    worse = "unfreeze no further once the validation loss was worse N epochs in a row since the last transition"
    add("--guard-patience N", worse, type=integer(1))
    add("--guard-restore", "and bring back the best epoch's weights when it does so")

    add = partial(add_flag, parser.add_argument_group("training"))
    add("--epochs N", "of the run", type=integer(1), default=50)
    add("--lr X", "the head's learning rate", type=number(), default=1e-3)
    precision = "of forward passes; weights and losses are fp32"
    add("--precision", precision, choices=["fp32", "bf16", "fp16"], default="fp32")
    accumulated = "batches whose gradients add up to one step; Dice and batch norms see one batch each"
    add("--accumulate N", accumulated, type=integer(1), default=1)
    add("--gradient-clip X", "the largest norm of a step's gradients (default: any)", type=number())
    add(
        "--sync-batchnorm",
        "batch norms of one batch over all ranks, on CUDA; without it each rank's see its own images",
    )
    add("--seed N", "of weights, splits, orders and augmentation", type=integer(0, most=2**63 - 1), default=0)
    add("--device NAME", "default: cuda where there is one, else cpu")
    add("--resume DIR", "go on with an interrupted run, by its folder; all else is as it was begun with")
    add("--tensorboard", "also write TensorBoard's events into the folder")
    add("--output DIR", "a new folder (default: runs/ and the time)")


def _are_values(text: str) -> bool:
    values = [int(word) for word in text.split(",")]
    return 1 < len(set(values)) == len(values) <= _MOST_CLASSES and min(values) >= 0 and max(values) < 2**16


# They stay as they were written, since a run's arguments are kept as JSON.
_mask_values = checked(str, _are_values, "2 to 255 different values from 0 to 65535, such as 0,127,255")
