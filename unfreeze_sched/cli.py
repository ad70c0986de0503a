"""`unfreeze-sched`: the command line. Wrong input is one line on standard error and exit code 2, never a traceback."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from pydantic import ValidationError

from unfreeze_sched.distill.arguments import add_arguments


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; it needs no torch."""
    parser = _Parser(prog="unfreeze-sched", description="Progressive unfreezing of pretrained networks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    distill = commands.add_parser(
        "distill", help="the reference training run: distil a student, unfreezing its encoder"
    )
    add_arguments(distill)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name; None takes the process's.

    Returns:
        The exit code: 0, 2 for wrong input, 130 when interrupted.
    """
    args = make_parser().parse_args(argv)
    try:
        _distill(args)
    except ValidationError as error:
        return _fail(error.errors()[0]["msg"].removeprefix("Value error, "))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("unfreeze-sched: interrupted; what was written is whole", file=sys.stderr)  # noqa: T201  # a command's voice
        return 130
    return 0


def _distill(args: argparse.Namespace) -> None:
    try:
        from unfreeze_sched.distill.command import run  # noqa: PLC0415  # an extra, and torch, on use alone
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"`distill` needs {error.name}, which is not installed; pip install 'unfreeze-sched[distill]'"
        ) from error
    run(args)


def _fail(message: str) -> int:
    line = " ".join(message.split())
    print(f"unfreeze-sched: {line}", file=sys.stderr)  # noqa: T201  # a command's voice
    return 2
