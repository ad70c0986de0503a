"""Intersection over union, from a confusion matrix that adds up over batches."""

import torch
from torch import Tensor

from unfreeze_sched.distill.loss import IGNORE_INDEX


def confusion_matrix(predictions: Tensor, masks: Tensor, classes: int, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Count pixels by true and predicted class; matrices of several batches add up.

    ``M[t, p]`` is the number of pixels of true class ``t`` predicted as ``p``, those with ``t == ignore_index`` left
    out.

    Args:
        predictions: logits of shape (B, classes, H, W) in any floating type, of which the argmax counts, or class
            indices of the masks' shape in any integer type.
        masks: true class indices, 0-based, of shape (B, H, W), integers.
        classes: number of classes, at least 1.
        ignore_index: the index of pixels without a truth.

    Returns:
        An int64 tensor of shape (classes, classes), on the masks' device.

    Raises:
        ValueError: the shapes do not belong together, or an index lies outside ``0 .. classes - 1``.

    Example:
        >>> confusion_matrix(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 255]), 2)
        tensor([[1, 1],
                [0, 1]])
    """
    if predictions.is_floating_point():
        expected = (*masks.shape[:1], classes, *masks.shape[1:])
        if predictions.shape != expected:
            raise ValueError(
                f"`predictions` must have the shape {tuple(expected)} for logits, got {tuple(predictions.shape)}; "
                "masks are (B, H, W), logits (B, classes, H, W)",
            )
        predictions = predictions.argmax(dim=1)
    if predictions.shape != masks.shape:
        raise ValueError(
            f"`predictions` must have the masks' shape {tuple(masks.shape)}, got {tuple(predictions.shape)}; "
            "resize the predictions",
        )
    counted = masks != ignore_index
    truth, guess = masks[counted].long(), predictions[counted].long()
    for name, values in (("masks", truth), ("predictions", guess)):
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < classes:
            wrong = int(values.max()) if int(values.max()) >= classes else int(values.min())
            raise ValueError(f"`{name}` must hold indices 0 to {classes - 1}, got {wrong}; set `classes` to cover it")
    return torch.bincount(truth * classes + guess, minlength=classes**2).reshape(classes, classes)


def class_ious(matrix: Tensor) -> Tensor:
    """Each class's intersection over union.

    ``IoU[c] = M[c, c] / (sum_p M[c, p] + sum_t M[t, c] - M[c, c])``; NaN for a class neither there nor predicted.

    Args:
        matrix: what `confusion_matrix` counts, of shape (classes, classes): true class by predicted class.

    Returns:
        A float64 tensor of shape (classes,), values in 0 to 1 or NaN.

    Example:
        >>> class_ious(torch.tensor([[1, 1, 0], [0, 2, 0], [0, 0, 0]]))
        tensor([0.5000, 0.6667,    nan], dtype=torch.float64)
    """
    hits = matrix.diagonal().double()
    return hits / (matrix.sum(dim=1) + matrix.sum(dim=0) - matrix.diagonal())


def mean_iou(matrix: Tensor) -> float:
    """Average intersection over union of the classes that are there or predicted.

    ``mIoU = mean of IoU[c] over the c with sum_p M[c, p] + sum_t M[t, c] > 0``: a class absent from both the truth and
    the predictions is left out, one that is only predicted counts as 0.

    Args:
        matrix: what `confusion_matrix` counts, of shape (classes, classes): true class by predicted class.

    Returns:
        A number from 0 to 1.

    Raises:
        ValueError: no pixel was counted.

    Example:
        >>> mean_iou(torch.tensor([[1, 0, 0], [1, 2, 0], [0, 0, 0]]))
        0.5833333333333333
    """
    if not matrix.any():
        raise ValueError("`matrix` must count at least one pixel, got none; add a batch, or unignore pixels")
    return float(class_ious(matrix).nanmean())
