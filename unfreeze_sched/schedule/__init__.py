"""The schedule: epoch -> number of unfrozen blocks. Pure: it imports pydantic and the package's checks, never torch."""

from unfreeze_sched.schedule.presets import (
    LARGE,
    MEDIUM,
    PRESETS,
    SMALL,
    FractionPreset,
    MilestonePreset,
    Preset,
    RatePreset,
    preset_for,
)
from unfreeze_sched.schedule.schedule import UnfreezeSchedule

__all__ = [
    "LARGE",
    "MEDIUM",
    "PRESETS",
    "SMALL",
    "FractionPreset",
    "MilestonePreset",
    "Preset",
    "RatePreset",
    "UnfreezeSchedule",
    "preset_for",
]
