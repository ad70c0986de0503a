"""The arguments of `unfreeze-sched distill`; no torch, so that `--help` and a wrong flag are answered at once."""

from __future__ import annotations

import argparse

from unfreeze_sched._checks import short
from unfreeze_sched.arguments import add_flags, integer, number, preset_from

__all__ = ["add_arguments", "preset_from"]

# Those of the shared flags that the reference run has; `--norms` there asks for no unfreezing.
_FLAGS = ("progressive_unfreeze", "unfreeze_preset", "unfreeze_start", "unfreeze_rate", "learning_rate_scale")

_MOST_CLASSES = 255


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the reference run; the guide's own flags have both spellings, dashed and underscored."""
    parser.epilog = "Your own images and masks: unfreeze_sched/distill/command/your_data.md, in the package."
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        metavar="DIR",
        help="folder with images/ and masks/, each mask named as its image, of class indices or "
        "of 0 and 255; default: the embedded sample",
    )
    data.add_argument("--val", metavar="DIR", help="a folder like it to validate on (default: a fifth of the images)")
    data.add_argument("--test", metavar="DIR", help="a folder like it to test on at the end (default: a fifth)")
    data.add_argument(
        "--classes",
        type=integer(2, most=_MOST_CLASSES),
        metavar="N",
        help="their number, background included (default: as the masks have it)",
    )
    data.add_argument(
        "--mask-values", type=_values, metavar="A,B,...", help="the masks' value of class 0, of class 1 and so on"
    )
    data.add_argument(
        "--image-size",
        type=integer(32, of=32),
        default=128,
        metavar="N",
        help="side in pixels, a multiple of 32 (default: 128)",
    )
    data.add_argument(
        "--batch-size", type=integer(2), default=16, metavar="N", help="of all ranks together (default: 16)"
    )
    data.add_argument(
        "--num-workers",
        type=integer(0, most=1024),
        default=0,
        metavar="N",
        help="processes that read images ahead (default: 0, none)",
    )

    networks = parser.add_argument_group("networks")
    networks.add_argument(
        "--student-encoder",
        default="timm-efficientnet-b0",
        metavar="NAME",
        help="smp's name (default: timm-efficientnet-b0)",
    )
    networks.add_argument(
        "--student-weights", default="imagenet", metavar="W", help="imagenet, none, or a file (default: imagenet)"
    )
    networks.add_argument(
        "--teacher-encoder",
        default="timm-efficientnet-b3",
        metavar="NAME",
        help="smp's name (default: timm-efficientnet-b3)",
    )
    networks.add_argument(
        "--teacher", metavar="PATH", help="the teacher's weights; default: train one first, and keep it"
    )
    networks.add_argument(
        "--teacher-epochs", type=integer(1), metavar="N", help="of a teacher trained first (default: as --epochs)"
    )

    unfreezing = parser.add_argument_group(
        "unfreezing", "any of the first four unfreezes progressively; without them the encoder trains from epoch 0"
    )
    add_flags(unfreezing, *_FLAGS, auto=True)
    unfreezing.add_argument(
        "--norms",
        choices=["eval", "frozen", "fixed", "train"],
        default="eval",
        help="norm layers: in evaluation while their block is frozen (eval, the default), for good (frozen), for good "
        "and batch norms' weights untrained (fixed), or never (train)",
    )
    unfreezing.add_argument(
        "--compare-frozen",
        action="store_true",
        help="also train the same student with its encoder frozen, equally long",
    )
    unfreezing.add_argument(
        "--guard-patience",
        type=integer(1),
        metavar="N",
        help="unfreeze no further once the validation loss was worse N epochs in a row since the last transition",
    )
    unfreezing.add_argument(
        "--guard-restore", action="store_true", help="and bring back the best epoch's weights when it does so"
    )

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=integer(1), default=50, metavar="N", help="default: 50")
    training.add_argument(
        "--lr", type=number(), default=1e-3, metavar="X", help="the head's learning rate (default: 0.001)"
    )
    training.add_argument(
        "--precision",
        choices=["fp32", "bf16", "fp16"],
        default="fp32",
        help="of forward passes; weights and losses are fp32 (default: fp32)",
    )
    training.add_argument(
        "--accumulate",
        type=integer(1),
        default=1,
        metavar="N",
        help="batches whose gradients add up to one step; Dice and batch norms see one batch each (default: 1)",
    )
    training.add_argument(
        "--gradient-clip", type=number(), metavar="X", help="the largest norm of a step's gradients (default: any)"
    )
    training.add_argument(
        "--sync-batchnorm",
        action="store_true",
        help="batch norms of one batch over all ranks, on CUDA; without it each rank's norms see its own images",
    )
    training.add_argument("--seed", type=integer(0, most=2**63 - 1), default=0, metavar="N", help="default: 0")
    training.add_argument("--device", metavar="NAME", help="default: cuda where there is one, else cpu")
    training.add_argument(
        "--resume",
        metavar="DIR",
        help="go on with an interrupted run, by its folder; all else is as it was begun with",
    )
    training.add_argument("--tensorboard", action="store_true", help="also write TensorBoard's events into the folder")
    training.add_argument("--output", metavar="DIR", help="a new folder (default: runs/ and the time)")


def _values(text: str) -> str:
    """The values of classes, checked, and as they were written, since a run's arguments are kept as JSON."""
    try:
        values = [int(word) for word in text.split(",")]
    except ValueError:
        values = []
    if not 1 < len(set(values)) == len(values) <= _MOST_CLASSES or min(values) < 0 or max(values) >= 2**16:
        raise argparse.ArgumentTypeError(
            f"must be 2 to 255 different values from 0 to 65535, such as 0,127,255, got {short(text)}"
        )
    return text
