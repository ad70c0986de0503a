"""The reference: a segmentation student distilled from a larger teacher, its encoder progressively unfrozen.

It imports the core, segmentation_models_pytorch and timm; nothing of the package imports it but the command line.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unfreeze_sched.distill.loss import DistillationLoss
    from unfreeze_sched.distill.wrapper import DistillationUNetWrapper

__all__ = ["DistillationLoss", "DistillationUNetWrapper"]

_MODULES = {"DistillationLoss": "loss", "DistillationUNetWrapper": "wrapper"}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"`{name}` needs {error.name}, which is not installed; pip install 'unfreeze-sched[distill]'",
            name=error.name,
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
