"""`unfreeze-sched plan`: from arguments to a table, JSON or a picture; torch is imported for `--encoder` alone."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from unfreeze_sched._checks import one_line, short
from unfreeze_sched.arguments import add_flags, integer, number, overrides, preset_from, spellings
from unfreeze_sched.plan.phases import STATES, Measured, Plan, make_plan
from unfreeze_sched.plan.table import as_text
from unfreeze_sched.schedule import RatePreset, UnfreezeSchedule

# No network has more, and a table of more rows is read by nobody.
_MOST_BLOCKS = 1_000
_MOST_EPOCHS = 10**9
_MOST_PIXELS = 2**16
_SUFFIXES = (".png", ".pdf", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command; each longer one has a dashed and an underscored spelling."""
    parser.add_argument(
        *spellings("total_epochs"),
        type=integer(1, most=_MOST_EPOCHS),
        metavar="N",
        help="epochs of the run; may be left out where --schedule states it",
    )
    parser.add_argument("--json", action="store_true", help="print JSON: the fields of unfreeze_sched.plan.phases.Plan")
    parser.add_argument("--plot", metavar="FILE", help=f"draw blocks over epochs ({', '.join(_SUFFIXES)})")

    network = parser.add_argument_group("network", "one of the first two is required")
    which = network.add_mutually_exclusive_group(required=True)
    which.add_argument("--blocks", type=integer(1, most=_MOST_BLOCKS), metavar="N", help="the encoder's blocks")
    which.add_argument("--encoder", metavar="NAME", help="smp's name of an encoder (of a Unet), or timm's of a model")
    network.add_argument(
        *spellings("image_size"), type=_size, metavar="N", help="side in pixels, or HxW (default: the model's, or 224)"
    )
    network.add_argument(
        *spellings("batch_size"), type=integer(1, most=2**20), default=8, metavar="N", help="default: 8"
    )
    network.add_argument("--optimizer", choices=[*STATES], default="adamw", help="whose state counts (default: adamw)")
    network.add_argument("--lr", type=number(), default=1e-3, metavar="X", help="of the head (default: 0.001)")

    unfreezing = parser.add_argument_group("schedule", "the medium preset, if nothing else is said")
    source = unfreezing.add_mutually_exclusive_group()
    add_flags(source, "unfreeze_preset")
    source.add_argument(
        *spellings("n_images"),
        type=integer(1),
        metavar="N",
        help="the preset for so many training images, as preset_for chooses it",
    )
    source.add_argument("--schedule", metavar="FILE", help="JSON or YAML of a preset, or of a whole UnfreezeSchedule")
    further = ("unfreeze_layer_decay", "unfreeze_norms", "unfreeze_on_refreeze")
    add_flags(
        unfreezing,
        "progressive_unfreeze",
        "unfreeze_start",
        "unfreeze_rate",
        "learning_rate_scale",
        *further,
        short=True,
    )


def run(args: argparse.Namespace) -> None:
    """Carry out what the arguments ask for.

    Raises:
        ValueError, OSError, ModuleNotFoundError: With one line that says what was wrong and what to do.
    """
    plot = None if args.plot is None else _plotter(Path(args.plot))
    stated = {} if args.schedule is None else _read(args.schedule)
    if args.encoder is None:
        _schedule(args, stated, args.blocks)
        measured, blocks = None, args.blocks
    else:
        _schedule(args, stated, None)  # what can be refused before the model is built
        measured = _measure(args)
        blocks = len(measured.names)
    plan = make_plan(
        _schedule(args, stated, blocks),
        args.lr,
        args.unfreeze_layer_decay or 1.0,
        drops=args.unfreeze_on_refreeze == "drop",
        measured=measured,
    )
    if plot is not None:
        _draw(plot, plan, args.plot)
    print(plan.model_dump_json(indent=2) if args.json else as_text(plan, args.plot))  # noqa: T201  # a command's voice


def _measure(args: argparse.Namespace) -> Measured:
    from unfreeze_sched.plan.memory import measure  # noqa: PLC0415  # torch, where it is needed

    return measure(args.encoder, args.image_size, args.batch_size, args.optimizer, args.unfreeze_norms or "eval")


def _schedule(args: argparse.Namespace, stated: dict[str, Any], blocks: int | None) -> UnfreezeSchedule:
    """The schedule for so many blocks, or as far as it can be checked where their number is not known yet."""
    asked = {"total_blocks": blocks, "total_epochs": args.total_epochs}
    known = {key: value for key, value in asked.items() if value is not None}
    flags = overrides(args) if stated else {}  # a preset of the flags has them already
    if "preset" not in stated:
        if args.total_epochs is None:
            raise ValueError(
                "`--total-epochs` must be given, got none; pass the number of epochs of the run, such as 50"
            )
        stated = {"preset": stated or _preset(args)}
    try:
        schedule = UnfreezeSchedule.model_validate({"total_blocks": _MOST_BLOCKS, **known, **stated})
        _refuse_others(schedule, known, args)
        return schedule.replace(preset=schedule.preset.replace(**flags)) if flags else schedule
    except ValueError as error:
        if args.schedule is None:
            raise
        text = one_line(error) if isinstance(error, ValidationError) else str(error)
        raise ValueError(f"{args.schedule}: {text}") from error


