"""What an optimizer keeps for a group, and how a joining group gets it.

A group's keys are of two kinds. *Hyperparameters* are given: by the constructor, by the user, by a scheduler; a joining
group copies the live template's. *Counters* are written by the optimizer's own code as it steps (`step`, `k`,
`weight_sum`, ...); in a joining group they start as in a new optimizer, since bias corrections and averages of fresh
parameters begin then. Which keys are counters is read from the source of the optimizer's class, so that no list of
classes has to be kept.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import textwrap
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer

_NOT_COUNTERS = frozenset({"params", "param_names", "lr", "initial_lr"})
# Where the source cannot be read, such as in a notebook's cell.
_USUAL_COUNTERS = frozenset({"step", "k", "counter", "weight_sum", "lr_max"})
# `train` and `eval` write a mode, which a joining group shares; the others restore what was saved.
_NOT_STEPPING = frozenset({"__init__", "__setstate__", "load_state_dict", "state_dict", "train", "eval"})
# Change from step to step, and no check depends on them once they are in use.
_MOVING = frozenset({"lr", "initial_lr"})
_WRAPPED = ("optimizer", "base_optimizer", "base")
# Lists of an optimizer with a learning rate for each group.
_RATE_LISTS = ("base_lrs",)
# Why no group can join, ever or once training has begun; what the structure tells is asked in `refuse`.
_NEVER = {"torch.optim.lbfgs.LBFGS": "which holds one"}
_ONLY_DECLARED = dict.fromkeys(
    (f"pytorch_optimizer.optimizer.emonavi.{name}" for name in ("EmoNavi", "EmoLynx", "EmoFact")),
    "whose average of the loss advances once a group",
)


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
    """The keys of a group that the optimizer's own code writes as it steps.

    Example:
        >>> import torch
        >>> class Counting(torch.optim.SGD):
        ...     def step(self, closure=None):
        ...         for group in self.param_groups:
        ...             group["step"] = group.get("step", 0) + 1
        >>> sorted(counters(Counting([nn.Parameter(torch.ones(1))])))  # its source cannot be read here
        ['counter', 'k', 'lr_max', 'step', 'weight_sum']
    """
    return frozenset().union(*(_written(layer.__class__) for layer in layers(optimizer))) - _NOT_COUNTERS


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
        group: One of its groups; the object, its place and its list of parameters stay.
        template: 0-based index of the group it is like.
        parameters: What goes in.
        names: Their names, for an optimizer that knows names.
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


def leave(optimizer: Any, size: int) -> None:
    """Take back the groups from the 0-based place `size` on, and what `add` gave for them."""
    del optimizer.param_groups[size:]
    for values in _rate_lists(optimizer):
        del values[size:]


def refuse(
    optimizer: Any, template: int = 0, ratios: Sequence[float] = (), *, late: bool = True, drops: bool = False
) -> None:
    """Refuse an optimizer that cannot take the groups that are to join, by name.

    Args:
        optimizer: The live optimizer.
        template: 0-based index of the group that joining groups are like.
        ratios: Learning rates of theirs over the template's.
        late: Whether they join once training has begun.
        drops: Whether a group is emptied and filled again.

    Raises:
        ValueError: It cannot take them.

    Example:
        >>> import torch
        >>> refuse(torch.optim.LBFGS([nn.Parameter(torch.ones(1))]))
        Traceback (most recent call last):
        ...
        ValueError: `optimizer` must take further param groups, got LBFGS, which holds one; use another
    """
    for layer in layers(optimizer):
        name = type(layer).__name__
        reason = _NEVER.get(_path(layer))
        if reason is None and isinstance(vars(layer).get("model"), nn.Module):
            reason = "which reads the model it was made of"
        if reason is not None:
            raise ValueError(f"`optimizer` must take further param groups, got {name}, {reason}; use another")
        if layer.param_groups is not optimizer.param_groups:
            raise ValueError(
                f"`optimizer` must share its param groups with the {name} that it wraps, got a "
                f"{type(optimizer).__name__} with others; set the inner one's param_groups to the outer's"
            )
        if late and (reason := _ONLY_DECLARED.get(_path(layer))):
            raise ValueError(
                f"`membership` must be 'declared' for {name}, {reason}, got 'late'; pass membership='declared'"
            )
        if "lr" in _written(layer.__class__) and (late or drops):
            got = "membership='late'" if late else "on_refreeze='drop'"
            raise ValueError(
                "`membership` must be 'declared' and `on_refreeze` 'keep' for "
                f"{name}, whose step writes the learning rate, got {got}; pass both"
            )
    reason = why_no_rate(optimizer, optimizer.param_groups[template])
    wrong = [ratio for ratio in ratios if ratio != 1]
    if reason is not None and wrong:
        raise ValueError(
            f"`learning_rate_scale` and `layer_decay` must be 1 for {type(optimizer).__name__}, {reason}, got a group "
            f"at {wrong[0]} of the template's rate; pass learning_rate_scale=1.0"
        )


def refuse_unfit(
    optimizer: Any, template: dict[str, Any], specimens: Iterable[tuple[str, nn.Parameter]], fit: set[Hashable]
) -> None:
    """Refuse what optimizers check in their constructor alone, or in the middle of a step.

    Args:
        optimizer: The live optimizer.
        template: The group that the joining one is like.
        specimens: Parameters by name, one of each number of dimensions and type: the checks look at nothing else.
        fit: What was found to fit, to which this adds: all groups of a run ask for the same.

    Raises:
        ValueError: One of them does not fit.
    """
    hyperparameters = {key: value for key, value in template.items() if key not in {"params", "param_names"}}
    plain = (int, float, str, type(None))
    settings = tuple(
        (key, value) for key, value in hyperparameters.items() if key not in _MOVING and isinstance(value, plain)
    )
    for name, parameter in specimens:
        kind = (parameter.ndim, parameter.dtype, parameter.device, settings)
        if kind in fit:
            continue
        problem: Exception | None = None
        if template.get("use_muon") and parameter.ndim < 2:  # noqa: PLR2004  # matrices and up
            problem = ValueError("a use_muon group takes matrices")
        if template.get("fused") and not parameter.is_floating_point():
            problem = ValueError(f"a fused group takes floating point, not {parameter.dtype}")
        stand_in = nn.Parameter(  # holds one number
            parameter.detach().new_empty(()).expand(parameter.shape), requires_grad=parameter.requires_grad
        )
        for layer in layers(optimizer):
            if type(layer).__module__.startswith("torch.optim"):
                try:
                    layer.__class__([{**hyperparameters, "params": [stand_in]}])
                except (ValueError, RuntimeError, TypeError) as error:
                    problem = error
        if problem is not None:
            raise ValueError(
                f"`{name}` must fit {type(optimizer).__name__}, got shape {tuple(parameter.shape)}: {problem}; "
                "leave it out of the block"
            ) from problem
        fit.add(kind)


def why_no_rate(optimizer: Any, group: dict[str, Any]) -> str | None:
    """Why a group cannot have a learning rate of its own, in words; None where it can."""
    if _is_shared(optimizer):
        return "whose groups share one learning rate"
    if group.get("lr") is None:
        return "whose groups have no `lr`"
    if group.get("relative_step"):
        return "whose relative step takes no account of `lr`"
    return None


def _is_shared(optimizer: Any) -> bool:
    """Whether the optimizer is of the D-Adaptation family: each step writes one estimate `d` into all groups."""
    return "d" in counters(optimizer)


def _restart(optimizer: Any, group: dict[str, Any], template: dict[str, Any]) -> None:
    """Set a group's counters to those of a new optimizer, or to the template's where all groups share them."""
    defaults = {key: value for layer in layers(optimizer) for key, value in getattr(layer, "defaults", {}).items()}
    source = template if _is_shared(optimizer) else defaults
    for key in counters(optimizer):
        if key in source:
            group[key] = copy.deepcopy(source[key])
        else:
            group.pop(key, None)  # the optimizer makes it when it first meets the group


def _prepare(optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
    for layer in layers(optimizer):
        prepare = _PREPARE.get(_path(layer))
        if prepare is not None:
            prepare(layer, parameters)


def _refer_to(optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
    if "trac" in optimizer.state:  # else its first step is still to come, which refers to all
        optimizer.state["trac"].update((parameter, parameter.detach().clone()) for parameter in parameters)


def _rate_lists(optimizer: Any) -> Iterator[list[Any]]:
    for layer in layers(optimizer):
        for name in _RATE_LISTS:
            values = vars(layer).get(name)
            if isinstance(values, list):
                yield values


def _path(optimizer: Any) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


@functools.cache
def _written(cls: Hashable) -> frozenset[str]:
    """The string keys under which the methods of a class store something, `state[...]` aside."""
    keys: set[str] = set()
    for base in inspect.getmro(cast("type", cls)):
        if base in {Optimizer, object}:
            break
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            return frozenset(keys) | _USUAL_COUNTERS
        methods = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
        for method in methods:
            if method.name not in _NOT_STEPPING:
                keys.update(_stores(method))
    return frozenset(keys)


def _stores(method: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(method):
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and "group" in node.value.id
            and isinstance(node.slice, ast.Constant)
            and isinstance(node.slice.value, str)
        ):
            yield node.slice.value


# What some keep for each parameter from their construction on, and do not make for one that joins.
_PREPARE: dict[str, Callable[[Any, Sequence[nn.Parameter]], object]] = {
    "pytorch_optimizer.optimizer.spam.SPAM": lambda optimizer, _: optimizer.init_masks(),
    "pytorch_optimizer.optimizer.trac.TRAC": _refer_to,
}
