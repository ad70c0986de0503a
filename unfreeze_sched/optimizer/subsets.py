"""A block's parameters, divided by the group that they share: those that decay their weights, and those that do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from unfreeze_sched.model.block import Block, Named

Overrides = Callable[[str, nn.Parameter], Mapping[str, Any]]


class Subset(NamedTuple):
    """The parameters of a block that share a group; a transition is to walk them as seldom as it can."""

    block: int  # 0-based index
    tag: tuple[str, int]  # its group's: the block's name, and a 0-based number among the block's subsets
    ratio: float  # the group's learning rate over the template's
    overrides: dict[str, Any]  # what the group has otherwise than its template
    named: tuple[Named, ...]
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    samples: tuple[Named, ...]  # the first of each number of dimensions and type

    def only(self, named: Iterable[Named]) -> Subset:
        """The same with some of its parameters; itself where they are all."""
        named = tuple(named)
        return self if len(named) == len(self.named) else _subset(*self[:4], named)


def _subset(
    block: int, tag: tuple[str, int], ratio: float, overrides: dict[str, Any], named: Sequence[Named]
) -> Subset:
    firsts = {(parameter.ndim, parameter.dtype): (name, parameter) for name, parameter in reversed(named)}
    names, parameters = tuple(name for name, _ in named), tuple(parameter for _, parameter in named)
    return Subset(block, tag, ratio, overrides, tuple(named), names, parameters, tuple(firsts.values()))


def subsets_of(index: int, block: Block, ratio: float, no_decay: bool | Overrides, keys: Iterable[str]) -> list[Subset]:
    """Divide a block by what its parameters' groups have otherwise than the template, whose keys are these.

    The subset without overrides comes first, the others in the order of their first parameters; none is empty.
    """
    if not isinstance(no_decay, bool) and not callable(no_decay):
        raise TypeError(
            f"`no_decay` must be True, False or a function of name and parameter, got {no_decay!r}; pass True"
        )
    known = set(keys) - {"params", "param_names", "lr", "initial_lr"}
    kinds: list[tuple[dict[str, Any], list[Named]]] = [({}, [])]
    for name, parameter in block.named_parameters():
        if callable(no_decay):
            overrides = dict(no_decay(name, parameter))
        else:  # the rule is timm's `param_groups_weight_decay`
            decays = not no_decay or (parameter.ndim > 1 and not name.endswith(".bias"))
            overrides = {} if decays else {"weight_decay": 0.0}
        if strange := sorted(overrides.keys() - known):
            raise ValueError(
                f"`no_decay` must override keys of the template's group, its learning rate aside, got {strange[0]!r} "
                f"for {name!r}; it has {', '.join(sorted(known))}"
            )
        kind = next((kind for kind in kinds if kind[0] == overrides), None)
        if kind is None:
            kinds.append(kind := (overrides, []))
        kind[1].append((name, parameter))
    filled = (kind for kind in kinds if kind[1])
    return [_subset(index, (block.name, number), ratio, *kind) for number, kind in enumerate(filled)]
