"""An LR scheduler taught about a group that joins its optimizer late.

A scheduler keeps, for each param group, a *row*: entries of lists such as `base_lrs`, and keys in the group such as
`initial_lr`. A joining group gets the row of its template. Where the group's learning rate is to be `ratio` times the
template's, the row's rates are multiplied by it; the rest, momenta and functions, is copied. From then on the scheduler
computes for the new group what it would have computed had the group been there from the start, since its formulas are
homogeneous in the row's rates. An absolute floor (`eta_min`) is the exception: there the *distance* from the floor is
what scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR

Rate = float | Tensor
RateMap = Callable[[Rate], Rate]


@dataclass(frozen=True)
class _Row:
    """What a class of schedulers keeps for each group beside `base_lrs`, `_last_lr` and the key `initial_lr`."""

    scaled_lists: tuple[str, ...] = ()
    copied_lists: tuple[str, ...] = ()
    scaled_keys: tuple[str, ...] = ()
    floor: str | None = None


# By exact class: a subclass may compute something else, and a guess would be silently wrong.
_ROWS: dict[type, _Row] = {
    lr_scheduler.LambdaLR: _Row(copied_lists=("lr_lambdas",)),
    lr_scheduler.MultiplicativeLR: _Row(copied_lists=("lr_lambdas",)),
    lr_scheduler.StepLR: _Row(),
    lr_scheduler.MultiStepLR: _Row(),
    lr_scheduler.ConstantLR: _Row(),
    lr_scheduler.LinearLR: _Row(),
    lr_scheduler.ExponentialLR: _Row(),
    lr_scheduler.PolynomialLR: _Row(),
    lr_scheduler.CosineAnnealingLR: _Row(floor="eta_min"),
    lr_scheduler.CosineAnnealingWarmRestarts: _Row(floor="eta_min"),
    lr_scheduler.OneCycleLR: _Row(scaled_keys=("max_lr", "min_lr")),
    lr_scheduler.CyclicLR: _Row(scaled_lists=("max_lrs",), copied_lists=("base_momentums", "max_momentums")),
    SWALR: _Row(scaled_keys=("swa_lr",)),
}
_COMPOSITES = (lr_scheduler.SequentialLR, lr_scheduler.ChainedScheduler)
_DECLARED = "pass membership='declared' and make the rebuilder before the scheduler"


def refuse_unknown(schedulers: Sequence[Any], optimizer: Optimizer) -> None:
    """Refuse what no group can join: an unknown class of scheduler, or one of another optimizer.

    Raises:
        TypeError: A scheduler of a class that is not known here.
        ValueError: A scheduler of another optimizer.
    """
    for scheduler in schedulers:
        if getattr(scheduler, "optimizer", optimizer) is not optimizer:
            raise ValueError(
                f"`lr_schedulers` must drive this optimizer, got a {type(scheduler).__name__} of another one; "
                "make the scheduler from the optimizer that is passed here"
            )
        for leaf in _leaves(scheduler):
            if type(leaf) not in _ROWS:
                raise TypeError(
                    f"`lr_schedulers` must be of known classes, got {type(leaf).__module__}.{type(leaf).__qualname__}; "
                    + _DECLARED
                )


def is_driven(optimizer: Optimizer) -> bool:
    """Whether some LR scheduler left its marks: a wrapped `step`, or `initial_lr` in a group."""
    return hasattr(optimizer.step, "_wrapped_by_lr_sched") or any(
        "initial_lr" in group for group in optimizer.param_groups
    )


def plan_rate(schedulers: Sequence[Any], index: int, ratio: float) -> RateMap:
    """The map from the template's learning rate to the joining group's, now and at every later step.

    Args:
        schedulers: Those of the optimizer, all known.
        index: 0-based place of the template among the optimizer's groups.
        ratio: Learning rate of the joining group over that of the template, in (0, 1].

    Raises:
        ValueError: A floor takes part in a way that depends on the past, so that no late row is exact.
    """
    if ratio == 1:
        return _copied
    leaves = [leaf for scheduler in schedulers for leaf in _leaves(scheduler)]
    floored = next((leaf for leaf in leaves if _floor(leaf)), None)
    if floored is None or all(leaf.last_epoch == 0 for leaf in leaves):
        return lambda rate: rate * ratio
    floor, base = _floor(floored), floored.base_lrs[index]
    if len(leaves) > 1 or base == floor:
        raise ValueError(
            f"`learning_rate_scale` must be 1 to join late under a {type(floored).__name__} with a floor of {floor} "
            f"beside other schedulers or at its floor, got {ratio}; {_DECLARED}"
        )
    # Both groups' distances from the floor go through the same factors, so their quotient stays what it was at first.
    quotient = (base * ratio - floor) / (base - floor)
    return lambda rate: floor + (rate - floor) * quotient


def join(scheduler: Any, groups: int, index: int, ratio: float, rate: RateMap) -> None:
    """Give a scheduler, and those within it, the row of the group that has just become the optimizer's last.

    Args:
        scheduler: A known scheduler.
        groups: Number of the optimizer's groups, the new one included.
        index: 0-based place of the template among them.
        ratio: Learning rate of the group over that of the template.
        rate: What `plan_rate` gave for them.
    """
    for part in _parts(scheduler):
        row = _ROWS.get(type(part), _Row())
        changes: dict[str, Callable[[Any], Any]] = {
            **dict.fromkeys(("base_lrs", *row.scaled_lists), lambda value: value * ratio),
            **dict.fromkeys(row.copied_lists, lambda value: value),
            "_last_lr": rate,
        }
        for name, change in changes.items():
            values = getattr(part, name, None)
            # The length tells a list that was extended already: a composite's `_last_lr` may be its child's.
            if values is not None and len(values) < groups:
                values.append(change(values[index]))


def leave(scheduler: Any, groups: int) -> None:
    """Take back what `join` gave for groups from the 0-based place `groups` on."""
    for part in _parts(scheduler):
        row = _ROWS.get(type(part), _Row())
        for name in ("base_lrs", "_last_lr", *row.scaled_lists, *row.copied_lists):
            values = getattr(part, name, None)
            if values is not None:
                del values[groups:]


def scaled_keys(schedulers: Sequence[Any]) -> tuple[str, ...]:
    """The keys of a group that hold rates of the schedulers' rows, to be multiplied by the ratio."""
    keys = {"initial_lr": None}
    for scheduler in schedulers:
        for leaf in _leaves(scheduler):
            keys.update(dict.fromkeys(_ROWS[type(leaf)].scaled_keys))
    return tuple(keys)


def _copied(rate: Rate) -> Rate:
    return rate.clone() if isinstance(rate, Tensor) else rate


def _floor(leaf: Any) -> float:
    name = _ROWS[type(leaf)].floor
    return 0.0 if name is None else getattr(leaf, name)


def _parts(scheduler: Any) -> Iterator[Any]:
    yield scheduler
    if isinstance(scheduler, _COMPOSITES):
        for child in scheduler._schedulers:  # noqa: SLF001  # torch has no public name for them
            yield from _parts(child)


def _leaves(scheduler: Any) -> Iterator[Any]:
    return (part for part in _parts(scheduler) if type(part) not in _COMPOSITES)
