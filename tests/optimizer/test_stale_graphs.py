"""A compiled model past a transition: torch before 2.12 goes on with the graph of the phase before."""

from __future__ import annotations

import warnings

import pytest
import torch
from oracle import twins

from unfreeze_sched import RatePreset, UnfreezeSchedule

SCHEDULE = UnfreezeSchedule(preset=RatePreset(unfreeze_start_epoch=1, unfreeze_rate=1), total_blocks=3, total_epochs=4)


@pytest.mark.parametrize("resets", [False, True])
def test_a_stale_graph_is_named(resets: bool) -> None:
    """What it leaves without a gradient is warned of with the way out, which is one."""
    torch.compiler.reset()
    run, _ = twins(SCHEDULE, torch.optim.AdamW)
    compiled = torch.compile(run.model, backend="aot_eager")
    stale = torch.__version__ < "2.12" and not resets
    for epoch in range(4):
        run.apply(epoch)
        if resets:
            torch.compiler.reset()
        run.optimizer.zero_grad()
        compiled(torch.randn(8, 4).double()).square().mean().backward()
        lacking = [name for name, p in run.model.named_parameters() if p.requires_grad and p.grad is None]
        assert bool(lacking) == (stale and epoch > 0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.optimizer.step()
        texts = [str(warning.message) for warning in caught]
        assert len(texts) == bool(lacking)
        assert all(text.endswith("whose fix is torch.compiler.reset() after each transition") for text in texts)
    torch.compiler.reset()
