"""Which keys of a param group count, read from the source code of the optimizer's class.

A group's keys are of two kinds. *Hyperparameters* are given: by the constructor, by the user, by a scheduler; a joining
group copies the live template's. *Counters* are written by the optimizer's own code as it steps (`step`, `k`,
`weight_sum`, ...); in a joining group they start as in a new optimizer, since bias corrections and averages of fresh
parameters begin then. No attribute tells the two apart, and a table of classes would be out of date by the next release
of any library; but the code that writes a key is there to be read.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Hashable, Iterator
from typing import cast

from torch.optim import Optimizer

from unfreeze_sched._checks import warn

# Where the source cannot be read, as in a compiled class.
_USUAL_COUNTERS = frozenset({"step", "k", "counter", "weight_sum", "lr_max"})
# `train` and `eval` write a mode, which a joining group shares; the others restore what was saved.
_NOT_STEPPING = frozenset({"__init__", "__setstate__", "load_state_dict", "state_dict", "train", "eval"})


@functools.cache
def written(cls: Hashable) -> frozenset[str]:
    """The string keys under which the methods of an optimizer's class store something in a group.

    Warns:
        UserWarning: Once a class, where its source cannot be read: the usual counters are taken for its own then.

    Example:
        >>> import torch
        >>> written(torch.optim.AdamW)  # it counts steps for each parameter
        frozenset()
    """
    keys: set[str] = set()
    for base in inspect.getmro(cast("type", cls)):
        if base in {Optimizer, object}:
            break
        # By method, since a class may claim another module than the one that it is written in.
        methods = {name: inspect.unwrap(value) for name, value in vars(base).items() if callable(value)}
        for name, method in methods.items():
            if name in _NOT_STEPPING or not inspect.isroutine(method):
                continue
            try:
                tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
            except (OSError, TypeError, SyntaxError):
                warn(
                    f"`optimizer` should be of a class whose source can be read, got {base.__qualname__}: which keys "
                    f"of its groups count steps is not known, so {', '.join(sorted(_USUAL_COUNTERS))} start anew in a "
                    "joining group; define the class in a file"
                )
                return frozenset(keys) | _USUAL_COUNTERS
            keys.update(_stores(tree))
    return frozenset(keys)


def _stores(method: ast.AST) -> Iterator[str]:
    """The keys of `group["key"] = ...`, under whatever name with `group` in it; `state[...]` is no group."""
    for node in ast.walk(method):
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and "group" in node.value.id
            and isinstance(node.slice, ast.Constant)
            and isinstance(node.slice.value, str)
        ):
            yield node.slice.value
