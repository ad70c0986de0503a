"""An LR scheduler taught about a group that joins its optimizer late.

A scheduler keeps, for each param group, a *row*: entries of lists such as `base_lrs`, and keys in the group such as
`initial_lr`. A joining group gets the row of its template. Where the group's learning rate is to be `ratio` times the
template's, the row's rates are multiplied by it; the rest, momenta and functions, is copied. From then on the scheduler
computes for the new group what it would have computed had the group been there from the start, since its formulas are
homogeneous in the row's rates.

An absolute floor, such as `eta_min`, is the exception. Under one cosine it is the *distance* from the floor that
scales; where the rate depends on what several schedulers did to it in the past, no late row is exact, and the join is
refused. Before the first step nothing has happened yet, and every join is exact.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from operator import mul
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim.lr_scheduler import ChainedScheduler, MultiplicativeLR, ReduceLROnPlateau, SequentialLR
from torch.optim.swa_utils import SWALR

from unfreeze_sched._checks import short
from unfreeze_sched.optimizer.groups import class_path

Rate = float | Tensor
RateMap = Callable[[Rate], Rate]


@dataclass(frozen=True)
class _Row:
    """What a class of schedulers keeps for each group, beside the lists `base_lrs` and `_last_lr` where it has them.

    Attributes:
        scaled_lists: Lists with a rate for each group.
        copied_lists: Lists with something else for each group.
        scaled_keys: Keys of the group that hold rates.
        floors: Attributes that hold absolute rates; 0 where they play no part.
        restarts: Whether its rates follow from the row alone once it takes over in a sequence.
    """

    scaled_lists: tuple[str, ...] = ()
    copied_lists: tuple[str, ...] = ()
    scaled_keys: tuple[str, ...] = ("initial_lr",)
    floors: tuple[str, ...] = ()
    restarts: bool = True


_TIMM = _Row(scaled_lists=("base_values", "warmup_steps", "restore_lr"), floors=("lr_min", "warmup_lr_init"))

_COMPOSITES = frozenset({SequentialLR, ChainedScheduler})

UNKNOWN = _Row(scaled_keys=(), restarts=False)
"""Of sequences and chains, too: what they keep beside reports, the schedulers within keep."""

# By name, since timm is not imported for it.
_ROWS = {
    "torch.optim.lr_scheduler.LambdaLR": _Row(copied_lists=("lr_lambdas",)),
    "torch.optim.lr_scheduler.MultiplicativeLR": _Row(copied_lists=("lr_lambdas",), restarts=False),
    "torch.optim.lr_scheduler.StepLR": _Row(),
    "torch.optim.lr_scheduler.MultiStepLR": _Row(),
    "torch.optim.lr_scheduler.ConstantLR": _Row(),
    "torch.optim.lr_scheduler.LinearLR": _Row(),
    "torch.optim.lr_scheduler.ExponentialLR": _Row(),
    "torch.optim.lr_scheduler.PolynomialLR": _Row(),
    "torch.optim.lr_scheduler.CosineAnnealingLR": _Row(floors=("eta_min",)),
    "torch.optim.lr_scheduler.CosineAnnealingWarmRestarts": _Row(floors=("eta_min",)),
    "torch.optim.lr_scheduler.OneCycleLR": _Row(scaled_keys=("initial_lr", "max_lr", "min_lr")),
    "torch.optim.lr_scheduler.CyclicLR": _Row(
        scaled_lists=("max_lrs",), copied_lists=("base_momentums", "max_momentums")
    ),
    "torch.optim.lr_scheduler.ReduceLROnPlateau": _Row(copied_lists=("min_lrs",), scaled_keys=(), restarts=False),
    "torch.optim.swa_utils.SWALR": _Row(scaled_keys=("initial_lr", "swa_lr"), restarts=False),
    "timm.scheduler.cosine_lr.CosineLRScheduler": _TIMM,
    "timm.scheduler.multistep_lr.MultiStepLRScheduler": _TIMM,
    "timm.scheduler.plateau_lr.PlateauLRScheduler": _TIMM,
    "timm.scheduler.poly_lr.PolyLRScheduler": _TIMM,
    "timm.scheduler.step_lr.StepLRScheduler": _TIMM,
    "timm.scheduler.tanh_lr.TanhLRScheduler": _TIMM,
    "timm.scheduler.wsd_lr.WSDLRScheduler": _TIMM,
}


def unwrapped(scheduler: Any) -> Any:
    """What accelerate wraps, which only decides when it steps; any other scheduler itself."""
    return scheduler.scheduler if type(scheduler).__name__ == "AcceleratedScheduler" else scheduler


def leaves(scheduler: Any) -> Iterator[Any]:
    """The schedulers that compute rates: the scheduler, or all those within a sequence or a chain."""
    return (part for part in _with_inner(scheduler) if _kind(part.__class__) not in _COMPOSITES)


def register(
    cls: type,
    *,
    scaled_lists: Sequence[str] = (),
    copied_lists: Sequence[str] = (),
    scaled_keys: Sequence[str] = ("initial_lr",),
    floors: Sequence[str] = (),
    restarts: bool = True,
) -> None:
    """Say what a class of LR schedulers of your own keeps for each group, so that groups can join under it.

    What is named here has to be homogeneous: with all rates of a group's row multiplied by a number, the class has to
    compute rates that are multiplied by it.

    Args:
        cls: The class; `base_lrs` and `_last_lr` are known of each.
        scaled_lists: Attributes that are lists with a learning rate for each group.
        copied_lists: Attributes that are lists with something else for each group.
        scaled_keys: Keys of a group that hold learning rates.
        floors: Attributes that hold an absolute learning rate, below which no group's falls; 0 is none.
        restarts: Whether its rates follow from the row alone when it takes over in a SequentialLR.

    Raises:
        TypeError: `cls` is no class, or one of the others no list of names.

    Example:
        >>> import torch
        >>> class Halving(torch.optim.lr_scheduler.LRScheduler):
        ...     def get_lr(self):
        ...         return [base * 0.5**self.last_epoch for base in self.base_lrs]
        >>> register(Halving)
    """
    if not isinstance(cls, type):
        raise TypeError(f"`cls` must be a class, got {type(cls).__name__}; pass the scheduler's class itself")
    given = {"scaled_lists": scaled_lists, "copied_lists": copied_lists, "scaled_keys": scaled_keys, "floors": floors}
    for argument, names in given.items():
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"`{argument}` must be a list of names, got {short(names)}; write ['base_lrs'] for one")
    _ROWS[class_path(cls)] = _Row(**{key: tuple(names) for key, names in given.items()}, restarts=restarts)
    _kind.cache_clear()
    row_of.cache_clear()


@cache
def row_of(cls: Any) -> _Row:
    """What a class of schedulers keeps for each group; `UNKNOWN` where nobody said, and for sequences and chains."""
    return _ROWS.get(class_path(_kind(cls)), UNKNOWN)


@cache
def _kind(cls: Any) -> Any:
    """The known class that a class is: itself, or a parent whose methods it leaves alone, saving aside.

    Example:
        >>> import torch
        >>> class Own(torch.optim.lr_scheduler.LambdaLR):
        ...     def __init__(self, optimizer):
        ...         super().__init__(optimizer, lambda epoch: 0.9**epoch)
        >>> _kind(Own).__name__
        'LambdaLR'
    """
    for base in cls.__mro__:
        if class_path(base) in _ROWS or base in _COMPOSITES:
            return base
        inherited = {name for parent in base.__mro__[1:-1] for name in vars(parent)}
        if {name for name in vars(base) if not name.startswith("__")} & inherited - {"state_dict", "load_state_dict"}:
            break  # it may compute something else, and a guess would be silently wrong
    return cls


def has_lost(group: Mapping[str, Any], template: Mapping[str, Any], ratio: float, *, by_peaks: bool) -> bool:
    """Whether a group's learning rate is no longer what it is to be beside its template's.

    Args:
        group: The group of a block.
        template: What it is like.
        ratio: What is promised, in (0, 1].
        by_peaks: Whether peaks tell, where a scheduler is at work: it may have floors, so that rates do not.
    """
    if ratio == 1 or group.get("lr") is None or template.get("lr") is None:
        return False
    if by_peaks:
        peaks = ("max_lr", "initial_lr", "swa_lr")
        return any(key in group and key in template and float(group[key]) == float(template[key]) for key in peaks)
    return not math.isclose(float(group["lr"]), float(template["lr"]) * ratio, rel_tol=1e-3)


# --- the rate of a joining group


class Floored(NamedTuple):
    """What stands against a late join: a floor that took part in a way that depends on the past."""

    scheduler: Any
    floor: float


class Foreign(NamedTuple):
    """What stands against it, too: a rate that none of the schedulers says to have set last."""

    found: float
    reported: list[float]


def joining_rate(
    schedulers: Sequence[Any], template: dict[str, Any], index: int, ratio: float
) -> RateMap | Floored | Foreign:
    """The map from the template's present learning rate to the joining group's, or why there is none.

    Where no floor took part, the rates are homogeneous and the map is the ratio. Else it has to follow a scheduler's
    own formula, `_along` one scheduler. That exists where `_followed` finds the one scheduler whose formula the present
    rate follows, or where `_past_floor` can go on, in a sequence, from the map along the part before.

    Args:
        schedulers: Those of the optimizer, all known.
        template: The live group that is cloned.
        index: Its 0-based place among the optimizer's groups.
        ratio: Learning rate of the joining group over that of the template, in (0, 1].
    """
    schedulers = [unwrapped(scheduler) for scheduler in schedulers]
    reports: list[Any] = [getattr(scheduler, "_last_lr", None) for scheduler in schedulers]  # timm's keep none
    if reports and None not in reports and template.get("lr") is not None:
        found, reported = float(template["lr"]), [float(report[index]) for report in reports]
        if not any(math.isclose(found, report, rel_tol=1e-6) for report in reported):
            return Foreign(found, reported)
    if ratio == 1:
        return _copied
    all_leaves = [leaf for scheduler in schedulers for leaf in leaves(scheduler)]
    if all(_stands_at_first(leaf, template, index, ratio) for leaf in all_leaves):
        # timm's warm-up starts every group from one and the same rate.
        return _copied if any(_warms_up_from(leaf) for leaf in all_leaves) else partial(mul, ratio)
    for leaf in all_leaves:
        is_plateau = _kind(leaf.__class__) is ReduceLROnPlateau
        if is_plateau and leaf.last_epoch and not _is_above(leaf, index, float(template["lr"]) * ratio):
            return Floored(leaf, leaf.min_lrs[index])
    floored = next(filter(_floor, all_leaves), None)
    if floored:  # those to come in a sequence have had no say
        floored = next((leaf for scheduler in schedulers for leaf in _had_a_say(scheduler) if _floor(leaf)), None)
    if floored is None:
        return partial(mul, ratio)
    along = _along(schedulers[0], index, ratio) if len(schedulers) == 1 else None
    return along or Floored(floored, _floor(floored))


def foreseen(schedulers: Sequence[Any], template: Mapping[str, Any], index: int, ratio: float) -> Floored | None:
    """What may stand against a late join once training has begun, told from the schedulers as they are.

    It tells `joining_rate`'s answer beforehand: a plateau's floor or least step, which reductions may reach, and floors
    of several schedulers at work at once, or of timm's, along which there is no map.
    """
    schedulers = [unwrapped(scheduler) for scheduler in schedulers]
    all_leaves = [leaf for scheduler in schedulers for leaf in leaves(scheduler)]
    if ratio == 1 or template.get("lr") is None:
        return None
    for leaf in all_leaves:
        if _kind(leaf.__class__) is ReduceLROnPlateau:
            reduced = float(template["lr"]) * leaf.factor * ratio
            if leaf.min_lrs[index] > 0 or not _is_above(leaf, index, reduced):
                return Floored(leaf, leaf.min_lrs[index] or leaf.eps)
        elif _floor(leaf) and row_of(leaf.__class__) is _TIMM:
            return Floored(leaf, _floor(leaf))
    mixed = all_leaves if len(schedulers) > 1 else list(_mixed(schedulers[0])) if schedulers else []
    return next((Floored(leaf, _floor(leaf)) for leaf in mixed if _floor(leaf)), None)


def _mixed(scheduler: Any) -> Iterator[Any]:
    """The leaves that work at the same time as another."""
    parts = scheduler._schedulers if _kind(scheduler.__class__) in _COMPOSITES else ()  # noqa: SLF001  # no public name
    if _kind(scheduler.__class__) is ChainedScheduler and len(parts) > 1:
        yield from leaves(scheduler)
    else:
        for part in parts:
            yield from _mixed(part)


def _copied(rate: Rate) -> Rate:
    return rate.clone() if isinstance(rate, Tensor) else rate


def _along(scheduler: Any, index: int, ratio: float) -> RateMap | None:
    """The map between the two groups' rates along a scheduler's own formula, None where that depends on the past."""
    if ratio == 1:
        return _copied
    if not any(_floor(leaf) for leaf in _had_a_say(scheduler)):
        return partial(mul, ratio)
    leaf = _followed(scheduler)
    if leaf is None or row_of(leaf.__class__) is _TIMM:
        return _past_floor(scheduler, index, ratio)
    floor, base = _floor(leaf), leaf.base_lrs[index]
    if not floor or leaf.last_epoch <= 0:
        return partial(mul, ratio)
    if base == floor:  # the template stands still, and tells nothing of how far the cosine is
        elapsed, period = (leaf.T_cur, leaf.T_i) if hasattr(leaf, "T_cur") else (leaf.last_epoch, leaf.T_max)
        share = (1 + math.cos(math.pi * elapsed / period)) / 2
        return lambda rate: rate * 0 + (floor + (base * ratio - floor) * share)
    # Both groups' distances from the floor go through the same factors, so their quotient stays what it was at first.
    quotient = (base * ratio - floor) / (base - floor)
    return lambda rate: floor + (rate - floor) * quotient


def _past_floor(scheduler: Any, index: int, ratio: float) -> RateMap | None:
    """The map in a sequence whose present part goes on from the rate that the part before it, with a floor, left."""
    if _kind(scheduler.__class__) is not SequentialLR:
        return None
    place = _place(scheduler)
    before, present = scheduler._schedulers[place - 1 : place + 1]  # noqa: SLF001  # torch has no public name for them
    along = _along(before, index, ratio) if place == 1 or row_of(before.__class__).restarts else None
    if along is None:
        return None
    left: Any = before.get_last_lr()[index]
    left_to_us: Any = along(left)
    swa: Any = scheduler.optimizer.param_groups[index].get("swa_lr")
    if _kind(present.__class__) is SWALR and swa != left:
        # It mixes the rate that it found with its own, by a share that can be read off.
        return lambda rate: (swa * ratio - left_to_us) * ((rate - left) / (swa - left)) + left_to_us
    if _kind(present.__class__) is MultiplicativeLR and left != 0:
        return partial(mul, left_to_us / left)
    return None


def _followed(scheduler: Any) -> Any | None:
    """The scheduler whose own formula the rate follows now, None where it is a product of several."""
    if _kind(scheduler.__class__) is SequentialLR:
        place, restarts = _present(scheduler)
        return _followed(scheduler._schedulers[place]) if place == 0 or restarts else None  # noqa: SLF001  # likewise
    if _kind(scheduler.__class__) is ChainedScheduler:
        inner = scheduler._schedulers  # noqa: SLF001  # likewise
        return _followed(inner[0]) if len(inner) == 1 else None
    return scheduler


def _had_a_say(scheduler: Any) -> Iterator[Any]:
    """The leaves that may have had a say in the present rate: in a sequence, those up to the present one."""
    if _kind(scheduler.__class__) is SequentialLR:
        place, restarts = _present(scheduler)
        first = place if restarts else 0
        for part in scheduler._schedulers[first : place + 1]:  # noqa: SLF001  # likewise
            yield from _had_a_say(part)
    elif _kind(scheduler.__class__) is ChainedScheduler:
        for part in scheduler._schedulers:  # noqa: SLF001  # likewise
            yield from _had_a_say(part)
    else:
        yield scheduler


def _stands_at_first(leaf: Any, template: dict[str, Any], index: int, ratio: float) -> bool:
    """Whether a scheduler still stands at its first value, or gives a joining group what it would give there."""
    if row_of(leaf.__class__) is _TIMM:
        # timm's keep no count. At its base value any of them stands as at first, but WSD clamps low rates later on.
        base = leaf.base_values[index]
        clamps = _kind(leaf.__class__).__name__ == "WSDLRScheduler" and base * ratio < leaf.lr_min
        first = leaf.warmup_lr_init if leaf.warmup_t else base
        return float(template["lr"]) == float(first * template.get("lr_scale", 1.0)) and not clamps
    return bool(leaf.last_epoch <= 0)  # in a sequence those to come stand at -1


def _is_above(plateau: Any, index: int, rate: float) -> bool:
    """Whether a group that stands at this rate went through the reductions that the template went through."""
    least = rate * (1 / plateau.factor - 1)  # what the last reduction took off
    return bool(rate >= plateau.min_lrs[index] and least > plateau.eps)


# --- the row of a joining group


def join(scheduler: Any, groups: Sequence[Mapping[str, Any]], index: int, ratio: float, rate: RateMap) -> None:
    """Give a scheduler, and those within it, the row of the group that has just become the optimizer's last.

    Args:
        scheduler: A known scheduler.
        groups: The optimizer's, the new one included.
        index: 0-based place of the template among them.
        ratio: Learning rate of the group over that of the template.
        rate: What `joining_rate` gave for them.
    """
    scheduler = unwrapped(scheduler)
    # Lists by the address of the shorter one, kept beside: a new one each, since a state that was saved in memory holds
    # the old one, and one for two where a composite's `_last_lr` is its child's.
    longer: dict[int, tuple[list[Any], list[Any]]] = {}
    for part in _with_inner(scheduler):
        row = row_of(part.__class__)
        if row is _TIMM:
            scaled = ("base_values", "restore_lr", *(("warmup_steps",) if part.warmup_t else ()))
            copied: tuple[str, ...] = () if part.warmup_t else ("warmup_steps",)
        else:
            scaled, copied = ("base_lrs", *row.scaled_lists), row.copied_lists
        # What an inner scheduler reports is written anew at its next step, and no formula reads it, so that the ratio
        # will do where `joining_rate` would find none for it alone.
        own = rate if part is scheduler else _along(part, index, ratio) or partial(mul, ratio)
        changes: dict[str, RateMap] = {
            **dict.fromkeys(scaled, partial(mul, ratio)),
            **dict.fromkeys(copied, lambda value: value),
            "_last_lr": own,
        }
        for name, change in changes.items():
            values = getattr(part, name, None)
            if values is None or len(values) >= len(groups):
                continue
            if id(values) not in longer:
                all_old = [*values, *(entry_of_own(part, name, group) for group in groups[len(values) : -1])]
                longer[id(values)] = values, [*all_old, change(all_old[index])]
            setattr(part, name, longer[id(values)][1])
        if row is _TIMM and part.warmup_t and ratio != 1:
            part.warmup_steps[-1] = _warmup_step(part)


def leave(scheduler: Any, groups: int) -> None:
    """Take back what `join` gave for groups from the 0-based place `groups` on."""
    for _, _, values in rows(scheduler):
        del values[groups:]


def reorder(scheduler: Any, order: Sequence[int]) -> None:
    """Bring the rows into another order, given the 0-based places that they have now."""
    for part, name, values in rows(scheduler):
        setattr(part, name, [values[place] for place in order])


def rows(scheduler: Any) -> list[tuple[Any, str, list[Any]]]:
    """Whatever list has an entry for each group, of a scheduler and those within it: whose, its name, the list."""
    return [
        (part, name, values)
        for part in _with_inner(unwrapped(scheduler))
        for row in [row_of(part.__class__)]
        for name in ("base_lrs", "_last_lr", *row.scaled_lists, *row.copied_lists)
        if (values := getattr(part, name, None)) is not None
    ]


def entry_of_own(part: Any, name: str, group: Mapping[str, Any]) -> Any:
    """What a group that the user added himself would have in a list; None where it is the user's to say."""
    if name in {"base_lrs", "_last_lr"}:
        return group.get("initial_lr" if name == "base_lrs" else "lr", group.get("lr"))
    return getattr(part, "default_min_lr", None) if name == "min_lrs" else None


