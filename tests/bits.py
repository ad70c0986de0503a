"""Nested values compared to the bit, and broken at random."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unfreeze_sched import ProgressiveUnfreezer

JUNK = [
    *(
        None,
        True,
        -1,
        0,
        3,
        10**30,
        0.5,
        float("nan"),
        float("inf"),
        "",
        "words",
        b"bytes",
        [],
        {},
        [1, 2],
        {"a": 1},
        (1,),
    ),
    *(
        torch.tensor(1.0),
        torch.ones(2, 3),
        torch.ones(0),
        torch.ones(3, dtype=torch.complex64),
        torch.eye(3).to_sparse(),
    ),
    *(torch.ones(3, dtype=torch.uint8), torch.ones(3, device="meta"), torch.ones(3, dtype=torch.float16)),
]
"""What may stand where something else belongs."""


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
        data = value.detach().cpu().to_dense().contiguous().numpy().tobytes()
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


def all_of(unfreezer: ProgressiveUnfreezer, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a refused load must leave alone: bits, and the identity of what others may hold."""
    private = {key: value for key, value in vars(unfreezer).items() if key.startswith("_")}
    groups = private.pop("_seen_groups")
    return {
        "private": private,
        "seen": id(groups),
        "unfreezer": unfreezer.state_dict(),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "groups": [id(optimizer.param_groups), *map(id, optimizer.param_groups)],
        "parameters": [[id(p) for p in group["params"]] for group in optimizer.param_groups],
        "trainable": [(p.requires_grad, p.grad is None, id(p), p.data_ptr()) for p in model.parameters()],
        "norms": [(m.training, type(m.__dict__.get("train")).__name__) for m in model.modules()],
        "random": torch.get_rng_state(),
    }
