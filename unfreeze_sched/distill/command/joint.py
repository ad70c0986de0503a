"""Several ranks compute what one process would compute on the joint batch.

Each rank takes its share of the images. What looks at a batch as a whole sees the joint one: batch norms in training
mode take joint statistics, the loss is that of the joint logits (its Dice and its means over counted pixels are no
means of the shares'), and random draws are those of one process, of which a rank uses its images' part. So all random
generators stay equal, and a checkpoint fits any number of ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812  # torch's own habit
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from unfreeze_sched.distill.command.ranks import Ranks


@dataclass(frozen=True)
class Share:
    """A rank's part of a joint batch.

    Attributes:
        places: Of its images in the joint batch.
        sizes: Number of images by rank; empty where each takes all of them.
        total: Images of the joint batch.
    """

    places: slice
    sizes: tuple[int, ...]
    total: int

    @property
    def number(self) -> int:
        """Images of this rank."""
        return int(self.places.stop - self.places.start)


def share_of(total: int, ranks: Ranks) -> Share:
    """The rank's share: as even as can be, the first ranks taking one more; a batch smaller than the ranks goes to all.

    Example:
        >>> [share_of(5, Ranks(rank, 2)).places for rank in range(2)]
        [slice(0, 3, None), slice(3, 5, None)]
        >>> share_of(1, Ranks(1, 2)).places
        slice(0, 1, None)
    """
    if ranks.world == 1 or total < ranks.world:
        return Share(slice(0, total), (), total)
    sizes = tuple(total // ranks.world + (rank < total % ranks.world) for rank in range(ranks.world))
    stop = [*accumulate(sizes)][ranks.rank]
    return Share(slice(stop - sizes[ranks.rank], stop), sizes, total)


def wrap(module: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """The module, in DDP where there are several ranks; made anew after a transition by `rewrap_ddp`."""
    if ranks.world == 1:
        return module
    # Before torch 2.13 the argument had another name.
    newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    # Buffers are equal on all ranks already: they follow joint statistics.
    keywords: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
    return DistributedDataParallel(module, device_ids=None if device.type == "cpu" else [device], **keywords)


def joint_forward(
    module: Callable[[Tensor], tuple[Tensor, Tensor]], images: Tensor, masks: Tensor, share: Share
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, those to imitate and masks of the joint batch, on every rank.

    Args:
        module: Images -> its logits and those that it is to imitate.
        images: Of this rank's share.
        masks: Likewise.
        share: Which it is.
    """
    if not share.sizes:
        return *module(images), masks
    with _JointBatch(share):
        logits, targets = module(images)
    return _gathered(logits, share), _gathered(targets, share), _gathered(masks, share)


class _JointBatch(TorchFunctionMode):
    """Within it, norms and random draws are those of the joint batch."""

    def __init__(self, share: Share) -> None:
        super().__init__()
        self._share = share

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handle = _HANDLED.get(func)
        done = handle(self._share, func, args, kwargs or {}) if handle else NotImplemented
        return func(*args, **(kwargs or {})) if done is NotImplemented else done


def _batch_norm(share: Share, _: Any, args: Any, kwargs: Any) -> Any:
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given: dict[str, Any] = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
    given |= dict(zip(names, args, strict=False)) | kwargs
    images, momentum = given["input"], given["momentum"]
    if not given["training"]:
        return NotImplemented
    out, mean, variance = _JointNorm.apply(images, given["weight"], given["bias"], given["eps"], share)
    number = share.total * _places(images, share)
    for running, value in (
        (given["running_mean"], mean),
        (given["running_var"], variance * (number / max(number - 1, 1))),
    ):
        if running is not None:
            running.mul_(1 - momentum).add_(value, alpha=momentum)
    return out


def _bernoulli(share: Share, func: Any, args: Any, kwargs: Any) -> Any:
    own, *rest = args
    if not _by_image(own.shape, share) or any(isinstance(value, Tensor) for value in rest):
        return NotImplemented
    return own.copy_(func(own.new_empty(share.total, *own.shape[1:]), *rest, **kwargs)[share.places])


