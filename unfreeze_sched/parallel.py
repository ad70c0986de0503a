"""Unfreezing on several ranks: what an engine does not cover is noticed, and DDP is wrapped anew."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from unfreeze_sched.blocks import Block
from unfreeze_sched.optimizers import layers

# Norms of equal gradients may differ in their last bits on ranks with unlike hardware; those of other batches differ
# by far more.
_RELATIVE_TOLERANCE = 1e-9


def world_size() -> int:
    """Number of ranks; 1 where no process group is up."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rewrap_ddp(ddp: DistributedDataParallel) -> DistributedDataParallel:
    """A new DDP around the same module, which reduces what is trainable now.

    A DDP reduces the parameters that were trainable when it was made. Call this on all ranks after each transition;
    only the trainable parameters are reduced then. Nothing is sent and no weight or buffer moves. A communication hook
    goes with its state; one whose state counts buckets, such as PowerSGD's, has to be registered by hand instead.

    Args:
        ddp: The wrapped model; leave it unused from now on.

    Returns:
        A new wrapper with the same arguments and communication hooks, in the same mode.

    Raises:
        TypeError: It is no DistributedDataParallel.
        ValueError: It was made with `delay_all_reduce_named_params` or `mixed_precision`, which leave hooks in the
            module for good.

    Example:
        ```python
        unfreezer.apply(epoch)
        if unfreezer.history[-1].epoch == epoch:  # the number of blocks has changed
            ddp = rewrap_ddp(ddp)
        ```
    """
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
    caps = [size / 2**20 for size in ddp.bucket_bytes_cap_list]
    new = DistributedDataParallel(
        ddp.module,
        device_ids=ddp.device_ids,
        output_device=ddp.output_device,
        dim=ddp.dim,
        forward_sync_buffers=ddp.forward_sync_buffers,
        init_sync=False,  # the ranks agree already, and buffers that are a rank's own have to stay
        process_group=ddp.process_group,
        bucket_cap_mb=None if ddp.bucket_bytes_cap_default or caps else ddp.bucket_bytes_cap / 2**20,
        bucket_cap_mb_list=caps or None,  # type: ignore[arg-type]  # torch multiplies them by bytes a MiB, then rounds
        find_unused_parameters=ddp.find_unused_parameters,
        gradient_as_bucket_view=ddp.gradient_as_bucket_view,
        static_graph=ddp.static_graph,
        skip_all_reduce_unused_params=ddp.skip_all_reduce_unused_params,
        batched_grad_copy=ddp.batched_grad_copy,
    )
    for hook, state in ddp._comm_hooks:  # noqa: SLF001  # torch has no public way to list them
        new.register_comm_hook(state, hook)
    # The mode of the wrapper alone: that of the modules within is theirs.
    new.training = ddp.training
    new.require_backward_grad_sync = ddp.require_backward_grad_sync
    return new


@contextmanager
def all_trainable(optimizer: Optimizer) -> Iterator[None]:
    """Makes all that the optimizer holds trainable while torch.distributed.checkpoint looks at it.

    Its `get_state_dict` and `set_state_dict` leave out the moments of what is frozen at that moment, so that blocks
    which were frozen again would come back without theirs.

    Args:
        optimizer: The live optimizer.

    Example:
        >>> weight = nn.Parameter(torch.ones(1), requires_grad=False)
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


def differing_gradients(named: Mapping[str, nn.Parameter]) -> tuple[list[str], bool]:
    """Compare gradients across ranks by their norms; a collective call.

    Args:
        named: The same parameters, in the same order, on all ranks. Sharded ones are left out: each rank has its own.

    Returns:
        The names of those that differ, and whether any gradient is other than zero on any rank.
    """
    whole = {name: parameter for name, parameter in named.items() if not _is_sharded(parameter)}
    if not whole:
        return [], True
    device = next(iter(whole.values())).device
    norms = torch.stack([_norm(parameter.grad, device) for parameter in whole.values()])
    extremes = torch.cat([norms, -norms])
    distributed.all_reduce(extremes, op=distributed.ReduceOp.MAX)
    highest, lowest = extremes[: len(whole)].tolist(), (-extremes[len(whole) :]).tolist()
    return (
        [
            name
            for name, high, low in zip(whole, highest, lowest, strict=True)
            if not math.isclose(high, low, rel_tol=_RELATIVE_TOLERANCE)
        ],
        any(highest),
    )


def refuse_engine(optimizer: Any, blocks: Iterable[Block]) -> None:
    """Refuse engines that cannot take further parameters once they run.

    Args:
        optimizer: The live optimizer.
        blocks: The blocks.

    Raises:
        ValueError: DeepSpeed, or FSDP1 without the original parameters.
    """
    for layer in layers(optimizer) if isinstance(optimizer, Optimizer) else (optimizer,):
        if type(layer).__module__.partition(".")[0] == "deepspeed":
            raise ValueError(
                f"`optimizer` must take further param groups, got DeepSpeed's {type(layer).__name__}, which lays all "
                "parameters out when it is made; use DDP, or FSDP2's fully_shard"
            )
    for block in blocks:
        named = tuple(block.named_parameters())
        if not named:
            raise ValueError(
                f"`blocks` must hold the model's own parameters, got {block.name!r}, whose modules hold none any more; "
                "if FSDP took them, pass use_orig_params=True to FullyShardedDataParallel, or use fully_shard"
            )
        for name, parameter in named:
            if hasattr(parameter, "ds_id"):
                raise ValueError(
                    f"`blocks` must hold parameters that can join later, got {name}, which DeepSpeed partitions; "
                    "use DDP, or FSDP2's fully_shard"
                )
            if getattr(parameter, "_is_flat_param", False):
                raise ValueError(
                    f"`blocks` must hold the model's own parameters, got {name}, which FSDP made of several; "
                    "pass use_orig_params=True to FullyShardedDataParallel, or use fully_shard"
                )


def _norm(gradient: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """The gradient's 2-norm in double precision; 0 for none, -1 for one that is not finite."""
    if gradient is None:
        return torch.zeros((), dtype=torch.float64, device=device)
    values = gradient.detach()
    if values.is_sparse:
        values = values.coalesce().values()
    norm = torch.linalg.vector_norm(values, dtype=torch.complex128 if values.is_complex() else torch.float64).real
    return torch.where(torch.isfinite(norm), norm, -torch.ones_like(norm)).to(device, torch.float64)


def _is_sharded(parameter: nn.Parameter) -> bool:
    tensor = sys.modules.get("torch.distributed.tensor")  # not loaded, not used
    return (tensor is not None and isinstance(parameter, tensor.DTensor)) or getattr(
        parameter, "_fsdp_flattened", False
    )