def _preset(args: argparse.Namespace) -> RatePreset | None:
    """The preset that the flags ask for."""
    asked = {**vars(args), "progressive_unfreeze": True}
    if args.n_images is not None:
        asked["unfreeze_preset"] = "auto"
    return preset_from(argparse.Namespace(**asked), args.n_images)


def _refuse_others(schedule: UnfreezeSchedule, known: dict[str, int], args: argparse.Namespace) -> None:
    """Refuse a file's totals where they are not the command line's, or the encoder's."""
    sources = {
        "total_blocks": f"the number of blocks of {args.encoder}" if args.encoder else "--blocks",
        "total_epochs": "--total-epochs",
    }
    for key, value in known.items():
        if getattr(schedule, key) != value:
            raise ValueError(
                f"`{key}` must be {value}, {sources[key]}, got {getattr(schedule, key)}; "
                "change it, or keep the preset alone in the file"
            )


def _read(name: str) -> dict[str, Any]:
    """The mapping that a file holds."""
    path = Path(name)
    is_yaml = path.suffix.lower() in {".yaml", ".yml"}
    load = _yaml_loader() if is_yaml else partial(json.loads, object_pairs_hook=_unique)
    try:
        value = load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"`--schedule` must be a readable file, got {name} ({error.strerror}); check the path"
        ) from error
    except (ValueError, RecursionError) as error:
        kind = "YAML" if is_yaml else "JSON"
        reason = str(error) if not isinstance(error, RecursionError) else "nested too deeply"
        raise ValueError(
            f"{name}: must be {kind}, got what does not parse ({reason}); write {_EXAMPLES[is_yaml]}"
        ) from error
    if not isinstance(value, dict) or not ({"kind", "preset"} & value.keys()):
        shown = f"keys {', '.join(map(str, value))[:80]}" if isinstance(value, dict) and value else short(value)
        raise ValueError(
            f"{name}: must hold a preset, with `kind`, or a schedule, with `preset`, got {shown}; "
            f"write {_EXAMPLES[is_yaml]}"
        )
    return value


_EXAMPLES = (
    '{"kind": "rate", "unfreeze_start_epoch": 10, "unfreeze_rate": 5}',
    "lines such as `kind: rate` and `unfreeze_rate: 5`",
)


def _yaml_loader() -> Callable[[str], Any]:
    try:
        yaml = importlib.import_module("yaml")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "`--schedule` needs PyYAML for a YAML file, which is not installed; pip install pyyaml, or write JSON"
        ) from error

    base: Any = yaml.SafeLoader

    class Loader(base):  # type: ignore[misc]  # imported on use
        """Takes no key twice, and no alias, of which a few lines unfold to gigabytes."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError(f"the alias *{self.peek_event().anchor}")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            _unique([(str(key.value), None) for key, _ in node.value])
            return super().construct_mapping(node, deep)

    def load(text: str) -> Any:
        try:
            return yaml.load(text, Loader)  # a SafeLoader
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error

    return load


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A mapping of pairs whose keys differ: of two values for one key a loader would take the last in silence."""
    keys = [key for key, _ in pairs]
    if twice := [key for index, key in enumerate(keys) if key in keys[:index]]:
        raise ValueError(f"the key {short(twice[0])} twice")
    return dict(pairs)


def _plotter(path: Path) -> Any:
    """The module that draws, once the path has been found fit, so that no model is planned for nothing."""
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"`--plot` must end in one of {', '.join(_SUFFIXES)}, got {path}; name it plan.png")
    if path.is_dir() or not path.parent.is_dir():
        reason = "a folder" if path.is_dir() else f"no folder {path.parent}"
        raise ValueError(f"`--plot` must be a file that can be written, got {path} ({reason}); name another")
    try:
        return importlib.import_module("unfreeze_sched.plan.plot")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"`--plot` needs {(error.name or '').split('.')[0]}, which is not installed; pip install matplotlib"
        ) from error


def _draw(plotter: Any, plan: Plan, name: str) -> None:
    try:
        plotter.draw(plan, Path(name))
    except OSError as error:
        raise ValueError(
            f"`--plot` must be a file that can be written, got {name} ({error.strerror}); name another"
        ) from error


def _size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    side = integer(1, most=_MOST_PIXELS)
    try:
        height, width = map(side, sides * 2 if len(sides) == 1 else sides)
    except (argparse.ArgumentTypeError, ValueError):
        raise argparse.ArgumentTypeError(
            f"must be a side in pixels or HxW, up to {_MOST_PIXELS}, got {short(text)}"
        ) from None
    return height, width
