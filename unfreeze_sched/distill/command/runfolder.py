"""The folder of a run: new and empty, or that of an interrupted run with the arguments that it was begun with."""

from __future__ import annotations

import argparse
import json
import reprlib
import time
from pathlib import Path
from typing import Any

from unfreeze_sched.distill.command.arguments import add_arguments


def save_arguments(args: argparse.Namespace, output: Path) -> None:
    """Keep the arguments for a resume, which may be started from another folder."""
    for name in ("data", "val", "test", "teacher", "student_weights"):
        value = getattr(args, name)
        if value is not None and Path(value).exists():
            setattr(args, name, str(Path(value).resolve()))
    partial = output / "arguments.json.partial"
    partial.write_text(json.dumps({name: value for name, value in vars(args).items() if name != "command"}, indent=2))
    partial.replace(output / "arguments.json")


def saved_arguments(output: Path) -> argparse.Namespace:
    """The arguments that the run in a folder was begun with.

    Raises:
        ValueError: It is no folder of a run, or of another version's.
    """
    path = output / "arguments.json"
    known = argparse.ArgumentParser()
    add_arguments(known)
    expected, problem = set(vars(known.parse_args([]))), "arguments of another version"
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        saved, problem = None, type(error).__name__
    actions = known._actions  # noqa: SLF001  # argparse has no public name for them
    fits = isinstance(saved, dict) and set(saved) == expected
    if fits and (wrong := [a.dest for a in actions if a.dest in saved and not _takes(a, saved[a.dest])]):
        fits, problem = False, f"{wrong[0]} is {reprlib.repr(saved[wrong[0]])}"
    if not fits:
        raise ValueError(
            f"`--resume` must be the folder of a run of this command, got {output}, whose arguments.json cannot be "
            f"read ({problem}); give the folder that the run named at its start"
        )
    return argparse.Namespace(**saved)


def _takes(action: argparse.Action, value: Any) -> bool:
    """Whether an option of the command line gives such a value."""
    if action.nargs == 0:
        return isinstance(value, bool)
    if value is None or value == action.default:
        return type(value) is type(action.default)
    read = action.type if callable(action.type) else str
    try:
        again = read(str(value))
    except (ValueError, argparse.ArgumentTypeError):
        return False
    return type(again) is type(value) and again == value and (action.choices is None or value in action.choices)


def new_folder(name: str | None) -> Path:
    """A new or empty folder; by default named by the time.

    Raises:
        ValueError: There is something in it.
        OSError: It cannot be made.
    """
    folder = Path(name or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"`--output` must be a new or empty folder, got {folder}; name another, nothing is overwritten"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder
