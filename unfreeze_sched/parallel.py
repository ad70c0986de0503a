"""Unfreezing on several ranks: whether there are any, what they agree upon, and a DDP wrapped anew."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel
    from torch.optim import Optimizer


def process_group() -> Any | None:
    """torch.distributed where a process group of several ranks is up, else None; torch is not imported for it."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return distributed
    return None


def agreed(value: Any) -> Any:
    """Rank 0's value, on every rank: a decision that differed would unfreeze other blocks on each."""
    values = [value]
    if group := process_group():
        group.broadcast_object_list(values, src=0)  # on the device that the backend wants
    return values[0]


def speaks() -> bool:
    """Whether this process logs: the only one, or rank 0."""
    group = process_group()
    return group is None or group.get_rank() == 0


def is_launched_alone() -> bool:
    """Whether this process was started alone, and not by torchrun as one of several; asked before a group is up."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def rewrap_ddp(ddp: DistributedDataParallel) -> DistributedDataParallel:
    """A new DDP around the same module, with the same arguments and hooks, which reduces what is trainable now.

    Call it on all ranks after each transition. Nothing is sent and no weight or buffer moves; before torch 2.7 rank 0
    sends its weights, which the ranks agree upon, and with `broadcast_buffers` its buffers, as at each forward. A hook
    whose state counts buckets, such as PowerSGD's, has to be registered by hand instead.

    Args:
        ddp: The wrapped model; leave it unused from now on.

    Raises:
        TypeError: It is no DistributedDataParallel.
        ValueError: It was made with `delay_all_reduce_named_params` or `mixed_precision`, whose hooks stay for good.

    Example:
        ```python
        unfreezer.apply(epoch)
        if unfreezer.history[-1].epoch == epoch:  # the number of blocks has changed
            ddp = rewrap_ddp(ddp)
        ```
    """
    from torch.nn.parallel import DistributedDataParallel  # noqa: PLC0415  # guards ask for ranks without torch

    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(f"`ddp` must be a DistributedDataParallel, got {type(ddp).__name__}; pass the wrapped model")
    for argument, given in (
        ("delay_all_reduce_named_params", ddp._delay_all_reduce_params),  # noqa: SLF001  # torch keeps it nowhere else
        ("mixed_precision", ddp.mixed_precision),
    ):
        if given:
            raise ValueError(
                f"`ddp` must be made without {argument}, whose hooks stay in the module, got one with it; "
                "wrap everything while it is trainable, with find_unused_parameters=True"
            )
    new = DistributedDataParallel(**_by_version(ddp, inspect.signature(DistributedDataParallel).parameters))
    for hook, state in ddp._comm_hooks:  # noqa: SLF001  # torch has no public way to list them
        new.register_comm_hook(state, hook)
    # The mode of the wrapper alone: that of the modules within is theirs.
    new.training = ddp.training
    new.require_backward_grad_sync = ddp.require_backward_grad_sync
    return new


def _by_version(ddp: DistributedDataParallel, taken: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """The arguments that this torch's constructor takes, as the wrapper was given them."""
    # It keeps most under their names. A mesh comes as its process group, and from torch 2.13 on `broadcast_buffers` as
    # `forward_sync_buffers`, beside which it warns.
    others = {"device_mesh"} | ({"broadcast_buffers"} if "forward_sync_buffers" in taken else set())
    arguments = {name: getattr(ddp, name) for name in taken if name not in others and hasattr(ddp, name)}
    if "init_sync" in taken:  # from torch 2.7 on
        arguments["init_sync"] = False  # the ranks agree already, and buffers that are a rank's own have to stay
    if caps := getattr(ddp, "bucket_bytes_cap_list", []):  # from torch 2.11 on, which takes MiB, and rounds
        arguments["bucket_cap_mb_list"] = [size / 2**20 for size in caps]
    elif not ddp.bucket_bytes_cap_default:
        arguments["bucket_cap_mb"] = ddp.bucket_bytes_cap / 2**20
    return arguments


@contextmanager
def all_trainable(optimizer: Optimizer) -> Iterator[None]:
    """Makes all that a live optimizer holds trainable while torch.distributed.checkpoint looks at it.

    Its `get_state_dict` and `set_state_dict` leave out the moments of what is frozen at that moment, so that blocks
    which were frozen again would come back without theirs.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(1), requires_grad=False)
        >>> with all_trainable(torch.optim.SGD([weight])):
        ...     print(weight.requires_grad)
        True
        >>> weight.requires_grad
        False
    """
    frozen = [p for group in optimizer.param_groups for p in group["params"] if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad = True
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad = False
