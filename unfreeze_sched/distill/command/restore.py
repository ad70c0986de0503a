"""Bring the parts of a run to where a checkpoint left them: all of them, or none."""

from __future__ import annotations

import copy
import reprlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def restore(parts: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Load a checkpoint's states into a new run.

    The objects' own `load_state_dict` look at little of what they load, and stop in the middle where they do. So copies
    of them come first: they tell what the states have to look like, load them, and take one step with what they loaded.
    Only what they took is loaded into the live objects.

    Args:
        parts: The new run's `model`, `optimizer`, `scheduler` and `unfreezer`.
        saved: Their states under the same names.

    Raises:
        Exception: Nearly anything, where a state does not fit; `parts` are as they were.

    Example:
        >>> from torch import nn
        >>> from unfreeze_sched import Block, ProgressiveUnfreezer, RatePreset, UnfreezeSchedule
        >>> def begin():
        ...     net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        ...     optimizer = torch.optim.AdamW(net[1].parameters())
        ...     scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
        ...     preset = RatePreset(unfreeze_start_epoch=0)
        ...     schedule = UnfreezeSchedule(preset=preset, total_blocks=1, total_epochs=3)
        ...     unfreezer = ProgressiveUnfreezer([Block("first", (net[0],))], optimizer, schedule, [scheduler])
        ...     return {"model": net, "optimizer": optimizer, "scheduler": scheduler, "unfreezer": unfreezer}
        >>> run, again = begin(), begin()
        >>> _ = run["unfreezer"].apply(0)
        >>> restore(again, {name: part.state_dict() for name, part in run.items()})
        >>> len(again["optimizer"].param_groups), torch.equal(again["model"][0].weight, run["model"][0].weight)
        (2, True)
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the live objects give theirs
        trial = copy.deepcopy(dict(parts))  # in one call, so that the copies know each other
        trial["unfreezer"].load_state_dict(saved["unfreezer"])  # the groups that the others' states are of
        _step(trial)  # the optimizer makes its states
        for name in ("scheduler", "model", "optimizer"):
            for misfit in _misfits(name, saved[name], trial[name].state_dict()):
                raise ValueError(misfit)
        _load(trial, copy.deepcopy(dict(saved)))  # the next step writes into the states that it loads
        _step(trial)
    parts["unfreezer"].load_state_dict(saved["unfreezer"])
    _load(parts, saved)


def _load(parts: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    for name in ("scheduler", "model", "optimizer"):
        parts[name].load_state_dict(saved[name])


def _step(parts: Mapping[str, Any]) -> None:
    for group in parts["optimizer"].param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    parts["optimizer"].step()
    parts["scheduler"].step()


def _misfits(where: str, saved: Any, own: Any) -> Iterator[str]:
    """The places at which a state has another structure than a run's own, in words."""
    if type(saved) is not type(own):
        yield f"{where} is of type {type(saved).__name__}, not {type(own).__name__}"
    elif isinstance(own, dict):
        yield from (f"{where} should not have {key!r}" for key in saved if key not in own)
        for key, value in own.items():
            if key in saved:
                yield from _misfits(f"{where}[{key!r}]", saved[key], value)
            elif not where.endswith("['state']"):  # a parameter that has not trained yet has none
                yield f"{where} lacks {key!r}"
    elif isinstance(own, (list, tuple)):
        if len(saved) != len(own):
            yield f"{where} has {len(saved)} entries, not {len(own)}"
        for index, pair in enumerate(zip(saved, own, strict=False)):
            yield from _misfits(f"{where}[{index}]", *pair)
    elif _fixed(where, saved) != _fixed(where, own):
        yield f"{where} is {reprlib.repr(_fixed(where, saved))}, not {_fixed(where, own)}"


def _fixed(where: str, value: Any) -> Any:
    """What of a value every state of a run has in common: names, places of parameters, shapes."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.layout, value.is_meta
    return value if isinstance(value, str) or "['params']" in where else None
