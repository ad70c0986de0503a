"""The torch.nn side: an encoder's blocks, found and frozen; who has them already needs no tracer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unfreeze_sched.model.block import Block

if TYPE_CHECKING:
    from unfreeze_sched.model.encoder import encoder_blocks

__all__ = ["Block", "encoder_blocks"]


def __getattr__(name: str) -> object:
    if name != "encoder_blocks":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from unfreeze_sched.model.encoder import encoder_blocks  # noqa: PLC0415  # see above

    return encoder_blocks


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
