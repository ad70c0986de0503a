"""A saved state beside this run's own: what differs, in words."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

_REPR = reprlib.Repr()  # what is shown of a saved value, which may be anything
_REPR.maxstring = _REPR.maxother = 200


def differences(where: str, saved: Any, own: Any) -> Iterator[str]:
    """Where two JSON-like values differ, in words; order counts, since groups follow it."""
    if isinstance(saved, Mapping) and isinstance(own, Mapping):
        for key in [*saved, *(key for key in own if key not in saved)]:
            if key not in own or key not in saved:
                yield f"{where}[{short(key)}] {'saved alone' if key in saved else 'not saved'}"
            else:
                yield from differences(f"{where}[{key!r}]", saved[key], own[key])
        if set(saved) == set(own) and list(saved) != list(own):
            yield f"{where} saved in the order {', '.join(saved)}"
    elif not _equal(saved, own):
        yield f"{where} saved as {short(saved)}, now {own!r}"


def _equal(saved: Any, own: Any) -> bool:
    """Whether two values of JSON's types are equal, where the saved one may be anything."""
    if isinstance(own, list):
        return isinstance(saved, (list, tuple)) and len(saved) == len(own) and all(map(_equal, saved, own))
    return type(saved) is type(own) and bool(saved == own)


def short(value: Any) -> str:
    """A value on one line, whatever it is."""
    return " ".join(_REPR.repr(value).split())
