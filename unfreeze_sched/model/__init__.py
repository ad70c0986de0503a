"""The torch.nn side: an encoder's blocks, found and frozen."""

from unfreeze_sched.model.block import Block
from unfreeze_sched.model.encoder import encoder_blocks

__all__ = ["Block", "encoder_blocks"]
