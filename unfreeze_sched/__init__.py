"""Progressive unfreezing of pretrained networks in any PyTorch loop.

The public names load on first use, so that a schedule alone never imports torch.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unfreeze_sched.blocks import Block, encoder_blocks
    from unfreeze_sched.presets import (
        LARGE,
        MEDIUM,
        SMALL,
        FractionPreset,
        MilestonePreset,
        RatePreset,
        preset_for,
    )
    from unfreeze_sched.rebuilder import GroupChange, OptimizerRebuilder
    from unfreeze_sched.schedule import UnfreezeSchedule
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

_MODULES = {
    **dict.fromkeys(("Block", "encoder_blocks"), "blocks"),
    **dict.fromkeys(
        ("LARGE", "MEDIUM", "SMALL", "FractionPreset", "MilestonePreset", "RatePreset", "preset_for"), "presets"
    ),
    **dict.fromkeys(("GroupChange", "OptimizerRebuilder"), "rebuilder"),
    "UnfreezeSchedule": "schedule",
    "ProgressiveUnfreezer": "unfreezer",
}


logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent by default


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
