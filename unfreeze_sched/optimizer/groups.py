"""What an optimizer keeps for a group, and how a joining group gets it: `add`, `fill`, `leave`.

A group's keys are of two kinds. *Hyperparameters* are given, by the constructor, the user or a scheduler; a joining
group copies the live template's. *Counters* are written by the optimizer's own code as it steps (`step`, `k`, ...); in
a joining group they start as in a new optimizer, since bias corrections and averages of fresh parameters begin then.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from unfreeze_sched._checks import warn

BLOCK_KEY = "unfreeze_block"
"""The key under which a block's param group carries the block's name; a string, so it survives save and load."""

SUBSET_KEY = "unfreeze_subset"
"""The key that tells the further groups of one block apart: 1, 2, ...; the first has none."""

Group = dict[str, Any]
Tag = tuple[str, int] | None

_WRAPPED = ("optimizer", "_optimizer", "base_optimizer", "_base_optimizer", "base")
_NOT_COUNTERS = frozenset({"params", "param_names", "lr", "initial_lr"})
_USUAL_COUNTERS = frozenset({"step", "k", "counter", "weight_sum", "lr_max"})
# `train` and `eval` write a mode, which a joining group shares; the others restore what was saved.
_NOT_STEPPING = frozenset({"__init__", "__setstate__", "load_state_dict", "state_dict", "train", "eval"})
# Each step of the D-Adaptation family writes one estimate under this key into all groups.
_SHARED = "d"


# --- what is known of an optimizer


def layers(optimizer: Any) -> list[Any]:
    """An optimizer and those that it wraps (Lookahead, SAM, accelerate's, ...), outermost first."""
    held = map(vars(optimizer).get, _WRAPPED)
    inner = (each for each in held if isinstance(getattr(each, "param_groups", None), list))
    return [optimizer, *chain.from_iterable(map(layers, inner))]


def innermost(optimizer: Any) -> Any:
    """The optimizer that takes the steps, past all wrappers."""
    return layers(optimizer)[-1]


@cache
def class_path(cls: Any) -> str:
    """The full name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


@cache
def written(cls: Hashable) -> frozenset[str]:
    """The string keys under which the methods of an optimizer's class store something in a group.

    They are read from its source code: no attribute tells counters, and a table of classes would soon be out of date.
    Where it cannot be read, the usual counters are taken for its own, with a warning.
    """
    keys: set[str] = set()
    for base in inspect.getmro(cast("type", cls)):
        if base in {Optimizer, object}:
            break
        # By method, since a class may claim another module than the one that it is written in.
        methods = {name: inspect.unwrap(value) for name, value in vars(base).items() if callable(value)}
        for name, method in methods.items():
            if name in _NOT_STEPPING or not inspect.isroutine(method):
                continue
            try:
                keys.update(_stores(ast.parse(textwrap.dedent(inspect.getsource(method)))))
            except (OSError, TypeError, SyntaxError):
                warn(
                    f"`optimizer` should be of a class whose source can be read, got {base.__qualname__}: which keys "
                    f"of its groups count steps is not known, so {', '.join(sorted(_USUAL_COUNTERS))} start anew in a "
                    "joining group; define the class in a file"
                )
                return frozenset(keys) | _USUAL_COUNTERS
    return frozenset(keys)


def _stores(method: ast.AST) -> Iterator[str]:
    """The keys of `group["key"] = ...`, under whatever name with `group` in it; `state[...]` is no group."""
    for node in ast.walk(method):
        match node:
            case ast.Subscript(ast.Name(name), ast.Constant(str(key)), ast.Store()) if "group" in name:
                yield key


def counters(optimizer: Any) -> frozenset[str]:
    """The keys of a group that the optimizer's own code writes as it steps."""
    return frozenset().union(*(written(layer.__class__) for layer in layers(optimizer))) - _NOT_COUNTERS


def why_no_rate(optimizer: Any, group: Group) -> str | None:
    """Why a group cannot have a learning rate of its own, in words; None where it can."""
    if _SHARED in counters(optimizer):
        return "whose groups share one learning rate"
    if group.get("lr") is None:
        return "whose groups have no `lr`"
    if group.get("relative_step"):
        return "whose relative step takes no account of `lr`"
    return None


# --- how a group joins, is filled and emptied


def group_like(optimizer: Any, template: Group) -> Group:
    """The keys of a group that joins beside a template, all but the parameters and their names."""
    group = {key: copy.deepcopy(value) for key, value in template.items() if key not in {"params", "param_names"}}
    _restart(optimizer, group, template)
    return group


def _restart(optimizer: Any, group: Group, template: Group) -> None:
    """Set a group's counters to those of a new optimizer, or to the template's where all groups share them."""
    defaults = {key: value for layer in layers(optimizer) for key, value in getattr(layer, "defaults", {}).items()}
    counting = counters(optimizer)
    source = template if _SHARED in counting else defaults
    for key in counting:
        if key in source:
            group[key] = copy.deepcopy(source[key])
        else:
            group.pop(key, None)  # the optimizer makes it when it first meets the group


def add(optimizer: Any, group: Group, template: int, ratio: float) -> None:
    """Let a group join, with its entries in the optimizer's own lists; the dict becomes the live one."""
    optimizer.add_param_group(group)
    for values in _rate_lists(optimizer):
        values.append(values[template] * ratio)
    _prepare(optimizer, group["params"])


def fill(optimizer: Any, group: Group, template: int, parameters: Iterable[nn.Parameter], names: Iterable[str]) -> None:
    """Put parameters into an empty group, as if it joined now: while it stood empty its counters ran."""
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


def leave(optimizer: Any, group: Group, leaving: Collection[nn.Parameter]) -> None:
    """Take parameters out of a group: out of its lists in place, since others may hold them, and with their state."""
    out = set(map(id, leaving))
    if "param_names" in group:
        pairs = zip(group["param_names"], group["params"], strict=True)
        group["param_names"][:] = [name for name, parameter in pairs if id(parameter) not in out]
    group["params"][:] = [parameter for parameter in group["params"] if id(parameter) not in out]
    for layer in layers(optimizer):  # a wrapper's state need not be that of what it wraps
        for parameter in leaving:
            layer.state.pop(parameter, None)


def snapshot(optimizer: Any) -> Callable[[], None]:
    """What brings groups, parameters and their state back as they are now, all in the objects that hold them."""
    lists = [optimizer.param_groups, *_rate_lists(optimizer)]
    lists += [group[key] for group in optimizer.param_groups for key in ("params", "param_names") if key in group]
    before = [(values, list(values)) for values in lists]
    states = [(layer.state, dict(layer.state)) for layer in layers(optimizer)]

    def restore() -> None:
        for values, content in before:
            values[:] = content
        for state, kept in states:
            state.clear()
            state.update(kept)

    return restore


# --- the order of groups


def tag(group: Mapping[str, Any]) -> Tag:
    """Whose group it is: a block's name and the number of its subset, from 0; None for the user's own."""
    return (group[BLOCK_KEY], group.get(SUBSET_KEY, 0)) if BLOCK_KEY in group else None


def reorder(optimizer: Any, saved: Iterable[Tag]) -> list[int]:
    """Bring the groups into the order of a saved run's tags, in place, and give the 0-based places that they had.

    Those that it does not know go last; another unfreezer's, that are not here yet, find their places as it is loaded.
    """
    places: dict[Tag, list[int]] = {}
    for place, group in enumerate(optimizer.param_groups):
        places.setdefault(tag(group), []).append(place)
    order = [places[known].pop(0) for known in saved if places.get(known)]
    order += sorted(chain.from_iterable(places.values()))
    for values in (optimizer.param_groups, *_rate_lists(optimizer)):
        values[:] = [values[place] for place in order]
    return order


# --- what an optimizer keeps beside its groups


def _rate_lists(optimizer: Any) -> list[list[Any]]:
    """Its lists with a learning rate for each group, as AdaBound's."""
    found = (vars(layer).get("base_lrs") for layer in layers(optimizer))
    return [values for values in found if isinstance(values, list)]


def _prepare(optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
    """Make what some optimizers keep for each parameter from their construction on, and not for one that joins."""
    for layer in layers(optimizer):
        if prepare := _PREPARE.get(class_path(layer.__class__)):
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
