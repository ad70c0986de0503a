"""Where the encoder ends: what the libraries' conventions say, or what the user states; never a guess."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from unfreeze_sched.model.tracing import Trace, children, join, unwrap, walk

_CLASSIFIERS = ("fc", "classifier", "head", "heads")  # torchvision's names
_SHOWN = 3  # children in the question for the head
_FIX = "pass the modules that train from the start, such as head=[model.fc]"


class Encoder(NamedTuple):
    """Where a model's encoder is."""

    name: str  # qualified, of the module that holds it; '' for the model
    top: nn.Module  # that module; what is outside of it is head, except for what feeds it
    head: frozenset[nn.Parameter] = frozenset()  # parameters inside of it that are head
    around: nn.Module | None = None  # the module above it, where that calls it its base model

    def scope(self, traced: Trace) -> nn.Module:
        """The module that is all encoder: `around` where `top` is a middle part of it, with embeddings before it."""
        if self.around is None or _root(self.around) != "transformers":
            return self.top
        inside = set(self.top.parameters())
        feeding = traced.feeding(inside)
        middle = any(traced.uses.get(p) in feeding for p in self.around.parameters() if p not in inside)
        return self.around if middle else self.top

    def head_of(self, traced: Trace) -> set[nn.Parameter]:
        """The parameters of the whole model that the forward pass uses and that are in no block."""
        inside = set(self.scope(traced).parameters())
        feeding = traced.feeding(inside)
        return {p for p, use in traced.uses.items() if p in self.head or (p not in inside and use not in feeding)}


def stated_head(model: nn.Module, names: Mapping[nn.Parameter, str], head: Any) -> frozenset[nn.Parameter]:
    """The parameters that `head=` means: modules and parameters, or an optimizer; an error says what is none."""
    if isinstance(head, Optimizer):
        return _held_by(head, model, names)
    if isinstance(head, (nn.Module, nn.Parameter)):
        head = (head,)
    if isinstance(head, (str, bytes)) or not isinstance(head, Iterable):
        raise TypeError(f"`head` must be modules, parameters or an optimizer, got {head!r}; {_FIX}")
    stated: set[nn.Parameter] = set()
    modules = set(model.modules())
    for part in head:
        if isinstance(part, nn.Module):
            kind, own = type(part).__name__, dict(part.named_parameters())
        elif isinstance(part, nn.Parameter):
            kind, own = f"parameter of shape {tuple(part.shape)}", {"": part}
        else:
            raise TypeError(f"`head` must hold modules or parameters, got {type(part).__name__}; {_FIX}")
        strange = [f"whose {key!r}" if key else "that" for key, parameter in own.items() if parameter not in names]
        if strange or (not own and unwrap(part) not in modules):
            what = f"{kind} {strange[0] if strange else 'that'} is not in it"
            raise ValueError(f"`head` must hold parts of the model, got a {what}; {_FIX}")
        if not own:
            raise ValueError(f"`head` must hold parameters, got a {kind} without any; leave it out of the list")
        stated.update(own.values())
    return frozenset(stated)


def _held_by(optimizer: Optimizer, model: nn.Module, names: Mapping[nn.Parameter, str]) -> frozenset[nn.Parameter]:
    kind = type(optimizer).__name__
    held = frozenset(p for group in optimizer.param_groups for p in group["params"] if p in names)
    if not held:
        raise ValueError(f"`head` must hold parts of the model, got {kind} with none of its parameters; {_FIX}")
    left = {p for p in names if p.is_floating_point() or p.is_complex()} - held
    # A table of positions that is held fixed may be left out, too.
    if all(isinstance(layer, nn.Embedding) and not layer.weight.requires_grad for layer in layers(model, left)):
        raise ValueError(
            f"`head` must hold just the head, got {kind} with all that trains of the model; {_FIX}, and "
            "let ProgressiveUnfreezer.from_model take the blocks out of the optimizer"
        )
    return held


def layers(model: nn.Module, parameters: Collection[nn.Parameter]) -> list[nn.Module]:
    """The modules without parts that hold some of these parameters; tokens and tables, which lie bare, have none."""
    return [m for _, m in walk(model) if not _parts(m) and any(p in parameters for p in m.parameters())]


def _parts(module: nn.Module) -> dict[str, nn.Module]:
    """The children that hold parameters."""
    return {key: child for key, child in children(module) if any(True for _ in child.parameters())}