def scaled_keys(schedulers: Sequence[Any]) -> tuple[str, ...]:
    """The keys of a group that hold rates of the schedulers' rows, to be multiplied by the ratio."""
    keys: dict[str, None] = {}
    for scheduler in map(unwrapped, schedulers):
        for leaf in leaves(scheduler):
            keys.update(dict.fromkeys(row_of(leaf.__class__).scaled_keys))
    return tuple(keys)


# --- what is known of a scheduler


def _with_inner(scheduler: Any) -> Iterator[Any]:
    """A scheduler and all within it; timm's plateau holds torch's."""
    yield scheduler
    if _kind(scheduler.__class__) in _COMPOSITES:
        for part in scheduler._schedulers:  # noqa: SLF001  # torch has no public name for them
            yield from _with_inner(part)
    elif _kind(scheduler.__class__).__name__ == "PlateauLRScheduler":
        yield scheduler.lr_scheduler


def _place(sequential: Any) -> int:
    return bisect_right(sequential._milestones, sequential.last_epoch)  # noqa: SLF001  # torch has no public name


def _present(sequential: Any) -> tuple[int, bool]:
    """The place of a sequence's present part, and whether that has taken over with rates of its own."""
    place = _place(sequential)
    present = sequential._schedulers[place]  # noqa: SLF001  # likewise
    return place, place > 0 and row_of(present.__class__).restarts


def _floor(leaf: Any) -> float:
    row = row_of(leaf.__class__)
    if row is _TIMM:
        return getattr(leaf, "lr_min", 0.0) or _warms_up_from(leaf)
    return next((getattr(leaf, name) for name in row.floors), 0.0)


def _warms_up_from(leaf: Any) -> float:
    return leaf.warmup_lr_init if row_of(leaf.__class__) is _TIMM and leaf.warmup_t else 0.0


def _warmup_step(scheduler: Any) -> float:
    """A timm scheduler's warm-up step of its last group, as its constructor would have computed it."""
    target = scheduler.base_values[-1]
    if _kind(scheduler.__class__).__name__ == "TanhLRScheduler" and not scheduler.warmup_prefix:
        target = scheduler._get_lr(scheduler.warmup_t)[-1]  # noqa: SLF001  # its own formula
    step: float = (target - scheduler.warmup_lr_init) / scheduler.warmup_t
    return step
