"""The one rank of a process group, on gloo or NCCL: trains under DDP and without, and saves what came of it.

Called as `python card_worker.py OUT DEVICE`. What compares ranks does nothing where there is one, so this one is taken
for several.
"""

import sys
from pathlib import Path
from typing import Any

import oracle
import torch
from processes import leave
from torch import Tensor, distributed
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

from unfreeze_sched import MilestonePreset, UnfreezeSchedule, parallel
from unfreeze_sched.guards import OverfitGuard
from unfreeze_sched.optimizer import watch

# A refreezing among them.
SCHEDULE = UnfreezeSchedule(preset=MilestonePreset(milestones={1: 1, 2: 3, 3: 1}), total_blocks=3, total_epochs=4)


def twins(device: str) -> tuple[oracle.Run, oracle.Run]:
    return oracle.twins(SCHEDULE, lambda groups: torch.optim.AdamW(groups, fused=True), device=device)


def train(device: str) -> dict[str, Any]:
    """A library's run under DDP, its oracle without."""
    compared: list[list[str]] = []
    differing = watch.differing_gradients

    def counted(named: Any) -> Any:
        compared.append(list(named))
        return differing(named)

    watch.differing_gradients = counted
    run, other = twins(device)
    run.apply(0)
    ddp = DistributedDataParallel(run.model, device_ids=None if device == "cpu" else [0])
    found, devices = [], []

    def step(each: oracle.Run, x: Tensor, y: Tensor) -> None:
        if each is run:
            loss = (ddp(x) - y).square().mean()
            each.optimizer.zero_grad()
            loss.backward()
            each.optimizer.step()
        else:
            each.step(x, y)

    for epoch in range(4):
        run.apply(epoch)
        if epoch:
            ddp = parallel.rewrap_ddp(ddp)
        devices.append(ddp.device_ids)
        found += oracle.train_in_lockstep(run, other, [epoch], step=step)
    # A copy, since torch.distributed.checkpoint makes a step of its own, on gradients of zero.
    return {"found": found, "compared": [*compared], "devices": devices, "moments": moments(run, device)}


def moments(run: oracle.Run, device: str) -> dict[str, Any]:
    """What torch.distributed.checkpoint saves and loads of a run whose last two blocks are frozen again."""
    again, _ = twins(device)
    again.apply.__self__.load_state_dict(run.apply.__self__.state_dict())  # type: ignore[attr-defined]
    again.model.load_state_dict(run.model.state_dict())
    with parallel.all_trainable(run.optimizer), parallel.all_trainable(again.optimizer):
        state = get_optimizer_state_dict(run.model, run.optimizer)
        set_optimizer_state_dict(again.model, again.optimizer, state)
    return {
        "saved": sorted(name for name in state["state"] if name.startswith("blocks.") and name.endswith("0.weight")),
        "differences": oracle.differences(again, run),
    }


def main() -> None:
    out, device = Path(sys.argv[1]), sys.argv[2]
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    if device != "cpu":
        torch.cuda.set_device(0)
    backend = "gloo" if device == "cpu" else "nccl"
    distributed.init_process_group(backend, init_method=f"file://{out}/store", rank=0, world_size=1)
    parallel.process_group = lambda: distributed
    guard = OverfitGuard()
    guard.step(torch.tensor(0.5, device=device))  # type: ignore[arg-type]  # a tensor will do
    torch.save({**train(device), "last": guard.state_dict()["last"]}, out / "result.pt")
    leave()


if __name__ == "__main__":
    main()
