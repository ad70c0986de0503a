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
from unfreeze_sched.arguments import PRESET_FLAGS, add_flag, add_flags, checked, integer, number, overrides
from unfreeze_sched.plan.phases import STATES, as_text, make_plan
from unfreeze_sched.schedule import PRESETS, UnfreezeSchedule, preset_for

# No network has more, and a table of more rows is read by nobody.
_MOST_BLOCKS = 1_000
_MOST_EPOCHS = 10**9
_MOST_PIXELS = 2**16
_SUFFIXES = (".png", ".pdf", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command; each longer one has a dashed and an underscored spelling."""
    total = "epochs of the run; may be left out where --schedule states it"
    add_flag(parser, "--total_epochs N", total, type=integer(1, most=_MOST_EPOCHS))
    add_flag(parser, "--json", "print JSON: the fields of unfreeze_sched.plan.phases.Plan")
    add_flag(parser, "--plot FILE", f"draw blocks over epochs ({', '.join(_SUFFIXES)})")

    network = parser.add_argument_group("network", "one of the first two is required")
    which = network.add_mutually_exclusive_group(required=True)
    add_flag(which, "--blocks N", "the encoder's blocks", type=integer(1, most=_MOST_BLOCKS))
    add_flag(which, "--encoder NAME", "smp's name of an encoder (of a Unet), or timm's of a model")
    wanted = f"a side in pixels or HxW, up to {_MOST_PIXELS}"
    size = checked(_sides, lambda sides: all(0 < side <= _MOST_PIXELS for side in sides), wanted)
    add_flag(network, "--image_size N", "side in pixels, or HxW (default: the model's, or 224)", type=size)
    add_flag(network, "--batch_size N", "images a batch", type=integer(1, most=2**20), default=8)
    add_flag(network, "--optimizer", "whose state counts", choices=[*STATES], default="adamw")
    add_flag(network, "--lr X", "of the head", type=number(), default=1e-3)

    schedule = parser.add_argument_group("schedule", "the medium preset, if nothing else is said")
    source = schedule.add_mutually_exclusive_group()
    add_flags(source, "unfreeze_preset")
    chosen = "the preset for so many training images, as preset_for chooses it"
    add_flag(source, "--n_images N", chosen, type=integer(1))
    add_flag(source, "--schedule FILE", "JSON or YAML of a preset, or of a whole UnfreezeSchedule")
    add_flags(schedule, *(name for name in PRESET_FLAGS if name != "unfreeze_preset"))
    add_flags(schedule, "unfreeze_layer_decay", "unfreeze_norms", "unfreeze_on_refreeze", short=True)


def _sides(text: str) -> tuple[int, int]:
    height, x, width = text.lower().partition("x")
    return int(height), int(width if x else height)


def run(args: argparse.Namespace) -> None:
    """Carry out what the arguments ask for; an error's one line says what was wrong and what to do."""
    plotter = None if args.plot is None else _plotter(Path(args.plot))
    stated, measured = _stated(args), None
    if args.encoder is not None:
        _schedule(args, stated, None)  # what can be refused before the model is built
        from unfreeze_sched.plan.memory import measure  # noqa: PLC0415  # torch, where it is needed

        measured = measure(
            args.encoder, args.image_size, args.batch_size, args.optimizer, args.unfreeze_norms or "eval"
        )
    plan = make_plan(
        _schedule(args, stated, len(measured.names) if measured else args.blocks),
        args.lr,
        args.unfreeze_layer_decay or 1.0,
        drops=args.unfreeze_on_refreeze == "drop",
        measured=measured,
    )
    if plotter is not None:
        try:
            plotter.draw(plan, Path(args.plot))
        except OSError as error:
            raise _unwritable(args.plot, error.strerror) from error
    print(plan.model_dump_json(indent=2) if args.json else as_text(plan, args.plot))  # noqa: T201  # a command's voice


def _plotter(path: Path) -> Any:
    """The module that draws, once the path has been found fit, so that no model is planned for nothing."""
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"`--plot` must end in one of {', '.join(_SUFFIXES)}, got {path}; name it plan.png")
    if path.is_dir() or not path.parent.is_dir():
        raise _unwritable(path, "a folder" if path.is_dir() else f"no folder {path.parent}")
    return _extra("unfreeze_sched.plan.plot", "`--plot` needs matplotlib", "pip install matplotlib")


