"""Nested values compared to the bit, and broken at random."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each leaf by its path, as something whose equality is that of the bits."""
    if isinstance(value, dict):
        yield f"{path} keys", list(map(repr, value))
        for key, item in value.items():
            yield from flat(item, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        yield f"{path} length", (type(value).__name__, len(value))
        for index, item in enumerate(value):
            yield from flat(item, f"{path}[{index}]")
    elif isinstance(value, Tensor):
        data = value.detach().to_dense().contiguous().numpy().tobytes()
        yield path, (str(value.dtype), str(value.layout), tuple(value.shape), data)
    elif isinstance(value, float):
        yield path, value.hex()
    else:
        yield path, repr(value)


def differences(ours: Any, theirs: Any) -> list[str]:
    """The paths at which two values differ."""
    mine, other = dict(flat(ours)), dict(flat(theirs))
    return [path for path in {**mine, **other} if path not in mine or path not in other or mine[path] != other[path]]


def seeded(name: str) -> random.Random:
    """The same draws for the same name."""
    return random.Random(name)  # noqa: S311  # no secrets here


def broken(value: Any, draw: random.Random, junk: Sequence[Any]) -> tuple[Any, list[str]]:
    """A copy in which one to three things are missing, moved, renamed, repeated or replaced; and what was done."""
    value = copy.deepcopy(value)
    done = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        path, box, key = draw.choice(list(places(value)))
        what = draw.choice(("delete", "rename", "repeat", "replace", "replace", "replace", "reverse", "swap"))
        thing = draw.choice(junk)
        if what == "delete":
            del box[key]
        elif what == "rename" and isinstance(box, dict):
            box[draw.choice((f"{key}x", 7, ""))] = box.pop(key)
        elif what == "repeat" and isinstance(box, list):
            box.append(copy.deepcopy(box[key]))
        elif what == "reverse" and isinstance(box, dict):
            items = list(box.items())[::-1]
            box.clear()
            box.update(items)
        elif what == "swap":
            _, other, other_key = draw.choice(list(places(value)))
            box[key], thing = copy.deepcopy(other[other_key]), f"{other_key!r}"
        else:
            box[key], what = thing, "replace"
        done.append(f"{what} {path} {type(thing).__name__ if what == 'replace' else ''}")
    return value, done


def places(value: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each place that holds something: its path, its container, and its key there."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield f"{path}[{key!r}]", value, key
        yield from places(item, f"{path}[{key!r}]")
