"""`unfreeze-sched plan`: from arguments to a table, JSON or a picture; torch is imported for `--encoder` alone."""

from __future__ import annotations

import argparse
import importlib
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from unfreeze_sched._checks import one_line, short
from unfreeze_sched.arguments import PRESET_FLAGS, add_flag, add_flags, checked, integer, number, overrides
from unfreeze_sched.plan.phases import STATES, as_text, make_plan
from unfreeze_sched.schedule import PRESETS, UnfreezeSchedule, preset_for

_MOST_PIXELS = 2**16
_SUFFIXES = (".png", ".pdf", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command; each longer one has a dashed and an underscored spelling."""
    total = "epochs of the run; may be left out where --schedule states it"
    add_flag(parser, "--total_epochs N", total, type=integer(1, most=10**9))
    add_flag(parser, "--json", "print JSON: the fields of unfreeze_sched.plan.phases.Plan")
    add_flag(parser, "--plot FILE", f"draw blocks over epochs ({', '.join(_SUFFIXES)})")

    network = parser.add_argument_group("network", "one of the first two is required")
    which = network.add_mutually_exclusive_group(required=True)
    add_flag(which, "--blocks N", "the encoder's blocks", type=integer(1, most=1_000))
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
        from unfreeze_sched.plan.memory import measure  # noqa: PLC0415  # torch, where it is needed

        norms: Any = args.unfreeze_norms or "eval"
        measured = measure(args.encoder, args.image_size, args.batch_size, args.optimizer, norms)
    schedule = _schedule(args, stated, len(measured.parts) - 1 if measured else args.blocks)
    drops = args.unfreeze_on_refreeze == "drop"
    plan = make_plan(schedule, args.lr, args.unfreeze_layer_decay or 1.0, drops=drops, measured=measured)
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
    return _extra("unfreeze_sched.plan.plot", "`--plot` needs matplotlib", "pip install 'unfreeze-sched[plot]'")


def _extra(module: str, need: str, fix: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{need}, which is not installed; {fix}") from error


def _unwritable(path: object, reason: object) -> ValueError:
    return ValueError(f"`--plot` must be a file that can be written, got {path} ({reason}); name another")


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


def _schedule(args: argparse.Namespace, stated: dict[str, Any], blocks: int) -> UnfreezeSchedule:
    asked = {
        "total_blocks": (blocks, f"the number of blocks of {args.encoder}" if args.encoder else "--blocks"),
        "total_epochs": (args.total_epochs, "--total-epochs"),
    }
    for key, (value, source) in asked.items():
        if value is not None and (other := stated.setdefault(key, value)) != value:
            fix = "change it, or keep the preset alone in the file"
            raise ValueError(f"{args.schedule}: `{key}` must be {value}, {source}, got {short(other)}; {fix}")
    try:
        return UnfreezeSchedule.model_validate(stated)
    except ValidationError as error:
        raise ValueError(f"{args.schedule}: {one_line(error)}" if args.schedule else one_line(error)) from error


def _read(name: str) -> dict[str, Any]:
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
        raise ValueError(f"{name}: must be {kind}, got what does not parse ({error}); write {example}") from error
    if not isinstance(value, dict):
        text = f"{name}: must hold a preset, with `kind`, or a schedule, with `preset`, got {short(value)}"
        raise ValueError(f"{text}; write {example}")  # noqa: TRY004  # a file's content
    return value


def _yaml_loader() -> Callable[[str], Any]:
    fix = "pip install 'unfreeze-sched[plan]', or write JSON"
    yaml = _extra("yaml", "`--schedule` needs PyYAML for a YAML file", fix)

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]  # imported on use
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # of which a few lines unfold to gigabytes
                raise ValueError(f"the alias *{self.peek_event().anchor}")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            _unique([(str(key.value), None) for key, _ in node.value])
            return super().construct_mapping(node, deep)

    return partial(yaml.load, Loader=Loader)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of pairs whose keys differ: of two values for one key a loader would take the last in silence."""
    for key, times in Counter(key for key, _ in pairs).items():
        if times > 1:
            raise ValueError(f"the key {short(key)} twice")
    return dict(pairs)
