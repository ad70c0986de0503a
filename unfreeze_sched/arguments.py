"""Flags for an existing script, and what turns them into an unfreezer; adding and parsing them needs no torch.

A value is None where its flag was not given, so that a flag can override a preset's value, or the script's default.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from math import inf
from typing import TYPE_CHECKING, Any

from unfreeze_sched._checks import short
from unfreeze_sched.schedule import PRESETS, MilestonePreset, RatePreset, UnfreezeSchedule, preset_for

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from unfreeze_sched.model import Block
    from unfreeze_sched.unfreezer import ProgressiveUnfreezer


def checked(convert: Callable[[str], Any], fits: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    """An argparse type: what `convert` makes of a text, where that fits; else the error says what was wanted."""

    def parse(text: str) -> Any:
        with suppress(ValueError):
            if fits(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {short(text)}")

    return parse


def integer(minimum: int, of: int = 1, most: float = inf) -> Callable[[str], int]:
    """An argparse type: an integer from `minimum` to `most`, a multiple of `of`."""
    more = (f" and a multiple of {of}" if of > 1 else "") + (f" and at most {most}" if most < inf else "")
    wanted = f"an integer of at least {minimum}{more}"
    return checked(int, lambda value: minimum <= value <= most and value % of == 0, wanted)


def number(most: float = inf) -> Callable[[str], float]:
    """An argparse type: a finite number above 0, up to `most`."""
    wanted = "a number above 0" + (f" and at most {most:g}" if most < inf else "")
    return checked(float, lambda value: 0 < value <= most and value < inf, wanted)


def add_flag(group: Any, usage: str, text: str, **options: Any) -> None:
    """Add a flag to a parser or group by its usage, `--name METAVAR` or `--switch`, and its help.

    A name with an underscore has a dashed spelling too; a default is told where the text does not tell of one.
    """
    words = usage.split()
    names = [word for word in words if word.startswith("--")]
    if metavar := words[len(names) :]:
        options["metavar"] = metavar[0]
    elif "choices" not in options:
        options["action"] = "store_true"
    if options.get("default") is not None and "default" not in text:
        text += " (default: %(default)s)"
    spelt = dict.fromkeys(spelling for name in names for spelling in (name, name.replace("_", "-")))
    group.add_argument(*spelt, help=text, **options)


NORMS = ("eval", "frozen", "fixed", "train")
NORMS_HELP = (
    "norm layers: in evaluation while their block is frozen (eval, the default), for good (frozen), for good and batch "
    "norms' weights untrained (fixed), or never (train)"
)
PRESET_FLAGS = ("progressive_unfreeze", "unfreeze_preset", "unfreeze_start", "unfreeze_rate", "learning_rate_scale")

# By destination: metavar, help, options. Names that a training script may well have itself (--layer-decay, --norms)
# begin with `unfreeze_`; all but those of the preset are the unfreezer's keywords behind it.
_FLAGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "progressive_unfreeze": ("", "by the medium preset", {}),
    "unfreeze_preset": ("", "for fewer than 1,000, up to 10,000, or more images", {"choices": [*PRESETS]}),
    "unfreeze_start": ("EPOCH", "0-based epoch of the first block", {"type": integer(0)}),
    "unfreeze_rate": ("EPOCHS", "epochs from one block to the next", {"type": integer(1)}),
    "learning_rate_scale": ("X", "blocks' learning rate over the head's, in (0, 1]", {"type": number(1)}),
    "unfreeze_layer_decay": ("X", "ratio of a block's rate to the next deeper one's, in (0, 1]", {"type": number(1)}),
    "unfreeze_no_decay": ("", "no weight decay for the blocks' norms and biases", {"default": None}),
    "unfreeze_warmup_steps": ("N", "optimizer steps over which a joining block's rate rises", {"type": integer(0)}),
    "unfreeze_norms": ("MODE", NORMS_HELP, {"choices": NORMS}),
    "unfreeze_on_refreeze": ("MODE", "keep (default) or drop a refrozen block's state", {"choices": ["keep", "drop"]}),
    "unfreeze_membership": ("", "blocks' groups: late (default), or empty now", {"choices": ["late", "declared"]}),
}


def add_unfreeze_arguments(parser: argparse.ArgumentParser, *, auto: bool = False) -> None:
    """Add the flags of progressive unfreezing to a script's parser; each has its dashed and its underscored spelling.

    Any `--preset` or `--unfreeze_*` flag implies `--progressive_unfreeze`, without which the encoder trains from epoch
    0. Where the parser has a `--preset` of its own, ours is `--unfreeze_preset` alone.

    Args:
        parser: The script's parser, any time before it parses.
        auto: Also offer `--preset auto`, by the number of training images; then pass `n_images` later on.

    Raises:
        ValueError: The parser has one of the flags already.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_unfreeze_arguments(parser)
        >>> parser.parse_args(["--preset", "large", "--unfreeze_start", "3"]).unfreeze_start
        3
    """
    implied = "any --preset or --unfreeze_* flag unfreezes progressively; without one the encoder trains from epoch 0"
    add_flags(parser.add_argument_group("progressive unfreezing", implied), *_FLAGS, auto=auto)


def add_flags(group: Any, *names: str, auto: bool = False, short: bool = False) -> None:
    """Add some of the flags to a parser or group, by destination; `short` ones without the prefix too, for our own."""
    for name in names:
        metavar, text, options = _FLAGS[name]
        if auto and name == "unfreeze_preset":
            text, options = "auto goes by the number of training images", {"choices": [*PRESETS, "auto"]}
        attempts = [f"--{name.removeprefix('unfreeze_')} --{name}" if short else f"--{name}"]
        if name == "unfreeze_preset":
            attempts.insert(0, "--preset")
        for attempt in attempts:
            with suppress(argparse.ArgumentError):  # the parser has it
                add_flag(group, f"{attempt} {metavar}", text, dest=name, **options)
                break
        else:
            raise ValueError(
                f"`parser` must leave --{name} free, got one that has it; "
                "call add_unfreeze_arguments once, or rename your own flag"
            )


def preset_from(args: argparse.Namespace, n_images: int | None = None) -> RatePreset | None:
    """The preset that the flags ask for, each overriding the preset's value; None where they ask for none."""
    asked = vars(args)
    if not asked.keys() >= {"progressive_unfreeze", "unfreeze_preset"}:
        raise ValueError(
            "`args` must come from a parser that has the unfreezing flags, got none of 'progressive_unfreeze'; "
            "call add_unfreeze_arguments(parser) before it parses"
        )
    implying = [asked.get(name) for name in _FLAGS if name != "learning_rate_scale"]
    if all(value is None or value is False for value in implying):
        return None
    if args.unfreeze_preset != "auto":
        preset = PRESETS[args.unfreeze_preset or "medium"]
    elif n_images is None:
        raise ValueError("`n_images` must be given for --preset auto, got None; pass the number of training images")
    else:
        preset = preset_for(n_images)
    return preset.replace(**overrides(args))


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The preset's fields that flags override."""
    start, rate, scale = args.unfreeze_start, args.unfreeze_rate, args.learning_rate_scale
    fields = {"unfreeze_start_epoch": start, "unfreeze_rate": rate, "learning_rate_scale": scale}
    return {name: value for name, value in fields.items() if value is not None}


