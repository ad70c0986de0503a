"""Progressive unfreezing of pretrained networks in any PyTorch loop.

    unfreezer = ProgressiveUnfreezer.from_model(model, optimizer, total_epochs=50, lr_schedulers=[lr_scheduler])
    for epoch in range(50):
        unfreezer.apply(epoch)  # before the epoch's first step

`apply(epoch)` is three things in a row, each of use by itself, and each may be done twice:

    schedule.blocks_at(epoch)  -> n, the unfrozen blocks counted from the head   pure, no torch
    blocks and n               -> requires_grad, and the modes of norm layers
    rebuilder.sync()           -> the optimizer's groups and the LR schedulers   in place, moments kept

A block is a named piece of the encoder, shallow to deep: `encoder_blocks(model)`. An epoch is 0-based, the one about
to be trained. A preset says when: `MEDIUM`, `preset_for(n_images)`, or one of your own; `unfreeze-sched plan` shows
what it will do. The public names load on first use, so that a schedule alone never imports torch.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unfreeze_sched.model import Block, encoder_blocks
    from unfreeze_sched.optimizer import GroupChange, OptimizerRebuilder
    from unfreeze_sched.schedule import (
        LARGE,
        MEDIUM,
        SMALL,
        FractionPreset,
        MilestonePreset,
        RatePreset,
        UnfreezeSchedule,
        preset_for,
    )
    from unfreeze_sched.unfreezer import ProgressiveUnfreezer

__all__ = [
    "LARGE",
    "MEDIUM",
    "SMALL",
    "Block",
    "FractionPreset",
    "GroupChange",
    "MilestonePreset",
    "OptimizerRebuilder",
    "ProgressiveUnfreezer",
    "RatePreset",
    "UnfreezeSchedule",
    "encoder_blocks",
    "preset_for",
]

_ROOMS = {
    "model": ("Block", "encoder_blocks"),
    "optimizer": ("GroupChange", "OptimizerRebuilder"),
    "unfreezer": ("ProgressiveUnfreezer",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent by default


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ROOM_OF.get(name, 'schedule')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
