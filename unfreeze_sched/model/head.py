"""Where the encoder ends: what the libraries' conventions say, or what the user states; never a guess."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from unfreeze_sched.model.tracing import Trace, children, join, unwrap, walk

_CLASSIFIERS = ("fc", "classifier", "head", "heads")  # torchvision's names
_SHOWN = 3  # children in the question for the head


@dataclass(frozen=True)
class Encoder:
    """Where a model's encoder is.

    Args:
        name: Qualified name of the module that holds it; '' for the model.
        top: That module. What is outside of it is head, except for what feeds it.
        head: Parameters inside of it that are head.
        around: The module above it, where that calls it its base model.
    """

    name: str
    top: nn.Module
    head: frozenset[nn.Parameter] = frozenset()
    around: nn.Module | None = None

    def scope(self, traced: Trace) -> nn.Module:
        """The module that is all encoder: `around` where `top` is a middle part of it, with embeddings before it."""
        if self.around is None or _root(self.around) != "transformers":
            return self.top
        inside = set(self.top.parameters())
        feeding = traced.feeding(traced.uses[p] for p in inside if p in traced.uses)
        middle = any(traced.uses.get(p) in feeding for p in self.around.parameters() if p not in inside)
        return self.around if middle else self.top

    def head_of(self, model: nn.Module, traced: Trace) -> set[nn.Parameter]:
        """The parameters of the whole model that the forward pass uses and that are in no block."""
        inside = set(self.scope(traced).parameters())
        feeding = traced.feeding(traced.uses[p] for p in inside if p in traced.uses)
        outside = {p for p in model.parameters() if p not in inside and traced.uses.get(p) not in feeding}
        return {p for p in outside | self.head if p in traced.uses}


def stated_head(model: nn.Module, names: Mapping[nn.Parameter, str], head: Any) -> frozenset[nn.Parameter]:
    """The parameters that `head=` means.

    Args:
        model: The model.
        names: Its parameters with their names.
        head: Modules and parameters, or an optimizer.

    Raises:
        TypeError: It is none of these.
        ValueError: Something is not in the model or holds nothing, or an optimizer holds all that trains.
    """
    if isinstance(head, Optimizer):
        held = frozenset(p for group in head.param_groups for p in group["params"] if p in names)
        kind = type(head).__name__
        if not held:
            raise ValueError(f"`head` must hold parts of the model, got {kind} with none of its parameters; {_FIX}")
        left = {p for p in names if p.is_floating_point() or p.is_complex()} - held
        if not any(_is_encoder_layer(module) for module in layers(model, left)):
            raise ValueError(
                f"`head` must hold just the head, got {kind} with all that trains of the model; {_FIX}, and "
                "let ProgressiveUnfreezer.from_model take the blocks out of the optimizer"
            )
        return held
    if isinstance(head, (nn.Module, nn.Parameter)):
        head = (head,)
    if isinstance(head, (str, bytes)) or not isinstance(head, Iterable):
        raise TypeError(f"`head` must be modules, parameters or an optimizer, got {head!r}; {_FIX}")
    stated: set[nn.Parameter] = set()
    modules = set(model.modules())
    for part in head:
        if not isinstance(part, (nn.Module, nn.Parameter)):
            raise TypeError(f"`head` must hold modules or parameters, got {type(part).__name__}; {_FIX}")
        own = dict(part.named_parameters()) if isinstance(part, nn.Module) else {"": part}
        kind = type(part).__name__ if isinstance(part, nn.Module) else f"parameter of shape {tuple(part.shape)}"
        strange = [key for key, parameter in own.items() if parameter not in names]
        if strange or (not own and unwrap(part) not in modules and part not in modules):  # type: ignore[arg-type]
            what = (
                f"{kind} whose {strange[0]!r} is not in it" if strange and strange[0] else f"{kind} that is not in it"
            )
            raise ValueError(f"`head` must hold parts of the model, got a {what}; {_FIX}")
        if not own:
            raise ValueError(f"`head` must hold parameters, got a {kind} without any; leave it out of the list")
        stated.update(own.values())
    return frozenset(stated)


_FIX = "pass the modules that train from the start, such as head=[model.fc]"


def layers(model: nn.Module, parameters: Collection[nn.Parameter]) -> Iterator[nn.Module]:
    """The modules without parts that hold some of these parameters; tokens and tables, which lie bare, have none."""
    for _, module in walk(model):
        is_layer = not any(True for _, child in children(module) for _ in child.parameters())
        if is_layer and any(parameter in parameters for parameter in module.parameters()):
            yield module


def _is_encoder_layer(module: nn.Module) -> bool:
    """Whether a layer that an optimizer left out is more than a table of positions that is held fixed."""
    return not isinstance(module, nn.Embedding) or module.weight.requires_grad


def known_encoder(model: nn.Module) -> Encoder:
    """The encoder by the conventions of the libraries, and of models that name an `encoder` or `backbone`.

    Raises:
        ValueError: No convention says what the head is.
    """
    name, node, encoder = "", model, Encoder("", model)
    while True:
        inside = {key: child for key, child in children(node) if any(True for _ in child.parameters())}
        base = getattr(node, "base_model_prefix", None)  # transformers: the model below a head
        head = None if base in inside else _library_head(node, inside, is_base=encoder.around is not None)
        if head is not None:
            return Encoder(encoder.name, encoder.top, frozenset(head), encoder.around)
        key = base if base in inside else _encoder_key(inside, base)
        if key is not None and len(inside) > 1:
            name = join(name, key)
            encoder = Encoder(name, inside[key], around=node if key == base else None)
            if key != base:
                return _below_pyramid(encoder)
            node = inside[key]
        elif len(inside) == 1 and not any(True for _ in node.parameters(recurse=False)):
            ((key, child),) = inside.items()  # a plain wrapper
            name, node = join(name, key), child
        elif encoder.top is not model:
            return encoder
        else:
            raise ValueError(_question(node, name, inside))


def refuse_inner_head(model: nn.Module, traced: Trace) -> None:
    """Refuse a task model of transformers beside whose base model nothing runs: its head lies within, unnamed.

    Raises:
        ValueError: There is one.
    """
    for name, node in walk(model):
        beside = dict(children(node))
        base = beside.pop(str(getattr(node, "base_model_prefix", None)), None)
        if not _is_task_model(node) or base is None or _root(base) != "transformers":
            continue
        if traced.runs.keys().isdisjoint(beside.values()):
            raise ValueError(_question(node, name, {str(node.base_model_prefix): base}))


def _encoder_key(inside: Mapping[str, nn.Module], base: str | None) -> str | None:
    """The child that its name says is the encoder; in transformers, `encoder` without a decoder is a middle part."""
    if "backbone" in inside:
        return "backbone"
    return "encoder" if "encoder" in inside and (base is None or "decoder" in inside) else None


def _below_pyramid(encoder: Encoder) -> Encoder:
    """The detection backbones of torchvision hold a `body` and the pyramid above it, which is none of the encoder."""
    inside = dict(children(encoder.top))
    if "body" in inside and "fpn" in inside:
        return Encoder(join(encoder.name, "body"), inside["body"])
    return encoder


def _root(module: nn.Module) -> str:
    return type(module).__module__.split(".")[0]


def _is_task_model(module: nn.Module) -> bool:
    """Whether transformers named it for a task, as in `BertForMaskedLM`; a `RoFormerModel` is none."""
    return _root(module) == "transformers" and re.search("For[A-Z]", type(module).__name__) is not None


def _library_head(node: nn.Module, inside: Mapping[str, nn.Module], *, is_base: bool) -> set[nn.Parameter] | None:
    """The head inside of a library's model; `None` where no library says what it is."""
    root, path = _root(node), type(node).__module__
    if callable(getattr(node, "get_classifier", None)) or root == "timm":
        return _timm_head(node)
    if path.startswith("segmentation_models_pytorch.encoders"):
        return set()
    if path.startswith("torchvision.models"):
        key = next((key for key in _CLASSIFIERS if hasattr(node, key)), None)
        if key is not None and "backbone" not in inside:
            return _torchvision_head(key, getattr(node, key))
        return set() if path.startswith("torchvision.models._utils") else None
    if root == "transformers" and isinstance(getattr(node, "base_model_prefix", None), str):
        modalities = getattr(node, "input_modalities", "")
        towers = not is_base and not isinstance(modalities, str) and len(modalities) > 1
        whole = not _is_task_model(node) and not towers and not {"backbone", "decoder"} & inside.keys()
        return set() if whole else None
    return None


def _timm_head(node: nn.Module) -> set[nn.Parameter]:
    """What timm's own method and its configuration say is a classifier."""
    parts: list[Any] = []
    try:
        found = node.get_classifier()  # type: ignore[operator]
        parts += found if isinstance(found, (tuple, list)) else [found]
    except (AttributeError, TypeError):  # a feature extractor; smp deletes the classifier and leaves the method
        pass
    cfg = getattr(node, "pretrained_cfg", None)
    named = cfg.get("classifier") if isinstance(cfg, Mapping) else None
    modules = dict(node.named_modules())
    parts += [modules.get(name) for name in ((named,) if isinstance(named, str) else named or ())]
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
