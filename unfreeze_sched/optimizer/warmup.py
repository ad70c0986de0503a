"""A linear warm-up of a joining group's learning rate, which no LR scheduler ever sees."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from unfreeze_sched.optimizer.watch import Watcher

WARMUP_KEY = "unfreeze_warmup"
"""The key under which a group keeps [steps taken, steps in all]; saved and loaded with the group.

It stays when the warm-up is over: torch.distributed.checkpoint loads into the keys that a replayed group has.
"""


class Warmup(Watcher):
    """Lets step i (0-based) of a group's first k run at `(i + 1) / k` of its learning rate.

    A fresh Adam state otherwise begins with sign-like steps of full size. The rate is lowered when a step begins and is
    the scheduler's own again, to the bit, when it ends.
    """

    def __init__(self, optimizer: Optimizer, steps: int) -> None:
        super().__init__(optimizer)
        self.steps = steps
        self._own: list[tuple[dict[str, Any], Any]] = []

    def begin(self, groups: Iterable[dict[str, Any]]) -> None:
        """Start the warm-up of groups that have just joined; it goes on where the unfreezer is let go."""
        for group in groups:
            group[WARMUP_KEY] = [0, self.steps]
            self.stay()

    def before_step(self) -> None:
        """Lower the rates of all groups that warm up, whichever rebuilder began it: two would lower them twice."""
        if self.hooks.first(Warmup) is not self:
            return
        self._restore_rates()  # a step that failed has not done so
        for group in self._optimizer.param_groups:
            taken, total = group.get(WARMUP_KEY, (0, 0))
            if taken >= total:
                continue
            # Without CUDA torch raises where it is asked.
            may_ask = not torch.compiler.is_compiling() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
            if may_ask and torch.cuda.is_current_stream_capturing():
                self._restore_rates()
                raise RuntimeError(
                    f"`warmup_steps` must be over before a step is captured in a CUDA graph, got {total - taken} left, "
                    "at lowered rates that each replay would use; run them uncaptured, then capture"
                )
            rate, share = group["lr"], (taken + 1) / total
            if isinstance(rate, Tensor):
                self._own.append((group, rate.clone()))
                rate.mul_(share)
            else:
                self._own.append((group, rate))
                group["lr"] = rate * share
        if not self._own:
            self.hooks.busy -= {watcher for watcher in self.hooks.busy if isinstance(watcher, Warmup)}

    def after_step(self) -> None:
        """Give the rates back, and count the step."""
        # A fused step is told by GradScaler to change nothing, where another one is not called at all.
        if self._own and not getattr(self._optimizer, "found_inf", None):
            for group, _ in self._own:
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
