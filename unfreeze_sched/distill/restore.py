"""Bring the parts of a run to where a checkpoint left them: all of them, or none."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch


def restore(parts: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Load a checkpoint's states into a new run.

    The objects' own `load_state_dict` look at little of what they load, and stop in the middle where they do. So copies
    load first, and take one step with what they loaded; only what they took is loaded into the live objects.

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
        _load(trial, copy.deepcopy(dict(saved)))  # the step writes into the states that it loads
        for group in trial["optimizer"].param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        trial["optimizer"].step()
        trial["scheduler"].step()
    _load(parts, saved)


def _load(parts: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    # The unfreezer first, which replays the groups that the others' states are of.
    for name in ("unfreezer", "scheduler", "model", "optimizer"):
        parts[name].load_state_dict(saved[name])
