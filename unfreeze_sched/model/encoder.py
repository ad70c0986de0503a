"""From a model to its blocks, the ordered pieces of the encoder that are unfrozen one after another."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from unfreeze_sched.model.admission import ADAPTERS, is_peft, validate_blocks
from unfreeze_sched.model.block import Block
from unfreeze_sched.model.division import Members, divided, without_fixed
from unfreeze_sched.model.head import stated_head
from unfreeze_sched.model.tracing import join, unwrap, walk


def encoder_blocks(
    model: nn.Module,
    patterns: Sequence[str] | None = None,
    *,
    head: Iterable[nn.Module | nn.Parameter] | Optimizer | None = None,
    example_input: Any = None,
) -> tuple[Block, ...]:
    r"""The blocks of a model's encoder, shallow to deep.

    Every parameter that the forward pass uses is in exactly one block or in the head; what runs before the last
    operation of the encoder is in a block. One that never receives a gradient is in none, nor is one that is not
    trainable while others of its block are: what is held fixed stays fixed, and the log says which. The model is not
    changed, not run on data, and none of its memory is copied.

    Args:
        model: An smp, timm, torchvision or transformers model, or any module with its `head`. DDP and `torch.compile`
            wrappers are looked through.
        patterns: One regular expression a block, shallow to deep, searched for in the qualified names of the
            parameters. The model is not run then, and parameters that no pattern matches are in no block.
        head: What trains from the start: modules and parameters, or an optimizer that holds just that; `()` says that
            the model is all encoder. `None` where it is known: for smp, the decoder and heads; timm, its classifiers;
            torchvision, the part above the backbone, of a `classifier` of several layers the last; transformers, all
            but the base model; and for a model with an `encoder` or `backbone` beside other parts, these.
        example_input: What the forward pass takes, where it cannot be guessed: a tensor, a tuple of positional or a
            dict of keyword arguments. Only shapes, types and devices matter.

    Returns:
        The blocks; `[0]` is the shallowest and holds the stem, `[-1]` is next to the head. Those of two towers side by
        side are in the order of depth, counted from the output; `sorted` by name puts one tower after the other, and
        one call a tower gives each its own.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: The model has no blocks or does not run, its head is neither known nor given, or not in the model;
            a pattern is broken, empty-handed or overlaps another; or PEFT adapted the model, and no patterns name the
            adapters.

    Example:
        >>> stage = lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), stage(), stage(), nn.Conv2d(8, 2, 1))
        >>> [(block.name, block.member_names) for block in encoder_blocks(model, head=[model[3]])]
        [('1', ('0', '1')), ('2', ('2',))]
        >>> [block.name for block in encoder_blocks(model, patterns=[r"^1\.", r"^2\."])]
        ['1', '2']
        >>> class Towers(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.image, self.text = (nn.Sequential(stage(), stage()) for _ in range(2))
        ...         self.scale = nn.Parameter(torch.ones(()))
        ...     def forward(self, image, text):
        ...         return self.scale * self.image(image) * self.text(text)
        >>> towers, inputs = Towers(), (torch.zeros(2, 8, 4, 4), torch.zeros(2, 8, 4, 4))
        >>> blocks = encoder_blocks(towers, head=[towers.scale], example_input=inputs)
        >>> [block.name for block in blocks]
        ['image.0', 'text.0', 'image.1', 'text.1']
        >>> [block.name for block in sorted(blocks, key=lambda block: block.name.startswith("image"))]
        ['text.0', 'text.1', 'image.0', 'image.1']
        >>> [block.name for block in encoder_blocks(towers.text, head=())]
        ['0', '1']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch module, got {type(model).__name__}; pass the model itself")
    if isinstance(unwrap(model), torch.jit.ScriptModule):
        raise TypeError("`model` must be an eager module, got a TorchScript one; find its blocks before scripting it")
    names = _parameter_names(model)
    for parameter, name in names.items():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(  # noqa: TRY004  # the type is right, its state is not
                f"`model` must be initialized, got the lazy parameter {name!r}; run one forward pass first"
            )
    if not names:
        raise ValueError("`model` must have parameters, got none; pass the network that is to be fine-tuned")
    if patterns is None and is_peft(unwrap(model)):
        raise ValueError(
            f"`patterns` must name the adapters of a {type(unwrap(model)).__name__}, got none: blocks found by "
            f"structure would unfreeze the base weights that PEFT froze; {ADAPTERS}"
        )
    if patterns is None:
        stated = None if head is None else stated_head(model, names, head)
        return _in_place(model, divided(unwrap(model), stated, example_input))
    if head is not None:
        raise ValueError("`head` must be left out where patterns are given, got both; what no pattern matches is head")
    if example_input is not None:
        raise ValueError(
            "`example_input` must be left out where patterns are given, got both; patterns need no forward pass"
        )
    return _in_place(model, _by_patterns(model, names, patterns))


def _in_place(model: nn.Module, blocks: Iterable[Block]) -> tuple[Block, ...]:
    return tuple(block.within(unwrap(model)) for block in validate_blocks(blocks))


def _parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Each parameter with its qualified name, wrappers' prefixes left out; tied ones by their first name."""
    names: dict[nn.Parameter, str] = {}
    for prefix, module in walk(model):
        for key, parameter in module.named_parameters(recurse=False):
            names.setdefault(parameter, join(prefix, key))
    return names


def _trains(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


def _by_patterns(model: nn.Module, names: Mapping[nn.Parameter, str], patterns: Any) -> list[Block]:
    compiled = [_compile(pattern) for pattern in _check_patterns(patterns)]
    owner: dict[nn.Parameter, int] = {}
    for index, pattern in enumerate(compiled):
        matched = [p for p, name in names.items() if pattern.search(name) and _trains(p)]
        if not matched:
            raise ValueError(
                f"`patterns` must each match a parameter, got {pattern.pattern!r}, which matches none; "
                f"the nearest names are {_nearest(pattern.pattern, names.values())}"
            )
        for parameter in matched:
            if parameter in owner:
                raise ValueError(
                    f"`patterns` must not overlap, got {names[parameter]!r} matched by "
                    f"{compiled[owner[parameter]].pattern!r} and {pattern.pattern!r}; make one of them narrower"
                )
            owner[parameter] = index
    members = Members(without_fixed(unwrap(model), owner))
    members.visit("", unwrap(model))
    prefixes = [_common_module([names[p] for p in owner if owner[p] == index]) for index in range(len(compiled))]
    distinct = all(prefixes) and len(set(prefixes)) == len(prefixes)
    labels = prefixes if distinct else [pattern.pattern for pattern in compiled]
    return [members.block(index, label) for index, label in enumerate(labels)]


def _check_patterns(patterns: Any) -> list[str]:
    if isinstance(patterns, (str, bytes)) or not isinstance(patterns, Iterable):
        raise TypeError(
            f"`patterns` must be a list of regular expressions, got {patterns!r}; put a single one in a list"
        )
    listed = list(patterns)
    if not listed:
        raise ValueError("`patterns` must hold at least one regular expression, got none; leave it out to find blocks")
    for pattern in listed:
        if not isinstance(pattern, str):
            raise TypeError(f"`patterns` must hold strings, got {pattern!r}; write each block's regex as a string")
    return listed


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"`patterns` must be valid regular expressions, got {pattern!r} ({error}); escape special characters"
        ) from error


def _nearest(pattern: str, names: Iterable[str]) -> str:
    """The three parameter or module names that look most like the pattern."""
    known = {".".join(parts[:end]) for parts in (name.split(".") for name in names) for end in range(1, len(parts) + 1)}
    plain = re.sub(r"[\\^$]", "", pattern).strip(".*")
    return ", ".join(repr(name) for name in difflib.get_close_matches(plain, sorted(known), n=3, cutoff=0))


def _common_module(names: Sequence[str]) -> str:
    """The innermost module that holds all the named parameters, '' for the model itself."""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))
