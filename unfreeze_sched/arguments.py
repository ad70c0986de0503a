"""Flags for an existing script, `add_unfreeze_arguments`, and what turns them into an unfreezer, `unfreezer_from_args`.

Adding and parsing them needs no torch, so that `--help` and a wrong flag are answered at once. All values are None
where the flag was not given, so that a flag can override a preset's value, or the script's own default.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from unfreeze_sched._checks import short
from unfreeze_sched.schedule import PRESETS, MilestonePreset, RatePreset, UnfreezeSchedule, preset_for

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from unfreeze_sched.model import Block
    from unfreeze_sched.unfreezer import ProgressiveUnfreezer

IMPLIES = "any --preset or --unfreeze_* flag unfreezes progressively; without one the encoder trains from epoch 0"


def integer(minimum: int, of: int = 1, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer from `minimum` to `most`, a multiple of `of`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum or value % of or (most is not None and value > most):
            more = (f" and a multiple of {of}" if of > 1 else "") + ("" if most is None else f" and at most {most}")
            raise argparse.ArgumentTypeError(f"must be an integer of at least {minimum}{more}, got {short(text)}")
        return value

    return parse


def number(most: float = float("inf")) -> Callable[[str], float]:
    """An argparse type: a finite number above 0, up to `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value <= most or value == float("inf"):
            bound = "" if most == float("inf") else f" and at most {most:g}"
            raise argparse.ArgumentTypeError(f"must be a number above 0{bound}, got {short(text)}")
        return value

    return parse


def spellings(name: str) -> tuple[str, ...]:
    """`--a_b` and `--a-b`, or `--a` alone.

    Example:
        >>> spellings("unfreeze_start")
        ('--unfreeze_start', '--unfreeze-start')
    """
    return tuple(dict.fromkeys(("--" + name, "--" + name.replace("_", "-"))))


class _Flag(NamedTuple):
    keyword: str | None  # of ProgressiveUnfreezer; None for what goes into the preset
    short: str | None  # a second name, for a parser of our own
    options: dict[str, Any]


# By destination. Names that a training script may well have itself (--layer-decay, --warmup-steps, --norms) begin with
# `unfreeze_`; --preset is the contract's own name, and gives way where it is taken.
_FLAGS = {
    "progressive_unfreeze": _Flag(None, None, {"action": "store_true", "help": "by the medium preset"}),
    "unfreeze_preset": _Flag(
        None, None, {"choices": [*PRESETS], "help": "for fewer than 1,000, up to 10,000, or more images"}
    ),
    "unfreeze_start": _Flag(
        None, None, {"type": integer(0), "metavar": "EPOCH", "help": "0-based epoch of the first block"}
    ),
    "unfreeze_rate": _Flag(
        None, None, {"type": integer(1), "metavar": "EPOCHS", "help": "epochs from one block to the next"}
    ),
    "learning_rate_scale": _Flag(
        "learning_rate_scale",
        None,
        {"type": number(1.0), "metavar": "X", "help": "blocks' learning rate over the head's, in (0, 1]"},
    ),
    "unfreeze_layer_decay": _Flag(
        "layer_decay",
        "layer_decay",
        {"type": number(1.0), "metavar": "X", "help": "ratio of a block's rate to the next deeper one's, in (0, 1]"},
    ),
    "unfreeze_no_decay": _Flag(
        "no_decay",
        None,
        {"action": "store_true", "default": None, "help": "no weight decay for the blocks' norms and biases"},
    ),
    "unfreeze_warmup_steps": _Flag(
        "warmup_steps",
        None,
        {"type": integer(0), "metavar": "N", "help": "optimizer steps over which a joining block's rate rises"},
    ),
    "unfreeze_norms": _Flag(
        "norms",
        "norms",
        {
            "choices": ["eval", "frozen", "fixed", "train"],
            "metavar": "MODE",
            "help": "norm layers: in evaluation while their block is frozen (eval, the default), for good (frozen), "
            "for good and batch norms' weights untrained (fixed), or never (train)",
        },
    ),
    "unfreeze_on_refreeze": _Flag(
        "on_refreeze",
        "on_refreeze",
        {
            "choices": ["keep", "drop"],
            "metavar": "MODE",
            "help": "keep (the default) or drop the optimizer state of a block that is frozen again",
        },
    ),
    "unfreeze_membership": _Flag(
        "membership",
        None,
        {
            "choices": ["late", "declared"],
            "help": "blocks' groups: made as they join (late, the default), or empty now",
        },
    ),
}


def add_unfreeze_arguments(parser: argparse.ArgumentParser, *, auto: bool = False) -> None:
    """Add the flags of progressive unfreezing to a script's parser; each has its dashed and its underscored spelling.

    `--progressive_unfreeze`, `--preset`, `--unfreeze_start`, `--unfreeze_rate`, `--learning_rate_scale`,
    `--unfreeze_layer_decay`, `--unfreeze_no_decay`, `--unfreeze_warmup_steps`, `--unfreeze_norms`,
    `--unfreeze_on_refreeze` and `--unfreeze_membership`. Any `--preset` or `--unfreeze_*` flag implies
    `--progressive_unfreeze`, without which the encoder trains from epoch 0. Where the parser has a `--preset` of its
    own, ours is `--unfreeze_preset` alone.

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
    add_flags(parser.add_argument_group("progressive unfreezing", IMPLIES), *_FLAGS, auto=auto)


def add_flags(group: Any, *names: str, auto: bool = False, short: bool = False) -> None:
    """Add some of the flags to a parser or group.

    Args:
        group: Where they are listed.
        names: Their destinations.
        auto: As for `add_unfreeze_arguments`.
        short: Also without the prefix `unfreeze_`, for a parser of our own.
    """
    for name in names:
        flag = _FLAGS[name]
        options = dict(flag.options)
        if auto and name == "unfreeze_preset":
            options |= {"choices": [*PRESETS, "auto"], "help": "auto goes by the number of training images"}
        attempts = [spellings(name)]
        if name == "unfreeze_preset":
            attempts.insert(0, spellings("preset"))
        elif short and flag.short:
            attempts = [(*spellings(flag.short), *spellings(name))]
        _add_first_free(group, attempts, dest=name, **options)


def _add_first_free(group: Any, attempts: list[tuple[str, ...]], **options: Any) -> None:
    """Add a flag by the first names that the parser does not have yet."""
    for names in attempts:
        try:
            group.add_argument(*names, **options)
        except argparse.ArgumentError:
            continue
        return
    raise ValueError(
        f"`parser` must leave {attempts[-1][0]} free, got one that has it; "
        "call add_unfreeze_arguments once, or rename your own flag"
    )


def preset_from(args: argparse.Namespace, n_images: int | None = None) -> RatePreset | None:
    """The preset that the flags ask for, each flag overriding the preset's value; None where they ask for none.

    Args:
        args: The parsed arguments.
        n_images: Number of training images, for `auto`.

    Raises:
        ValueError: A value that the preset refuses, arguments of another parser, or `auto` without `n_images`.
    """
    asked = vars(args)
    if missing := [name for name in ("progressive_unfreeze", "unfreeze_preset") if name not in asked]:
        raise ValueError(
            f"`args` must come from a parser that has the unfreezing flags, got none of {missing[0]!r}; "
            "call add_unfreeze_arguments(parser) before it parses"
        )
    implying = (name for name in _FLAGS if name.startswith("unfreeze_") or name == "progressive_unfreeze")
    if all(asked.get(name) in (None, False) and type(asked.get(name)) is not int for name in implying):
        return None
    if args.unfreeze_preset == "auto":
        if n_images is None:
            raise ValueError("`n_images` must be given for --preset auto, got None; pass the number of training images")
        preset = preset_for(n_images)
    else:
        preset = PRESETS[args.unfreeze_preset or "medium"]
    return preset.replace(**overrides(args))


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The preset's fields that flags override."""
    flags = {
        "unfreeze_start_epoch": args.unfreeze_start,
        "unfreeze_rate": args.unfreeze_rate,
        "learning_rate_scale": args.learning_rate_scale,
    }
    return {name: value for name, value in flags.items() if value is not None}


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

    So the loop is the same either way: `unfreezer.apply(epoch)` before each epoch.

    Args:
        args: The parsed arguments of a parser that `add_unfreeze_arguments` was called on.
        model_or_blocks: The model, whose blocks `encoder_blocks` finds, or the blocks, shallow to deep.
        optimizer: The live optimizer; it holds the head's parameters, and none of the blocks'.
        lr_schedulers: All the LR schedulers of the optimizer; None says that there is none.
        total_epochs: Number of epochs of the run, at least 1.
        n_images: Number of training images, for `--preset auto`.
        head: What trains from the start, as for `encoder_blocks`; left out where blocks are given.
        **keywords: Further ones of `ProgressiveUnfreezer`: the script's own defaults, which a flag overrides.

    Returns:
        The unfreezer. Without progressive unfreezing its blocks' learning rate is the head's, times the
        `--learning_rate_scale` if that is given.

    Raises:
        TypeError: As the constructor of `ProgressiveUnfreezer`.
        ValueError: As there, and for a schedule that does not fit the run.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> parser = argparse.ArgumentParser()
        >>> add_unfreeze_arguments(parser)
        >>> args = parser.parse_args(["--unfreeze_start", "1"])
        >>> optimizer = torch.optim.SGD(net[1].parameters(), lr=1.0)
        >>> from unfreeze_sched import Block
        >>> unfreezer = unfreezer_from_args(args, [Block("first", (net[0],))], optimizer, total_epochs=3)
        >>> [bool(unfreezer.apply(epoch)) for epoch in range(3)]
        [False, True, False]
    """
    from torch import nn  # noqa: PLC0415  # the parser needs none of it

    from unfreeze_sched.model import encoder_blocks  # noqa: PLC0415  # likewise
    from unfreeze_sched.model.admission import validate_blocks  # noqa: PLC0415  # likewise
    from unfreeze_sched.unfreezer import ProgressiveUnfreezer  # noqa: PLC0415  # likewise

    preset: RatePreset | MilestonePreset | None = preset_from(args, n_images)
    is_model = isinstance(model_or_blocks, nn.Module)
    if head is not None and not is_model:
        raise ValueError("`head` must be left out where blocks are given, got both; what is in no block is head")
    blocks = encoder_blocks(model_or_blocks, head=head) if is_model else validate_blocks(model_or_blocks)  # type: ignore[arg-type]  # told apart by the flag
    if preset is None:
        preset = MilestonePreset(milestones={0: len(blocks)}, learning_rate_scale=1.0)
    schedule = UnfreezeSchedule(preset=preset, total_blocks=len(blocks), total_epochs=total_epochs)
    asked = vars(args)
    given = {flag.keyword: asked[name] for name, flag in _FLAGS.items() if flag.keyword and asked.get(name) is not None}
    with warnings.catch_warnings():
        if preset.learning_rate_scale == 1 and "learning_rate_scale" not in given:
            # Full fine-tuning at one rate is what a script without the flags does; nobody asked for a lower one.
            warnings.filterwarnings("ignore", message="`learning_rate_scale` should be below 1")
        return ProgressiveUnfreezer(blocks, optimizer, schedule, lr_schedulers, **{**keywords, **given})
