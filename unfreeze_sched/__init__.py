"""Progressive unfreezing of pretrained networks in any PyTorch loop.

    unfreezer = ProgressiveUnfreezer.from_model(model, optimizer, total_epochs=50, lr_schedulers=[lr_scheduler])
    for epoch in range(50):
        unfreezer.apply(epoch)  # before the epoch's first step

A schedule says how many of the encoder's blocks are unfrozen at an epoch, counted from the head; blocks switch
`requires_grad` and norm modes; the rebuilder brings optimizer and LR schedulers along. Each is of use by itself. The
public names load on first use, so that a schedule alone never imports torch.
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
