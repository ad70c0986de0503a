"""Which keys of a group count, read from the source of the optimizer's class."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unfreeze_sched.optimizer import groups


def test_counters_are_read_from_the_source() -> None:
    """Keys that steps write count; what the constructor, `train` or a user writes does not."""
    schedulefree = pytest.importorskip("schedulefree")

    optimizer = schedulefree.AdamWScheduleFree(nn.Linear(4, 4).parameters())
    assert groups.counters(optimizer) == {"k", "weight_sum", "lr_max", "scheduled_lr"}
    optimizer = torch.optim.AdamW(nn.Linear(4, 4).parameters())
    assert groups.counters(optimizer) == frozenset()
