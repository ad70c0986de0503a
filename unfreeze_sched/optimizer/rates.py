"""An LR scheduler taught about a group that joins its optimizer late.

A scheduler keeps, for each param group, a *row*: entries of lists such as `base_lrs`, and keys in the group such as
`initial_lr`. A joining group gets its template's row, the rates in it multiplied by `ratio`, its learning rate over the
template's; then the scheduler computes for it what it would have computed had it been there from the start, since its
formulas are homogeneous in the row's rates. An absolute floor, such as `eta_min`, is the exception: along one cosine it
is the *distance* from it that scales; where several schedulers had a say in the past, no late row is exact.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import cache, partial
from itertools import chain
from operator import mul
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim.lr_scheduler import ChainedScheduler, MultiplicativeLR, ReduceLROnPlateau, SequentialLR
from torch.optim.swa_utils import SWALR

from unfreeze_sched._checks import short
from unfreeze_sched.optimizer.groups import class_path

Rate = float | Tensor
RateMap = Callable[[Rate], Rate]
Schedulers = Sequence[Any] | None


class _Row(NamedTuple):
    """What a class of schedulers keeps for each group, in the words of `register`."""

    scaled_lists: tuple[str, ...] = ()
    copied_lists: tuple[str, ...] = ()
    scaled_keys: tuple[str, ...] = ("initial_lr",)
    floors: tuple[str, ...] = ()
    restarts: bool = True


UNKNOWN = _Row(scaled_keys=(), restarts=False)
"""Of sequences and chains, too: what they keep beside reports, the schedulers within keep."""

_COMPOSITES = frozenset({SequentialLR, ChainedScheduler})
_TIMM = _Row(scaled_lists=("base_values", "restore_lr"), copied_lists=("warmup_steps",))
_PLAIN = ("StepLR", "MultiStepLR", "ConstantLR", "LinearLR", "ExponentialLR", "PolynomialLR")
_OF_TIMM = ("Cosine", "MultiStep", "Plateau", "Poly", "Step", "Tanh", "WSD")
# By name, since timm is not imported for it.
_ROWS = {
    **{f"torch.optim.lr_scheduler.{name}": _Row() for name in _PLAIN},
    **{f"timm.scheduler.{name.lower()}_lr.{name}LRScheduler": _TIMM for name in _OF_TIMM},
    "torch.optim.lr_scheduler.LambdaLR": _Row(copied_lists=("lr_lambdas",)),
    "torch.optim.lr_scheduler.MultiplicativeLR": _Row(copied_lists=("lr_lambdas",), restarts=False),
    "torch.optim.lr_scheduler.CosineAnnealingLR": _Row(floors=("eta_min",)),
    "torch.optim.lr_scheduler.CosineAnnealingWarmRestarts": _Row(floors=("eta_min",)),
    "torch.optim.lr_scheduler.OneCycleLR": _Row(scaled_keys=("initial_lr", "max_lr", "min_lr")),
    "torch.optim.lr_scheduler.CyclicLR": _Row(("max_lrs",), ("base_momentums", "max_momentums")),
    "torch.optim.lr_scheduler.ReduceLROnPlateau": _Row(copied_lists=("min_lrs",), scaled_keys=(), restarts=False),
    "torch.optim.swa_utils.SWALR": _Row(scaled_keys=("initial_lr", "swa_lr"), restarts=False),
}


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

    With all rates of a group's row multiplied by a number, the class has to compute rates that are multiplied by it.

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


# --- what is known of a scheduler


@cache
def row_of(cls: Any) -> _Row:
    """What a class of schedulers keeps for each group; `UNKNOWN` where nobody said, and for sequences and chains."""
    return _ROWS.get(class_path(_kind(cls)), UNKNOWN)


@cache
def _kind(cls: Any) -> Any:
    """The known class that a class is: itself, or a parent whose methods it leaves alone, saving aside."""
    for base in cls.__mro__:
        if class_path(base) in _ROWS or base in _COMPOSITES:
            return base
        inherited = {name for parent in base.__mro__[1:-1] for name in vars(parent)}
        if {name for name in vars(base) if not name.startswith("__")} & inherited - {"state_dict", "load_state_dict"}:
            break  # it may compute something else, and a guess would be silently wrong
    return cls


def unwrapped(schedulers: Schedulers) -> list[Any]:
    """The schedulers, within accelerate's wrappers, which only decide when they step."""
    return [s.scheduler if type(s).__name__ == "AcceleratedScheduler" else s for s in schedulers or ()]


