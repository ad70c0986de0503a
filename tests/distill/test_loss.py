from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from unfreeze_sched import distill
from unfreeze_sched.distill import loss as loss_module
from unfreeze_sched.distill.loss import DistillationLoss, LossParts

Floats = NDArray[np.float64]
IGNORED = 255


def draw(
    classes: int, seed: int = 0, batch: int = 2, size: tuple[int, int] = (4, 5), ignored: float = 0.2
) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits in float64, and masks of which a share is ignored."""
    rng = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(batch, classes, *size, generator=rng, dtype=torch.float64) for _ in range(2))
    masks = torch.randint(max(classes, 2), (batch, *size), generator=rng)
    masks[torch.rand(batch, *size, generator=rng) < ignored] = IGNORED
    return student, teacher, masks


def twin(student: Tensor, teacher: Tensor, masks: Tensor, temperature: float) -> tuple[float, float, float]:
    """The three terms again in numpy, from the textbook formulas, pixel by pixel; one channel becomes two."""

    def pixels(logits: Tensor) -> Floats:
        array = np.moveaxis(logits.numpy(), 1, -1).reshape(-1, logits.shape[1])[keep]
        return np.concatenate([np.zeros_like(array), array], axis=1) if array.shape[1] == 1 else array

    def softmax(logits: Floats) -> Floats:
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))

    keep = masks.numpy().reshape(-1) != IGNORED
    labels = masks.numpy().reshape(-1)[keep]
    if not len(labels):
        return 0.0, 0.0, 0.0
    p, q = softmax(pixels(teacher) / temperature), softmax(pixels(student) / temperature)
    distillation = temperature**2 * float(np.mean([np.sum(a * np.log(a / b)) for a, b in zip(p, q, strict=True)]))
    likely = softmax(pixels(student))
    cross_entropy = float(np.mean([-np.log(row[label]) for row, label in zip(likely, labels, strict=True)]))
    classes = [1] if student.shape[1] == 1 else range(student.shape[1])
    dice = []
    for index in classes:
        true = labels == index
        overlap = 2 * likely[true, index].sum() / (likely[:, index].sum() + true.sum())
        dice.append(1 - overlap if true.any() else 0.0)
    return distillation, float(np.mean(dice)), cross_entropy


@settings(max_examples=60, deadline=None)
@given(
    classes=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    alpha=st.floats(0, 1),
    temperature=st.floats(0.5, 20),
)
def test_every_term_is_that_of_a_numpy_twin(
    *, classes: int, seed: int, batch: int, size: tuple[int, int], ignored: float, alpha: float, temperature: float
) -> None:
    """Distillation, Dice, cross entropy and their weighted sum agree with formulas written independently."""
    data = draw(classes, seed, batch, size, ignored)
    parts = DistillationLoss(alpha, temperature).parts(*data)
    distillation, dice, cross_entropy = twin(*data, temperature)
    expected = (alpha * distillation + (1 - alpha) * (dice + cross_entropy), distillation, dice, cross_entropy)
    assert [part.item() for part in parts] == pytest.approx(list(expected), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("classes", [1, 3])
def test_the_twin_tells_a_mutated_loss_apart(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With teacher and student swapped inside the divergence the comparison above would fail."""
    data = draw(classes)
    right = DistillationLoss().parts(*data)
    assert right.distillation.item() == pytest.approx(twin(*data, 2.0)[0], rel=1e-6)
    divergence = loss_module.F.kl_div
    monkeypatch.setattr(loss_module.F, "kl_div", lambda q, p, **keywords: divergence(p, q, **keywords))
    assert DistillationLoss().parts(*data).distillation.item() != pytest.approx(twin(*data, 2.0)[0], rel=1e-3)


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 7.0])
def test_equal_logits_distil_nothing(classes: int, temperature: float) -> None:
    """The distillation term is 0 where student and teacher agree, and positive where they do not."""
    student, teacher, masks = draw(classes)
    loss = DistillationLoss(temperature=temperature)
    assert loss.parts(student, student, masks).distillation.item() == pytest.approx(0, abs=1e-12)
    assert loss.parts(student, teacher, masks).distillation.item() > 0.01


@pytest.mark.parametrize("classes", [1, 3])
def test_an_ignored_pixel_changes_no_term(classes: int) -> None:
    """Logits of ignored pixels are free, get no gradient, and the means are those of a batch without them."""
    student, teacher, masks = draw(classes, ignored=0)
    masks[:, :, 3:] = IGNORED
    other, other_teacher, _ = draw(classes, seed=1)
    other[..., :3], other_teacher[..., :3] = student[..., :3], teacher[..., :3]
    student.requires_grad_()
    loss = DistillationLoss()
    parts = loss.parts(student, teacher, masks)
    for same in (
        loss.parts(other, other_teacher, masks),
        loss.parts(student[..., :3], teacher[..., :3], masks[..., :3]),
    ):
        assert [part.item() for part in same] == pytest.approx([part.item() for part in parts], rel=1e-12)
    parts.total.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert not student.grad[..., 3:].any()
    assert student.grad[..., :3].all()


