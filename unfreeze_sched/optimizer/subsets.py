"""A block's parameters, divided by the group that they share: those that decay their weights, and those that do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

from torch import nn

from unfreeze_sched.model.block import Block, Named

Overrides = Callable[[str, nn.Parameter], Mapping[str, Any]]


@dataclass(frozen=True)
class Subset:
    """The parameters of a block that share a group.

    Attributes:
        block: 0-based index of the block.
        number: 0-based, among the block's subsets.
        named: The parameters with their names.
        overrides: What the group has otherwise than its template.
        names: The names alone; these three are here since a transition is to walk the parameters as seldom as it can.
        parameters: The parameters alone.
        samples: One parameter of each number of dimensions and type, for checks that look at nothing else.
    """

    block: int
    number: int
    named: tuple[Named, ...]
    overrides: dict[str, Any]
    names: tuple[str, ...] = field(init=False)
    parameters: tuple[nn.Parameter, ...] = field(init=False)
    samples: tuple[Named, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(name for name, _ in self.named))
        object.__setattr__(self, "parameters", tuple(parameter for _, parameter in self.named))
        object.__setattr__(self, "samples", _samples(self.named))

    def only(self, named: Iterable[Named]) -> Subset:
        """The same with some of its parameters; itself where they are all."""
        named = tuple(named)
        return self if len(named) == len(self.named) else replace(self, named=named)


def _samples(named: Iterable[Named]) -> tuple[Named, ...]:
    """The first parameter of each number of dimensions and type, in a fixed order of the kinds."""
    kind_of = attrgetter("ndim", "dtype")
    firsts: dict[Any, Named] = {}
    for name, parameter in named:
        firsts.setdefault(kind_of(parameter), (name, parameter))
    return tuple(firsts[kind] for kind in sorted(firsts, key=str))


def subsets_of(index: int, block: Block, no_decay: bool | Overrides, keys: Iterable[str]) -> list[Subset]:
    """Divide a block by what its parameters' groups have otherwise than the template.

    Args:
        index: 0-based index of the block.
        block: The block.
        no_decay: As for `OptimizerRebuilder`.
        keys: Those of the template's group.

    Returns:
        The subsets, the one without overrides first, in the order of their first parameters; none is empty.

    Raises:
        TypeError: `no_decay` is neither a bool nor a function.
        ValueError: An override of something that the template's group does not have, or of its learning rate.

    Example:
        >>> block = Block("layer", (nn.Linear(2, 2),))
        >>> [(subset.overrides, subset.names) for subset in subsets_of(0, block, True, ["lr", "weight_decay"])]
        [({}, ('layer/weight',)), ({'weight_decay': 0.0}, ('layer/bias',))]
    """
    if not isinstance(no_decay, bool) and not callable(no_decay):
        raise TypeError(
            f"`no_decay` must be True, False or a function of name and parameter, got {no_decay!r}; True is for norms "
            "and biases"
        )
    overrides_of = _no_decay if no_decay is True else no_decay or _nothing
    known = set(keys) - {"params", "param_names", "lr", "initial_lr"}
    kinds: list[tuple[dict[str, Any], list[Named]]] = [({}, [])]
    for name, parameter in block.named_parameters():
        overrides = dict(overrides_of(name, parameter))
        if strange := sorted(overrides.keys() - known):
            raise ValueError(
                f"`no_decay` must override keys of the template's group, its learning rate aside, got {strange[0]!r} "
                f"for {name!r}; it has {', '.join(sorted(known))}"
            )
        kind = next((kind for kind in kinds if kind[0] == overrides), None)
        if kind is None:
            kinds.append(kind := (overrides, []))
        kind[1].append((name, parameter))
    filled = [kind for kind in kinds if kind[1]]
    return [Subset(index, number, tuple(named), overrides) for number, (overrides, named) in enumerate(filled)]


def _nothing(_name: str, _parameter: nn.Parameter) -> dict[str, Any]:
    return {}


def _no_decay(name: str, parameter: nn.Parameter) -> dict[str, Any]:
    """Norm and bias parameters decay no weight; the rule is timm's `param_groups_weight_decay`."""
    return {"weight_decay": 0.0} if parameter.ndim <= 1 or name.endswith(".bias") else {}
