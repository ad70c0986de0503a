"""Tells gradients of an accumulation that is not over from gradients that the last step has used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Accumulation:
    """Watches the smallest parameter of one group: its gradient changes with each backward pass.

    A transition in the middle of an accumulation would let the joining parameters see a part of the gradient alone.
    That a gradient is there says nothing: many loops clear it before the backward pass, not after the step.

    Args:
        optimizer: The live optimizer, or what is innermost of its wrappers.
        template: 0-based index of the group to watch.
    """

    def __init__(self, optimizer: Optimizer, template: int) -> None:
        self._optimizer = optimizer
        self._parameter = min(optimizer.param_groups[template]["params"], key=Tensor.numel, default=None)
        self._used: tuple[Tensor, int] | None = None
        self._note()
        optimizer.register_step_post_hook(self._note)

    def refuse_pending(self) -> None:
        """Refuse while there are gradients that no step has used.

        Raises:
            RuntimeError: There are; nothing has changed.
        """
        if self._is_pending():
            raise RuntimeError(
                "`optimizer` must have used its gradients before blocks join, got an accumulation that is not over; "
                "call optimizer.step() and optimizer.zero_grad() first, or zero_grad() alone to give it up"
            )

    def _note(self, *_: Any) -> None:
        gradient = None if self._parameter is None else self._parameter.grad
        # The object itself is kept, small as it is: an address would be used again by the next gradient.
        self._used = None if gradient is None else (gradient, gradient._version)  # noqa: SLF001  # torch's own counter

    def _is_pending(self) -> bool:
        gradient = None if self._parameter is None else self._parameter.grad
        if gradient is None or (
            self._used is not None and gradient is self._used[0] and gradient._version == self._used[1]  # noqa: SLF001
        ):
            return False
        if not gradient.count_nonzero():
            return False  # zero_grad(set_to_none=False)
        # A step that GradScaler left out, since a gradient overflowed, has used them as well.
        gradients = (
            parameter.grad
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        )
        return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
