"""`unfreezer_for`: an unfreezer for a loop that has its model, optimizer and LR schedulers already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from unfreeze_sched._checks import as_count
from unfreeze_sched.integrations._common import Blocks, Plan
from unfreeze_sched.schedule import MEDIUM, FractionPreset, MilestonePreset, RatePreset
from unfreeze_sched.unfreezer import ProgressiveUnfreezer


def unfreezer_for(
    model: nn.Module,
    optimizer: Optimizer,
    total_epochs: int,
    lr_schedulers: Sequence[Any] | None = (),
    preset: RatePreset | MilestonePreset | FractionPreset = MEDIUM,
    blocks: Blocks | None = None,
    **keywords: Any,
) -> ProgressiveUnfreezer:
    """Make an unfreezer for an optimizer of the whole model, whose blocks' parameters are taken out, in place.

    Each joins again in its turn. Call it before training, and before DDP wraps the model.

    Args:
        model: The bare model, not wrapped.
        optimizer: The live optimizer, of all parameters or of the head's.
        total_epochs: Number of epochs of the run, at least 1.
        lr_schedulers: All the LR schedulers of the optimizer; None says that there is none.
        preset: When blocks are unfrozen.
        blocks: The blocks, shallow to deep, or a function of the model that returns them; None takes
            `encoder_blocks(model)`.
        **keywords: The others of `ProgressiveUnfreezer`, such as `layer_decay=0.8`.

    Returns:
        The unfreezer; call its `apply(epoch)` before each epoch.

    Raises:
        TypeError: An argument of the wrong type, or an unknown keyword.
        ValueError: An argument out of range, or an optimizer with a group of blocks alone at a rate of its own.

    Example:
        >>> import torch
        >>> from unfreeze_sched import Block
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        >>> unfreezer = unfreezer_for(net, optimizer, 50, blocks=[Block("first", (net[0],))])
        >>> [len(group["params"]) for group in optimizer.param_groups]
        [2]
        >>> unfreezer.apply(10).added
        ('first/weight', 'first/bias')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be an nn.Module, got {type(model).__name__}; pass the bare model")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"`optimizer` must be a torch optimizer, got {type(optimizer).__name__}; pass the live one")
    if not isinstance(preset, (RatePreset, MilestonePreset, FractionPreset)):
        raise TypeError(f"`preset` must be a preset, got {type(preset).__name__}; pass MEDIUM, or make a RatePreset")
    total = as_count(total_epochs, "total_epochs", minimum=1, fix="it is the number of epochs of the run, such as 50")
    return Plan(preset, blocks, None, keywords).unfreezer(model, optimizer, lr_schedulers, total)
