"""Who holds a parameter: the modules of its block, and the optimizer's groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import is_
from typing import Any

from torch import nn
from torch.optim import Optimizer

from unfreeze_sched.blocks import Block

_Shelf = tuple[Mapping[str, Any], tuple[nn.Parameter | None, ...]]


class Owners:
    """Notices a parameter that its block's modules no longer hold, such as after `load_state_dict(assign=True)`.

    The optimizer would go on to train the old tensor, and the model would stand still. A parameter that is a member of
    its block by itself has no module here that could tell.

    Args:
        blocks: The blocks, shallow to deep.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> owners = Owners([Block("first", (layer,))])
        >>> layer.weight = nn.Parameter(layer.weight.detach().clone())
        >>> owners.refuse_orphans([0])
        Traceback (most recent call last):
        ...
        RuntimeError: `blocks` must hold the parameters that they were given with, got first/weight in none of \
its modules any more (replaced, as by load_state_dict(assign=True), to_empty, weight_norm or fully_shard); make \
optimizer and unfreezer after that
    """

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._blocks = tuple(blocks)
        self._named = [tuple(block.named_parameters()) for block in self._blocks]
        self._shelves = [_shelves(block) for block in self._blocks]
        self._firsts = [first for shelves in self._shelves if (first := _first(shelves))]

    def look_whole(self) -> bool:
        """Whether each block still holds the first of its parameters: cheap, and what replaces one replaces all."""
        return all(held.get(key) is parameter for held, key, parameter in self._firsts)

    def refuse_orphans(self, indices: Iterable[int]) -> None:
        """Refuse blocks that do not hold one of their parameters any more.

        Args:
            indices: 0-based indices of the blocks to look at.

        Raises:
            RuntimeError: One of them does not, by name.
        """
        for index in indices:
            if all(_is_untouched(*shelf) for shelf in self._shelves[index]):
                continue
            # A parametrization keeps the parameter in another module.
            inside = set(map(id, self._blocks[index].parameters()))
            orphans = [name for name, parameter in self._named[index] if id(parameter) not in inside]
            if orphans:
                more = f" and {len(orphans) - 1} more" if len(orphans) > 1 else ""
                raise RuntimeError(
                    f"`blocks` must hold the parameters that they were given with, got {orphans[0]}{more} in none of "
                    "its modules any more (replaced, as by load_state_dict(assign=True), to_empty, weight_norm or "
                    "fully_shard); make optimizer and unfreezer after that"
                )


def refuse_members(optimizer: Optimizer, blocks: Iterable[Block], key: str) -> None:
    """Refuse block parameters in groups that are not their block's: they would be trained twice, or as the head.

    Args:
        optimizer: The live optimizer.
        blocks: The blocks.
        key: Under which a block's group carries the block's name.

    Raises:
        ValueError: There is one, or a group under a block's name holds something else.
    """
    homes = {id(parameter): (name, block.name) for block in blocks for name, parameter in block.named_parameters()}
    names = {name for _, name in homes.values()}
    strangers = [
        homes[id(parameter)][0]
        for group in optimizer.param_groups
        for parameter in group["params"]
        if id(parameter) in homes and group.get(key) != homes[id(parameter)][1]
    ]
    for group in optimizer.param_groups:
        if group.get(key) in names and any(id(parameter) not in homes for parameter in group["params"]):
            raise ValueError(
                f"`blocks` must have names of their own, got {group[key]!r}, under which the optimizer holds "
                "other parameters already; rename the block"
            )
    if strangers:
        more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        raise ValueError(
            f"`optimizer` must not hold parameters of the blocks yet, got {strangers[0]}{more}; "
            "build it from the other parameters alone, such as the head's"
        )


def _shelves(block: Block) -> list[_Shelf]:
    """The own dicts of parameters of the block's modules, with what lies in each."""
    held = (module._parameters for module in block.modules())  # noqa: SLF001  # without its children's
    return [(parameters, tuple(parameters.values())) for parameters in held if parameters]


def _first(shelves: Iterable[_Shelf]) -> tuple[Mapping[str, Any], str, nn.Parameter] | None:
    """The first parameter that a module holds, with its place."""
    return next(
        ((held, key, parameter) for held, _ in shelves for key, parameter in held.items() if parameter is not None),
        None,
    )


def _is_untouched(held: Mapping[str, Any], values: tuple[nn.Parameter | None, ...]) -> bool:
    """Whether a module holds what it held; without a loop in Python, since each transition asks it of all modules."""
    return len(held) == len(values) and all(map(is_, held.values(), values))
