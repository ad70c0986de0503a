"""The distillation loss: a softened teacher term beside Dice and cross entropy against the masks."""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple

import torch
from segmentation_models_pytorch import losses
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # torch's own habit

IGNORE_INDEX = 255
"""The mask value of pixels without a truth: no loss, no metric."""


class LossParts(NamedTuple):
    """A `DistillationLoss` and its terms, scalars; `total` weighs the others."""

    total: Tensor
    distillation: Tensor
    dice: Tensor
    cross_entropy: Tensor


class DistillationLoss(nn.Module):
    r"""Knowledge distillation for segmentation: loss = alpha * distill + (1 - alpha) * (dice + cross_entropy).

    distill = T^2 * mean over pixels of KL(softmax(teacher / T) || softmax(student / T)), after Hinton, Vinyals and
    Dean, "Distilling the Knowledge in a Neural Network", 2015. One channel stands for two classes, the first with a
    logit of 0. Dice and cross entropy are segmentation_models_pytorch's; its Dice counts over the whole batch, a class
    without a true pixel contributes 0, and of one channel's classes the second alone counts. Means are over the pixels
    that are not ignored; where all are, the loss is 0.

    All is computed in float32, or in float64 where the student's logits are, under autocast too. The teacher gets no
    gradient. Each call checks the mask's values, which waits for the device once.

    Args:
        alpha: Weight of the distillation term, in [0, 1].
        temperature: T > 0, above 1 to soften; float32 resolves the term well up to about 100.
        ignore_index: Mask value of pixels that count nowhere. Binary masks hold 0 and 1: a mask saved as 0 and 255
            would have its whole foreground ignored; divide it by 255.

    Raises:
        TypeError: `ignore_index` is no integer.
        ValueError: `alpha` or `temperature` is no number in its range.

    Example:
        >>> loss = DistillationLoss(alpha=0.5, temperature=2.0)
        >>> student, teacher = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
        >>> parts = loss.parts(student, teacher, torch.zeros(1, 4, 4, dtype=torch.int64))
        >>> [round(part.item(), 4) for part in parts]  # Dice 0.5 for the one class there, log(3)
        [0.6326, 0.0, 0.1667, 1.0986]
    """

    def __init__(self, alpha: float = 0.5, temperature: float = 2.0, ignore_index: int = IGNORE_INDEX) -> None:
        super().__init__()
        self.alpha, self.temperature, self.ignore_index = _number(alpha), _number(temperature), ignore_index
        if not 0 <= self.alpha <= 1:  # false for NaN
            raise ValueError(f"`alpha` must be a number in [0, 1], got {alpha!r}; use 0.5 for equal weights")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"`temperature` must be a positive number, got {temperature!r}; use 1 for unsoftened targets"
            )
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"`ignore_index` must be an integer, got {ignore_index!r}; use 255, or -100 for no pixel")
        self._dice = losses.DiceLoss("multiclass", ignore_index=ignore_index)
        self._dice_of_one = losses.DiceLoss("multiclass", classes=[1], ignore_index=ignore_index)
        # Summed, and divided by the pixels that count: smp's own mean divides by all, so ignoring would scale the term.
        # smp's default of the smoothing, None, ends in a TypeError.
        self._cross_entropy = losses.SoftCrossEntropyLoss("sum", smooth_factor=0.0, ignore_index=ignore_index)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, masks: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            student_logits: (B, C, H, W); C = 1 is the binary case.
            teacher_logits: As the student's, with no gradient flowing into them.
            masks: Class indices, integers in [0, C) or `ignore_index`, (B, H, W). In the binary case 0, 1 or
                `ignore_index`, of any dtype, (B, H, W) or (B, 1, H, W).

        Raises:
            TypeError, ValueError: A kind, shape, dtype or mask value that does not belong; names it, and one fix.
        """
        return self.parts(student_logits, teacher_logits, masks).total

    def parts(self, student_logits: Tensor, teacher_logits: Tensor, masks: Tensor) -> LossParts:
        """The loss and its terms, for logging; arguments and errors as in `forward`."""
        labels = self._labels(student_logits, teacher_logits, masks)
        dtype = torch.promote_types(student_logits.dtype, torch.float32)
        student, teacher, dice = student_logits.to(dtype), teacher_logits.detach().to(dtype), self._dice
        if student.shape[1] == 1:
            student, teacher = (torch.cat([torch.zeros_like(each), each], 1) for each in (student, teacher))
            dice = self._dice_of_one
        counts = labels != self.ignore_index
        pixels = counts.sum().clamp_min(1)
        q, p = ((each / self.temperature).log_softmax(1) for each in (student, teacher))
        divergence = F.kl_div(q, p, reduction="none", log_target=True).sum(1)
        distillation = self.temperature**2 * (divergence * counts).sum() / pixels
        overlap, cross_entropy = dice(student, labels), self._cross_entropy(student, labels) / pixels
        total = self.alpha * distillation + (1 - self.alpha) * (overlap + cross_entropy)
        return LossParts(total, distillation, overlap, cross_entropy)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"alpha={self.alpha}, temperature={self.temperature}, ignore_index={self.ignore_index}"

    def _labels(self, student_logits: Tensor, teacher_logits: Tensor, masks: Tensor) -> Tensor:
        """The masks as int64, (B, H, W), after all three were checked."""
        for name, value in (("student_logits", student_logits), ("teacher_logits", teacher_logits), ("masks", masks)):
            if not isinstance(value, Tensor):
                raise TypeError(f"`{name}` must be a tensor, got {type(value).__name__}; use torch.as_tensor")
        shape = tuple(student_logits.shape)
        if len(shape) != 4 or shape[1] == 0:  # noqa: PLR2004  # (B, C, H, W)
            raise ValueError(f"`student_logits` must be (B, C, H, W), got {shape}; pass the model's output as it is")
        if tuple(teacher_logits.shape) != shape:
            raise ValueError(
                f"`teacher_logits` must have the student's shape {shape}, got {tuple(teacher_logits.shape)}; "
                "build both models with the same `classes` and feed both the same images"
            )
        batch, channels, *size = shape
        if channels == 1 and masks.shape == (batch, 1, *size):
            masks = masks.squeeze(1)
        if masks.shape != (batch, *size):
            raise ValueError(
                f"`masks` must be {(batch, *size)} for logits of {shape}, got {tuple(masks.shape)}; "
                "pass one class index a pixel, resized to the logits"
            )
        if channels > 1 and (masks.is_floating_point() or masks.is_complex()):
            raise TypeError(f"`masks` must hold integers for {channels} classes, got {masks.dtype}; use masks.long()")
        labels, classes = masks.long(), max(channels, 2)
        fits = ((labels >= 0) & (labels < classes) & (labels == masks)) | (masks == self.ignore_index)
        if not fits.all():
            raise ValueError(
                f"`masks` must hold classes 0 to {classes - 1} or {self.ignore_index} for {channels} "
                f"{'channel' if channels == 1 else 'channels'}, got {masks[~fits][0].item()}; "
                "check `classes` and how masks are read"
            )
        return labels.contiguous()  # smp 0.4 takes a view of them


def _number(value: object) -> float:
    """A real number as float, and NaN for all else, so that one range check refuses both."""
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