@pytest.mark.parametrize("classes", [1, 3])
def test_a_batch_with_every_pixel_ignored_has_loss_0_and_gradient_0(classes: int) -> None:
    """No pixel to learn from is no error and no NaN."""
    student, teacher, masks = draw(classes, ignored=1)
    student.requires_grad_()
    loss = DistillationLoss()(student, teacher, masks)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


@pytest.mark.parametrize("classes", [1, 3])
def test_gradients_are_those_of_finite_differences_and_never_reach_the_teacher(classes: int) -> None:
    """In float64, gradcheck holds for the student; the teacher's gradient stays None."""
    student, teacher, masks = draw(classes, batch=1, size=(2, 3))
    student.requires_grad_()
    teacher.requires_grad_()
    loss = DistillationLoss(alpha=0.7, temperature=3.0)
    assert torch.autograd.gradcheck(lambda logits: loss(logits, teacher, masks), student)
    loss(student, teacher, masks).backward()
    assert student.grad is not None
    assert student.grad.any()
    assert teacher.grad is None


@pytest.mark.parametrize("classes", [1, 3])
def test_t_squared_keeps_the_gradients_scale(classes: int) -> None:
    """Near agreement, KL goes as 1 / T^2, so the term and its gradient hardly depend on a high T."""
    student, teacher, masks = draw(classes, ignored=0)
    student, teacher = (0.01 * student).requires_grad_(), 0.01 * teacher
    results = []
    for temperature in (5.0, 50.0):
        term = DistillationLoss(temperature=temperature).parts(student, teacher, masks).distillation
        (gradient,) = torch.autograd.grad(term, student)
        results.append((term.item(), gradient))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-2)
    assert (results[0][1] - results[1][1]).norm() < 1e-2 * results[1][1].norm()


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_large_logits_stay_finite(classes: int, scale: float) -> None:
    """Logits of 1e4 in float32 give finite terms and gradients."""
    student, teacher, masks = draw(classes)
    student = (scale * student).float().requires_grad_()
    parts = DistillationLoss().parts(student, (scale * teacher).float(), masks)
    parts.total.backward()  # type: ignore[no-untyped-call]
    assert all(part.isfinite() for part in parts)
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(classes: int, dtype: torch.dtype) -> None:
    """Under autocast, half logits give exactly the float32 loss of the same numbers, in float32."""
    student, teacher, masks = draw(classes)
    student, teacher = student.to(dtype), teacher.to(dtype)
    loss = DistillationLoss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = loss(student, teacher, masks)
    assert mixed.dtype == torch.float32
    assert mixed.item() == loss(student.float(), teacher.float(), masks).item()


def test_binary_masks_come_in_both_shapes_and_any_dtype() -> None:
    """(B, H, W) and (B, 1, H, W), bool, uint8, int64 and float masks mean the same."""
    student, teacher, masks = draw(1, ignored=0)
    loss = DistillationLoss()
    expected = loss(student, teacher, masks).item()
    for same in (masks.unsqueeze(1), masks.bool(), masks.to(torch.uint8), masks.float(), masks.float().unsqueeze(1)):
        assert loss(student, teacher, same).item() == expected


def test_the_ends_of_alpha_are_the_single_terms() -> None:
    """Alpha 1 is distillation alone, alpha 0 the task alone, and another ignore_index is obeyed."""
    student, teacher, masks = draw(3)
    for alpha in (0, 1):
        parts = DistillationLoss(alpha=alpha).parts(student, teacher, masks)
        assert parts.total == (parts.distillation if alpha else parts.dice + parts.cross_entropy)
    masks[masks == IGNORED] = -100
    assert (
        DistillationLoss(alpha=0, ignore_index=-100)(student, teacher, masks)
        == DistillationLoss(alpha=0).parts(student, teacher, masks.where(masks >= 0, IGNORED)).total
    )