def _rand(share: Share, func: Any, args: Any, kwargs: Any) -> Any:
    size = args[0] if args and isinstance(args[0], (list, tuple)) else args
    if not _by_image(size, share):
        return NotImplemented
    return func(share.total, *size[1:], **kwargs)[share.places]


def _dropout(share: Share, func: Any, args: Any, kwargs: Any) -> Any:
    given: dict[str, Any] = {"p": 0.5, "training": True, "inplace": False}
    given |= dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
    own = given["input"]
    if not given["training"] or len(own) % share.number:
        return NotImplemented
    each = len(own) // share.number  # windows of an image, where these stand in the place of a batch
    joint = func(own.new_ones(share.total * each, *own.shape[1:]), given["p"])
    kept = joint[share.places.start * each : share.places.stop * each]
    return own.mul_(kept) if given["inplace"] else own * kept


_HANDLED: dict[Any, Callable[[Share, Any, Any, Any], Any]] = {
    F.batch_norm: _batch_norm,
    Tensor.bernoulli_: _bernoulli,
    torch.rand: _rand,
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), _dropout),
}


class _JointNorm(torch.autograd.Function):
    """Batch norm with the statistics of all ranks' images; torch's SyncBatchNorm has no CPU version."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, share: Share
    ) -> tuple[Tensor, Tensor, Tensor]:
        dims, shape = [0, *range(2, images.ndim)], [1, -1, *[1] * (images.ndim - 2)]
        mean = images.mean(dims)
        spread = (images - mean.view(shape)).square().sum(dims)
        # Gathered and summed here, in the same order on all ranks.
        means, spreads = _all(torch.stack([mean, spread])).unbind(1)
        counts = torch.tensor(share.sizes, device=mean.device, dtype=mean.dtype)[:, None] * _places(images, share)
        number = share.total * _places(images, share)
        mean = (counts * means).sum(0) / number
        variance = (spreads + counts * (means - mean).square()).sum(0) / number
        scale = (variance + eps).rsqrt()
        standard = (images - mean.view(shape)) * scale.view(shape)
        out = standard if weight is None else standard * weight.view(shape)
        ctx.number, ctx.biased = number, bias is not None
        ctx.save_for_backward(standard, weight, scale)
        ctx.mark_non_differentiable(mean, variance)
        return out.clone() if bias is None else out + bias.view(shape), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        standard, weight, scale = ctx.saved_tensors
        dims, shape = [0, *range(2, grad.ndim)], [1, -1, *[1] * (grad.ndim - 2)]
        own = torch.stack([grad.sum(dims), (grad * standard).sum(dims)])
        sums = _all(own).sum(0) / ctx.number
        inner = grad - sums[0].view(shape) - standard * sums[1].view(shape)
        factor = scale if weight is None else scale * weight
        return (
            inner * factor.view(shape),
            None if weight is None else own[1],
            own[0] if ctx.biased else None,
            None,
            None,
        )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, share: Share) -> Tensor:
        ctx.share = share
        padded = own.new_zeros(max(share.sizes), *own.shape[1:])
        padded[: len(own)] = own
        return torch.cat([piece[:size] for piece, size in zip(_all(padded), share.sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # DDP takes the mean over ranks, where the joint batch's gradient is the sum of the shares'.
        return grad[ctx.share.places] * len(ctx.share.sizes), None


def _by_image(size: Sequence[int], share: Share) -> bool:
    """Whether a draw of this size is one for each image; a row of numbers alone never is, since one is no sign."""
    return len(size) > 1 and size[0] == share.number


def _places(images: Tensor, share: Share) -> int:
    """Values of an image in one channel, (N, C, ...)."""
    return images.numel() // images.shape[1] // share.number


def _gathered(own: Tensor, share: Share) -> Tensor:
    joint: Tensor = _Gather.apply(own, share)
    return joint


def _all(own: Tensor) -> Tensor:
    """A tensor of all ranks, stacked."""
    pieces = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(distributed.get_world_size())]
    distributed.all_gather(pieces, own.contiguous())
    return torch.stack(pieces)
