"""The folder of a run: claimed by one process, with the command line and a fingerprint of what the run reads."""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import NoReturn

from unfreeze_sched._checks import FrozenModel, listed
from unfreeze_sched.distill.checkpoints import replacing
from unfreeze_sched.distill.command.arguments import add_arguments

_FILE = "arguments.json"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}

Inputs = dict[str, str]  # what a run reads: a file, by its flag and its path below -> its size and its content's hash


class _Begun(FrozenModel):
    """What a run keeps of its beginning."""

    words: tuple[str, ...]
    folder: str
    inputs: Inputs


class _Parser(argparse.ArgumentParser):
    """Raises where the command line's own would end the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of `unfreeze-sched distill`."""
    parser = _Parser(add_help=False)
    add_arguments(parser)
    return parser.parse_args(words)


def inputs_of(args: argparse.Namespace) -> Inputs:
    """The fingerprint of the images, masks and weights that a run's flags name."""
    found: Inputs = {}
    for flag, value in _paths(args):
        path = Path(value)
        within = (file for part in ("images", "masks") for file in sorted((path / part).glob("[!.]*")))
        for file in within if path.is_dir() else [path]:
            if file.is_file():
                with file.open("rb") as content:
                    digest = hashlib.file_digest(content, "sha256").hexdigest()[:32]
                name = f"--{flag.replace('_', '-')} {file.relative_to(path).as_posix()}".removesuffix(" .")
                found[name] = f"{file.stat().st_size} {digest}"
    return found


def _paths(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The arguments that are paths, as they were given."""
    for flag in ("data", "val", "test", "teacher", "student_weights"):
        value = getattr(args, flag, None)
        if value is not None and value not in {"imagenet", "none"}:  # words of --student-weights
            yield flag, value


def rooted(args: argparse.Namespace, folder: str) -> argparse.Namespace:
    """The arguments with paths that lead from anywhere, where they were given in a folder."""
    return argparse.Namespace(**vars(args) | {flag: str(Path(folder, value)) for flag, value in _paths(args)})


def check_output(name: str | None) -> None:
    """See that a run can be begun in a folder; nothing is made."""
    folder = Path(name or "runs")
    # Unfinished files, which a killed process left, take no folder.
    if name and folder.exists() and (not folder.is_dir() or any(p.suffix != ".tmp" for p in folder.iterdir())):
        raise ValueError(
            f"`--output` must be a new or empty folder, got {folder}; name another, nothing is overwritten"
        )
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"`--output` must be a folder that can be written, got {folder}, for which {there} is not; name another"
        )


def claim(name: str | None, words: Sequence[str], inputs: Inputs) -> Path:
    """Make a run's folder, for this process alone; its name, where none is given, is the time."""
    content = _Begun(words=tuple(words), folder=str(Path.cwd()), inputs=inputs).model_dump_json(indent=1).encode()
    begin = f"runs/{time.strftime('%Y%m%d-%H%M%S')}"
    for folder in map(Path, [name] if name else chain([begin], (f"{begin}-{number}" for number in count(2)))):
        with in_words(folder), suppress(FileExistsError):
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / _FILE, _name) as file:
                file.write(content)
            return folder
    raise ValueError(f"`--output` must be a new or empty folder, got {name}, which another run took; name another")


def _name(temporary: Path, path: Path) -> None:
    """Give a whole file a name that no other has; of two processes one gets a FileExistsError."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links; on any other the next line fails, too
        with path.open("xb") as file:
            file.write(temporary.read_bytes())
    temporary.unlink()


def saved_run(output: Path) -> tuple[argparse.Namespace, Inputs]:
    """The arguments that the run in a folder was begun with, and what it read."""
    path = output / _FILE
    try:
        # A pipe of that name would be waited for.
        begun = _Begun.model_validate_json(path.read_bytes() if path.is_file() else b"")
        return rooted(parsed(begun.words), begun.folder), begun.inputs
    except (OSError, ValueError) as error:
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise ValueError(
            f"`--resume` must be the folder of a run of this command, got {output}, whose {_FILE} cannot be read "
            f"({reason if path.is_file() else 'no such file'}); give the folder that the run named at its start"
        ) from error


def as_begun(args: argparse.Namespace, output: Path) -> argparse.Namespace:
    """The arguments of an interrupted run, which has to find what it was begun with."""
    (begun, inputs), args = saved_run(output), rooted(args, str(Path.cwd()))
    for name, default in vars(parsed([])).items():
        given, was = getattr(args, name), getattr(begun, name)
        if name != "resume" and given not in (default, was):
            raise ValueError(
                f"`--{name.replace('_', '-')}` must be as the run was begun with, {was}, got {given}; "
                "leave it out beside --resume, or begin a new run"
            )
    now = inputs_of(begun)
    kinds = {
        "added": [name for name in now if name not in inputs],
        "gone": [name for name in inputs if name not in now],
        "changed": [name for name in now if inputs.get(name, now[name]) != now[name]],
    }
    if found := [f"{kind}: {listed(names, 3)}" for kind, names in kinds.items() if names]:
        raise ValueError(
            f"`--resume` must find what the run was begun with, got files {'; '.join(found)}; "
            "put them back, or begin a new run"
        )
    return begun


@contextmanager
def held(output: Path) -> Iterator[None]:
    """Within it no other process goes on with the run, until this one ends; what cannot be written is put in words."""
    with in_words(output), (output / _FILE).open("r+b") as file:
        try:
            import fcntl  # noqa: PLC0415  # not everywhere

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(
                f"`--resume` must be a folder that no process is at work in, got {output}; wait for its end, or stop it"
            ) from None
        except (ModuleNotFoundError, OSError):  # Windows, or a file system without locks
            pass
        yield


@contextmanager
def in_words(output: Path) -> Iterator[None]:
    """Say what to do where the folder of a run cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            again = f"go on with --resume {output}" if (output / _FILE).exists() else "start again"
            text = f"have room, got a full disk ({error.strerror}); make some, and {again}"
        elif error.errno in _CLOSED and Path(str(error.filename)).is_relative_to(output):
            text = f"be a folder that can be written, got {error.filename} ({error.strerror}); change its permissions, "
            text += "or name another with --output"
        else:
            raise
        raise OSError(f"{output} must {text}") from error