class _AtOnce(ChainedScheduler):
    """All schedulers of an optimizer, which are to it what a chain's are."""

    def __init__(self, schedulers: Schedulers) -> None:
        self._schedulers = unwrapped(schedulers)


def _with_inner(scheduler: Any) -> Iterator[Any]:
    """A scheduler and all within it; timm's plateau holds torch's."""
    yield scheduler
    if _kind(scheduler.__class__) in _COMPOSITES:
        for part in scheduler._schedulers:  # noqa: SLF001  # torch has no public name for them
            yield from _with_inner(part)
    elif _kind(scheduler.__class__).__name__ == "PlateauLRScheduler":
        yield scheduler.lr_scheduler


def leaves(schedulers: Schedulers) -> list[Any]:
    """Those that compute rates: the schedulers, or all those within a sequence or a chain."""
    inner = chain.from_iterable(map(_with_inner, unwrapped(schedulers)))
    return [part for part in inner if _kind(part.__class__) not in _COMPOSITES]


def _lasting(scheduler: Any) -> list[Any]:
    """The parts on which the present rate depends: all of a chain, none of a leaf.

    Of a sequence they are the present part and, where that goes on from the rate that it finds, all before it.
    """
    kind = _kind(scheduler.__class__)
    parts: list[Any] = list(scheduler._schedulers) if kind in _COMPOSITES else []  # noqa: SLF001  # likewise
    if kind is SequentialLR:
        place = bisect_right(scheduler._milestones, scheduler.last_epoch)  # noqa: SLF001  # likewise
        first = place if row_of(parts[place].__class__).restarts else 0
        return parts[first : place + 1]
    return parts


def _had_a_say(scheduler: Any) -> list[Any]:
    """The leaves on which the present rate depends."""
    parts = _lasting(scheduler)
    return list(chain.from_iterable(map(_had_a_say, parts))) if parts else [scheduler]


def _floor(leaf: Any) -> float:
    row = row_of(leaf.__class__)
    if row is _TIMM:
        return getattr(leaf, "lr_min", 0.0) or _warms_up_from(leaf)
    return next((getattr(leaf, name) for name in row.floors), 0.0)


def _warms_up_from(leaf: Any) -> float:
    return leaf.warmup_lr_init if row_of(leaf.__class__) is _TIMM and leaf.warmup_t else 0.0


def _is_above(plateau: Any, index: int, rate: float) -> bool:
    """Whether a group that stands at this rate went through the reductions that the template went through."""
    least = rate * (1 / plateau.factor - 1)  # what the last reduction took off
    return bool(rate >= plateau.min_lrs[index] and least > plateau.eps)


def _stands_at_first(leaf: Any, template: dict[str, Any], index: int, ratio: float) -> bool:
    """Whether a scheduler still stands at its first value, or gives a joining group what it would give there."""
    if row_of(leaf.__class__) is _TIMM:
        # timm's keep no count. At its base value any of them stands as at first, but WSD clamps low rates later on.
        base = leaf.base_values[index]
        clamps = _kind(leaf.__class__).__name__ == "WSDLRScheduler" and base * ratio < leaf.lr_min
        first = leaf.warmup_lr_init if leaf.warmup_t else base
        return float(template["lr"]) == float(first * template.get("lr_scale", 1.0)) and not clamps
    return bool(leaf.last_epoch <= 0)  # in a sequence those to come stand at -1


# --- the rate of a joining group


