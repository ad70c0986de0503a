"""A linear warm-up of a joining group's learning rate, which no LR scheduler ever sees."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

WARMUP_KEY = "unfreeze_warmup"
"""The key under which a group keeps [steps taken, steps in all]; saved and loaded with the group.

It stays when the warm-up is over: torch.distributed.checkpoint loads into the keys that a replayed group has.
"""


class Warmup:
    """Lets step i (0-based) of a group's first k run at `(i + 1) / k` of its learning rate.

    A fresh Adam state otherwise begins with sign-like steps of full size. The rate is lowered when a step begins and is
    the scheduler's own again, to the bit, when it ends.

    Args:
        optimizer: The live optimizer, or what is innermost of its wrappers.
        steps: k, at least 1.
    """

    def __init__(self, optimizer: Optimizer, steps: int) -> None:
        self.steps = steps
        self._own: list[tuple[dict[str, Any], Any]] = []
        # One warm-up per optimizer, whichever rebuilder asked for it: two would lower the rate twice.
        hooks = optimizer._optimizer_step_pre_hooks  # noqa: SLF001  # torch has no public way to list them
        if not any(isinstance(getattr(hook, "__self__", None), Warmup) for hook in hooks.values()):
            optimizer.register_step_pre_hook(self._lower)
            optimizer.register_step_post_hook(self._restore)

    def begin(self, groups: Iterable[dict[str, Any]]) -> None:
        """Start the warm-up of groups that have just joined."""
        for group in groups:
            group[WARMUP_KEY] = [0, self.steps]

    def _lower(self, optimizer: Optimizer, *_: Any) -> None:
        self._restore_rates()  # a step that failed has not done so
        for group in optimizer.param_groups:
            taken, total = group.get(WARMUP_KEY, (0, 0))
            if taken < total:
                rate = group["lr"]
                if isinstance(rate, Tensor):
                    self._own.append((group, rate.clone()))
                    rate.mul_((taken + 1) / total)
                else:
                    self._own.append((group, rate))
                    group["lr"] = rate * ((taken + 1) / total)

    def _restore(self, optimizer: Optimizer, *_: Any) -> None:
        # A fused step is told by GradScaler to change nothing, where another one is not called at all.
        overflow = getattr(optimizer, "found_inf", None)
        if self._own and (overflow is None or not overflow):
            for group, _rate in self._own:
                taken, total = group[WARMUP_KEY]
                group[WARMUP_KEY] = [taken + 1, total]
        self._restore_rates()

    def _restore_rates(self) -> None:
        for group, rate in self._own:
            if isinstance(group["lr"], Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate
        self._own.clear()
