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

from unfreeze_sched.model.admission import ADAPTERS, is_peft, parts_of
from unfreeze_sched.model.block import Block
from unfreeze_sched.model.division import collected, divided, without_fixed
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

    Every parameter that the forward pass uses is in exactly one block or in the head. One that never receives a
    gradient is in none, nor is one that is not trainable while others of its block are: what is held fixed stays
    fixed, and the log says which. The model is not changed, not run on data, and none of its memory is copied.

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
        side are in the order of depth, counted from the output; `sorted` by name puts one tower after the other.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: The model has no blocks or does not run, its head is neither known nor given, or not in the model;
            a pattern is broken, matches nothing or overlaps another; or PEFT adapted the model, and none names them.

    Example:
        >>> stage = lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), stage(), stage(), nn.Conv2d(8, 2, 1))
        >>> [(block.name, block.member_names) for block in encoder_blocks(model, head=[model[3]])]
        [('1', ('0', '1')), ('2', ('2',))]
        >>> [block.name for block in encoder_blocks(model, patterns=[r"^1\.", r"^2\."])]
        ['1', '2']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch module, got {type(model).__name__}; pass the model itself")
    model = unwrap(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("`model` must be an eager module, got a TorchScript one; find its blocks before scripting it")
    names = _parameter_names(model)
    if lazy := [name for parameter, name in names.items() if isinstance(parameter, UninitializedParameter)]:
        raise ValueError(f"`model` must be initialized, got the lazy parameter {lazy[0]!r}; run one forward pass first")
    if not names:
        raise ValueError("`model` must have parameters, got none; pass the network that is to be fine-tuned")
    if patterns is not None:
        for key, value, why in (
            ("head", head, "what no pattern matches is head"),
            ("example_input", example_input, "patterns need no forward pass"),
        ):
            if value is not None:
                raise ValueError(f"`{key}` must be left out where patterns are given, got both; {why}")
        return parts_of(model, _by_patterns(model, names, _compiled(patterns)))
    if is_peft(model):
        raise ValueError(
            f"`patterns` must name the adapters of a {type(model).__name__}, got none: blocks found by structure would "
            f"unfreeze the base weights that PEFT froze; {ADAPTERS}"
        )
    stated = None if head is None else stated_head(model, names, head)
    return parts_of(model, divided(model, stated, example_input))


def _parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Each parameter with its qualified name, wrappers' prefixes left out; tied ones by their first name."""
    names: dict[nn.Parameter, str] = {}
    for prefix, module in walk(model):
        for key, parameter in module.named_parameters(recurse=False):
            names.setdefault(parameter, join(prefix, key))
    return names


def _by_patterns(
    model: nn.Module, names: Mapping[nn.Parameter, str], patterns: Sequence[re.Pattern[str]]
) -> list[Block]:
    owner: dict[nn.Parameter, int] = {}
    common: list[str] = []  # for each pattern, the innermost module that holds all that it matches
    for index, pattern in enumerate(patterns):
        matched = [p for p, name in names.items() if pattern.search(name) and (p.is_floating_point() or p.is_complex())]
        if not matched:
            raise ValueError(
                f"`patterns` must each match a parameter, got {pattern.pattern!r}, which matches none; "
                f"the nearest names are {_nearest(pattern.pattern, names.values())}"
            )
        for parameter in matched:
            if parameter in owner:
                raise ValueError(
                    f"`patterns` must not overlap, got {names[parameter]!r} matched by "
                    f"{patterns[owner[parameter]].pattern!r} and {pattern.pattern!r}; make one of them narrower"
                )
            owner[parameter] = index
        columns = zip(*(names[parameter].split(".")[:-1] for parameter in matched), strict=False)
        common.append(".".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)))
    distinct = all(common) and len(set(common)) == len(common)
    labels = common if distinct else [pattern.pattern for pattern in patterns]
    return collected(model, labels, without_fixed(model, owner))


def _compiled(patterns: Any) -> list[re.Pattern[str]]:
    if isinstance(patterns, (str, bytes)) or not isinstance(patterns, Iterable):
        raise TypeError(
            f"`patterns` must be a list of regular expressions, got {patterns!r}; put a single one in a list"
        )
    compiled = []
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"`patterns` must hold strings, got {pattern!r}; write each block's regex as a string")
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(
                f"`patterns` must be valid regular expressions, got {pattern!r} ({error}); escape special characters"
            ) from error
    if not compiled:
        raise ValueError("`patterns` must hold at least one regular expression, got none; leave it out to find blocks")
    return compiled


def _nearest(pattern: str, names: Iterable[str]) -> str:
    """The three parameter or module names that look most like the pattern."""
    known = {".".join(parts[:end]) for parts in (name.split(".") for name in names) for end in range(1, len(parts) + 1)}
    plain = re.sub(r"[\\^$]", "", pattern).strip(".*")
    return ", ".join(repr(name) for name in difflib.get_close_matches(plain, sorted(known), n=3, cutoff=0))