def joining_rate(schedulers: Schedulers, template: dict[str, Any], index: int, ratio: float) -> RateMap:
    """The map from the learning rate of the template, the optimizer's group `index` (0-based), to the joining group's.

    Where no floor took part, the rates are homogeneous and the map is the ratio; else it has to follow the formula of
    one scheduler, or is refused where that depends on the past.
    """
    reports: list[Any] = [getattr(scheduler, "_last_lr", None) for scheduler in unwrapped(schedulers)]  # timm's: none
    if reports and None not in reports and template.get("lr") is not None:
        found, reported = float(template["lr"]), [float(report[index]) for report in reports]
        if not any(math.isclose(found, report, rel_tol=1e-6) for report in reported):
            raise ValueError(
                f"`lr_schedulers` must be what sets the learning rate, got a template at {found:g} where "
                f"{'they' if len(reported) > 1 else 'it'} last set {', '.join(f'{rate:g}' for rate in reported)}: "
                "another scheduler took over, a wrapper dampens the rate, a hand set it, or a resume loaded the "
                "scheduler before the unfreezer (load unfreezer, scheduler, optimizer in this order); assign those in "
                "use to `unfreezer.rebuilder.lr_schedulers`, or None where the loop sets the rates"
            )
    if ratio == 1:
        return deepcopy
    all_leaves = leaves(schedulers)
    if all(_stands_at_first(leaf, template, index, ratio) for leaf in all_leaves):
        # timm's warm-up starts every group from one and the same rate.
        return deepcopy if any(map(_warms_up_from, all_leaves)) else partial(mul, ratio)
    plateaus = (leaf for leaf in all_leaves if _kind(leaf.__class__) is ReduceLROnPlateau and leaf.last_epoch)
    reduced = next((leaf for leaf in plateaus if not _is_above(leaf, index, float(template["lr"]) * ratio)), None)
    if reduced is None:
        along = _along(_AtOnce(schedulers), index, ratio) if any(map(_floor, all_leaves)) else partial(mul, ratio)
        if along:
            return along
    leaf = next(filter(_floor, _had_a_say(_AtOnce(schedulers)))) if reduced is None else reduced
    floor = _floor(leaf) if reduced is None else leaf.min_lrs[index]
    raise ValueError(
        f"`learning_rate_scale` must be 1 to join late where a {type(leaf).__name__} with a floor of {floor} has "
        f"played a part that depends on the past, got a ratio of {ratio}; pass membership='declared', with the "
        "rebuilder made before the scheduler's first step"
    )


def _along(scheduler: Any, index: int, ratio: float, *, is_nested: bool = False) -> RateMap | None:
    """The map between the two groups' rates along a scheduler's own formula, None where that depends on the past."""
    if ratio == 1:
        return deepcopy
    parts = _lasting(scheduler)
    if len(parts) == 1:
        return _along(parts[0], index, ratio, is_nested=not isinstance(scheduler, _AtOnce))
    if not any(map(_floor, _had_a_say(scheduler))):
        return partial(mul, ratio)
    if parts:  # a nested sequence is stepped once more when the outer one is made, of which its parts do not tell
        goes_on = _kind(scheduler.__class__) is SequentialLR and not is_nested
        return _past_floor(parts, index, ratio) if goes_on else None
    return None if row_of(scheduler.__class__) is _TIMM else _along_cosine(scheduler, index, ratio)


def _along_cosine(scheduler: Any, index: int, ratio: float) -> RateMap:
    floor, base = _floor(scheduler), scheduler.base_lrs[index]
    if scheduler.last_epoch <= 0:
        return partial(mul, ratio)
    if base == floor:  # the template stands still, and tells nothing of how far the cosine is
        restarts = hasattr(scheduler, "T_cur")
        elapsed, period = (scheduler.T_cur, scheduler.T_i) if restarts else (scheduler.last_epoch, scheduler.T_max)
        share = (1 + math.cos(math.pi * elapsed / period)) / 2
        return lambda rate: rate * 0 + (floor + (base * ratio - floor) * share)
    # Both groups' distances from the floor go through the same factors, so their quotient stays what it was at first.
    quotient = (base * ratio - floor) / (base - floor)
    return lambda rate: floor + (rate - floor) * quotient


def _past_floor(parts: Sequence[Any], index: int, ratio: float) -> RateMap | None:
    """The map where a sequence's last part goes on from the rate that the part before it, with a floor, left."""
    before, present = parts[-2:]
    along = _along(before, index, ratio) if len(parts) == 2 or row_of(before.__class__).restarts else None  # noqa: PLR2004
    if along is None:
        return None
    left: Any = before.get_last_lr()[index]
    left_to_us: Any = along(left)
    if _kind(present.__class__) is SWALR and (swa := present.optimizer.param_groups[index]["swa_lr"]) != left:
        # It mixes the rate that it found with its own, by a share that can be read off.
        return lambda rate: (swa * ratio - left_to_us) * ((rate - left) / (swa - left)) + left_to_us
    return partial(mul, left_to_us / left) if _kind(present.__class__) is MultiplicativeLR and left != 0 else None


