"""The first step after a transition: did each newly trainable parameter get a gradient, and the same on all ranks?"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import Optimizer

from unfreeze_sched import parallel

Probe = Literal["ranks", "local", "off"]

_SHOWN = 10


class FirstStep:
    """Looks at the gradients of newly trainable parameters once, before the first step that could use them.

    No gradient is looked at between that step and the next transition.

    Args:
        optimizer: The live optimizer, or what is innermost of its wrappers.
        probe: `"ranks"` also compares the gradients across ranks where a process group is up, by one collective call on
            all ranks; `"local"` looks at this process alone, as local SGD needs; `"off"` does not look.

    Raises:
        ValueError: `probe` is none of these.
    """

    def __init__(self, optimizer: Optimizer, probe: Probe) -> None:
        if probe not in get_args(Probe):
            raise ValueError(
                f"`probe` must be one of {', '.join(get_args(Probe))}, got {probe!r}; 'ranks' is the default"
            )
        self._optimizer = optimizer
        self._probe = probe
        self._watched: list[Sequence[tuple[str, nn.Parameter]]] = []
        self._handle: Any = None
        if probe != "off":
            optimizer.register_step_post_hook(self._after_step)

    def watch(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Look at those of these parameters that are trainable when the next step begins."""
        if self._probe == "off":
            return
        self._watched.append(named)
        if self._handle is None:
            self._handle = self._optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._watched:  # the last step was cut short after the look
            return None
        optimizer, *given = args
        closure = given[0] if given else kwargs.get("closure")
        if closure is None:
            self._look()
            return None

        def probed() -> Any:  # the gradients come to be within the step
            loss = closure()
            self._look()
            return loss

        return ((optimizer, probed, *given[1:]), kwargs) if given else (args, {**kwargs, "closure": probed})

    def _after_step(self, *_: Any) -> None:
        # Not sooner: torch walks the pre-hooks, and another's may come after this one.
        if self._handle is not None and not self._watched:
            self._handle.remove()
            self._handle = None

    def _look(self) -> None:
        watched = {name: parameter for named in self._watched for name, parameter in named if parameter.requires_grad}
        compared = self._probe == "ranks" and parallel.world_size() > 1
        if compared:
            differing, seen = parallel.differing_gradients(watched)
            if differing:
                raise RuntimeError(
                    f"gradients of newly trainable parameters must be the same on all ranks, got others for "
                    f"{_listed(differing)}: DistributedDataParallel does not reduce what was frozen when it was made; "
                    "wrap anew after each transition, ddp = unfreeze_sched.parallel.rewrap_ddp(ddp), or wrap while "
                    "everything is trainable, with find_unused_parameters=True (probe='local' is for local SGD)"
                )
            if not seen:
                return  # no gradient but zero on any rank, which tells nothing; all ranks look again
        missing = [name for name, parameter in watched.items() if parameter.grad is None and parameter.numel()]
        if not compared and len(missing) == len(watched) and not self._has_gradients():
            return  # a step without a backward pass
        self._watched.clear()
        if missing:
            warnings.warn(
                f"no gradient reached {_listed(missing)} in the first step after unfreezing, so they do not train: a "
                "branch that the loss does not use, or a frozen input of torch.utils.checkpoint, whose fix is "
                "use_reentrant=False",
                UserWarning,
                stacklevel=4,
            )

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for group in self._optimizer.param_groups for p in group["params"])


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
