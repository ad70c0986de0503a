"""`unfreeze-sched`: the command line. Wrong input is one line on standard error and exit code 2, never a traceback."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NoReturn

from pydantic import ValidationError

from unfreeze_sched._checks import one_line, plain
from unfreeze_sched.distill.command.arguments import add_arguments as add_distill_arguments
from unfreeze_sched.parallel import is_launched_alone
from unfreeze_sched.plan.command import add_arguments as add_plan_arguments
from unfreeze_sched.plan.command import run as plan


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {plain(message)}; see {self.prog} --help\n" if _speaks() else None)


class _Version(argparse.Action):
    """Looks the version up where it is asked for, which takes longer than parsing."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        try:
            number = metadata.version("unfreeze-sched")
        except metadata.PackageNotFoundError:
            parser.error("`--version` must be asked of an installed package, got bare source; pip install it")
        print(f"unfreeze-sched {number}")  # noqa: T201  # a command's voice
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; it needs no torch."""
    parser = _Parser(prog="unfreeze-sched", description="Progressive unfreezing of pretrained networks.")
    version = "say which version this is, and exit"
    parser.add_argument("--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    purpose = "the reference training run: distil a student, unfreezing its encoder"
    add_distill_arguments(commands.add_parser("distill", help=purpose))
    purpose = "what a schedule will do: blocks, learning rates and memory by phase"
    add_plan_arguments(commands.add_parser("plan", help=purpose))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: the words after the program's name, by default the process's.

    The exit code is 0, 2 for wrong input, 130 when interrupted, 1 where nobody reads the output any more.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # a shell closed it: lest the next file that is opened takes its place
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115  # for good
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        try:
            args = _parsed(words)
            if args.command == "plan":
                plan(args)
            else:
                _distill(args, words[1:])
        finally:
            sys.stdout.flush()  # here, where what comes of it is still one line
    except BrokenPipeError:  # whoever read the output had enough of it, as `head` does
        _drop_output()
        return 1
    except (ValueError, OSError, ModuleNotFoundError) as error:
        try:
            sys.stdout.flush()
        except OSError:  # a full disk
            _drop_output()
        text = one_line(error) if isinstance(error, ValidationError) else str(error)
        return _end(2, plain(" ".join(text.split())))
    except KeyboardInterrupt:
        return _end(130, "interrupted; what was written is whole")
    except Exception:
        if _speaks():
            raise
        return 1  # another rank has failed, which ended this one
    return 0


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    parser = make_parser()
    for word in words:
        if word.startswith("--") and word.endswith("=--"):  # of which argparse makes an empty list
            parser.error(f"argument {word[:-3]}: must have a value, got '--'; write ./-- for a path of that name")
    return parser.parse_args(words)


def _distill(args: argparse.Namespace, words: Sequence[str]) -> None:
    try:
        from unfreeze_sched.distill.command.run import run  # noqa: PLC0415  # an extra, and torch, on use alone
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"`distill` needs {error.name}, which is not installed; pip install 'unfreeze-sched[distill]'"
        ) from error
    run(args, words)


def _speaks() -> bool:
    """Whether this process says what went wrong: the only one, or the first of torchrun's ranks that failed."""
    if is_launched_alone():
        return True
    from unfreeze_sched.distill.command.ranks import first_to_fail  # noqa: PLC0415  # needs torch

    return first_to_fail()


def _end(code: int, text: str) -> int:
    if _speaks():
        print(f"unfreeze-sched: {text}", file=sys.stderr)  # noqa: T201  # a command's voice
    return code


def _drop_output() -> None:
    """Let what is still to be written go nowhere, or Python would try again at its end, and say so at length."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