def foreseen(schedulers: Schedulers, template: Mapping[str, Any], index: int, ratio: float) -> tuple[Any, float] | None:
    """What `joining_rate` may refuse once training has begun: a scheduler, and its floor or least step.

    There is no map along timm's, or past one beside others; a plateau's reductions may reach its own.
    """
    if ratio == 1 or template.get("lr") is None:
        return None
    parts = list(_with_inner(_AtOnce(schedulers)))
    chains = [part for part in parts if _kind(part.__class__) is ChainedScheduler and len(_lasting(part)) > 1]
    at_once = leaves(chains)
    for part in parts:
        if _kind(part.__class__) is ReduceLROnPlateau:
            reduced = float(template["lr"]) * part.factor * ratio
            if part.min_lrs[index] > 0 or not _is_above(part, index, reduced):
                return part, part.min_lrs[index] or part.eps
        elif _floor(part) and (part in at_once or row_of(part.__class__) is _TIMM):
            return part, _floor(part)
    return None


# --- the row of a joining group


def join(schedulers: Schedulers, groups: Sequence[Mapping[str, Any]], index: int, ratio: float, rate: RateMap) -> None:
    """Give schedulers, and those within them, the row of the group that has just become the optimizer's last.

    `index` is the template's 0-based place among the groups, and `rate` what `joining_rate` gave.
    """
    outer = unwrapped(schedulers)
    # By the address of the shorter list: a new one each, since a state that was saved in memory holds the old one, and
    # one for two where a composite's `_last_lr` is its child's.
    longer: dict[int, list[Any]] = {}
    for part, name, values in rows(schedulers):
        if id(values) not in longer:
            if len(values) >= len(groups):
                continue
            longer[id(values)] = [*values, *(entry_of_own(part, name, group) for group in groups[len(values) : -1])]
            entry, row = longer[id(values)][index], row_of(part.__class__)
            if name == "_last_lr":
                # What an inner scheduler reports is written anew at its next step, and no formula reads it, so that the
                # ratio will do where `joining_rate` would find nothing for it alone.
                own = rate if part in outer else _along(part, index, ratio) or partial(mul, ratio)
                entry = own(entry)
            elif row is _TIMM and name == "warmup_steps" and part.warmup_t and ratio != 1:
                entry = _warmup_step(part)
            elif name not in row.copied_lists:
                entry = entry * ratio
            longer[id(values)].append(entry)
        setattr(part, name, longer[id(values)])


def select(schedulers: Schedulers, places: Sequence[int]) -> None:
    """Keep the rows of these 0-based places, in this order; of a row that is short, those that there are."""
    for part, name, values in rows(schedulers):
        setattr(part, name, [values[place] for place in places if place < len(values)])


def rows(schedulers: Schedulers) -> list[tuple[Any, str, list[Any]]]:
    """Whatever list has an entry for each group, of schedulers and those within them: whose, its name, the list."""
    return [
        (part, name, values)
        for part in chain.from_iterable(map(_with_inner, unwrapped(schedulers)))
        for row in [row_of(part.__class__)]
        for name in ("base_lrs", "_last_lr", *row.scaled_lists, *row.copied_lists)
        if (values := getattr(part, name, None)) is not None
    ]


def entry_of_own(part: Any, name: str, group: Mapping[str, Any]) -> Any:
    """What a group that the user added himself would have in a list; None where it is the user's to say."""
    if name in {"base_lrs", "_last_lr"}:
        return group.get("initial_lr" if name == "base_lrs" else "lr", group.get("lr"))
    return getattr(part, "default_min_lr", None) if name == "min_lrs" else None


def _warmup_step(scheduler: Any) -> Any:
    """A timm scheduler's warm-up step of its last group, as its constructor would have computed it."""
    target = scheduler.base_values[-1]
    if _kind(scheduler.__class__).__name__ == "TanhLRScheduler" and not scheduler.warmup_prefix:
        target = scheduler._get_lr(scheduler.warmup_t)[-1]  # noqa: SLF001  # its own formula
    return (target - scheduler.warmup_lr_init) / scheduler.warmup_t


def has_lost(group: Mapping[str, Any], template: Mapping[str, Any], ratio: float, *, by_peaks: bool) -> bool:
    """Whether a block's rate is no longer its share; under schedulers, which may have floors, its peaks tell."""
    if ratio == 1 or group.get("lr") is None or template.get("lr") is None:
        return False
    if by_peaks:
        peaks = ("max_lr", "initial_lr", "swa_lr")
        return any(key in group and key in template and float(group[key]) == float(template[key]) for key in peaks)
    return not math.isclose(float(group["lr"]), float(template["lr"]) * ratio, rel_tol=1e-3)
