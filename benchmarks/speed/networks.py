"""The real networks of the timing scripts, built from configurations with random weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transition_arms import Network

from unfreeze_sched import Block, encoder_blocks


def unet() -> nn.Module:
    """Smp's Unet on efficientnet-b0, 21 classes."""
    import segmentation_models_pytorch as smp  # noqa: PLC0415  # slow to import

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated names
        return smp.Unet("timm-efficientnet-b0", encoder_weights=None, classes=21)  # type: ignore[no-any-return]


def vit(image_size: int = 224) -> nn.Module:
    """Timm's ViT-B, patches of 16 pixels, 10 classes."""
    import timm  # noqa: PLC0415  # slow to import

    return timm.create_model("vit_base_patch16_224", num_classes=10, img_size=image_size)  # type: ignore[no-any-return]


def split(model: nn.Module) -> Network:
    """The head's parameters, and the blocks that `encoder_blocks` finds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        blocks = encoder_blocks(model)
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    heads = ("decoder", "segmentation_head", "head", "fc_norm")
    head = [
        parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in inside and name.startswith(heads)
    ]
    return Network(head, blocks)


def billion() -> Network:
    """A transformer of 1.1 thousand million parameters as shapes: 21 layers of width 2,048, and an output layer."""
    with torch.device("meta"):
        layers = [nn.TransformerEncoderLayer(2_048, 16, 8_192, bias=True, norm_first=True) for _ in range(21)]
        head = nn.Linear(2_048, 32_000)
    blocks = tuple(Block(f"layers.{index}", (layer,)) for index, layer in enumerate(layers))
    return Network(list(head.parameters()), blocks)


@dataclass
class Training:
    """A network with a batch of random images and targets."""

    model: nn.Module
    network: Network
    images: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def of(cls, model: nn.Module, image_size: int, batch_size: int, device: str = "cpu") -> Training:
        """In training mode, nothing frozen yet."""
        model, images = model.to(device), torch.randn(batch_size, 3, image_size, image_size, device=device)
        with torch.no_grad():
            targets = torch.rand_like(model.eval()(images))
        return cls(model.train(), split(model), images, targets)

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        """Binary cross-entropy."""
        return nn.functional.binary_cross_entropy_with_logits(logits, self.targets)

    def backward(self) -> None:
        """Forward and backward."""
        self.loss(self.model(self.images)).backward()  # type: ignore[no-untyped-call]


NETWORKS: dict[str, Callable[[], Network]] = {
    "efficientnet-b0 Unet": lambda: split(unet()),
    "ViT-B": lambda: split(vit()),
    "1.1 B transformer, meta": billion,
}
