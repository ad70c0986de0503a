"""The ranks of a run under torchrun: one process group, and one voice."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from unfreeze_sched.parallel import is_launched_alone, rewrap_ddp

# What torchrun tells each of its processes.
_NEEDED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PATIENCE = timedelta(seconds=60)  # to reach the store; torchrun's is there before its processes are


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; rank and place on its machine are 0-based."""

    rank: int = 0
    world: int = 1
    local: int = 0

    def summed(self, values: Tensor) -> Tensor:
        """The sum over ranks of values on the CPU."""
        if self.world > 1:
            distributed.all_reduce(values)
        return values

    def wrapped(self, module: nn.Module, device: torch.device, *, changed: bool) -> nn.Module:
        """The module, or what an earlier call gave, in a DDP that reduces what trains now, if `changed` since then."""
        if isinstance(module, DistributedDataParallel):
            return rewrap_ddp(module) if changed else module
        if self.world == 1:
            return module
        return DistributedDataParallel(module, device_ids=None if device.type == "cpu" else [device])

    def follow(self, module: nn.Module) -> None:
        """Take over rank 0's buffers, which DDP sends before a training step and not after the last one."""
        if self.world > 1:
            for buffer in module.buffers():
                distributed.broadcast(buffer, src=0)

    def device(self, name: str | None) -> str:
        """The device of this rank: that of the name, or CUDA where there is some; `cuda` is a GPU for each rank."""
        if name is None:
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if self.world > 1 and name not in {"cpu", "cuda"}:
            raise ValueError(
                f"`--device` must be cpu or cuda with several ranks, got {name!r}; with cuda each takes its own GPU"
            )
        if self.world > 1 and name == "cuda":
            name = f"cuda:{self.local}"
        try:
            torch.zeros(1, device=name).item()
        except (RuntimeError, AssertionError) as error:
            fix = "leave it out or say cpu" if self.world == 1 else "start one rank a GPU, or say cpu"
            raise ValueError(f"`--device` must be a device of this machine, got {name!r}; {fix}") from error
        return name


ALONE = Ranks()


def joined() -> Ranks:
    """This process among its ranks: alone, or, until it ends, in a process group where torchrun started several."""
    if is_launched_alone():
        return ALONE
    if missing := [name for name in _NEEDED if not os.environ.get(name, "").strip()]:
        raise ValueError(
            f"the environment must be torchrun's where WORLD_SIZE is {os.environ['WORLD_SIZE']}, got no {missing[0]}; "
            "start with torchrun --nproc-per-node N -m unfreeze_sched, or unset WORLD_SIZE"
        )
    ranks = Ranks(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    if on_cuda := ranks.local < torch.cuda.device_count():
        torch.cuda.set_device(ranks.local)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo", store=_store(), rank=ranks.rank, world_size=ranks.world
    )
    return ranks


@cache
def first_to_fail() -> bool:
    """Whether this rank is the one to say why: its fellows fail of the same input, or of its end."""
    try:
        return bool(_store().add("unfreeze_sched/failed", 1) == 1)
    except (RuntimeError, ValueError):  # the store went with the rank that kept it, or there never was one
        return os.environ.get("RANK", "0") == "0"


@cache
def _store() -> Any:
    return next(iter(rendezvous("env://", timeout=_PATIENCE)))[0]