def _extra(module: str, need: str, fix: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{need}, which is not installed; {fix}") from error


def _unwritable(path: object, reason: object) -> ValueError:
    return ValueError(f"`--plot` must be a file that can be written, got {path} ({reason}); name another")


# --- the schedule


def _stated(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of the schedule as far as the flags or the file state them; a flag overrides the preset's value."""
    if args.schedule is None:
        preset = PRESETS[args.unfreeze_preset or "medium"] if args.n_images is None else preset_for(args.n_images)
        stated: dict[str, Any] = {"preset": preset.replace(**overrides(args))}
    else:
        stated = _read(args.schedule)
        if "preset" not in stated:
            stated = {"preset": stated}
        if isinstance(stated["preset"], dict):
            stated["preset"] |= overrides(args)
    if args.total_epochs is None and "total_epochs" not in stated:
        raise ValueError("`--total-epochs` must be given, got none; pass the number of epochs of the run, such as 50")
    return stated


def _schedule(args: argparse.Namespace, stated: dict[str, Any], blocks: int | None) -> UnfreezeSchedule:
    """The schedule for so many blocks, or as far as it can be checked where their number is not known yet."""
    asked = {
        "total_blocks": (blocks, f"the number of blocks of {args.encoder}" if args.encoder else "--blocks"),
        "total_epochs": (args.total_epochs, "--total-epochs"),
    }
    known = {key: value for key, (value, _) in asked.items() if value is not None}
    try:
        schedule = UnfreezeSchedule.model_validate({"total_blocks": _MOST_BLOCKS, **known, **stated})
    except ValidationError as error:
        raise ValueError(f"{args.schedule}: {one_line(error)}" if args.schedule else one_line(error)) from error
    for key, value in known.items():
        if (other := getattr(schedule, key)) != value:
            fix = "change it, or keep the preset alone in the file"
            raise ValueError(f"{args.schedule}: `{key}` must be {value}, {asked[key][1]}, got {other}; {fix}")
    return schedule


def _read(name: str) -> dict[str, Any]:
    """The mapping that a file holds."""
    path = Path(name)
    if path.suffix.lower() in {".yaml", ".yml"}:
        kind, load, example = "YAML", _yaml_loader(), "lines such as `kind: rate` and `unfreeze_rate: 5`"
    else:
        kind, load = "JSON", partial(json.loads, object_pairs_hook=_unique)
        example = '{"kind": "rate", "unfreeze_start_epoch": 10, "unfreeze_rate": 5}'
    try:
        value = load(path.read_text(encoding="utf-8"))
    except OSError as error:
        text = f"`--schedule` must be a readable file, got {name} ({error.strerror}); check the path"
        raise ValueError(text) from error
    except Exception as error:  # a parser's own, of any kind
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{name}: must be {kind}, got what does not parse ({reason}); write {example}") from error
    if not isinstance(value, dict) or not {"kind", "preset"} & value.keys():
        shown = f"keys {', '.join(map(str, value))[:80]}" if isinstance(value, dict) and value else short(value)
        raise ValueError(
            f"{name}: must hold a preset, with `kind`, or a schedule, with `preset`, got {shown}; write {example}"
        )
    return value


def _yaml_loader() -> Callable[[str], Any]:
    yaml = _extra("yaml", "`--schedule` needs PyYAML for a YAML file", "pip install pyyaml, or write JSON")

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]  # imported on use
        """Takes no key twice, and no alias, of which a few lines unfold to gigabytes."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError(f"the alias *{self.peek_event().anchor}")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            _unique([(str(key.value), None) for key, _ in node.value])
            return super().construct_mapping(node, deep)

    return partial(yaml.load, Loader=Loader)


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A mapping of pairs whose keys differ: of two values for one key a loader would take the last in silence."""
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {short(key)} twice")
        found[key] = value
    return found
