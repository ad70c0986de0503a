"""From a model to its blocks: where its encoder ends, by the libraries' conventions or as the user states it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from unfreeze_sched.model.block import ADAPTERS, Block, parts_of, root_of
from unfreeze_sched.model.division import Encoder, collected, divided, parts, without_fixed
from unfreeze_sched.model.tracing import Trace, TraceError, children, join, trace, unwrap, walk

Names = Mapping[nn.Parameter, str]  # each parameter of the model, with its qualified name

_CLASSIFIERS = ("fc", "classifier", "head", "heads")  # torchvision's names
_SHOWN = 3  # children in the question for the head
_FIX = "pass the modules that train from the start, such as head=[model.fc]"


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
    fixed, and the log says which. The model is not changed, not run on data, and its memory not copied.

    Args:
        model: An smp, timm, torchvision or transformers model, or any module with its `head`. DDP and `torch.compile`
            wrappers are looked through.
        patterns: One regular expression a block, shallow to deep, searched for in the parameters' qualified names.
            The model is not run then, and what no pattern matches is in no block.
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
    if patterns is None:
        return parts_of(model, _by_structure(model, names, head, example_input))
    both = "must be left out where patterns are given, got both"
    if head is not None:
        raise ValueError(f"`head` {both}; what no pattern matches is head")
    if example_input is not None:
        raise ValueError(f"`example_input` {both}; patterns need no forward pass")
    return parts_of(model, _by_patterns(model, names, _compiled(patterns)))


def _parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Each parameter with its qualified name, wrappers' prefixes left out; tied ones by their first name."""
    names: dict[nn.Parameter, str] = {}
    for prefix, module in walk(model):
        for key, parameter in module.named_parameters(recurse=False):
            names.setdefault(parameter, join(prefix, key))
    return names


def _by_patterns(model: nn.Module, names: Names, patterns: Sequence[re.Pattern[str]]) -> list[Block]:
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
    paths = (name.split(".") for name in names)
    known = {".".join(path[:end]) for path in paths for end in range(1, len(path) + 1)}
    plain = re.sub(r"[\\^$]", "", pattern).strip(".*")
    return ", ".join(repr(name) for name in difflib.get_close_matches(plain, sorted(known), n=3, cutoff=0))


def _by_structure(model: nn.Module, names: Names, head: Any, example_input: Any) -> list[Block]:
    if root_of(model) == "peft":
        raise ValueError(
            f"`patterns` must name the adapters of a {type(model).__name__}, got none: blocks found by structure would "
            f"unfreeze the base weights that PEFT froze; {ADAPTERS}"
        )
    encoder = _known_encoder(model, names) if head is None else Encoder("", model, _stated_head(model, names, head))
    traced = _traced(model, encoder, example_input)
    if head is None:
        _refuse_inner_head(model, traced)
    outside = encoder.head_of(traced)
    left = traced.uses.keys() - outside
    if not left or (head is not None and encoder.head and not _layers(model, names, left)):  # a token is no encoder
        what = "`model`" if head is None else "`head`"
        fix = "name the blocks with patterns=" if head is None else "leave the encoder out of it"
        raise ValueError(f"{what} must leave an encoder below the head, got {type(model).__name__} without one; {fix}")
    return divided(model, encoder, traced, outside)


def _traced(model: nn.Module, encoder: Encoder, example_input: Any) -> Trace:
    try:
        return trace(model, example_input)
    except TraceError:
        # A detector computes its boxes from data; what it reads of its backbone is all of the backbone's outputs.
        # Elsewhere, or where more is encoder, something may run before the backbone.
        detector = type(model).__module__.startswith("torchvision.models.detection")
        backbone = getattr(model, "backbone", nn.Module())
        alone = set(encoder.top.parameters()) - encoder.head <= set(backbone.parameters())
        if not detector or not alone or example_input is not None:
            raise
        return trace(backbone)


def _stated_head(model: nn.Module, names: Names, head: Any) -> frozenset[nn.Parameter]:
    """The parameters that `head=` means: modules and parameters, or an optimizer; an error says what is none."""
    if isinstance(head, Optimizer):
        return _held_by(head, model, names)
    if isinstance(head, (nn.Module, nn.Parameter)):
        head = (head,)
    if isinstance(head, (str, bytes)) or not isinstance(head, Iterable):
        raise TypeError(f"`head` must be modules, parameters or an optimizer, got {head!r}; {_FIX}")
    stated: set[nn.Parameter] = set()
    for part in head:
        if isinstance(part, nn.Module):
            kind, own = type(part).__name__, dict(part.named_parameters())
        elif isinstance(part, nn.Parameter):
            kind, own = f"parameter of shape {tuple(part.shape)}", {"": part}
        else:
            raise TypeError(f"`head` must hold modules or parameters, got {type(part).__name__}; {_FIX}")
        strange = [f"whose {key!r}" if key else "that" for key, parameter in own.items() if parameter not in names]
        if strange:
            raise ValueError(f"`head` must hold parts of the model, got a {kind} {strange[0]} is not in it; {_FIX}")
        if not own:
            raise ValueError(f"`head` must hold parameters, got a {kind} without any; leave it out of the list")
        stated.update(own.values())
    return frozenset(stated)


def _held_by(optimizer: Optimizer, model: nn.Module, names: Names) -> frozenset[nn.Parameter]:
    kind = type(optimizer).__name__
    held = frozenset(p for group in optimizer.param_groups for p in group["params"] if p in names)
    if not held:
        raise ValueError(f"`head` must hold parts of the model, got {kind} with none of its parameters; {_FIX}")
    left = {p for p in names if p.is_floating_point() or p.is_complex()} - held
    # A table of positions that is held fixed may be left out, too.
    if all(isinstance(layer, nn.Embedding) and not layer.weight.requires_grad for layer in _layers(model, names, left)):
        raise ValueError(
            f"`head` must hold just the head, got {kind} with all that trains of the model; {_FIX}, and "
            "let ProgressiveUnfreezer.from_model take the blocks out of the optimizer"
        )
    return held


