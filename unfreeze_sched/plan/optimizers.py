"""Bytes of state that an optimizer keeps for a parameter; no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

Shape = Sequence[int]

# torch counts steps in a float of its own for each parameter.
_STEP = 4


def _copies(number: int, *, counts: bool) -> Callable[[Shape, int], int]:
    return lambda shape, size: number * prod(shape) * size + (_STEP if counts else 0)


def _factored(shape: Shape, size: int) -> int:
    """Adafactor keeps a matrix's squares as sums over rows and over columns, a vector's as they are."""
    if len(shape) < 2:  # noqa: PLR2004  # a matrix has two dimensions
        return prod(shape) * size + _STEP
    *rest, rows, columns = shape
    return prod(rest) * (rows + columns) * size + _STEP


STATES: dict[str, Callable[[Shape, int], int]] = {
    "adamw": _copies(2, counts=True),
    "adam": _copies(2, counts=True),
    "amsgrad": _copies(3, counts=True),
    "sgd": _copies(0, counts=False),
    "sgd-momentum": _copies(1, counts=False),
    "rmsprop": _copies(1, counts=True),
    "adagrad": _copies(1, counts=True),
    "adafactor": _factored,
    "lion": _copies(1, counts=False),
}
"""From an optimizer's name to a function of a parameter's shape and its bytes a number."""


def state_bytes(optimizer: str, shape: Shape, size: int) -> int:
    """Bytes of state of one parameter.

    Args:
        optimizer: A key of `STATES`.
        shape: Of the parameter.
        size: Bytes a number, 4 for float32.

    Example:
        >>> state_bytes("adamw", (10, 10), 4)  # two moments, and the step count
        804
    """
    return STATES[optimizer](shape, size)
