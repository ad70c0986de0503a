"""The arguments of `unfreeze-sched distill`; no torch, so that `--help` and a wrong flag are answered at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from unfreeze_sched import LARGE, MEDIUM, SMALL, RatePreset, preset_for

_PRESETS = {"small": SMALL, "medium": MEDIUM, "large": LARGE}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the reference run; the guide's own flags have both spellings, dashed and underscored."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", metavar="DIR", help="folder with images/ and masks/ (class-index PNGs); default: the embedded sample"
    )
    data.add_argument(
        "--image-size",
        type=_integer(32, of=32),
        default=128,
        metavar="N",
        help="side in pixels, a multiple of 32 (default: 128)",
    )
    data.add_argument("--batch-size", type=_integer(2), default=16, metavar="N", help="default: 16")

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
        "--teacher-epochs", type=_integer(1), metavar="N", help="of a teacher trained first (default: as --epochs)"
    )

    unfreezing = parser.add_argument_group(
        "unfreezing", "any of the first four unfreezes progressively; without them the encoder trains from epoch 0"
    )
    unfreezing.add_argument(
        "--progressive-unfreeze", "--progressive_unfreeze", action="store_true", help="by the medium preset"
    )
    unfreezing.add_argument("--preset", choices=[*_PRESETS, "auto"], help="auto goes by the number of training images")
    unfreezing.add_argument(
        "--unfreeze-start",
        "--unfreeze_start",
        type=_integer(0),
        metavar="EPOCH",
        help="0-based epoch of the first block",
    )
    unfreezing.add_argument(
        "--unfreeze-rate",
        "--unfreeze_rate",
        type=_integer(1),
        metavar="EPOCHS",
        help="epochs from one block to the next",
    )
    unfreezing.add_argument(
        "--learning-rate-scale", type=_number(1.0), metavar="X", help="blocks' learning rate over the head's, in (0, 1]"
    )
    unfreezing.add_argument(
        "--norms",
        choices=["eval", "frozen", "train"],
        default="eval",
        help="norm layers: in evaluation while their block is frozen (eval, the default), for good (frozen), or never",
    )
    unfreezing.add_argument(
        "--compare-frozen",
        action="store_true",
        help="also train the same student with its encoder frozen, equally long",
    )

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=_integer(1), default=50, metavar="N", help="default: 50")
    training.add_argument(
        "--lr", type=_number(), default=1e-3, metavar="X", help="the head's learning rate (default: 0.001)"
    )
    training.add_argument("--seed", type=_integer(0, most=2**63 - 1), default=0, metavar="N", help="default: 0")
    training.add_argument("--device", metavar="NAME", help="default: cuda where there is one, else cpu")
    training.add_argument(
        "--resume", metavar="DIR", help="go on with an interrupted run, by its folder; all else is as it was begun with"
    )
    training.add_argument("--output", metavar="DIR", help="a new folder (default: runs/ and the time)")


def preset_from(args: argparse.Namespace, n_images: int) -> RatePreset | None:
    """The preset that the flags ask for, each flag overriding the preset's value; None where they ask for none.

    Args:
        args: The parsed arguments.
        n_images: Number of training images, for `auto`.

    Raises:
        ValueError: A value that the preset refuses.
    """
    flags = {
        "unfreeze_start_epoch": args.unfreeze_start,
        "unfreeze_rate": args.unfreeze_rate,
        "learning_rate_scale": args.learning_rate_scale,
    }
    asked = args.preset, args.unfreeze_start, args.unfreeze_rate
    if not args.progressive_unfreeze and all(value is None for value in asked):
        return None
    preset = preset_for(n_images) if args.preset == "auto" else _PRESETS[args.preset or "medium"]
    return preset.replace(**{name: value for name, value in flags.items() if value is not None})


def _integer(minimum: int, of: int = 1, most: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum or value % of or (most is not None and value > most):
            more = (f" and a multiple of {of}" if of > 1 else "") + ("" if most is None else f" and at most {most}")
            raise argparse.ArgumentTypeError(f"must be an integer of at least {minimum}{more}, got {text!r}")
        return value

    return parse


def _number(most: float = float("inf")) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value <= most or value == float("inf"):
            bound = "" if most == float("inf") else f" and at most {most:g}"
            raise argparse.ArgumentTypeError(f"must be a number above 0{bound}, got {text!r}")
        return value

    return parse