def unfreezer_from_args(
    args: argparse.Namespace,
    model_or_blocks: nn.Module | Iterable[Block],
    optimizer: Optimizer,
    lr_schedulers: Sequence[Any] | None = (),
    *,
    total_epochs: int,
    n_images: int | None = None,
    head: Iterable[nn.Module | nn.Parameter] | Optimizer | None = None,
    **keywords: Any,
) -> ProgressiveUnfreezer:
    """The unfreezer that the flags ask for; where they ask for none, one that unfreezes all blocks at epoch 0.

    So the loop is the same either way: `unfreezer.apply(epoch)` before each epoch. Without progressive unfreezing the
    blocks' learning rate is the head's, times the `--learning_rate_scale` if that is given.

    Args:
        args: The parsed arguments of a parser that `add_unfreeze_arguments` was called on.
        model_or_blocks: The model, whose blocks `encoder_blocks` finds, or the blocks, shallow to deep.
        optimizer: The live optimizer; it holds the head's parameters, and none of the blocks'.
        lr_schedulers: All the LR schedulers of the optimizer; None says that there is none.
        total_epochs: Number of epochs of the run, at least 1.
        n_images: Number of training images, for `--preset auto`.
        head: What trains from the start, as for `encoder_blocks`; left out where blocks are given.
        **keywords: Further ones of `ProgressiveUnfreezer`: the script's own defaults, which a flag overrides.

    Raises:
        TypeError, ValueError: As the constructor of `ProgressiveUnfreezer`; also a schedule that does not fit the run.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> parser = argparse.ArgumentParser()
        >>> add_unfreeze_arguments(parser)
        >>> args = parser.parse_args(["--unfreeze_start", "1"])
        >>> optimizer = torch.optim.SGD(net[1].parameters(), lr=1.0)
        >>> unfreezer = unfreezer_from_args(args, net, optimizer, total_epochs=3, head=optimizer)
        >>> [bool(unfreezer.apply(epoch)) for epoch in range(3)]
        [False, True, False]
    """
    from torch import nn  # noqa: PLC0415  # the parser needs none of it

    from unfreeze_sched.model import encoder_blocks  # noqa: PLC0415  # likewise
    from unfreeze_sched.model.block import validate_blocks  # noqa: PLC0415  # likewise
    from unfreeze_sched.unfreezer import ProgressiveUnfreezer  # noqa: PLC0415  # likewise

    preset: RatePreset | MilestonePreset | None = preset_from(args, n_images)
    if isinstance(model_or_blocks, nn.Module):
        blocks = encoder_blocks(model_or_blocks, head=head)
    elif head is None:
        blocks = validate_blocks(model_or_blocks)
    else:
        raise ValueError("`head` must be left out where blocks are given, got both; what is in no block is head")
    if preset is None:
        preset = MilestonePreset(milestones={0: len(blocks)}, learning_rate_scale=1.0)
    schedule = UnfreezeSchedule(preset=preset, total_blocks=len(blocks), total_epochs=total_epochs)
    values = {name.removeprefix("unfreeze_"): vars(args).get(name) for name in _FLAGS if name not in PRESET_FLAGS[:-1]}
    given = {keyword: value for keyword, value in values.items() if value is not None}
    with warnings.catch_warnings():
        if preset.learning_rate_scale == 1 and "learning_rate_scale" not in given:
            # Full fine-tuning at one rate is what a script without the flags does; nobody asked for a lower one.
            warnings.filterwarnings("ignore", message="`learning_rate_scale` should be below 1")
        return ProgressiveUnfreezer(blocks, optimizer, schedule, lr_schedulers, **{**keywords, **given})
