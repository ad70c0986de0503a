"""What an optimizer keeps for a group, and how a joining group gets it: `add`, `fill`, `leave`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import nn

from unfreeze_sched.optimizer.counters import written

BLOCK_KEY = "unfreeze_block"
"""The key under which a block's param group carries the block's name; a string, so it survives save and load."""

SUBSET_KEY = "unfreeze_subset"
"""The key that tells the further groups of one block apart: 1, 2, ...; the first has none."""

_NOT_COUNTERS = frozenset({"params", "param_names", "lr", "initial_lr"})
_WRAPPED = ("optimizer", "_optimizer", "base_optimizer", "_base_optimizer", "base")
# Lists of an optimizer with a learning rate for each group.
_RATE_LISTS = ("base_lrs",)


def layers(optimizer: Any) -> Iterator[Any]:
    """An optimizer and those that it wraps (Lookahead, SAM, accelerate's, ...), outermost first.

    Example:
        >>> import torch
        >>> [type(layer).__name__ for layer in layers(torch.optim.SGD([nn.Parameter(torch.ones(1))]))]
        ['SGD']
    """
    yield optimizer
    for name in _WRAPPED:
        inner = vars(optimizer).get(name)
        if isinstance(getattr(inner, "param_groups", None), list):
            yield from layers(inner)


def innermost(optimizer: Any) -> Any:
    """The optimizer that takes the steps, past all wrappers."""
    return list(layers(optimizer))[-1]


def counters(optimizer: Any) -> frozenset[str]:
    """The keys of a group that the optimizer's own code writes as it steps."""
    return frozenset().union(*(written(layer.__class__) for layer in layers(optimizer))) - _NOT_COUNTERS


def why_no_rate(optimizer: Any, group: dict[str, Any]) -> str | None:
    """Why a group cannot have a learning rate of its own, in words; None where it can."""
    if _SHARED in counters(optimizer):
        return "whose groups share one learning rate"
    if group.get("lr") is None:
        return "whose groups have no `lr`"
    if group.get("relative_step"):
        return "whose relative step takes no account of `lr`"
    return None


# Each step of the D-Adaptation family writes one estimate under this key into all groups.
_SHARED = "d"


def group_like(optimizer: Any, template: dict[str, Any]) -> dict[str, Any]:
    """The keys of a group that joins beside a template, all but the parameters and their names.

    Args:
        optimizer: The live optimizer.
        template: One of its groups.

    Returns:
        Copies of the template's hyperparameters, and counters as in a new optimizer.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=torch.tensor(0.1), momentum=0.9)
        >>> group = group_like(optimizer, optimizer.param_groups[0])
        >>> group["momentum"], group["lr"] is optimizer.param_groups[0]["lr"]
        (0.9, False)
    """
    group = {key: copy.deepcopy(value) for key, value in template.items() if key not in {"params", "param_names"}}
    _restart(optimizer, group, template)
    return group


def add(optimizer: Any, group: dict[str, Any], template: int, ratio: float) -> None:
    """Let a group join, with its entries in the optimizer's own lists.

    Args:
        optimizer: The live optimizer; of a wrapper the wrapper, which may keep something for each parameter.
        group: The group, which becomes the live one.
        template: 0-based index of the group it is like.
        ratio: Its learning rate over the template's.
    """
    optimizer.add_param_group(group)
    for values in _rate_lists(optimizer):
        values.append(values[template] * ratio)
    _prepare(optimizer, group["params"])


def fill(
    optimizer: Any, group: dict[str, Any], template: int, parameters: Iterable[nn.Parameter], names: Iterable[str]
) -> None:
    """Put parameters into an empty group, as if it joined now: while it stood empty its counters ran.

    Args:
        optimizer: The live optimizer.
        group: One of its groups.
        template: 0-based index of the group it is like.
        parameters: They take the places of none.
        names: Theirs, for a named optimizer.
    """
    groups, own = optimizer.param_groups, group["params"]
    place = next(index for index, other in enumerate(groups) if other is group)
    _restart(optimizer, group, groups[template])
    group["params"] = list(parameters)
    if "param_names" in group:
        group["param_names"].extend(names)
    del groups[place]
    try:
        optimizer.add_param_group(group)  # some classes prepare each parameter there
        del groups[-1]
        own.extend(group["params"])
    finally:
        group["params"] = own
        groups.insert(place, group)
    _prepare(optimizer, own)


def leave(optimizer: Any, group: dict[str, Any], leaving: Collection[nn.Parameter]) -> None:
    """Take parameters out of a group: out of its lists in place, since others may hold them, and with their state.

    Args:
        optimizer: The live optimizer.
        group: One of its groups.
        leaving: The parameters, of which the group holds some.
    """
    out = set(map(id, leaving))
    if "param_names" in group:
        pairs = zip(group["param_names"], group["params"], strict=True)
        group["param_names"][:] = [name for name, parameter in pairs if id(parameter) not in out]
    group["params"][:] = [parameter for parameter in group["params"] if id(parameter) not in out]
    for layer in layers(optimizer):  # a wrapper's state need not be that of what it wraps
        for parameter in leaving:
            layer.state.pop(parameter, None)


def take_out(optimizer: Any, parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
    """Take parameters out of an optimizer that was made of the whole model: in place, with their state.

    Args:
        optimizer: The live optimizer.
        parameters: Those that are to join again in their turn; those in a block's own group stay.

    Returns:
        A function that puts them back.
    """
    out = set(map(id, parameters))
    lists: list[tuple[list[Any], list[Any]]] = []
    states = [(layer.state, dict(layer.state)) for layer in layers(optimizer)]
    for group in optimizer.param_groups:
        leaving = [] if BLOCK_KEY in group else [parameter for parameter in group["params"] if id(parameter) in out]
        if leaving:
            lists += [(group[key], list(group[key])) for key in ("params", "param_names") if key in group]
            leave(optimizer, group, leaving)

    def put_back() -> None:
        for values, before in lists:
            values[:] = before
        for state, content in states:
            state.clear()
            state.update(content)

    return put_back


Tag = tuple[str, int] | None


def tag(group: Mapping[str, Any]) -> Tag:
    """Whose group it is: a block's name and the number of its subset, from 0; None for the user's own."""
    return (group[BLOCK_KEY], group.get(SUBSET_KEY, 0)) if BLOCK_KEY in group else None


def reorder(optimizer: Any, saved: Iterable[Tag]) -> list[int]:
    """Bring the groups, and what lists keep for them, into a saved run's order, in place.

    Args:
        optimizer: The live optimizer.
        saved: The tags of its groups then. Groups that they do not know go last, and those that are not here yet, as
            another unfreezer's, come to their places when that is loaded.

    Returns:
        The 0-based places that the groups had before, in their new order.
    """
    places: dict[Tag, list[int]] = {}
    for place, group in enumerate(optimizer.param_groups):
        places.setdefault(tag(group), []).append(place)
    order = [places[known].pop(0) for known in saved if places.get(known)]
    order += sorted(chain.from_iterable(places.values()))
    for values in (optimizer.param_groups, *_rate_lists(optimizer)):
        values[:] = [values[place] for place in order]
    return order


def take_back(optimizer: Any, size: int, filled: Iterable[dict[str, Any]] = ()) -> None:
    """Undo `add` and `fill`: no groups from the 0-based place `size` on, and empty ones where there were empty ones."""
    filled = list(filled)
    for group in [*optimizer.param_groups[size:], *filled]:
        for layer in layers(optimizer):
            for parameter in group["params"]:
                layer.state.pop(parameter, None)  # what was prepared
    for group in filled:
        group["params"].clear()
        group.get("param_names", []).clear()
    del optimizer.param_groups[size:]
    for values in _rate_lists(optimizer):
        del values[size:]


@cache
def class_path(cls: Any) -> str:
    """The full name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _restart(optimizer: Any, group: dict[str, Any], template: dict[str, Any]) -> None:
    """Set a group's counters to those of a new optimizer, or to the template's where all groups share them."""
    defaults = {key: value for layer in layers(optimizer) for key, value in getattr(layer, "defaults", {}).items()}
    counting = counters(optimizer)
    source = template if _SHARED in counting else defaults
    for key in counting:
        if key in source:
            group[key] = copy.deepcopy(source[key])
        else:
            group.pop(key, None)  # the optimizer makes it when it first meets the group


def _rate_lists(optimizer: Any) -> Iterator[list[Any]]:
    for layer in layers(optimizer):
        for name in _RATE_LISTS:
            values = vars(layer).get(name)
            if isinstance(values, list):
                yield values


def _prepare(optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
    """Make what some optimizers keep for each parameter from their construction on, and not for one that joins."""
    for layer in layers(optimizer):
        prepare = _PREPARE.get(class_path(layer.__class__))
        if prepare is not None:
            prepare(layer, parameters)


def _refer_to(optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
    if "trac" in optimizer.state:  # else its first step is still to come, which refers to all
        optimizer.state["trac"].update((parameter, parameter.detach().clone()) for parameter in parameters)


def _accumulate_from(optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
    """Make Adagrad's sums, which before torch 2.12 its constructor alone makes; its step reads them."""
    if parameters and torch.__version__ < "2.12":  # a TorchVersion, which compares as one
        optimizer.state.update(type(optimizer)(parameters, **optimizer.defaults).state)


def _begin_hessians(optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.hess = 0.0  # type: ignore[attr-defined]
        optimizer.state[parameter]["hessian step"] = 0


_PREPARE: dict[str, Callable[[Any, Sequence[nn.Parameter]], object]] = {
    "pytorch_optimizer.optimizer.spam.SPAM": lambda optimizer, _: optimizer.init_masks(),
    "pytorch_optimizer.optimizer.trac.TRAC": _refer_to,
    "timm.optim.adahessian.Adahessian": _begin_hessians,
    "torch.optim.adagrad.Adagrad": _accumulate_from,
}