def test_the_loss_has_no_state_and_prints_its_arguments() -> None:
    """Nothing enters a checkpoint, and repr tells the arguments."""
    loss = DistillationLoss(alpha=0.25, temperature=4)
    assert not loss.state_dict()
    assert "alpha=0.25, temperature=4.0, ignore_index=255" in repr(loss)
    assert LossParts._fields == ("total", "distillation", "dice", "cross_entropy")


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        (
            {"temperature": 0},
            ValueError,
            "`temperature` must be a positive number, got 0; use 1 for unsoftened targets",
        ),
        (
            {"temperature": float("nan")},
            ValueError,
            "`temperature` must be a positive number, got nan; use 1 for unsoft",
        ),
        (
            {"temperature": float("inf")},
            ValueError,
            "`temperature` must be a positive number, got inf; use 1 for unsoft",
        ),
        ({"temperature": True}, ValueError, "`temperature` must be a positive number, got True; use 1 for unsoftened"),
        ({"temperature": "2"}, ValueError, "`temperature` must be a positive number, got '2'; use 1 for unsoftened"),
        ({"alpha": 1.5}, ValueError, "`alpha` must be a number in [0, 1], got 1.5; use 0.5 for equal weights"),
        ({"alpha": -0.1}, ValueError, "`alpha` must be a number in [0, 1], got -0.1; use 0.5 for equal weights"),
        ({"alpha": float("nan")}, ValueError, "`alpha` must be a number in [0, 1], got nan; use 0.5 for equal weights"),
        ({"alpha": True}, ValueError, "`alpha` must be a number in [0, 1], got True; use 0.5 for equal weights"),
        ({"alpha": None}, ValueError, "`alpha` must be a number in [0, 1], got None; use 0.5 for equal weights"),
        (
            {"ignore_index": None},
            TypeError,
            "`ignore_index` must be an integer, got None; use 255, or -100 for no pixel",
        ),
        (
            {"ignore_index": True},
            TypeError,
            "`ignore_index` must be an integer, got True; use 255, or -100 for no pixel",
        ),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], kind: type[Exception], text: str) -> None:
    """Each argument is checked at construction, and the text names it, the value and a fix."""
    with pytest.raises(kind) as caught:
        DistillationLoss(**arguments)
    assert str(caught.value).startswith(text)


LOGITS = torch.zeros(2, 3, 4, 4)
MASKS = torch.zeros(2, 4, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("student", "teacher", "masks", "kind", "text"),
    [
        (
            LOGITS,
            torch.zeros(2, 1, 4, 4),
            MASKS,
            ValueError,
            (
                "`teacher_logits` must have the student's shape (2, 3, 4, 4), got (2, 1, 4, 4); "
                "build both models with the same `classes` and feed both the same images"
            ),
        ),
        (
            LOGITS,
            LOGITS,
            torch.zeros(2, 8, 8, dtype=torch.int64),
            ValueError,
            (
                "`masks` must be (2, 4, 4) for logits of (2, 3, 4, 4), got (2, 8, 8); "
                "pass one class index a pixel, resized to the logits"
            ),
        ),
        (
            LOGITS,
            LOGITS,
            MASKS.unsqueeze(1),
            ValueError,
            (
                "`masks` must be (2, 4, 4) for logits of (2, 3, 4, 4), got (2, 1, 4, 4); "
                "pass one class index a pixel, resized to the logits"
            ),
        ),
        (
            LOGITS[0],
            LOGITS[0],
            MASKS[0],
            ValueError,
            "`student_logits` must be (B, C, H, W), got (3, 4, 4); pass the model's output as it is",
        ),
        (
            LOGITS,
            LOGITS,
            MASKS.float(),
            TypeError,
            "`masks` must hold integers for 3 classes, got torch.float32; use masks.long()",
        ),
        (
            LOGITS,
            LOGITS,
            MASKS + 3,
            ValueError,
            "`masks` must hold classes 0 to 2 or 255 for 3 channels, got 3; check `classes` and how masks are read",
        ),
        (
            LOGITS[:, :1],
            LOGITS[:, :1],
            MASKS + 0.5,
            ValueError,
            "`masks` must hold classes 0 to 1 or 255 for 1 channel, got 0.5; check `classes` and how masks are read",
        ),
        (LOGITS, LOGITS, MASKS.numpy(), TypeError, "`masks` must be a tensor, got ndarray; use torch.as_tensor"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(
    student: Tensor, teacher: Tensor, masks: Any, kind: type[Exception], text: str
) -> None:
    """A wrong shape, dtype or mask value raises before anything is computed, with both shapes and a fix."""
    with pytest.raises(kind) as caught:
        DistillationLoss()(student, teacher, masks)
    assert str(caught.value) == text


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without segmentation_models_pytorch the error says what to install."""
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    monkeypatch.delitem(sys.modules, "unfreeze_sched.distill.loss")
    with pytest.raises(ModuleNotFoundError) as caught:
        _ = distill.DistillationLoss
    assert str(caught.value) == (
        "`DistillationLoss` needs segmentation_models_pytorch, which is not installed; "
        "pip install 'unfreeze-sched[distill]'"
    )