def _layers(model: nn.Module, names: Names, some: Collection[nn.Parameter]) -> list[nn.Module]:
    """The modules without parts that hold some of these parameters; tokens and tables, which lie bare, have none."""
    return [m for _, m in walk(model) if not parts("", m, names) and any(p in some for p in m.parameters())]


def _known_encoder(model: nn.Module, names: Names) -> Encoder:
    """The encoder by the conventions of the libraries, and of models that name an `encoder` or `backbone`."""
    name, node, encoder = "", model, Encoder("", model)
    while True:
        inside = dict(parts("", node, names))
        base = getattr(node, "base_model_prefix", None)  # transformers: the model below a head
        head = None if base in inside else _library_head(node, inside, is_base=encoder.around is not None)
        if head is not None:
            return encoder._replace(head=frozenset(head))
        key = base if base in inside else _encoder_key(inside, base)
        if key is not None and len(inside) > 1:
            name = join(name, key)
            encoder = Encoder(name, inside[key], around=node if key == base else None)
            node = inside[key]
            if key != base:
                # torchvision's backbones of detectors hold a `body`, and above it a pyramid, which is no encoder.
                below = dict(children(node))
                return Encoder(join(name, "body"), below["body"]) if {"body", "fpn"} <= below.keys() else encoder
        elif len(inside) == 1 and not any(True for _ in node.parameters(recurse=False)):
            ((key, node),) = inside.items()  # a plain wrapper
            name = join(name, key)
        elif encoder.top is not model:
            return encoder
        else:
            raise ValueError(_question(node, name, inside))


def _refuse_inner_head(model: nn.Module, traced: Trace) -> None:
    """Refuse a task model of transformers beside whose base model nothing runs: its head lies within, unnamed."""
    for name, node in walk(model):
        beside = dict(children(node))
        key = str(getattr(node, "base_model_prefix", None))
        base = beside.pop(key, None) if _is_task_model(node) else None
        if base is not None and root_of(base) == "transformers" and traced.runs.keys().isdisjoint(beside.values()):
            raise ValueError(_question(node, name, {key: base}))


def _encoder_key(inside: Mapping[str, nn.Module], base: str | None) -> str | None:
    """The child that its name says is the encoder; in transformers, `encoder` without a decoder is a middle part."""
    if "backbone" in inside:
        return "backbone"
    return "encoder" if "encoder" in inside and (base is None or "decoder" in inside) else None


def _is_task_model(module: nn.Module) -> bool:
    """Whether transformers named it for a task, as in `BertForMaskedLM`; a `RoFormerModel` is none."""
    return root_of(module) == "transformers" and re.search("For[A-Z]", type(module).__name__) is not None


def _library_head(node: nn.Module, inside: Mapping[str, nn.Module], *, is_base: bool) -> set[nn.Parameter] | None:
    """The head inside of a library's model; `None` where no library says what it is."""
    path = type(node).__module__
    if callable(getattr(node, "get_classifier", None)) or root_of(node) == "timm":
        return _timm_head(node)
    key = next((key for key in _CLASSIFIERS if hasattr(node, key)), None)
    if path.startswith("torchvision.models") and key is not None and "backbone" not in inside:
        return _torchvision_head(key, getattr(node, key))
    whole = path.startswith(("segmentation_models_pytorch.encoders", "torchvision.models._utils"))
    if root_of(node) == "transformers" and isinstance(getattr(node, "base_model_prefix", None), str):
        modalities = getattr(node, "input_modalities", "")
        towers = not is_base and not isinstance(modalities, str) and len(modalities) > 1
        whole = not _is_task_model(node) and not towers and not {"backbone", "decoder"} & inside.keys()
    return set() if whole else None


def _timm_head(node: nn.Module) -> set[nn.Parameter]:
    """What timm's own method and its configuration say is a classifier."""
    found: Any = ()
    with suppress(AttributeError, TypeError):  # a feature extractor; smp deletes the classifier and leaves the method
        found = node.get_classifier()  # type: ignore[operator]
    cfg = getattr(node, "pretrained_cfg", None)
    named = cfg.get("classifier") if isinstance(cfg, Mapping) else ()
    modules = dict(node.named_modules())
    classifiers = [*tree_leaves(found), *map(modules.get, tree_leaves(named))]
    return {p for part in classifiers if isinstance(part, nn.Module) for p in part.parameters()}


def _torchvision_head(key: str, head: Any) -> set[nn.Parameter]:
    """All of the head, but of a `classifier` of several pretrained layers the last, which is the one to replace."""
    if not isinstance(head, nn.Module):
        return set()
    layers = [module for module in head.modules() if any(p.dim() > 1 for p in module.parameters(recurse=False))]
    return set((layers[-1] if key == "classifier" and layers else head).parameters())


def _question(node: nn.Module, name: str, inside: Mapping[str, nn.Module]) -> str:
    shown = []
    for key, child in [*inside.items()][-_SHOWN:]:
        path = "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in join(name, key).split("."))
        shown.append(f"model{path} ({sum(p.numel() for p in child.parameters()):,})")
    last = f"whose last children are {', '.join(shown)} (parameters)" if shown else "which has no children"
    return (
        f"`head` must say what trains from the start, got None for a {type(node).__name__}, {last}; "
        "pass head=[...] with all that is new, or head=() where the model is all encoder"
    )