def known_encoder(model: nn.Module) -> Encoder:
    """The encoder by the conventions of the libraries, and of models that name an `encoder` or `backbone`."""
    name, node, encoder = "", model, Encoder("", model)
    while True:
        inside = _parts(node)
        base = getattr(node, "base_model_prefix", None)  # transformers: the model below a head
        head = None if base in inside else _library_head(node, inside, is_base=encoder.around is not None)
        if head is not None:
            return encoder._replace(head=frozenset(head))
        key = base if base in inside else _encoder_key(inside, base)
        if key is not None and len(inside) > 1:
            name = join(name, key)
            encoder = Encoder(name, inside[key], around=node if key == base else None)
            if key != base:
                return _below_pyramid(encoder)
            node = inside[key]
        elif len(inside) == 1 and not any(True for _ in node.parameters(recurse=False)):
            ((key, node),) = inside.items()  # a plain wrapper
            name = join(name, key)
        elif encoder.top is not model:
            return encoder
        else:
            raise ValueError(_question(node, name, inside))


def refuse_inner_head(model: nn.Module, traced: Trace) -> None:
    """Refuse a task model of transformers beside whose base model nothing runs: its head lies within, unnamed."""
    for name, node in walk(model):
        beside = dict(children(node))
        key = str(getattr(node, "base_model_prefix", None))
        base = beside.pop(key, None) if _is_task_model(node) else None
        if base is not None and _root(base) == "transformers" and traced.runs.keys().isdisjoint(beside.values()):
            raise ValueError(_question(node, name, {key: base}))


def _encoder_key(inside: Mapping[str, nn.Module], base: str | None) -> str | None:
    """The child that its name says is the encoder; in transformers, `encoder` without a decoder is a middle part."""
    if "backbone" in inside:
        return "backbone"
    return "encoder" if "encoder" in inside and (base is None or "decoder" in inside) else None


def _below_pyramid(encoder: Encoder) -> Encoder:
    """The detection backbones of torchvision hold a `body` and the pyramid above it, which is none of the encoder."""
    inside = dict(children(encoder.top))
    return Encoder(join(encoder.name, "body"), inside["body"]) if {"body", "fpn"} <= inside.keys() else encoder


def _root(module: nn.Module) -> str:
    return type(module).__module__.split(".")[0]


def _is_task_model(module: nn.Module) -> bool:
    """Whether transformers named it for a task, as in `BertForMaskedLM`; a `RoFormerModel` is none."""
    return _root(module) == "transformers" and re.search("For[A-Z]", type(module).__name__) is not None


def _library_head(node: nn.Module, inside: Mapping[str, nn.Module], *, is_base: bool) -> set[nn.Parameter] | None:
    """The head inside of a library's model; `None` where no library says what it is."""
    path = type(node).__module__
    if callable(getattr(node, "get_classifier", None)) or _root(node) == "timm":
        return _timm_head(node)
    key = next((key for key in _CLASSIFIERS if hasattr(node, key)), None)
    if path.startswith("torchvision.models") and key is not None and "backbone" not in inside:
        return _torchvision_head(key, getattr(node, key))
    whole = path.startswith(("segmentation_models_pytorch.encoders", "torchvision.models._utils"))
    if _root(node) == "transformers" and isinstance(getattr(node, "base_model_prefix", None), str):
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
    parts = [*tree_leaves(found), *map(modules.get, tree_leaves(named))]
    return {p for part in parts if isinstance(part, nn.Module) for p in part.parameters()}


def _torchvision_head(key: str, head: Any) -> set[nn.Parameter]:
    """All of the head, but of a `classifier` of several pretrained layers the last, which is the one to replace."""
    if not isinstance(head, nn.Module):
        return set()
    layers = [module for module in head.modules() if any(p.dim() > 1 for p in module.parameters(recurse=False))]
    return set((layers[-1] if key == "classifier" and layers else head).parameters())


def _question(node: nn.Module, name: str, inside: Mapping[str, nn.Module]) -> str:
    shown = [f"{_path(join(name, key))} ({sum(p.numel() for p in inside[key].parameters()):,})" for key in inside]
    last = f"whose last children are {', '.join(shown[-_SHOWN:])} (parameters)" if shown else "which has no children"
    return (
        f"`head` must say what trains from the start, got None for a {type(node).__name__}, {last}; "
        "pass head=[...] with all that is new, or head=() where the model is all encoder"
    )


def _path(name: str) -> str:
    """How code reaches a module: `model.layers[0].fc`."""
    return "model" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in name.split("."))
